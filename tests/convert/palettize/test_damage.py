"""Mixed bits: the estimate agrees with the truth, and what is chosen by it is better than one width for all."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_convert.palettize.checked import palettize_checked
from diffusion_convert.palettize.damage import LARGE, SAMPLES, Damage, drawn, measure_damage
from diffusion_convert.palettize.outputs import require_outputs, seeded_inputs
from diffusion_convert.palettize.palette import decode
from diffusion_convert.palettize.palettize_options import PalettizeOptions
from diffusion_convert.palettize.palettize_package import palettize_as, stored_array
from diffusion_convert.palettize.plot import candidate, mixed_candidates, plot_recipes, uniform_candidates
from diffusion_convert.palettize.recipe import (
    Recipe,
    average_bits,
    choose_bits,
    expected_damage,
    load_recipe,
    package_identity,
    save_recipe,
)
from diffusion_convert.palettize.select import palettizable
from diffusion_convert.verification.bounds import MIN_PSNR_DB, bound_db
from diffusion_runtime.backends import TensorSpec
from diffusion_runtime.backends.torch_mil import TorchBackend
from diffusion_runtime.errors import InputError, VerificationError
from diffusion_runtime.mil.fuse import DIFFERENTIABLE, fuse
from diffusion_runtime.mil.match import operation
from diffusion_runtime.mil.package import open_package

WIDTHS = (1, 2, 4, 6, 8)


class Computed(TorchDispatchMode):
    """Counts attentions, and by their weights convolutions that widen and those that do not, as they are
    computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attentions = 0
        self.wide, self.narrow = Counter[int](), Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and not args[0].is_meta:
            x, weight = args[:2]
            (self.wide if weight.shape[0] > x.shape[1] else self.narrow).update([weight.data_ptr()])
        self.attentions += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def measured(tiny_unet: Path) -> tuple[Damage, Computed]:
    with Computed() as computed:
        return measure_damage(tiny_unet, PalettizeOptions(), WIDTHS), computed


@pytest.fixture(scope="module")
def damage(measured: tuple[Damage, Computed]) -> Damage:
    return measured[0]


def test_what_takes_long_is_not_computed_again_for_the_backward_pass(
    tiny_unet: Path, measured: tuple[Damage, Computed]
) -> None:
    module = fuse(TorchBackend(fuse=False).load(tiny_unet).module, DIFFERENTIABLE)
    computed = measured[1]
    assert computed.attentions == SAMPLES * sum(operation(node) == "attend" for node in module.graph.nodes) > 0
    assert set(computed.narrow.values()) == {SAMPLES}
    assert set(computed.wide.values()) <= {SAMPLES, 2 * SAMPLES}


def errors_one_by_one(path: Path, bits: int) -> dict[str, float]:
    """The outputs' relative error with one weight palettized at a time, run for each: the truth."""
    package = open_package(path)
    model = TorchBackend(fuse=False).load(path)
    samples = seeded_inputs(model.inputs, 3, seed=99)
    expected = [model(**arrays)["noise_pred"] for arrays in samples]
    holders = {node.meta.get("mil"): node.target for node in model.module.graph.nodes if node.op == "get_attr"}
    errors = {}
    for name, weight in palettizable(package).items():
        buffer = getattr(model.module, str(holders[name]))
        kept = buffer.clone()
        palette = palettize_as(PalettizeOptions(), weight, stored_array(package, weight.value), bits)
        buffer.copy_(torch.from_numpy(decode(palette.lut, palette.indices).astype(np.float32)))
        found = [model(**arrays)["noise_pred"] for arrays in samples]
        buffer.copy_(kept)
        errors[name] = float(
            np.mean([np.sum((one - two) ** 2) / np.sum(two**2) for one, two in zip(found, expected, strict=True)])
        )
    return errors


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("bits", [2, 4])
def test_damage_is_what_one_weight_at_a_time_does(tiny_unet: Path, damage: Damage, bits: int) -> None:
    truth = errors_one_by_one(tiny_unet, bits)
    assert set(truth) == set(damage.sizes)
    assert len(truth) > 20
    expected = [damage.relative_error[name][bits] for name in truth]
    found = list(truth.values())
    assert np.corrcoef(ranks(expected), ranks(found))[0, 1] > 0.95
    assert np.corrcoef(np.log(expected), np.log(found))[0, 1] > 0.97
    assert sum(expected) == pytest.approx(sum(found), rel=0.25)


def test_mixed_bits_beat_one_width_of_the_same_size(tiny_unet: Path, damage: Damage, tmp_path: Path) -> None:
    chosen = choose_bits(damage, 4, WIDTHS)
    assert average_bits(damage, chosen) <= 4
    mixed = palettize_checked(tiny_unet, tmp_path / "mixed.mlpackage", PalettizeOptions(bits_by_weight=chosen))
    plain = palettize_checked(tiny_unet, tmp_path / "plain.mlpackage", PalettizeOptions(4))
    assert mixed.report.bytes_after <= plain.report.bytes_after * 1.01
    assert mixed.psnr_db["noise_pred"] > plain.psnr_db["noise_pred"] + 1
    predicted = candidate(damage, chosen).psnr_db
    assert predicted == pytest.approx(mixed.psnr_db["noise_pred"], abs=3)


def test_each_row_of_the_samples_has_a_timestep_of_its_own() -> None:
    shapes = {"sample": (2, 4, 8, 8), "timestep": (2,)}
    specs = {name: TensorSpec(name, shape, "float16") for name, shape in shapes.items()}
    few, many = (drawn(specs, LARGE + more, 5, 9) for more in (0, 1))
    assert [arrays["timestep"].tolist() for arrays in few] == [[937, 437], [812, 312], [687, 187], [562, 62]]
    assert [arrays["timestep"].tolist() for arrays in many] == [[749, 250]]
    np.testing.assert_array_equal(few[3]["sample"], seeded_inputs(specs, 4, seed=5)[3]["sample"])
    text = {"input_ids": TensorSpec("input_ids", (1, 77), "int32")}
    assert [len(drawn(text, LARGE + more, 5, 9)) for more in (0, 1)] == [4, 2]


def made_damage(seed: int, weights: int = 5) -> Damage:
    random = np.random.default_rng(seed)
    sizes = {f"w{index}": int(random.integers(1, 6)) * 2048 for index in range(weights)}
    relative = {name: {b: float(random.lognormal(0, 2)) * 4.0**-b for b in WIDTHS} for name in sizes}
    return Damage(relative, sizes, 10.0)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_of_that_size_is_much_better(seed: int) -> None:
    """All combinations are tried; the greedy choice may lack one step of the hull."""
    damage = made_damage(seed)
    chosen = choose_bits(damage, 4.5, WIDTHS)
    assert average_bits(damage, chosen) <= 4.5
    names = list(damage.sizes)
    every = [dict(zip(names, bits, strict=True)) for bits in product(WIDTHS, repeat=len(names))]
    room = average_bits(damage, chosen) + 1e-9
    best = min(expected_damage(damage, bits) for bits in every if average_bits(damage, bits) <= room)
    assert expected_damage(damage, chosen) <= best * 1.5 + 1e-12


def test_targets_at_the_ends_are_one_width() -> None:
    damage = made_damage(3)
    assert set(choose_bits(damage, 1, WIDTHS).values()) == {1}
    falling = replace(damage, relative_error={n: {b: 4.0**-b for b in WIDTHS} for n in damage.sizes})
    assert set(choose_bits(falling, 8, WIDTHS).values()) == {8}
    with pytest.raises(InputError, match=r"target of 9 bits: expected 1 to 8"):
        choose_bits(damage, 9, WIDTHS)


def test_more_bits_never_hurt(damage: Damage) -> None:
    mixed = mixed_candidates(damage, WIDTHS)
    assert all(one.psnr_db <= two.psnr_db for one, two in pairwise(mixed))
    by_bits = {round(point.average_bits): point for point in uniform_candidates(damage, WIDTHS)}
    assert [by_bits[bits].psnr_db for bits in WIDTHS] == sorted(by_bits[bits].psnr_db for bits in WIDTHS)


def recipe_for(path: Path, bits: Mapping[str, int]) -> Recipe:
    return Recipe(package=path.name, sha256=package_identity(open_package(path)), average_bits=4.5, bits=dict(bits))


def test_a_recipe_is_kept_and_applied(tiny_unet: Path, damage: Damage, tmp_path: Path) -> None:
    chosen = choose_bits(damage, 4.5, WIDTHS)
    save_recipe(recipe_for(tiny_unet, chosen), tmp_path / "recipe.json")
    options = load_recipe(tmp_path / "recipe.json").options(open_package(tiny_unet))
    report = palettize_checked(tiny_unet, tmp_path / "out.mlpackage", options, compare=False).report
    assert {weight.name: weight.bits for weight in report.weights} == chosen


def test_a_recipe_for_another_package_is_refused(tiny_unet: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_unet, {"w": 4})
    other = recipe.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(InputError, match=r"the recipe was made for unet\.mlpackage with hash 000000000000"):
        other.options(open_package(tiny_unet))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a palettization recipe"),
        ("{", "cannot be read as JSON"),
        (json.dumps({"package": "p", "sha256": "0", "average_bits": 4, "bits": {}}), "bits"),
        (json.dumps({"package": "p", "sha256": "0", "average_bits": 4, "bits": {"w": "x"}}), "bits.w"),
        (json.dumps({"format": 2, "package": "p", "sha256": "0", "average_bits": 4, "bits": {"w": 4}}), "format"),
    ],
)
def test_damaged_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.json")


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: missing"):
        load_recipe(tmp_path / "nowhere.json")


def test_the_plot_is_a_picture(damage: Damage, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    plot_recipes(damage, WIDTHS, tmp_path / "plot.png", "tiny", candidate(damage, choose_bits(damage, 4.5, WIDTHS)))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_bounds_lie_between_widths() -> None:
    assert bound_db(6) == MIN_PSNR_DB[6]
    assert MIN_PSNR_DB[4] < bound_db(4.5) < MIN_PSNR_DB[6]
    require_outputs(Path("unet.mlpackage"), {"noise_pred": MIN_PSNR_DB[6]}, 6)
    with pytest.raises(VerificationError, match=r"noise_pred has -inf dB.*expected at least") as caught:
        require_outputs(Path("unet.mlpackage"), {"noise_pred": -math.inf}, 6)
    assert "--samples" not in str(caught.value), "convert, which says this too, has no such option"
    with pytest.raises(VerificationError, match="noise_pred has nan dB"):
        require_outputs(Path("unet.mlpackage"), {"noise_pred": math.nan}, 6)
