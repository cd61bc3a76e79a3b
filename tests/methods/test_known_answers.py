"""Methods on networks whose answers can be worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets_for_tests import Power, Weigh, a_probe, close, layered, linear_net, seeded
from torch import nn

from lightning_segxai.baselines import Baseline
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.layers import LayerActivation
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, ClassMargin, VoxelEvidence
from lightning_segxai.trajectories import Line
from lightning_segxai.values import Probe

EVERYWHERE = ClassEvidence(1, "everywhere")


def only(net, probe, method, target=EVERYWHERE, **settings):
    [found] = explain(Predictor(net, **settings), probe, {"t": target}, {"m": method})
    return found


def volume(*values):
    return Probe("v", torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1))


def test_saliency_of_a_linear_network_is_its_weight():
    """In the region, divided by its voxels; nothing outside."""
    probe = a_probe(channels=2)
    region = (probe.label == 1).double()
    found = only(Weigh(0, -3), probe, Saliency(), ClassEvidence(1))
    close(found.values, 3 * region / region.sum())
    signed = only(Weigh(0, -3), probe, Saliency(absolute=False), ClassEvidence(1))
    close(signed.values, 2 * -3 * region / region.sum())  # two channels
    assert found.unit == "logit per intensity"


def test_saliency_of_one_voxel_is_the_turned_kernel():
    """The gradient of a convolution's output at a voxel is its kernel around it."""
    net = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1, bias=False))
    seeded(net)
    found = only(net, a_probe((5, 5, 5)), Saliency(absolute=False), VoxelEvidence((2, 1, 3), 1))
    expected = torch.zeros(5, 5, 5, dtype=torch.float64)
    expected[1:4, 0:3, 2:5] = net[0].weight[1, 0].detach()
    close(found.values, expected)


def test_saliency_takes_the_largest_channel():
    """By its absolute value."""
    net = nn.Sequential(nn.Conv3d(3, 1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -4.0, 2.0]).reshape(1, 3, 1, 1, 1))
    probe = a_probe((4, 4, 4), 3)
    assert torch.equal(
        only(net, probe, Saliency()).values * 64, torch.full((4, 4, 4), 4.0).double()
    )
    signed = only(net, probe, Saliency(absolute=False)).values * 64
    assert torch.equal(signed, torch.full((4, 4, 4), -1.0).double())


@pytest.mark.parametrize("target", [EVERYWHERE, ClassEvidence(1), ClassMargin(1, 0)])
def test_input_x_gradient_sums_to_the_score_without_biases(target):
    """Linearity: the map is complete from zero."""
    found = only(linear_net(2), a_probe(channels=2), InputXGradient(), target)
    assert float(found.values.sum()) == pytest.approx(found.score, rel=1e-10)
    assert found.unit == "logit"


@pytest.mark.parametrize("baseline", ["zero", "minimum", "noise", "blurred", 2.0])
def test_integrated_gradients_of_a_linear_network_are_exact_in_one_step(baseline):
    """Weight times the way gone; the completeness error is rounding."""
    probe = a_probe(channels=2)
    method = IntegratedGradients(1, baseline, 1.0)
    found = only(linear_net(2, bias=True), probe, method)
    assert found.completeness_error is not None
    assert found.completeness_error < 1e-10
    start = Baseline(baseline, 1.0).make(
        probe.image, probe.spacing_mm, torch.Generator().manual_seed(0)
    )
    weigh = only(Weigh(0, 3), probe, method)
    close(weigh.values, 3 * (probe.image - start).sum(0) / 512)
    close(
        found.values,
        only(linear_net(2, bias=True), probe, IntegratedGradients(9, baseline, 1.0)).values,
    )


@settings(max_examples=15)
@given(st.integers(1, 6), st.floats(-2, 2))
def test_n_steps_integrate_polynomials_of_degree_2n_exactly(steps, fill):
    """The gradient of the power 2n has degree 2n - 1: Gauss-Legendre's order."""
    probe = a_probe((3, 3, 3))
    found = only(Power(2 * steps), probe, IntegratedGradients(steps, fill))
    expected = (probe.image ** (2 * steps) - fill ** (2 * steps))[0] / 27
    assert torch.allclose(found.values, expected, rtol=1e-9, atol=1e-9)


def test_completeness_error_by_hand():
    """One step of x^4 from zero gives 4 (x/2)^3 x = x^4 / 2: half is missing."""
    found = only(Power(4), volume(1.0, 2.0, -1.0), IntegratedGradients(1, "zero"))
    assert torch.allclose(found.values.flatten() * 3, torch.tensor([0.5, 8, 0.5]).double())
    assert found.completeness_error == pytest.approx(0.5)
    assert found.cancellation == pytest.approx(0.5)
    assert found.doubtful
    exact = only(Power(4), volume(1.0, 2.0, -1.0), IntegratedGradients(2, "zero"))
    assert exact.completeness_error == pytest.approx(0, abs=1e-12)
    assert not exact.doubtful


@pytest.mark.parametrize(
    ("values", "cancellation", "doubtful"),
    [((3.0, -1.0), 2.0, False), ((1.0, 1.0), 1.0, False), ((1000.0, -999.5), 3999.0, True)],
)
def test_cancellation_by_hand(values, cancellation, doubtful):
    """The sum of absolute values over the absolute score difference."""
    found = only(Weigh(0, 1), volume(*values), IntegratedGradients(2, "zero"))
    assert found.cancellation == pytest.approx(cancellation, rel=1e-9)
    assert found.completeness_error == pytest.approx(0, abs=1e-9)
    assert found.doubtful is doubtful


def test_completeness_is_none_where_the_difference_vanishes():
    """There is nothing to divide by; the map is what it is."""
    found = only(Weigh(0, 1), volume(1.0, -1.0), IntegratedGradients(2, "zero"))
    assert (found.completeness_error, found.cancellation) == (None, None)
    assert found.status == "ok"
    assert not found.doubtful
    flat = only(Weigh(0, 1), volume(2.0, 2.0), IntegratedGradients(2, "minimum"))
    assert flat.completeness_error is None


@pytest.mark.parametrize(
    "method", [Saliency(), InputXGradient(), GradCAM(), HiResCAM(), SmoothGrad(), Occlusion()]
)
def test_methods_without_the_axiom_report_none(method):
    """Neither error nor cancellation."""
    found = only(layered(), a_probe(), method)
    assert (found.completeness_error, found.cancellation) == (None, None)


def test_completeness_is_of_the_scores_not_of_the_map_that_is_shown():
    """The division by the region's voxels changes neither number."""
    probe = a_probe()
    few = only(layered(), probe, IntegratedGradients(3, "zero"), VoxelEvidence((3, 3, 3)))
    many = only(layered(), probe, IntegratedGradients(3, "zero"))
    for found in (few, many):
        assert 1e-12 < found.completeness_error < 0.5
        difference = float(found.values.abs().sum() / found.cancellation)
        assert difference == pytest.approx(
            abs(float(found.values.sum())), rel=2 * found.completeness_error
        )


@pytest.mark.parametrize(
    "inner",
    [Saliency(), InputXGradient(), IntegratedGradients(3), GradCAM(), HiResCAM(), Occlusion(4, 4)],
)
def test_smooth_grad_without_noise_is_the_inner_method(inner):
    """And has its unit and layer."""
    probe = a_probe()
    found = only(layered(), probe, SmoothGrad(inner, 2, 0.0))
    plain = only(layered(), probe, inner)
    close(found.values, plain.values)
    assert (found.unit, found.layer) == (plain.unit, plain.layer)


@pytest.mark.parametrize(
    "inner", [InputXGradient(), Occlusion(4, 2, "zero"), HiResCAM(), GradCAM()]
)
def test_smooth_grad_is_the_mean_over_noisy_copies(inner):
    """Of the inner method's own maps of them, with the region of the volume itself."""
    probe = a_probe()
    target = ClassEvidence(1, "everywhere")
    generator = torch.Generator().manual_seed(0)
    deviation = 0.2 * (probe.image.max() - probe.image.min())
    maps = []
    for _ in range(3):
        noise = torch.randn(probe.image.shape, generator=generator, dtype=torch.float64)
        copy = Probe("c", probe.image + deviation * noise, probe.label)
        maps.append(only(layered(), copy, inner, target).values)
    close(only(layered(), probe, SmoothGrad(inner, 3, 0.2), target).values, sum(maps) / 3)


def test_noise_is_the_same_every_time():
    """A difference between epochs is the network's, not the noise's."""
    a, b = (only(layered(), a_probe(), SmoothGrad()).values for _ in range(2))
    assert torch.equal(a, b)
    [c] = explain(Predictor(layered()), a_probe(), {"t": EVERYWHERE}, {"m": SmoothGrad()}, seed=1)
    assert not torch.equal(a, c.values)


def test_hires_cam_before_a_linear_tail_makes_the_score():
    """Activation times gradient sums to the score without the bias."""
    net = layered()
    nn.init.zeros_(net.tail[1].bias)
    found = only(net, a_probe(), HiResCAM("tail.0", relu=False))
    assert float(found.values.sum()) == pytest.approx(found.score * 512, rel=1e-10)
    assert found.unit == "a.u."


def test_grad_cam_by_hand():
    """Channels of known activation, weighed by known mean gradients."""
    net = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.Conv3d(2, 1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2]).reshape(2, 1, 1, 1, 1))
        net[1].weight.copy_(torch.tensor([3.0, 5]).reshape(1, 2, 1, 1, 1))
    probe = a_probe((4, 4, 4))
    region = (probe.label == 1).double().mean()
    found = only(net, probe, GradCAM("0", relu=False), ClassEvidence(1))
    close(found.values, region * (3 * 1 + 5 * -2) * probe.image[0])


def test_relu_keeps_what_speaks_for_the_target():
    """The positive part."""
    for method in (GradCAM, HiResCAM):
        signed = only(layered(), a_probe(), method(relu=False)).values
        assert bool((signed < 0).any())
        assert torch.equal(only(layered(), a_probe(), method()).values, signed.relu())


def test_layer_activation_is_of_the_layer():
    """Summed or one channel; the same for every target."""
    net = linear_net(bias=True)
    probe = a_probe()
    with torch.no_grad():
        channels = net[0](probe.image[None])[0]
    close(only(net, probe, LayerActivation("0")).values, channels.sum(0))
    close(only(net, probe, LayerActivation("0", 1)).values, channels[1])
    close(only(net, probe, LayerActivation("0", 1), ClassEvidence(0)).values, channels[1])


@pytest.mark.parametrize("channel", [2, -1])
def test_a_channel_that_the_layer_lacks(channel):
    """The error says which there are."""
    with pytest.raises(
        ValueError, match=re.escape(f"LayerActivation(channel={channel})`: layer 0 has")
    ):
        only(linear_net(), a_probe(), LayerActivation("0", channel))


def test_the_layer_that_was_chosen_is_told():
    """The path that ``auto`` found; nothing for the input."""
    assert only(layered(), a_probe(), GradCAM()).layer == "act"
    assert only(layered(), a_probe(), SmoothGrad(HiResCAM("body.0"))).layer == "body.0"
    assert only(layered(), a_probe(), Saliency()).layer == ""


@pytest.mark.parametrize("batch", [1, 5, "auto"])
def test_occlusion_by_single_voxels_of_a_linear_network(batch):
    """Weight times the way to the baseline."""
    probe = a_probe((4, 3, 2), 2)
    found = only(Weigh(0, 3), probe, Occlusion(1, 1, 0.5), looks_per_pass=batch)
    close(found.values.double() * 24, 3 * (probe.image - 0.5).sum(0), 1e-6)  # Captum: float32


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 1), (4, 3), (9, 9)])
def test_occlusion_is_the_mean_over_the_cubes_that_hold_a_voxel(size, stride):
    """A plain loop; the last cube is cut where it sticks out."""
    probe = a_probe((7, 5, 4), 2)
    net = linear_net(2)
    weights = EVERYWHERE.weights(probe, Predictor(net).predict(probe.image))

    def score(x):
        with torch.no_grad():
            return float((weights * net(x[None])[0]).sum())

    total, count = torch.zeros(2, 7, 5, 4, dtype=torch.float64)
    starts = []
    for axis in probe.shape:
        edge = min(size, axis)
        step = min(stride, edge)
        starts.append([(n * step, edge) for n in range(1 + -(-(axis - edge) // step))])
    for i, a in starts[0]:
        for j, b in starts[1]:
            for k, c in starts[2]:
                cube = (slice(i, i + a), slice(j, j + b), slice(k, k + c))
                hidden = probe.image.clone()
                hidden[(slice(None), *cube)] = 0.5
                total[cube] += score(probe.image) - score(hidden)
                count[cube] += 1
    close(only(net, probe, Occlusion(size, stride, 0.5)).values, total / count / 140, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmoothGrad(samples=0), "`SmoothGrad(samples=0)` must be at least 1"),
        (lambda: SmoothGrad(noise=-0.1), "`SmoothGrad(noise=-0.1)` must not be negative"),
        (lambda: IntegratedGradients(0), "`IntegratedGradients(steps=0)` must be at least 1"),
        (lambda: IntegratedGradients(sigma_mm=0.0), "`sigma_mm` must be positive"),
        (lambda: Occlusion(0, 0), "`Occlusion(size_voxels=0, stride_voxels=0)` needs a stride"),
        (lambda: Occlusion(4, 5), "stride_voxels=5)` needs a stride of at least 1 and at most"),
        (lambda: Occlusion(4, 0), "stride_voxels=0)` needs"),
        (lambda: Occlusion(sigma_mm=-1.0), "`sigma_mm` must be positive"),
    ],
)
def test_wrong_settings_die_at_once(make, message):
    """When the method is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_methods_are_values():
    """Equal settings are equal methods, with an honest text form."""
    assert SmoothGrad(Saliency(), 3) == SmoothGrad(Saliency(), 3)
    assert repr(SmoothGrad(Saliency(), 3, 0.1)) == (
        "SmoothGrad(inner=Saliency(absolute=True), samples=3, noise=0.1)"
    )
    assert len({GradCAM(), GradCAM("auto"), GradCAM("x")}) == 2


def test_the_trajectory_is_told_by_settings():
    """So that equal paths are walked once."""
    assert IntegratedGradients(4).trajectory == Line(4, Baseline())
    assert SmoothGrad(Occlusion()).trajectory is None


def test_maps_are_linear_in_the_target():
    """A margin's map is the difference of its classes' maps."""
    probe = a_probe()
    for method in (
        Saliency(absolute=False),
        InputXGradient(),
        IntegratedGradients(3),
        HiResCAM(relu=False),
    ):
        margin = only(layered(), probe, method, ClassMargin(1, 0, "everywhere")).values
        one = only(layered(), probe, method, ClassEvidence(1, "everywhere")).values
        zero = only(layered(), probe, method, ClassEvidence(0, "everywhere")).values
        close(margin, one - zero)
    assert np.isfinite(float(margin.sum()))
