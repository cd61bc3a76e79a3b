"""Where the attribution lies in terms of vessels: known answers, plain rewritings, properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps import attribution_of

from lightning_segxai.focus.anatomy import (
    MassAtCaliber,
    MassAtDistance,
    MiddleShare,
    ReachQuantile,
    caliber_profile,
    distance_profile,
)
from lightning_segxai.vessels import caliber_mm, centerline, wall_distance_mm

SHAPE = (5, 6, 7)
SPACING = (0.5, 1.0, 3.0)
BANDS = [
    MassAtDistance(),
    MassAtDistance(0.0, 1.0),
    MassAtDistance(1.0, 3.0),
    MassAtDistance(3.0, None),
]
CALIBERS = [MassAtCaliber(), MassAtCaliber(0.75, 1.5), MassAtCaliber(1.5, None)]
EVERY = [*BANDS, *CALIBERS, MiddleShare(), ReachQuantile(0.5, "label"), ReachQuantile(0.9, "label")]
named = pytest.mark.parametrize("metric", EVERY, ids=str)
coarse_maps = hnp.arrays(np.int8, SHAPE, elements=st.integers(-4, 4))
masks = hnp.arrays(np.bool_, SHAPE).filter(lambda mask: mask.any() and not mask.all())


def plain_nearest(mask, spacing):
    """Distance of every voxel to the nearest of a mask, and which one, by trying all."""
    places = [np.array(v) for v in np.argwhere(mask)]
    distance, which = np.zeros(mask.shape), {}
    for v in np.ndindex(*mask.shape):
        ways = [math.sqrt((((np.array(v) - p) * spacing) ** 2).sum()) for p in places]
        distance[v] = min(ways)
        which[v] = {tuple(p) for p, way in zip(places, ways, strict=True) if way == distance[v]}
    return distance, which


def plain_wall(mask, spacing):
    """Positive outside, negative inside, by trying all pairs."""
    return plain_nearest(mask, spacing)[0] - plain_nearest(~mask, spacing)[0]


def tubes():
    """A thin tube of one voxel across, and a thick one of five."""
    label = torch.zeros(12, 14, 24, dtype=torch.int64)
    label[2, 2, :] = 1
    label[4:9, 6:11, :] = 1
    return label


@settings(max_examples=15)
@given(mask=masks)
def test_distances_from_the_wall_are_those_of_all_pairs(mask):
    """Positive outside, negative inside, in millimeters."""
    found = wall_distance_mm(torch.from_numpy(mask), SPACING)

    np.testing.assert_allclose(found, plain_wall(mask, SPACING), rtol=1e-6)


@settings(max_examples=15)
@given(mask=masks)
def test_a_voxels_caliber_is_that_of_a_nearest_voxel_of_the_centerline(mask):
    """By trying all voxels of the centerline; of equally near ones, any."""
    line = centerline(torch.from_numpy(mask), SPACING)
    assume(len(line.ijk))
    radius = {tuple(v): r for v, r in zip(line.ijk.tolist(), line.radius_mm.tolist(), strict=True)}
    skeleton = line.mask(torch.ones(len(line.ijk), dtype=torch.bool)).numpy()
    _, which = plain_nearest(skeleton, SPACING)

    found = caliber_mm(torch.from_numpy(mask), SPACING)

    for v, nearest in which.items():
        assert min(abs(float(found[v]) - radius[n]) for n in nearest) < 1e-5


def test_without_a_centerline_the_caliber_is_the_largest_depth():
    """Thinning leaves nothing of a straight piece of two by two voxels."""
    mask = torch.zeros(8, 8, 12, dtype=torch.bool)
    mask[3:5, 3:5, 2:10] = True
    assert not len(centerline(mask, SPACING).ijk)

    assert caliber_mm(mask, SPACING).unique().tolist() == [0.5]
    assert MiddleShare().measure(attribution_of(torch.ones(mask.shape), mask, SPACING)) is None


@settings(max_examples=15)
@given(values=coarse_maps, mask=masks, share=st.floats(0.01, 1.0))
def test_the_numbers_are_those_of_a_plain_rewriting(values, mask, share):
    """Voxel by voxel, in lists."""
    assume(values.any())
    attribution = attribution_of(values, mask, SPACING)
    mass, wall = np.abs(values.astype(float)), wall_distance_mm(torch.from_numpy(mask), SPACING)
    pairs = [(float(wall[v]), mass[v]) for v in np.ndindex(*SHAPE)]

    for metric in BANDS:
        low = -math.inf if metric.above is None else metric.above
        high = math.inf if metric.below is None else metric.below
        expected = sum(m for w, m in pairs if low < w <= high) / mass.sum()
        assert metric.measure(attribution) == pytest.approx(expected, abs=1e-12)

    reached, expected = 0.0, 0.0
    for way, m in sorted((max(w, 0.0), m) for w, m in pairs):
        expected = way
        reached += m
        if reached >= share * mass.sum() - 1e-9:
            break
    found = ReachQuantile(share, "label").measure(attribution)
    assert found == pytest.approx(expected, abs=1e-6)


@settings(max_examples=15)
@given(values=coarse_maps, mask=masks)
def test_inside_of_vessels_the_numbers_are_those_of_a_plain_rewriting(values, mask):
    """By caliber and by depth."""
    attribution = attribution_of(values, mask, SPACING)
    line = centerline(torch.from_numpy(mask), SPACING)
    mass = np.abs(values.astype(float))
    assume(mass[mask].any() and len(line.ijk))
    caliber = caliber_mm(torch.from_numpy(mask), SPACING).numpy()
    inside = [tuple(v) for v in np.argwhere(mask)]

    for metric in CALIBERS:
        low = -math.inf if metric.above is None else metric.above
        high = math.inf if metric.below is None else metric.below
        expected = sum(mass[v] for v in inside if low < caliber[v] <= high) / mass[mask].sum()
        assert metric.measure(attribution) == pytest.approx(expected, abs=1e-12)

    skeleton = line.mask(torch.ones(len(line.ijk), dtype=torch.bool)).numpy()
    to_line, to_wall = plain_nearest(skeleton, SPACING)[0], plain_nearest(~mask, SPACING)[0]
    expected = sum(mass[v] * to_wall[v] / (to_wall[v] + to_line[v]) for v in inside)
    found = MiddleShare().measure(attribution)
    assert found == pytest.approx(expected / mass[mask].sum(), abs=1e-6)


@settings(max_examples=15)
@given(values=coarse_maps, mask=masks)
def test_bands_without_gaps_hold_everything(values, mask):
    """Shares over all distances, and over all calibers, sum to one."""
    assume(values[mask].any())
    attribution = attribution_of(values, mask, SPACING)

    assert sum(m.measure(attribution) for m in BANDS) == pytest.approx(1.0, abs=1e-12)
    assert sum(m.measure(attribution) for m in CALIBERS) == pytest.approx(1.0, abs=1e-12)


def test_one_voxel_is_in_its_band_alone():
    """Two voxels of half a millimeter beyond the wall's last voxel are one millimeter away."""
    label = torch.zeros(SHAPE, dtype=torch.int64)
    label[0, 3, 3] = 1
    values = torch.zeros(SHAPE)
    values[2, 3, 3] = -5.0
    attribution = attribution_of(values, label, SPACING)

    assert [m.measure(attribution) for m in BANDS] == [0.0, 1.0, 0.0, 0.0]
    assert ReachQuantile(0.5, "label").measure(attribution) == 1.0


def test_attribution_on_the_thin_vessel_is_thin_and_in_the_middle():
    """A vessel of one voxel is all centerline; its radius is that of one voxel."""
    label = tubes()
    thin = torch.zeros(label.shape)
    thin[2, 2, 3:-3] = 1.0
    thick = torch.zeros(label.shape)
    thick[6, 8, 8:-8] = 1.0
    shell = torch.zeros(label.shape)
    shell[4, 6:11, 8:-8] = 1.0

    by_map = [
        [m.measure(attribution_of(values, label, (0.5, 0.5, 0.5))) for m in CALIBERS]
        for values in (thin, thick, shell)
    ]
    middles = [MiddleShare().measure(attribution_of(v, label)) for v in (thin, thick, shell)]

    assert by_map == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert middles[:2] == [1.0, 1.0]
    assert 0.0 < middles[2] < 0.5


def test_a_flat_map_has_the_profile_of_the_voxels():
    """The profile of a map without a preference is the one that it is compared with."""
    attribution = attribution_of(torch.full((12, 14, 24), -2.0), tubes(), (0.5, 0.5, 0.5))

    for profile in (
        distance_profile(attribution, (-math.inf, 0.0, 1.0, 3.0, math.inf)),
        caliber_profile(attribution, (0.0, 0.75, 1.5, math.inf)),
    ):
        assert profile.share == pytest.approx(profile.flat, abs=1e-12)
        assert sum(profile.share) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=15)
@given(values=coarse_maps, mask=masks)
def test_a_profile_holds_what_the_metrics_measure(values, mask):
    """Bins of the same edges have the shares of the bands."""
    assume(values[mask].any())
    attribution = attribution_of(values, mask, SPACING)

    distances = distance_profile(attribution, (-math.inf, 0.0, 1.0, 3.0, math.inf))
    calibers = caliber_profile(attribution, (-math.inf, 0.75, 1.5, math.inf))

    assert distances.share == pytest.approx([m.measure(attribution) for m in BANDS], abs=1e-12)
    assert calibers.share == pytest.approx([m.measure(attribution) for m in CALIBERS], abs=1e-12)


@pytest.mark.parametrize("edges", [(), (1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, math.nan)])
def test_edges_that_are_none_are_refused(edges):
    """A bin needs two ends, in order."""
    with pytest.raises(ValueError, match="ascending edges"):
        distance_profile(attribution_of(torch.ones(12, 14, 24), tubes()), edges)


@named
def test_without_vessels_there_is_no_number(metric):
    """No label, an empty one; and no wall where all is vessel."""
    values = torch.rand(SHAPE)

    assert metric.measure(attribution_of(values)) is None
    assert metric.measure(attribution_of(values, torch.zeros(SHAPE))) is None
    if isinstance(metric, (MassAtDistance, MiddleShare)):
        assert metric.measure(attribution_of(values, torch.ones(SHAPE))) is None


@pytest.mark.parametrize("metric", [*CALIBERS, MiddleShare()], ids=str)
def test_without_attribution_inside_there_is_no_share_of_it(metric):
    """A share of nothing is no number."""
    label = torch.zeros(SHAPE)
    label[2, 2, 2] = 1
    values = torch.ones(SHAPE)
    values[2, 2, 2] = 0.0

    assert metric.measure(attribution_of(values, label)) is None


@named
def test_a_label_of_one_voxel_or_of_two_pieces_is_measured(metric):
    """Small and disconnected vessels have numbers in range."""
    for places in ([(2, 3, 3)], [(0, 0, 0), (4, 5, 6)]):
        label = torch.zeros(SHAPE)
        for place in places:
            label[place] = 1
        found = metric.measure(attribution_of(torch.rand(SHAPE), label, SPACING))
        assert metric.range[0] <= found <= metric.range[1]


@named
@settings(max_examples=15)
@given(values=coarse_maps, scale=st.sampled_from([-1.0, 1e-3, 0.37, 1e4]))
def test_scale_sign_and_flips_change_nothing(metric, values, scale):
    """The number is of |a| alone, and the volume may be held the other way around."""
    label = np.zeros(SHAPE, dtype=np.int64)
    label[1:4, 2, 1:6] = 1
    assume(values[label > 0].any())
    found = metric.measure(attribution_of(values, label, SPACING))

    assert metric.range[0] <= found <= metric.range[1]
    assert metric.measure(attribution_of(values * scale, label, SPACING)) == pytest.approx(found)
    for axes in itertools.combinations(range(3), 2):
        flipped = attribution_of(np.flip(values, axes).copy(), np.flip(label, axes).copy(), SPACING)
        assert metric.measure(flipped) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(share):
    """A share of the attribution lies above 0 and is at most 1."""
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        ReachQuantile(share)


@pytest.mark.parametrize("kind", [MassAtDistance, MassAtCaliber])
@pytest.mark.parametrize("band", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_a_band_that_is_none_is_refused(kind, band):
    """A band has its edges in order."""
    with pytest.raises(ValueError, match="above < below"):
        kind(*band)


@named
def test_a_metric_carries_its_reading(metric):
    """Unit, range and reading help are there."""
    assert metric.unit
    assert metric.range[0] < metric.range[1]
    assert metric.reading.endswith(".")
