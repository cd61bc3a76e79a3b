"""How far a map moved: known answers, oracles and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps import attribution_of
from scipy.ndimage import center_of_mass
from scipy.stats import spearmanr

from lightning_segxai.focus.shift import CenterShift, RankCorrelation, TopOverlap

SHAPE = (4, 5, 6)
SPACING = (0.5, 1.0, 3.0)
EVERY = [RankCorrelation(), TopOverlap(0.1), CenterShift()]
named = pytest.mark.parametrize("metric", EVERY, ids=lambda m: type(m).__name__)
coarse_maps = hnp.arrays(np.int8, SHAPE, elements=st.integers(-4, 4))


def measured(metric, values, earlier):
    now, then = (attribution_of(map_, spacing=SPACING) for map_ in (values, earlier))
    return metric.measure(now, then)


def random_map(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_voxel(at):
    values = torch.zeros(SHAPE)
    values[at] = 1.0
    return values


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        (random_map(), (1.0, 1.0, 0.0)),
        (random_map() * 1e3, (1.0, 1.0, 0.0)),
        (-random_map(), (-1.0, 1.0, 0.0)),
    ],
    ids=["same", "scaled", "negated"],
)
def test_the_same_map_has_not_moved(earlier, expected):
    """Scale does not count; the sign counts for the correlation, and for nothing else."""
    found = tuple(measured(metric, random_map(), earlier) for metric in EVERY)

    assert found == pytest.approx(expected, abs=1e-10)


def test_a_voxel_that_moved_is_as_far_as_in_millimeters():
    """The center moves by the spaced difference, and the peak is no longer shared."""
    now, then = one_voxel((0, 1, 2)), one_voxel((3, 1, 1))

    assert measured(CenterShift(), now, then) == pytest.approx(math.hypot(3 * 0.5, 3.0), abs=1e-12)
    assert measured(TopOverlap(1 / 120), now, then) == 0.0


def test_top_overlap_counts_common_voxels():
    """Of the two strongest voxels of four, one is common."""
    now = torch.tensor([[[4.0, -3.0, 1.0, 0.0]]])
    then = torch.tensor([[[0.0, 3.0, 1.0, -4.0]]])

    assert measured(TopOverlap(0.5), now, then) == 0.5


def test_top_overlap_of_flat_maps_is_whole():
    """Maps that prefer nothing prefer the same."""
    flat = torch.ones(SHAPE)

    assert measured(TopOverlap(), flat, -flat) == pytest.approx(1.0, abs=1e-12)


def test_top_overlap_of_unrelated_maps_is_the_fraction():
    """By chance, the strongest tenth of one map holds a tenth of another's."""
    maps = torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(1))

    assert measured(TopOverlap(0.1), maps[0], maps[1]) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_that_is_none_is_refused(fraction):
    """A share of the voxels lies above 0 and is at most 1."""
    with pytest.raises(ValueError, match=r"above 0 and at most 1"):
        TopOverlap(fraction)


def test_a_constant_map_has_no_rank_correlation():
    """Where all voxels are alike there is no order to compare."""
    assert measured(RankCorrelation(), torch.ones(SHAPE), random_map()) is None
    assert measured(RankCorrelation(), random_map(), -torch.ones(SHAPE)) is None


@settings(max_examples=25, deadline=None)
@given(now=coarse_maps, then=coarse_maps)
def test_rank_correlation_is_scipys(now, then):
    """Ties included, the number is that of SciPy."""
    assume(now.min() < now.max() and then.min() < then.max())

    expected = spearmanr(now.ravel(), then.ravel()).statistic
    assert measured(RankCorrelation(), now, then) == pytest.approx(expected, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(now=coarse_maps, then=coarse_maps)
def test_centers_are_scipys(now, then):
    """The centers are SciPy's centers of mass, in millimeters."""
    assume(now.any() and then.any())
    centers = [np.array(center_of_mass(np.abs(m.astype(float)))) * SPACING for m in (now, then)]

    expected = math.dist(*centers)
    assert measured(CenterShift(), now, then) == pytest.approx(expected, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), fraction=st.floats(0.005, 1.0))
def test_without_ties_top_overlap_is_that_of_sets(seed, fraction):
    """Plain sets of the strongest voxels have the same overlap."""
    now, then = np.random.default_rng(seed).standard_normal((2, *SHAPE))
    count = math.ceil(fraction * now.size)
    tops = [set(np.argsort(-np.abs(m).ravel())[:count].tolist()) for m in (now, then)]

    found = measured(TopOverlap(fraction), now, then)

    assert found == pytest.approx(len(tops[0] & tops[1]) / count, abs=1e-10)


@named
@settings(max_examples=25, deadline=None)
@given(now=coarse_maps, then=coarse_maps, scale=st.sampled_from([1e-3, 0.37, 2.0, 1e4]))
def test_scale_order_and_flips_change_nothing(metric, now, then, scale):
    """Now and then may be exchanged, scaled, and flipped together; and the number is in range."""
    assume(now.min() < now.max() and then.min() < then.max())
    found = measured(metric, now, then)
    flipped = [m[::-1, :, ::-1].copy() for m in (now, then)]

    assert metric.range[0] <= found <= metric.range[1]
    assert measured(metric, then, now) == pytest.approx(found, abs=1e-9)
    assert measured(metric, now * scale, then) == pytest.approx(found, abs=1e-9)
    assert measured(metric, *flipped) == pytest.approx(found, abs=1e-9)


@named
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_give_what_wide_ones_do(metric, dtype):
    """The type that a map is stored in does not matter beyond its own rounding."""
    now, then = random_map(1).to(dtype), random_map(2).to(dtype)

    found = measured(metric, now, then)

    assert found == measured(metric, now.double(), then.double())


@named
def test_a_shift_metric_carries_its_reading(metric):
    """Unit, range and reading help are there."""
    assert metric.unit
    assert metric.range[0] < metric.range[1]
    assert metric.reading.endswith(".")
