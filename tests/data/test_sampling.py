from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lightning_segxai.data import sampling
from lightning_segxai.data.sampling import (
    BalancedSampling,
    CaliberSampling,
    UniformSampling,
    WeightedSampling,
    start_around,
)
from lightning_segxai.data.volumes import Volume
from lightning_segxai.vessels import centerline

SHAPE = (12, 10, 8)
SIZE = (4, 4, 4)


def volume_of(strategy, label=None, shape=SHAPE, spacing=(1.0, 1.0, 1.0), **maps):
    """A volume with the index that a strategy makes of it."""
    if label is not None:
        maps["label"], shape = label, tuple(label.shape)
    affine = np.diag([*spacing, 1.0])
    bare = Volume("a", torch.zeros(shape), maps, affine, 0.0)
    return Volume("a", bare.image, maps, affine, 0.0, strategy.index(bare))


def dots(*voxels, shape=SHAPE):
    label = torch.zeros(shape, dtype=torch.uint8)
    for voxel in voxels:
        label[voxel] = 1
    return label


def starts(strategy, volume, count, size=SIZE, first=0):
    numbers = np.random.default_rng(0)
    return [strategy.start(volume, size, first + n, numbers) for n in range(count)]


@given(
    center=st.tuples(*[st.integers(0, 7)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
)
def test_start_around_is_the_nearest_place_inside(center, size):
    """The patch is moved inside as little as can be, and lies around a volume that is shorter."""
    shape = (8, 8, 8)
    for c, a, s in zip(center, start_around(center, size, shape), size, strict=True):
        if s <= 8:
            allowed = range(8 - s + 1)
            assert a == min(allowed, key=lambda b: abs(b - (c - s // 2)))
        else:
            assert -a >= 0
            assert a + s >= 8
            assert abs(-a - (a + s - 8)) <= 1


@pytest.mark.parametrize(
    "size", [(12, 7, 4), (8, 7, 6)], ids=["larger along one axis", "the whole volume"]
)
def test_start_around_small_volumes(size):
    """A volume smaller than the patch lies in its middle; as large, they are one."""
    start = start_around((4, 3, 3), size, (8, 7, 6))
    assert start == ((-2, 0, 1) if size[0] == 12 else (0, 0, 0))


class Fixed(np.random.Generator):
    """A generator of one whole number and one from [0, 1)."""

    def __init__(self, whole=0, random=0.0):
        super().__init__(np.random.PCG64(0))
        self.numbers = whole, random

    def integers(self, *_):
        return self.numbers[0]

    def random(self):
        return self.numbers[1]


@pytest.mark.parametrize("strategy", [BalancedSampling, CaliberSampling])
@pytest.mark.parametrize("share", [0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1])
def test_the_share_holds_in_every_run(strategy, share):
    """Of any m patches in a row, the share of m are around a vessel, rounded up or down."""
    chosen = strategy(foreground=share)
    volume = volume_of(chosen, dots((6, 5, 4)))
    around = start_around((6, 5, 4), SIZE, SHAPE)

    corner = Fixed(whole=0)
    hits = [chosen.start(volume, SIZE, n, corner) == around for n in range(400)]

    total = np.cumsum([0, *hits])
    for length in (1, 2, 3, 4, 7, 10, 12, 60):
        found = total[length:] - total[:-length]
        exact = length * share
        assert found.min() >= np.floor(exact + 1e-9)
        assert found.max() <= np.ceil(exact - 1e-9)


def test_balanced_centers_are_vessel_voxels():
    """The middle of a patch is a vessel voxel, unless the border moved the patch; all are drawn."""
    label = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.97).byte()
    strategy = BalancedSampling(foreground=1)
    found = set(starts(strategy, volume_of(strategy, label), 1000))

    vessels = [tuple(v) for v in label.nonzero().tolist()]
    assert found == {start_around(v, SIZE, SHAPE) for v in vessels}


def test_uniform_covers_every_place_alike():
    """Every start inside the volume is as likely as any other."""
    strategy = UniformSampling()
    shape, size = (6, 5, 7), (4, 4, 4)
    count = Counter(starts(strategy, volume_of(strategy, shape=shape), 4800, size))

    places = list(product(range(3), range(2), range(4)))
    assert set(count) == set(places)
    assert chisquare([count[p] for p in places]).pvalue > 1e-3


@pytest.mark.parametrize("share", [0, 0.5])
def test_the_rest_lies_anywhere(share):
    """Patches that are not around a vessel cover the volume uniformly, as without vessels."""
    strategy = BalancedSampling(foreground=share)
    shape, size = (6, 5, 7), (4, 4, 4)
    volume = volume_of(strategy, dots((3, 3, 3), shape=shape))
    rest = [strategy.start(volume, size, 1, np.random.default_rng(n)) for n in range(2400)]
    count = Counter(rest)
    assert len(count) == 24
    assert chisquare(list(count.values())).pvalue > 1e-3


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_weights_are_frequencies(kind):
    """Voxels are drawn in proportion to their weights, and never where the weight is 0."""
    weights = torch.zeros(5, 4, 6)
    weights[0, 0, 0], weights[2, 1, 5], weights[2, 3, 0], weights[4, 3, 5] = 1, 2, 3, 6
    strategy = WeightedSampling(map="mine")
    volume = volume_of(strategy, shape=(5, 4, 6), mine=weights.to(kind))

    count = Counter(starts(strategy, volume, 6000, size=(1, 1, 1)))

    assert set(count) == {(0, 0, 0), (2, 1, 5), (2, 3, 0), (4, 3, 5)}
    voxels = sorted(count)
    expected = [6000 * float(weights[v]) / 12 for v in voxels]
    assert chisquare([count[v] for v in voxels], expected).pvalue > 1e-3


def test_dense_weights_match_the_plain_way():
    """The two steps, slice and voxel, draw what one draw over all voxels would."""
    weights = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(3))
    strategy = WeightedSampling()
    volume = volume_of(strategy, shape=(4, 4, 4), weights=weights)
    count = Counter(starts(strategy, volume, 12_000, size=(1, 1, 1)))
    shares = weights.double() / weights.double().sum()
    expected = [12_000 * float(shares[v]) for v in product(range(4), repeat=3)]
    found = [count[v] for v in product(range(4), repeat=3)]
    assert chisquare(found, expected).pvalue > 1e-3


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.3, 1.0, 1e10]), min_size=8, max_size=8),
    value=st.sampled_from([0.0, np.nextafter(1.0, 0), 0.5]),
)
def test_extreme_random_numbers_stay_among_the_weights(weights, value):
    """The smallest and the largest random number find a voxel with a weight, too."""
    if not any(weights):
        return
    tensor = torch.tensor(weights).reshape(2, 2, 2)
    strategy = WeightedSampling()
    volume = volume_of(strategy, shape=(2, 2, 2), weights=tensor)
    assert tensor[strategy.start(volume, (1, 1, 1), 0, Fixed(random=value))] > 0


def test_weights_may_be_a_mask():
    """By a mask, every voxel inside it is a middle, and none outside."""
    brain = torch.zeros(SHAPE, dtype=torch.uint8)
    brain[4:7, 4:7, 4:6] = 1
    strategy = WeightedSampling(map="brain")
    found = set(starts(strategy, volume_of(strategy, brain=brain), 400))
    assert found == {start_around(v, SIZE, SHAPE) for v in brain.nonzero().tolist()}


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({}, r'map="weights".*no such map of subject "a", which has none'),
        ({"brain": torch.ones(SHAPE)}, r"which has brain\."),
        ({"weights": torch.zeros(SHAPE)}, r"not all 0, but .* from 0 to 0"),
        ({"weights": torch.full(SHAPE, -1.0)}, r"from -1 to -1"),
        ({"weights": torch.full(SHAPE, torch.nan)}, r"from nan to nan"),
    ],
)
def test_weights_that_cannot_be_used(maps, message):
    """A missing map, negative weights and no weight at all are refused with the subject's name."""
    with pytest.raises(ValueError, match=message):
        volume_of(WeightedSampling(), **maps)


@pytest.mark.parametrize("strategy", [BalancedSampling, CaliberSampling])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_checked(strategy, share):
    """A share outside of [0, 1] is refused."""
    with pytest.raises(ValueError, match=rf"{strategy.__name__}\(foreground={share}\)"):
        strategy(foreground=share)


def test_bands_are_checked():
    """Calibers need a band."""
    with pytest.raises(ValueError, match=r"CaliberSampling\(bands=0\)"):
        CaliberSampling(bands=0)


def tubes(*radii, length=40, apart=16):
    """Straight tubes along k, side by side."""
    label = torch.zeros(apart * len(radii), apart, length, dtype=torch.uint8)
    i, j = torch.meshgrid(torch.arange(label.shape[0]), torch.arange(apart), indexing="ij")
    for n, radius in enumerate(radii):
        inside = (i - apart * n - apart // 2) ** 2 + (j - apart // 2) ** 2 <= radius**2
        label[inside] = 1
    return label


def test_thin_vessels_are_drawn_as_often_as_thick_ones():
    """A thin tube is drawn as often as a thick one with twenty times its voxels."""
    label = tubes(5, 1)
    label[24:27, :, :10] = 0  # and the thin one is shorter
    strategy = CaliberSampling(foreground=1)
    volume = volume_of(strategy, label)
    assert label[:16].sum() > 20 * label[16:].sum()

    thick = sum(i < 16 for i, _, _ in starts(strategy, volume, 1000, size=(1, 1, 1)))

    assert 440 < thick < 560  # 500 +- 16 of a fair coin
    balanced = BalancedSampling(foreground=1)
    by_voxel = starts(balanced, volume_of(balanced, label), 1000, size=(1, 1, 1))
    assert sum(i < 16 for i, _, _ in by_voxel) > 900


def plain_bands(label, spacing, bands):
    """Center line voxels by band, the slow way."""
    line = centerline(label > 0, spacing)
    radii = line.radius_mm.tolist()
    low, high = np.log(min(radii)), np.log(max(radii))
    groups = [set() for _ in range(bands)]
    for voxel, radius in zip(line.ijk.tolist(), radii, strict=True):
        width = (high - low) / bands
        band = min(int((np.log(radius) - low) / width), bands - 1) if width else 0
        groups[band].add(tuple(voxel))
    return [group for group in groups if group]


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_bands_match_the_plain_way(bands):
    """Index and draws are those of a plain loop over the center line."""
    label, spacing = tubes(1, 2, 4, 6), (0.5, 0.6, 0.7)
    strategy = CaliberSampling(foreground=1, bands=bands)
    volume = volume_of(strategy, label, spacing=spacing)
    centers, bounds = volume.index["centers"], volume.index["bounds"]
    voxels = [tuple(map(int, np.unravel_index(c, label.shape))) for c in centers]

    groups = [set(voxels[a:b]) for a, b in pairwise(bounds)]

    assert groups == plain_bands(label, spacing, bands)
    drawn = Counter(starts(strategy, volume, 1500, size=(1, 1, 1)))
    by_band = [sum(drawn[v] for v in group) for group in groups]
    assert sum(by_band) == 1500
    assert len(groups) == 1 or chisquare(by_band).pvalue > 1e-3


def test_a_label_without_centerline_is_sampled_by_its_voxels():
    """Where everything is vessel, no radius is finite, and any voxel is a middle."""
    strategy = CaliberSampling(foreground=1)
    volume = volume_of(strategy, torch.ones(3, 3, 3, dtype=torch.uint8))
    assert len(set(starts(strategy, volume, 500, size=(1, 1, 1)))) == 27


@pytest.mark.parametrize(
    "strategy", [UniformSampling(), BalancedSampling(foreground=1), CaliberSampling(foreground=1)]
)
@pytest.mark.parametrize("label", [None, torch.zeros(SHAPE, dtype=torch.uint8)])
def test_without_vessels_patches_lie_anywhere(strategy, label):
    """A volume without label, or without vessel in it, gives patches from anywhere."""
    found = starts(strategy, volume_of(strategy, label), 300)
    assert all(0 <= a <= n - s for at in found for a, s, n in zip(at, SIZE, SHAPE, strict=True))
    assert len(set(found)) > 150


@pytest.mark.parametrize(
    "strategy",
    [
        UniformSampling(),
        BalancedSampling(),
        CaliberSampling(),
        WeightedSampling(map="label"),
    ],
)
def test_volumes_smaller_than_the_patch_lie_in_its_middle(strategy):
    """Along an axis that is too short there is one place, with the volume in the middle."""
    volume = volume_of(strategy, dots((0, 0, 0), (11, 9, 7)))
    for i, j, k in starts(strategy, volume, 30, size=(4, 10, 13)):
        assert 0 <= i <= 8
        assert (j, k) == (0, -2)


@pytest.mark.parametrize(
    "strategy", [UniformSampling(), BalancedSampling(), CaliberSampling(), WeightedSampling()]
)
def test_a_place_follows_from_its_generator_alone(strategy):
    """Equal generators give equal places, and no global random number is drawn."""
    label = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.9).byte()
    volume = volume_of(strategy, label, weights=torch.ones(SHAPE))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert starts(strategy, volume, 50) == starts(strategy, volume, 50)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


@pytest.mark.parametrize("strategy", [BalancedSampling(), CaliberSampling()])
def test_very_many_vessel_voxels_are_thinned_out_evenly(strategy, monkeypatch):
    """An index keeps so many voxels at most, the same distance apart, in four bytes each."""
    monkeypatch.setattr(sampling, "_KEPT_VOXELS", 100)
    label = torch.ones(10, 10, 10, dtype=torch.uint8)  # all vessel: sampled by its voxels
    index = volume_of(strategy, label).index
    (numbers,) = (index[key] for key in index if key != "bounds")

    assert numbers.dtype == np.int32
    assert numbers.tolist() == list(range(0, 1000, 10))
    label[0, 0, 0] = 0
    balanced = volume_of(BalancedSampling(), label).index["vessels"]
    assert len(balanced) <= 100
    assert set(np.diff(balanced)) == {10}


def test_an_index_is_small():
    """What is kept beside a head of 4 MB is less than a tenth of it, whatever the strategy."""
    label = (torch.rand(100, 100, 100, generator=torch.Generator().manual_seed(0)) > 0.995).byte()
    for strategy in (UniformSampling(), BalancedSampling(), CaliberSampling(), WeightedSampling()):
        volume = volume_of(strategy, label, weights=torch.ones(100, 100, 100))
        assert sum(a.nbytes for a in volume.index.values()) < volume.image.nbytes / 10
