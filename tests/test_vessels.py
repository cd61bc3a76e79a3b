"""Distances to a region, and what is kept of them."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_segxai import vessels
from lightning_segxai.vessels import distance_mm


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(vessels, "_kept", type(vessels._kept)())


def one_voxel(shape=(5, 4, 3), at=(1, 2, 0)):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[at] = True
    return mask


def test_distances_to_one_voxel_are_those_of_pythagoras():
    """The distance to a single voxel is the length of the spaced difference."""
    spacing = (0.5, 2.0, 3.0)

    distance = distance_mm(one_voxel(), spacing)

    for i, j, k in product(range(5), range(4), range(3)):
        expected = math.dist((0.5 * i, 2.0 * j, 3.0 * k), (0.5, 4.0, 0.0))
        assert distance[i, j, k].item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.6))
def test_distance_is_the_minimum_over_the_mask(seed, share):
    """A plain search over all voxels of the mask finds the same distances."""
    spacing = (0.3, 1.0, 0.7)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 5, 6, generator=generator) < share
    mask[0, 0, 0] = True
    steps = torch.tensor(spacing, dtype=torch.float64)
    places = torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).double() * steps

    distance = distance_mm(mask, spacing)

    expected = torch.cdist(places, mask.nonzero().double() * steps).amin(dim=1).view(mask.shape)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=1e-6)
    assert bool((distance[mask] == 0).all())


def test_an_empty_mask_is_refused():
    """From no voxel there is no distance, and the message says so."""
    with pytest.raises(ValueError, match="at least one voxel"):
        distance_mm(torch.zeros(2, 2, 2, dtype=torch.bool), (1.0, 1.0, 1.0))


def test_a_distance_is_made_once_for_equal_content(monkeypatch):
    """An equal mask held by another tensor costs no second transform, another spacing does."""
    calls = []
    transform = vessels.distance_transform_edt
    monkeypatch.setattr(
        vessels, "distance_transform_edt", lambda *a, **k: calls.append(1) or transform(*a, **k)
    )

    distance_mm(one_voxel(), (1.0, 1.0, 1.0))
    distance_mm(one_voxel(), (1.0, 1.0, 1.0))
    distance_mm(one_voxel(), (1.0, 1.0, 2.0))
    distance_mm(one_voxel(shape=(5, 3, 4), at=(1, 2, 0)), (1.0, 1.0, 1.0))

    assert len(calls) == 3


def test_writing_into_a_distance_leaves_the_next_one_alone():
    """What one caller does to the result never reaches another."""
    first = distance_mm(one_voxel(), (1.0, 1.0, 1.0))
    expected = first.clone()

    first.fill_(-1.0)

    assert torch.equal(distance_mm(one_voxel(), (1.0, 1.0, 1.0)), expected)


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(monkeypatch):
    """Beyond the bound, the distance not asked for the longest is dropped."""
    monkeypatch.setattr(vessels, "_KEPT_BYTES", 2 * 60 * 4)
    for spacing in (1.0, 2.0, 1.0, 3.0):
        distance_mm(one_voxel(), (spacing, 1.0, 1.0))

    kept = [d[0, 2, 0].item() for d in vessels._kept.values()]

    assert kept == [1.0, 3.0]


def test_transposed_masks_are_read_as_they_look():
    """A mask that is a view in another memory order has the distances of its copy."""
    view = one_voxel().permute(2, 0, 1)

    assert torch.equal(
        distance_mm(view, (1.0, 2.0, 3.0)), distance_mm(view.contiguous(), (1.0, 2.0, 3.0))
    )
