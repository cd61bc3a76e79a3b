from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_segxai.data.phantom import (
    Phantom,
    ToFContrast,
    paint_tof,
    render_tof,
    tof_phantom,
    transits,
)
from lightning_segxai.data.tof import noisy
from lightning_segxai.data.vessel_coverage import cover, vessel_label
from lightning_segxai.data.vessel_tree import Branch, Ellipsoid, VesselGraph, grow_tree

SPACING = (0.6, 0.6, 0.8)
SHARED = Path(os.environ.get("SEGXAI_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
QUIET = ToFContrast(noise=0.0, bias=0.0, psf_voxels=0.0, slab_loss=0.0)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return tof_phantom()


def tube(
    start: tuple[float, float, float],
    end: tuple[float, float, float],
    radius: float,
    points: int = 20,
) -> VesselGraph:
    line = np.linspace(start, end, points)
    path = np.linspace(0, float(np.linalg.norm(np.subtract(end, start))), points)
    return VesselGraph((Branch(line, np.full(points, radius), path, -1),))


def at(
    volume: np.ndarray, points_mm: np.ndarray, spacing: tuple[float, float, float]
) -> np.ndarray:
    return volume[tuple(np.rint(points_mm / spacing).astype(int).T)]


def test_radii_keep_murrays_law_at_every_bifurcation(phantom: Phantom) -> None:
    """The cubes of the children's radii must add up to the cube of the parent's."""
    graph = phantom.graph
    parents = [i for i, children in enumerate(graph.children) if children]
    for i in parents:
        assert len(graph.children[i]) == 2
        cubes = sum(graph.branches[c].radius_mm[0] ** 3 for c in graph.children[i])

        assert cubes == pytest.approx(graph.branches[i].radius_mm[-1] ** 3, rel=1e-12)
    assert len(parents) > 30


def test_bifurcations_keep_murrays_angles(phantom: Phantom) -> None:
    """Forces of r^2 along the three vessels must balance: r0^2 e0 = r1^2 e1 + r2^2 e2."""

    def unit(step: np.ndarray) -> np.ndarray:
        return step / np.linalg.norm(step)

    for i, children in enumerate(phantom.graph.children):
        if not children:
            continue
        parent = phantom.graph.branches[i]
        into = parent.radius_mm[-1] ** 2 * unit(parent.points_mm[-1] - parent.points_mm[-2])
        out = np.zeros(3)
        for c in children:
            child = phantom.graph.branches[c]
            out += child.radius_mm[0] ** 2 * unit(child.points_mm[1] - child.points_mm[0])

        np.testing.assert_allclose(out, into, atol=1e-9)


@pytest.mark.parametrize(
    ("end", "radius"),
    [((24.0, 12.1, 12.3), 2.0), ((23.0, 20.0, 17.0), 1.0), ((12.2, 12.1, 24.0), 0.5)],
)
def test_coverage_of_a_straight_tube_is_the_volume_of_a_capsule(
    end: tuple[float, float, float], radius: float
) -> None:
    """Partial volumes must add up to pi r^2 l + 4/3 pi r^3, for vessels of a voxel's size too."""
    shape, start = (64, 64, 48), (8.1, 12.1, 12.3)
    length = float(np.linalg.norm(np.subtract(end, start)))
    capsule = np.pi * radius**2 * length + 4 / 3 * np.pi * radius**3
    graph = tube(start, end, radius)

    coverage = cover(graph, shape, SPACING)

    assert coverage.fraction.sum() * np.prod(SPACING) == pytest.approx(capsule, rel=0.01)
    if radius >= 1:  # a half-covered voxel's center is inside a curved wall: thin labels shrink
        label = vessel_label(graph, coverage, shape, SPACING)
        missing = 0.10 / radius**2
        assert label.sum() * np.prod(SPACING) == pytest.approx(capsule, rel=missing)


def test_coverage_equals_a_plain_count_of_fine_points() -> None:
    """Each voxel's share must be the share of its points that are within the radius."""
    shape, radius = (10, 10, 10), 1.7
    start, end = np.array([2.3, 3.1, 2.2]), np.array([6.2, 6.9, 6.4])
    coverage = cover(tube(tuple(start), tuple(end), radius), shape, (1.0, 1.0, 1.0))
    fine = (np.indices((100, 100, 100)).reshape(3, -1).T + 0.5) / 10 - 0.5
    t = np.clip((fine - start) @ (end - start) / ((end - start) ** 2).sum(), 0, 1)
    inside = np.linalg.norm(fine - start - t[:, None] * (end - start), axis=1) < radius
    expected = inside.reshape(10, 10, 10, 10, 10, 10).mean(axis=(1, 3, 5))

    found = np.zeros(shape)
    found.flat[coverage.voxels] = coverage.fraction

    assert np.abs(found - expected).max() < 0.06
    assert np.abs(found - expected).mean() < 0.005


def test_equal_seeds_give_equal_bits_and_others_do_not(phantom: Phantom) -> None:
    """The seed alone must decide image, label and graph."""
    same, other = tof_phantom(), tof_phantom(seed=1)

    assert same.image.tobytes() == phantom.image.tobytes()
    assert same.label.tobytes() == phantom.label.tobytes()
    assert not np.array_equal(other.image, phantom.image)
    assert not np.array_equal(other.label, phantom.label)


def test_contrast_leaves_the_anatomy_alone(phantom: Phantom) -> None:
    """Another scanner must see the same vessels."""
    other = tof_phantom(contrast=ToFContrast(noise=20.0, slab_loss=0.4))

    np.testing.assert_array_equal(other.label, phantom.label)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(16, 72)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 1.2)] * 3),
    inlets=st.integers(1, 3),
)
def test_trees_stay_inside_and_their_paths_go_on(
    seed: int,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    inlets: int,
) -> None:
    """Center lines must stay in the volume and brain; children must start where parents end."""
    graph = grow_tree(shape, spacing, np.random.default_rng(seed), inlets=inlets)
    far = (np.array(shape) - 1) * spacing
    brain = Ellipsoid.brain(shape, spacing)

    assert sum(b.parent < 0 for b in graph.branches) == inlets
    for branch in graph.branches:
        assert (branch.points_mm >= 0).all()
        assert (branch.points_mm <= far).all()
        assert brain.rho(branch.points_mm).max() < 1
        steps = np.linalg.norm(np.diff(branch.points_mm, axis=0), axis=1)
        np.testing.assert_allclose(np.diff(branch.path_mm), steps, atol=1e-9)
        if branch.parent >= 0:
            parent = graph.branches[branch.parent]
            np.testing.assert_array_equal(branch.points_mm[0], parent.points_mm[-1])
            assert branch.path_mm[0] == parent.path_mm[-1]
    assert len(graph.end_points_mm) == len(graph.bifurcations_mm) + inlets


def test_center_lines_of_vessels_a_voxel_thick_are_labeled(phantom: Phantom) -> None:
    """No vessel with a radius above half a voxel may be torn in the label."""
    points = np.concatenate([b.points_mm for b in phantom.graph.branches])
    radius = np.concatenate([b.radius_mm for b in phantom.graph.branches])

    assert at(phantom.label, points[radius > max(SPACING) / 2], SPACING).all()


def test_half_covered_voxels_are_labeled_and_few_others(phantom: Phantom) -> None:
    """The label must be the half-covered voxels and little more."""
    coverage = cover(phantom.graph, phantom.label.shape, SPACING)
    half = np.zeros(phantom.label.shape, dtype=bool)
    half.flat[coverage.voxels[coverage.fraction >= 0.5]] = True

    assert (phantom.label[half] == 1).all()
    assert (phantom.label > 0).sum() < 1.1 * half.sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intensities_are_those_of_a_real_scan(seed: int) -> None:
    """Background, air and vessel cores must be as measured on the TopCoW crop."""
    phantom = tof_phantom(seed=seed)
    points = np.concatenate([b.points_mm for b in phantom.graph.branches])
    radius = np.concatenate([b.radius_mm for b in phantom.graph.branches])
    core = at(phantom.image, points, SPACING)
    background = phantom.image[phantom.brain & (phantom.label == 0)]

    def median(low: float, high: float) -> float:
        return float(np.median(core[(radius >= low) & (radius < high)]))

    assert background.mean() == pytest.approx(101, abs=8)
    assert background.std() == pytest.approx(32, abs=7)
    assert median(0.5, 0.8) == pytest.approx(530, rel=0.15)
    assert median(0.8, 1.1) == pytest.approx(610, rel=0.20)
    assert median(1.1, 1.5) == pytest.approx(790, rel=0.10)
    assert median(0.3, 0.5) < median(0.5, 0.8)
    assert 0.0015 < (phantom.label > 0).mean() < 0.02
    assert phantom.brain[phantom.label > 0].mean() > 0.95


def test_a_whole_volume_takes_seconds_and_has_as_many_vessels_as_real_ones() -> None:
    """256 x 256 x 100 voxels must have 0.15 to 0.8 % of vessel and take a few seconds."""
    begun = time.process_time()
    phantom = tof_phantom((256, 256, 100), seed=3)

    assert time.process_time() - begun < 15  # 2 to 4 s alone on a core
    assert 0.0015 < (phantom.label > 0).mean() < 0.008


def test_blood_saturates_along_its_way_and_in_thin_vessels() -> None:
    """Along a straight tube the image must darken; a thin tube must be darker and darken faster."""

    def along(radius: float) -> np.ndarray:
        graph = tube((10.0, 14.0, 14.0), (50.0, 14.0, 14.0), radius, points=60)
        shape = (100, 48, 36)
        coverage = cover(graph, shape, SPACING)
        image = render_tof(graph, coverage, shape, SPACING, np.random.default_rng(0), QUIET)
        return at(image, graph.branches[0].points_mm[5:-5], SPACING)

    thick, thin = along(1.6), along(0.9)

    assert (np.diff(thick) <= 0).all()
    assert (thin < thick).all()
    assert thin[-1] / thin[0] < thick[-1] / thick[0] < 0.99


def test_transit_times_add_up_over_branches(phantom: Phantom) -> None:
    """A child's transit must begin where its parent's ends, and grow."""
    found = transits(phantom.graph)
    for branch, transit in zip(phantom.graph.branches, found, strict=True):
        assert transit[0] == (found[branch.parent][-1] if branch.parent >= 0 else 0)
        assert (np.diff(transit) > 0).all()


def test_slabs_darken_vessels_on_their_borders() -> None:
    """A vessel along k must lose the given share where slabs meet, and none amid them."""
    contrast = ToFContrast(slab_mm=16.0, slab_loss=0.3)
    profile = contrast.slabs(40, 0.8)

    assert profile.max() == pytest.approx(1.0, abs=1e-4)
    assert profile.argmax() % 20 in (9, 10)
    assert profile[[19, 20]] == pytest.approx(0.7, abs=0.06)
    np.testing.assert_allclose(profile[:20], profile[20:])

    graph = tube((14.0, 14.0, 0.0), (14.0, 14.0, 31.2), 1.6, points=60)
    coverage = cover(graph, (48, 48, 40), SPACING)
    images = [
        render_tof(
            graph,
            coverage,
            (48, 48, 40),
            SPACING,
            np.random.default_rng(0),
            ToFContrast(noise=0, bias=0, psf_voxels=0, slab_mm=16.0, slab_loss=loss),
        )
        for loss in (0.0, 0.3)
    ]
    axis = [image[23, 23] for image in images]

    np.testing.assert_allclose(axis[1] / axis[0], profile, rtol=1e-5)


def test_noise_alone_is_rayleigh_and_of_the_asked_size() -> None:
    """Without signal the magnitude must have mean s sqrt(pi/2) and sigma s sqrt(2 - pi/2)."""
    for psf in (0.0, 0.45, 0.8):
        image = noisy(np.zeros((64, 64, 48), np.float32), 5.0, psf, np.random.default_rng(0))

        assert image.mean() == pytest.approx(5 * np.sqrt(np.pi / 2), rel=0.01)
        assert image.std() == pytest.approx(5 * np.sqrt(2 - np.pi / 2), rel=0.01)


def test_noise_far_above_its_size_is_normal() -> None:
    """At a high signal the magnitude's sigma must be the channels' own."""
    image = noisy(np.full((64, 64, 48), 500, np.float32), 5.0, 0.45, np.random.default_rng(0))

    assert image.std() == pytest.approx(5, rel=0.01)
    assert image.mean() == pytest.approx(np.hypot(500, 5 / np.sqrt(2)), rel=1e-3)


def test_painted_labels_have_bright_vessels_that_darken_on_their_way(phantom: Phantom) -> None:
    """On a given label vessels must outshine what surrounds them, thick and near ones most."""
    image = paint_tof(phantom.label, SPACING)
    vessel = phantom.label > 0
    graph = phantom.graph
    trunk = at(image, graph.branches[0].points_mm[2:-2], SPACING)
    ends = at(image, graph.end_points_mm, SPACING)[at(vessel, graph.end_points_mm, SPACING)]

    assert image.shape == phantom.label.shape
    assert image.dtype == np.float32
    assert np.isfinite(image).all()
    assert np.percentile(image[vessel], 5) > np.percentile(image[~vessel], 99)
    assert np.median(trunk) > 1.2 * np.median(ends)
    np.testing.assert_array_equal(image, paint_tof(phantom.label, SPACING))
    assert not np.array_equal(image, paint_tof(phantom.label, SPACING, seed=1))


@pytest.mark.parametrize("name", ["ds003949_sub-000_vessel_manual", "HQA_Subject0001_vessel_gt"])
def test_real_labels_can_be_painted(name: str) -> None:
    """A crop of a real label must come out with as many bright voxels as the label has vessel."""
    path = SHARED / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent; SEGXAI_SHARED_DATA may name its folder")
    nibabel = pytest.importorskip("nibabel")
    stored = nibabel.as_closest_canonical(nibabel.load(path))
    label = np.asarray(stored.dataobj) > 0
    i, j, k = (n // 2 for n in label.shape)
    label = label[i - 64 : i + 64, j - 64 : j + 64, k - 40 : k + 40]
    spacing = tuple(float(edge) for edge in stored.header.get_zooms()[:3])

    image = paint_tof(label, spacing)

    assert np.median(image[label]) > 3 * np.median(image[~label])
    assert (image > 300).sum() == pytest.approx(label.sum(), rel=0.25)


@pytest.mark.parametrize("inlets", [0, 4])
def test_impossible_numbers_of_inlets_are_refused(inlets: int) -> None:
    """There are positions for three inlets only."""
    with pytest.raises(ValueError, match=f"inlets={inlets}.*1 to 3"):
        tof_phantom(inlets=inlets)


def test_impossible_sizes_labels_and_contrasts_are_refused() -> None:
    """Errors must name what is wrong."""
    with pytest.raises(ValueError, match="at least 16 voxels"):
        tof_phantom(shape=(8, 96, 64))
    with pytest.raises(ValueError, match="min_radius_mm"):
        tof_phantom(min_radius_mm=9.0)
    with pytest.raises(ValueError, match="no voxel is above 0"):
        paint_tof(np.zeros((16, 16, 16), np.uint8), SPACING)
    with pytest.raises(ValueError, match=r"noise=-1"):
        ToFContrast(noise=-1.0)
    with pytest.raises(ValueError, match=r"slab_mm=0"):
        ToFContrast(slab_mm=0.0)
