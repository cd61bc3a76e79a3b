"""How widely the attribution is spread: known answers, plain rewritings and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps import attribution_of

from lightning_segxai.focus.spread import EffectiveVolume, Entropy, Gini

SHAPE = (4, 5, 6)
EVERY = [Gini(), Entropy(), EffectiveVolume()]
named = pytest.mark.parametrize("metric", EVERY, ids=lambda m: type(m).__name__)
coarse_maps = hnp.arrays(np.int8, SHAPE, elements=st.integers(-4, 4))


def measured(values, spacing=(0.5, 1.0, 3.0)):
    attribution = attribution_of(values, spacing=spacing)
    return [metric.measure(attribution) for metric in EVERY]


def test_a_flat_map_is_spread_over_everything():
    """A flat map has no inequality, the largest entropy, and the volume of the whole."""
    found = measured(torch.full(SHAPE, -0.1, dtype=torch.float64))

    assert found == pytest.approx([0.0, math.log(120), 120 * 1.5], abs=1e-10)


def test_a_single_voxel_is_not_spread_at_all():
    """One voxel has the largest inequality, no entropy, and its own volume."""
    values = torch.zeros(SHAPE)
    values[1, 2, 3] = -7.0

    assert measured(values) == pytest.approx([1 - 1 / 120, 0.0, 1.5], abs=1e-12)


def test_a_map_flat_on_a_region_has_the_volume_of_the_region():
    """Eight equal voxels have entropy ln 8 and eight voxels' volume."""
    values = torch.zeros(SHAPE)
    values[:2, :2, :2] = 4.0

    assert measured(values) == pytest.approx([1 - 8 / 120, math.log(8), 8 * 1.5], abs=1e-10)


def test_gini_of_four_numbers_by_hand():
    """For |a| = 1, 2, 3, 4 it is (-3 - 2 + 3 + 12) / (4 * 10)."""
    assert Gini().measure(attribution_of(torch.tensor([[[4.0, -1.0, 3.0, -2.0]]]))) == 0.25


@settings(max_examples=25, deadline=None)
@given(values=coarse_maps)
def test_gini_is_half_the_mean_difference_of_all_pairs(values):
    """It is the mean absolute difference of two voxels over twice their mean."""
    assume(values.any())
    a = np.abs(values.astype(float)).ravel()
    expected = np.abs(a[:, None] - a[None, :]).mean() / (2 * a.mean())

    assert Gini().measure(attribution_of(values)) == pytest.approx(expected, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_plain_rewritings_of_quantus_agree(seed):
    """Quantus' Sparseness and Complexity, written with loops, agree up to their 1e-7 and 1e-12."""
    values = np.random.default_rng(seed).standard_normal(SHAPE)
    a = sorted(abs(float(v)) + 1e-7 for v in values.ravel())
    n = len(a)
    sparseness = sum((2 * i - n - 1) * v for i, v in enumerate(a, start=1)) / (n * sum(a))
    complexity = -sum(v / sum(a) * math.log(v / sum(a) + 1e-12) for v in a)

    gini, entropy, _ = measured(values)

    assert gini == pytest.approx(sparseness, abs=1e-6)
    assert entropy == pytest.approx(complexity, abs=1e-6)


@named
@settings(max_examples=25, deadline=None)
@given(values=coarse_maps, scale=st.sampled_from([1e-3, 0.37, 2.0, 1e4]), seed=st.integers(0, 99))
def test_scale_sign_and_places_change_nothing(metric, values, scale, seed):
    """Only the sizes of the values relative to each other count; and the number stays in range."""
    assume(values.any())
    found = metric.measure(attribution_of(values))
    moved = np.random.default_rng(seed).permutation(values.ravel()).reshape(SHAPE)

    assert metric.range[0] <= found <= metric.range[1]
    assert metric.measure(attribution_of(moved * -scale)) == pytest.approx(found, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(values=coarse_maps)
def test_the_bounds_are_those_of_one_voxel_and_a_flat_map(values):
    """No map is less spread than one voxel or more than a flat one."""
    assume(values.any())
    gini, entropy, volume = measured(values)

    assert 0.0 <= gini <= 1 - 1 / 120 + 1e-12
    assert 0.0 <= entropy <= math.log(120) + 1e-12
    assert 1.5 - 1e-9 <= volume <= 120 * 1.5 + 1e-9


@named
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_widened_before_summing(metric, dtype):
    """The type that a map is stored in does not matter beyond its own rounding."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)

    found = metric.measure(attribution_of(values))

    assert found == metric.measure(attribution_of(values.double()))


@named
def test_a_spread_metric_carries_its_reading(metric):
    """Unit, range and reading help are there, and equal settings are equal."""
    assert metric.unit
    assert metric.range[0] < metric.range[1]
    assert metric.reading.endswith(".")
    assert metric == type(metric)()
