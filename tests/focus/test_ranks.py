"""What orders of voxels have in common: oracles and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps import attribution_of
from scipy.stats import rankdata, spearmanr

from lightning_segxai.focus.ranks import agreement, ranks, similarity

SHAPE = (3, 4, 5)
coarse_maps = hnp.arrays(np.int8, SHAPE, elements=st.integers(-4, 4))


def varied(mask):
    return np.abs(mask).min() < np.abs(mask).max()


@given(values=coarse_maps)
def test_ranks_are_scipys_about_their_mean(values):
    """Tied voxels share their mean rank."""
    expected = rankdata(values.ravel()) - (values.size + 1) / 2

    np.testing.assert_allclose(ranks(torch.from_numpy(values).double()), expected)


@pytest.mark.parametrize("width", [32, 64])
@given(data=st.data())
def test_ranks_of_any_floats_are_scipys(width, data):
    """Negative zero, subnormal and huge numbers too; each type is sorted in a way of its own."""
    numbers = st.floats(width=width, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    values = data.draw(hnp.arrays(np.dtype(f"f{width // 8}"), SHAPE, elements=numbers))
    expected = rankdata(values.ravel()) - (values.size + 1) / 2

    np.testing.assert_array_equal(ranks(torch.from_numpy(values)), expected)


@given(now=coarse_maps.filter(varied), then=coarse_maps.filter(varied))
def test_similarity_is_scipys_of_magnitudes(now, then):
    """The sign of a map does not count."""
    expected = spearmanr(np.abs(now).ravel(), np.abs(then).ravel()).statistic

    assert similarity(attribution_of(now), attribution_of(then)) == pytest.approx(expected)


@given(maps=st.lists(coarse_maps.filter(varied), min_size=2, max_size=4))
def test_agreement_is_the_mean_with_the_others(maps):
    """Pair by pair, with SciPy."""
    flat = [np.abs(m).ravel() for m in maps]
    expected = [
        np.mean([spearmanr(a, b).statistic for m, b in enumerate(flat) if m != n])
        for n, a in enumerate(flat)
    ]

    assert agreement([attribution_of(m) for m in maps]) == pytest.approx(expected)


def test_agreement_with_nobody_is_none():
    """A single map, a flat one, and one beside flat ones only."""
    varied_map, flat = torch.rand(SHAPE), torch.ones(SHAPE)

    assert agreement([attribution_of(varied_map)]) == [None]
    assert agreement([attribution_of(varied_map), attribution_of(flat)]) == [None, None]
    assert agreement([]) == []
