"""LoRAs fused into weights equal what peft and diffusers make of the same files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import compvis_layout
from diffusion_convert.checkpoint.lora import fuse
from diffusion_convert.checkpoint.lora.settings import METADATA_KEY
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.checkpoint.single_file import open_single_file
from diffusion_convert.option_values import Lora
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import CheckpointError, InputError

Tensors = Mapping[str, torch.Tensor]
ROUNDING = 2**-10
"""float16 has 11 significant bits: two roundings of nearly the same value differ by no more."""


@dataclass(frozen=True)
class Half:
    """Random updates for some layers of a network: ``modules`` are its names, with (rank, alpha)."""

    subfolder: str
    modules: Mapping[str, tuple[int, float]]


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = Half(
    "unet",
    {
        f"{BLOCK}.attn1.to_q": (4, 4),
        f"{BLOCK}.attn1.to_out.0": (4, 2),
        f"{BLOCK}.attn2.to_k": (2, 1),
        f"{BLOCK}.ff.net.0.proj": (4, 8),
        "up_blocks.1.attentions.0.proj_in": (3, 1.5),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (1, 1),
    },
)
CONVOLUTIONS = Half(
    "unet",
    {
        "down_blocks.0.resnets.0.conv1": (4, 2),
        "down_blocks.0.downsamplers.0.conv": (2, 2),
        "up_blocks.0.resnets.0.conv_shortcut": (2, 1),
        "conv_in": (3, 3),
    },
)
TEXT = Half(
    "text_encoder",
    {
        "text_model.encoder.layers.0.self_attn.q_proj": (4, 2),
        "text_model.encoder.layers.1.self_attn.out_proj": (2, 2),
        "text_model.encoder.layers.1.mlp.fc1": (2, 1),
    },
)


@pytest.fixture(scope="module")
def checkpoints(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Checkpoint]:
    def opened(family: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp("single")
        return open_single_file(compvis_layout.write(tiny_checkpoint(family), folder / "model.safetensors"))

    return opened


@pytest.fixture(scope="module")
def sd1(checkpoints: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoints("sd1")


def updates(checkpoint: Checkpoint, *halves: Half, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Random down and up matrices for the layers, by subfolder and module: {"down", "up", "alpha"}."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, dict[str, Any]] = {}
    for half in halves:
        tensors = checkpoint.models[half.subfolder].tensors()
        for module, (rank, alpha) in half.modules.items():
            out, *into = tensors[f"{module}.weight"].shape
            ones = (1, 1) if len(into) == 3 else ()
            made.setdefault(half.subfolder, {})[module] = {
                "down": torch.randn(rank, *into, generator=generator),
                "up": torch.randn(out, rank, *ones, generator=generator),
                "alpha": alpha,
            }
    return made


def expected(checkpoint: Checkpoint, made: Mapping[str, Mapping[str, Any]], weight: float) -> dict[str, Tensors]:
    """The fused weights as peft computes them: its own layers around the same base weights, merged."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    fused: dict[str, Tensors] = {}
    for subfolder, modules in made.items():
        base = {name: value.float() for name, value in checkpoint.models[subfolder].tensors().items()}
        tree = module_tree({module: base[f"{module}.weight"] for module in modules})
        config = LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=[module.replace(".", "_") for module in modules],
            rank_pattern={module.replace(".", "_"): len(made["down"]) for module, made in modules.items()},
            alpha_pattern={module.replace(".", "_"): made["alpha"] for module, made in modules.items()},
        )
        inject_adapter_in_model(config, tree)
        for module, parts in modules.items():
            layer: Any = tree.get_submodule(module.replace(".", "_"))
            assert isinstance(layer, LoraLayer)
            layer.lora_A["default"].weight.data = parts["down"]
            layer.lora_B["default"].weight.data = parts["up"]
            layer.scale_layer(weight)
            layer.merge()
            base[f"{module}.weight"] = layer.get_base_layer().weight.data
        fused[subfolder] = {name: value.half() for name, value in base.items()}
    return fused


def module_tree(weights: Tensors) -> torch.nn.Module:
    """Bare layers around weights, for peft to wrap."""
    tree = torch.nn.Module()
    for name, weight in weights.items():
        out, into, *kernel = weight.shape
        layer: Any = torch.nn.Conv2d(into, out, (kernel[0], kernel[1])) if kernel else torch.nn.Linear(into, out)
        layer.weight.data = weight.clone()
        tree.add_module(name.replace(".", "_"), layer)
    return tree


def assert_fused(found: Checkpoint, checkpoint: Checkpoint, wanted: Mapping[str, Tensors]) -> None:
    for subfolder, model in found.models.items():
        before, after = checkpoint.models[subfolder].tensors(), model.tensors()
        assert list(after) == list(before)
        assert len(after) == len(before)
        for name, value in before.items():
            assert after[name].dtype == value.dtype
            reference = wanted.get(subfolder, before)[name]
            torch.testing.assert_close(after[name], reference, rtol=ROUNDING, atol=2**-24)
            changed = not torch.equal(reference, value)
            assert torch.equal(after[name], value) != changed


def kohya(made: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    return {
        f"{prefixes[subfolder]}{module.replace('.', '_')}.{name}": value
        for subfolder, modules in made.items()
        for module, parts in modules.items()
        for name, value in (
            ("lora_down.weight", parts["down"]),
            ("lora_up.weight", parts["up"]),
            ("alpha", torch.tensor(float(parts["alpha"]))),
        )
    }


def diffusers(
    made: Mapping[str, Mapping[str, Any]], down: str, up: str, alpha: bool = False
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for subfolder, modules in made.items():
        for module, parts in modules.items():
            tensors |= {f"{subfolder}.{module}{down}": parts["down"], f"{subfolder}.{module}{up}": parts["up"]}
            if alpha:
                tensors[f"{subfolder}.{module}.alpha"] = torch.tensor(float(parts["alpha"]))
    return tensors


def without_alpha(made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        subfolder: {module: {**parts, "alpha": len(parts["down"])} for module, parts in modules.items()}
        for subfolder, modules in made.items()
    }


def contiguous(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}


def fused_from(checkpoint: Checkpoint, path: Path, tensors: Tensors, weight: float, **metadata: str) -> Checkpoint:
    save_file(contiguous(tensors), path, metadata=metadata or None)
    return fuse(checkpoint, [Lora(path, weight)])


@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5])
def test_kohya(sd1: Checkpoint, tmp_path: Path, weight: float) -> None:
    made = updates(sd1, UNET, CONVOLUTIONS, TEXT)
    found = fused_from(sd1, tmp_path / "lora.safetensors", kohya(made), weight)
    assert_fused(found, sd1, expected(sd1, made, weight))


def test_kohya_for_linear_projections(checkpoints: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """SD 2's projections are matrices, SD 1's 1x1 convolutions; trainers write either for either."""
    for family in ("sd1", "sd2-v"):
        checkpoint = checkpoints(family)
        made = updates(checkpoint, UNET, TEXT)
        tensors = kohya(made)
        wanted = expected(checkpoint, made, 1.0)
        for name in [name for name in tensors if "proj_in.lora" in name]:
            value = tensors[name]
            tensors[name] = value.flatten(1) if value.ndim == 4 else value[:, :, None, None]
        assert_fused(fused_from(checkpoint, tmp_path / f"{family}.safetensors", tensors, 1.0), checkpoint, wanted)


def test_kohya_in_a_pickled_file_and_with_sdxls_prefix(sd1: Checkpoint, tmp_path: Path) -> None:
    made = updates(sd1, UNET, TEXT)
    tensors = {name.replace("lora_te_", "lora_te1_"): value for name, value in kohya(made).items()}
    torch.save(tensors, tmp_path / "lora.pt")
    assert_fused(fuse(sd1, [Lora(tmp_path / "lora.pt")]), sd1, expected(sd1, made, 1.0))


def test_tucker_cores(sd1: Checkpoint, tmp_path: Path) -> None:
    """LoCon splits a convolution's kernel off: W[o, i] += sum over p, q of up[o, p] mid[p, q] down[q, i]."""
    generator = torch.Generator().manual_seed(3)
    up, mid, down = (torch.randn(*shape, generator=generator) for shape in ((32, 3), (3, 3, 3, 3), (3, 32)))
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{name}.lora_up.weight": up[:, :, None, None],
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_down.weight": down[:, :, None, None],
        f"{name}.alpha": torch.tensor(1.5),
    }
    found = fused_from(sd1, tmp_path / "lora.safetensors", tensors, 2.0)
    weight = "down_blocks.0.resnets.0.conv1.weight"
    before = sd1.models["unet"].tensors()[weight].float()
    delta = torch.stack(
        [torch.stack([up @ mid[:, :, row, column] @ down for column in range(3)], -1) for row in range(3)], -2
    )
    torch.testing.assert_close(
        found.models["unet"].tensors()[weight].float(), before + delta, rtol=ROUNDING, atol=1e-2
    )


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [True, False])
def test_diffusers(sd1: Checkpoint, tmp_path: Path, down: str, up: str, alpha: bool) -> None:
    made = updates(sd1, UNET, CONVOLUTIONS, TEXT)
    found = fused_from(sd1, tmp_path / "lora.safetensors", diffusers(made, down, up, alpha), 0.7)
    assert_fused(found, sd1, expected(sd1, made if alpha else without_alpha(made), 0.7))


def test_the_first_attention_processors(sd1: Checkpoint, tmp_path: Path) -> None:
    attention = {module: size for module, size in UNET.modules.items() if ".attn" in module}
    text = {module: size for module, size in TEXT.modules.items() if ".self_attn" in module}
    made = without_alpha(updates(sd1, Half("unet", attention), Half("text_encoder", text)))
    tensors: dict[str, torch.Tensor] = {}
    for name, value in diffusers(made, "_lora.down.weight", "_lora.up.weight").items():
        old = name.replace(".to_out.0_lora", ".to_out_lora").replace(".attn1.", ".attn1.processor.")
        old = old.replace(".attn2.", ".attn2.processor.").replace(".out_proj_lora", ".to_out_lora")
        tensors[old.replace(".q_proj_lora", ".to_q_lora")] = value
    found = fused_from(sd1, tmp_path / "lora.safetensors", tensors, 1.0)
    assert_fused(found, sd1, expected(sd1, made, 1.0))
    only_unet = {name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")}
    found = fused_from(sd1, tmp_path / "bare.safetensors", only_unet, 1.0)
    assert_fused(found, sd1, expected(sd1, {"unet": made["unet"]}, 1.0))


def test_settings_that_diffusers_keeps_in_the_file(sd1: Checkpoint, tmp_path: Path) -> None:
    made = updates(sd1, Half("unet", {f"{BLOCK}.attn1.to_q": (4, 6), f"{BLOCK}.attn1.to_k": (4, 2)}))
    settings = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_k": 2}}
    tensors = diffusers(made, ".lora_A.weight", ".lora_B.weight")
    metadata = {METADATA_KEY: json.dumps(settings)}
    found = fused_from(sd1, tmp_path / "lora.safetensors", tensors, 1.0, **metadata)
    assert_fused(found, sd1, expected(sd1, made, 1.0))
    with pytest.raises(CheckpointError, match="its metadata: cannot be read as JSON"):
        fused_from(sd1, tmp_path / "lora.safetensors", tensors, 1.0, **{METADATA_KEY: "{"})


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_folder_that_peft_wrote(sd1: Checkpoint, tmp_path: Path, rank_stabilized: bool) -> None:
    made = updates(sd1, Half("unet", {f"{BLOCK}.attn1.to_q": (4, 6)}))
    tensors = diffusers(made, ".lora_A.weight", ".lora_B.weight")
    save_file(
        {name.replace("unet.", "base_model.model."): value for name, value in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": rank_stabilized}))
    weight = math.sqrt(4) if rank_stabilized else 1.0
    assert_fused(fuse(sd1, [Lora(tmp_path)]), sd1, expected(sd1, made, weight))


def test_several_at_once_are_rounded_once(sd1: Checkpoint, tmp_path: Path) -> None:
    made = [updates(sd1, UNET, seed=seed) for seed in (1, 2)]
    loras = []
    for index, (one, weight) in enumerate(zip(made, (0.5, -1.5), strict=True)):
        save_file(contiguous(kohya(one)), tmp_path / f"{index}.safetensors")
        loras.append(Lora(tmp_path / f"{index}.safetensors", weight))
    base = {name: value.float() for name, value in sd1.models["unet"].tensors().items()}
    for module in UNET.modules:
        for one, lora in zip(made, loras, strict=True):
            parts = one["unet"][module]
            product = (parts["up"].flatten(1) @ parts["down"].flatten(1)).reshape(base[f"{module}.weight"].shape)
            base[f"{module}.weight"] += lora.weight * parts["alpha"] / len(parts["down"]) * product
    assert_fused(fuse(sd1, loras), sd1, {"unet": {name: value.half() for name, value in base.items()}})


def test_no_lora_changes_nothing(sd1: Checkpoint) -> None:
    assert fuse(sd1, []) == sd1


@pytest.mark.parametrize("layout", [kohya, lambda made: diffusers(made, ".lora_A.weight", ".lora_B.weight")])
def test_for_another_family_is_refused(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path, layout: Callable[[Any], Tensors]
) -> None:
    other = checkpoints("sd2-v")
    wider = {**updates(other, UNET)}
    parts = wider["unet"][f"{BLOCK}.attn2.to_k"]
    parts["down"] = torch.cat([parts["down"], parts["down"]], 1)  # a context of another width
    with pytest.raises(InputError, match=r"made for another model than this sd2-v: .*attn2.to_k.* has \(32, 32\)"):
        fused_from(other, tmp_path / "lora.safetensors", layout(wider), 1.0)


def test_what_matches_nothing_is_listed(sd1: Checkpoint, tmp_path: Path) -> None:
    tensors = kohya(updates(sd1, UNET))
    for layer in range(5):
        for half_name in ("lora_down", "lora_up"):
            tensors[f"lora_te2_text_model_encoder_layers_{layer}_mlp_fc1.{half_name}.weight"] = torch.ones(4, 4)
    tensors["bundle_emb.x"] = torch.ones(3)
    with pytest.raises(
        InputError, match=r"11 of its 29 tensors match nothing.*bundle_emb\.x, lora_te2_.* and 3 more"
    ):
        fused_from(sd1, tmp_path / "lora.safetensors", tensors, 1.0)


def test_a_checkpoint_is_no_lora(sd1: Checkpoint, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    path = compvis_layout.write(tiny_checkpoint("sd1"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="match nothing"):
        fuse(sd1, [Lora(path)])


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "oft": ({f"{Q}.oft_blocks": torch.ones(1)}, "OFT, which is not covered"),
    "magnitude alone": ({f"{Q}.dora_scale": torch.ones(1)}, "stands alone: expected the layer"),
    "bias alone": ({"unet.x.lora_B.bias": torch.ones(1)}, "stands alone: expected the layer"),
    "one half": (
        {f"{Q}.lora_up.weight": torch.ones(32, 4)},
        "stands alone: .* LoRA, and lora_down.weight is missing",
    ),
    "alpha alone": ({f"{Q}.alpha": torch.ones(1)}, "stands alone: expected the layer"),
    "twice": (
        {f"{Q}.lora_up.weight": torch.ones(32, 4), f"{Q.replace('to_q', 'to.q')}.lora_B.weight": torch.ones(32, 4)},
        "the same part of the same layer",
    ),
    "mixed": (
        {
            f"{Q}.lora_up.weight": torch.ones(32, 4),
            f"{Q}.lora_down.weight": torch.ones(4, 32),
            f"{Q}.hada_t1": torch.ones(4, 4),
        },
        "hada_t1 is no part of a LoRA",
    ),
    "sparse values alone": (
        {
            f"{Q}.lora_up.weight": torch.ones(32, 4),
            f"{Q}.lora_down.weight": torch.ones(4, 32),
            f"{Q}.bias_values": torch.ones(4),
        },
        "bias_indices, bias_size are missing",
    ),
    "whole numbers": (
        {f"{Q}.lora_up.weight": torch.ones(32, 4).int(), f"{Q}.lora_down.weight": torch.ones(4, 32)},
        "is of type int32: expected floats",
    ),
    "no matrix": (
        {f"{Q}.lora_up.weight": torch.ones(4), f"{Q}.lora_down.weight": torch.ones(4)},
        "expected a matrix",
    ),
    "no rank": (
        {f"{Q}.lora_up.weight": torch.ones(32, 0), f"{Q}.lora_down.weight": torch.ones(0, 32)},
        "expected a matrix",
    ),
    "ranks differ": (
        {f"{Q}.lora_up.weight": torch.ones(32, 3), f"{Q}.lora_down.weight": torch.ones(4, 32)},
        "do not fit each other",
    ),
    "alpha a vector": (
        {
            f"{Q}.lora_up.weight": torch.ones(32, 4),
            f"{Q}.lora_down.weight": torch.ones(4, 32),
            f"{Q}.alpha": torch.ones(2),
        },
        "no single number",
    ),
    "empty": ({}, "no tensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_no_plain_lora(sd1: Checkpoint, tmp_path: Path, kind: str) -> None:
    tensors, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as caught:
        fused_from(sd1, tmp_path / "lora.safetensors", tensors, 1.0)
    assert "lora.safetensors" in str(caught.value)


def test_weights_and_folders_that_cannot_be(sd1: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LoRA weight nan"):
        fused_from(sd1, tmp_path / "lora.safetensors", kohya(updates(sd1, UNET)), math.nan)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected one LoRA file in this folder, found 0"):
        fuse(sd1, [Lora(tmp_path / "empty")])
    with pytest.raises(CheckpointError, match="cannot be read"):
        fuse(sd1, [Lora(tmp_path / "absent.safetensors")])


@pytest.mark.parametrize("option", ["--lora", "--vae"])
def test_what_is_no_file_of_tensors_is_named_with_its_option(
    option: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text("<!DOCTYPE html>")
    vae, loras = (str(path), []) if option == "--vae" else (None, [Lora(path)])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tiny_checkpoint("sd1")), ConvertOptions(vae=vae, loras=loras))
    assert str(caught.value).startswith(f"{option} {path}: damaged, or no file of tensors: expected a whole")
    assert "deserializ" not in str(caught.value), "the library's words"
