"""What is made of a map is kept while it may be asked for again, and no longer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from maps import attribution_of

from lightning_segxai.defaults import default_metrics, default_shifts
from lightning_segxai.focus import kept
from lightning_segxai.focus.kept import made_once, magnitude, ordered


class Maker:
    """Makes a tensor, and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return torch.zeros(3)


@pytest.fixture(autouse=True)
def _forget():
    kept._kept.clear()


def a_map(seed=0):
    return attribution_of(torch.randn(8, 7, 6, generator=torch.Generator().manual_seed(seed)))


def test_what_is_asked_for_again_is_not_made_again():
    """The two latest maps may take turns, as a map and an earlier one do."""
    maps, maker = [a_map(n) for n in range(2)], Maker()

    for _ in range(3):
        for one in maps:
            made_once(one, "x", maker)

    assert maker.times == 2


def test_settings_are_part_of_what_is_asked_for():
    """What depends on a setting is made for each."""
    one, maker = a_map(), Maker()

    made_once(one, ("x", 1), maker)
    made_once(one, ("x", 2), maker)

    assert maker.times == 2


def test_only_the_latest_two_maps_are_kept():
    """The map that was asked for longest ago makes room, however many earlier ones come."""
    now, first, previous, maker = a_map(0), a_map(1), a_map(2), Maker()

    for one in (now, first, now, previous, now):
        made_once(one, "x", maker)
    assert maker.times == 3
    made_once(first, "x", maker)
    assert maker.times == 4
    assert len(kept._kept) == 2


def test_a_map_that_was_written_into_is_another_one():
    """Whoever scales a map in place gets the new map's numbers."""
    one = a_map()
    before = magnitude(one).clone(), ordered(one).clone()

    one.values.mul_(2)

    assert torch.equal(magnitude(one), 2 * before[0])
    assert torch.equal(ordered(one), 2 * before[1])


def test_it_dies_with_the_map():
    """Between validations nothing is held."""
    one = a_map()
    made = weakref.ref(magnitude(one))

    del one
    gc.collect()

    assert made() is None


def test_without_room_it_is_made_each_time(monkeypatch):
    """Large volumes cost time, not memory."""
    monkeypatch.setattr(kept, "_KEPT_BYTES", 11)  # Maker's tensor has 12
    one, maker = a_map(), Maker()

    made_once(one, "x", maker)
    made_once(one, "x", maker)

    assert maker.times == 2
    assert kept._bytes_kept() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_order_is_that_of_the_magnitudes(dtype):
    """In float64, whatever the map is in, and the map itself is left as it is."""
    one = attribution_of(a_map().values.to(dtype))
    values = one.values.clone()

    assert torch.equal(ordered(one), magnitude(one).flatten().sort().values)
    assert torch.equal(magnitude(one), values.double().abs())
    assert torch.equal(one.values, values)


def test_inference_tensors_are_measured_too():
    """They have no version to look at."""
    with torch.inference_mode():
        one = attribution_of(torch.arange(-3.0, 3.0).reshape(1, 2, 3))

        assert float(magnitude(one).sum()) == 9.0


def test_no_number_depends_on_what_was_measured_before():
    """All default metrics forwards, backwards and each on its own agree."""
    label = torch.zeros(8, 7, 6, dtype=torch.long)
    label[2:6, 3, 2:4] = 1
    metrics, shifts = default_metrics(), default_shifts()

    def both():
        return tuple(
            attribution_of(a_map(n).values, label, (0.5, 1.0, 0.8), label > 0) for n in range(2)
        )

    def take(name, now, then):
        if name in shifts:
            return shifts[name].measure(now, then)
        return metrics[name].measure(now)

    names, pair, other = [*metrics, *shifts], both(), both()
    forwards = {name: take(name, *pair) for name in names}
    backwards = {name: take(name, *other) for name in reversed(names)}
    alone = {name: take(name, *both()) for name in names}

    assert forwards == backwards == alone
