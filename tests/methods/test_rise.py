"""RISE in 3D: masks of the whole volume, and the mean score where a voxel is kept."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from nets_for_tests import Counting, Weigh, a_probe, blended, close, layered

from lightning_segxai.baselines import Baseline
from lightning_segxai.explain import explain
from lightning_segxai.methods.rise import RISE
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.values import Probe

EVERYWHERE = ClassEvidence(1, "everywhere")


def only(net, probe, method, **settings):
    [found] = explain(Predictor(net, **settings), probe, {"t": EVERYWHERE}, {"m": method})
    assert found.status == "ok"
    return found


def masks_of(method, probe, seed=0):
    model = ScoredModel(Predictor(Weigh(0, 1)), probe, torch.ones(2, *probe.shape), seed)
    return torch.stack(list(method._masks(model, probe.image)))


def plain_masks(method, probe):
    """Voxel by voxel: the mean of the eight nodes around it, weighed by how near they are."""
    generator = torch.Generator().manual_seed(0)
    extent = [n * mm for n, mm in zip(probe.shape, probe.spacing_mm, strict=True)]
    edge = max(extent) / method.cells
    nodes = [-int(-(mm / edge) // 1) + 2 for mm in extent]
    made = torch.zeros(method.samples, *probe.shape, dtype=torch.float64)
    for mask in made:
        lattice = (torch.rand(nodes, generator=generator) < method.keep).double()
        at = torch.rand(3, generator=generator, dtype=torch.float64)
        for i, j, k in torch.cartesian_prod(*[torch.arange(n) for n in probe.shape]).tolist():
            place = [
                (v + 0.5) * mm / edge + float(a)
                for v, mm, a in zip((i, j, k), probe.spacing_mm, at, strict=True)
            ]
            low = [int(p) for p in place]
            for corner in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
                near = 1.0
                for p, n, c in zip(place, low, corner, strict=True):
                    near *= 1 - abs(p - n - c)
                mask[i, j, k] += (
                    near * lattice[tuple(n + c for n, c in zip(low, corner, strict=True))]
                )
    return made


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("cells", [1, 3, 6])
def test_masks_interpolate_a_lattice(spacing, cells):
    """Written down voxel by voxel."""
    probe = a_probe((6, 5, 4), spacing_mm=spacing)
    method = RISE(4, cells)
    close(masks_of(method, probe), plain_masks(method, probe))


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_mean_score_where_a_voxel_is_kept(window, keep):
    """A plain loop over the same masks, scored by windows."""
    probe = a_probe((12, 8, 6), 2, spacing_mm=(1.0, 1.0, 1.5))
    method = RISE(13, 3, keep, baseline="noise")
    masks = masks_of(method, probe)
    hidden = Baseline("noise").make(probe.image, probe.spacing_mm, torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = torch.stack(
            [
                blended(layered(2), hidden + m * (probe.image - hidden), window)[1].mean()
                for m in masks
            ]
        )
    covered = masks.sum(0)
    plain = torch.zeros_like(masks[0])
    for mask, score in zip(masks, scores - scores.mean(), strict=True):
        plain += mask * score
    plain = torch.where(covered > 0, plain / covered.clamp_min(1e-12), 0)
    close(only(layered(2), probe, method, window=window).values, plain, 1e-9)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_as_much_is_kept_as_asked_at_every_voxel(keep):
    """Also in corners; by masks between zero and one."""
    masks = masks_of(RISE(3000, 4, keep), a_probe((8, 4, 4)))
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1
    deviation = float((masks.mean(0) - keep).abs().max())
    assert deviation < 5 * (keep * (1 - keep) / 3000) ** 0.5


def test_cells_are_cubes_in_millimeters():
    """Neighbors one millimetre apart are as alike along every axis."""
    probe = a_probe((16, 8, 4), spacing_mm=(0.5, 1.0, 2.0))
    masks = masks_of(RISE(800, 2), probe) - 0.5

    def alike(axis, voxels):
        size = masks.shape[axis] - voxels
        pair = masks.narrow(axis, 0, size) * masks.narrow(axis, voxels, size)
        return float(pair.mean() / (masks**2).mean())

    assert alike(1, 4) == pytest.approx(alike(3, 1), abs=0.05)
    assert alike(1, 2) == pytest.approx(alike(2, 1), abs=0.05)
    assert alike(1, 4) < alike(1, 2) - 0.1


def test_of_a_linear_network_it_is_the_effect_of_the_surroundings():
    """One voxel counts: the map is highest there, and as high as the covariance says."""
    probe = Probe("p", torch.zeros(1, 9, 9, 9, dtype=torch.float64))
    probe.image[0, 4, 4, 4] = 2.0
    method = RISE(1500, 9, 0.3, "zero")
    masks = masks_of(method, probe)[:, 4, 4, 4]
    values = only(Weigh(0, 5), probe, method).values * 729
    assert values.argmax() == 4 * 81 + 4 * 9 + 4
    expected = 10 * float(masks.var(correction=0) / masks.mean())
    assert float(values[4, 4, 4]) == pytest.approx(expected, rel=1e-9)
    assert float(values[0].abs().mean()) < 0.05 * expected


def test_a_score_from_somewhere_else_changes_nothing():
    """A bias of a million does not drown the map."""
    probe = a_probe((8, 8, 8))
    method = RISE(20)
    close(
        only(Weigh(0, 1, bias=1e6), probe, method).values,
        only(Weigh(0, 1), probe, method).values,
        1e-6,
    )


def test_memory_does_not_grow_with_samples(monkeypatch):
    """No more masks are alive than go together."""
    made = []
    plain = RISE._masks

    def watched(self, model, x):
        for mask in plain(self, model, x):
            made.append(weakref.ref(mask))
            assert sum(ref() is not None for ref in made) <= 4
            yield mask
            del mask

    monkeypatch.setattr(RISE, "_masks", watched)
    only(layered(), a_probe(), RISE(30, perturbations_per_pass=2))
    assert len(made) == 30


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_the_cost_is_what_is_counted(window):
    """A pass for each mask and window."""
    probe, net = a_probe((8, 8, 12)), Counting(layered())
    predictor = Predictor(net, window)
    windows = len(predictor.windows(probe.shape).places)
    predictor.rehearse(probe.image[(slice(None), *predictor.windows(probe.shape).places[0])])
    before = net.counts["forward"]
    explain(predictor, probe, {"t": EVERYWHERE}, {"m": RISE(11)})
    assert RISE(11).extra_passes((8, 8, 12), windows).forward == 11 * windows
    assert net.counts["forward"] - before == windows + 11 * windows
    assert net.counts["backward"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "`RISE(samples=1)` must be at least 2"),
        ({"cells": 0}, "`RISE(cells=0)` must be at least 1"),
        ({"keep": 0.0}, "`RISE(keep=0.0)` must lie between 0 and 1"),
        ({"keep": 1}, "`RISE(keep=1)` must lie between 0 and 1"),
        ({"perturbations_per_pass": 0}, "`RISE(perturbations_per_pass=0)` must be at least 1 or"),
        ({"sigma_mm": -1.0}, "`sigma_mm` must be positive"),
    ],
)
def test_wrong_settings_die_at_once(settings, message):
    """When the method is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        RISE(**settings)
