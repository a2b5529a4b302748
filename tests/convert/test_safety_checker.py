"""The safety checker decides as diffusers' does, as a torch module and as a package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_checkpoints
from diffusion_convert.checkpoint.diffusers_folder import open_folder
from diffusion_convert.checkpoint.model import Checkpoint
from diffusion_convert.components.component import Shape
from diffusion_convert.components.safety_checker import SAFETY_CHECKER
from diffusion_convert.export.export import ExportOptions, export
from diffusion_convert.inspect import inspect
from diffusion_convert.inspect.show import as_text
from diffusion_convert.networks.attention import ATTENTION
from diffusion_convert.networks.clip_safety import ROUNDS_TO_POSITIVE, SPECIAL_CARE_ADJUSTMENT, SafetyChecker
from diffusion_convert.verification.compare import widened
from diffusion_runtime.backends.torch_mil import TorchBackend, TorchModel
from diffusion_runtime.bundle.manifest import Source
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import AttentionKind
from diffusion_runtime.mil.program import Metadata
from read_back import check_read_back

SHAPE = Shape(height=48, width=72, batch_size=2)
CONCEPTS = 17
APPS = (1, 512, 512, 3)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return open_folder(tiny_checkpoint("sd1"), Source(name="tiny"))


@pytest.fixture(scope="module")
def package(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    path = tmp_path_factory.mktemp("safety") / "safety_checker.mlpackage"
    export_options = ExportOptions(AttentionKind.ORIGINAL, SHAPE, "macOS13")
    export(SAFETY_CHECKER, checkpoint, export_options, path, Metadata())
    return TorchBackend().load(path)


@pytest.fixture(scope="module")
def compiled(package: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_read_back(package.path, tmp_path_factory.mktemp("compiled"))


def tiny_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(5)
    config = {key: value for key, value in tiny_checkpoints.SAFETY.items() if key != "architectures"}
    config["vision_config"] = {**config["vision_config"], "image_size": 28}
    checker = StableDiffusionSafetyChecker(CLIPConfig(**config)).eval().requires_grad_(False)
    for embeddings in (checker.concept_embeds, checker.special_care_embeds):
        embeddings.copy_(torch.randn(embeddings.shape))
    return checker


def cosines(checker: Any, clip_input: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    picture = checker.visual_projection(checker.vision_model(clip_input)[1])
    return torch.nn.functional.cosine_similarity(picture, embeddings)


@pytest.mark.parametrize(
    ("special", "concept", "flagged"),
    [
        (-0.1, -0.1, False),
        (-0.1, 0.1, True),
        (0.1, -0.1, False),
        (-0.1, -0.005, False),
        (0.1, -0.005, True),  # near enough with the special-care adjustment
        (0.1, -SPECIAL_CARE_ADJUSTMENT - 0.001, False),
        (-0.1, ROUNDS_TO_POSITIVE - 0.0001, False),  # positive, and zero after rounding
        (-0.1, ROUNDS_TO_POSITIVE + 0.0001, True),
        (ROUNDS_TO_POSITIVE - 0.0001, -0.005, False),
        (ROUNDS_TO_POSITIVE + 0.0001, -0.005, True),
    ],
)
def test_decides_as_diffusers(special: float, concept: float, flagged: bool) -> None:
    """``special`` and ``concept`` are how far the nearest of each kind is above its threshold."""
    checker = tiny_checker()
    clip_input, images = torch.randn(1, 3, 28, 28), torch.rand(1, 8, 12, 3)
    for embeddings, thresholds, above in (
        (checker.special_care_embeds, checker.special_care_embeds_weights, special),
        (checker.concept_embeds, checker.concept_embeds_weights, concept),
    ):
        near = cosines(checker, clip_input, embeddings)
        thresholds.copy_(near + 0.2)
        thresholds[1] = near[1] - above
    wanted_images, wanted_flags = checker(clip_input, images.clone())
    got_images, got_flag, scores = SafetyChecker(checker, ATTENTION[AttentionKind.ORIGINAL]).eval()(
        clip_input, images, torch.zeros(1)
    )
    assert wanted_flags == [flagged]
    assert got_flag.tolist() == [[[[float(flagged)]]]]
    torch.testing.assert_close(got_images, wanted_images)
    assert scores.shape == (1, CONCEPTS)
    assert bool(scores.max() > ROUNDS_TO_POSITIVE) == flagged


def test_interface_is_what_apps_expect(package: TorchModel) -> None:
    picture = (1, SHAPE.height, SHAPE.width, 3)
    assert {name: (spec.shape, spec.dtype) for name, spec in package.inputs.items()} == {
        "clip_input": ((1, 3, 224, 224), "float16"),
        "images": (picture, "float16"),
        "adjustment": ((1,), "float16"),
    }
    assert {name: (spec.shape, spec.dtype) for name, spec in package.outputs.items()} == {
        "filtered_images": ((), "float32"),
        "has_nsfw_concepts": ((1, 1, 1, 1), "float32"),
        "concept_scores": ((1, CONCEPTS), "float32"),
    }
    assert package.inputs["images"].shapes == (picture, APPS)


@pytest.mark.parametrize("kind", ["package", "compiled"])
@pytest.mark.parametrize("size", [(SHAPE.height, SHAPE.width), (512, 512)])
def test_takes_pictures_of_its_size_and_of_apps(
    package: TorchModel, compiled: Path, kind: str, size: tuple[int, int]
) -> None:
    model = package if kind == "package" else TorchBackend().load(compiled)
    rest = {"clip_input": np.zeros((1, 3, 224, 224), np.float16), "adjustment": np.zeros(1, np.float16)}
    picture = np.random.default_rng(0).random((1, *size, 3)).astype(np.float16)
    np.testing.assert_array_equal(model(images=picture, **rest)["filtered_images"], picture.astype(np.float32))
    with pytest.raises(InputError, match=r"expected \(1, 48, 72, 3\) or \(1, 512, 512, 3\)"):
        model(images=picture[:, :-8], **rest)


def test_is_compiled_as_apples_compiler_writes_enumerated_shapes(compiled: Path) -> None:
    (line,) = [line for line in (compiled / "model.mil").read_text().splitlines() if "func main" in line]
    assert "tensor<fp16, [1, ?, ?, 3]> images)" in line
    shapes = re.search(r'\("EnumeratedShapes", (.*)\)\)\)\]', line)
    assert shapes is not None
    keyed = dict(re.findall(r'\{"([0-9a-f]{8})", \{\{"images", (\[[^]]*\])\}\}\}', shapes[1]))
    assert sorted(keyed.values()) == ["[1, 48, 72, 3]", "[1, 512, 512, 3]"]
    schema = json.loads((compiled / "metadata.json").read_text())[0]["inputSchema"]
    (images,) = [feature for feature in schema if feature["name"] == "images"]
    assert images["shape"] == "[1, 48, 72, 3]"
    assert images["hasShapeFlexibility"] == "1"
    assert images["enumeratedShapes"] == "[[1, 48, 72, 3], [1, 512, 512, 3]]"
    assert images["shapeFlexibility"] == "1 × 48 × 72 × 3 | 1 × 512 × 512 × 3"
    shown = as_text(inspect(compiled))
    assert "images Float16 1x48x72x3 (flexible: 1x48x72x3 or 1x512x512x3)" in shown
    assert "filtered_images Float32 of no declared shape" in shown and "ranges of shapes" not in shown


def test_one_of_the_size_of_apps_has_one_shape(checkpoint: Checkpoint) -> None:
    graph = SAFETY_CHECKER.build(checkpoint, AttentionKind.ORIGINAL, Shape(512, 512, 2))
    assert [port.shapes for port in graph.inputs] == [(), (), ()]


def test_every_shape_is_verified(checkpoint: Checkpoint) -> None:
    graph = SAFETY_CHECKER.build(checkpoint, None, SHAPE)
    seen = {graph.sample(seed)["images"].shape for seed in range(SAFETY_CHECKER.runs)}
    assert seen == {(1, SHAPE.height, SHAPE.width, 3), APPS}


@pytest.mark.parametrize("adjustment", [0.0, 2.0])
def test_package_agrees_with_diffusers(package: TorchModel, checkpoint: Checkpoint, adjustment: float) -> None:
    """An adjustment of 2 flags every picture: cosines and thresholds are below 1."""
    reference = SAFETY_CHECKER.build(checkpoint, None, SHAPE)
    arrays = dict(reference.sample(1))
    with widened(reference.module), torch.no_grad():
        images, flag, scores = reference.module(
            *(torch.from_numpy(arrays[port.name].astype(np.float32)) for port in reference.inputs)
        )
    assert float(flag) == 0.0
    arrays["adjustment"] = np.full(1, adjustment, np.float16)
    got = package(**arrays)
    error = np.sqrt(np.mean((scores.numpy() + adjustment - got["concept_scores"]) ** 2))
    assert 20 * np.log10(np.abs(scores.numpy()).max() / error) >= SAFETY_CHECKER.min_psnr_db
    assert got["has_nsfw_concepts"].item() == float(adjustment > 0)
    np.testing.assert_array_equal(got["filtered_images"], images.numpy() * (adjustment == 0))
