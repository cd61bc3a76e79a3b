"""Randomization: what stays of a map on random weights, and that the network keeps its own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from held import Functional, map_of, model_of, random_values
from nets_for_tests import Metered, a_probe, layered, normed, seeded
from scipy import stats
from torch import nn
from torch.nn.utils import parametrizations

from lightning_segxai.assess import assess
from lightning_segxai.examine import examine
from lightning_segxai.faithfulness.base import explained
from lightning_segxai.faithfulness.execution import parameters_in_order
from lightning_segxai.faithfulness.randomization import (
    EfficientRandomization,
    Randomization,
    complexity,
    randomized,
    reparametrized,
)
from lightning_segxai.focus.similarity import StructuralSimilarity
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.cams import GradCAM
from lightning_segxai.methods.deeplift import DeepLift
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.guided import GuidedBackprop
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.values import UnsupportedError

METHODS = {
    "saliency": Saliency(),
    "ixg": InputXGradient(),
    "ig": IntegratedGradients(3),
    "smooth": SmoothGrad(samples=2),
    "cam": GradCAM("body.0"),
    "guided": GuidedBackprop(),
    "lift": DeepLift(),
}


@dataclass(frozen=True)
class Edges(AttributionMethod):
    """Shows the volume, whatever the network is."""

    def attribute(self, model, x):
        return x.abs().sum(0)


@dataclass(frozen=True)
class Gives(AttributionMethod):
    """The same number for each voxel, but the first of half of it."""

    value: float

    def attribute(self, model, x):
        made = torch.full(x.shape[1:], self.value, dtype=x.dtype)
        made[0, 0, 0] /= 2
        return made


class Parts(nn.Module):
    """Layers defined in another order than they are called in; one is called twice; some never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv3d(2, 2, 1)
        self.scale = nn.Parameter(torch.ones(1, 2, 1, 1, 1))
        self.twice = nn.Conv3d(2, 2, 3, padding=1)
        self.unused = nn.Conv3d(1, 1, 1)
        self.norm = nn.BatchNorm3d(2)
        self.first = nn.Conv3d(1, 2, 3, padding=1)
        self.twin = nn.Conv3d(2, 2, 3, padding=1)
        self.twin.weight = self.twice.weight
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.norm(self.twice(self.first(x))))
        return self.last(self.scale * self.twin(self.twice(x)))


def own_map(model, method):
    return map_of(model, explained(model, method, model.probe.image))


def rectified(seed=0):
    return layered(1, rectified=True) if seed == 0 else seeded(layered(1, rectified=True), seed)


def test_the_order_is_that_of_execution():
    """The last call counts; what is never called comes first; shared weights have one name."""
    model = model_of(seeded(Parts()), a_probe())
    assert parameters_in_order(model) == [
        ["unused.weight", "unused.bias"],
        ["scale"],  # the network's own
        ["first.weight", "first.bias"],
        ["norm.weight", "norm.bias"],
        ["twice.weight", "twice.bias"],
        ["twin.bias"],
        ["last.weight", "last.bias"],
    ]
    assert not any(m._forward_pre_hooks for m in model.predictor.module.modules())


def test_weight_norm_is_found():
    """Its parameters belong to a part that is called when the weight is needed."""
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv3d(1, 2, 3, padding=1)), nn.Conv3d(2, 2, 1)
    ).double()
    names = parameters_in_order(model_of(net, a_probe()))
    own = "0.parametrizations.weight.original"
    assert sorted(n for layer in names for n in layer) == sorted(dict(net.named_parameters()))
    assert names[-1] == ["1.weight", "1.bias"]
    assert [f"{own}0", f"{own}1"] in names


def test_random_weights_have_the_moments_of_the_learned():
    """But other values; what has none to lose stays."""
    net = seeded(nn.Sequential(nn.Conv3d(1, 40, 3, padding=1), nn.PReLU(), nn.Conv3d(40, 2, 1)))
    with torch.no_grad():
        net[0].weight.mul_(3).add_(1)
        net[2].bias.fill_(0.25)
    model = model_of(net, a_probe())
    own = {name: p.detach() for name, p in net.named_parameters()}
    drawn = randomized(list(own), model, 0)
    assert drawn.keys() == own.keys()
    weight = drawn["0.weight"]
    assert weight.dtype == torch.float64
    assert float(weight.mean()) == pytest.approx(float(own["0.weight"].mean()), abs=0.3)
    assert float(weight.std()) == pytest.approx(float(own["0.weight"].std()), rel=0.1)
    assert abs(np.corrcoef(weight.ravel(), own["0.weight"].ravel())[0, 1]) < 0.1
    for same in ("1.weight", "2.bias"):
        assert torch.equal(drawn[same], own[same])
    again, other = (randomized(list(own), model, seed)["0.weight"] for seed in (0, 1))
    assert torch.equal(weight, again)
    assert not torch.equal(weight, other)


@pytest.mark.parametrize("window", [None, (8, 8, 4)], ids=["whole", "windows"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_map_is_that_of_a_network_with_these_weights(method, window):
    """Of another network, into which they are written."""
    net, other = rectified(), rectified()
    probe = a_probe()
    model = model_of(net, probe, window=window)
    drawn = randomized([n for n, _ in net.named_parameters()], model, 3)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(drawn[name])
    theirs = model_of(other, probe, window=window)
    x = probe.image
    found = explained(reparametrized(model, drawn), method, x)
    assert torch.equal(found, explained(theirs, method, x))
    assert not torch.allclose(found, explained(model, method, x))


@pytest.mark.parametrize("order", ["bottom_up", "top_down"])
@pytest.mark.parametrize("likeness", ["spearman", "ssim"])
def test_it_is_that_of_a_plain_loop(order, likeness):
    """Layer by layer, into a network's own weights; Spearman from scipy."""
    net, other = rectified(), rectified()
    model, method = model_of(net, a_probe()), IntegratedGradients(3)
    mapped = own_map(model, method)
    metric = Randomization(99, order, likeness)
    layers = parameters_in_order(model)
    drawn = randomized([n for layer in layers for n in layer], model, 0)
    expected = []
    for layer in layers if order == "bottom_up" else layers[::-1]:
        with torch.no_grad():
            for name in layer:
                other.get_parameter(name).copy_(drawn[name])
        values = explained(model_of(other, model.probe), method, model.probe.image)
        if likeness == "spearman":
            pair = mapped.values.abs().ravel(), values.abs().ravel()
            expected.append(stats.spearmanr(*pair).statistic)
        else:
            now = map_of(model, values)
            expected.append(StructuralSimilarity().measure(mapped, now))
    assert len(expected) == len(layers) > 2
    curve = metric.curve(model, mapped, method)
    assert curve.tolist() == pytest.approx(expected, abs=1e-9)
    assert metric.assess(model, mapped, method) == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.parametrize(("stages", "ends"), [(1, [7]), (2, [4, 7]), (3, [2, 5, 7]), (7, None)])
def test_stages_are_equal_portions_and_the_last_is_all(stages, ends):
    """Of the layers; all that was random stays so."""
    model = model_of(seeded(Parts()), a_probe())
    layers = parameters_in_order(model)
    got = [set(part.predictor.parameters) for part in Randomization(stages).networks(model)]
    expected = [{n for layer in layers[:end] for n in layer} for end in ends or range(1, 8)]
    assert got == expected
    backwards = [
        len(p.predictor.parameters) for p in Randomization(stages, "top_down").networks(model)
    ]
    assert backwards[-1] == len(got[-1]) == 12
    assert backwards == sorted(backwards)


def test_a_method_that_ignores_the_network_stays_itself():
    """1 and 0, to the last bit."""
    model = model_of(rectified(), a_probe())
    mapped = own_map(model, Edges())
    for likeness in ("spearman", "ssim"):
        assert Randomization(likeness=likeness).assess(model, mapped, Edges()) == pytest.approx(1.0)
    assert EfficientRandomization().assess(model, mapped, Edges()) == 0.0


def test_zeros_and_nan():
    """A map of zeros is like no other; NaN stays NaN; a map without order has no number."""
    model = model_of(rectified(), a_probe())
    mapped = map_of(model, random_values((8, 8, 8)))
    assert Randomization(2).assess(model, mapped, Gives(0.0)) == 0.0
    for metric in (Randomization(2), EfficientRandomization()):
        assert math.isnan(metric.assess(model, mapped, Gives(math.nan)))
    flat = map_of(model, torch.ones(8, 8, 8, dtype=torch.float64))
    assert Randomization(2).assess(model, flat, Gives(1.0)) is None
    assert EfficientRandomization().assess(model, flat, Gives(1.0)) is None


def test_complexity_is_the_entropy_of_a_histogram():
    """By numpy and scipy; 0 for one bin, the logarithm of the number for equal ones."""
    values = random_values((6, 7, 8))
    expected = stats.entropy(np.histogram(values.ravel(), 100)[0])
    assert complexity(values, 100) == pytest.approx(expected, abs=1e-12)
    assert complexity(torch.ones(4, 4, 4), 10) == 0.0
    assert complexity(torch.arange(64.0).reshape(4, 4, 4), 8) == pytest.approx(math.log(8))


def test_the_efficient_form_is_its_formula():
    """Of the map of the fully random network."""
    net, method = rectified(), Saliency()
    model = model_of(net, a_probe())
    mapped = own_map(model, method)
    [random] = Randomization(1).networks(model)
    values = explained(random, method, model.probe.image)
    simple = complexity(mapped.values, 50)
    expected = (complexity(values, 50) - simple) / simple
    found = EfficientRandomization(50).assess(model, mapped, method)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found != 0


@pytest.mark.parametrize(
    "metric", [Randomization(), EfficientRandomization()], ids=["full", "efficient"]
)
def test_the_network_keeps_its_weights(metric):
    """The same tensors, never written to, gradients and buffers too; also where a method raises."""
    net = normed()
    net(torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)).sum().backward()
    before = {n: (id(p), p._version, p.detach().clone()) for n, p in net.named_parameters()}
    grads = [p.grad for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    modes = [m.training for m in net.modules()]
    targets, methods = {"t": ClassEvidence(1, "everywhere")}, {"s": Saliency(), "r": Saliency()}
    maps = examine(net, [a_probe()], targets, methods)

    @dataclass(frozen=True)
    class Raises(AttributionMethod):
        def attribute(self, model, x):
            model(x[None])
            raise LookupError("here")

    methods |= {"r": Raises()}
    told = []
    rows = assess(
        net,
        maps,
        targets,
        {"m": metric},
        methods=methods,
        failed=lambda *what: told.append(what[3]),
    )
    assert [r.status for r in rows] == ["ok", "failed"]
    assert [str(error) for error in told] == ["here"]
    assert [m.training for m in net.modules()] == modes
    for name, p in net.named_parameters():
        assert (id(p), p._version) == before[name][:2]
        assert torch.equal(p, before[name][2])
    assert all(a is b for a, b in zip([p.grad for p in net.parameters()], grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "metric", [Randomization(3), EfficientRandomization()], ids=["full", "efficient"]
)
def test_the_cost_is_what_is_counted(metric, method):
    """The method's own for each network, and one."""
    net = Metered(rectified())
    method = GradCAM("net.body.0") if isinstance(method, GradCAM) else method
    model = model_of(net, a_probe((8, 8, 12)), window=(8, 8, 8))
    mapped = own_map(model, method)
    before = dict(vars(net.counts))
    metric.assess(model, mapped, method)
    passes = metric.passes((8, 8, 12), len(model.windows.places), method)
    assert net.counts["forward"] - before["forward"] == passes.forward
    assert net.counts["backward"] - before["backward"] == passes.backward


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
def test_what_cannot_be_is_refused():
    """An unknown method, a scripted network; each says what to do."""
    mapped_of = random_values((8, 8, 8))
    model = model_of(rectified(), a_probe())
    for metric in (Randomization(), EfficientRandomization()):
        with pytest.raises(UnsupportedError, match="Give `methods=`"):
            metric.assess(model, map_of(model, mapped_of))
    scripted = torch.jit.script(nn.Conv3d(1, 2, 1).double())
    model = model_of(nn.Sequential(scripted), a_probe())
    with pytest.raises(UnsupportedError, match="is scripted"):
        Randomization().assess(model, map_of(model, mapped_of), Saliency())


def test_a_network_without_parameters_has_no_number():
    """Nothing can be random."""
    model = model_of(Functional(lambda x: x.sum()), a_probe())
    with pytest.raises(UnsupportedError, match="has no parameters"):
        Randomization().assess(model, map_of(model, random_values((8, 8, 8))), Saliency())


@pytest.mark.parametrize("seed", range(10))
def test_a_broken_method_is_found_out(seed):
    """The gradient of a network initialized anew: it is as right for random weights."""

    @dataclass(frozen=True)
    class Reinitialized(AttributionMethod):
        """Explains a network that was never trained, and never mind the one it is asked about."""

        def attribute(self, model, x):
            torch.manual_seed(seed)
            net = rectified(seed + 100)
            x = x.detach().clone().requires_grad_()
            net(x[None])[0, 1].sum().backward()
            return x.grad.abs().sum(0)

    net = rectified(seed + 1)
    probe = a_probe(seed=seed)
    targets, methods = (
        {"t": ClassEvidence(1, "everywhere")},
        {"b": Reinitialized(), "s": Saliency()},
    )
    broken, sound = examine(net, [probe], targets, methods)
    model = model_of(net, probe)
    metric = Randomization()
    assert metric.assess(model, broken, methods["b"]) == pytest.approx(1.0)
    assert metric.assess(model, sound, methods["s"]) < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stages": 0}, "(stages=0)` must be at least 1")],
)
def test_wrong_settings_die_at_once(arguments, message):
    """When the metric is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Randomization(**arguments)
    with pytest.raises(ValueError, match=re.escape("(bins=1)` must be at least 2")):
        EfficientRandomization(1)
