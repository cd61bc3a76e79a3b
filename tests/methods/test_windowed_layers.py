"""Methods of layers and of paths against slow plain ones, on whole volumes and by windows.

By windows, gradients are those of the whole plainly blended score, by autograd.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets_for_tests import a_probe, blended, close, layered, pieces
from torch.nn.functional import interpolate

from lightning_segxai.baselines import Baseline, draws
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAMPlusPlus, HiResCAM, LayerCAM
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.layer_integral import LayerIntegratedGradients
from lightning_segxai.methods.layer_paths import (
    InternalInfluence,
    LayerConductance,
    LayerGradientShap,
)
from lightning_segxai.methods.layers import LayerGradientXActivation
from lightning_segxai.methods.noise import SquareGrad, VarGrad
from lightning_segxai.methods.paths import ExpectedGradients, IntegratedGradients
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassMargin
from lightning_segxai.windows import Windows

NET = layered(channels=2, classes=3)
TARGET = ClassMargin(2, 1)
EDGE = (8, 8, 8)
CASES = [(None, (8, 12, 6)), (EDGE, (13, 8, 12)), (EDGE, (5, 11, 8)), (EDGE, (8, 12, 6))]


class Plain:
    """A probe, the window it is seen by, and its blended score, written down plainly."""

    def __init__(self, window, shape):
        self.window, self.shape = window, shape
        self.probe = a_probe(shape, 2, classes=3)
        self.x = self.probe.image
        self.padded = window or shape
        self.places = Windows(shape, self.padded).places
        with torch.no_grad():
            self.weights = TARGET.weights(self.probe, blended(NET, self.x, window))
        self.voxels = int((self.probe.label == 2).sum())

    def baseline(self, kind, sigma_mm=2.0, generator=None, x=None):
        generator = generator or torch.Generator().manual_seed(0)
        return Baseline(kind, sigma_mm).make(self.x if x is None else x, (1, 1, 1), generator)

    def score(self, x):
        return (self.weights * blended(NET, x, self.window)).sum()

    def gradient(self, x):
        x = x.detach().clone().requires_grad_()
        [gradient] = torch.autograd.grad(self.score(x), x)
        return gradient

    def layers(self, x):
        """Each window's activation, and the blended score's gradient with respect to it."""
        found = pieces(NET, x, self.window)
        score = sum((self.weights * share * logits).sum() for share, logits, _ in found)
        deeps = [deep for *_, deep in found]
        gradients = torch.autograd.grad(score, deeps)
        return [(d[0].detach(), g[0]) for d, g in zip(deeps, gradients, strict=True)]

    def replaced(self, deeps):
        """The blended score with other values in the place of each window's layer."""
        total = 0.0
        windows = Windows(self.shape, self.padded)
        for place, deep in zip(self.places, deeps, strict=True):
            i, j, k = (s.stop - s.start for s in place)
            logits = NET.tail(deep[None])[0, :, :i, :j, :k]
            share = windows.share(place, self.x.dtype)
            total = total + (self.weights[(slice(None), *place)] * share * logits).sum()
        return total

    def gathered(self, parts, bring, shares=False):
        """Maps of windows, brought to the grid and added up, or blended as logits are."""
        windows = Windows(self.shape, self.padded)
        total = torch.zeros(self.shape, dtype=torch.float64)
        for place, part in zip(self.places, parts, strict=True):
            share = windows.share(place, self.x.dtype) if shares else 1
            total[place] += bring(part, place) * share
        return total

    def up(self, part, place):
        """Trilinear interpolation, cropped."""
        i, j, k = (s.stop - s.start for s in place)
        whole = interpolate(part[None, None], self.padded, mode="trilinear")[0, 0]
        return whole[:i, :j, :k]

    def spread(self, part, place):
        """Each voxel's trilinear footprint, scaled to sum to one; padding goes to the last one."""
        total = torch.zeros(self.padded, dtype=torch.float64)
        for index in np.ndindex(*part.shape):
            one = torch.zeros_like(part)
            one[index] = 1
            footprint = interpolate(one[None, None], self.padded, mode="trilinear")[0, 0]
            total += part[index] * footprint / footprint.sum()
        for axis, s in enumerate(place):
            edge = s.stop - s.start
            rest = total.narrow(axis, edge, total.shape[axis] - edge).sum(dim=axis, keepdim=True)
            total = total.narrow(axis, 0, edge).clone()
            total.narrow(axis, edge - 1, 1).add_(rest)
        return total


@pytest.fixture(params=CASES, ids=str)
def plain(request):
    return Plain(*request.param)


def found_by(plain, method, **settings):
    predictor = Predictor(NET, plain.window, **settings)
    [found] = explain(predictor, plain.probe, {"t": TARGET}, {"m": method})
    assert found.status == "ok"
    return found


def ours(plain, method, **settings):
    return found_by(plain, method, **settings).values


def quadrature(steps):
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [((float(t) + 1) / 2, float(w) / 2) for t, w in zip(nodes, weights, strict=True)]


def test_grad_cam_plus_plus(plain):
    """Voxel by voxel and channel by channel, as in the paper; both sums go over all windows."""
    windows = plain.layers(plain.x)
    channels = len(windows[0][0])
    sums = [sum(float(a[k].sum()) for a, _ in windows) for k in range(channels)]
    weights = []
    for k in range(channels):
        total = 0.0
        for _, gradient in windows:
            for g in gradient[k].flatten().tolist():
                if g > 0:
                    total += g**2 / (2 * g**2 + g**3 * sums[k]) * g
        weights.append(total)
    parts = [sum(w * a[k] for k, w in enumerate(weights)) for a, _ in windows]
    close(ours(plain, GradCAMPlusPlus("act")), plain.gathered(parts, plain.up, shares=True).relu())


def test_layer_cam(plain):
    """Each window's activation times its positive gradient, added up."""
    parts = [(a * g.clamp_min(0)).sum(0) for a, g in plain.layers(plain.x)]
    close(ours(plain, LayerCAM("act")), plain.gathered(parts, plain.up).relu())


def test_layer_gradient_x_activation(plain):
    """Each window's activation times its gradient, shared out and added up."""
    parts = [(a * g).sum(0) for a, g in plain.layers(plain.x)]
    expected = plain.gathered(parts, plain.spread) / plain.voxels
    found = ours(plain, LayerGradientXActivation("act"))
    close(found, expected)
    total = float(sum(part.sum() for part in parts)) / plain.voxels
    assert float(found.sum()) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("kind", ["blurred", "minimum", "noise"])
def test_internal_influence(plain, kind):
    """The gradient of the blended score at each window's layer, on the whole volume's path."""
    start = plain.baseline(kind)
    parts = [0.0] * len(plain.places)
    for t, w in quadrature(3):
        for n, (_, g) in enumerate(plain.layers(start + t * (plain.x - start))):
            parts[n] = parts[n] + w * g.sum(0)
    expected = plain.gathered(parts, plain.up) / plain.voxels
    close(ours(plain, InternalInfluence("act", 3, kind, 2.0)), expected)


@pytest.mark.parametrize("kind", ["blurred", "noise"])
@pytest.mark.parametrize("steps", [1, 4])
def test_layer_conductance(plain, kind, steps):
    """Each node's gradient times what the layer, interpolated, gains over the node's own part."""
    start = plain.baseline(kind)
    nodes = quadrature(steps)
    ts = [0.0, *(t for t, _ in nodes), 1.0]
    cuts = np.cumsum([0.0, *(w for _, w in nodes)])
    seen = [plain.layers(start + t * (plain.x - start)) for t in ts]
    parts = []
    for n in range(len(plain.places)):
        known = np.stack([at_point[n][0].numpy() for at_point in seen])
        flat = known.reshape(len(ts), -1)
        at_cuts = np.stack([np.interp(cuts, ts, flat[:, v]) for v in range(flat.shape[1])], axis=1)
        gains = torch.from_numpy(np.diff(at_cuts, axis=0)).reshape(steps, *known.shape[1:])
        gradients = torch.stack([at_point[n][1] for at_point in seen[1:-1]])
        parts.append((gradients * gains).sum(dim=(0, 1)))
    expected = plain.gathered(parts, plain.spread) / plain.voxels
    close(ours(plain, LayerConductance("act", steps, kind, 2.0)), expected)


@pytest.mark.parametrize("kind", ["blurred", "noise"])
@pytest.mark.parametrize("steps", [1, 4])
def test_layer_integrated_gradients(plain, kind, steps):
    """Each window's own layer walks, all else stays; the score is the blended one."""
    start = plain.baseline(kind)
    here = [a for a, _ in plain.layers(plain.x)]
    there = [a for a, _ in plain.layers(start)]
    totals = [0.0] * len(here)
    for t, w in quadrature(steps):
        inner = [(b + t * (a - b)).requires_grad_() for a, b in zip(here, there, strict=True)]
        gradients = torch.autograd.grad(plain.replaced(inner), inner)
        totals = [total + w * g for total, g in zip(totals, gradients, strict=True)]
    parts = [((a - b) * g).sum(0) for a, b, g in zip(here, there, totals, strict=True)]
    found = found_by(plain, LayerIntegratedGradients("act", steps, kind, 2.0))
    close(found.values, plain.gathered(parts, plain.spread) / plain.voxels)

    with torch.no_grad():
        gained = float(plain.replaced(here) - plain.replaced(there))
        assert float(plain.score(plain.x)) == pytest.approx(float(plain.replaced(here)), rel=1e-10)
    total = float(sum(part.sum() for part in parts))
    assert found.completeness_error == pytest.approx(abs(total / gained - 1), abs=1e-9)


def drawn(plain, samples, baselines, noise):
    """The points of a scatter, drawn once more by hand: weight, start, end and input of each."""
    generator = torch.Generator().manual_seed(0)
    starts = [recipe.make(plain.x, (1, 1, 1), generator) for recipe in draws(baselines, 2.0)]
    shares = torch.rand(samples, generator=generator)
    width = noise * (plain.x.max() - plain.x.min())
    points = []
    for n in range(samples):
        end = plain.x
        if noise:
            end = end + width * torch.randn(end.shape, generator=generator, dtype=end.dtype)
        k = n % baselines
        of_baseline = sum(m % baselines == k for m in range(samples))
        t = (n // baselines + float(shares[n])) / of_baseline
        points.append((1 / baselines / of_baseline, k, end, starts[k] + t * (end - starts[k])))
    return starts, points


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("samples", "baselines"), [(1, 1), (5, 3), (6, 3)])
def test_expected_gradients(plain, samples, baselines, noise):
    """On the same draws: baselines and noise of the whole volume."""
    starts, points = drawn(plain, samples, baselines, noise)
    expected = sum(
        weight * (end - starts[k]) * plain.gradient(at) for weight, k, end, at in points
    ).sum(0)
    found = found_by(plain, ExpectedGradients(samples, baselines, noise, 2.0))
    close(found.values, expected / plain.voxels)
    with torch.no_grad():
        gained = float(plain.score(plain.x) - sum(map(plain.score, starts)) / baselines)
    off = abs(float(expected.sum()) / gained - 1)
    assert found.completeness_error == pytest.approx(off, rel=1e-8)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("samples", "baselines"), [(1, 1), (5, 3)])
def test_layer_gradient_shap(plain, samples, baselines, noise):
    """On the same draws; the layer's difference is that of the volume itself."""
    starts, points = drawn(plain, samples, baselines, noise)
    here = [a for a, _ in plain.layers(plain.x)]
    there = [[a for a, _ in plain.layers(start)] for start in starts]
    parts = [0.0] * len(here)
    for weight, k, _, at in points:
        for n, (_, g) in enumerate(plain.layers(at)):
            parts[n] = parts[n] + weight * ((here[n] - there[k][n]) * g).sum(0)
    expected = plain.gathered(parts, plain.spread) / plain.voxels
    close(ours(plain, LayerGradientShap("act", samples, baselines, noise, 2.0)), expected)


def copies(plain, samples, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    width = noise * (plain.x.max() - plain.x.min())
    return [
        plain.x + width * torch.randn(plain.x.shape, generator=generator, dtype=torch.float64)
        for _ in range(samples)
    ]


def test_square_and_variance_of_saliency(plain):
    """Over copies of the whole volume, of the whole gradient."""
    maps = torch.stack([plain.gradient(copy).sum(0) for copy in copies(plain, 3)])
    square = ours(plain, SquareGrad(samples=3))
    close(square, (maps**2).mean(0) / plain.voxels**2)
    variance = ours(plain, VarGrad(samples=3))
    close(variance, maps.var(0, correction=0) / plain.voxels**2)


def test_variance_of_a_layers_map(plain):
    """Of maps that are gathered over windows, copy by copy."""
    maps = torch.stack(
        [
            plain.gathered([(a * g).sum(0) for a, g in plain.layers(copy)], plain.up)
            for copy in copies(plain, 3)
        ]
    )
    close(ours(plain, VarGrad(HiResCAM("act", relu=False), 3)), maps.var(0, correction=0))
    close(ours(plain, SquareGrad(HiResCAM("act", relu=False), 3)), (maps**2).mean(0))


def test_square_of_a_path(plain):
    """A copy's path starts at the copy's own baseline; its map is squared as a whole."""
    maps = []
    for copy in copies(plain, 2):
        start = plain.baseline("blurred", 2.0, x=copy)
        slopes = sum(w * plain.gradient(start + t * (copy - start)) for t, w in quadrature(2))
        maps.append(((copy - start) * slopes).sum(0))
    expected = (torch.stack(maps) ** 2).mean(0) / plain.voxels**2
    close(ours(plain, SquareGrad(IntegratedGradients(2, "blurred", 2.0), 2)), expected)


def test_copies_of_copies(plain):
    """An inner cloud of two around each of three copies is finished with its own last copy."""
    generator = torch.Generator().manual_seed(0)

    def copy_of(x, noise):
        width = noise * (x.max() - x.min())
        return x + width * torch.randn(x.shape, generator=generator, dtype=torch.float64)

    squares = []
    for _ in range(3):
        outer = copy_of(plain.x, 0.2)
        inner = [plain.gradient(copy_of(outer, 0.1)).sum(0) ** 2 for _ in range(2)]
        squares.append(sum(inner) / 2)
    method = VarGrad(SquareGrad(Saliency(absolute=False), 2, 0.1), 3, 0.2)
    variance = torch.stack(squares).var(0, correction=0)
    close(ours(plain, method), variance / plain.voxels**4)


METHODS = [
    GradCAMPlusPlus("act"),
    LayerCAM("act"),
    LayerGradientXActivation("act"),
    InternalInfluence("act", 3),
    LayerConductance("act", 3),
    LayerGradientShap("act", 5, 2),
    LayerIntegratedGradients("act", 3),
    ExpectedGradients(5, 2, 0.1),
    SquareGrad(Saliency(absolute=False), 2),
    VarGrad(GradCAMPlusPlus("act"), 2),
    SquareGrad(LayerConductance("act", 2), 2),
]


@pytest.mark.parametrize("looks_per_pass", [1, 3, 50])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_batch_does_not_matter(method, looks_per_pass):
    """Windows and points are independent of each other."""
    plain = Plain(EDGE, (13, 8, 9))
    close(ours(plain, method, looks_per_pass=looks_per_pass), ours(plain, method))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_window_of_the_volumes_size_is_the_whole(method):
    """Bit by bit."""
    whole, window = Plain(None, EDGE), Plain(EDGE, EDGE)
    assert torch.equal(ours(window, method), ours(whole, method))
