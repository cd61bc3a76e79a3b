"""Network x method: every cell is right, or says why there is none."""

from __future__ import annotations

import dataclasses
import sys
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from nets_for_tests import close

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import matrix
import plain_methods as plainly
from networks import NETWORKS, STYLES, network
from plain_methods import Plain

from lightning_segxai import ClassEvidence, examine
from lightning_segxai.methods.supervoxels import per_voxel, supervoxels

FEWER = {
    "IntegratedGradients": {"steps": 8},
    "LayerConductance": {"steps": 8},
    "InternalInfluence": {"steps": 8},
    "ExpectedGradients": {"samples": 6},
    "LayerGradientShap": {"samples": 6},
    "LayerIntegratedGradients": {"steps": 4},
    "ShapleyValueSampling": {"samples": 1},
    "KernelShap": {"samples": 16},
    "Lime": {"samples": 16},
    "RISE": {"samples": 8},
}
"""Equal to a plain form with these, a method is with more of them."""

METHODS = {
    name: dataclasses.replace(method, **FEWER.get(name, {}))
    for name, method in matrix.METHODS.items()
}

EXPECTED_REFUSALS: dict[tuple[str, str], str] = {}
"""Cells that cannot be had, with the useful part of their reason."""

COMPLETE = {
    "DeepLift": 1e-6,
    "DeepLiftShap": 1e-6,
    "ShapleyValueSampling": 1e-4,
    "KernelShap": 1e-3,
}
"""Methods that are held to their axiom, and the error that they may have."""

BY_SCORES = {"FeaturePermutation", "Lime", "RISE", "ScoreCAM"}
"""Methods that know the network by its scores only; their own tests write them down plainly."""

SINGLE = {"Occlusion", "FeatureAblation"}
"""Captum gives these in float32."""

PRODUCTS = {"MONAI AttentionUnet", "UNet3d attention"}
"""Networks with gates; how relevance goes through a product is tested in `tests/rules`."""

SUMS = {"MONAI UNet", "MONAI SegResNet"}
"""Networks that add branches; how excitation shares a sum out is tested in `tests/rules`."""

RELEVANCES = {"LRP", "ExcitationBackprop", "ContrastiveExcitationBackprop"}


@lru_cache(maxsize=None)
def cells(name):
    """The matrix's cells of a network, by method."""
    with mock.patch.dict(matrix.METHODS, METHODS):
        return {cell.method: cell for cell in matrix.cells(name)}


@lru_cache(maxsize=None)
def plain(name):
    """The network, to be looked at plainly."""
    cell = cells(name)["GradCAM"]
    return Plain(network(name), cell.probe, cell.layer)


def modular(name):
    """The same network with modules that can be replaced."""
    return plain("module ReLU" if name.startswith(("functional", "method")) else name)


# --- the plain forms, summed over the region


@lru_cache(maxsize=1)
def line(name):
    """From the baseline to the volume: nodes, weights, and what is seen at them and both ends."""
    p = plain(name)
    t, w = plainly.nodes(METHODS["IntegratedGradients"].steps)
    return t, w, p.look([p.blurred, *(p.line(at) for at in t), p.x])


@lru_cache(maxsize=1)
def scattered(name):
    """The points of expected gradients, and what is seen at them."""
    p = plain(name)
    generator = torch.Generator().manual_seed(0)
    trajectory = METHODS["ExpectedGradients"].trajectory
    [points] = trajectory.groups(p.x, p.probe, generator)
    return points, p.look([point.input for point in points])


def integrated(p, name):
    _, w, (gradient, _, _) = line(name)
    return ((p.x - p.blurred) * torch.einsum("n,ncijk->cijk", w, gradient[1:-1])).sum(0)


def conductance(p, name):
    t, w, (_, layer, of_layer) = line(name)
    return p.spread(plainly.conductance(t, w, layer, of_layer))


def influence(p, name):
    _, w, (_, _, of_layer) = line(name)
    return p.grid(torch.einsum("n,ncijk->ijk", w, of_layer[1:-1]))


def expected(p, name):
    points, (gradient, _, _) = scattered(name)
    return sum(
        point.weight * ((p.x - point.baseline) * g).sum(0)
        for point, g in zip(points, gradient, strict=True)
        if point.weight
    )


def layer_expected(p, name):
    points, (_, layer, of_layer) = scattered(name)
    starts = {id(q.baseline): a for q, a in zip(points, layer, strict=True) if not q.along}
    return p.spread(
        sum(
            q.weight * ((layer[0] - starts[id(q.baseline)]) * g).sum(0)
            for q, g in zip(points, of_layer, strict=True)
            if q.weight
        )
    )


def cam(p, _):
    """Mean gradients weigh channels."""
    _, layer, g = p.here
    return p.grid(torch.einsum("c,cijk->ijk", g.mean((1, 2, 3)), layer)).relu()


def cam_plus_plus(p, _):
    _, layer, g = p.here
    share = g**2 / (2 * g**2 + g**3 * layer.sum((1, 2, 3), keepdim=True))
    weights = torch.where(g == 0, 0, share * g.relu()).sum((1, 2, 3))
    return p.grid(torch.einsum("c,cijk->ijk", weights, layer)).relu()


def occluded(p, _):
    """Cubes of eight, of which a large volume's are too many: eight of them, else zero."""
    masks = []
    size = p.x.shape[-1]
    for i, j, k in torch.cartesian_prod(*[torch.arange(0, size, 8)] * 3).tolist():
        mask = torch.zeros(p.x.shape[1:], dtype=torch.bool)
        mask[i : i + 8, j : j + 8, k : k + 8] = True
        masks.append(mask)
    masks = masks[:: len(masks) // 8]
    falls = plainly.fallen(p, masks)
    return sum(fall * mask for fall, mask in zip(falls, masks, strict=True)), sum(masks)


def ablated(p, _):
    numbers = supervoxels(p.x, p.probe.spacing_mm, 8, METHODS["FeatureAblation"].compactness)
    falls = plainly.fallen(p, [numbers == n for n in range(int(numbers.max()) + 1)])
    return per_voxel(torch.tensor(falls), numbers)


PLAIN = {
    "Saliency": lambda p, _: p.here[0].abs().amax(0),
    "InputXGradient": lambda p, _: (p.x * p.here[0]).sum(0),
    "SmoothGrad": lambda p, _: plainly.noisy_saliencies(p, 3, True).mean(0),
    "SquareGrad": lambda p, _: (plainly.noisy_saliencies(p, 3, False) ** 2).mean(0) / p.voxels,
    "VarGrad": lambda p, _: plainly.noisy_saliencies(p, 3, False).var(0, correction=0) / p.voxels,
    "IntegratedGradients": integrated,
    "ExpectedGradients": expected,
    "GuidedBackprop": lambda _, name: plainly.guided(modular(name), True),
    "Deconvolution": lambda _, name: plainly.guided(modular(name), False),
    "GuidedGradCAM": lambda p, name: plainly.guided(modular(name), True) * cam(p, name),
    "GradCAM": cam,
    "GradCAMPlusPlus": cam_plus_plus,
    "HiResCAM": lambda p, _: p.grid((p.here[1] * p.here[2]).sum(0)).relu(),
    "LayerCAM": lambda p, _: p.grid((p.here[1] * p.here[2].relu()).sum(0)).relu(),
    "LayerActivation": lambda p, _: p.grid(p.here[1].sum(0)),
    "LayerGradientXActivation": lambda p, _: p.spread((p.here[1] * p.here[2]).sum(0)),
    "LayerConductance": conductance,
    "InternalInfluence": influence,
    "LayerGradientShap": layer_expected,
    "LayerIntegratedGradients": lambda p, _: p.spread(
        plainly.walking_layer(p, METHODS["LayerIntegratedGradients"].steps)
    ),
    "LayerDeepLift": lambda p, name: p.spread(plainly.rescaled_layer(modular(name).at(p.layer))),
    "LRP": lambda _, name: plainly.relevance(modular(name)),
    "ExcitationBackprop": lambda _, name: plainly.relevance(modular(name), True),
    "ContrastiveExcitationBackprop": lambda _, name: (
        plainly.relevance(modular(name), True) - plainly.relevance(modular(name), True, True)
    ),
    "Occlusion": occluded,
    "FeatureAblation": ablated,
}


ZERO = {}
"""Networks in which nothing that is positive comes back from the logits."""


def unruled(name, method):
    """Whether there is no plain form of a rule for the network."""
    if method in ("LRP", "LayerDeepLift"):
        return name in PRODUCTS
    return "Excitation" in method and name in PRODUCTS | SUMS


def held(cell):
    """What must be true of relevance whatever the network."""
    total = float(cell.values.sum())
    if cell.method == "LRP":
        error = abs(total - cell.score) / abs(cell.score)
        assert cell.completeness_error == pytest.approx(error, rel=1e-9)
    elif cell.method == "ExcitationBackprop":
        assert float(cell.values.min()) >= -1e-12
        assert total <= 1 + 1e-6
    elif cell.method == "ContrastiveExcitationBackprop":
        assert -1 - 1e-6 <= total <= 1 + 1e-6


def test_every_method_is_compared():
    """A method that is added to the matrix needs a plain form, an axiom, or a test of its own."""
    assert {*PLAIN, *COMPLETE, *BY_SCORES} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_cell(name, method):
    """It equals its plain form, or is complete; a refusal is one that is expected."""
    cell = cells(name)[method]
    if (name, method) in EXPECTED_REFUSALS:
        assert cell.status == "unsupported"
        assert EXPECTED_REFUSALS[name, method] in cell.reason
        return
    assert cell.status == "ok", cell.reason
    assert cell.values.shape == cell.probe.shape
    assert bool(torch.isfinite(cell.values).all())
    p = plain(name)
    if method in COMPLETE:
        assert cell.values.any()
        assert cell.completeness_error <= COMPLETE[method]
    elif method in BY_SCORES:
        assert cell.values.any() or method == "Lime"  # whose penalty may leave nothing
    elif unruled(name, method):
        held(cell)
    else:
        expected, values = PLAIN[method](p, name), cell.values
        if method == "Occlusion":
            expected, hidden = expected
            values = values * hidden
        share = p.voxels if METHODS[method].shares_score else 1
        if name not in ZERO.get(method, ()):
            close(values, expected / share, 1e-5 if method in SINGLE else 1e-8)
        else:
            assert not values.any()
            assert not expected.any()


def test_cells_repeat():
    """The matrix is the same each time: all that is drawn is seeded."""
    name = "module ReLU"
    with mock.patch.dict(matrix.METHODS, METHODS):
        again = matrix.cells(name)
    for cell in again:
        assert torch.equal(cell.values, cells(name)[cell.method].values), cell.method


def test_styles_agree():
    """However a ReLU is written, each method gives the same map."""
    methods = {
        name: dataclasses.replace(method, layer="deep_norm") if method.layer else method
        for name, method in METHODS.items()
    }
    probe = matrix.probe(8)
    found = {}
    for style in STYLES:
        net = network(f"{style} ReLU", seed=1)
        made = examine(net, [probe], {"cube": ClassEvidence(1)}, methods)
        found[style] = {cell.method: cell for cell in made}
    for method, cell in found["module"].items():
        assert cell.status == "ok", cell.reason
        assert cell.values.any() or method == "Lime", method
        for style in STYLES:
            close(found[style][method].values, cell.values, 1e-10)


def test_doubt_is_told():
    """A cell that breaks its axiom is marked, as is one that cancels; others are not."""
    found = cells("MONAI SegResNet")
    broken, cancels, fine = (found[m] for m in ("LRP", "DeepLiftShap", "DeepLift"))
    assert broken.completeness_error > 0.1
    assert cancels.completeness_error < 1e-6
    assert cancels.cancellation > 1000
    assert broken.doubtful
    assert cancels.doubtful
    assert not fine.doubtful
    assert matrix.verdict(broken).startswith("marked: ")
    assert f"cancels {cancels.cancellation:.0f}" in matrix.verdict(cancels)
    assert matrix.verdict(fine).startswith("ok ")
    refused = dataclasses.replace(fine, status="unsupported", reason="there is none")
    assert matrix.verdict(refused) == "refused: there is none"
