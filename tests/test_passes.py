"""Walks: where the network is looked at, what a look shows, and what memory does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from nets_for_tests import (
    Answers,
    Counting,
    Halving,
    Hungry,
    InPlace,
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
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.layers import LayerActivation
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.passes import (
    Cloud,
    Here,
    Line,
    Look,
    project,
    resolve_layer,
    tapped,
    to_window,
    walk,
)
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.values import Probe

X = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PROBE = a_probe((6, 5, 4), 2)
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
)


def points(trajectory, seed=0):
    return list(trajectory.points(X, PROBE, torch.Generator().manual_seed(seed)))


def test_here_is_the_volume():
    """One point of weight one."""
    [point] = points(Here())
    assert point.input is X
    assert point.origin is X
    assert point.weight == 1


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_line_is_gauss_legendre_quadrature(steps):
    """Nodes on the straight line; the weights sum to one and integrate polynomials exactly."""
    line = points(Line(steps, Baseline(0.25)))
    assert len(line) == Line(steps, Baseline(0.25)).count == steps
    assert sum(p.weight for p in line) == pytest.approx(1, abs=1e-14)
    ts = [float(((p.input - 0.25) / (X - 0.25)).flatten()[0]) for p in line]
    for p, t in zip(line, ts, strict=True):
        assert torch.allclose(p.input, 0.25 + t * (X - 0.25), atol=1e-14)
        assert torch.equal(p.baseline, torch.full_like(X, 0.25))
        assert p.origin is X
    for power in range(2 * steps):
        integral = sum(p.weight * t**power for p, t in zip(line, ts, strict=True))
        assert integral == pytest.approx(1 / (power + 1), abs=1e-12)


def test_a_cloud_is_the_volume_with_noise_of_its_range():
    """Copies of their own noise, each with the inner trajectory around it."""
    cloud = Cloud(3, 0.2, Line(2, Baseline("zero")))
    found = points(cloud)
    assert len(found) == cloud.count == 6
    generator = torch.Generator().manual_seed(0)
    for n in range(3):
        noise = torch.randn(X.shape, generator=generator, dtype=X.dtype)
        copy = X + 0.2 * (X.max() - X.min()) * noise
        for p in found[2 * n : 2 * n + 2]:
            assert torch.equal(p.origin, copy)
            assert not torch.equal(p.input, copy)


def test_equal_trajectories_are_one():
    """They are keys; methods on equal ones share their passes."""
    assert len({Here(), Here()}) == 1
    assert (
        len({Line(4, Baseline("zero")), Line(4, Baseline("zero")), Line(5, Baseline("zero"))}) == 2
    )
    assert len({Cloud(2, 0.1, Here()), Cloud(2, 0.1, Here())}) == 1


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
    walk(predictor, probe, probe.image, trajectory, layers, lambda _: [fold], model.generator())
    return fold


@pytest.mark.parametrize("looks_per_pass", [1, 2, 3, "auto"])
def test_looks_come_window_by_window_and_point_by_point(looks_per_pass):
    """In order, whatever the batch; the last window of a point completes it."""
    probe = a_probe((12, 8, 9))
    predictor = Predictor(layered(), (8, 8, 8), looks_per_pass=looks_per_pass)
    places = predictor.windows(probe.shape).places
    looks = walked(predictor, probe, Line(3, Baseline("zero")), ("act",)).looks

    assert [look.place for look in looks] == list(places) * 3
    assert [look.complete for look in looks] == [place == places[-1] for place in places] * 3
    assert not any(look.whole for look in looks)
    assert all(look.padded == (8, 8, 8) for look in looks)
    assert len({id(look.point) for look in looks}) == 3


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


def test_a_tap_survives_an_inplace_activation():
    """The tapped layer's output is what it was before it was overwritten, and so is the map."""
    methods = {
        "act": LayerActivation("conv"),
        "hires": HiResCAM("conv", relu=False),
        "cam": GradCAM("conv", relu=False),
        "behind": HiResCAM("act", relu=False),
        "saliency": Saliency(),
    }
    probe = a_probe()

    def maps(inplace):
        predictor = Predictor(seeded(InPlace(inplace)))
        return [a.values for a in explain(predictor, probe, {"t": ClassEvidence(1)}, methods)]

    for changed, plain in zip(maps(True), maps(False), strict=True):
        assert torch.equal(changed, plain)
        assert changed.any()
    net = seeded(InPlace(True))
    with tapped(net, {"conv"}) as taps, torch.no_grad():
        net(probe.image[None])
        assert bool((taps["conv"] < 0).any())


def test_a_tap_does_not_change_the_network():
    """Neither while it is there nor afterwards, and other people's hooks stay."""
    net = seeded(InPlace(True))
    seen = []
    net.conv.register_forward_hook(lambda *_: seen.append(1))
    x = a_probe().image[None]
    with torch.no_grad():
        plain = net(x)
        with tapped(net, {"conv", "act"}):
            assert torch.equal(net(x), plain)
        assert torch.equal(net(x), plain)
    assert len(seen) == 3
    assert [len(m._forward_hooks) for m in (net.conv, net.act, net.head)] == [1, 0, 0]


def test_taps_are_removed_after_an_error():
    """No hook of ours survives."""
    net = seeded(InPlace(True))
    with pytest.raises(RuntimeError, match="mine"), tapped(net, {"conv"}):
        raise RuntimeError("mine")
    assert not net.conv._forward_hooks


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


def rehearsed(net, shape=(8, 8, 8)):
    predictor = Predictor(net)
    return predictor, predictor.rehearse(torch.randn(1, *shape, dtype=torch.float64))


def test_auto_is_the_last_of_the_smallest_layers():
    """In execution order; smaller than four voxels along an axis does not count."""
    assert resolve_layer(*rehearsed(layered()), "auto") == "act"
    assert resolve_layer(*rehearsed(seeded(Halving(8))), "auto") == "pool"
    # 6 / 2 = 3 voxels along an axis are too few, so it is the last layer of full size
    assert resolve_layer(*rehearsed(seeded(Halving(2)), (8, 8, 6)), "auto") == "head"
    assert resolve_layer(*rehearsed(linear_net()), "auto") == "1"


def test_auto_finds_nothing_in_a_small_window():
    """The error says the window and what to do."""
    with pytest.raises(ValueError, match=r"at least 4 x 4 x 4.*\(3, 8, 8\). Name a layer"):
        resolve_layer(*rehearsed(linear_net(), (3, 8, 8)), "auto")


def test_a_wrong_layer_lists_close_ones():
    """The network and the layers that were probably meant."""
    with pytest.raises(ValueError, match=r'`layer="bodi.3"`: no such layer in `Layered`.*body\.3'):
        resolve_layer(*rehearsed(layered()), "bodi.3")
    with pytest.raises(ValueError, match=r"close to it: body\.0"):
        resolve_layer(*rehearsed(layered()), "§§§")


def test_a_layer_that_gives_no_volume_is_refused():
    """With its shape."""
    with pytest.raises(
        ValueError, match=r'`layer="flat"` of `Halving` gives .*\(1, 2\), but a vol'
    ):
        resolve_layer(*rehearsed(seeded(Halving(8))), "flat")


def test_a_named_layer_is_itself():
    """Nested paths too."""
    assert resolve_layer(*rehearsed(layered()), "body.3") == "body.3"


def test_a_layers_map_on_the_grid_of_its_window():
    """Trilinear to the padded window, cropped to the place."""
    values = torch.arange(8.0, dtype=torch.float64).reshape(2, 2, 2)
    place = (slice(3, 6), slice(0, 4), slice(1, 3))
    found = to_window(values, (4, 4, 4), place)
    oracle = nn.functional.interpolate(values[None, None], (4, 4, 4), mode="trilinear")[0, 0]
    assert torch.equal(found, oracle[:3, :4, :2])
    assert torch.equal(to_window(oracle, (4, 4, 4), place), oracle[:3, :4, :2])


def test_projected_channels_blend_as_logits_do():
    """Weighted channels of each window, on its grid, times its share."""
    probe = a_probe((12, 8, 7))
    net = layered()
    predictor = Predictor(net, (8, 8, 8))
    model = ScoredModel(predictor, probe, torch.zeros(2, 12, 8, 7))
    weights = torch.tensor([1.0, -2, 3, 0.5], dtype=torch.float64)
    plain = torch.zeros(12, 8, 7, dtype=torch.float64)
    places = predictor.windows(probe.shape).places
    for place, (share, _, deep) in zip(places, pieces(net, probe.image, (8, 8, 8)), strict=True):
        channels = (deep[0].detach() * weights[:, None, None, None]).sum(0)
        plain[place] += to_window(channels, (8, 8, 8), place) * share[place]
    close(project(model, probe.image, "act", weights), plain)


METHODS = {
    "saliency": Saliency(),
    "ixg": InputXGradient(),
    "ig": IntegratedGradients(steps=5, baseline="zero"),
    "noise": SmoothGrad(samples=3),
    "cam": GradCAM(),
    "activation": LayerActivation("body.3"),
    "hires": HiResCAM(),
}
ALONE = {"occlusion": Occlusion(4, 4, "zero"), "noisy occlusion": SmoothGrad(Occlusion(4, 4), 2)}
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
    equal_maps(Predictor(net, looks_per_pass=8), plain, a_probe(), renamed(METHODS))
    assert net.refused > 0


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
    methods = {name.replace(" ", "-"): m for name, m in methods.items()}
    net = Hungry(layered(), 1, error)
    plain = Predictor(layered(), (8, 8, 8), looks_per_pass=1)
    equal_maps(Predictor(net, (8, 8, 8)), plain, a_probe((12, 8, 9)), methods)
    assert net.refused > 0


def test_a_lack_of_memory_halves_the_batch_of_cubes():
    """Occlusion of a whole volume hides several cubes at once."""
    net = Hungry(layered(), 1, ERRORS[0])
    plain = Predictor(layered(), looks_per_pass=1)
    equal_maps(Predictor(net), plain, a_probe(), {"occlusion": ALONE["occlusion"]})


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
        def see(self, look):
            import weakref

            alive.append(weakref.ref(look.gradient))
            self.most = max(getattr(self, "most", 0), sum(r() is not None for r in alive))

    probe = a_probe()
    predictor = Predictor(linear_net(), looks_per_pass=2)
    model = walked(predictor, probe, Here()).model
    fold = Watch(model)
    walk(
        predictor,
        probe,
        probe.image,
        Line(20, Baseline("zero")),
        (),
        lambda _: [fold],
        model.generator(),
    )
    assert len(alive) == 20
    assert fold.most <= 4
    assert np.isfinite(fold.most)


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
