"""Where the attribution lies: known answers, oracles and properties; and Dice."""

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
from sklearn.metrics import average_precision_score

from lightning_segxai.focus.location import (
    AveragePrecision,
    MassInside,
    PointingHit,
    RankInside,
    Reach,
    topmost,
)
from lightning_segxai.focus.overlap import dice

SHAPE = (4, 5, 6)
SHARES = [MassInside(), RankInside(), PointingHit(), AveragePrecision()]
EVERY = [*SHARES, Reach("label")]
named = pytest.mark.parametrize("metric", EVERY, ids=lambda m: type(m).__name__)
shares = pytest.mark.parametrize("metric", SHARES, ids=lambda m: type(m).__name__)

# Few distinct values, so that ties are the rule.
coarse_maps = hnp.arrays(np.int8, SHAPE, elements=st.integers(-4, 4))
masks = hnp.arrays(np.bool_, SHAPE)


def one_voxel(at, shape=SHAPE):
    values = torch.zeros(shape, dtype=torch.float64)
    values[at] = -2.0
    return values


def box(shape=SHAPE):
    label = torch.zeros(shape, dtype=torch.int64)
    label[1:3, 1:4, 2:5] = 1
    label[2, 2, 2] = 2
    return label


@shares
def test_a_map_on_the_label_has_all_of_it(metric):
    """Attribution on the label, and nowhere else, is wholly located, whatever its sign."""
    values = torch.where(box() > 0, -0.5, 0.0).double()

    assert metric.measure(attribution_of(values, box())) == pytest.approx(1.0, abs=1e-12)


@shares
def test_a_flat_map_has_the_share_of_the_label(metric):
    """A map without a preference finds the label as often as chance does."""
    flat = torch.full(SHAPE, -3.0, dtype=torch.float64)

    assert metric.measure(attribution_of(flat, box())) == pytest.approx(18 / 120, abs=1e-12)


@pytest.mark.parametrize(
    ("at", "mass", "rank", "hit", "precision", "reach"),
    [
        # Inside: of 18 chosen voxels one is the peak, and 17 are drawn from 119 zeros, 17 inside.
        ((1, 1, 2), 1.0, (1 + 17 * 17 / 119) / 18, 1.0, (1 + 17 * 18 / 120) / 18, 0.0),
        # Outside, two voxels along i and one along k away.
        ((0, 1, 0), 0.0, (17 * 18 / 119) / 18, 0.0, 18 / 120, math.hypot(0.5, 2 * 2.0)),
    ],
)
def test_one_voxel_has_answers_worked_out_by_hand(at, mass, rank, hit, precision, reach):
    """A single voxel inside or outside gives the numbers of paper and pencil."""
    attribution = attribution_of(one_voxel(at), box(), spacing=(0.5, 1.0, 2.0))

    found = [metric.measure(attribution) for metric in EVERY]

    assert found == pytest.approx([mass, rank, hit, precision, reach], abs=1e-7)


def test_mass_inside_counts_both_signs():
    """Evidence against weighs as much as evidence for."""
    values = torch.tensor([[[1.0, -3.0, 0.0, 4.0]]])
    label = torch.tensor([[[1, 1, 0, 0]]])

    assert MassInside().measure(attribution_of(values, label)) == 0.5


def test_rank_inside_is_the_share_of_the_strongest():
    """Of the two strongest voxels, one lies in the region of two."""
    values = torch.tensor([[[5.0, 1.0, -4.0, 0.0]]])
    label = torch.tensor([[[1, 1, 0, 0]]])

    assert RankInside().measure(attribution_of(values, label)) == 0.5


def test_reach_is_in_millimeters_along_each_axis():
    """A voxel two steps away along k counts two of k's edge lengths."""
    values, region = torch.zeros(3, 3, 4), torch.zeros(3, 3, 4, dtype=torch.bool)
    region[0, 0, 0] = True
    values[0, 0, 2], values[1, 0, 0], values[0, 0, 0] = 1.0, -1.0, 2.0

    reach = Reach().measure(attribution_of(values, region=region, spacing=(0.25, 1.0, 0.5)))

    assert reach == pytest.approx((1.0 + 0.25) / 4, abs=1e-7)


def test_the_region_can_be_label_target_prediction_or_named():
    """Each name of a region reads its own mask."""
    values = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    third = torch.tensor([[[False, False, True, False]]])
    attribution = attribution_of(
        values,
        label=torch.tensor([[[2, 0, 0, 0]]]),
        region=torch.tensor([[[False, True, False, False]]]),
        regions={"brain": third},
    )
    attribution.prediction[0, 0, 3] = 1

    found = [MassInside(r).measure(attribution) for r in ("label", "target", "brain", "predicted")]

    assert found == [1 / 15, 2 / 15, 4 / 15, 8 / 15]


@named
def test_a_missing_or_empty_region_gives_no_number(metric):
    """Without the region there is nothing to measure, and no number is invented."""
    values = torch.ones(SHAPE)
    empty = torch.zeros(SHAPE, dtype=torch.int64)

    assert metric.measure(attribution_of(values)) is None
    assert metric.measure(attribution_of(values, empty)) is None
    for region in ("brain", "target", "predicted"):
        attribution = attribution_of(values, box(), region=empty > 0)
        assert type(metric)(region).measure(attribution) is None


@settings(max_examples=25, deadline=None)
@given(values=coarse_maps, mask=masks)
def test_average_precision_is_sklearns(values, mask):
    """Ties included, the number is that of scikit-learn."""
    assume(values.any() and mask.any())

    found = AveragePrecision().measure(attribution_of(values, mask))

    expected = average_precision_score(mask.ravel(), np.abs(values).ravel().astype(float))
    assert found == pytest.approx(expected, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(values=hnp.arrays(np.int8, (1, 2, 3), elements=st.integers(-2, 2)), data=st.data())
def test_tied_voxels_share_the_last_places_as_by_lot(values, data):
    """Membership among the strongest is the mean over all orders of storage."""
    count = data.draw(st.integers(1, values.size))
    flat = np.abs(values).astype(float).ravel()
    expected, orders = np.zeros(flat.size), list(itertools.permutations(range(flat.size)))
    for order in orders:
        ranked = sorted(order, key=lambda v: -flat[v])  # stable: ties stay in this order
        expected[ranked[:count]] += 1 / len(orders)

    found = topmost(attribution_of(values), count, torch.ones(values.shape, dtype=torch.bool))

    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_without_ties_the_ranks_are_quantus(seed):
    """Plain rewritings of Quantus' mass, rank and pointing metrics agree on maps without ties."""
    rng = np.random.default_rng(seed)
    values, mask = rng.standard_normal(SHAPE), rng.random(SHAPE) < 0.2
    mask[0, 0, 0] = True
    a, s = np.abs(values).ravel(), mask.ravel()
    ranked = sorted(range(a.size), key=lambda v: -a[v])
    hits = sum(bool(s[v]) for v in ranked[: int(s.sum())])

    found = [metric.measure(attribution_of(values, mask)) for metric in SHARES[:3]]

    mass = sum(a[v] for v in range(a.size) if s[v]) / sum(a)
    assert found == pytest.approx([mass, hits / s.sum(), float(s[ranked[0]])], abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(values=coarse_maps, mask=masks)
def test_reach_is_the_mean_over_plain_distances(values, mask):
    """A search voxel by voxel gives the same mean distance."""
    assume(values.any() and mask.any())
    spacing = (0.5, 1.0, 1.5)
    inside = np.argwhere(mask) * spacing
    total = sum(
        abs(int(a)) * min(math.dist(np.array(v) * spacing, w) for w in inside)
        for v, a in np.ndenumerate(values)
        if a
    )

    found = Reach("label").measure(attribution_of(values, mask, spacing=spacing))

    assert found == pytest.approx(total / np.abs(values.astype(int)).sum(), rel=1e-6, abs=1e-7)


@named
@settings(max_examples=25, deadline=None)
@given(values=coarse_maps, mask=masks, scale=st.sampled_from([1e-3, 0.37, 2.0, 1e4]))
def test_scale_sign_and_flips_change_nothing(metric, values, mask, scale):
    """The number is of the map's shape, not of its scale, sign or side; and it stays in range."""
    assume(values.any() and mask.any())
    found = metric.measure(attribution_of(values, mask))
    flipped = attribution_of(values[::-1, :, ::-1].copy(), mask[::-1, :, ::-1].copy())

    assert metric.range[0] <= found <= metric.range[1]
    assert metric.measure(attribution_of(values * -scale, mask)) == pytest.approx(found, abs=1e-9)
    assert metric.measure(flipped) == pytest.approx(found, abs=1e-9)


@named
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_widened_first(metric, dtype):
    """The type that a map is stored in does not matter beyond its own rounding."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)

    found = metric.measure(attribution_of(values, box()))

    assert found == metric.measure(attribution_of(values.double(), box()))


@named
def test_a_metric_carries_its_reading(metric):
    """Unit, range, direction and reading help are there, and settings compare by value."""
    low, high = metric.range

    assert metric.unit
    assert low < high
    assert metric.reading.endswith(".")
    assert len(metric.reading) > 20
    assert metric.higher_is_better in (True, False, None)
    assert metric == type(metric)("label")


def test_dice_of_known_overlaps():
    """Equal, disjoint, half and absent foregrounds have the Dice of the definition."""
    label = torch.tensor([[[0, 1, 1, 0]]])

    assert dice(label, label) == 1.0
    assert dice(1 - label, label) == 0.0
    assert dice(torch.tensor([[[0, 1, 0, 0]]]), label) == pytest.approx(2 / 3, abs=1e-12)
    assert dice(torch.zeros_like(label), label) == 0.0
    assert dice(torch.zeros_like(label), torch.zeros_like(label)) == 1.0


@settings(max_examples=25, deadline=None)
@given(
    found=hnp.arrays(np.int64, (2, 3, 4), elements=st.integers(0, 4)),
    true=hnp.arrays(np.int64, (2, 3, 4), elements=st.sampled_from([0, 1, 3])),
)
def test_dice_is_the_mean_over_present_classes(found, true):
    """Classes in neither volume do not count; the others count once each, in either order."""
    each = [
        2 * ((found == c) & (true == c)).sum() / ((found == c).sum() + (true == c).sum())
        for c in range(1, 5)
        if c in found or c in true
    ]

    value = dice(torch.from_numpy(found), torch.from_numpy(true))

    assert value == pytest.approx(np.mean(each) if each else 1.0, abs=1e-12)
    assert value == dice(torch.from_numpy(true), torch.from_numpy(found))
