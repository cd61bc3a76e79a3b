"""Trajectories: at which inputs the network is looked at, in what order, and with what weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets_for_tests import a_probe

from lightning_segxai.baselines import Baseline, draws
from lightning_segxai.trajectories import Cloud, Here, Line, Pair, Point, Scatter, noisy

X = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PROBE = a_probe((6, 5, 4), 2)
ZERO, QUARTER = Baseline("zero"), Baseline(0.25)
TRAJECTORIES = [
    Here(),
    Line(1, ZERO),
    Line(5, Baseline("blurred", 1.0)),
    Pair((ZERO, QUARTER, Baseline("noise"))),
    Scatter(7, draws(3, 2.0)),
    Scatter(4, (ZERO,), 0.3),
    Cloud(3, 0.2, Here()),
    Cloud(3, 0.2, Line(2, ZERO)),
    Cloud(2, 0.2, Scatter(5, draws(2, 1.0), 0.1)),
    Cloud(2, 0.1, Cloud(3, 0.2, Line(2, ZERO))),
]


def groups(trajectory, seed=0):
    return list(trajectory.groups(X, PROBE, torch.Generator().manual_seed(seed)))


def points(trajectory, seed=0):
    return [point for group in groups(trajectory, seed) for point in group]


def test_here_is_the_volume():
    """One point of weight one."""
    [point] = points(Here())
    assert torch.equal(point.input, X)
    assert point.origin is X
    assert point.weight == 1


@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=str)
def test_a_trajectory_has_as_many_points_as_it_says(trajectory):
    """With a gradient, without one, and groups; in each group the weights sum to one."""
    found = groups(trajectory)
    assert len(found) == trajectory.copies
    weights = [point.weight for group in found for point in group]
    assert sum(weight > 0 for weight in weights) == trajectory.count
    assert sum(weight == 0 for weight in weights) == trajectory.ends
    for group in found:
        assert sum(point.weight for point in group) == pytest.approx(1, abs=1e-14)
        assert all(point.origin is group[0].origin for point in group)


@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=str)
def test_a_trajectory_that_starts_here_starts_at_the_volume_to_the_last_bit(trajectory):
    """So that its first look is the prediction; no other claims to."""
    first = points(trajectory)[0]
    assert torch.equal(first.input, X) is trajectory.starts_here


@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=str)
def test_a_trajectory_is_the_same_from_the_same_seed(trajectory):
    """A difference between epochs is the network's; another seed is another noise."""

    def told(seed):
        return [
            (
                p.along,
                p.weight,
                p.input.tolist(),
                None if p.baseline is None else p.baseline.tolist(),
            )
            for p in points(trajectory, seed)
        ]

    assert told(3) == told(3)
    random = "noise" in str(trajectory) or isinstance(trajectory, Scatter)
    assert (told(3) != told(4)) is random


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_line_is_gauss_legendre_quadrature(steps):
    """Nodes on the straight line; the weights sum to one and integrate polynomials exactly."""
    [line] = groups(Line(steps, QUARTER))
    first, *inner, last = line
    assert len(inner) == Line(steps, QUARTER).count == steps
    assert sum(p.weight for p in inner) == pytest.approx(1, abs=1e-14)
    ts = [float(((p.input - 0.25) / (X - 0.25)).flatten()[0]) for p in inner]
    for p, t in zip(inner, ts, strict=True):
        assert p.along == pytest.approx(t, abs=1e-13)
        assert torch.allclose(p.input, 0.25 + t * (X - 0.25), atol=1e-14)
        assert torch.equal(p.baseline, torch.full_like(X, 0.25))
        assert p.origin is X
    for power in range(2 * steps):
        integral = sum(p.weight * t**power for p, t in zip(inner, ts, strict=True))
        assert integral == pytest.approx(1 / (power + 1), abs=1e-12)
    assert torch.equal(first.input, X)
    assert torch.equal(last.input, torch.full_like(X, 0.25))
    assert (first.along, first.weight, last.along, last.weight) == (1, 0, 0, 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 33])
def test_a_line_goes_down_and_each_node_lies_in_the_part_it_speaks_for(steps):
    """From the volume to the baseline; the cuts by the weights separate the nodes."""
    [line] = groups(Line(steps, ZERO))
    along = [p.along for p in line]
    assert along == sorted(along, reverse=True)
    cut = 1.0
    for p in line[1:-1]:
        assert cut > p.along > cut - p.weight
        cut -= p.weight
    assert cut == pytest.approx(0, abs=1e-14)


def test_a_pair_is_the_volume_beside_each_baseline():
    """At the volume itself, with equal weights."""
    [group] = groups(Pair((ZERO, QUARTER)))
    assert [float(p.baseline.mean()) for p in group] == [0, 0.25]
    for p in group:
        assert torch.equal(p.input, X)
        assert (p.along, p.weight) == (1, 0.5)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_a_scatter_lies_on_the_ways_from_its_baselines(samples, baselines, seed):
    """One sample in each equal part of a line; each baseline has the same weight."""
    baselines = min(baselines, samples)
    recipes = draws(baselines, 2.0)
    [group] = groups(Scatter(samples, recipes), seed)
    here, starts, inner = group[0], group[1 : 1 + baselines], group[1 + baselines :]
    generator = torch.Generator().manual_seed(seed)
    made = [recipe.make(X, PROBE.spacing_mm, generator) for recipe in recipes]

    assert (here.baseline, here.weight) == (None, 0)
    for p, start in zip(starts, made, strict=True):
        assert (p.along, p.weight) == (0, 0)
        assert torch.equal(p.input, start)
    for start in starts:
        along = [p.along for p in inner if p.baseline is start.baseline]
        assert [int(t * len(along)) for t in along] == list(range(len(along)))
    for p in inner:
        assert p.input.equal(p.baseline + p.along * (X - p.baseline))
    for start in starts:
        weight = sum(p.weight for p in inner if p.baseline is start.baseline)
        assert weight == pytest.approx(1 / baselines, abs=1e-14)


def test_the_samples_of_a_scatter_lead_to_noisy_volumes():
    """Each to its own, while the volume that is explained stays; the noise is of its range."""
    [group] = groups(Scatter(40, (ZERO,), 0.2))
    inner = group[2:]
    off = torch.stack([p.end - X for p in inner])
    width = 0.2 * float(X.max() - X.min())
    assert float(off.mean()) == pytest.approx(0, abs=0.05 * width)
    assert float(off.std()) == pytest.approx(width, rel=0.05)
    assert len({float(p.end.sum()) for p in inner}) == 40
    for p in inner:
        assert p.origin is X
        assert torch.equal(p.input, p.along * p.end)
        assert torch.equal(p.way(PLACE), p.end[AT])


PLACE = (slice(1, 4), slice(0, 5), slice(2, 4))
AT = (slice(None), *PLACE)


@pytest.mark.parametrize("along", [0.0, 0.3, 1.0])
def test_a_window_of_a_point_is_cut_from_its_input(along):
    """Nothing is made of the whole volume for it, and nothing differs; the ends are exact."""
    start, end = torch.full_like(X, 1e9), X + 1
    for point in (Point(X, start, along), Point(X, start, along, 1.0, end)):
        assert torch.equal(point.crop(PLACE), point.input[AT])
        goal = X if point.end is None else end
        assert torch.equal(point.way(PLACE), (goal - start)[AT])
        if along == 1:
            assert torch.equal(point.input, goal)
        if along == 0:
            assert torch.equal(point.input, start)


def test_a_cloud_is_the_volume_with_noise_of_its_range():
    """Copies of their own noise, each with the inner trajectory around it."""
    cloud = Cloud(3, 0.2, Line(2, ZERO))
    found = groups(cloud)
    assert cloud.count == 6
    assert len(found) == 3
    generator = torch.Generator().manual_seed(0)
    for group in found:
        noise = torch.randn(X.shape, generator=generator, dtype=X.dtype)
        copy = X + 0.2 * (X.max() - X.min()) * noise
        for p in group:
            assert torch.equal(p.origin, copy)
        assert torch.equal(group[0].input, copy)
        assert not any(torch.equal(p.input, copy) for p in group[1:])


def test_the_inner_baseline_is_that_of_the_copy():
    """A blur of the noisy volume, not of the volume."""
    blurred = Baseline("blurred", 1.0)
    for group in groups(Cloud(2, 0.2, Line(1, blurred))):
        copy = group[0].origin
        assert torch.equal(group[-1].input, blurred.make(copy, PROBE.spacing_mm, torch.Generator()))


def test_copies_are_made_when_they_are_asked_for():
    """A long cloud takes the memory of one copy."""
    asked = Cloud(10**9, 0.1, Here()).groups(X, PROBE, torch.Generator().manual_seed(0))
    assert not torch.equal(next(asked)[0].input, next(asked)[0].input)


def test_noise_keeps_the_precision_and_leaves_the_volume():
    """It is drawn on the CPU, in the volume's own dtype."""
    x = X.float()
    before = x.clone()
    made = noisy(x, 0.5, torch.Generator().manual_seed(0))
    assert made.dtype is torch.float32
    assert torch.equal(x, before)
    assert torch.equal(noisy(x, 0.0, torch.Generator().manual_seed(0)), x)


def test_equal_trajectories_are_one():
    """They are keys; methods on equal ones share their passes."""
    assert len({Here(), Here()}) == 1
    assert len({Line(4, ZERO), Line(4, ZERO), Line(5, ZERO)}) == 2
    assert len({Cloud(2, 0.1, Here()), Cloud(2, 0.1, Here())}) == 1
    assert (
        len({Scatter(4, draws(2, 5.0)), Scatter(4, draws(2, 5.0)), Scatter(4, draws(3, 5.0))}) == 2
    )
    assert len({Pair(draws(2, 5.0)), Pair(draws(2, 5.0))}) == 1
