"""Our methods against Captum's, on whole volumes of a network with a layer at half resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum import attr
from nets_for_tests import a_probe, close, layered

from lightning_segxai.baselines import Baseline, draws
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.layer_integral import LayerIntegratedGradients
from lightning_segxai.methods.layer_paths import (
    InternalInfluence,
    LayerConductance,
    LayerGradientShap,
)
from lightning_segxai.methods.layers import LayerActivation, LayerGradientXActivation
from lightning_segxai.methods.noise import SmoothGrad, SquareGrad, VarGrad
from lightning_segxai.methods.paths import ExpectedGradients, IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.scored import Predictor
from lightning_segxai.taps import spread
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.trajectories import Scatter

NET = layered(channels=2, classes=3)
PROBE = a_probe((8, 12, 6), 2, classes=3, spacing_mm=(0.5, 1.0, 1.5))
INPUT = PROBE.image[None]
TARGET = ClassMargin(2, 1)
LOGITS = Predictor(NET).predict(PROBE.image)
WEIGHTS = TARGET.weights(PROBE, LOGITS)
VOXELS = int((PROBE.label == 2).sum())


def score(x):
    """The score that Captum explains, written down plainly."""
    return (WEIGHTS * NET(x)).sum(dim=(1, 2, 3, 4))


def ours(method, seed=0):
    [found] = explain(Predictor(NET), PROBE, {"t": TARGET}, {"m": method}, seed=seed)
    assert found.status == "ok"
    return found.values


def on_the_grid(layer):
    return attr.LayerAttribution.interpolate(layer, PROBE.shape, "trilinear")[0].sum(0).detach()


def test_saliency():
    """Largest absolute gradient over the channels."""
    theirs = attr.Saliency(score).attribute(INPUT.clone().requires_grad_(), abs=True)[0].amax(0)
    close(ours(Saliency()), theirs / VOXELS)
    signed = attr.Saliency(score).attribute(INPUT.clone().requires_grad_(), abs=False)[0].sum(0)
    close(ours(Saliency(absolute=False)), signed / VOXELS)


def test_input_x_gradient():
    """Channels summed."""
    theirs = attr.InputXGradient(score).attribute(INPUT.clone().requires_grad_())[0].sum(0).detach()
    close(ours(InputXGradient()), theirs / VOXELS)


@pytest.mark.parametrize("baseline", ["zero", "minimum", "noise", "blurred", 0.3])
@pytest.mark.parametrize("steps", [1, 6])
def test_integrated_gradients(baseline, steps):
    """Gauss-Legendre, from the same baseline."""
    start = Baseline(baseline, 1.0).make(
        PROBE.image, PROBE.spacing_mm, torch.Generator().manual_seed(4)
    )
    theirs = attr.IntegratedGradients(score).attribute(
        INPUT.clone().requires_grad_(), baselines=start[None], n_steps=steps, method="gausslegendre"
    )
    mine = ours(IntegratedGradients(steps, baseline, 1.0), seed=4)
    close(mine, theirs[0].sum(0).detach() / VOXELS, 1e-6)  # Captum's weights are float32


@pytest.mark.parametrize("layer", ["act", "body.0", "body.3", "tail.0"])
def test_grad_cam(layer):
    """Pooled gradients; a layer's own map, not divided by voxels."""
    cam = attr.LayerGradCam(score, NET.get_submodule(layer))
    theirs = cam.attribute(INPUT.clone().requires_grad_(), relu_attributions=False)
    close(ours(GradCAM(layer, relu=False)), on_the_grid(theirs))
    close(ours(GradCAM(layer)), on_the_grid(theirs).relu())


@pytest.mark.parametrize("layer", ["act", "body.0", "body.3"])
def test_hires_cam_without_relu_is_gradient_times_activation(layer):
    """The sum over the layer's channels."""
    theirs = attr.LayerGradientXActivation(score, NET.get_submodule(layer)).attribute(
        INPUT.clone().requires_grad_()
    )
    close(ours(HiResCAM(layer, relu=False)), on_the_grid(theirs))
    close(ours(HiResCAM(layer)), on_the_grid(theirs).relu())


def test_layer_activation():
    """Summed, and one channel."""
    theirs = attr.LayerActivation(score, NET.act).attribute(INPUT.clone().requires_grad_())
    close(ours(LayerActivation("act")), on_the_grid(theirs))
    close(ours(LayerActivation("act", 2)), on_the_grid(theirs[:, 2:3]))


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 2), (3, 2), (5, 5), (20, 10)])
def test_occlusion(size, stride):
    """Cubes that hide all channels; no larger than the volume."""
    edges = [min(size, axis) for axis in PROBE.shape]
    theirs = attr.Occlusion(score).attribute(
        INPUT.clone().requires_grad_(),
        sliding_window_shapes=(2, *edges),
        strides=(2, *(min(stride, edge) for edge in edges)),
        baselines=0.3,
    )
    close(
        ours(Occlusion(size, stride, 0.3)).double(), theirs[0, 0].double() / VOXELS, 1e-6
    )  # float32


@pytest.mark.parametrize(
    ("inner", "theirs"),
    [
        (Saliency(absolute=False), attr.Saliency(score)),
        (InputXGradient(), attr.InputXGradient(score)),
    ],
)
def test_smooth_grad_is_the_noise_tunnel_on_the_same_noise(monkeypatch, inner, theirs):
    """Captum draws its noise by `torch.normal`; it is given ours."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack(
        [torch.randn(PROBE.image.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    )
    monkeypatch.setattr(torch, "normal", lambda mean, deviations: noise * deviations)
    extra = {"abs": False} if isinstance(inner, Saliency) else {}
    width = 0.1 * float(PROBE.image.amax() - PROBE.image.amin())
    tunnel = attr.NoiseTunnel(theirs).attribute(
        INPUT.clone().requires_grad_(), nt_type="smoothgrad", nt_samples=3, stdevs=width, **extra
    )
    # Captum holds the deviation in float32
    close(ours(SmoothGrad(inner, 3, 0.1), 7), tunnel[0].sum(0).detach() / VOXELS, 1e-6)


def spread_out(layer):
    """A layer's own values on the grid of the volume, the sum kept."""
    return spread(
        layer[0].sum(0).detach(), tuple(PROBE.shape), tuple(slice(0, n) for n in PROBE.shape)
    )


@pytest.mark.parametrize("layer", ["act", "body.0", "body.3", "tail.0"])
def test_layer_gradient_x_activation(layer):
    """The sum over the layer's channels, shared out."""
    theirs = attr.LayerGradientXActivation(score, NET.get_submodule(layer)).attribute(
        INPUT.clone().requires_grad_()
    )
    close(ours(LayerGradientXActivation(layer)), spread_out(theirs) / VOXELS)


def start_of(baseline, seed=4):
    return Baseline(baseline, 1.0).make(
        PROBE.image, PROBE.spacing_mm, torch.Generator().manual_seed(seed)
    )[None]


@pytest.mark.parametrize("baseline", ["blurred", "noise", 0.3])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("layer", ["act", "body.0"])
def test_internal_influence(layer, steps, baseline):
    """The layer's gradients by Gauss-Legendre, interpolated."""
    theirs = attr.InternalInfluence(score, NET.get_submodule(layer)).attribute(
        INPUT.clone(), baselines=start_of(baseline), n_steps=steps, method="gausslegendre"
    )
    mine = ours(InternalInfluence(layer, steps, baseline, 1.0), seed=4)
    close(mine, on_the_grid(theirs) / VOXELS, 1e-6)  # Captum's weights may be float32


@pytest.mark.parametrize("baseline", ["blurred", "noise", 0.3])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("layer", ["act", "body.0", "body.2"])
def test_layer_integrated_gradients(layer, steps, baseline):
    """The layer's values walk from the baseline's to the volume's."""
    theirs = attr.LayerIntegratedGradients(score, NET.get_submodule(layer)).attribute(
        INPUT.clone(), baselines=start_of(baseline), n_steps=steps, method="gausslegendre"
    )
    mine = ours(LayerIntegratedGradients(layer, steps, baseline, 1.0), seed=4)
    close(mine, spread_out(theirs) / VOXELS, 1e-6)  # Captum's weights are float32


def conductance_of_captum(layer, steps):
    theirs = attr.LayerConductance(score, NET.get_submodule(layer)).attribute(
        INPUT.clone(), baselines=start_of("blurred"), n_steps=steps, method="riemann_trapezoid"
    )
    return spread_out(theirs) / VOXELS


@pytest.mark.parametrize("layer", ["body.0", "body.3"])
def test_layer_conductance_in_the_limit_of_many_steps(layer):
    """Captum's difference quotients are of first order, ours by quadrature: the limits are one."""
    mine = ours(LayerConductance(layer, 128, "blurred", 1.0))
    off = [float((conductance_of_captum(layer, n) - mine).abs().max()) for n in (50, 200, 800)]
    assert off[2] < 3e-3 * float(mine.abs().max())
    assert off[0] > 2 * off[1] > 4 * off[2]


def test_layer_conductance_before_a_linear_tail():
    """All steps see the same gradient, so that any number of them is exact, of both."""
    for steps in (1, 5):
        mine = ours(LayerConductance("act", steps, "blurred", 1.0))
        close(mine, conductance_of_captum("act", 9))


@pytest.fixture
def same_draws(monkeypatch):
    """Six samples from three baselines, whose chances Captum takes from numpy and torch."""

    def given(noise):
        generator = torch.Generator().manual_seed(5)
        [group] = Scatter(6, draws(3, 2.0), noise).groups(PROBE.image, PROBE, generator)
        starts, inner = group[1:4], group[4:]
        along = np.array([p.along for p in inner])
        of_baseline = np.array([n % 3 for n in range(6)])
        off = torch.stack([(p.input if p.end is None else p.end) - PROBE.image for p in inner])
        off = off if noise else torch.zeros_like(off)
        monkeypatch.setattr(np.random, "uniform", lambda *_: along)
        monkeypatch.setattr(np.random, "choice", lambda *_: of_baseline)
        monkeypatch.setattr(torch, "normal", lambda *_: off)
        return torch.stack([p.input for p in starts])

    return given


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_expected_gradients_are_gradient_shap_on_the_same_draws(same_draws, noise):
    """Baselines, ways and noise; the channels summed."""
    theirs = attr.GradientShap(score).attribute(
        INPUT.clone().requires_grad_(), baselines=same_draws(noise), n_samples=6, stdevs=1.0
    )
    mine = ours(ExpectedGradients(6, 3, noise, 2.0), seed=5)
    close(mine, theirs[0].sum(0).detach() / VOXELS)


@pytest.mark.parametrize("layer", ["act", "body.0", "tail.0"])
def test_layer_gradient_shap_on_the_same_draws(same_draws, layer):
    """The layer's difference from each baseline times its gradient on the way."""
    theirs = attr.LayerGradientShap(score, NET.get_submodule(layer)).attribute(
        INPUT.clone().requires_grad_(), baselines=same_draws(0.0), n_samples=6, stdevs=0.0
    )
    mine = ours(LayerGradientShap(layer, 6, 3, 0.0, 2.0), seed=5)
    close(mine, spread_out(theirs) / VOXELS)


@pytest.mark.parametrize(("method", "kind"), [(SquareGrad, "smoothgrad_sq"), (VarGrad, "vargrad")])
@pytest.mark.parametrize(
    ("inner", "theirs"),
    [(Saliency(absolute=False), attr.Saliency), (InputXGradient(), attr.InputXGradient)],
)
def test_moments_are_the_noise_tunnels_on_the_same_noise(monkeypatch, inner, theirs, method, kind):
    """Of one channel: Captum squares before it sums channels, we the map."""
    net, probe = layered(1, 3), a_probe((8, 12, 6), classes=3)
    weights = TARGET.weights(probe, Predictor(net).predict(probe.image))
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack(
        [torch.randn(probe.image.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    )
    width = 0.2 * float(probe.image.amax() - probe.image.amin())
    monkeypatch.setattr(torch, "normal", lambda *_: noise * width)
    extra = {"abs": False} if isinstance(inner, Saliency) else {}
    tunnel = attr.NoiseTunnel(theirs(lambda x: (weights * net(x)).sum(dim=(1, 2, 3, 4)))).attribute(
        probe.image[None].clone().requires_grad_(),
        nt_type=kind, nt_samples=4, stdevs=width, **extra,
    )  # fmt: skip
    [found] = explain(Predictor(net), probe, {"t": TARGET}, {"m": method(inner, 4, 0.2)}, seed=7)
    close(found.values, tunnel[0, 0].detach() / int((probe.label == 2).sum()) ** 2, 1e-9)


def test_the_default_target_too():
    """A one-logit network seen through the default target, by both."""
    net = layered(channels=2, classes=1)
    probe = a_probe((8, 8, 8), 2)
    region = probe.label == 1
    theirs = attr.Saliency(lambda x: (net(x)[:, 0] * region).sum(dim=(1, 2, 3)))
    [mine] = explain(Predictor(net), probe, {"t": ClassEvidence()}, {"m": Saliency()})
    expected = theirs.attribute(probe.image[None].clone().requires_grad_(), abs=True)[0].amax(0)
    close(mine.values, expected / region.sum())
