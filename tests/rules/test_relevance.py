"""Relevance against dense matrices, written down slowly, and what it must conserve."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from nets_for_tests import a_probe, blended, close, linear_net, seeded
from torch import nn

from lightning_segxai.explain import explain
from lightning_segxai.methods.gradients import InputXGradient
from lightning_segxai.methods.relevance import (
    LRP,
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
)
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, Target, VoxelEvidence
from lightning_segxai.values import Probe
from lightning_segxai.windows import Windows

TARGET = ClassEvidence(1)
PROBE = a_probe()
METHODS = {
    "w2": LRP(),
    "zplus": LRP("z+", "same"),
    "zb": LRP("z+", "zb"),
    "epsilon": LRP("epsilon", "same", 0.01),
    "excitation": ExcitationBackprop(),
    "contrast": ContrastiveExcitationBackprop(),
}


def explained(net, method, probe=PROBE, target=TARGET, **settings):
    """What one method found, which must be there."""
    [found] = explain(Predictor(net, **settings), probe, {"t": target}, {"m": method})
    assert found.status == "ok", found.reason
    return found


def conv(given, made, size=3, **settings):
    return nn.Conv3d(given, made, size, padding=size // 2, **settings)


class Fn(nn.Module):
    """A network of named parts and a function that calls them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.way = forward

    def forward(self, x):
        return self.way(self.parts, x)


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Target):
    """Any weights."""

    given: torch.Tensor

    def weights(self, probe, logits):
        return self.given


# --- a slow plain re-implementation


def dense(linear, shape):
    """The matrix of a linear function of one volume: a row for each answer."""
    size = int(torch.tensor(shape).prod())
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return linear(basis).flatten(1).T


def shared_out(relevance, x, matrix, bias, rule, epsilon, bounds=(0.0, 0.0)):
    """Relevance of the answers, shared out over the inputs."""
    up, down = matrix.clamp(min=0), matrix.clamp(max=0)
    kept = torch.zeros_like(bias)
    if rule == "w2":
        contributions, kept = matrix**2, bias**2
    elif rule == "zb":
        contributions = matrix * x - bounds[0] * up - bounds[1] * down
    elif rule == "epsilon":
        contributions, kept = matrix * x, bias
    else:
        contributions = (matrix * x).clamp(min=0)
        kept = bias.clamp(min=0) if rule == "z+" else kept
    whole = contributions.sum(1) + kept
    whole = whole + epsilon * torch.where(whole < 0, -1.0, 1.0)
    return (contributions * (relevance / whole)[:, None]).sum(0)


class Mixed(nn.Module):
    """Convolution, transposed, strided and linear, with a norm behind two and activations."""

    def __init__(self, norms=True):
        super().__init__()
        self.weighing = nn.ModuleList(
            [conv(1, 3), nn.ConvTranspose3d(3, 2, 2, 2), nn.Conv3d(2, 3, 2, 2), nn.Linear(3, 2)]
        )
        pair = [nn.InstanceNorm3d(3, affine=True), nn.GroupNorm(1, 2)] if norms else []
        self.norms = nn.ModuleList(pair)
        self.acts = [F.elu, lambda x: F.leaky_relu(x, 0.1), F.relu]

    def weigh(self, n, x, bias=True):
        part = self.weighing[n]
        own = part.bias if bias else None
        if n == 3:
            return F.linear(x.movedim(1, -1), part.weight, own).movedim(-1, 1)
        if n == 1:
            return F.conv_transpose3d(x, part.weight, own, 2)
        return F.conv3d(x, part.weight, own, 1 if n == 0 else 2, 1 if n == 0 else 0)

    def forward(self, x):
        for n in range(3):
            x = self.weighing[n](x)
            if n < len(self.norms):
                x = self.norms[n](x)
            x = self.acts[n](x)
        return self.weighing[3](x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    def plainly(self, x, weights, rule, first, epsilon, excitation=False, bounds=(0.0, 0.0)):
        """The relevance of the input, layer by layer, each a dense matrix with its norm in it."""
        layers = []
        with torch.no_grad():
            for n in range(4):
                matrix = dense(lambda v, n=n: self.weigh(n, v, bias=False), x.shape)
                made = self.weigh(n, x[None])[0]
                bias = made.flatten() - matrix @ x.flatten()
                if n < len(self.norms):
                    norm = self.norms[n]
                    axes = (1, 2, 3) if n == 0 else (0, 1, 2, 3)
                    mean = made.mean(axes, keepdim=True)
                    deviation = (made.var(axes, correction=0, keepdim=True) + norm.eps).sqrt()
                    scale = (norm.weight[:, None, None, None] / deviation).expand(made.shape)
                    shift = norm.bias[:, None, None, None] - mean * scale
                    made = made * scale + shift
                    matrix = matrix * scale.flatten()[:, None]
                    bias = bias * scale.flatten() + shift.flatten()
                layers.append((x.flatten(), matrix, bias))
                x = self.acts[n](made) if n < 3 else made
            relevance = (weights * (1 if excitation else x)).flatten()
            for n, (given, matrix, bias) in reversed(list(enumerate(layers))):
                kind = first if n == 0 and first != "same" else rule
                relevance = shared_out(relevance, given, matrix, bias, kind, epsilon, bounds)
        return relevance


SMALL = a_probe((4, 4, 4))
TINY = 1e-7  # an activation near zero loses 1e-12 over its input of its relevance
LOW, HIGH = float(SMALL.image.min()), float(SMALL.image.max())


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("rule", ["z+", "epsilon"])
@pytest.mark.parametrize("first", ["w2", "zb", "same"])
def test_plain(norms, rule, first):
    """Dense matrices with the norms in them say the same."""
    net = seeded(Mixed(norms), 3)
    weights = TARGET.weights(SMALL, net(SMALL.image[None])[0].detach())
    plain = net.plainly(SMALL.image, weights, rule, first, 1e-3, bounds=(LOW, HIGH))
    found = explained(net, LRP(rule, first, 1e-3), SMALL)
    close(found.values, plain.reshape(4, 4, 4) / int((SMALL.label == 1).sum()), TINY)


@pytest.mark.parametrize("norms", [True, False])
def test_plain_excitation(norms):
    """The same matrices, without biases, starting with the target's weights."""
    net = seeded(Mixed(norms), 3)
    weights = TARGET.weights(SMALL, net(SMALL.image[None])[0].detach())
    plain = net.plainly(SMALL.image, weights, "excitation", "same", 1e-12, excitation=True)
    found = explained(net, ExcitationBackprop(), SMALL)
    close(found.values, plain.reshape(4, 4, 4) / int((SMALL.label == 1).sum()), TINY)


def test_nothing_excites():
    """In single precision too, what nothing excites is exactly nothing, with a negative norm."""
    net = nn.Sequential(conv(1, 4, 1), nn.ReLU(), conv(4, 4, 1), nn.BatchNorm3d(4), conv(4, 2, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
        net[3].weight.neg_()
        net[3].bias.fill_(100.0)
    probe = Probe("p", PROBE.image.abs().float(), PROBE.label)
    assert not explained(net.eval(), ExcitationBackprop(), probe).values.any()


@pytest.mark.parametrize("first", ["zb", "w2"])
def test_bounds_are_the_volumes(first):
    """By windows, the intensities lie between those of the whole volume."""
    net = seeded(Mixed(norms=False), 3)
    probe, window = a_probe((7, 4, 4)), (4, 4, 4)
    bounds = float(probe.image.min()), float(probe.image.max())
    with torch.no_grad():
        weights = TARGET.weights(probe, blended(net, probe.image, window))
    windows = Windows(probe.shape, window, 0.5)
    total = torch.zeros(probe.shape, dtype=torch.float64)
    for place in windows.places:
        at = (slice(None), *place)
        seen = weights[at] * windows.share(place, torch.float64)
        plain = net.plainly(probe.image[at], seen, "z+", first, 1e-6, bounds=bounds)
        total[place] += plain.reshape(4, 4, 4)
    found = explained(net, LRP("z+", first), probe, window=window)
    close(found.values, total / int((probe.label == 1).sum()), TINY)


# --- conservation


@pytest.mark.parametrize("method", [LRP("epsilon", f, 1e-12) for f in ("same", "w2")], ids=str)
def test_conserved_without_biases(method):
    """The map adds up to the score, whatever the activations, pools and skips."""
    parts = {n: conv(*io, bias=False) for n, io in {"a": (1, 4), "b": (4, 4), "c": (8, 4)}.items()}

    def forward(m, x):
        fine = F.leaky_relu(m["a"](x), 0.1)
        deep = F.relu(m["b"](F.max_pool3d(fine, 2)))
        joined = torch.cat([fine, F.interpolate(deep, scale_factor=2.0)], dim=1)
        return m["head"](F.elu(m["c"](joined)))

    net = seeded(Fn(forward, **parts, head=conv(4, 2, 1, bias=False)), 1)
    assert explained(net, method).completeness_error < 1e-6


def test_conserved_by_z_plus():
    """Where every unit has a positive contribution, nothing is lost."""
    net = nn.Sequential(
        conv(1, 4, bias=False), nn.ReLU(), nn.MaxPool3d(2), conv(4, 4, bias=False), nn.ReLU(),
        nn.Upsample(scale_factor=2), conv(4, 2, bias=False),
    )  # fmt: skip
    net = seeded(net, 1)
    with torch.no_grad():
        for part in net:
            if isinstance(part, nn.Conv3d):
                part.weight.abs_()
    probe = Probe("p", PROBE.image.abs(), PROBE.label)
    for first in ("same", "w2", "zb"):
        assert explained(net, LRP("z+", first, 1e-12), probe).completeness_error < 1e-6


def test_linear():
    """Of a linear network without biases, epsilon gives the input times gradient."""
    net = linear_net()
    plain = explained(net, InputXGradient())
    close(explained(net, LRP("epsilon", "same", 1e-12)).values, plain.values, 1e-6)


# --- products


class Gated(nn.Module):
    """Class 1 is twice a voxel times three times its neighbor."""

    def __init__(self, spelling):
        super().__init__()
        self.a, self.b = (nn.Conv3d(1, 1, 1, bias=False).double() for _ in range(2))
        nn.init.constant_(self.a.weight, 2.0)
        nn.init.constant_(self.b.weight, 3.0)
        self.spelling = spelling

    def forward(self, x):
        a, b = self.a(x), self.b(x).roll(-1, 2)
        product = {
            "mul": lambda: a * b,
            "mul_": lambda: a.mul_(b),
            "multiply": lambda: torch.multiply(a, b),
            "einsum": lambda: torch.einsum("bcijk,bcijk->bcijk", a, b),
            "einsum of a list": lambda: torch.einsum("bcijk,bcijk->bcijk", [a, b]),
            "matmul": lambda: (a[..., None] @ b[..., None])[..., 0],
        }[self.spelling]()
        return torch.cat([torch.zeros_like(x), product], dim=1)


@pytest.mark.parametrize(
    "spelling", ["mul", "mul_", "multiply", "einsum", "einsum of a list", "matmul"]
)
def test_products(spelling):
    """Each factor gets half of the relevance: of 5 and 7, 2 * 5 * 3 * 7 = 210."""
    image = torch.tensor([5.0, 7.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    found = explained(
        Gated(spelling),
        LRP("epsilon", "same", 1e-12),
        Probe("p", image),
        VoxelEvidence((0, 0, 0), label=1),
    )
    assert found.values.flatten().tolist() == pytest.approx([105.0, 105.0])
    assert found.completeness_error < 1e-9


# --- the input


def times(m, x):
    return m["h"](m["a"](x * 2))


def times_in_place(m, x):
    x *= 2
    return m["h"](m["a"](x))


def minus_in_place(m, x):
    return m["h"](m["a"](x.sub_(3.0)))


def added(m, x):
    return m["h"](m["a"](x) + x)


def added_in_place(m, x):
    made = m["a"](x)
    made += x
    return m["h"](made)


def joined(m, x):
    return m["h"](m["a"](torch.cat([x, m["a"](x)], dim=1).sum(1, keepdim=True)))


def stacked(m, x):
    return m["h"](m["a"](torch.stack([x, x * 3]).mean(0)))


def split(m, x):
    one, two = x.chunk(2, dim=2)
    return m["h"](m["a"](torch.cat([two, one], dim=2)))


def pooled(m, x):
    return m["h"](F.avg_pool3d(m["a"](x), 3, 1, 1) + F.avg_pool3d(x, 3, 1, 1))


def written(m, x):
    made = x * 2
    x[:, :, 0] = 0
    return m["h"](made + x)


def written_to(m, x):
    made = torch.zeros_like(x)
    made[:, :, :4] = x[:, :, 4:]
    made[:, :, 4:] = m["a"](x)[:, :, :4]
    other = torch.zeros_like(x)
    other[:] = x
    return m["h"](made + other)


def cloned(m, x):
    return m["h"](m["a"](x.clone()) + x.contiguous().view(x.shape))


USES = [times, times_in_place, minus_in_place, added, added_in_place, joined, stacked, split]
USES += [pooled, written, written_to, cloned]


@pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)
def test_uses_of_the_input(use):
    """Whatever uses the input besides convolutions, a linear network's is input times gradient."""
    net = seeded(Fn(use, a=conv(1, 1, bias=False), h=conv(1, 2, bias=False)), 1)
    plain = explained(net, InputXGradient()).values
    found = explained(net, LRP("epsilon", "same", 1e-13)).values
    close(found, plain, 1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_in_place_on_the_input(method):
    """What writes into the input is what makes a new tensor."""
    ways = [
        (lambda m, x: m["h"](m["a"](x.mul_(2)).relu()), lambda m, x: m["h"](m["a"](x * 2).relu())),
        (lambda m, x: m["h"](m["a"](x.relu_())), lambda m, x: m["h"](m["a"](x.relu()))),
        (lambda m, x: m["h"](m["a"](x.add_(1))), lambda m, x: m["h"](m["a"](x + 1))),
    ]
    for way in ways:
        nets = [seeded(Fn(f, a=conv(1, 3), h=conv(3, 2)), 1) for f in way]
        one, two = (explained(net, method).values for net in nets)
        close(one, two, 1e-12)


def test_only_convolutions_of_the_input_are_first():
    """Behind another function the first convolution is as the others; behind a mere view it is."""
    scaled, viewed, plain = (
        seeded(Fn(f, a=conv(1, 3), h=conv(3, 2)), 1)
        for f in (
            lambda m, x: m["h"](m["a"](x * 2.0).relu()),
            lambda m, x: m["h"](m["a"](x.to(torch.float64).contiguous().view(x.shape)).relu()),
            lambda m, x: m["h"](m["a"](x).relu()),
        )
    )
    for first in ("w2", "zb"):
        one = explained(scaled, LRP(first=first)).values
        assert torch.equal(one, explained(scaled, LRP(first="same")).values)
        one = explained(viewed, LRP(first=first)).values
        assert torch.equal(one, explained(plain, LRP(first=first)).values)
        assert not torch.allclose(one, explained(plain, LRP(first="same")).values)


def test_w2_does_not_see_the_input():
    """In one linear layer without bias, squares of weights share, whatever the intensities."""
    net = nn.Conv3d(1, 2, (3, 1, 1), padding=(1, 0, 0), bias=False).double()
    with torch.no_grad():
        net.weight[1, 0, :, 0, 0] = torch.tensor([1.0, -2.0, 3.0])
    image = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    found = explained(net, LRP(epsilon=1e-12), Probe("p", image), VoxelEvidence((1, 0, 0), label=1))
    score = -2 * 2 + 3 * 5
    assert found.values.flatten().tolist() == pytest.approx(
        [score * part / 14 for part in (1, 4, 9)]
    )


# --- merging


def pair(one, two, **parts):
    """Two networks with the same weights that are written down differently."""
    first, second = (seeded(Fn(f, **parts), 1) for f in (one, two))
    with torch.no_grad():
        for part in first.modules():
            if isinstance(part, nn.BatchNorm3d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return first, second


MERGES = {
    "conv, relu_, norm": (
        lambda m, x: m["h"](m["b"](m["n"](F.relu(m["a"](x), inplace=True)))),
        lambda m, x: m["h"](m["b"](m["n"](F.relu(m["a"](x))))),
    ),
    "conv, +=, norm": (
        lambda m, x: m["h"](m["n"](m["b"](u := m["a"](x).relu()).add_(u)).relu()),
        lambda m, x: m["h"](m["n"](m["b"](u := m["a"](x).relu()).add(u)).relu()),
    ),
    "conv, sub_, norm": (
        lambda m, x: m["h"](m["b"](m["n"](m["a"](x).sub_(0.3)).relu())),
        lambda m, x: m["h"](m["b"](m["n"](m["a"](x) - 0.3).relu())),
    ),
    "conv, written, norm": (
        lambda m, x: m["h"](m["b"](m["n"](zeroed(m["a"](x))).relu())),
        lambda m, x: m["h"](m["b"](m["n"](zeroed(m["a"](x) * 1.0)).relu())),
    ),
    "conv, clone, norm": (
        lambda m, x: m["h"](m["b"](m["n"](m["a"](x).clone()).relu())),
        lambda m, x: m["h"](m["b"](m["n"](m["a"](x)).relu())),
    ),
}


def zeroed(x):
    x[:, :, 0] = 0
    return x


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.InstanceNorm3d])
@pytest.mark.parametrize("name", MERGES)
def test_merging(name, norm):
    """A norm is merged with the convolution whose very answer it gets, and no other."""
    parts = {"a": conv(1, 3), "n": norm(3, affine=True), "b": conv(3, 3), "h": conv(3, 2, 1)}
    one, two = (
        explain(Predictor(net), PROBE, {"t": TARGET}, METHODS)
        for net in pair(*MERGES[name], **parts)
    )
    for first, second in zip(one, two, strict=True):
        close(first.values, second.values, 1e-12)


def test_merging_is_not_passing():
    """Merged with a norm, a convolution shares out otherwise than without it."""
    parts = {"a": conv(1, 3), "n": nn.BatchNorm3d(3), "h": conv(3, 2, 1)}
    merged, apart = pair(
        lambda m, x: m["h"](m["n"](m["a"](x)).relu()),
        lambda m, x: m["h"](m["n"](m["a"](x) * 1.0).relu()),
        **parts,
    )
    assert not torch.allclose(explained(merged, LRP()).values, explained(apart, LRP()).values)


def test_running_statistics():
    """An InstanceNorm with running statistics is a BatchNorm."""
    running, batch = (
        seeded(nn.Sequential(conv(1, 3), norm(3, affine=True, **kw), nn.ReLU(), conv(3, 2)), 1)
        for norm, kw in ((nn.InstanceNorm3d, {"track_running_stats": True}), (nn.BatchNorm3d, {}))
    )
    with torch.no_grad():
        batch[1].running_mean.normal_()
        batch[1].running_var.uniform_(0.5, 2.0)
        running[1].load_state_dict(batch[1].state_dict())
    for method in METHODS.values():
        close(explained(running, method).values, explained(batch, method).values, 1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.InstanceNorm3d])
def test_taps_do_not_break_the_merge(norm):
    """A convolution that is tapped in the same walk is merged as before; its own map is refused."""
    net = seeded(
        nn.Sequential(conv(1, 4), norm(4, affine=True), nn.ReLU(inplace=True), conv(4, 2)), 1
    )
    methods = {
        "input": ExcitationBackprop(),
        "conv": ExcitationBackprop("0"),
        "norm": ExcitationBackprop("1"),
        "act": ExcitationBackprop("2"),
    }
    found = explain(Predictor(net), PROBE, {"t": TARGET}, methods)
    assert [one.status for one in found] == ["ok", "unsupported", "ok", "ok"]
    assert "A convolution is merged with the norm behind it; name the norm" in found[1].reason
    assert torch.equal(found[0].values, explained(net, ExcitationBackprop()).values)
    close(found[2].values, found[3].values, 1e-9)


def test_batch_statistics_are_refused():
    """A BatchNorm that uses them has no constants."""
    net = seeded(nn.Sequential(conv(1, 2), nn.BatchNorm3d(2, track_running_stats=False)))
    for method in METHODS.values():
        [found] = explain(Predictor(net), PROBE, {"t": TARGET}, {"m": method})
        assert found.status == "unsupported"
        assert "BatchNorm without running statistics" in found.reason


def test_nothing_to_weigh():
    """A network without convolutions is refused, with the method that does it."""
    net = Fn(lambda m, x: torch.cat([x, x.relu()], 1))
    [found] = explain(Predictor(net), PROBE, {"t": TARGET}, {"m": LRP()})
    assert found.status == "unsupported"
    assert "found no convolution or linear function" in found.reason
    assert "Use `InputXGradient`" in found.reason


def test_a_batch_of_volumes():
    """Bounds and contributions are those of each row, whatever the others are."""
    net = seeded(nn.Sequential(conv(1, 3), nn.InstanceNorm3d(3), nn.ReLU(), conv(3, 2)), 1)
    probe = a_probe((14, 8, 8))
    for method in METHODS.values():
        one, many = (
            explained(net, method, probe, window=(8, 8, 8), looks_per_pass=n).values for n in (1, 4)
        )
        close(one, many, 1e-12)


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_wrong_epsilon(epsilon):
    """Is refused where it is written down."""
    with pytest.raises(ValueError, match=r"must be positive"):
        LRP(epsilon=epsilon)
