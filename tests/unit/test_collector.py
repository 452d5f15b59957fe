"""The garbage collector leaves alone what a process starts with."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from serve_app.adapters.collector import YOUNG_MAX, set_aside_what_stays


class Ring:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def own_collector() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_what_exists_is_not_looked_at_again() -> None:
    ring = Ring()
    set_aside_what_stays()
    seen = weakref.ref(ring)
    del ring
    gc.collect()
    assert seen() is not None


def test_what_comes_later_is_collected_as_before() -> None:
    set_aside_what_stays()
    ring = Ring()
    seen = weakref.ref(ring)
    del ring
    gc.collect()
    assert seen() is None


def test_the_youngest_are_looked_at_after_more_than_a_few_requests() -> None:
    set_aside_what_stays()
    assert gc.get_threshold()[0] == YOUNG_MAX
