"""Structural similarity and the earth mover's distance: oracles, known answers, properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps import attribution_of
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity

from lightning_segxai.focus.similarity import StructuralSimilarity
from lightning_segxai.focus.transport import EarthMovers

SHAPE = (8, 9, 10)
SPACING = (0.5, 1.0, 2.0)
coarse_maps = hnp.arrays(np.int8, SHAPE, elements=st.integers(-4, 4))


def measured(metric, now, then, spacing=SPACING):
    return metric.measure(
        attribution_of(now, spacing=spacing), attribution_of(then, spacing=spacing)
    )


def random_map(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_structural_similarity_is_that_of_scikit_image(window, seed):
    """Of all cubes, on maps divided by their largest magnitude."""
    now = random_map(seed)
    then = now + random_map(seed + 10)
    a, b = (m.numpy() / np.abs(m.numpy()).max() for m in (now, then))
    span = max(a.max(), b.max()) - min(a.min(), b.min())
    expected = structural_similarity(a, b, win_size=window, data_range=span)

    found = measured(StructuralSimilarity(window, 1), now, then)

    assert found == pytest.approx(expected, abs=1e-10)


def test_structural_similarity_by_stride_is_the_mean_of_fewer_cubes():
    """Cubes begin every stride voxels: here at 0 and 4, two along each axis."""
    now, then = random_map(1, (9, 9, 9)), random_map(2, (9, 9, 9))
    now[0, 0, 0] = then[0, 0, 0] = 9.0  # the largest of both, in the first cube

    a, b = now / 9.0, then / 9.0
    span = float(max(a.max(), b.max()) - min(a.min(), b.min()))
    expected = [
        structural_similarity(
            a[i : i + 5, j : j + 5, k : k + 5].numpy(),
            b[i : i + 5, j : j + 5, k : k + 5].numpy(),
            win_size=5,
            data_range=span,
        )
        for i in (0, 4)
        for j in (0, 4)
        for k in (0, 4)
    ]
    found = measured(StructuralSimilarity(5, 4), now, then)

    assert found == pytest.approx(np.mean(expected), abs=1e-10)


def test_structural_similarity_of_thin_and_flat_volumes():
    """A slice has windows of a slice; two flat maps are alike; one voxel has no structure."""
    thin = random_map(0, (1, 9, 9))

    assert measured(StructuralSimilarity(), thin, thin) == 1.0
    assert measured(StructuralSimilarity(), torch.ones(SHAPE), torch.full(SHAPE, 3.0)) == 1.0
    assert measured(StructuralSimilarity(), torch.ones(1, 1, 1), torch.ones(1, 1, 1)) is None


@settings(max_examples=10)
@given(now=coarse_maps, then=coarse_maps, scale=st.sampled_from([1e-3, 0.37, 1e4]))
def test_structural_similarity_is_symmetric_and_without_scale(now, then, scale):
    """Now and then may change places, be scaled, and be flipped together."""
    assume(now.any() and then.any())
    metric = StructuralSimilarity(5, 1)
    found = measured(metric, now, then)
    flipped = [m[::-1, :, ::-1].copy() for m in (now, then)]

    assert -1.0 <= found <= 1.0
    assert measured(metric, now, now * scale) == pytest.approx(1.0)
    assert measured(metric, then, now) == pytest.approx(found, abs=1e-9)
    assert measured(metric, now * scale, then) == pytest.approx(found, abs=1e-9)
    assert measured(metric, *flipped) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("given_", [(1, 4), (7, 0), (0, 1)])
def test_a_window_that_is_none_is_refused(given_):
    """A window holds voxels, and a stride goes on."""
    with pytest.raises(ValueError, match="at least 2 voxels"):
        StructuralSimilarity(*given_)


def one_voxel(at):
    values = torch.zeros(SHAPE)
    values[at] = -3.0
    return values


def test_a_voxel_is_carried_in_millimeters():
    """With cells of a voxel, one voxel's way is the distance of two voxels."""
    now, then = one_voxel((1, 2, 3)), one_voxel((7, 5, 8))
    fine = EarthMovers(cells=40)  # 20 mm along k: cells of 0.5 mm, so each voxel has its own

    found = measured(fine, now, then)

    assert found == pytest.approx(math.hypot(6 * 0.5, 3 * 1.0, 5 * 2.0), rel=1e-9)


@settings(max_examples=20)
@given(
    now=hnp.arrays(np.int8, (1, 1, 9), elements=st.integers(-4, 4)),
    then=hnp.arrays(np.int8, (1, 1, 9), elements=st.integers(-4, 4)),
)
def test_in_a_line_it_is_scipys_wasserstein_distance(now, then):
    """In one dimension there is a closed form."""
    assume(now.any() and then.any())
    at = np.arange(9) * SPACING[2]
    weights = [np.abs(m.astype(float)).ravel() for m in (now, then)]

    expected = wasserstein_distance(at, at, *weights)
    assert measured(EarthMovers(cells=9), now, then) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=10)
@given(now=coarse_maps, then=coarse_maps)
def test_in_space_it_is_the_whole_linear_program(now, then):
    """Every cell to every cell, nothing left out beforehand."""
    assume(now.any() and then.any())
    metric = EarthMovers(cells=4)
    # 4, 9 and 20 mm: one cell, two cells of 4 and 5 voxels, four of 2, 3, 2 and 3
    starts = ([0], [0, 4], [0, 2, 5, 7])
    middles = ([3.5], [1.5, 6.0], [0.5, 3.0, 5.5, 8.0])
    shares = []
    for values in (now, then):
        mass = np.abs(values.astype(float))
        for axis, at in enumerate(starts):
            mass = np.add.reduceat(mass, at, axis=axis)
        shares.append(mass.ravel() / mass.sum())
    places = [
        np.array(v) * SPACING
        for v in ((i, j, k) for i in middles[0] for j in middles[1] for k in middles[2])
    ]
    n = len(places)
    ways = np.array([[np.linalg.norm(u - v) for v in places] for u in places])
    plans = np.zeros((2 * n, n * n))
    for u in range(n):
        plans[u, u * n : (u + 1) * n] = 1
        plans[n + u, u::n] = 1
    expected = linprog(ways.ravel(), A_eq=plans[:-1], b_eq=np.concatenate(shares)[:-1]).fun

    assert measured(metric, now, then) == pytest.approx(expected, abs=1e-8)


@settings(max_examples=10)
@given(now=coarse_maps, then=coarse_maps, scale=st.sampled_from([-1.0, 1e-3, 0.37, 1e4]))
def test_the_earth_movers_distance_is_a_distance(now, then, scale):
    """Zero to itself at any scale, symmetric, and at most the diagonal."""
    assume(now.any() and then.any())
    found = measured(EarthMovers(), now, then)

    assert measured(EarthMovers(), now, now * scale) == pytest.approx(0.0, abs=1e-9)
    assert measured(EarthMovers(), then, now) == pytest.approx(found, abs=1e-8)
    assert 0.0 <= found <= math.hypot(*(n * s for n, s in zip(SHAPE, SPACING, strict=True)))


@pytest.mark.parametrize("cells", [1, 0, -3])
def test_a_grid_that_is_none_is_refused(cells):
    """Nothing moves within a single cell."""
    with pytest.raises(ValueError, match="at least 2 cells"):
        EarthMovers(cells)
