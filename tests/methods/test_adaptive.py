"""Integrated gradients that spend their steps where the score changes unexpectedly."""

from __future__ import annotations

import re

import pytest
import torch
from nets_for_tests import Counting, Power, a_probe, close, layered, linear_net
from torch import nn

from lightning_segxai.cost import Cost, cost
from lightning_segxai.explain import explain
from lightning_segxai.methods.adaptive import divisions
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence

EVERYWHERE = {"t": ClassEvidence(1, "everywhere")}


def only(net, method, probe=None, window=None):
    [found] = explain(Predictor(net, window), probe or a_probe(), EVERYWHERE, {"m": method})
    assert found.status == "ok"
    return found


class Step(nn.Module):
    """A logit that rises steeply where the input's mean passes a height."""

    def __init__(self, height: float, steepness: float) -> None:
        super().__init__()
        self.height, self.steepness = height, steepness

    def forward(self, x):
        mean = x.mean(dim=(2, 3, 4), keepdim=True)
        logit = 8 * torch.sigmoid(self.steepness * (mean - self.height)).expand_as(x)
        return torch.cat([torch.zeros_like(x), logit], dim=1)


def test_on_a_smooth_path_it_is_the_plain_one():
    """Both are exact for a polynomial that four nodes of every stretch can integrate."""
    probe = a_probe((3, 3, 3))
    plain = only(Power(6), IntegratedGradients(8, 0.5), probe)
    close(only(Power(6), IntegratedGradients(24, 0.5, adaptive=True), probe).values, plain.values)


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_a_linear_network_is_exact(window):
    """Weights times the way, whole and by windows."""
    probe = a_probe((8, 8, 12))
    found = only(linear_net(), IntegratedGradients(24, adaptive=True), probe, window)
    close(found.values, only(linear_net(), IntegratedGradients(1), probe, window).values)
    assert found.completeness_error < 1e-10


@pytest.mark.parametrize("height", [0.2, 0.4, 0.71])
def test_a_step_on_the_way_is_found(height):
    """For equal points the error is ten times smaller than that of the plain quadrature."""
    probe = a_probe((4, 4, 4))
    object.__setattr__(probe, "image", torch.ones_like(probe.image))
    net = Step(height, 150.0)
    plain = only(net, IntegratedGradients(40, "zero"), probe).completeness_error
    adaptive = only(net, IntegratedGradients(40, "zero", adaptive=True), probe).completeness_error
    assert adaptive < plain / 10


@pytest.mark.parametrize(("steps", "count"), [(24, 1), (31, 1), (32, 2), (50, 4)])
def test_how_often_a_path_is_divided(steps, count):
    """Sixteen points to begin with, eight more for each division, never more than asked for."""
    assert divisions(steps) == count


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
@pytest.mark.parametrize("outer", [lambda m: m, lambda m: SmoothGrad(m, 2)])
def test_its_cost_is_announced(window, outer):
    """As counted, also over noisy copies."""
    net = Counting(layered())
    predictor = Predictor(net, window)
    probe = a_probe((8, 8, 12))
    place = predictor.windows(probe.shape).places[0]
    predictor.rehearse(probe.image[(slice(None), *place)])
    net.counts.update(forward=0, backward=0)
    methods = {"m": outer(IntegratedGradients(26, adaptive=True))}
    targets = EVERYWHERE | {"u": ClassEvidence(1)}
    for found in explain(predictor, probe, targets, methods):
        assert found.status == "ok"
    seen = Cost(net.counts["forward"], net.counts["backward"])
    assert cost(predictor, [probe], targets, methods) == seen


def test_too_few_steps_die_at_once():
    """Four stretches of four points, and one divided."""
    message = "`IntegratedGradients(steps=23, adaptive=True)` must be at least 24"
    with pytest.raises(ValueError, match=re.escape(message)):
        IntegratedGradients(23, adaptive=True)
