"""Every kind of layer that LyCORIS trains changes a model as LyCORIS' own modules do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.option_values import Lora
from diffusion_convert.options import ConvertOptions
from diffusion_runtime.errors import DiffusionError

lycoris: Any = pytest.importorskip("lycoris.modules", reason="needs the package lycoris-lora")

ROUNDING = 2**-10
"""float16 has 11 significant bits: two roundings of nearly the same value differ by no more."""
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    "unet": (
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.ff.net.0.proj",
        f"{BLOCK}.ff.net.2",
        "down_blocks.0.resnets.0.conv1",
        "up_blocks.0.resnets.0.conv1",
        "up_blocks.0.resnets.0.conv_shortcut",
        "up_blocks.1.attentions.0.proj_in",
        "conv_in",
    ),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"),
}
NORMS = {
    "unet": (f"{BLOCK}.norm1", "down_blocks.0.resnets.0.norm2", "conv_norm_out"),
    "text_encoder": ("final_layer_norm", "encoder.layers.0.layer_norm1"),
}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoCon": ("LoConModule", {"lora_dim": 4, "alpha": 2}),
    "LoCon, Tucker": ("LoConModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "LoCon, rank stabilised": ("LoConModule", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "DoRA": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "DoRA, of inputs": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "LoHa": ("LohaModule", {"lora_dim": 4, "alpha": 2}),
    "LoHa, Tucker": ("LohaModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "LoHa and DoRA": ("LohaModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "LoKr": ("LokrModule", {"lora_dim": 2, "alpha": 1}),
    "LoKr, both": ("LokrModule", {"lora_dim": 1, "alpha": 0.5, "decompose_both": True}),
    "LoKr, Tucker": ("LokrModule", {"lora_dim": 2, "alpha": 1, "use_tucker": True}),
    "LoKr, factor": ("LokrModule", {"lora_dim": 2, "alpha": 1, "factor": 2, "unbalanced_factorization": True}),
    "LoKr, whole matrices": ("LokrModule", {"lora_dim": 4, "alpha": 1, "full_matrix": True}),
    "LoKr and DoRA": ("LokrModule", {"lora_dim": 2, "alpha": 1, "weight_decompose": True}),
    "full": ("FullModule", {}),
    "(IA)^3": ("IA3Module", {}),
    "(IA)^3, of inputs": ("IA3Module", {"train_on_input": True}),
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("sd1")


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    out, into, *kernel = weight.shape
    has_bias = bias is not None
    layer: Any = torch.nn.Linear(into, out, has_bias)
    if kernel:
        layer = torch.nn.Conv2d(into, out, (kernel[0], kernel[1]), padding=kernel[0] // 2, bias=has_bias)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    made: torch.nn.Module = layer
    return made


def seen(layer: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and the bias of a layer, by what it makes of one input at a time."""
    into = weight.shape[1]
    if weight.ndim == 2:
        bias = layer(torch.zeros(1, into))[0]
        return (layer(torch.eye(into)) - bias).T, bias
    size = weight.shape[2]
    impulses = torch.zeros(into, into, size, size)
    impulses[range(into), range(into), size // 2, size // 2] = 1
    bias = layer(torch.zeros(1, into, size, size))[0, :, 0, 0]
    return (layer(impulses) - bias[:, None, None]).transpose(0, 1).flip(-1, -2), bias


def trained(kind: str, layer: torch.nn.Module, multiplier: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """A module of LyCORIS' around a layer, with random parameters, and what it saves."""
    name, settings = KINDS[kind]
    module = getattr(lycoris, name)("", layer, multiplier, **settings)
    for parameter in module.parameters():
        parameter.data = torch.rand_like(parameter) * 0.5 + 0.1
    if name == "FullModule":  # before it is applied to a network, its parameters are the differences themselves
        saved = {"diff": module.weight, **({} if module.bias is None else {"diff_b": module.bias})}
    else:
        saved = module.state_dict() if name == "IA3Module" else module.custom_state_dict()
    module.org_forward = layer.forward
    return module, {key: value.detach().clone().contiguous() for key, value in saved.items()}


def weights(folder: Path, loras: list[Lora]) -> dict[str, dict[str, torch.Tensor]]:
    opened = open_checkpoint(str(folder), ConvertOptions(loras=loras))
    return {
        name: {key.removeprefix("text_model."): value for key, value in opened.models[name].tensors().items()}
        for name in PREFIXES
    }


def assert_fused(folder: Path, lora: Lora, wanted: Mapping[tuple[str, str], torch.Tensor]) -> None:
    found, before = weights(folder, [lora]), weights(folder, [])
    for subfolder, tensors in found.items():
        for name, value in tensors.items():
            reference = wanted.get((subfolder, name), before[subfolder][name]).half()
            torch.testing.assert_close(
                value.half(), reference, rtol=ROUNDING, atol=2**-20, msg=partial("{}: {}".format, name)
            )


@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_as_its_modules_compute(folder: Path, tmp_path: Path, kind: str, multiplier: float) -> None:
    torch.manual_seed(1)
    base = weights(folder, [])
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[tuple[str, str], torch.Tensor] = {}
    for subfolder, modules in MODULES.items():
        for name in modules:
            weight = base[subfolder][f"{name}.weight"].float()
            bias = base[subfolder].get(f"{name}.bias")
            module, saved = trained(kind, layer_of(weight, None if bias is None else bias.float()), multiplier)
            with torch.no_grad():
                changed, shift = seen(module, weight)
            wanted[subfolder, f"{name}.weight"] = changed
            if bias is not None:
                wanted[subfolder, f"{name}.bias"] = shift
            tensors |= {f"{PREFIXES[subfolder]}{name.replace('.', '_')}.{key}": v for key, v in saved.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_fused(folder, Lora(tmp_path / "lora.safetensors", multiplier), wanted)


@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_norms(folder: Path, tmp_path: Path, multiplier: float) -> None:
    torch.manual_seed(1)
    base = weights(folder, [])
    tensors: dict[str, torch.Tensor] = {}
    wanted = {}
    for subfolder, norms in NORMS.items():
        for name in norms:
            weight = base[subfolder][f"{name}.weight"].float()
            norm = torch.nn.LayerNorm(len(weight))
            norm.weight.data, norm.bias.data = weight.clone(), base[subfolder][f"{name}.bias"].float()
            module = lycoris.NormModule("", norm)
            for parameter in (module.w_norm, module.b_norm):
                parameter.data = torch.randn_like(parameter)
            tensors |= {
                f"{PREFIXES[subfolder]}{name.replace('.', '_')}.{key}": getattr(module, key).detach().clone()
                for key in ("w_norm", "b_norm")
            }
            wanted[subfolder, f"{name}.weight"], wanted[subfolder, f"{name}.bias"] = module.get_merged_weight(
                multiplier
            )
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_fused(folder, Lora(tmp_path / "lora.safetensors", multiplier), wanted)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        (f"{BLOCK}.norm1.w_norms", 32, "match nothing in this sd1 checkpoint: .*w_norms"),
        (f"{BLOCK}.norm4.w_norm", 32, "match nothing in this sd1 checkpoint: .*norm4"),
        (f"{BLOCK}.norm1.b_norm", 31, r"31.*32|32.*31"),
    ],
)
def test_norms_that_are_misnamed_or_of_another_size(
    folder: Path, tmp_path: Path, name: str, size: int, said: str
) -> None:
    module, _, key = name.rpartition(".")
    path = tmp_path / "lora.safetensors"
    save_file({f"lora_unet_{module.replace('.', '_')}.{key}": torch.ones(size)}, path)
    with pytest.raises(DiffusionError, match=said) as caught:
        open_checkpoint(str(folder), ConvertOptions(loras=[Lora(path)]))
    assert str(caught.value).startswith(f"--lora {path}")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_sparse_rest_of_an_extraction(folder: Path, tmp_path: Path) -> None:
    """LyCORIS' extraction of a LoRA from two checkpoints, with the largest of what it leaves."""
    extract_diff = pytest.importorskip("lycoris.utils").extract_diff
    names = [f"{BLOCK}.attn1.to_q", "up_blocks.0.resnets.0.conv1"]
    base = weights(folder, [])["unet"]
    torch.manual_seed(1)
    old, new = (tree({name: base[f"{name}.weight"].float() for name in names}) for _ in range(2))
    for layer in new.children():
        layer.weight.data += torch.randn_like(layer.weight.data)
    with torch.no_grad():
        found = extract_diff(
            [], [], old, new, linear_mode_param=4, conv_mode_param=4, use_bias=True, sparsity=0.9, small_conv=False
        )
    wanted = {}
    for name in names:
        up, down, indices, values, size = (
            found[f"lora_unet_{name.replace('.', '_')}.{end}"] for end in (*EXTRACTED, *SPARSE)
        )
        rest = torch.sparse_coo_tensor(indices.long(), values.float(), size.tolist()).to_dense()
        assert rest.count_nonzero() > 10
        changed = up.float().flatten(1) @ down.float().flatten(1) + rest
        weight = base[f"{name}.weight"].float()
        wanted["unet", f"{name}.weight"] = weight + changed.reshape(weight.shape)
    save_file({name: value.contiguous() for name, value in found.items()}, tmp_path / "lora.safetensors")
    assert_fused(folder, Lora(tmp_path / "lora.safetensors"), wanted)


EXTRACTED = ("lora_up.weight", "lora_down.weight")
SPARSE = ("bias_indices", "bias_values", "bias_size")


def tree(layers: Mapping[str, torch.Tensor]) -> Any:
    network = torch.nn.Module()
    for name, weight in layers.items():
        network.add_module(name.replace(".", "_"), layer_of(weight, None))
    return network


@pytest.mark.parametrize(
    ("kind", "part", "other", "said"),
    [
        ("LoCon, Tucker", "lora_mid", "lora_middle", "match nothing in this sd1 checkpoint: .*lora_middle"),
        ("DoRA", "lora_up.weight", None, "whole layer of a LoRA, and lora_up.weight is missing"),
        ("DoRA", "dora_scale", "dora", "match nothing"),
        ("LoHa", "hada_w1_b", None, "whole layer of a LoHa, and hada_w1_b is missing"),
        ("LoHa, Tucker", "hada_t1", "hada_t3", "whole layer of a LoHa, and hada_t1 is missing"),
        ("LoKr, both", "lokr_w1_a", None, "whole layer of a LoKr, and lokr_w1_a is missing"),
        ("LoKr, Tucker", "lokr_t2", None, "belongs to a weight of shape|do not fit each other"),
        ("full", "diff_b", "diff_c", "match nothing"),
        ("full", "attn1_to_q", "attn3_to_q", "match nothing"),
        ("(IA)^3", "on_input", None, "match nothing"),
        ("(IA)^3", ".weight", None, "expected a whole layer of a .IA.*, and weight is missing"),
    ],
)
def test_what_lacks_or_misnames_something(
    folder: Path, tmp_path: Path, kind: str, part: str, other: str | None, said: str
) -> None:
    base = weights(folder, [])["unet"]
    tensors: dict[str, torch.Tensor] = {}
    for name in (f"{BLOCK}.attn1.to_q", "up_blocks.0.resnets.0.conv1"):
        _, saved = trained(kind, layer_of(base[f"{name}.weight"].float(), base.get(f"{name}.bias")), 1.0)
        tensors |= {f"lora_unet_{name.replace('.', '_')}.{key}": value for key, value in saved.items()}
    broken = {name.replace(part, other or part): v for name, v in tensors.items() if other or part not in name}
    assert broken.keys() != tensors.keys()
    save_file(broken, tmp_path / "lora.safetensors")
    with pytest.raises(DiffusionError, match=said) as caught:
        open_checkpoint(str(folder), ConvertOptions(loras=[Lora(tmp_path / "lora.safetensors")]))
    assert str(caught.value).startswith(f"--lora {tmp_path / 'lora.safetensors'}")
