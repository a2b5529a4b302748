"""A conversion collects its own garbage, and leaves the collector as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from diffusion_convert.conversion.garbage import new_garbage_only


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """The suite has frozen what libraries hold."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_only_new_objects_are_looked_at() -> None:
    old = [Cycle() for _ in range(100_000)]
    with new_garbage_only():
        new = weakref.ref(Cycle())
        looked_at = len(gc.get_objects())
        assert gc.collect() >= 1
        assert new() is None
    assert looked_at < len(old)
    assert len(gc.get_objects()) > len(old)


def test_the_collector_is_left_as_it_was() -> None:
    before = gc.get_threshold()
    with pytest.raises(RuntimeError), new_garbage_only():
        assert gc.get_threshold() != before
        raise RuntimeError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_what_a_caller_has_frozen_stays_frozen() -> None:
    """Counts would not tell: other frozen objects die while the test runs."""
    theirs = Cycle()
    gc.freeze()
    with new_garbage_only():
        new = Cycle()
    seen = {id(each) for each in gc.get_objects()}
    assert id(theirs) not in seen
    assert id(new) in seen
