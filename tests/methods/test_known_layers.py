"""Methods of layers, and those of several baselines or copies, on answers known by hand."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets_for_tests import (
    InPlace,
    Power,
    Reused,
    Weigh,
    a_probe,
    close,
    layered,
    linear_net,
    seeded,
)
from torch import nn

from lightning_segxai.baselines import Baseline, draws
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
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
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.values import Probe

EVERYWHERE = ClassEvidence(1, "everywhere")
WINDOW = (8, 8, 8)


def only(net, probe, method, target=EVERYWHERE, window=None, **settings):
    predictor = Predictor(net, window, **settings)
    [found] = explain(predictor, probe, {"t": target}, {"m": method})
    assert found.status == "ok", found.reason
    return found


def scored(net, probe, window=None, target=EVERYWHERE):
    """The score itself, as a function of the volume, divided by the region's voxels."""
    predictor = Predictor(net, window)
    model = ScoredModel.aim(predictor, probe, target, predictor.predict(probe.image))

    def score(x):
        with torch.no_grad():
            return float(model(x[None])) / model.voxels

    return score


def start_of(probe, baseline="blurred", sigma_mm=5.0):
    generator = torch.Generator().manual_seed(0)
    return Baseline(baseline, sigma_mm).make(probe.image, probe.spacing_mm, generator)


def two_layers(first=(1.0, -2.0), last=(3.0, 5.0)):
    """Convolutions of one voxel: two channels and one logit."""
    net = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.Conv3d(2, 1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(first).reshape(2, 1, 1, 1, 1))
        net[1].weight.copy_(torch.tensor(last).reshape(1, 2, 1, 1, 1))
    return net


# --- class activation maps


def test_grad_cam_plus_plus_by_hand():
    """Every voxel of the region has the same gradient, so a channel's weight is in closed form."""
    probe = a_probe((4, 4, 4))
    region = probe.label == 1
    a = probe.image[0]
    expected = 0.0
    for first, last in ((1.0, 3.0), (-2.0, 5.0)):
        alpha = last**2 / (2 * last**2 + last**3 * float(first * a.sum()))
        expected = expected + int(region.sum()) * alpha * last * first * a
    found = only(two_layers(), probe, GradCAMPlusPlus("0"), ClassEvidence(1))
    close(found.values, expected.relu())
    assert (found.unit, found.layer) == ("a.u.", "0")
    assert found.completeness_error is None


def test_grad_cam_plus_plus_without_activation_halves_positive_gradients():
    """Where a channel sums to zero, its weight is half the sum of its positive gradients."""
    image = torch.randn(4, 4, 4, dtype=torch.float64)
    probe = Probe("p", (image - image.mean())[None])
    found = only(two_layers(last=(3.0, -5.0)), probe, GradCAMPlusPlus("0"))
    close(found.values, (64 * 3 / 2 * probe.image[0]).relu(), 1e-9)


def test_grad_cam_plus_plus_where_its_denominator_vanishes():
    """A gradient of one in a channel that sums to -2: the voxel has no weight, and no infinity."""
    probe = Probe("p", torch.full((1, 4, 4, 4), -2 / 64, dtype=torch.float64))
    net = two_layers(first=(1.0, -1.0), last=(1.0, 1.0))
    found = only(net, probe, GradCAMPlusPlus("0"))
    close(found.values, 64 / (2 + 2) * -probe.image[0])  # of the other channel, which sums to 2


@pytest.mark.parametrize("window", [None, WINDOW])
def test_what_speaks_against_the_target_is_not_in_cams_of_positive_gradients(window):
    """Channels of negative gradient have no weight, whatever they say."""
    probe = a_probe((8, 8, 12))
    net = two_layers(first=(1.0, 2.0), last=(-3.0, -5.0))
    for method in (GradCAMPlusPlus("0"), LayerCAM("0")):
        assert not only(net, probe, method, window=window).values.any()


def test_layer_cam_by_hand():
    """The positive gradient of each voxel times its activation; zero outside of the region."""
    probe = a_probe((4, 4, 4))
    region = (probe.label == 1).double()
    found = only(two_layers(last=(3.0, -5.0)), probe, LayerCAM("0"), ClassEvidence(1))
    close(found.values, (3 * region * probe.image[0]).relu())


def test_layer_cam_of_positive_gradients_is_hires_cam():
    """And differs where some are negative."""
    probe = a_probe()
    for last, equal in (((3.0, 5.0), True), ((3.0, -5.0), False)):
        net = two_layers(last=last)
        cam, hires = (only(net, probe, method("0")).values for method in (LayerCAM, HiResCAM))
        assert torch.allclose(cam, hires, atol=1e-12) is equal


def test_cams_of_a_dead_layer_are_zero():
    """No gradient is no weight, and no NaN."""
    net = layered()
    with torch.no_grad():
        net.tail[1].weight.zero_()
    for method in (GradCAM, GradCAMPlusPlus, LayerCAM, LayerGradientXActivation):
        assert not only(net, a_probe(), method("act")).values.any()


# --- gradient times activation


@pytest.mark.parametrize("target", [EVERYWHERE, ClassEvidence(1), ClassMargin(1, 0)])
@pytest.mark.parametrize(("window", "shape"), [(None, (8, 8, 8)), (WINDOW, (5, 12, 11))])
def test_gradient_times_activation_before_a_linear_tail_sums_to_the_score(window, shape, target):
    """Without its bias, also at a lower resolution, by windows, and where windows are padded."""
    net = layered()
    nn.init.zeros_(net.tail[1].bias)
    for layer in ("act", "tail.0"):
        found = only(net, a_probe(shape), LayerGradientXActivation(layer), target, window)
        assert float(found.values.sum()) == pytest.approx(found.score, rel=1e-10)
        assert (found.unit, found.layer) == ("logit", layer)


def test_gradient_times_activation_of_full_size_is_hires_cam():
    """Nothing is to be resampled, so they differ by the region's voxels only."""
    probe = a_probe()
    for layer in ("body.0", "tail.1"):
        hires = only(layered(), probe, HiResCAM(layer, relu=False)).values
        close(only(layered(), probe, LayerGradientXActivation(layer)).values * 512, hires)


# --- conductance


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_conductance_of_the_input_is_integrated_gradients(steps, window):
    """A layer that is the input goes straight, so each node's share is its weight."""
    net = nn.Sequential(nn.Identity(), layered())
    probe = a_probe((8, 12, 8))
    conductance = only(net, probe, LayerConductance("0", steps), window=window)
    close(conductance.values, only(net, probe, IntegratedGradients(steps), window=window).values)


@pytest.mark.parametrize("baseline", ["blurred", "noise", "zero", 2.0])
@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_conductance_of_a_linear_network_is_exact_in_one_step(baseline, layer, window):
    """Any of its layers conducts the whole difference of the scores."""
    net, probe = linear_net(bias=True), a_probe((8, 8, 12))
    score = scored(net, probe, window)
    gained = score(probe.image) - score(start_of(probe, baseline))
    one, many = (
        only(net, probe, LayerConductance(layer, n, baseline), window=window).values for n in (1, 6)
    )
    assert float(one.sum()) == pytest.approx(gained, rel=1e-9)
    close(one, many)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_conductance_before_a_linear_tail_is_exact_in_any_number_of_steps(steps, window):
    """The gains of all parts add up to the layer's, however the layer goes there."""
    net, probe = layered(), a_probe((8, 8, 12))
    score = scored(net, probe, window)
    found = only(net, probe, LayerConductance("act", steps), window=window)
    gained = score(probe.image) - score(start_of(probe))
    assert float(found.values.sum()) == pytest.approx(gained, rel=1e-9)


def test_conductance_behind_a_linear_body_is_as_good_as_integrated_gradients():
    """The layer goes straight: both sum to the same, exact for polynomials."""
    net = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False).double(), Power(4))
    nn.init.constant_(net[0].weight, 0.5)
    probe = a_probe((4, 4, 4))
    for steps in (1, 2, 3):
        conductance = only(net, probe, LayerConductance("0", steps, "zero")).values
        close(conductance, only(net, probe, IntegratedGradients(steps, "zero")).values)
    close(conductance, (probe.image[0] / 2) ** 4 / 64)


@pytest.mark.parametrize("layer", ["body.0", "body.2", "body.3", "act", "tail.0"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_conductance_of_a_cut_converges_to_the_difference_of_the_scores(layer, window):
    """All ways lead through the layer, so with more steps its map becomes complete."""
    net, probe = layered(), a_probe((8, 8, 12))
    score = scored(net, probe, window)
    gained = score(probe.image) - score(start_of(probe))
    off = [
        abs(
            float(only(net, probe, LayerConductance(layer, n), window=window).values.sum()) - gained
        )
        for n in (2, 8, 32, 128)
    ]
    assert off[3] < 1e-4 * abs(gained)
    assert off[3] < max(off[0] / 50, 1e-10)


class Skipped(nn.Module):
    """Two logits: zero, and the square of twice the input beside its own value."""

    def __init__(self):
        super().__init__()
        self.twice = Weigh(2.0)
        self.side = nn.Identity()

    def forward(self, x):
        self.side(x * 7)
        logit = self.twice(x) ** 2 + x
        return torch.cat([torch.zeros_like(x), logit], dim=1)


def test_what_goes_round_a_layer_is_not_in_its_map():
    """The layer's part of the score is 4x^2, and x goes round it."""
    probe = a_probe((4, 4, 4))
    x, b = probe.image[0], start_of(probe)[0]
    expected = (4 * x**2 - 4 * b**2) / 64
    close(only(Skipped(), probe, LayerConductance("twice", 3)).values, expected)
    integral = only(Skipped(), probe, LayerIntegratedGradients("twice", 3))
    close(integral.values, expected)
    assert integral.completeness_error == pytest.approx(0, abs=1e-10)


def test_a_layer_that_the_score_does_not_need_has_maps_of_zeros():
    """Not an error; none of the score is lost by replacing it."""
    probe = a_probe((4, 4, 4))
    for method in (
        LayerConductance("side", 2),
        InternalInfluence("side", 2),
        LayerGradientShap("side", 2, 2),
        LayerIntegratedGradients("side", 2),
        LayerGradientXActivation("side"),
    ):
        for frozen in (False, True):
            net = Skipped().requires_grad_(not frozen)
            found = only(net, probe, method)
            assert not found.values.any()
            assert found.completeness_error is None


# --- influence


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("baseline", ["blurred", 3.0])
def test_influence_before_a_linear_tail_is_its_weights(steps, baseline):
    """Whatever the path; zero outside of the region."""
    probe = a_probe((4, 4, 4))
    region = (probe.label == 1).double()
    method = InternalInfluence("0", steps, baseline)
    found = only(two_layers(), probe, method, ClassEvidence(1))
    close(found.values, (3.0 + 5.0) * region / region.sum())
    assert found.unit == "logit per activation"


def test_influence_by_hand():
    """The derivative of a^4 along the path from zero: the mean of 4 (t a)^3 is a^3."""
    probe = a_probe((4, 4, 4))
    net = nn.Sequential(nn.Identity(), Power(4))
    close(only(net, probe, InternalInfluence("0", 2, "zero")).values, probe.image[0] ** 3 / 64)


# --- a layer's own path


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_path_of_the_input_as_a_layer_is_integrated_gradients(steps, window):
    """Replacing what the first layer passes on is replacing the input."""
    net = nn.Sequential(nn.Identity(), layered())
    probe = a_probe((8, 12, 8))
    layer = only(net, probe, LayerIntegratedGradients("0", steps), window=window)
    plain = only(net, probe, IntegratedGradients(steps), window=window)
    close(layer.values, plain.values)
    assert layer.completeness_error == pytest.approx(plain.completeness_error, rel=1e-8)
    assert layer.cancellation == pytest.approx(plain.cancellation, rel=1e-8)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("layer", ["body.0", "body.3", "act"])
def test_a_layers_own_path_is_complete(layer, window):
    """From the score with the layer replaced; exact before a linear tail."""
    probe = a_probe((8, 8, 12))
    steps = 1 if layer == "act" else 24
    found = only(layered(), probe, LayerIntegratedGradients(layer, steps), window=window)
    assert found.completeness_error < (1e-10 if layer == "act" else 1e-3)
    assert found.layer == layer


@pytest.mark.parametrize("method", [LayerIntegratedGradients, LayerConductance, InternalInfluence])
def test_a_layers_values_survive_an_inplace_activation(method):
    """What stands behind it writes into a copy."""
    probe = a_probe()
    plain, changed = (
        only(seeded(InPlace(inplace)), probe, method("conv", 3)).values for inplace in (False, True)
    )
    close(changed, plain)


def test_the_last_call_of_a_reused_layer_walks():
    """Its values before the head, whose weight is the gradient; the first call stays."""
    net = seeded(Reused())
    probe = a_probe()
    with torch.no_grad():
        x, b = probe.image[None], start_of(probe)[None]
        gained = net.conv(net.conv(x).tanh()) - net.conv(net.conv(b).tanh())
    weight = net.head.weight[1, 0, 0, 0, 0].detach()
    found = only(net, probe, LayerIntegratedGradients("conv", 1))
    close(found.values, weight * gained[0, 0] / 512)
    assert found.completeness_error < 1e-10


class Echo(nn.Module):
    """A layer whose first call is heard behind its last one too."""

    def __init__(self):
        super().__init__()
        self.twice = Weigh(2.0)

    def forward(self, x):
        first = self.twice(x)
        logit = self.twice(first) ** 2 + first
        return torch.cat([torch.zeros_like(x), logit], dim=1)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_first_call_of_a_reused_layer_stays_at_the_volume(window):
    """Only the last call, of 4x, walks; the score is 16x^2 + 2x."""
    probe = a_probe((8, 8, 12))
    found = only(Echo(), probe, LayerIntegratedGradients("twice", 2), window=window)
    close(found.values, 16 * (probe.image**2 - start_of(probe) ** 2)[0] / 768)
    assert found.completeness_error < 1e-10


def test_hooks_of_others_stay_when_a_layers_values_are_replaced():
    """Ours are taken away, also after an error."""
    net = layered()
    seen = []
    net.act.register_forward_hook(lambda *_: seen.append(1))
    only(net, a_probe(), LayerIntegratedGradients("act", 2))
    assert seen
    assert len(net.act._forward_hooks) == 1

    def refuse(*_):
        raise LookupError("tail")

    net.tail.register_forward_pre_hook(refuse)
    with pytest.raises(LookupError, match="tail"):
        only(net, a_probe(), LayerIntegratedGradients("act", 2))
    assert len(net.act._forward_hooks) == 1


# --- several baselines


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("samples", "baselines"), [(1, 1), (4, 4), (7, 3)])
def test_expected_gradients_of_a_linear_network_are_exact(samples, baselines, window):
    """Weights times the mean way from the baselines; complete from the mean of their scores."""
    probe = a_probe((8, 8, 12))
    method = ExpectedGradients(samples, baselines)
    found = only(linear_net(bias=True), probe, method, window=window)
    assert found.completeness_error < 1e-9

    generator = torch.Generator().manual_seed(0)
    starts = [b.make(probe.image, probe.spacing_mm, generator) for b in draws(baselines, 5.0)]
    mean = torch.stack(starts).mean(dim=0)
    weigh = only(Weigh(0, 3), probe, method, window=window)
    close(weigh.values, 3 * (probe.image - mean)[0] / 768)


def test_expected_gradients_report_what_is_missing():
    """By hand, for the square: 2 (b + t (x - b)) (x - b) at the one drawn t."""
    probe = Probe("v", torch.tensor([1.0, 2.0, -1.0]).double().reshape(1, -1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    b = Baseline("blurred", 5.0).make(probe.image, (1, 1, 1), generator)
    t = float(torch.rand(1, generator=generator))
    expected = (2 * (b + t * (probe.image - b)) * (probe.image - b))[0]
    found = only(Power(2), probe, ExpectedGradients(1, 1))
    close(found.values, expected / 3)
    gained = float((probe.image**2 - b**2).sum())
    assert found.completeness_error == pytest.approx(abs(float(expected.sum()) / gained - 1))
    assert found.cancellation == pytest.approx(float(expected.abs().sum()) / abs(gained))


def test_expected_gradients_approach_the_mean_of_integrated_gradients():
    """With many samples, of the same two baselines: a blur and a noise."""
    probe = a_probe((8, 8, 4))
    paths = [
        only(layered(), probe, IntegratedGradients(32, kind)).values
        for kind in ("blurred", "noise")
    ]
    mean = sum(paths) / 2
    few, many = (
        float((only(layered(), probe, ExpectedGradients(n, 2)).values - mean).abs().max())
        for n in (8, 512)
    )
    assert many < few / 4
    assert many < 0.05 * float(mean.abs().max())


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_layer_gradient_shap_before_a_linear_tail_sums_to_the_gain(noise, window):
    """From the mean of the baselines' scores, whatever noise the points have."""
    net, probe = layered(), a_probe((8, 8, 12))
    score = scored(net, probe, window)
    generator = torch.Generator().manual_seed(0)
    starts = [b.make(probe.image, probe.spacing_mm, generator) for b in draws(3, 5.0)]
    gained = score(probe.image) - sum(map(score, starts)) / 3
    found = only(net, probe, LayerGradientShap("act", 7, 3, noise), window=window)
    assert float(found.values.sum()) == pytest.approx(gained, rel=1e-9)


def test_layer_gradient_shap_of_the_input_is_expected_gradients():
    """The same draws, the same gradients, the same ways."""
    net = nn.Sequential(nn.Identity(), layered())
    probe = a_probe()
    layer = only(net, probe, LayerGradientShap("0", 5, 2)).values
    close(layer, only(net, probe, ExpectedGradients(5, 2)).values)


def test_draws_are_the_same_at_every_epoch():
    """Another seed is another draw."""
    for method in (ExpectedGradients(4, 2), LayerGradientShap("act", 4, 2)):
        a, b = (only(layered(), a_probe(), method).values for _ in range(2))
        assert torch.equal(a, b)
        [c] = explain(Predictor(layered()), a_probe(), {"t": EVERYWHERE}, {"m": method}, seed=1)
        assert not torch.equal(a, c.values)


# --- copies


@pytest.mark.parametrize("inner", [Saliency(absolute=False), InputXGradient(), LayerActivation()])
def test_moments_without_noise(inner):
    """The square of the inner map, and no variance."""
    probe = a_probe()
    plain = only(layered(), probe, inner)
    square = only(layered(), probe, SquareGrad(inner, 3, 0.0))
    close(square.values, plain.values**2)
    assert (square.unit, square.layer) == (f"({plain.unit})^2", plain.layer)
    variance = only(layered(), probe, VarGrad(inner, 3, 0.0))
    assert float(variance.values.abs().max()) < 1e-24 * float(square.values.max())
    assert variance.unit == square.unit
    assert square.completeness_error is None


def test_moments_of_a_linear_networks_gradient():
    """Its square, and zero: noise does not move it."""
    probe = a_probe(channels=2)
    region = (probe.label == 1).double()
    square = only(Weigh(0, -3), probe, SquareGrad(samples=3), ClassEvidence(1))
    close(square.values, (2 * -3 * region / region.sum()) ** 2)
    variance = only(Weigh(0, -3), probe, VarGrad(samples=3), ClassEvidence(1))
    assert not variance.values.any()


def test_moments_of_a_square_by_hand():
    """The gradient 2 (x + e) moves with the noise alone."""
    probe = a_probe((4, 4, 4))
    generator = torch.Generator().manual_seed(0)
    width = 0.1 * (probe.image.max() - probe.image.min())
    off = torch.stack(
        [torch.randn(probe.image.shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    )
    gradients = 2 * (probe.image + width * off)[:, 0] / 64
    close(only(Power(2), probe, SquareGrad(samples=5)).values, (gradients**2).mean(0))
    variance = only(Power(2), probe, VarGrad(samples=5)).values
    close(variance, (2 * width / 64) ** 2 * off[:, 0].var(0, correction=0))


@pytest.mark.parametrize(
    "inner",
    [
        Saliency(),
        IntegratedGradients(2),
        ExpectedGradients(3, 2),
        GradCAM(),
        GradCAMPlusPlus(),
        LayerConductance(steps=2),
        LayerIntegratedGradients(steps=2),
    ],
    ids=str,
)
def test_the_square_is_the_variance_and_the_mean(inner):
    """Steiner's theorem, of all three on the same copies."""
    probe = a_probe()
    mean, square, variance = (
        only(layered(), probe, method(inner, 3, 0.2)).values
        for method in (SmoothGrad, SquareGrad, VarGrad)
    )
    close(variance + mean**2, square)
    assert bool((variance >= 0).all())
    assert variance.any()


def test_a_variance_does_not_cancel():
    """Of maps a million times as large as their differences, it has all its digits."""
    probe = Probe("p", torch.randn(1, 4, 4, 4, dtype=torch.float64) * 1e-6 + 1e3)
    found = only(Power(2), probe, VarGrad(samples=4, noise=0.1)).values * 64**2
    generator = torch.Generator().manual_seed(0)
    width = 0.1 * (probe.image.max() - probe.image.min())
    noise = [
        torch.randn(probe.image.shape, generator=generator, dtype=torch.float64) for _ in range(4)
    ]
    copies = torch.stack([2 * (probe.image + width * one)[0] for one in noise])
    exact = (copies - copies.mean(0)).square().mean(0)
    assert torch.allclose(found, exact, rtol=1e-5)


# --- settings


BASELINES = [
    IntegratedGradients,
    LayerConductance,
    InternalInfluence,
    LayerIntegratedGradients,
]


@pytest.mark.parametrize("method", BASELINES)
def test_a_path_without_steps_dies_at_once(method):
    """When it is written down, saying which."""
    for steps in (0, -3):
        message = f"`{method.__name__}(steps={steps})` must be at least 1."
        with pytest.raises(ValueError, match=re.escape(message)):
            method(steps=steps)


@pytest.mark.parametrize("method", [*BASELINES, ExpectedGradients, LayerGradientShap])
@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_a_blur_of_no_width_dies_at_once(method, sigma):
    """Of every method that blurs."""
    with pytest.raises(ValueError, match="`sigma_mm` must be positive"):
        method(sigma_mm=sigma)


@pytest.mark.parametrize("method", [ExpectedGradients, LayerGradientShap])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, r"samples=0, .* needs at least one baseline, and a sample for each"),
        ({"baselines": 0}, r"baselines=0, .* needs at least one baseline"),
        ({"samples": 3, "baselines": 4}, "a sample for each"),
        ({"noise": -0.1}, r"noise=-0.1, .* needs a noise that is not negative"),
    ],
)
def test_a_wrong_scatter_dies_at_once(method, arguments, message):
    """It names the method with what was given."""
    with pytest.raises(ValueError, match=rf"`{method.__name__}\(.*{message}"):
        method(**arguments)


@pytest.mark.parametrize(("method", "least"), [(SmoothGrad, 1), (SquareGrad, 1), (VarGrad, 2)])
def test_too_few_copies_die_at_once(method, least):
    """A variance needs two."""
    message = f"`{method.__name__}(samples={least - 1})` must be at least {least}."
    with pytest.raises(ValueError, match=re.escape(message)):
        method(samples=least - 1)
    with pytest.raises(ValueError, match=re.escape(f"`{method.__name__}(noise=-0.5)` must not be")):
        method(noise=-0.5)
    assert method(samples=least).samples == least


REFUSALS = """
import numpy as np, torch
from lightning_segxai import *
from lightning_segxai.baselines import Baseline
methods = {methods}
for method in methods:
    for given in (torch.zeros(1, 8, 8, 8), np.zeros((2, 3)), [0.0, 1.0], None, "blured"):
        try:
            method(**{{"blank" if method is Baseline else "baseline": given}})
        except ValueError as error:
            print(method.__name__, "|", error)
"""


def test_a_baseline_that_is_no_recipe_is_refused_with_its_shape():
    """As users meet it, without type checks: a recipe that fits all probes is asked for."""
    methods = [method.__name__ for method in (*BASELINES, Baseline)]
    told = subprocess.run(
        [sys.executable, "-c", REFUSALS.format(methods=f"[{', '.join(methods)}]")],
        capture_output=True, encoding="utf-8", check=True,
    ).stdout.splitlines()  # fmt: skip
    found = ["a volume of (1, 8, 8, 8)", "a volume of (2, 3)", "[0.0, 1.0]", "None", "'blured'"]
    assert told == [
        f"{method} | `baseline` must be one of blurred, noise, minimum, zero, or a number that "
        f"fills a volume of any shape, but got {what}."
        for method in methods
        for what in found
    ]


@pytest.mark.parametrize(
    "method",
    [
        GradCAMPlusPlus,
        LayerCAM,
        LayerGradientXActivation,
        LayerConductance,
        InternalInfluence,
        LayerGradientShap,
        LayerIntegratedGradients,
    ],
)
def test_every_method_of_a_layer_finds_it_by_itself(method):
    """And says which it was; a wrong name lists the close ones."""
    assert only(layered(), a_probe(), method()).layer == "act"
    assert only(layered(), a_probe(), method("body.0")).layer == "body.0"
    with pytest.raises(ValueError, match="no such layer in `Layered`"):
        only(layered(), a_probe(), method("bodi"))


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 6), st.floats(0, 1))
def test_methods_are_values(samples, baselines, noise):
    """Equal settings are equal methods on equal trajectories, so that they share passes."""
    baselines = min(samples, baselines)
    a, b = (ExpectedGradients(samples, baselines, noise) for _ in range(2))
    assert a == b
    assert len({a, b}) == 1
    layer = LayerGradientShap("x", samples, baselines, noise)
    assert a.trajectory == layer.trajectory
    assert LayerConductance("x", samples).trajectory == IntegratedGradients(samples).trajectory
    assert InternalInfluence("y", samples).trajectory == IntegratedGradients(samples).trajectory
    inner = Saliency(absolute=False)
    clouds = {m(inner, samples + 1, noise).trajectory for m in (SmoothGrad, SquareGrad, VarGrad)}
    assert len(clouds) == 1
