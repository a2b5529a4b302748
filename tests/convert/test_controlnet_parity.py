"""ControlNets and the UNet that they steer against diffusers' own classes, called as its pipelines call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_controlnets
from diffusion_convert import ConvertOptions, convert
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.checkpoint.open import open_checkpoint
from diffusion_convert.components import component
from diffusion_convert.components.component import Shape
from diffusion_convert.verification.compare import psnr_db
from diffusion_runtime.families import AttentionKind

SHAPE = Shape(64, 64, 2)
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sd1": ("sd1", {}),
    "sd1 for a picture painted in": ("sd1-inpainting", {}),
    "sd1, BGR and means": (
        "sd1",
        {"controlnet_conditioning_channel_order": "bgr", "global_pool_conditions": True},
    ),
    "sd2": ("sd2-base", {}),
    "sdxl": ("sdxl", {}),
    "sdxl-small": ("sdxl", {}),
    "sdxl-union": ("sdxl", {}),
}
UNION_TYPE = 4


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Checkpoint, Path, Path]:
    """A checkpoint with a ControlNet called ``net``, and both their folders."""
    family, overrides = KINDS[request.param]
    kind = request.param.split(",")[0].split(" ")[0]
    net = tiny_controlnets.build(kind, tmp_path_factory.mktemp("nets") / "net", **overrides)
    folder = tiny_checkpoint(family)
    source = f"{net}:{UNION_TYPE}" if kind == "sdxl-union" else str(net)
    return open_checkpoint(str(folder), ConvertOptions(controlnets=[source])), folder, net


def test_what_is_given_and_what_becomes_of_it(case: tuple[Checkpoint, Path, Path]) -> None:
    """With every attention, and before any is put in."""
    checkpoint, folder, net = case
    (name,) = (name for name in checkpoint.models if name.startswith("ControlNet_"))
    built = component(name).build(checkpoint, None, SHAPE)
    given = {key: torch.from_numpy(array).float() for key, array in built.sample(0).items()}
    residuals = _own_residuals(net, given)
    unet = component("control_unet").build(checkpoint, None, SHAPE)
    rest = {key: torch.from_numpy(array).float() for key, array in unet.sample(0).items()}
    rest |= {f"additional_residual_{number}": one for number, one in enumerate(residuals)}
    noise = _own_noise(folder, rest, residuals)
    for attention in (None, *AttentionKind):
        found = _run(component(name).build(checkpoint, attention, SHAPE).module, given.values())
        for one, own in zip(found, residuals, strict=True):
            assert psnr_db(own.expand(one.shape).numpy(), one.numpy()) > 90, attention
        (predicted,) = _run(component("control_unet").build(checkpoint, attention, SHAPE).module, rest.values())
        assert psnr_db(noise.numpy(), predicted.numpy()) > 90, attention


def _run(module: torch.nn.Module, inputs: Any) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        found = module.float()(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _own_residuals(net: Path, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As StableDiffusionControlNetPipeline and StableDiffusionXLControlNetUnionPipeline call their ControlNet."""
    import diffusers

    union = "num_control_type" in (net / "config.json").read_text()
    kind = diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel
    own = kind.from_pretrained(net)
    picture = given["controlnet_cond"]
    one_hot = torch.zeros(2, 6).scatter_(1, torch.full((2, 1), UNION_TYPE), 1)
    told: dict[str, Any] = {"controlnet_cond": picture}
    if union:
        told = {"controlnet_cond": [picture], "control_type": one_hot, "control_type_idx": [UNION_TYPE]}
    with torch.inference_mode():
        down, middle = own(**_trio(given), **told, return_dict=False)
    return (*down, middle)


def _own_noise(
    folder: Path, given: Mapping[str, torch.Tensor], residuals: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    from diffusers import UNet2DConditionModel

    own = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    with torch.inference_mode():
        noise: torch.Tensor = own(
            **_trio(given),
            down_block_additional_residuals=list(residuals[:-1]),
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]
    return noise


def _trio(given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    added = {key: given[key] for key in ("time_ids", "text_embeds") if key in given}
    states = given["encoder_hidden_states"].squeeze(2).transpose(1, 2)
    return {
        "sample": given["sample"],
        "timestep": given["timestep"],
        "encoder_hidden_states": states,
        "added_cond_kwargs": added,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kinds", "attention"),
    [("sd2-base", ["sd2"], "split_einsum"), ("sdxl", ["sdxl-small", "sdxl-union:canny"], "split_einsum_v2")],
)
def test_they_are_converted(
    family: str, kinds: list[str], attention: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """At the bound that conversions verify; `original` attention and SD 1 are what other tests convert."""
    for kind in kinds:
        tiny_controlnets.build(kind.split(":")[0], tmp_path / kind.split(":")[0])
    options = ConvertOptions(
        attention,
        components="control_unet,controlnet",
        controlnets=[f"{tmp_path}/{kind}" for kind in kinds],
        compiled=False,
        height=64,
        width=64,
    )
    made = convert(tiny_checkpoint(family), tmp_path / "models", options).variants[attention]
    names = [f"ControlNet_{kind.replace(':', '-')}" for kind in kinds]
    assert list(made.components) == ["control_unet", *names]
    assert all(min(one.psnr_db.values()) >= 60 for one in made.components.values())
    taken = {one.name: one.shape for one in made.components["control_unet"].inputs}
    added = {"time_ids", "text_embeds"} if family == "sdxl" else set()
    for name in names:
        inputs = {one.name: one.shape for one in made.components[name].inputs}
        assert inputs.keys() == {"sample", "timestep", "encoder_hidden_states", "controlnet_cond"} | added
        assert np.prod(inputs["controlnet_cond"]) == 2 * 3 * 64 * 64
        outputs = {one.name: one.shape for one in made.components[name].outputs}
        assert outputs.items() <= taken.items()
        assert len(outputs) == (7 if family == "sdxl" else 5)
