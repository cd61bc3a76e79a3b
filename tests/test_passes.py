"""Walks: where the network is looked at, what a look shows, and what memory does."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from nets_for_tests import (
    Answers,
    Counting,
    Hungry,
    Reused,
    a_probe,
    close,
    layered,
    linear_net,
    pieces,
    seeded,
)
from torch import nn

from lightning_segxai.baselines import Baseline
from lightning_segxai.examine import examine
from lightning_segxai.explain import explain
from lightning_segxai.methods.base import LookMethod
from lightning_segxai.methods.cams import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from lightning_segxai.methods.deeplift import DeepLift, LayerDeepLift
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.guided import GuidedGradCAM
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
from lightning_segxai.methods.relevance import ContrastiveExcitationBackprop
from lightning_segxai.passes import Look, walk
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.trajectories import Cloud, Here, Line, Scatter
from lightning_segxai.values import Probe

ZERO = Baseline("zero")
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
)


@dataclass(eq=False)
class Keep:
    """A fold that keeps every look."""

    model: ScoredModel
    looks: list[Look] = field(default_factory=list)

    def see(self, look):
        self.looks.append(look)


def walked(predictor, probe, trajectory, layers=(), target=None):
    logits = predictor.predict(probe.image)
    model = ScoredModel.aim(predictor, probe, target or ClassEvidence(1), logits)
    fold = Keep(model)
    walk(
        predictor, probe, probe.image, trajectory, None, layers, lambda _: [fold], model.generator()
    )
    return fold


@pytest.mark.parametrize("looks_per_pass", [1, 2, 3, "auto"])
@pytest.mark.parametrize(
    "trajectory",
    [Here(), Line(3, ZERO), Scatter(4, (ZERO, Baseline(0.5))), Cloud(2, 0.1, Line(2, ZERO))],
    ids=str,
)
def test_looks_come_group_by_group_window_by_window_and_point_by_point(trajectory, looks_per_pass):
    """In this order, whatever the batch; the last point in the last window completes a group."""
    probe = a_probe((12, 8, 9))
    predictor = Predictor(layered(), (8, 8, 8), looks_per_pass=looks_per_pass)
    places = predictor.windows(probe.shape).places
    fold = walked(predictor, probe, trajectory, ("act",))
    generator = fold.model.generator()
    expected = [
        (point, place, n == len(group) - 1 and place == places[-1])
        for group in trajectory.groups(probe.image, probe, generator)
        for place in places
        for n, point in enumerate(group)
    ]

    for look, (point, place, complete) in zip(fold.looks, expected, strict=True):
        assert look.place == place
        assert torch.equal(look.point.input, point.input)
        assert (look.point.along, look.point.weight) == (point.along, point.weight)
        assert look.complete is complete
        assert look.padded == (8, 8, 8)
        assert not look.whole
    assert sum(look.complete for look in fold.looks) == trajectory.copies
    assert len({id(look.point) for look in fold.looks}) * len(places) == len(expected)


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_points_that_are_only_looked_at_forward(window):
    """Score and activation are theirs, weight and gradients zero."""
    probe = a_probe((12, 8, 8))
    net = layered()
    fold = walked(Predictor(net, window), probe, Line(2, Baseline(0.5)), ("act",))
    ends = [look for look in fold.looks if look.point.along in (0, 1)]
    places = fold.model.windows.places
    assert len(ends) == 2 * len(places)
    for look in ends:
        assert look.point.weight == 0
        assert look.gradient.shape == look.point.input[look.at].shape
        assert not look.gradient.any()
        shown = look.layers["act"]
        assert shown.gradient.shape == shown.activation.shape
        assert not shown.gradient.any()
        assert not shown.activation.requires_grad
        piece = pieces(net, look.point.input, window)[places.index(look.place)]
        close(shown.activation, piece[-1][0].detach())
    for look in fold.looks:
        assert (look.point.weight > 0) is bool(look.gradient.any())
        assert (look.point.weight > 0) is bool(look.layers["act"].gradient.any())
        assert look.partner_score == 0
        assert look.layers["act"].baseline is None


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
@pytest.mark.parametrize("trajectory", [Line(2, ZERO), Scatter(3, (ZERO, Baseline(0.5)))], ids=str)
def test_scores_of_windows_add_up_to_the_volumes(window, trajectory):
    """Of every point, the ones that are only looked at forward too."""
    probe = a_probe((12, 8, 8))
    fold = walked(Predictor(layered(), window), probe, trajectory)
    points = {id(look.point): look.point for look in fold.looks}
    for name, point in points.items():
        total = sum(look.score for look in fold.looks if id(look.point) == name)
        with torch.no_grad():
            assert total == pytest.approx(float(fold.model(point.input[None])), rel=1e-12)


class Diary(nn.Module):
    """Notes for every batch its size, and whether a graph is made, if of its parameters only."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.notes = []

    def forward(self, x):
        self.notes.append((len(x), torch.is_grad_enabled()))
        return self.net(x)


@pytest.mark.parametrize(
    ("looks_per_pass", "expected"),
    [
        (8, [(1, False), (3, True), (2, False), (3, True), (1, False)]),
        (2, [(1, False), (2, True), (1, True), (2, False), (2, True), (1, True), (1, False)]),
    ],
)
def test_a_batch_never_mixes_points_with_and_without_a_gradient(looks_per_pass, expected):
    """Three steps in two windows; the end of one window goes with the start of the next."""
    net = Diary(layered())
    predictor = Predictor(net, (8, 8, 8), looks_per_pass=looks_per_pass)
    probe = a_probe((8, 8, 12))
    model = ScoredModel(predictor, probe, torch.ones(2, 8, 8, 12, dtype=torch.float64))
    predictor.rehearse(probe.image[..., :8])
    net.notes.clear()
    walk(
        predictor, probe, probe.image, Line(3, ZERO), None, (), lambda _: [Keep(model)],
        model.generator(),
    )  # fmt: skip
    assert net.notes == expected


def test_without_folds_a_walk_ends():
    """Where no target has a region there is nothing to look for."""
    net = Diary(layered())
    predictor = Predictor(net, (8, 8, 8), looks_per_pass=1)
    probe = a_probe((8, 8, 12))
    seen = []

    def aim(logits):
        seen.append(logits)
        return []

    walk(
        predictor, probe, probe.image, Line(3, ZERO), None, (), aim, torch.Generator()
    )  # fmt: skip
    assert len(net.notes) == 2  # the rehearsal, and the look that was aimed by
    assert [logits.shape for logits in seen] == [(2, 8, 8, 8)]
    assert predictor.passes.backward == 0


def test_the_first_look_of_a_line_is_the_prediction():
    """To the last bit, so that the target is aimed at the same."""
    probe = a_probe()
    predictor = Predictor(layered())
    for trajectory in (Here(), Line(4, ZERO), Scatter(4, (ZERO,), 0.2)):
        given = []
        model = ScoredModel(predictor, probe, torch.ones(2, 8, 8, 8, dtype=torch.float64))
        walk(
            predictor, probe, probe.image, trajectory, None, (),
            lambda logits, given=given, model=model: given.append(logits) or [Keep(model)],
            model.generator(),
        )  # fmt: skip
        [logits] = given
        assert torch.equal(logits, predictor.predict(probe.image))


def test_a_look_shows_activation_and_gradient_of_the_windows_share():
    """Autograd through the plainly blended score, window by window."""
    probe = a_probe((12, 8, 7))
    net = layered()
    fold = walked(Predictor(net, (8, 8, 8)), probe, Here(), ("act", "body.3"))
    for look, (share, logits, deep) in zip(
        fold.looks, pieces(net, probe.image, (8, 8, 8)), strict=True
    ):
        deep_gradient = torch.autograd.grad((fold.model.weights * share * logits).sum(), deep)[0]
        close(look.layers["act"].activation, deep[0].detach())
        close(look.layers["act"].gradient, deep_gradient[0])
        assert set(look.layers) == {"act", "body.3"}


def test_gradients_of_windows_add_up_to_the_volumes():
    """The share of each window is in its gradient."""
    probe = a_probe((12, 8, 9))
    predictor = Predictor(layered(), (8, 8, 8))
    fold = walked(predictor, probe, Here())
    total = torch.zeros_like(probe.image)
    for look in fold.looks:
        total[look.at] += look.gradient
    x = probe.image.clone().requires_grad_()
    [plain] = torch.autograd.grad(fold.model(x[None]).sum(), x)
    close(total, plain)


def test_a_layer_that_the_score_does_not_need_has_no_gradient():
    """Zeros, not an error."""
    net = seeded(Answers("tuple"))
    net.side = nn.Conv3d(1, 1, 1).double()
    net.register_forward_pre_hook(lambda m, args: (m.side(args[0]), args[0])[1:])
    [look] = walked(Predictor(net), a_probe(), Here(), ("side",)).looks
    assert not look.layers["side"].gradient.any()
    assert look.layers["side"].activation.any()


def test_a_reused_layer_keeps_its_last_call():
    """For the map and for the rehearsal alike."""
    net = seeded(Reused())
    probe = a_probe()
    [look] = walked(Predictor(net), probe, Here(), ("conv",)).looks
    with torch.no_grad():
        last = net.conv(net.conv(probe.image[None]).tanh())
    close(look.layers["conv"].activation, last[0])
    weights = net.head.weight[1, 0, 0, 0, 0].detach() * (probe.label == 1)
    close(look.layers["conv"].gradient[0], weights)


METHODS = {
    "saliency": Saliency(),
    "ixg": InputXGradient(),
    "ig": IntegratedGradients(steps=5, baseline="zero"),
    "expected": ExpectedGradients(5, 2),
    "noise": SmoothGrad(samples=3),
    "square": SquareGrad(samples=3),
    "variance": VarGrad(HiResCAM(), samples=3),
    "noisy-path": SmoothGrad(ExpectedGradients(3, 2, 0.1), 2),
    "noisy-layer": SquareGrad(LayerConductance(steps=2), 2),
    "cam": GradCAM(),
    "cam-pp": GradCAMPlusPlus(),
    "noisy-cam-pp": VarGrad(GradCAMPlusPlus(), 2),
    "layercam": LayerCAM(),
    "activation": LayerActivation("body.3"),
    "hires": HiResCAM(),
    "gxa": LayerGradientXActivation(),
    "conductance": LayerConductance(steps=5, baseline="zero"),
    "influence": InternalInfluence(steps=5, baseline="zero"),
    "layer-shap": LayerGradientShap(samples=5, baselines=2),
    "guided-cam": GuidedGradCAM(),
    "contrast": ContrastiveExcitationBackprop(),
}
COMPARED = {"lift": DeepLift(), "layer-lift": LayerDeepLift()}  # a look takes two rows
ALONE = {
    "occlusion": Occlusion(4, 4, "zero"),
    "noisy-occlusion": SmoothGrad(Occlusion(4, 4), 2),
    "layer-ig": LayerIntegratedGradients(steps=5),
    "noisy-layer-ig": SmoothGrad(LayerIntegratedGradients(steps=4), 2),
    "noisy-joint": SmoothGrad(GuidedGradCAM(), 2),
}
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError(CPU_TEXT)]
TARGETS = {"vessel": ClassEvidence(1), "margin": ClassMargin(0, 1)}


def equal_maps(predictor, plain, probe, methods):
    found = explain(predictor, probe, TARGETS, methods, seed=3)
    expected = explain(plain, probe, TARGETS, methods, seed=3)
    for a, b in zip(found, expected, strict=True):
        assert a.status == "ok"
        close(a.values, b.values)
        assert a.completeness_error == pytest.approx(b.completeness_error, abs=1e-9)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("room", [1, 3])
def test_a_lack_of_memory_halves_the_batch(error, backward, room):
    """Maps are those of one look at a time; nothing is counted twice or lost."""
    net = Hungry(layered(), room, error, backward)
    plain = Predictor(layered(), looks_per_pass=1)
    methods = METHODS if room == 1 else METHODS | COMPARED
    equal_maps(Predictor(net, looks_per_pass=8), plain, a_probe(), renamed(methods))
    assert net.refused > 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_volume_and_its_baseline_are_halved_together(backward):
    """Two rows are the least that a comparison takes; of one it is the method's own failure."""
    plain = Predictor(layered(), (8, 8, 8), looks_per_pass=1)
    probe = a_probe((8, 12, 12))
    net = Hungry(layered(), 2, ERRORS[0], backward)
    equal_maps(Predictor(net, (8, 8, 8)), plain, probe, COMPARED)
    assert net.refused > 0
    lift, saliency = explain(
        Predictor(Hungry(layered(), 1, ERRORS[0], backward), (8, 8, 8)), probe,
        {"vessel": ClassEvidence(1)}, {"lift": DeepLift(), "saliency": Saliency()},
        failed=lambda *_: None,
    )  # fmt: skip
    assert (lift.status, saliency.status) == ("failed", "ok")


def renamed(methods):
    """The same methods on the network inside ``Hungry`` find their layers under ``net``."""
    return {
        k: m if not m.layer or m.layer == "auto" else LayerActivation("auto")
        for k, m in methods.items()
    }


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("methods", [renamed(METHODS), ALONE], ids=["looks", "alone"])
def test_a_lack_of_memory_halves_the_batch_of_windows(error, methods):
    """In every pass: the prediction, the looks, the projection and the cubes of an occlusion."""
    net = Hungry(layered(), 1, error)
    plain = Predictor(layered(), (8, 8, 8), looks_per_pass=1)
    equal_maps(Predictor(net, (8, 8, 8)), plain, a_probe((12, 8, 9)), methods)
    assert net.refused > 0


@pytest.mark.parametrize("room", [1, 3])
@pytest.mark.parametrize("name", ["occlusion", "noisy-occlusion", "layer-ig", "noisy-layer-ig"])
def test_a_lack_of_memory_halves_the_batch_of_what_walks_alone(name, room, monkeypatch):
    """Of a whole volume: several cubes are hidden at once, or several points of a layer's path."""
    refused, refuse = [], Hungry._refuse

    def noted(net):
        refused.append(name)  # the guard around a stranger's method restores the network's count
        refuse(net)

    monkeypatch.setattr(Hungry, "_refuse", noted)
    plain = Predictor(layered(), looks_per_pass=1)
    equal_maps(Predictor(Hungry(layered(), room, ERRORS[0])), plain, a_probe(), {name: ALONE[name]})
    assert refused


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_no_memory_at_all_fails_every_cell(window, error):
    """Each is told, and none has a map."""
    told = []
    net = Hungry(layered(), 0, error)
    cells = explain(
        Predictor(net, window),
        a_probe((12, 8, 8)),
        TARGETS,
        {
            "saliency": Saliency(),
            "ig": IntegratedGradients(2),
            "cam": GradCAM(),
            "occlusion": Occlusion(),
        },
        failed=lambda *what: told.append(what[:3]),
    )
    assert [c.status for c in cells] == ["failed"] * 8
    assert sorted(told) == sorted(("p", c.target, c.method) for c in cells)
    assert all(c.values.isnan().all() for c in cells)


@dataclass(frozen=True)
class OutOfMemoryOnce(LookMethod):
    """Runs out of memory in its own update, on the second look."""

    def start(self, model, x):
        return []

    def update(self, state, look):
        state.append(look)
        if len(state) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def finish(self, model, x, state):
        return torch.zeros_like(x[0])


def test_a_look_is_never_folded_twice():
    """A lack of memory in a method's own update is its failure, not a reason to look again."""
    probe = a_probe((16, 8, 8))
    model = walked(Predictor(layered(), (8, 8, 8)), probe, Here()).model
    keep, greedy = Keep(model), Keep(model)
    method, state = OutOfMemoryOnce(), []
    greedy.see = lambda look: method.update(state, look)
    with contextlib.suppress(torch.OutOfMemoryError):
        walk(
            model.predictor,
            probe,
            probe.image,
            Here(),
            None,
            (),
            lambda _: [keep, greedy],
            model.generator(),
        )
    places = [str(look.place) for look in keep.looks]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (ERRORS[0], True),
        (ERRORS[1], True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_what_a_lack_of_memory_is(error, is_so):
    """torch's own error, and what its allocators say; others come out at once."""
    net = Hungry(layered(), 1, error)
    methods = {"ig": IntegratedGradients(4)}
    if is_so:
        explain(Predictor(net), a_probe(), TARGETS, methods)
    else:
        with pytest.raises(type(error), match=str(error)):
            explain(Predictor(net), a_probe(), TARGETS, methods)
        assert net.refused == 1


def test_two_targets_share_the_forward():
    """One backward each."""
    net = Counting(layered())
    predictor = Predictor(net)
    explain(predictor, a_probe(), TARGETS, {"saliency": Saliency(), "ixg": InputXGradient()})
    assert vars(net.counts) == {"forward": 2, "backward": 2, "calls": 2}  # one is the rehearsal


def test_looks_stream():
    """A path holds one batch of looks at a time, however many steps it has."""
    alive = []

    @dataclass(eq=False)
    class Watch(Keep):
        most: int = 0

        def see(self, look):
            alive.append(weakref.ref(look.gradient))
            self.most = max(self.most, sum(r() is not None for r in alive))

    probe = a_probe()
    predictor = Predictor(linear_net(), looks_per_pass=2)
    model = walked(predictor, probe, Here()).model
    fold = Watch(model)
    walk(
        predictor,
        probe,
        probe.image,
        Line(20, ZERO),
        None,
        (),
        lambda _: [fold],
        model.generator(),
    )
    assert len(alive) == 22
    assert 1 <= fold.most <= 4


@pytest.mark.parametrize("name", list(METHODS | COMPARED))
def test_what_a_method_keeps_does_not_grow_with_the_windows(name):
    """Of the layers and gradients that looks show, no more stay alive by many than by few."""

    def kept(shape, method):
        predictor = Predictor(layered(), (8, 8, 8), overlap=0.75, looks_per_pass=1)
        probe = a_probe(shape)
        model = walked(predictor, probe, Here()).model
        alive, most = [], 0

        @dataclass(eq=False)
        class Watch:
            model: ScoredModel
            method: LookMethod
            state: object

            def see(self, look):
                nonlocal most
                shown = [look.gradient, *(s.activation for s in look.layers.values())]
                alive.extend(weakref.ref(t) for t in shown)
                self.method.update(self.state, look)
                del look, shown
                most = max(most, sum(ref() is not None for ref in alive))

        for part in method.parts:
            fold = Watch(model, part, part.start(model, probe.image))
            walk(
                predictor, probe, probe.image, part.trajectory, part.rule, part.layers,
                lambda _, fold=fold: [fold], model.generator(),
            )  # fmt: skip
            part.finish(model, probe.image, fold.state)
        return most

    method = (METHODS | COMPARED)[name]
    few, many = kept((8, 8, 10), method), kept((8, 10, 14), method)
    assert 0 < many <= few


class Trampling(torch.nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.ReLU(inplace=True)
        self.last = torch.nn.Conv3d(1, 1, 1).double()

    def forward(self, x):
        return self.last(self.first(x))


def test_a_network_may_write_into_its_input():
    """The probe's voxels stay, and gradients are to be had."""
    image = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    probe = Probe("p", image.clone(), torch.ones(8, 8, 8, dtype=torch.long))
    [found] = examine(Trampling(), [probe], {"t": ClassEvidence()}, {"m": Saliency()})

    assert torch.equal(probe.image, image)
    assert torch.equal(found.values > 0, image[0] > 0)


class Branching(torch.nn.Module):
    """Has a layer that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.side = torch.nn.Conv3d(1, 2, 1).double()
        self.main = torch.nn.Conv3d(1, 1, 1).double()

    def forward(self, x):
        with torch.no_grad():
            self.side(x)
        return self.main(x)


def test_a_layer_without_a_gradient_takes_no_other_method_with_it():
    """Its activation is shown, and the saliency is what it is without it."""
    net = Branching()
    probe = Probe("p", torch.randn(1, 8, 8, 8, dtype=torch.float64))
    methods = {"saliency": Saliency(), "side": LayerActivation("side")}
    both = examine(net, [probe], {"t": ClassEvidence(region="everywhere")}, methods)
    weight = float(net.main.weight.detach().abs())

    assert [found.status for found in both] == ["ok", "ok"]
    torch.testing.assert_close(both[0].values * 512, torch.full((8, 8, 8), weight).double())
    with torch.no_grad():
        torch.testing.assert_close(both[1].values, net.side(probe.image[None])[0].sum(dim=0))
