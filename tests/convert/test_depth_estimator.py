"""The depth estimator computes what transformers' DPT-Hybrid computes, as a torch module and as a package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_checkpoints
from diffusion_convert.checkpoint.diffusers_folder import open_folder
from diffusion_convert.components.component import Shape
from diffusion_convert.components.depth_estimator import DEPTH_ESTIMATOR
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.depth import DepthEstimator
from diffusion_convert.verification.compare import widened
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import UnsupportedError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.program import Metadata

SHAPE = Shape(height=64, width=64, batch_size=2)


def tiny_model(**options: Any) -> Any:
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(6)
    config = {key: value for key, value in tiny_checkpoints.DEPTH.items() if key != "architectures"}
    model = DPTForDepthEstimation(DPTConfig(**{**config, **options})).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))
    model.head.head[4].bias.fill_(2.0)  # the last ReLU stays open
    return model


def psnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    """Of what varies in ``wanted``: depths are a small variation of a large mean."""
    assert wanted.shape == got.shape
    return float(20 * np.log10(np.ptp(wanted) / np.sqrt(np.mean((wanted - got) ** 2))))


@pytest.mark.parametrize("layers", [[0, 1, 2, 9], [0, 1, 3, 3], [0, 1, -1, 3], [0, 1, 2], [0, 1]])
def test_layers_that_are_not_there_are_refused(layers: list[int]) -> None:
    model = tiny_model()
    model.config.backbone_out_indices = layers
    with pytest.raises(UnsupportedError, match="backbone_out_indices"):
        DepthEstimator(model, ATTENTION[AttentionKind.ORIGINAL])


@pytest.mark.parametrize("kind", AttentionKind)
@pytest.mark.parametrize("size", [96, 160])
def test_agrees_with_transformers(kind: AttentionKind, size: int) -> None:
    model = tiny_model(image_size=size)
    picture = torch.rand(1, 3, size, size)
    wanted = model(picture).predicted_depth
    got = DepthEstimator(model, ATTENTION[kind]).eval()(picture)
    assert psnr_db(wanted.numpy(), got.numpy()) >= DEPTH_ESTIMATOR.min_psnr_db


@pytest.mark.parametrize("absent", ["nothing", "neck.fusion_stage.layers.0.residual_layer1."])
def test_package_agrees_with_transformers(
    absent: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Some published weights lack what transformers' network has and never calls."""
    checkpoint = open_folder(tiny_checkpoint("sd2-depth"), Source(name="tiny"))
    whole = checkpoint.models["depth_estimator"]
    tensors = {name: tensor for name, tensor in whole.tensors().items() if not name.startswith(absent)}
    models = {**checkpoint.models, "depth_estimator": replace(whole, tensors=lambda: tensors)}
    checkpoint = replace(checkpoint, models=models)
    path = tmp_path / "depth_estimator.mlpackage"
    export(DEPTH_ESTIMATOR, checkpoint, ExportOptions(AttentionKind.ORIGINAL, SHAPE, "macOS13"), path, Metadata())
    package = TorchBackend().load(path)
    reference = DEPTH_ESTIMATOR.build(checkpoint, None, SHAPE)
    arrays = reference.sample(0)
    with widened(reference.module), torch.no_grad():
        wanted = reference.module(torch.from_numpy(arrays["pixel_values"].astype(np.float32)))
    size = tiny_checkpoints.DEPTH["image_size"]
    assert [(spec.name, spec.shape, spec.dtype) for spec in package.inputs.values()] == [
        ("pixel_values", (1, 3, size, size), "float16")
    ]
    assert [(spec.name, spec.shape, spec.dtype) for spec in package.outputs.values()] == [
        ("predicted_depth", (1, size, size), "float32")
    ]
    assert psnr_db(wanted.numpy(), package(**arrays)["predicted_depth"]) >= DEPTH_ESTIMATOR.min_psnr_db


def test_other_depth_estimators_are_refused() -> None:
    model = tiny_model(
        is_hybrid=False, backbone_config=None, neck_ignore_stages=[], backbone_out_indices=[0, 1, 2, 3]
    )
    with pytest.raises(UnsupportedError, match="is_hybrid"):
        DepthEstimator(model, ATTENTION[AttentionKind.ORIGINAL])
