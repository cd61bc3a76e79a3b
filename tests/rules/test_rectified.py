"""Guided backpropagation and deconvnet: by hand, by plain autograd functions, by Captum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum import attr
from nets_for_tests import a_probe, close, layered, seeded
from torch import nn

from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.guided import Deconvolution, GuidedBackprop, GuidedGradCAM
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassMargin, VoxelEvidence
from lightning_segxai.values import Probe

PROBE = a_probe()
X = PROBE.image[None]
TARGET = ClassMargin(1, 0)
VOXELS = int((PROBE.label == 1).sum())


def explained(net, method, probe=PROBE, target=TARGET):
    """The map of one method, which must be there."""
    [found] = explain(Predictor(net), probe, {"t": target}, {"m": method})
    assert found.status == "ok", found.reason
    return found.values


def conv(given, made, size=3):
    return nn.Conv3d(given, made, size, padding=size // 2)


class ByHand(nn.Module):
    """Class 1 is the sum over two units ``relu(w x)``, times a number each."""

    def __init__(self, into, out, act):
        super().__init__()
        self.into, self.out, self.act = into, out, act

    def forward(self, x):
        units = [o * self.act(i * x) for i, o in zip(self.into, self.out, strict=True)]
        return torch.cat([torch.zeros_like(x), sum(units)], dim=1)


@pytest.mark.parametrize(
    ("act", "guided", "deconvnet"),
    [
        # at x = 2: units 3x and -x and 5x, weighed with 7, 11 and -13; only 7 and 11 go back
        (F.relu, 3 * 7, 3 * 7 - 11),
        (lambda x: F.leaky_relu(x, 0.5), 3 * 7 - 0.5 * 11, 3 * 7 - 11),
        (lambda x: x.sigmoid(), None, None),
    ],
)
def test_by_hand(act, guided, deconvnet):
    """At one voxel, with units that are on, off, and weighed negatively."""
    probe = Probe("p", torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64))
    net = ByHand((3.0, -1.0, 5.0), (7.0, 11.0, -13.0), act)
    target = VoxelEvidence((0, 0, 0), label=1)
    methods = {"g": GuidedBackprop(), "d": Deconvolution()}
    found = explain(Predictor(net), probe, {"t": target}, methods)
    if guided is None:
        assert [a.status for a in found] == ["unsupported"] * 2
        assert all("found no rectifying activation" in a.reason for a in found)
        assert all("Use `Saliency`" in a.reason for a in found)
    else:
        assert [a.values.item() for a in found] == [guided, deconvnet]


class Plain(torch.autograd.Function):
    """A rectifier, written down once more."""

    @staticmethod
    def forward(ctx, x, act, derivative):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = act(x)
            [slope] = torch.autograd.grad(y.sum(), x)
        ctx.slope = slope if derivative else torch.ones_like(slope)
        return y.detach()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.slope * gradient.clamp(min=0), None, None


class Rectifying(nn.Module):
    """Three convolutions, with rectifiers behind two, pooling, and a gate of sigmoids."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.gate, self.head = conv(1, 4), conv(4, 4), conv(4, 1), conv(4, 2, 1)
        self.act = act
        self.norm = nn.InstanceNorm3d(4)

    def forward(self, x):
        x = F.max_pool3d(self.act(self.norm(self.a(x))), 3, 1, 1)
        return self.head(self.act(self.b(x)) * self.gate(x).sigmoid())


ACTS = {
    "ReLU": F.relu,
    "LeakyReLU": lambda x: F.leaky_relu(x, 0.1),
    "PReLU": lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)),
    "ELU": F.elu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Softplus": F.softplus,
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution()], ids=lambda m: str(m))
def test_plain(name, method):
    """The same as an autograd function for each rectifier; the gate keeps its gradient."""
    act, derivative = ACTS[name], isinstance(method, GuidedBackprop)
    plain = seeded(Rectifying(lambda x: Plain.apply(x, act, derivative)), 1)
    x = X.clone().requires_grad_()
    (TARGET.weights(PROBE, plain(X)[0].detach()) * plain(x)[0]).sum().backward()
    close(explained(seeded(Rectifying(act), 1), method), x.grad[0].sum(0) / VOXELS, 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_captum(seed):
    """On distinct modules it is Captum's, with channels summed."""
    net = seeded(
        nn.Sequential(
            conv(1, 4), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), conv(4, 4), nn.ReLU(),
            nn.Upsample(scale_factor=2), conv(4, 4), nn.ReLU(), conv(4, 2, 1),
        ),
        seed,
    )  # fmt: skip

    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            logits = self.net(x)
            return (TARGET.weights(PROBE, logits[0].detach()) * logits).sum((1, 2, 3, 4))

    for ours, theirs in (
        (GuidedBackprop(), attr.GuidedBackprop),
        (Deconvolution(), attr.Deconvolution),
    ):
        with pytest.warns(UserWarning, match="Setting backward hooks"):
            values = theirs(Score()).attribute(X.clone().requires_grad_())[0].sum(0).detach()
        close(explained(net, ours), values / VOXELS, 1e-12)


def test_nothing_negative():
    """Where nothing on the way back is negative, guided backpropagation is the gradient."""
    net = seeded(nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 4), nn.ELU(), conv(4, 2, 1)), 1)
    with torch.no_grad():
        net[4].weight.abs_()[0] = 0
        net[2].weight.abs_()
    plain = explained(net, Saliency(absolute=False))
    close(explained(net, GuidedBackprop()), plain, 1e-12)


def test_guided_grad_cam():
    """The product of its parts, of the parts' own passes."""
    net = layered(rectified=True)
    methods = {"product": GuidedGradCAM("act"), "g": GuidedBackprop(), "c": GradCAM("act")}
    predictor = Predictor(net)
    product, guided, cam = explain(predictor, PROBE, {"t": TARGET}, methods)
    close(product.values, guided.values * VOXELS * cam.values, 1e-12)
    assert product.layer == "act"
    together = predictor.passes.forward, predictor.passes.backward
    alone = Predictor(net)
    explain(alone, PROBE, {"t": TARGET}, {k: methods[k] for k in "gc"})
    assert together == (alone.passes.forward, alone.passes.backward)
    close(explained(net, GuidedGradCAM("act")), product.values, 1e-12)


def test_guided_grad_cam_walks_alone():
    """Asked by itself, outside of `explain`, it is the same."""
    net = layered(rectified=True)
    logits = Predictor(net).predict(PROBE.image)
    model = ScoredModel.aim(Predictor(net), PROBE, TARGET, logits)
    found = GuidedGradCAM("act").attribute(model, PROBE.image)
    close(found, explained(net, GuidedGradCAM("act")), 1e-12)
