"""A rule changes how functions run backward, whoever calls them, and nothing else."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets_for_tests import Hungry, a_probe, blended, close, seeded
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

from lightning_segxai import Occlusion
from lightning_segxai.explain import explain
from lightning_segxai.guard import undisturbed
from lightning_segxai.methods.deeplift import DeepLift, DeepLiftShap
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.guided import Deconvolution, GuidedBackprop
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.relevance import (
    LRP,
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
)
from lightning_segxai.rules.compared import Frozen, Rescaled
from lightning_segxai.rules.interception import stabilized, through
from lightning_segxai.rules.rectified import Rectified
from lightning_segxai.rules.relevance import Relevance
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, ClassMargin, Target
from lightning_segxai.values import UnsupportedError
from lightning_segxai.windows import Windows

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))
from networks import NETWORKS, STYLES, network

RULES = [
    Rectified(True),
    Rectified(False),
    Frozen(),
    Rescaled("frozen"),
    Rescaled("exact"),
    Relevance(),
    Relevance("epsilon", "same"),
    Relevance("z+", "zb"),
    Relevance(first="same", excitation=True),
    Relevance(first="same", excitation=True, contrast=True),
]
METHODS = {
    "guided": GuidedBackprop(),
    "deconvnet": Deconvolution(),
    "deeplift": DeepLift(0.3),
    "exact": DeepLift("noise", norm="exact"),
    "shap": DeepLiftShap(2, 1.0),
    "lrp": LRP(),
    "epsilon": LRP("epsilon", "same", 0.01),
    "zb": LRP("z+", "zb"),
    "excitation": ExcitationBackprop(),
    "contrast": ContrastiveExcitationBackprop(),
}
PROBE = a_probe()
X = PROBE.image[None]
TARGET = ClassMargin(1, 0)
TARGETS = {"t": TARGET}


def explained(net, method, probe=PROBE, **settings):
    """The map of one method, which must be there."""
    [found] = explain(Predictor(net, **settings), probe, TARGETS, {"m": method})
    assert found.status == "ok", found.reason
    return found.values


def maps(net):
    """Those of one method for each rule."""
    names = ("guided", "deconvnet", "deeplift", "lrp", "epsilon", "excitation")
    found = explain(Predictor(net), PROBE, TARGETS, {name: METHODS[name] for name in names})
    assert [a.status for a in found] == ["ok"] * len(names)
    return [a.values for a in found]


class Fn(nn.Module):
    """A network of named parts and a function that calls them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.way = forward

    def forward(self, x):
        return self.way(self.parts, x)


def conv(given, made, size=3):
    return nn.Conv3d(given, made, size, padding=size // 2)


def acting(act):
    """Two convolutions, each with the activation behind it, and a head."""
    parts = {"a": conv(1, 3), "b": conv(3, 3), "head": conv(3, 2, 1)}
    net = seeded(Fn(lambda m, x: m["head"](act(m["b"](act(m["a"](x))))), **parts), 1)
    if isinstance(act, nn.Module):
        net.parts["act"] = act
    return net


def normal():
    """With InstanceNorm, ELU, pooling and PReLU, for all rules to find something."""
    return seeded(
        nn.Sequential(
            conv(1, 3),
            nn.InstanceNorm3d(3, affine=True),
            nn.ELU(),
            nn.MaxPool3d(2),
            nn.Upsample(scale_factor=2),
            conv(3, 3),
            nn.PReLU(),
            conv(3, 2, 1),
        ),
        1,
    )


NORMAL = normal()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_value_stays(name):
    """No rule changes the logits, but those of a baseline under frozen norms."""
    predictor = Predictor(network(name).requires_grad_(False))  # constants, as in a walk
    x, other = PROBE.image, a_probe(seed=1).image
    plain, plain_other = predictor.predict(x), predictor.predict(other)
    convolutions = predictor.rehearse(x).convolutions
    for rule in RULES:
        rows = {None: [x], "baseline": [x, other], "origin": [x, x]}[rule.partner]
        mode = rule.interception([x], convolutions)
        logits = predictor.window_logits(torch.stack(rows).requires_grad_(), mode)
        assert logits.requires_grad
        logits = logits.detach()
        close(logits[0], plain, 1e-12)
        if rule == Rescaled("exact"):
            close(logits[1], plain_other, 1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_style_does_not_matter(method):
    """Module, in-place, reused, functional and method activations give the same map."""
    first, *others = (explained(network(f"{style} ReLU"), method) for style in STYLES)
    for other in others:
        close(other, first, 1e-12)


SPELLINGS = {
    "LeakyReLU, positional": (lambda x: F.leaky_relu(x, 0.2, True), lambda x: F.leaky_relu(x, 0.2)),
    "LeakyReLU, module": (nn.LeakyReLU(0.2, inplace=True), lambda x: F.leaky_relu(x, 0.2)),
    "leaky_relu_": (lambda x: F.leaky_relu_(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "PReLU": (nn.PReLU(init=0.25).double(), lambda x: F.leaky_relu(x, 0.25)),
    "ELU": (nn.ELU(0.7, inplace=True), lambda x: F.elu(x, 0.7)),
    "Hardtanh": (nn.Hardtanh(-0.5, 0.9, inplace=True), lambda x: x.clamp(-0.5, 0.9)),
    "ReLU6": (nn.ReLU6(inplace=True), lambda x: F.hardtanh(x, 0.0, 6.0)),
    "SiLU": (nn.SiLU(inplace=True), F.silu),
    "torch.relu_": (torch.relu_, F.relu),
    "Tensor.relu_": (lambda x: x.relu_(), F.relu),
    "Tensor.clamp_": (lambda x: x.clamp_(min=0), F.relu),
    "Threshold": (nn.Threshold(0.0, 0.0, inplace=True), F.relu),
    "keyword": (lambda x: torch.clamp(input=x, min=0), F.relu),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_spelling_does_not_matter(name):
    """Nor do positional flags, functions that write and keywords."""
    spelled, plain = (maps(acting(act)) for act in SPELLINGS[name])
    for one, two in zip(spelled, plain, strict=True):
        close(one, two, 1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_others_hold_changes_too(method):
    """A skip connection holds a tensor that a ReLU overwrites later."""

    def overwriting(m, x):
        held = made = m["a"](x)
        made.relu_()
        return m["head"](held + m["b"](made))

    def plain(m, x):
        made = m["a"](x).relu()
        return m["head"](made + m["b"](made))

    nets = [seeded(Fn(f, a=conv(1, 3), b=conv(3, 3), head=conv(3, 2, 1)), 1) for f in (0, 0)]
    for net, way in zip(nets, (overwriting, plain), strict=True):
        net.way = way
    close(explained(nets[0], method), explained(nets[1], method), 1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_compiled(method):
    """Inside the guard a compiled network gives the same map, bit by bit."""
    net = normal()
    compiled = torch.compile(net, backend="eager")
    with undisturbed(compiled, 0):
        assert torch.equal(explained(compiled, method), explained(net, method))


@pytest.mark.parametrize("name", ["UNet3d", "MONAI UNet"])
def test_mixed_precision(name):
    """Under bf16 autocast a map is finite and that of float32, but for rounding."""
    net = network(name, seed=0).float()  # whose maps do not cancel
    probe = dataclasses.replace(PROBE, image=PROBE.image.float())
    methods = {k: m for k, m in METHODS.items() if k not in ("contrast", "epsilon")}  # they cancel

    def maps(**settings):
        found = explain(Predictor(net, **settings), probe, TARGETS, methods)
        assert all(a.status == "ok" for a in found)
        return torch.stack([a.values.flatten() for a in found])

    low = maps(forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    for one, two in zip(maps(), low, strict=True):
        assert float(torch.corrcoef(torch.stack([one, two]))[0, 1]) > 0.99


def test_half_precision_weights():
    """A network in bfloat16 altogether is explained as well."""
    net = normal().bfloat16()
    probe = dataclasses.replace(PROBE, image=PROBE.image.float())
    for method in (GuidedBackprop(), DeepLift(0.3), LRP(), ExcitationBackprop()):
        explained(net, method, probe)


class Checkpointed(nn.Module):
    """A sequence of which two parts are not kept but run forward once more."""

    def __init__(self, net, reentrant=False):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        x = checkpoint(self.net[:4], x, use_reentrant=self.reentrant)
        x = checkpoint(self.net[4:7], x, use_reentrant=self.reentrant)
        return self.net[7](x)


CHECKPOINTED = {k: m for k, m in METHODS.items() if k != "contrast"} | {
    "frozen": IntegratedGradients(3, norm="frozen")
}


@pytest.mark.parametrize("method", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointing(method):
    """What runs forward once more does so under the rule, with parameters as constants."""
    net = Checkpointed(normal())
    close(explained(net, method), explained(net.net, method), 1e-12)
    assert all(p.requires_grad for p in net.parameters())


class Swish(torch.autograd.Function):
    """An activation with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        [x] = ctx.saved_tensors
        return gradient * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid()))


class Pointwise(nn.Module):
    def forward(self, x):
        return torch.cat([-x, 2 * x], dim=1)


REFUSED = {
    "reentrant": (lambda: Checkpointed(normal(), True), "cannot see into reentrant checkpointing"),
    "trace": (lambda: torch.jit.trace(normal(), X), "it is scripted or traced"),
    "traced part": (
        lambda: nn.Sequential(normal(), torch.jit.trace(conv(2, 2).double(), torch.cat([X, X], 1))),
        "its part 1 is scripted or traced",
    ),
    "custom": (lambda: acting(Swish.apply), "cannot see into the custom autograd function `Swish`"),
    "nothing": (Pointwise, "found no "),
}


@pytest.mark.filterwarnings("ignore")  # of torch: scripting is old
@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_refused(why, method):
    """What a rule cannot see it refuses with the reason, and other cells go on."""
    make, reason = REFUSED[why]
    other = Occlusion(4, 4) if why == "reentrant" else Saliency()
    methods = {"ruled": method, "other": other}
    ruled, other = explain(Predictor(make()), PROBE, TARGETS, methods)
    assert (ruled.status, other.status) == ("unsupported", "ok")
    assert reason in ruled.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scripted(rule):
    """A scripted network is refused before it runs, and so is a scripted part."""
    with pytest.raises(UnsupportedError, match=r"cannot see into .*: it is scripted or traced"):
        rule.check(torch.jit.script(normal()))
    with pytest.raises(UnsupportedError, match="its part 0 is scripted or traced"):
        rule.check(nn.Sequential(torch.jit.script(conv(1, 1))))
    rule.check(normal())


def test_contrast_and_checkpointing():
    """A forward run once more makes the last convolution unknown."""
    net = Checkpointed(normal())
    method = ContrastiveExcitationBackprop()
    [found] = explain(Predictor(net), PROBE, TARGETS, {"m": method})
    assert found.status == "unsupported"
    assert "cannot tell the last convolution" in found.reason
    assert all(p.requires_grad for p in net.parameters())


def traces(net):
    """What an explanation must leave as it was."""
    hooks = [
        len(getattr(part, kind))
        for part in net.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    trained = [p.requires_grad for p in net.parameters()]
    return hooks, trained, [p.grad for p in net.parameters()], _len_torch_function_stack()


class Failing(nn.Module):
    """Fails forward at its n-th call, or backward."""

    def __init__(self, net, call, backward=False):
        super().__init__()
        self.net, self.call, self.backward = net, call, backward

    def forward(self, x):
        self.call -= 1
        made = self.net(x)
        if self.call < 0 and self.backward and made.requires_grad:
            made.register_hook(self.fail)
        elif self.call < 0 and not self.backward:
            self.fail(made)
        return made

    def fail(self, _):
        raise ValueError("the net fails")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("fails", [None, "forward", "backward"])
def test_nothing_is_left(method, fails):
    """Flags, hooks, gradients and the stack of modes are as before, also after an exception."""
    net = Failing(normal(), 100 if fails is None else 1, fails == "backward")
    net.net[0].weight.requires_grad_(False)
    net.net[7].bias.requires_grad_(False)
    before = traces(net)
    if fails:
        with pytest.raises(ValueError, match="the net fails"):
            explained(net, method)
    else:
        explained(net, method)
    assert traces(net) == before


class Doubled(nn.Module):
    """A weight that is a product of two parameters."""

    def __init__(self, like):
        super().__init__()
        self.factor = nn.Parameter(torch.rand_like(like) + 0.5)

    def forward(self, weight):
        return weight * self.factor


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_parametrized_weights(method):
    """A weight that is computed from parameters is a constant, no product of activations."""
    net = normal()
    weight_norm(net[0])
    parametrize.register_parametrization(net[5], "weight", Doubled(net[5].weight))
    found = explained(net, method)
    assert all(p.requires_grad for p in net.parameters())
    for part in (net[0], net[5]):
        parametrize.remove_parametrizations(part, "weight")
    close(found, explained(net, method), 1e-12)


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory(backward):
    """The batch is halved until it fits, with a fresh interception each time."""
    probe, settings = a_probe((12, 8, 8)), {"window": (8, 8, 8), "looks_per_pass": 2}
    methods = {k: m for k, m in METHODS.items() if k != "contrast"}  # it is two of the others'
    plain = explain(Predictor(NORMAL, **settings), probe, TARGETS, methods)
    for room in (1, 2):
        error = torch.OutOfMemoryError("out of memory")
        hungry = Hungry(NORMAL, room, error, backward)
        found = explain(
            Predictor(hungry, **settings), probe, TARGETS, methods, failed=lambda *_: None
        )
        assert hungry.refused > 0
        for one, two, method in zip(found, plain, methods.values(), strict=True):
            if room == 1 and isinstance(method, DeepLift | DeepLiftShap):
                assert one.status == "failed"  # two rows are the least
            else:
                close(one.values, two.values, 1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_two_targets(method):
    """Share the forward pass, and get what each gets alone."""
    targets = {"one": ClassEvidence(1), "two": ClassMargin(0, 1)}
    both = explain(Predictor(NORMAL), PROBE, targets, {"m": method})
    for (name, target), found in zip(targets.items(), both, strict=True):
        [alone] = explain(Predictor(NORMAL), PROBE, {name: target}, {"m": method})
        assert torch.equal(found.values, alone.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Target):
    """Any weights."""

    given: torch.Tensor

    def weights(self, probe, logits):
        return self.given


OF_WINDOWS = {
    k: METHODS[k] for k in ("guided", "deconvnet", "deeplift", "lrp", "epsilon", "excitation")
}


@pytest.mark.parametrize("method", OF_WINDOWS.values(), ids=OF_WINDOWS)
@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.InstanceNorm3d])
def test_windows(method, norm):
    """The map by windows is the sum of each window's, of the target's weights times its share."""
    net = seeded(nn.Sequential(conv(1, 3), norm(3), nn.ELU(), nn.MaxPool3d(3, 1, 1), conv(3, 2)), 1)
    probe, window = a_probe((13, 9, 8)), (8, 8, 8)
    with torch.no_grad():
        weights = TARGET.weights(probe, blended(net, probe.image, window))
    windows = Windows(probe.shape, window, 0.5)
    assert len(windows.places) == 6
    total = torch.zeros(probe.shape, dtype=torch.float64)
    for place in windows.places:
        at = (slice(None), *place)
        target = Given(weights[at] * windows.share(place, torch.float64))
        piece = dataclasses.replace(probe, image=probe.image[at], label=probe.label[place])
        [found] = explain(Predictor(net), piece, {"t": target}, {"m": method})
        total[place] += found.values * int((target.given != 0).any(0).sum())
    voxels = int((weights != 0).any(0).sum())
    close(explained(net, method, probe, window=window), total / voxels, 1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_one_window(method):
    """A window of the volume's size is the whole, bit by bit; the batch does not matter."""
    assert torch.equal(explained(NORMAL, method, window=(8, 8, 8)), explained(NORMAL, method))
    probe = a_probe((13, 8, 8))
    one, many = (
        explained(NORMAL, method, probe, window=(8, 8, 8), looks_per_pass=n) for n in (1, 9)
    )
    close(one, many, 1e-12)


def test_through():
    """The value of one, the gradient of the other."""
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = through(x**2, 3 * x)
    y.sum().backward()
    assert y.tolist() == [1.0, 4.0]
    assert x.grad.tolist() == [3.0, 3.0]


def test_stabilized():
    """Zero counts as positive, and half precision has an epsilon too."""
    assert stabilized(torch.tensor([-1.0, 0.0, 2.0]), 0.5).tolist() == [-1.5, 0.5, 2.5]
    assert stabilized(torch.zeros(1, dtype=torch.float16), 1e-12).item() > 0
