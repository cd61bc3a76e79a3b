"""Our methods against Captum's, on whole volumes of a network with a layer at half resolution."""

from __future__ import annotations

import pytest
import torch
from captum import attr
from nets_for_tests import a_probe, close, layered

from lightning_segxai.baselines import Baseline
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.layers import LayerActivation
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, ClassMargin

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


def test_the_default_target_too():
    """A one-logit network seen through the default target, by both."""
    net = layered(channels=2, classes=1)
    probe = a_probe((8, 8, 8), 2)
    region = probe.label == 1
    theirs = attr.Saliency(lambda x: (net(x)[:, 0] * region).sum(dim=(1, 2, 3)))
    [mine] = explain(Predictor(net), probe, {"t": ClassEvidence()}, {"m": Saliency()})
    expected = theirs.attribute(probe.image[None].clone().requires_grad_(), abs=True)[0].amax(0)
    close(mine.values, expected / region.sum())
