"""What `coreml-sd evaluate` measures: CLIP scores, distances between sets of pictures, features of networks."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_runtime.errors import InputError
from diffusion_runtime.evaluate import distances, inception, measure, networks, pictures, sweep
from diffusion_runtime.evaluate.pictures import Made
from draw_shapes import draw
from judge_shapes import captions

CLIP = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes-clip"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture(scope="module")
def clip() -> networks.Clip:
    return networks.load_clip(str(CLIP))


def test_flagged_pictures_are_in_no_other_number(clip: networks.Clip, tmp_path: Path) -> None:
    """A black picture that is flagged changes nothing but its count."""
    chosen = captions()[::17]
    what = sweep.Sweep({"a": tmp_path, "b": tmp_path}, tmp_path, [1.0], tmp_path, {}, lambda *_: [])
    for name, flagged in (("a", ()), ("b", (0, 3))):
        folder = what.folder(name, 1.0)
        folder.mkdir(parents=True)
        lines = []
        for index, caption in enumerate(chosen):
            pixels = draw(caption, random.Random(index)) * (index not in flagged)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
            line = {"row": index, "file": f"{index}.png", "input": {"prompt": caption.text}}
            lines.append(json.dumps({**line, "flagged": index in flagged}) + "\n")
        (folder / "results.jsonl").write_text("".join(lines))
    first, second = measure.Measurement(what, clip, networks.load_features("clip", clip)).rows()
    assert (second.pictures, second.flagged, second.identical, second.psnr_db) == (13, 2, 11, None)
    kept = [one for index, one in enumerate(chosen) if index not in (0, 3)]
    drawn = [Image.fromarray(draw(one, random.Random(chosen.index(one)))) for one in kept]
    expected = 100 * (clip.see(drawn) * clip.read([one.text for one in kept])).sum(1).clamp(min=0)
    assert second.clip_score == pytest.approx(float(expected.mean()), rel=1e-5)
    assert first.clip_score != pytest.approx(second.clip_score, rel=1e-5)
    assert second.frechet_distance is not None and second.frechet_distance >= 0


def test_clip_score_is_transformers(clip: networks.Clip) -> None:
    """CLIPModel's own logits of texts and pictures, without the scale."""
    from transformers import CLIPModel, CLIPProcessor

    chosen = captions()[::40]
    shown = [Image.fromarray(draw(caption, random.Random(1))) for caption in chosen]
    texts = [caption.text for caption in chosen]
    network = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
    inputs = CLIPProcessor.from_pretrained(CLIP)(text=texts, images=shown, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(**inputs).logits_per_image / network.logit_scale.exp()
    assert torch.allclose(clip.see(shown) @ clip.read(texts).T, logits, atol=1e-5)
    assert (logits.argmax(1) == torch.arange(len(chosen))).all(), "and each picture's own caption fits best"


def test_distances_are_those_of_their_definitions() -> None:
    """Fréchet by the symmetric form of its square root, KID by the sums of its paper over all pairs."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn((400, 6), generator=generator).double() * scale + 0.3 * scale for scale in (1.0, 1.4))
    found = distances.distance(one, two)
    assert found is not None
    means, covariances = zip(*((x.mean(0).numpy(), np.cov(x.numpy().T)) for x in (one, two)), strict=True)
    values, vectors = np.linalg.eigh(covariances[0])
    half = vectors @ np.diag(values**0.5) @ vectors.T  # the root of the product has the trace of this one's
    root = np.linalg.eigvalsh(half @ covariances[1] @ half) ** 0.5
    frechet = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1]) - 2 * root.sum()
    assert found.frechet == pytest.approx(frechet, rel=1e-6)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / 6 + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (400 * 399) for x in (one, two))
    kid = float(within - 2 * kernel(one, two).mean())
    assert found.kid_low < kid < found.kid_high
    assert found.kid == pytest.approx(kid, rel=0.1)
    assert distances.distance(one, two) == found, "the same numbers each time"


def test_the_interval_of_kid_is_as_wide_as_new_samples_spread() -> None:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(20):
        one = torch.randn((80, 4), generator=generator)
        two = torch.randn((80, 4), generator=generator) + 0.7
        found.append(distances.distance(one, two))
    reach = np.mean([(each.kid_high - each.kid_low) / 2 for each in found if each])
    assert 0.5 < reach / (1.96 * np.std([each.kid for each in found if each], ddof=1)) < 2


@pytest.mark.parametrize(("count", "has_distance"), [(9, False), (10, True)])
def test_too_few_pictures_for_a_distance(count: int, has_distance: bool) -> None:
    far = distances.distance(torch.randn(50, 4), torch.randn(count, 4))
    assert (far is not None) is has_distance


def test_features_of_any_network_of_pictures(clip: networks.Clip, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTConfig, ViTModel

    shown = [Image.fromarray(draw(caption, random.Random(1))) for caption in captions()[:20]]
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = ViTModel(ViTConfig(image_size=32, patch_size=8, **small)).eval()
    network.save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    with torch.no_grad():
        expected = network(**processor(shown, return_tensors="pt")).pooler_output
    found = networks.all_of(networks.load_features(str(tmp_path), clip).see, shown)
    assert torch.allclose(found, expected, atol=1e-5) and found.shape == (20, 16)
    same = networks.load_features(str(CLIP), clip)
    assert torch.equal(networks.load_features("clip", clip).see(shown), clip.embed(shown))
    assert torch.equal(same.see(shown), clip.embed(shown))


def test_paired_psnr(tmp_path: Path) -> None:
    for name, value in (("a", 100), ("b", 110), ("c", 100)):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{name}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    a, b, c, small = (Made(tmp_path / f"{name}.png", "", False) for name in ("a", "b", "c", "small"))
    hidden = Made(tmp_path / "b.png", "", True)
    assert pictures.paired([a, a], [b, c]).psnr_db == pytest.approx(10 * np.log10(255**2 / 50))
    assert pictures.paired([a, a], [c, hidden]) == pictures.Difference(None, 1)
    with pytest.raises(InputError, match="8x8 and 4x4"):
        pictures.paired([a], [small])


def test_inception_is_torchvisions() -> None:
    """A sixteenth as wide, with random weights: the features that torchvision 0.28's Inception3 gave for them."""
    known = json.loads((Path(__file__).parent / "inception.json").read_text())
    weights = {}
    for name, shape in known["shapes"].items():
        others = {name.replace("conv.weight", f"bn.{part}"): shape[:1] for part in _BATCH_NORM}
        for each, size in {name: shape, **others}.items():
            generator = torch.Generator().manual_seed(zlib.crc32(each.encode()))
            if each.endswith(("running_var", "bn.weight")):
                weights[each] = torch.rand(size, generator=generator) + 0.5
            else:
                strength = 0.1 if len(size) == 1 else (2 / np.prod(size[1:])) ** 0.5
                weights[each] = torch.randn(size, generator=generator) * strength
    picture = torch.linspace(-1, 1, 3 * 299 * 299).view(1, 3, 299, 299).sin().mul(5).cos()
    network = inception.Inception(weights, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    assert torch.allclose(network.features(picture)[0], torch.tensor(known["features"]), atol=1e-4)


def test_inception_of_a_folder_that_timm_published(clip: networks.Clip, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    known = json.loads((Path(__file__).parent / "inception.json").read_text())
    weights = {
        name: torch.randn(shape) * (2 / np.prod(shape[1:])) ** 0.5 for name, shape in known["shapes"].items()
    }
    for name in known["shapes"]:
        weights |= {
            name.replace("conv.weight", f"bn.{part}"): torch.ones(len(weights[name])) for part in _BATCH_NORM
        }
    config: dict[str, Any] = {
        "architecture": "inception_v3",
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    black, white = (Image.new("RGB", (64, 64), color) for color in ("black", "white"))
    features = networks.load_features(str(tmp_path), clip)
    expected = inception.load(tmp_path).features(torch.cat([torch.full((1, 3, 299, 299), x) for x in (-1.0, 1.0)]))
    assert torch.allclose(features.see([black, white]), expected, rtol=1e-4)
    del weights["Mixed_7c.branch_pool.conv.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"'Mixed_7c.branch_pool.conv.weight' is missing"):
        networks.load_features(str(tmp_path), clip)
    del config["pretrained_cfg"]["std"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'std' is missing"):
        networks.load_features(str(tmp_path), clip)
