from __future__ import annotations

import pytest
import torch

from lightning_segxai.data.places import (
    bifurcation_centers,
    missed_centers,
    thinnest_centers,
    vessel_centers,
)
from lightning_segxai.data.sampling import start_around

MM = (1.0, 1.0, 1.0)


def empty(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def tube(label, at, radius, along=slice(None)):
    """A straight tube along k around (i, j)."""
    i, j = torch.meshgrid(*map(torch.arange, label.shape[:2]), indexing="ij")
    inside = (i - at[0]) ** 2 + (j - at[1]) ** 2 <= radius**2
    label[..., along][inside] = 1
    return label


def tree():
    """A trunk that forks into branches, and beside it a thin fork, far from each other."""
    label = empty(40, 40, 24)
    label[8:13, 4:21, 11:14] = 1  # a trunk, 5 by 3 voxels
    for step in range(14):
        label[11 + step : 14 + step, 19 + step : 22 + step, 11:14] = 1
        if step < 9:
            label[9 - step : 12 - step, 19 + step : 22 + step, 11:14] = 1
    return label


def test_vessel_centers_match_plain_counting():
    """The first center holds as many vessel voxels as any patch around one; others are apart."""
    label = (torch.rand(16, 14, 12, generator=torch.Generator().manual_seed(0)) > 0.97).int()
    size = (6, 5, 20)

    def held(center):
        i, j, k = start_around(center, size, label.shape)
        return int(label[i : i + 6, j : j + 5, max(k, 0) :].sum())

    centers = vessel_centers(label, size, 4)

    assert held(centers[0]) == max(held(v.tolist()) for v in label.nonzero())
    starts = [start_around(c, size, label.shape) for c in centers]
    for n, a in enumerate(starts):
        assert all(
            max(abs(x - y) / s for x, y, s in zip(a, b, size, strict=True)) >= 0.25
            for b in starts[:n]
        )


def test_vessel_centers_without_vessels():
    """An empty label gives the middle of the volume; a patch as large as the volume one place."""
    assert vessel_centers(torch.zeros(8, 6, 4), (4, 4, 4), 3) == [(4, 3, 2)]
    assert len(vessel_centers(torch.ones(8, 6, 4), (8, 6, 4), 3)) == 1


def test_the_thinnest_come_first():
    """Of three tubes the middles come in the order of their radii, in millimeters."""
    label = empty(48, 16, 31)
    for i, radius in ((8, 4), (24, 1), (40, 2)):
        tube(label, (i, 8), radius)
    assert thinnest_centers(label, MM, (8, 8, 8), 3) == [(24, 8, 15), (40, 8, 15), (8, 8, 15)]
    assert thinnest_centers(label, MM, (8, 8, 8), 1) == [(24, 8, 15)]


def test_short_pieces_are_spurs():
    """A piece of fewer than five center line voxels is no vessel to look at."""
    label = tube(empty(30, 16, 31), (22, 8), 2)
    label[4, 8, 10:13] = 1
    assert thinnest_centers(label, MM, (8, 8, 8), 5) == [(22, 8, 15)]


def test_thinnest_lie_half_a_patch_apart():
    """Of two thin tubes side by side only one is chosen, unless the patch is smaller."""
    label = empty(16, 16, 31)
    tube(label, (4, 8), 1)
    tube(label, (9, 8), 1)
    assert len(thinnest_centers(label, MM, (12, 12, 12), 5)) == 1
    assert len(thinnest_centers(label, MM, (8, 8, 8), 5)) == 2


def test_bifurcations_lie_where_vessels_fork():
    """The fork of the tree is found, once, and a straight tube has none."""
    (center,) = bifurcation_centers(tree(), MM, (16, 16, 16), 5)
    assert abs(center[0] - 11) <= 3
    assert abs(center[1] - 20) <= 4
    assert abs(center[2] - 12) <= 1
    assert bifurcation_centers(tube(empty(16, 16, 31), (8, 8), 2), MM, (8, 8, 8), 5) == []


def test_missed_pieces_come_by_size():
    """What a prediction lacks is told by size, the largest first, with a voxel of its own."""
    label = empty(48, 16, 31)
    for i, radius in ((8, 3), (24, 1), (40, 2)):
        tube(label, (i, 8), radius)
    predicted = tube(empty(48, 16, 31), (8, 8), 3)

    found = missed_centers(label, predicted, 5)

    assert found == [(int(label[32:].sum()), (40, 8, 15)), (int(label[16:32].sum()), (24, 8, 15))]
    assert missed_centers(label, predicted, 1) == found[:1]
    assert missed_centers(label, label, 5) == []
    assert predicted.sum() == tube(empty(48, 16, 31), (8, 8), 3).sum()


def test_a_thin_shell_is_no_missed_vessel():
    """Where a prediction is one voxel too thin all around, nothing is missed."""
    label, predicted = (tube(empty(20, 20, 20), (10, 10), radius) for radius in (4, 3))
    assert missed_centers(label, predicted, 3) == []


@pytest.mark.parametrize("find", [thinnest_centers, bifurcation_centers])
def test_a_label_without_vessel_has_no_place(find):
    """Nothing is found in nothing, and nothing where nothing is asked for."""
    assert find(empty(8, 8, 8), MM, (4, 4, 4), 3) == []
    assert find(tree(), MM, (4, 4, 4), 0) == []


def test_places_are_always_the_same():
    """No random number is drawn, and the label is not written to."""
    label = tree()
    before, state = label.clone(), torch.get_rng_state()

    def found():
        return [
            vessel_centers(label, (8, 8, 8), 4),
            thinnest_centers(label, MM, (8, 8, 8), 4),
            bifurcation_centers(label, MM, (8, 8, 8), 4),
            missed_centers(label, label * 0, 2),
        ]

    first = found()
    assert found() == first
    assert all(first)
    assert torch.equal(label, before)
    assert torch.equal(torch.get_rng_state(), state)
