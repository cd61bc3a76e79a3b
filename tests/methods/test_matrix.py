"""Network x method: every cell is right, or says why there is none."""

from __future__ import annotations

import dataclasses
import sys
from functools import cache, lru_cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from nets_for_tests import close

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import matrix
import plain_methods as plainly
import plain_rules
from networks import NETWORKS, STYLES, network
from plain_methods import Plain

from lightning_segxai import ClassEvidence, examine
from lightning_segxai.methods.supervoxels import per_voxel, supervoxels

FEWER = {
    "IntegratedGradients": {"steps": 6},
    "LayerConductance": {"steps": 6},
    "InternalInfluence": {"steps": 6},
    "ExpectedGradients": {"samples": 5},
    "LayerGradientShap": {"samples": 5},
    "LayerIntegratedGradients": {"steps": 3},
    "ShapleyValueSampling": {"samples": 1},
    "KernelShap": {"samples": 10},
    "Lime": {"samples": 10},
    "RISE": {"samples": 4},
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


def computed(name):
    """The matrix's cells of a network, by method."""
    with mock.patch.dict(matrix.METHODS, METHODS):
        return {cell.method: cell for cell in matrix.cells(name)}


cells = cache(computed)


@cache
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
    """Eight cubes of eight voxels, which are all of the smaller volumes; and where they are."""
    masks = []
    size = p.x.shape[-1]
    for i, j, k in torch.cartesian_prod(*[torch.arange(0, size, 8)] * 3).tolist():
        mask = torch.zeros(p.x.shape[1:], dtype=torch.bool)
        mask[i : i + 8, j : j + 8, k : k + 8] = True
        masks.append(mask)
    masks = masks if len(masks) == 8 else masks[5::8]  # among them the labeled cube's
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
    "GuidedBackprop": lambda _, name: plain_rules.guided(modular(name)),
    "Deconvolution": lambda _, name: plain_rules.guided(modular(name), False),
    "GuidedGradCAM": lambda p, name: plain_rules.guided(modular(name)) * cam(p, name),
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
    "LayerDeepLift": lambda p, name: p.spread(
        plain_rules.rescaled_layer(modular(name).at(p.layer))
    ),
    "LayerGuidedBackprop": lambda p, name: plain_rules.guided(
        modular(name).at(p.layer), of_layer=True
    ),
    "LRP": lambda _, name: plain_rules.relevance(modular(name)),
    "ExcitationBackprop": lambda _, name: plain_rules.relevance(modular(name), True),
    "ContrastiveExcitationBackprop": lambda _, name: (
        plain_rules.relevance(modular(name), True)
        - plain_rules.relevance(modular(name), True, True)
    ),
    "Occlusion": occluded,
    "FeatureAblation": ablated,
}


ZERO = dict.fromkeys(("GradCAM", "GuidedGradCAM"), ("UNet3d", "UNet3d multi-scale"))
"""Networks whose weighted channels speak against the target everywhere."""


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
    held(cell)
    p = plain(name)
    if method in COMPLETE:
        assert cell.values.any()
        assert cell.completeness_error <= COMPLETE[method]
    elif method in BY_SCORES:
        assert cell.values.any() or method == "Lime"  # whose penalty may leave nothing
    elif unruled(name, method):
        assert cell.values.any()
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
    first = cells("module ReLU")
    for method, cell in computed("module ReLU").items():
        assert torch.equal(cell.values, first[method].values), method


def test_styles_agree():
    """However a ReLU is written, each method gives the same map."""
    methods = {
        name: dataclasses.replace(method, layer="deep_norm") if method.layer else method
        for name, method in METHODS.items()
    }
    probe = matrix.probe(8)
    found = {}
    for style in STYLES:
        net = network(f"{style} ReLU")
        made = examine(net, [probe], {"cube": ClassEvidence(1)}, methods)
        found[style] = {cell.method: cell for cell in made}
    for method, cell in found["module"].items():
        assert cell.status == "ok", cell.reason
        for style in STYLES:
            close(found[style][method].values, cell.values, 1e-10)


def test_doubt_is_told():
    """A cell that breaks its axiom is marked, as is one that cancels; others are not."""
    fine, broken = (cells("MONAI DynUNet")[m] for m in ("DeepLift", "LRP"))
    cancels = dataclasses.replace(fine, cancellation=1001.0)
    refused = dataclasses.replace(fine, status="unsupported", reason="there is none")
    assert broken.completeness_error > 0.1
    assert [one.doubtful for one in (fine, broken, cancels)] == [False, True, True]
    error = f"{broken.completeness_error:.1e}"
    assert matrix.verdict(fine) == f"ok {fine.completeness_error:.1e}"
    assert matrix.verdict(broken) == f"marked: {error}, cancels {broken.cancellation:.0f}"
    assert matrix.verdict(cancels) == f"marked: {cancels.completeness_error:.1e}, cancels 1001"
    assert matrix.verdict(refused) == "refused: there is none"
    assert matrix.verdict(cells("MONAI DynUNet")["Saliency"]) == "ok"
