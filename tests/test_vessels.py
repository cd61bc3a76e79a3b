"""Distances, pieces, borders and the centerline of a region, and what is kept of them."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_segxai import vessels
from lightning_segxai.vessels import (
    Centerline,
    border,
    centerline,
    distance_mm,
    largest_component,
    largest_lack,
)

UNIT = (1.0, 1.0, 1.0)
AROUND = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
FACES = [step for step in AROUND if sum(map(abs, step)) == 1]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(vessels, "_kept", type(vessels._kept)())


def volume(shape, *voxels):
    """A mask with these voxels."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for ijk in voxels:
        mask[ijk] = True
    return mask


def noise(seed, share=0.3, shape=(5, 6, 7)):
    """A mask of a share of the voxels, at random places."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def places(mask):
    """The voxels of a mask, as a set of index triples."""
    return {tuple(ijk) for ijk in mask.nonzero().tolist()}


def beside(voxel, steps):
    return {tuple(at + by for at, by in zip(voxel, step, strict=True)) for step in steps}


def pieces(voxels):
    """Connected sets of voxels, flooded one by one, in index order."""
    found, left = [], set(voxels)
    while left:
        piece, front = set(), [min(left)]
        while front:
            voxel = front.pop()
            if voxel in left:
                left.remove(voxel)
                piece.add(voxel)
                front.extend(beside(voxel, AROUND))
        found.append(piece)
    return found


def largest(voxels):
    """The first of the largest pieces."""
    return max(pieces(voxels), key=len, default=set())


def tube(shape, *legs):
    """Straight square tubes along k: each leg is its center, its half width and its ends."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for (i, j), half, (start, stop) in legs:
        mask[i - half : i + half + 1, j - half : j + half + 1, start:stop] = True
    return mask


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

    kept = [distance[0, 2, 0].item() for (distance,) in vessels._kept.values()]

    assert kept == [1.0, 3.0]


def test_transposed_masks_are_read_as_they_look():
    """A mask that is a view in another memory order has the distances of its copy."""
    view = one_voxel().permute(2, 0, 1)

    assert torch.equal(
        distance_mm(view, (1.0, 2.0, 3.0)), distance_mm(view.contiguous(), (1.0, 2.0, 3.0))
    )


def test_the_largest_component_by_hand():
    """Voxels that touch by a corner are one piece; the larger piece is taken whole."""
    corner = [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    pair = [(4, 4, 4), (4, 4, 5)]

    assert places(largest_component(volume((6, 6, 6), *corner, *pair))) == set(corner)


def test_of_equal_components_the_first_is_taken():
    """A tie goes to the piece whose first voxel comes first in index order."""
    first, second = [(0, 3, 3), (1, 3, 3)], [(0, 5, 0), (0, 5, 1)]

    assert places(largest_component(volume((4, 6, 6), *first, *second))) == set(first)


def test_no_voxel_has_no_component():
    """Nothing is made of nothing."""
    empty = volume((3, 4, 5))

    assert torch.equal(largest_component(empty), empty)
    assert torch.equal(largest_lack(empty, ~empty), empty)
    assert torch.equal(largest_lack(~empty, ~empty), empty)


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.3))
def test_the_largest_component_is_that_of_a_flood(seed, share):
    """Flooding the region voxel by voxel finds the same piece."""
    mask = noise(seed, share)

    assert places(largest_component(mask)) == largest(places(mask))


def test_a_shell_is_no_piece():
    """A prediction one voxel too thin lacks a large shell; the small branch it misses is found."""
    vessel = tube((16, 16, 20), ((8, 8), 2, (1, 19)))
    thin = tube((16, 16, 20), ((8, 8), 1, (2, 18)))
    branch = volume((16, 16, 20), *[(i, 8, 10) for i in range(11, 15)])

    found = largest_lack(vessel | branch, thin)

    # the tip is what does not touch the thin vessel; it grows back onto the nine shell voxels there
    foot = {(10, j, k) for j in (7, 8, 9) for k in (9, 10, 11)}
    assert places(found) == places(branch) | foot
    assert not largest_lack(vessel, thin).any()
    assert int((vessel & ~thin).sum()) > 20 * int(found.sum())


@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.4), other=st.floats(0.0, 0.1))
def test_the_largest_lack_is_that_of_a_flood(seed, share, other):
    """Seeds, their largest piece and its growth, spelled out with sets."""
    mask, theirs = noise(seed, share), noise(seed + 1, other)
    lacking = places(mask) - places(theirs)
    seeds = {v for v in lacking if not beside(v, AROUND) & places(theirs)}
    piece = largest(seeds)

    found = places(largest_lack(mask, theirs))

    assert found == {v for v in lacking if v in piece or beside(v, AROUND) & piece}
    assert found <= lacking
    assert len(pieces(found)) <= 1


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.5))
def test_what_nobody_else_has_is_lacking_whole(seed, share):
    """Against an empty region the largest lack is the largest component."""
    mask = noise(seed, share)

    assert torch.equal(largest_lack(mask, torch.zeros_like(mask)), largest_component(mask))


def test_the_border_of_a_cube_by_hand():
    """A cube of edge 4 has 64 - 8 border voxels, and 6 * 16 voxels at its faces."""
    cube = torch.zeros(8, 8, 8, dtype=torch.bool)
    cube[2:6, 2:6, 2:6] = True

    assert int(border(cube).sum()) == 56
    assert int(border(~cube).sum()) == 96
    assert not border(cube)[3:5, 3:5, 3:5].any()


def test_where_the_volume_ends_is_no_border():
    """A region that fills the volume has none; one that fills half of it has one plane."""
    half = torch.zeros(4, 5, 6, dtype=torch.bool)
    half[:2] = True

    assert not border(torch.ones_like(half)).any()
    assert places(border(half)) == {(1, j, k) for j in range(5) for k in range(6)}
    assert not border(torch.ones(1, 1, 1, dtype=torch.bool)).any()


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_the_border_is_that_of_a_plain_search(seed, share):
    """Asking each voxel's six neighbors finds the same border, inside and outside."""
    mask = noise(seed, share)
    inside, outside = places(mask), places(~mask)

    assert places(border(mask)) == {v for v in inside if beside(v, FACES) & outside}
    assert places(border(~mask)) == {v for v in outside if beside(v, FACES) & inside}


@given(seed=st.integers(0, 10_000), axes=st.sets(st.integers(0, 2)))
def test_borders_turn_with_the_volume(seed, axes):
    """The border of a mirrored region is the mirrored border."""
    mask, axes = noise(seed), tuple(axes)

    assert torch.equal(border(mask.flip(axes)), border(mask).flip(axes))


@given(seed=st.integers(0, 10_000), axes=st.sets(st.integers(0, 2)))
def test_the_size_of_the_largest_piece_turns_with_the_volume(seed, axes):
    """Mirroring may change which of equal pieces is the first, never how large it is."""
    mask, axes = noise(seed, 0.15), tuple(axes)
    piece, mirrored = largest_component(mask), largest_component(mask.flip(axes)).flip(axes)

    sizes = [len(found) for found in pieces(places(mask))]
    assert int(mirrored.sum()) == int(piece.sum()) == max(sizes, default=0)
    if sizes.count(max(sizes, default=0)) == 1:
        assert torch.equal(mirrored, piece)


def test_a_straight_tube_has_two_ends_and_one_segment():
    """The centerline of a tube 3 voxels wide is its axis, up to a voxel from its tips."""
    line = centerline(tube((9, 9, 20), ((4, 4), 1, (3, 17))), UNIT)

    axis = [[4, 4, k] for k in range(4, 16)]
    assert line.ijk.tolist() == axis
    assert line.ijk[line.endpoints].tolist() == [axis[0], axis[-1]]
    assert not line.bifurcations.any()
    assert line.segment.tolist() == [1] * 12
    assert line.radius_mm.tolist() == [2.0] * 12


def test_a_radius_is_the_mean_of_its_segment():
    """Each voxel's own distance is another; the segment has one radius."""
    line = centerline(volume((1, 1, 5), *[(0, 0, k) for k in range(4)]), (1.0, 1.0, 0.5))

    # 4, 3, 2 and 1 steps of half a millimeter to the only voxel outside
    assert line.radius_mm.tolist() == [(2.0 + 1.5 + 1.0 + 0.5) / 4] * 4


def test_distances_of_a_radius_are_in_millimeters():
    """Where voxels are flat, the nearest voxel outside is that along the short edge."""
    long = tube((9, 9, 20), ((4, 4), 1, (0, 20)))  # it leaves the volume: no ends outside

    assert centerline(long, (1.0, 1.0, 1.0)).radius_mm.unique().tolist() == [2.0]
    assert centerline(long, (0.25, 1.0, 1.0)).radius_mm.unique().tolist() == [0.5]
    assert centerline(long, (1.0, 0.75, 9.0)).radius_mm.unique().tolist() == [1.5]
    assert centerline(long, (2.0, 3.0, 0.1)).radius_mm.unique().tolist() == [4.0]


def test_a_y_of_lines_has_three_ends_and_one_bifurcation():
    """Three lines that meet in one voxel are three segments around it."""
    legs = [
        [(2, 6, k) for k in range(1, 6)],  # to the left
        [(2, 6 - d, 6 + d) for d in range(1, 5)],  # to the right and up
        [(2, 6 + d, 6 + d) for d in range(1, 5)],  # to the right and down
    ]
    mask = volume((5, 13, 13), (2, 6, 6), *legs[0], *legs[1], *legs[2])

    line = centerline(mask, UNIT)

    assert torch.equal(line.mask(torch.ones_like(line.endpoints)), mask)
    assert places(line.mask(line.endpoints)) == {(2, 6, 1), (2, 2, 10), (2, 10, 10)}
    assert places(line.mask(line.bifurcations)) == {(2, 6, 6)}
    named = {int(n): places(line.mask(line.segment == n)) for n in line.segment.unique()}
    assert named.pop(0) == {(2, 6, 6)}
    assert sorted(map(sorted, named.values())) == sorted(map(sorted, legs))


def test_a_ring_has_no_end_and_a_lone_voxel_neither():
    """An end has exactly one neighbor."""
    ring = [(1, 1, 2), (1, 2, 1), (1, 2, 3), (1, 3, 2)]

    line = centerline(volume((3, 9, 9), *ring, (1, 7, 7)), UNIT)

    assert sorted(line.neighbors.tolist()) == [0, 2, 2, 2, 2]
    assert not line.endpoints.any()
    assert line.segment.unique().tolist() == [1, 2]


def test_no_voxel_has_a_centerline_without_one():
    """An empty region is no error here."""
    line = centerline(volume((4, 4, 4)), UNIT)

    assert len(line.ijk) == len(line.radius_mm) == 0
    assert not line.mask(line.endpoints).any()
    assert math.isnan(line.dividing_radius_mm)


def test_where_nothing_is_outside_the_radius_is_infinite():
    """A label that fills the volume has no wall."""
    line = centerline(torch.ones(1, 1, 9, dtype=torch.bool), UNIT)

    assert len(line.ijk) == 9
    assert line.radius_mm.tolist() == [math.inf] * 9
    assert line.dividing_radius_mm == math.inf


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.6))
def test_the_centerline_is_that_of_a_plain_search(seed, share):
    """Neighbors, segments and radii, spelled out voxel by voxel on the same skeleton."""
    spacing = (0.3, 1.0, 0.7)
    mask = noise(seed, share)
    line = centerline(mask, spacing)
    skeleton = [tuple(ijk) for ijk in line.ijk.tolist()]
    near = {v: len(beside(v, AROUND) & set(skeleton)) for v in skeleton}
    number = dict(zip(skeleton, line.segment.tolist(), strict=True))
    radius = dict(zip(skeleton, line.radius_mm.tolist(), strict=True))

    def millimeters(voxel):
        return [edge * at for edge, at in zip(spacing, voxel, strict=True)]

    def wall(voxel):
        return min(math.dist(millimeters(voxel), millimeters(v)) for v in places(~mask))

    assert set(skeleton) <= places(mask)
    assert line.neighbors.tolist() == list(near.values())
    segments = pieces([v for v in skeleton if near[v] < 3])
    found = [{v for v in skeleton if number[v] == n} for n in set(number.values()) - {0}]
    assert sorted(map(sorted, found)) == sorted(map(sorted, segments))
    for segment in segments:
        mean = sum(map(wall, segment)) / len(segment)
        assert [radius[v] for v in segment] == pytest.approx([mean] * len(segment), rel=1e-9)
    for v in places(line.mask(line.bifurcations)):
        assert number[v] == 0
        assert radius[v] == pytest.approx(wall(v), rel=1e-9)


@pytest.mark.parametrize(
    ("radii", "dividing"),
    [
        ([1.0], 1.0),
        ([1.0, 1.0, 1.0], 1.0),
        ([1.0, 1.0, 2.0], 2.0),  # the median is 1, and nothing is below it
        ([1.0, 2.0, 2.0], 2.0),
        ([1.0, 2.0, 2.0, 2.0, 3.0, 3.0], 3.0),
        ([1.0, 1.0, 2.0, 2.0, 2.0, 3.0], 2.0),
        ([4.0, 3.0, 2.0, 1.0], 3.0),
    ],
)
def test_the_radius_that_parts_most_evenly(radii, dividing):
    """As many voxels as can be are below it and not; voxels of bifurcations do not count."""
    n = len(radii)
    line = Centerline(
        (1, 1, n + 9),
        torch.tensor([[0, 0, k] for k in range(n + 9)]),
        torch.full((n + 9,), 2),
        torch.tensor([1] * n + [0] * 9),
        torch.tensor([*radii, *[9.0] * 9], dtype=torch.float64),
    )

    assert line.dividing_radius_mm == dividing


def test_thinning_still_loses_a_tube_of_even_width():
    """As documented; when it is mended in scikit-image, the docstrings change."""
    mask = torch.zeros(6, 6, 12, dtype=torch.bool)
    mask[2:4, 2:4, 3:9] = True

    assert len(centerline(mask, UNIT).ijk) == 0


def test_a_centerline_is_made_once_for_equal_content(monkeypatch):
    """An equal region costs no second thinning; another spacing or region does."""
    calls = []
    thin = vessels.skeletonize
    monkeypatch.setattr(vessels, "skeletonize", lambda mask: calls.append(1) or thin(mask))
    mask = tube((5, 5, 9), ((2, 2), 1, (1, 8)))

    centerline(mask, UNIT)
    centerline(mask.clone(), UNIT)
    centerline(mask, (1.0, 1.0, 2.0))
    centerline(mask.transpose(0, 2), UNIT)

    assert len(calls) == 3


def test_writing_into_a_centerline_leaves_the_next_one_alone():
    """What one caller does to the result never reaches another, neither the first nor a later."""
    mask = tube((5, 5, 9), ((2, 2), 1, (1, 8)))
    for _ in range(2):
        line = centerline(mask, UNIT)
        assert line.ijk.tolist() == [[2, 2, k] for k in range(2, 7)]
        assert line.endpoints.sum() == 2
        for written in (line.ijk, line.neighbors, line.segment, line.radius_mm):
            written.fill_(0)


def test_a_centerline_and_a_distance_of_one_region_are_kept_apart():
    """They share the room, not the name."""
    mask = one_voxel()

    distance_mm(mask, UNIT)
    line = centerline(mask, UNIT)

    assert line.ijk.tolist() == [[1, 2, 0]]
    assert distance_mm(mask, UNIT)[1, 2, 2] == 2
    assert len(vessels._kept) == 2
