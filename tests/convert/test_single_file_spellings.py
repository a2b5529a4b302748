"""Single files as trainers, node editors and merging tools write them, against diffusers' own pipelines."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compvis_layout
import tiny_checkpoints
from diffusion_convert.checkpoint import torch_networks
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.single_file import open_single_file
from diffusion_runtime.errors import CheckpointError, InputError

Tensors = dict[str, torch.Tensor]
TEXT = "cond_stage_model.transformer."
PARTS = ("text_encoder", "unet", "vae")
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def single(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Tensors]]:
    """A tiny checkpoint as one file: what lies beside it, and its tensors."""

    @cache
    def made(family: str) -> tuple[Path, Tensors]:
        path = compvis_layout.write(tiny_checkpoint(family), tmp_path_factory.mktemp(family) / "model.safetensors")
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        path.unlink()
        return path.parent, tensors

    return made


@pytest.fixture
def write(single: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> Callable[..., Path]:
    """``write("sd1", change, key="value")``: that tiny checkpoint as one file, changed, with metadata."""

    def written(family: str, change: Callable[[Tensors], Tensors] = dict, **metadata: str) -> Path:
        beside, tensors = single(family)
        path = shutil.copytree(beside, tmp_path, dirs_exist_ok=True) / "model.safetensors"
        save_file({n: v.contiguous() for n, v in change(dict(tensors)).items()}, path, metadata=metadata)
        return path

    return written


def pipeline(path: Path, folder: Path) -> Any:
    """What diffusers makes of a single file, told the configurations of the folder that it stands for."""
    from diffusers import StableDiffusionPipeline

    with torch_networks.silent():
        return StableDiffusionPipeline.from_single_file(
            str(path), config=str(folder), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
        )


@lru_cache(4)
def from_folder(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    with torch_networks.silent():
        return DiffusionPipeline.from_pretrained(
            folder, safety_checker=None, torch_dtype=torch.float32, requires_safety_checker=False
        )


def assert_computes(checkpoint: Checkpoint, expected: Any) -> None:
    """The networks of the checkpoint compute what those of diffusers' pipeline compute."""
    torch.manual_seed(0)
    ids = torch.randint(0, 400, (1, 77))
    latents, times = torch.randn(1, 4, 8, 8), torch.tensor([501])
    with torch.inference_mode():
        text_encoder, unet, vae = (torch_networks.build(checkpoint, part).float() for part in PARTS)
        text = text_encoder(ids).last_hidden_state
        torch.testing.assert_close(text, expected.text_encoder(ids).last_hidden_state)
        torch.testing.assert_close(unet(latents, times, text).sample, expected.unet(latents, times, text).sample)
        picture = vae.decode(latents).sample  # type: ignore[operator]
        torch.testing.assert_close(picture, expected.vae.decode(latents).sample)


def renamed(*rules: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, value in tensors.items():
            new = name
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            found[new] = value
        assert found.keys() != tensors.keys()
        return found

    return change


def squeezed(tensors: Tensors) -> Tensors:
    """Attention of the VAE by diffusers' names, as linear layers."""
    named = renamed(
        (r"attn_1\.([qkv])\.", r"attn_1.to_\1."),
        (r"attn_1\.proj_out\.", "attn_1.to_out.0."),
        (r"attn_1\.norm\.", "attn_1.group_norm."),
    )(tensors)
    return {n: v[:, :, 0, 0] if ".attn_1." in n and v.ndim == 4 else v for n, v in named.items()}


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    **{
        f"all under {prefix}": renamed(("^", prefix))
        for prefix in ("module.", "state_dict.", "model.", "_orig_mod.", "module.model.", "pipe._forward_module.")
    },
    "VAE attention to_q": renamed((r"attn_1\.([qkv])\.", r"attn_1.to_\1.")),
    "VAE attention to_q, to_out": renamed(
        (r"attn_1\.([qkv])\.", r"attn_1.to_\1."), (r"attn_1\.proj_out\.", "attn_1.to_out.0.")
    ),
    "VAE attention, linear": squeezed,
    "VAE attention query": renamed(
        (r"attn_1\.q\.", "attn_1.query."),
        (r"attn_1\.k\.", "attn_1.key."),
        (r"attn_1\.v\.", "attn_1.value."),
        (r"attn_1\.proj_out\.", "attn_1.proj_attn."),
    ),
    "VAE under vae.": renamed(("^first_stage_model\\.", "vae.")),
    "clip_l": renamed((f"^{re.escape(TEXT)}", "clip_l.transformer.")),
    "text_encoders.clip_l": renamed((f"^{re.escape(TEXT)}", "text_encoders.clip_l.transformer.")),
    "cond_stage_model.clip_l": renamed((f"^{re.escape(TEXT)}", "cond_stage_model.clip_l.transformer.")),
    "text encoder alone": renamed((f"^{re.escape(TEXT)}", "")),
    "text encoder without transformer": renamed((f"^{re.escape(TEXT)}", "cond_stage_model.")),
    "text_encoder": renamed((f"^{re.escape(TEXT)}", "text_encoder.")),
    "conditioner": renamed((f"^{re.escape(TEXT)}", "conditioner.embedders.0.transformer.")),
    "VAE alone": renamed(("^first_stage_model\\.", "")),
    "UNet under diffusion_model.": renamed(("^model\\.diffusion_model\\.", "diffusion_model.")),
    "clip_l without text_model": renamed((f"^{re.escape(TEXT)}text_model\\.", "clip_l.transformer.")),
}


OPEN_CLIP = ("conditioner.embedders.0.model.", "clip_h.model.", "text_encoders.clip_h.model.")


@pytest.mark.parametrize("prefix", OPEN_CLIP)
def test_other_names_of_open_clip(
    prefix: str, write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = write("sd2-base", renamed((r"^cond_stage_model\.model\.", prefix)), prediction_type="epsilon")
    assert_computes(open_single_file(path), from_folder(tiny_checkpoint("sd2-base")))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_names_are_the_same_checkpoint(
    spelling: str, write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    assert_computes(open_single_file(write("sd1", SPELLINGS[spelling])), from_folder(tiny_checkpoint("sd1")))


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sd2-base"])
def test_averaged_weights_alone_are_used_and_said(
    family: str, write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """As trainers keep them: by names without dots. diffusers is given the same weights under plain names."""

    def averaged(tensors: Tensors) -> Tensors:
        others = {n: v for n, v in tensors.items() if not n.startswith((UNET, "model_ema."))}
        flat = {
            "model_ema." + "".join(name.split(".")[1:]): value
            for name, value in tensors.items()
            if name.startswith(UNET)
        }
        return others | flat | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}

    checkpoint = open_single_file(write(family, averaged))
    assert any("model_ema" in note and "used" in note for note in checkpoint.notes)
    assert_computes(checkpoint, from_folder(tiny_checkpoint(family)))


def test_a_controlnet_in_the_file_is_left_out_and_said(
    write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """As the authors' own files have it: a whole checkpoint and its ControlNet."""
    path = write("sd1", lambda t: {**t, "control_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)})
    checkpoint = open_single_file(path)
    assert any("ControlNet" in note and "left out" in note for note in checkpoint.notes)
    assert_computes(checkpoint, pipeline(path, tiny_checkpoint("sd1")))


def test_averaged_weights_beside_others_are_left_out(
    write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """As diffusers does unless it is told otherwise."""
    path, folder = write("sd1"), tiny_checkpoint("sd1")
    checkpoint = open_single_file(path)
    assert checkpoint.notes == ()
    assert_computes(checkpoint, pipeline(path, folder))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of Stable Diffusion 2 with its true widths where a UNet and a text encoder meet."""

    @cache
    def build(width: int = 1024, layers: int = 3, linear: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("second")
        recipe = tiny_checkpoints.RECIPES["sd2-base"]
        text = {**recipe.text, "hidden_size": width, "num_attention_heads": width // 64}
        unet = {**recipe.unet, "cross_attention_dim": width, "use_linear_projection": linear}
        changed = tiny_checkpoints.Recipe(
            unet=unet, text={**text, "num_hidden_layers": layers}, padding="!", vae=recipe.vae
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_checkpoints, "RECIPES", {"wide": changed})
            return tiny_checkpoints.build("wide", folder)

    return build


def in_transformers_names(folder: Path, path: Path, prefix: str = TEXT, extra_layers: int = 0) -> Path:
    """A single file of a Stable Diffusion 2 whose text encoder has the names that Stable Diffusion 1's has."""
    path = compvis_layout.write(folder, path)
    tensors = {n: v for n, v in load_file(path).items() if not n.startswith("cond_stage_model.")}
    text = compvis_layout.read_weights(folder, "text_encoder")
    layers = 1 + max(int(m[1]) for n in text if (m := re.search(r"layers\.(\d+)\.", n)))
    more = {
        name.replace("layers.0.", f"layers.{layers + number}."): value + 1
        for number in range(extra_layers)
        for name, value in text.items()
        if "layers.0." in name
    }
    save_file({**tensors, **compvis_layout.prefixed(prefix, {**text, **more})}, path)
    path.with_suffix(".config.json").write_text('{"unet": {"attention_head_dim": [2, 4]}}')
    return path


@pytest.mark.parametrize("prefix", [TEXT, "clip_h.transformer.", "text_encoders.clip_h.transformer."])
@pytest.mark.parametrize("family", [None, "sd2-base", "sd2-v"])
def test_a_second_generation_with_the_names_of_the_first(
    family: str | None, prefix: str, second: Callable[..., Path], tmp_path: Path
) -> None:
    folder = second()
    path = in_transformers_names(folder, tmp_path / "model.safetensors", prefix)
    checkpoint = open_single_file(path, family)
    assert checkpoint.family == (family or checkpoint.family)
    assert checkpoint.family in ("sd2-base", "sd2-v")
    assert '"pad_token": "!"' in checkpoint.tokenizers["text_encoder"]["tokenizer_config.json"].read_text()
    assert_computes(checkpoint, from_folder(folder))
    if prefix == TEXT:
        assert_computes(checkpoint, pipeline(path, folder))


def test_the_last_layer_of_open_clip_is_left_out(second: Callable[..., Path], tmp_path: Path) -> None:
    folder = second(layers=23)
    path = in_transformers_names(folder, tmp_path / "model.safetensors", extra_layers=1)
    assert_computes(open_single_file(path, "sd2-base"), pipeline(path, folder))


def test_small_second_generations_are_told_by_their_projections(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("sd2-base")
    path = in_transformers_names(folder, tmp_path / "model.safetensors")
    path.with_suffix(".config.json").write_text(
        '{"unet": {"attention_head_dim": [2, 4]}, "text_encoder": {"num_attention_heads": 4}}'
    )
    assert_computes(open_single_file(path, "sd2-base"), pipeline(path, folder))
    assert open_single_file(path).family in ("sd2-base", "sd2-v")
    assert open_single_file(path, "sd1").family == "sd1"  # nothing in it is certain: --family decides


@pytest.mark.parametrize("metadata", [{}, {"ss_v2": "True"}, {"ss_v2": "False"}])
def test_a_file_that_contradicts_itself_asks_for_the_family(
    metadata: dict[str, str], second: Callable[..., Path], tmp_path: Path
) -> None:
    folder = second(width=768) if metadata.get("ss_v2") != "False" else second()
    path = compvis_layout.write(folder, tmp_path / "model.safetensors")  # with OpenCLIP's names
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"contradicts itself: .* --family decides \(sd1, sd2-base, sd2-v\)"):
        open_single_file(path)
    assert_computes(open_single_file(path, "sd2-base"), from_folder(folder))


def test_a_family_against_the_widths_is_refused(second: Callable[..., Path], tmp_path: Path) -> None:
    path = in_transformers_names(second(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"family 'sd1' does not fit .*width 1024.*expected sd2-base or sd2-v"):
        open_single_file(path, "sd1")


V_WORDS = [
    {"modelspec.prediction_type": "v"},
    {"modelspec.prediction_type": "V-Prediction"},
    {"ss_v_parameterization": "True"},
    {"ss_v_parameterization": "true", "ss_v2": "False"},
    {"v_parameterization": "1"},
    {"ss_prediction_type": "v_prediction"},
    {"prediction_type": "vpred"},
    {"parameterization": "v"},
    {"v_pred": "yes"},
    {"ot_config": json.dumps({"force_v_prediction": True, "concepts": []})},
]
EPSILON_WORDS = [
    {"modelspec.prediction_type": "epsilon"},
    {"prediction_type": "eps"},
    {"parameterization": "epsilon"},
    {"ss_v_parameterization": "False"},
]
ZERO_SNR_WORDS = [
    {"ss_zero_terminal_snr": "True"},
    {"zero_terminal_snr": "true"},
    {"modelspec.zero_terminal_snr": "1"},
    {"ztsnr": "True"},
    {"rescale_betas_zero_snr": "True"},
    {"ot_config": json.dumps({"rescale_noise_scheduler_to_zero_terminal_snr": True})},
]


@pytest.mark.parametrize("words", [*V_WORDS, *EPSILON_WORDS], ids=str)
@pytest.mark.parametrize("family", ["sd1", "sd2-base"])
def test_trainers_words_for_the_prediction(family: str, words: dict[str, str], write: Callable[..., Path]) -> None:
    path = write(family, **(words if family == "sd1" else {n: v for n, v in words.items() if n != "ss_v2"}))
    checkpoint, expected = open_single_file(path), "v_prediction" if words in V_WORDS else "epsilon"
    assert checkpoint.schedulers["scheduler"]["prediction_type"] == expected
    assert checkpoint.family == (
        "sd1" if family == "sd1" else "sd2-v" if expected == "v_prediction" else "sd2-base"
    )
    assert checkpoint.notes == ()


def with_tensors(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(0) for name in names}


@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
@pytest.mark.parametrize("marks", [{}, *ZERO_SNR_WORDS], ids=str)
def test_zero_terminal_snr_is_that_of_diffusers(
    family: str,
    marks: Mapping[str, str],
    write: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """Tensors called ``v_pred`` and ``ztsnr``, or metadata: the timesteps and noise levels of the scheduler that
    diffusers' documentation makes for such models."""
    import diffusers

    path = write(family, with_tensors("v_pred", *(() if marks else ("ztsnr",))), **marks)
    config = dict(open_single_file(path).schedulers["scheduler"])
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    base = json.loads((tiny_checkpoint(family) / "scheduler" / "scheduler_config.json").read_text())
    expected = diffusers.DDIMScheduler.from_config(
        base, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    for scheduler in (made, expected):
        scheduler.set_timesteps(20)
    assert torch.equal(made.alphas_cumprod, expected.alphas_cumprod)
    assert torch.equal(made.timesteps, expected.timesteps)
    assert made.config.prediction_type == "v_prediction"
    torch.manual_seed(0)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    for step in (made.timesteps[0], made.timesteps[-1]):
        assert torch.equal(made.step(output, step, sample)[0], expected.step(output, step, sample)[0])


def test_metadata_that_contradict_each_other(write: Callable[..., Path]) -> None:
    path = write("sd1", **{"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "True"})
    with pytest.raises(CheckpointError, match=r"ss_v_parameterization says that v is predicted, modelspec"):
        open_single_file(path)
    beside = json.loads(path.with_suffix(".config.json").read_text())
    path.with_suffix(".config.json").write_text(json.dumps({**beside, "scheduler": {"prediction_type": "epsilon"}}))
    assert open_single_file(path).schedulers["scheduler"]["prediction_type"] == "epsilon"


def yaml_text(layer: str, channels: int) -> str:
    return f"""
model:
  params:
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params: {{{layer}}}
    unet_config:
      params: {{model_channels: 32, channel_mult: [1, 2], {channels}}}
"""


@pytest.mark.parametrize(
    ("family", "layer", "clip_skip"),
    [
        ("sd1", "layer: hidden, layer_idx: -2", 1),
        ("sd1", "layer: hidden, layer_idx: 1", 1),
        ("sd1", "layer: penultimate", 1),
        ("sd1", "layer: hidden, layer_idx: -1", 0),
        ("sd1", "layer: last", 0),
        ("sd1", "", 0),
        ("sd2-base", "layer: penultimate", 0),
        ("sd2-base", "layer: hidden, layer_idx: -3", 1),
    ],
)
def test_a_yamls_clip_skip_is_that_of_diffusers(
    family: str, layer: str, clip_skip: int, write: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = write(family)
    path.with_suffix(".yaml").write_text(
        yaml_text(layer, "num_heads: 8" if family == "sd1" else "num_head_channels: 16")  # type: ignore[arg-type]
    )
    checkpoint = open_single_file(path, family)
    pipe = from_folder(tiny_checkpoint(family))
    vars(pipe.text_encoder)["text_model"] = pipe.text_encoder  # where diffusers 0.42 looks
    expected, _ = pipe.encode_prompt("a photo of a cat", "cpu", 1, False, clip_skip=clip_skip or None)
    ids = pipe.tokenizer("a photo of a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = torch_networks.build(checkpoint, "text_encoder").float()(ids).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert any("clip skip" in note for note in checkpoint.notes) == bool(clip_skip)


@pytest.mark.parametrize("layer", ["layer: hidden, layer_idx: 9", "layer: hidden, layer_idx: 0", "layer: pooled"])
def test_a_layer_that_is_not_there(layer: str, write: Callable[..., Path]) -> None:
    path = write("sd1")
    path.with_suffix(".yaml").write_text(yaml_text(layer, "num_heads: 8"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such layer"):
        open_single_file(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_that_are_no_floating_point_numbers(
    suffix: str, dtype: torch.dtype, write: Callable[..., Path]
) -> None:
    def quantized(tensors: Tensors) -> Tensors:
        return {n: (v * 100).to(dtype) if n.endswith("attn1.to_q.weight") else v for n, v in tensors.items()}

    path = write("sd1")
    if suffix == ".safetensors" and dtype is not torch.complex64:
        save_file(quantized(load_file(path)), path)
    else:
        torch.save({"state_dict": quantized(load_file(path))}, path.with_suffix(".ckpt"))
        path = path.with_suffix(".ckpt")
    message = "no named tensors|missing" if dtype is torch.complex64 else "no floating point numbers: .*to_q"
    with pytest.raises(CheckpointError, match=message):
        open_single_file(path)


def only(*prefixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: v for n, v in tensors.items() if n.startswith(prefixes)}


PARTIAL: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a text encoder": (only(TEXT), "has no unet and no vae: expected"),
    "a bare text encoder": (
        lambda tensors: {n.removeprefix(TEXT): v for n, v in only(TEXT)(tensors).items()},
        "a text encoder alone",
    ),
    "a UNet": (only(UNET), "has no vae and no text encoder: give them with --base"),
    "a bare UNet": (
        lambda tensors: {n.removeprefix(UNET): v for n, v in only(UNET)(tensors).items()},
        "has no vae and no text encoder: give them with --base",
    ),
    "an averaged UNet": (only("model_ema."), "has no vae and no text encoder: give them with --base"),
    "without a text encoder": (only(UNET, "first_stage_model."), "has no text encoder: give one with --base"),
    "without a VAE": (only(UNET, TEXT), "has no vae: give one with --vae or --base"),
}


@pytest.mark.parametrize("kind", PARTIAL)
def test_what_a_file_lacks_is_said(kind: str, write: Callable[..., Path]) -> None:
    change, message = PARTIAL[kind]
    with pytest.raises(CheckpointError, match=message):
        open_single_file(write("sd1", change))


@pytest.mark.parametrize("number", [999, 10**6, 10**9, 10**30])
@pytest.mark.parametrize(
    "place",
    [
        "model.diffusion_model.input_blocks.{}.0.in_layers.0.weight",
        "model.diffusion_model.output_blocks.{}.1.transformer_blocks.0.norm1.weight",
        "first_stage_model.encoder.down.{}.block.0.conv1.weight",
        "first_stage_model.encoder.down.0.block.{}.conv1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.{}.mlp.fc1.weight",
    ],
)
def test_numbers_that_no_network_has(place: str, number: int, write: Callable[..., Path]) -> None:
    """They end at once, not after a look at every number before."""
    path = write("sd1", lambda tensors: tensors | {place.format(number): torch.zeros(1)})
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_single_file(path)
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["op.bias", "norm1.weight", "out.2.weight", "time_embed.0.weight"])
def test_a_name_that_is_spelt_wrong(name: str, write: Callable[..., Path]) -> None:
    def misspelt(tensors: Tensors) -> Tensors:
        found = next(n for n in tensors if n.startswith(UNET) and n.endswith(name))
        return {n.replace("model.", "model_", 1) if n == found else n: v for n, v in tensors.items()}

    with pytest.raises(CheckpointError) as caught:
        open_single_file(write("sd1", misspelt))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 2**63), (0, 2**62), (2**40, 2**40), (-1,)])
def test_declared_shapes_that_no_tensor_has(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError) as caught:
        open_single_file(path)
    assert "\n" not in str(caught.value)
