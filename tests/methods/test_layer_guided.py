"""Guided backpropagation from a layer."""

from __future__ import annotations

import pytest
import torch
from nets_for_tests import a_probe, close, layered, seeded
from torch import nn

from lightning_segxai.cost import Cost, cost
from lightning_segxai.explain import explain
from lightning_segxai.methods.layer_guided import LayerGuidedBackprop
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.windows import Windows

TARGET = {"t": ClassEvidence(1, "everywhere")}


class Guided(torch.autograd.Function):
    """A ReLU that lets what is positive back, where it was positive."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, g):
        [x] = ctx.saved_tensors
        return g.clamp(min=0) * (x > 0)


def net(act=nn.ReLU):
    return seeded(
        nn.Sequential(
            nn.Conv3d(2, 3, 3, padding=1), act(), nn.Conv3d(3, 2, 3, padding=1), act(),
            nn.Conv3d(2, 2, 1),
        )
    )  # fmt: skip


def only(method, probe, window=None, network=None):
    [found] = explain(Predictor(network or net(), window), probe, TARGET, {"m": method})
    return found


@pytest.mark.parametrize("channel", [None, 0, 1])
@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
def test_it_is_the_guided_gradient_of_the_layers_magnitude(channel, window):
    """A plain function in the place of each ReLU, and magnitudes blended plainly."""
    probe = a_probe((8, 8, 13), 2)
    plain = net()

    def magnitude(x):
        answer = plain[2](Guided.apply(plain[0](x))).abs()
        return answer if channel is None else answer[:, channel : channel + 1]

    x = probe.image.clone().requires_grad_()
    windows = Windows((8, 8, 13), window or (8, 8, 13))
    total = sum(
        (magnitude(x[(slice(None), *p)][None])[0] * windows.share(p, x.dtype)).sum()
        for p in windows.places
    )
    [expected] = torch.autograd.grad(total, x)
    found = only(LayerGuidedBackprop("2", channel), probe, window)
    assert (found.status, found.layer, found.unit) == ("ok", "2", "a.u.")
    close(found.values, expected.sum(0))


def test_an_in_place_network_gives_the_same():
    """The functions are seen, not the modules."""
    probe = a_probe((8, 8, 8), 2)
    inplace = net(lambda: nn.ReLU(inplace=True))
    found = only(LayerGuidedBackprop("2"), probe, network=inplace)
    close(found.values, only(LayerGuidedBackprop("2"), probe).values)


def test_a_layer_before_all_rectifiers_is_refused():
    """It would be the plain gradient."""
    found = only(LayerGuidedBackprop("0"), a_probe((8, 8, 8), 2), network=linear_first())
    assert found.status == "unsupported"
    assert "no rectifying activation" in found.reason


def linear_first():
    return seeded(nn.Sequential(nn.Conv3d(2, 3, 1), nn.Tanh(), nn.Conv3d(3, 2, 1)))


def test_a_channel_that_the_layer_lacks():
    """The error says which there are."""
    with pytest.raises(ValueError, match=r"layer 2 has channels 0 to 1"):
        only(LayerGuidedBackprop("2", 2), a_probe((8, 8, 8), 2))


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_its_cost_is_announced(window):
    """One forward and one backward for each window."""
    predictor, probe = Predictor(layered(rectified=True), window), a_probe((8, 8, 12))
    predictor.rehearse(probe.image[(slice(None), *predictor.windows(probe.shape).places[0])])
    predictor.passes.forward = 0
    methods = {"m": LayerGuidedBackprop("body.3")}
    [found] = explain(predictor, probe, TARGET, methods)
    assert found.status == "ok"
    seen = Cost(predictor.passes.forward, predictor.passes.backward)
    assert cost(predictor, [probe], TARGET, methods) == seen
    assert seen.backward == len(predictor.windows(probe.shape).places)
