"""LoRAs' weights by part, what is left out of a LoRA, LoRAs that are damaged: by command and on record."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert import convert
from diffusion_convert.checkpoint.lora import fuse
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.cli.main import BAD_INPUT
from diffusion_convert.option_values import Lora, parse_lora
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.bundle import manifest
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import AttentionKind

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Q_WEIGHT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
V = "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
V_WEIGHT = "text_model.encoder.layers.0.self_attn.v_proj.weight"


def layer(name: str, value: float = 1.0, out: int = 32, into: int = 32) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.full((1, into), value), f"{name}.lora_up.weight": torch.ones(out, 1)}


def saved(path: Path, *layers: dict[str, torch.Tensor], **header: str) -> Path:
    save_file({name: value for one in layers for name, value in one.items()}, path, metadata=header or None)
    return path


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("sd1")


def strengths(checkpoint: Checkpoint, before: Checkpoint) -> tuple[float, float]:
    """By how much a LoRA of ones changed the UNet's layer and the text encoder's."""

    def change(subfolder: str, name: str) -> float:
        weights = before.models[subfolder].tensors()
        key = name if name in weights else name.removeprefix("text_model.")
        return float((checkpoint.models[subfolder].tensors()[key].float() - weights[key].float()).mean())

    return change("unet", Q_WEIGHT), change("text_encoder", V_WEIGHT)


@pytest.mark.parametrize(
    ("told", "unet", "text"),
    [
        ("", 1, 1),
        (":0.5", 0.5, 0.5),
        (":0.5,te=0", 0.5, 0),
        (":te=0", 1, 0),
        (":0.5,te=2,te1=-1", 0.5, -1),
        (":0.5,te2=3", 0.5, 0.5),
        (":unet=0.25", 0.25, 1),
        (":0.5,unet=0.25,in1=2", 2, 0.5),
        (":0.5,in01=2,in03=7", 2, 0.5),
        (":0.5, mid=3", 0.5, 0.5),
        (":0,in01=2", 2, 0),
    ],
)
def test_weights_by_part(source: Path, tmp_path: Path, told: str, unet: float, text: float) -> None:
    path = saved(tmp_path / "style.safetensors", layer(Q), layer(V))
    before, after = (
        open_checkpoint(str(source), ConvertOptions(loras=loras)) for loras in ([], [parse_lora(f"{path}{told}")])
    )
    assert strengths(after, before) == pytest.approx((unet, text), abs=2e-3)
    if not text:
        weights = before.models["text_encoder"].tensors()
        assert all(torch.equal(v, weights[n]) for n, v in after.models["text_encoder"].tensors().items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x:", "expected PATH, PATH:WEIGHT or PATH:WEIGHT,PART=WEIGHT"),
        ("x:0.5,te", "expected PATH"),
        ("x:0.5,te=much", "expected PATH"),
        ("x:te=1,0.5", "expected PATH"),
        ("x:0.5,vae=1", "LoRA weight for 'vae': expected unet, te"),
        ("x:0.5,in=1", "LoRA weight for 'in'"),
        ("x:0.5,in123=1", "LoRA weight for 'in123'"),
        ("x:0.5,in4=1,in04=2", "a part has two weights"),
        ("x:0.5,te=nan", "LoRA weight nan: expected a number"),
        ("x:inf", "LoRA weight inf: expected a number"),
    ],
)
def test_weights_that_are_none(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_lora(text)


def test_parts_in_python() -> None:
    lora = Lora(Path("x"), 0.5, {"te": 0})
    assert lora == parse_lora("x:0.5,te=0")
    assert hash(lora) == hash(parse_lora("x:0.5,te=0"))
    wrong: Any = {"te": "1"}
    with pytest.raises(InputError, match="LoRA weight '1': expected a number"):
        Lora(Path("x"), 0.5, wrong)


STRANGE = {
    **layer("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    **layer(Q.replace("attn1", "attn9")),
    "bundle_emb.x": torch.ones(3),
    **layer("lora_unet_conv_in", out=32, into=99),
}


def test_in_part(source: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "style.safetensors", layer(Q), layer(V), STRANGE)
    with pytest.raises(
        InputError, match=r"5 of its 11 tensors match nothing .*bundle_emb.x.*--lora-partial"
    ) as caught:
        open_checkpoint(str(source), ConvertOptions(loras=[Lora(path)]))
    assert "\n" not in str(caught.value)
    before = open_checkpoint(str(source))
    after = open_checkpoint(str(source), ConvertOptions(loras=[Lora(path, 0.5)], lora_partial=True))
    assert strengths(after, before) == pytest.approx((0.5, 0.5), abs=2e-3)
    (record,) = after.source.loras
    assert (record.name, record.weight, set(record.left_out)) == ("style.safetensors", 0.5, set(STRANGE))
    (note,) = after.notes
    assert note.startswith("style.safetensors: fused in part; left out 7 tensors: bundle_emb.x")
    only = saved(tmp_path / "other.safetensors", STRANGE)
    with pytest.raises(InputError, match="tensors match nothing"):
        open_checkpoint(str(source), ConvertOptions(loras=[Lora(only)], lora_partial=True))


def test_layers_beyond_a_shortened_text_encoder(source: Path, tmp_path: Path) -> None:
    beyond = layer(V.replace("layers_0", "layers_5"))
    path = saved(tmp_path / "style.safetensors", layer(Q), layer(V), beyond)
    after = open_checkpoint(str(source), ConvertOptions(loras=[Lora(path)]))
    assert strengths(after, open_checkpoint(str(source))) == pytest.approx((1, 1), abs=2e-3)
    (note,) = after.notes
    assert "for a text encoder with more layers; left out: lora_te_text_model_encoder_layers_5_" in note
    assert set(after.source.loras[0].left_out) == set(beyond)
    alone = saved(tmp_path / "alone.safetensors", beyond)
    with pytest.raises(InputError, match="match nothing"):
        open_checkpoint(str(source), ConvertOptions(loras=[Lora(alone)]))


def test_an_alpha_in_the_header_alone(source: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "style.safetensors", layer(Q), ss_network_alpha="0.25", ss_network_dim="1")
    after = open_checkpoint(str(source), ConvertOptions(loras=[Lora(path)]))
    assert strengths(after, open_checkpoint(str(source)))[0] == pytest.approx(1, abs=2e-3)
    (note,) = after.notes
    assert (
        "style.safetensors: its header says ss_network_alpha 0.25 (of 1), its layers have no alpha: not used"
        in note
    )
    alpha = {f"{Q}.alpha": torch.tensor(0.25)}
    path = saved(tmp_path / "style.safetensors", layer(Q), alpha, ss_network_alpha="0.25", ss_network_dim="1")
    after = open_checkpoint(str(source), ConvertOptions(loras=[Lora(path)]))
    assert strengths(after, open_checkpoint(str(source)))[0] == pytest.approx(0.25, abs=2e-3)
    assert after.notes == ()


def test_an_alpha_that_is_a_plain_number(source: Path, tmp_path: Path) -> None:
    torch.save({**layer(Q), f"{Q}.alpha": 0.25}, tmp_path / "style.pt")
    after = open_checkpoint(str(source), ConvertOptions(loras=[Lora(tmp_path / "style.pt")]))
    assert strengths(after, open_checkpoint(str(source)))[0] == pytest.approx(0.25, abs=2e-3)


DAMAGED = {
    "NaN": (
        layer(Q, float("nan")),
        rf"{Q}.lora_down.weight holds infinite or undefined values: the file is damaged",
    ),
    "infinite": (layer(Q, float("inf")), "holds infinite or undefined values"),
    "NaN alpha": ({**layer(Q), f"{Q}.alpha": torch.tensor(float("nan"))}, rf"{Q}.alpha holds infinite"),
    "too large": (layer(Q, 1e5), rf"{Q}.lora_down.weight makes {Q_WEIGHT} too large for float16"),
    "overflowing": ({f"{Q}.diff": torch.full((32, 32), 3e38), f"{Q}.alpha": torch.tensor(1.0)}, rf"{Q}.diff makes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_the_loras(source: Path, tmp_path: Path, case: str) -> None:
    tensors, said = DAMAGED[case]
    healthy = saved(tmp_path / "healthy.safetensors", layer(Q))
    path = saved(tmp_path / "style.safetensors", tensors)
    found = open_checkpoint(str(source), ConvertOptions(loras=[Lora(healthy), Lora(path, 2.0), Lora(healthy)]))
    with pytest.raises(InputError, match=said) as caught:
        found.models["unet"].tensors()[Q_WEIGHT]
    assert str(caught.value).startswith(f"--lora {path}: ")


def test_damage_of_the_checkpoint_is_not_the_loras(source: Path, tmp_path: Path) -> None:
    before = open_checkpoint(str(source))
    weights = {name: value.clone() for name, value in before.models["unet"].tensors().items()}
    weights[Q_WEIGHT][0, 0] = float("nan")
    unet = replace(before.models["unet"], tensors=partial(dict, weights))
    damaged = replace(before, models={**before.models, "unet": unet})
    path = saved(tmp_path / "style.safetensors", layer(Q))
    assert bool(fuse(damaged, [Lora(path)]).models["unet"].tensors()[Q_WEIGHT].isnan().any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32])
def test_weights_of_few_bits_are_not_rounded_to_them_again(
    source: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    before = open_checkpoint(str(source))
    weights = {name: value.to(dtype) for name, value in before.models["unet"].tensors().items()}
    unet = replace(before.models["unet"], tensors=partial(dict, weights))
    path = saved(tmp_path / "style.safetensors", layer(Q, 0.123))
    found = fuse(replace(before, models={**before.models, "unet": unet}), [Lora(path)]).models["unet"].tensors()
    wanted = weights[Q_WEIGHT].float() + 0.123
    torch.testing.assert_close(found[Q_WEIGHT].float(), wanted, rtol=2**-10, atol=2**-24)
    others = [name for name in weights if name != Q_WEIGHT]
    assert all(found[name] is weights[name] for name in others)


@pytest.fixture
def command(coreml_sd: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *arguments: subprocess.run(
        [coreml_sd, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_on_record(source: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    """The manifest, the card and `verify` know what was fused, at which weights, and what was not."""
    path = saved(tmp_path / "style.safetensors", layer(V), STRANGE)
    output = tmp_path / "models"
    options = ConvertOptions(
        attention=(AttentionKind.ORIGINAL,),
        components=("text_encoder",),
        zip=False,
        lora_partial=True,
        loras=(parse_lora(f"{path}:0.5,te=0.75"),),
    )
    made = convert(source, output, options)
    (record,) = manifest.read(output / "original" / "packages").source.loras
    assert str(record) == "style.safetensors:0.5,te=0.75"
    assert set(record.left_out) == set(STRANGE)
    assert any("fused in part; left out 7 tensors" in note for note in made.notes)
    card = " ".join((output / "README.md").read_text().split())
    assert "LoRA `style.safetensors:0.5,te=0.75`, without 7 tensors that have no place in it fused in" in card
    same = command("verify", output, "--against", source, "--lora", f"{path}:0.5,te=0.75", "--lora-partial")
    assert same.returncode == 0, same.stderr
    assert "note:" not in same.stderr
    other = command("verify", output, "--against", source)
    assert other.returncode == 1
    assert "made with --lora style.safetensors:0.5,te=0.75 --lora-partial, and is compared" in other.stderr
    whole = command("verify", output, "--against", source, "--lora", f"{path}:0.5,te=0.75")
    assert whole.returncode == BAD_INPUT
    assert "--lora-partial" in whole.stderr.splitlines()[-1]
    again = convert(source, output, options)
    assert again.unchanged


def test_damage_is_one_line_and_exit_code_2(source: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "style.safetensors", layer(V, float("nan")))
    made = command(
        "convert", source, "-o", tmp_path / "models", "--components", "text_encoder", "--lora", path, "--no-verify"
    )
    assert made.returncode == BAD_INPUT
    assert f"error: --lora {path}: {V}.lora_down.weight holds infinite" in made.stderr.splitlines()[-1]
    assert "Traceback" not in made.stderr
