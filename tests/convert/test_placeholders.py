"""Placeholders: every weight is found again, whatever a converter does to its stand-in, or its loss is noticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffusion_convert.export.derivations import Derivations
from diffusion_convert.export.placeholders import MIN_SIZE, Misplaced, Placeholders, thin


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv": torch.randn(32, 16, 3, 3, generator=generator).half(),
        "square": torch.randn(64, 64, generator=generator).half(),
        "bias": torch.randn(64, generator=generator).half(),
        "ids": torch.arange(2048),
    }


def test_large_weights_become_placeholders_that_store_one_column() -> None:
    tensors = weights()
    view = Placeholders().view(tensors)
    assert view["conv"].shape == tensors["conv"].shape
    assert view["conv"].dtype == torch.float32
    assert view["conv"].untyped_storage().nbytes() == 32 * 4
    assert torch.equal(view["bias"], tensors["bias"].float())
    assert view["ids"] is tensors["ids"]


Change = Callable[[np.ndarray], np.ndarray]
CHANGES: dict[str, Change] = {
    "as it is": lambda array: array,
    "in float16": lambda array: array.astype(np.float16),
    "copied": np.ascontiguousarray,
    "another axis": lambda array: array[..., None],
    "flat rows": lambda array: array.reshape(len(array), -1),
}


@pytest.mark.parametrize("name", ["conv", "square"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_weight_is_found_by_its_placeholder(name: str, change: Change) -> None:
    tensors, placeholders = weights(), Placeholders()
    array = change(placeholders.view(tensors)[name].numpy())
    found = placeholders.take(array)
    assert found is not None
    assert found[0] == name
    assert found[1].shape == array.shape
    assert torch.equal(found[1].reshape(tensors[name].shape), tensors[name])


def test_a_transposed_matrix_is_transposed() -> None:
    tensors, placeholders = weights(), Placeholders()
    array = placeholders.view(tensors)["square"].numpy().T.reshape(1, 64, 64)
    found = placeholders.take(array)
    assert found is not None
    assert torch.equal(found[1][0], tensors["square"].t())


@pytest.mark.parametrize("axes", [(1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)])
def test_other_orders_are_noticed(axes: tuple[int, ...]) -> None:
    placeholders = Placeholders()
    array = placeholders.view(weights())["conv"].numpy().transpose(axes)
    with pytest.raises(Misplaced, match="conv"):
        placeholders.take(array)


def test_what_was_folded_away_is_noticed() -> None:
    placeholders = Placeholders()
    view = placeholders.view(weights())
    placeholders.keep(view.values())
    placeholders.take(view["conv"].numpy())
    assert placeholders.take(2 * view["square"].numpy()) is None
    with pytest.raises(Misplaced, match="square"):
        placeholders.check_all_taken()


@pytest.mark.parametrize("array", [np.ones((64, 64), np.float16), -np.ones((64, 64), np.float32), np.eye(64)])
def test_other_constants_are_left_alone(array: np.ndarray) -> None:
    placeholders = Placeholders()
    placeholders.view(weights())
    assert array.size >= MIN_SIZE
    assert placeholders.take(array) is None


def test_weights_beyond_float16_are_told() -> None:
    placeholders = Placeholders()
    view = placeholders.view({"wide": torch.full((64, 64), 7e4), "narrow": torch.full((64, 64), 6e4)})
    numbers = {name: find(placeholders, value) for name, value in view.items()}
    assert {name: placeholders.exceeds_float16(number) for name, number in numbers.items()} == {
        "wide": True,
        "narrow": False,
    }
    assert placeholders.exceeding() == ("wide",)


def find(placeholders: Placeholders, tensor: torch.Tensor) -> int:
    index = placeholders.find(tensor.numpy())
    assert index is not None
    return index


def test_thin_keeps_what_differs() -> None:
    array = np.broadcast_to(np.arange(3.0)[:, None], (3, 4))
    assert thin(array).shape == (3, 1)


def test_what_is_computed_of_a_weight_is_noticed_and_views_are_not() -> None:
    tensors = {name: torch.randn(64, 64) for name in ("viewed", "computed", "read", "copied", "untouched")}
    with Derivations(tensors) as derived:
        torch.nn.Parameter(tensors["viewed"].float().reshape(64, 64, 1, 1).transpose(0, 1).detach(), False)
        torch.nn.functional.normalize(tensors["computed"])
        float(tensors["read"][0, 0])
        torch.empty(64, 64).copy_(tensors["copied"])
    assert derived.used == {"computed", "read", "copied"}


def test_weights_that_a_network_computes_with_are_handed_out() -> None:
    placeholders = Placeholders()
    placeholders.view(weights())
    placeholders.check_unused(["bias"])  # no placeholder stands for it
    with pytest.raises(Misplaced, match="square") as misplaced:
        placeholders.check_unused(["bias", "square"])
    again = Placeholders(by_value=misplaced.value.names).view(weights())
    assert torch.equal(again["square"], weights()["square"].float())
