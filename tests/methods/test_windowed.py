"""Attribution by windows is that of the whole blended sliding-window score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets_for_tests import a_probe, blended, close, layered, pieces
from torch.nn.functional import interpolate

from lightning_segxai.baselines import Baseline
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.layers import LayerActivation
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassMargin
from lightning_segxai.windows import Windows

NET = layered(channels=2, classes=3)
WINDOW = (8, 8, 8)
SHAPES = [(13, 16, 12), (5, 11, 8), (8, 12, 6)]
TARGET = ClassMargin(2, 1)


@pytest.fixture(params=SHAPES, ids=str)
def probe(request):
    return a_probe(request.param, 2, classes=3)


def ours(probe, method, **settings):
    predictor = Predictor(NET, WINDOW, **settings)
    [found] = explain(predictor, probe, {"t": TARGET}, {"m": method})
    assert found.status == "ok"
    return found.values


def region(probe):
    return int((probe.label == 2).sum())


def weights_of(probe):
    with torch.no_grad():
        return TARGET.weights(probe, blended(NET, probe.image, WINDOW))


def gradient(probe, x):
    """Plain autograd through the whole blended score."""
    x = x.detach().clone().requires_grad_()
    (weights_of(probe) * blended(NET, x, WINDOW)).sum().backward()
    return x.grad


def test_saliency(probe):
    """Largest absolute gradient of the whole, not of any window."""
    plain = gradient(probe, probe.image)
    close(ours(probe, Saliency()), plain.abs().amax(0) / region(probe))
    close(ours(probe, Saliency(absolute=False)), plain.sum(0) / region(probe))


def test_input_x_gradient(probe):
    """The whole volume times its gradient."""
    plain = (probe.image * gradient(probe, probe.image)).sum(0)
    close(ours(probe, InputXGradient()), plain / region(probe))


@pytest.mark.parametrize("kind", ["blurred", "minimum", "noise"])
def test_integrated_gradients(probe, kind):
    """The baseline is the whole volume's."""
    start = Baseline(kind, 2.0).make(probe.image, (1, 1, 1), torch.Generator().manual_seed(0))
    nodes, weights = np.polynomial.legendre.leggauss(4)
    way = probe.image - start
    plain = sum(
        w / 2 * gradient(probe, start + (t + 1) / 2 * way)
        for t, w in zip(nodes, weights, strict=True)
    )
    close(ours(probe, IntegratedGradients(4, kind, 2.0)), (way * plain).sum(0) / region(probe))


def test_integrated_gradients_are_complete_by_windows(probe):
    """The sum of the map is the difference of blended scores, up to quadrature."""
    predictor = Predictor(NET, WINDOW)
    [found] = explain(predictor, probe, {"t": TARGET}, {"m": IntegratedGradients(24, "zero")})
    assert found.completeness_error < 1e-2


def test_smooth_grad(probe):
    """The noise is the whole volume's."""
    generator = torch.Generator().manual_seed(0)
    deviation = 0.1 * (probe.image.max() - probe.image.min())
    plain = sum(
        gradient(
            probe,
            probe.image
            + deviation * torch.randn(probe.image.shape, generator=generator, dtype=torch.float64),
        )
        .abs()
        .amax(0)
        for _ in range(3)
    )
    close(ours(probe, SmoothGrad(Saliency(), 3)), plain / 3 / region(probe))


def layer_gradients(probe):
    """For each window its place, share, activation and gradient of the blended score."""
    found = pieces(NET, probe.image, WINDOW)
    score = sum((weights_of(probe) * share * logits).sum() for share, logits, _ in found)
    gradients = torch.autograd.grad(score, [deep for *_, deep in found])
    places = Windows(tuple(probe.shape), WINDOW).places
    return [
        (place, share, deep.detach(), g)
        for place, (share, _, deep), g in zip(places, found, gradients, strict=True)
    ]


def up(channels, place):
    size = [s.stop - s.start for s in place]
    whole = interpolate(channels.sum(1, keepdim=True), WINDOW, mode="trilinear")[0, 0]
    return whole[: size[0], : size[1], : size[2]]


@pytest.mark.parametrize("relu", [True, False])
def test_hires_cam(probe, relu):
    """Each window's activation times its gradient, added up."""
    plain = torch.zeros(tuple(probe.shape), dtype=torch.float64)
    for place, _, activation, g in layer_gradients(probe):
        plain[place] += up(activation * g, place)
    close(ours(probe, HiResCAM("act", relu)), plain.relu() if relu else plain)


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam(probe, relu):
    """Weights pooled over all windows, activations blended as logits are."""
    windows = layer_gradients(probe)
    weights = torch.cat([g for *_, g in windows]).mean(dim=(0, 2, 3, 4))[:, None, None, None]
    plain = torch.zeros(tuple(probe.shape), dtype=torch.float64)
    for place, share, activation, _ in windows:
        plain[place] += up(activation * weights, place) * share[place]
    close(ours(probe, GradCAM("act", relu)), plain.relu() if relu else plain)


def test_layer_activation(probe):
    """Activations blended as logits are."""
    plain = torch.zeros(tuple(probe.shape), dtype=torch.float64)
    for place, share, activation, _ in layer_gradients(probe):
        plain[place] += up(activation, place) * share[place]
    close(ours(probe, LayerActivation("act")), plain)


def test_smooth_grad_around_a_layer():
    """Pooled and blended anew for every copy."""
    probe = a_probe((8, 12, 8), 2, classes=3)
    plain = ours(probe, GradCAM("act"))
    close(ours(probe, SmoothGrad(GradCAM("act"), 2, 0.0)), plain)
    assert not torch.allclose(ours(probe, SmoothGrad(GradCAM("act"), 2, 0.3)), plain)


def test_occlusion():
    """A plain loop over cubes of the whole volume, scored by windows."""
    probe = a_probe((11, 8, 5), 2, classes=3)
    weights = weights_of(probe)
    start = Baseline("blurred", 5.0).make(probe.image, (1, 1, 1), torch.Generator())

    def score(x):
        with torch.no_grad():
            return float((weights * blended(NET, x, WINDOW)).sum())

    total, count = torch.zeros(2, 11, 8, 5, dtype=torch.float64)
    for i in range(0, 11, 4):
        for j in range(0, 8, 4):
            for k in range(0, 2):
                cube = (slice(i, i + 4), slice(j, j + 4), slice(4 * k, 4 * k + 4))
                hidden = probe.image.clone()
                hidden[(slice(None), *cube)] = start[(slice(None), *cube)]
                total[cube] += score(probe.image) - score(hidden)
                count[cube] += 1
    close(ours(probe, Occlusion(4, 4)), total / count / region(probe), 1e-6)  # Captum: float32


@pytest.mark.parametrize("looks_per_pass", [1, 3, 50])
def test_the_batch_does_not_matter(looks_per_pass):
    """Windows are independent of each other."""
    probe = a_probe((13, 8, 9), 2, classes=3)
    for method in (Saliency(), IntegratedGradients(3), GradCAM(), SmoothGrad(HiResCAM(), 2)):
        close(ours(probe, method, looks_per_pass=looks_per_pass), ours(probe, method))


def test_overlap_matters():
    """Another blend is another predictor."""
    probe = a_probe((16, 8, 8), 2, classes=3)
    assert not torch.allclose(ours(probe, Saliency(), overlap=0.0), ours(probe, Saliency()))


def test_a_window_of_the_volumes_size_is_the_whole():
    """Bit by bit."""
    probe = a_probe((8, 8, 8), 2, classes=3)
    for method in (Saliency(), IntegratedGradients(3), GradCAM(), HiResCAM(), Occlusion(4, 4)):
        [whole] = explain(Predictor(NET), probe, {"t": TARGET}, {"m": method})
        assert torch.equal(ours(probe, method), whole.values)
