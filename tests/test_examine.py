"""The pipeline: probes, targets and methods in; attributions and records out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from nets_for_tests import (
    Answers,
    Hungry,
    Weigh,
    a_probe,
    close,
    layered,
    linear_net,
    normed,
    seeded,
)

from lightning_segxai.examine import examine, measure, measure_shifts
from lightning_segxai.explain import explain
from lightning_segxai.focus import FocusMetric, ShiftMetric
from lightning_segxai.methods.base import AttributionMethod, Complete, JointMethod, LookMethod
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, ClassMargin, Target
from lightning_segxai.trajectories import Here, Trajectory
from lightning_segxai.values import Probe

TARGETS = {"vessel": ClassEvidence(1), "margin": ClassMargin(0, 1)}
METHODS = {
    "saliency": Saliency(),
    "ig": IntegratedGradients(3),
    "cam": GradCAM(),
    "occlusion": Occlusion(4, 4),
}


def test_one_map_for_each_probe_target_and_method_in_this_order():
    """With everything that says what it is a map of."""
    probes = [a_probe(name="a"), a_probe((10, 8, 12), name="b", seed=1)]
    found = examine(layered(), probes, TARGETS, METHODS)

    assert [(f.probe.name, f.target, f.method) for f in found] == [
        (p, t, m) for p in "ab" for t in TARGETS for m in METHODS
    ]
    for f in found:
        assert f.status == "ok"
        assert f.reason == ""
        assert f.values.shape == f.region.shape == f.prediction.shape == f.probe.shape
        assert f.values.device.type == "cpu"
        assert not f.values.requires_grad
        assert f.layer == ("act" if f.method == "cam" else "")
        assert f.seconds > 0


def test_score_region_and_prediction_by_hand():
    """The mean weighted logit over the region, the region, and the argmax."""
    probe = a_probe()
    found = examine(Weigh(1, 3), [probe], TARGETS, {"m": Saliency()})
    vessel, margin = found
    image = probe.image[0]
    assert torch.equal(vessel.region, probe.label == 1)
    assert torch.equal(margin.region, probe.label == 0)
    assert vessel.score == pytest.approx(float(3 * image[probe.label == 1].mean()))
    assert margin.score == pytest.approx(float(-2 * image[probe.label == 0].mean()))
    assert torch.equal(vessel.prediction, (image > 0).long())


def test_the_map_does_not_depend_on_what_else_is_asked_for():
    """Shared passes and lonely ones give the same."""
    probe = a_probe((8, 12, 6))
    methods = METHODS | {
        "smooth": SmoothGrad(Saliency(), 2),
        "ixg": InputXGradient(),
        "hires": HiResCAM("body.0"),
        "noise": IntegratedGradients(2, "noise"),
    }
    for window in (None, 8):
        together = examine(layered(), [probe], TARGETS, methods, window=window, seed=4)
        for f in together:
            [lonely] = examine(
                layered(),
                [probe],
                {f.target: TARGETS[f.target]},
                {f.method: methods[f.method]},
                window=window,
                seed=4,
            )
            close(f.values, lonely.values)
            assert f.score == pytest.approx(lonely.score)


def test_the_network_is_left_as_it_was():
    """In training, with a frozen BatchNorm, dropout and gradients at hand."""
    net = normed()
    x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    net(x).sum().backward()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    grads = [p.grad for p in net.parameters()]
    generator = torch.get_rng_state()

    found = examine(net, [a_probe()], TARGETS, METHODS | {"noise": SmoothGrad()}, window=(8, 8, 6))
    assert all(f.status == "ok" for f in found)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(a is b for a, b in zip([p.grad for p in net.parameters()], grads, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_hooks for m in net.modules())


def test_the_network_is_explained_as_it_predicts():
    """In eval mode: dropout off, BatchNorm with its own statistics."""
    net = normed()
    probe = a_probe()
    [found] = examine(net, [probe], {"t": ClassEvidence(1)}, {"m": Saliency(absolute=False)})
    net.eval()
    x = probe.image[None].clone().requires_grad_()
    (net(x)[0, 1] * (probe.label == 1)).sum().backward()
    close(found.values, x.grad[0].sum(0) / (probe.label == 1).sum())


def test_it_is_the_same_every_time():
    """Whatever the random state around it."""
    methods = {"smooth": SmoothGrad(), "noise": IntegratedGradients(2, "noise")}
    first = examine(layered(), [a_probe()], TARGETS, methods)
    torch.rand(5)
    second = examine(layered(), [a_probe()], TARGETS, methods)
    other = examine(layered(), [a_probe()], TARGETS, methods, seed=1)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.values, b.values)
        assert not torch.equal(a.values, c.values)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_under_any_grad_mode(mode):
    """Also with a probe that was made there."""
    net = layered()
    expected = examine(net, [a_probe()], TARGETS, METHODS)
    with mode():
        found = examine(net, [a_probe()], TARGETS, METHODS)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_network_gives_the_same_maps(compiled):
    """Its layers are named as torch names them."""
    net = layered()
    run = torch.compile(net, backend="eager") if compiled else net
    found = examine(run, [a_probe()], TARGETS, METHODS)
    for a, b in zip(found, examine(net, [a_probe()], TARGETS, METHODS), strict=True):
        assert torch.equal(a.values, b.values)


def test_settings_reach_the_predictor():
    """Window, outputs, threshold and logits."""
    probe = a_probe(labeled=False)
    net = seeded(Answers("features", classes=1))
    with torch.no_grad():
        logits = net.conv(probe.image[None])[0, 0]
    [found] = examine(
        net, [probe], {"t": ClassEvidence(1)}, {"m": Saliency()},
        window=(8, 8, 4), overlap=0.25, outputs="sigmoid", threshold=0.7, logits=lambda out: out[1],
        looks_per_pass=2,
    )  # fmt: skip
    assert found.prediction.shape == logits.shape
    assert 0 < int(found.prediction.sum()) < int((logits > 0).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": {"a/b": ClassEvidence()}}, "target or method name 'a/b'"),
        ({"methods": {"": Saliency()}}, "target or method name ''"),
        ({"window": 0}, "`window` needs one or three positive"),
        ({"window": 8, "overlap": 1.0}, "`overlap`"),
        ({"threshold": 2.0}, "`threshold`"),
        ({"methods": {"m": GradCAM("bodi")}}, "no such layer in `Layered`"),
        ({"targets": {"t": ClassEvidence(9)}}, "its classes are 0 to 1"),
    ],
)
def test_a_mistake_is_told(arguments, message):
    """By `examine`, at once."""
    asked = {"targets": TARGETS, "methods": METHODS} | arguments
    with pytest.raises(ValueError, match=message):
        examine(layered(), [a_probe()], **asked)


# --- failures stay alone


@dataclass(frozen=True)
class Bad(LookMethod):
    """Fails in one of its steps."""

    where: str
    on: str = ""

    @property
    def layer(self):
        return "nowhere" if self.where == "layer" else ""

    @property
    def layers(self):
        return ("nowhere",) if self.where in ("layer", "layers") else ()

    @property
    def trajectory(self):
        if self.where == "trajectory":
            raise LookupError("trajectory")
        return Unhashable() if self.where == "unhashable" else Here()

    @property
    def rule(self):
        if self.where == "rule":
            raise LookupError("rule")
        return None

    def start(self, model, x):
        self._fail("start")
        return torch.zeros_like(x[0])

    def update(self, state, look):
        self._fail("update")

    def finish(self, model, x, state):
        self._fail("finish")
        return {
            "shape": state[:2],
            "nothing": None,
            "numpy": state.numpy(),
            "nan": state * math.nan,
            "infinity": state + math.inf,
            "complete shape": Complete(state[:2], 0.0),
            "complete nan": Complete(state * math.nan, 0.0),
        }.get(self.where, state)

    def _fail(self, where):
        if self.where == where:
            raise LookupError(where)


class Unhashable(Trajectory):
    """A stranger's dataclass without ``frozen``."""

    __hash__ = None

    @property
    def count(self):
        return 1

    def groups(self, x, probe, generator):
        yield from Here().groups(x, probe, generator)


@dataclass(frozen=True)
class BadAlone(AttributionMethod):
    """Fails in its only step."""

    where: str

    def attribute(self, model, x):
        if self.where == "attribute":
            raise LookupError("attribute")
        return {"shape": x, "nothing": None, "numpy": x[0].numpy(), "nan": x[0] * math.nan}[
            self.where
        ]


@dataclass(frozen=True)
class BadJoint(JointMethod):
    """Fails in one of its own steps, or in one of its parts."""

    where: str

    @property
    def parts(self):
        if self.where == "parts":
            raise LookupError("parts")
        return Saliency(), Bad("update") if self.where == "one of two" else InputXGradient()

    def join(self, model, x, maps):
        if self.where == "join":
            raise LookupError("join")
        return maps[0][:2] if self.where == "shape" else maps[0]


FAILING = [
    Bad("start"),
    Bad("update"),
    Bad("finish"),
    Bad("layer"),
    Bad("layers"),
    Bad("trajectory"),
    Bad("unhashable"),
    Bad("rule"),
    Bad("shape"),
    Bad("nothing"),
    Bad("numpy"),
    Bad("complete shape"),
    BadJoint("parts"),
    BadJoint("join"),
    BadJoint("shape"),
    BadJoint("one of two"),
    BadAlone("attribute"),
    BadAlone("shape"),
    BadAlone("nothing"),
    BadAlone("numpy"),
    SmoothGrad(Bad("update")),
    SmoothGrad(BadAlone("attribute")),
]


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize("bad", FAILING, ids=str)
def test_one_bad_method_does_not_take_others_with_it(bad, window):
    """Its cells are ``failed`` and told, once each; the others are as if it were not there."""
    told = []
    probe = a_probe((8, 12, 8))
    methods = {"saliency": Saliency(), "bad": bad, "cam": GradCAM(), "ig": IntegratedGradients(2)}
    found = explain(
        Predictor(layered(), window), probe, TARGETS, methods,
        failed=lambda *what: told.append(what),
    )  # fmt: skip
    good = {name: method for name, method in methods.items() if name != "bad"}
    expected = explain(Predictor(layered(), window), probe, TARGETS, good)

    assert [f.method for f in found] == list(methods) * 2
    for a, b in zip([f for f in found if f.method != "bad"], expected, strict=True):
        assert a.status == "ok"
        close(a.values, b.values)
    for cell in found:
        if cell.method == "bad":
            assert cell.status == "failed"
            assert cell.reason
            assert bool(cell.values.isnan().all())
            assert cell.values.shape == probe.shape
    assert [what[:3] for what in told] == [("p", name, "bad") for name in TARGETS]
    assert all(isinstance(what[3], Exception) for what in told)


@pytest.mark.parametrize("bad", FAILING, ids=str)
def test_without_a_callback_a_failure_comes_out(bad):
    """A notebook sees the exception, not a map of NaN."""
    with pytest.raises(Exception, match=r".+"):
        explain(Predictor(layered()), a_probe(), TARGETS, {"saliency": Saliency(), "bad": bad})


@pytest.mark.parametrize(
    "bad", [Bad("nan"), Bad("infinity"), Bad("complete nan"), BadAlone("nan")], ids=str
)
def test_a_map_that_is_not_finite_is_no_map(bad):
    """Status ``nonfinite``; the reason tells whether the logits were."""
    told = []
    good, cell = explain(
        Predictor(layered()), a_probe(), {"t": ClassEvidence(1)}, {"good": Saliency(), "bad": bad},
        failed=lambda *what: told.append(what),
    )  # fmt: skip
    assert (good.status, cell.status) == ("ok", "nonfinite")
    assert "not in the logits" in cell.reason
    assert bool(cell.values.isnan().all())
    assert not told


def test_logits_that_are_not_finite_are_told():
    """A diverged network."""
    net = Weigh(1, math.inf)
    [found] = examine(net, [a_probe()], {"t": ClassEvidence(1)}, {"m": Saliency()})
    assert found.status == "nonfinite"
    assert "and in the logits" in found.reason


@dataclass(frozen=True)
class BadTarget(Target):
    """Raises."""

    def weights(self, probe, logits):
        raise LookupError("target")


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
def test_one_bad_target_does_not_take_others_with_it(window):
    """Nor does a class that the network lacks."""
    told = []
    targets = {"bad": BadTarget(), "vessel": ClassEvidence(1), "lacks": ClassEvidence(7)}
    found = explain(
        Predictor(layered(), window), a_probe((8, 12, 8)), targets, METHODS,
        failed=lambda *what: told.append(what[:3]),
    )  # fmt: skip
    assert [f.status for f in found] == ["failed"] * 4 + ["ok"] * 4 + ["failed"] * 4
    assert sorted(told) == sorted(("p", t, m) for t in ("bad", "lacks") for m in METHODS)


def test_a_lack_of_memory_for_the_baseline_is_the_methods_own():
    """The look at the baseline fails the path that leads there, and no other method."""
    told = []

    class Forgetful(Hungry):
        def forward(self, x):
            if not x.requires_grad and not x.any():
                self._refuse()
            return self.net(x)

    net = Forgetful(layered(), 99, torch.OutOfMemoryError("CUDA out of memory"))
    methods = {"saliency": Saliency(), "ig": IntegratedGradients(2, "zero")}
    saliency, path = explain(
        Predictor(net), a_probe(), {"t": ClassEvidence(1)}, methods,
        failed=lambda *what: told.append(what[:3]),
    )  # fmt: skip
    assert (saliency.status, path.status) == ("ok", "failed")
    assert told == [("p", "t", "ig")]


def test_a_network_that_cannot_be_differentiated_fails():
    """It has no gradient to give; what only looks forward goes on."""

    class Detached(Weigh):
        def forward(self, x):
            return super().forward(x.detach())

    net = Detached(0, 1)
    net.requires_grad_(False)
    saliency, occlusion = explain(
        Predictor(net), a_probe(), {"t": ClassEvidence(1)},
        {"saliency": Saliency(), "occlusion": Occlusion(4, 4)}, failed=lambda *_: None,
    )  # fmt: skip
    assert (saliency.status, occlusion.status) == ("failed", "ok")


# --- measure


@dataclass(frozen=True)
class Mean(FocusMetric):
    """The mean of the map, None for a method's name."""

    without: str = ""
    unit: ClassVar[str] = "logit"
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    higher_is_better: ClassVar[bool | None] = None
    reading: ClassVar[str] = "."

    def measure(self, attribution):
        assert bool(attribution.values.isfinite().all())
        assert bool(attribution.values.any())
        return None if attribution.method == self.without else float(attribution.values.mean())


@dataclass(frozen=True)
class Difference(ShiftMetric):
    """The difference of the means."""

    unit: ClassVar[str] = "logit"
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    higher_is_better: ClassVar[bool | None] = None
    reading: ClassVar[str] = "."

    def measure(self, attribution, reference):
        for one in (attribution, reference):
            assert bool(one.values.isfinite().all())
            assert bool(one.values.any())
        return float(attribution.values.mean() - reference.values.mean())


def rows_of(rows):
    return [(r.metric, r.target, r.method, r.status) for r in rows]


def test_measures_are_tidy_rows():
    """Dice once for a probe, the region once for a target, then each map's."""
    probe = a_probe()
    maps = examine(
        layered(), [probe], TARGETS, {"saliency": Saliency(), "ig": IntegratedGradients(2)}
    )
    rows = measure(maps, {"mean": Mean()}, run="r")

    assert rows_of(rows) == [
        ("dice", "", "", "ok"),
        ("region_voxels", "vessel", "", "ok"),
        ("mean", "vessel", "saliency", "ok"),
        ("completeness_error", "vessel", "ig", "ok"),
        ("cancellation", "vessel", "ig", "ok"),
        ("doubtful", "vessel", "ig", "ok"),
        ("mean", "vessel", "ig", "ok"),
        ("region_voxels", "margin", "", "ok"),
        ("mean", "margin", "saliency", "ok"),
        ("completeness_error", "margin", "ig", "ok"),
        ("cancellation", "margin", "ig", "ok"),
        ("doubtful", "margin", "ig", "ok"),
        ("mean", "margin", "ig", "ok"),
        *[("agreement", t, m, "ok") for t in ("vessel", "margin") for m in ("saliency", "ig")],
    ]
    assert {r.run for r in rows} == {"r"}
    assert {r.fingerprint for r in rows} == {probe.fingerprint}
    by = {(r.metric, r.target, r.method): r for r in rows}
    assert by["region_voxels", "vessel", ""].value == int((probe.label == 1).sum())
    assert by["region_voxels", "vessel", ""].unit == "voxel"
    assert by["mean", "vessel", "ig"].value == float(maps[1].values.mean())
    assert by["mean", "vessel", "ig"].unit == "logit"
    predicted = maps[0].prediction == 1
    truth = probe.label == 1
    dice = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    assert by["dice", "", ""].value == pytest.approx(float(dice))


def test_agreement_is_among_the_sound_maps_of_a_cell():
    """A failed map and one of zeros get their status, and do not count for the others."""
    (ok,) = examine(layered(), [a_probe()], {"t": ClassEvidence(1)}, {"one": Saliency()})
    other = replace(ok, method="other", values=-3 * ok.values)
    zero = replace(ok, method="zero", values=torch.zeros_like(ok.values))
    failed = replace(ok, method="failed", status="failed")
    flat = replace(ok, method="flat", values=torch.ones_like(ok.values))
    apart = replace(ok, target="apart")

    rows = measure([ok, other, zero, failed, flat, apart], {})

    found = {(r.target, r.method): (r.status, r.value) for r in rows if r.metric == "agreement"}
    assert found.pop(("t", "one")) == found.pop(("t", "other")) == ("ok", pytest.approx(1.0))
    assert {key: status for key, (status, _) in found.items()} == {
        ("t", "zero"): "empty",
        ("t", "failed"): "failed",
        ("t", "flat"): "unsupported",
    }


def test_maps_that_are_none_get_their_status():
    """NaN and the map's status; zeros are ``empty``, None is ``unsupported``."""
    (ok,) = examine(layered(), [a_probe()], {"t": ClassEvidence(1)}, {"m": Saliency()})
    broken = [
        replace(ok, status=status, values=torch.full((8, 8, 8), math.nan))
        for status in ("failed", "nonfinite", "unsupported", "empty")
    ]
    zero = replace(ok, values=torch.zeros(8, 8, 8))
    rows = [r for r in measure([*broken, zero, ok], {"mean": Mean("m")}) if r.metric == "mean"]
    assert [r.status for r in rows] == [
        "failed", "nonfinite", "unsupported", "empty", "empty", "unsupported",
    ]  # fmt: skip
    assert all(math.isnan(r.value) for r in rows)


def test_a_metric_that_is_not_finite_is_told():
    """The value is NaN, the status says why."""

    @dataclass(frozen=True)
    class Infinite(Mean):
        def measure(self, attribution):
            return math.inf

    maps = examine(layered(), [a_probe()], {"t": ClassEvidence(1)}, {"m": Saliency()})
    row = measure(maps, {"x": Infinite()})[-1]
    assert (row.status, math.isnan(row.value)) == ("nonfinite", True)


def test_a_probe_without_a_label_has_no_dice():
    """Nor is one invented."""
    maps = examine(layered(), [a_probe(labeled=False)], TARGETS, {"m": Saliency()})
    assert not [r for r in measure(maps, {}) if r.metric == "dice"]


def test_a_probe_that_failed_has_no_invented_dice():
    """Without a prediction there is nothing to compare, and no region to count."""
    net = Hungry(layered(), 0, torch.OutOfMemoryError("CUDA out of memory"))
    cells = explain(Predictor(net), a_probe(), TARGETS, {"m": Saliency()}, failed=lambda *_: None)
    rows = measure(cells, {"mean": Mean()})
    assert not [r for r in rows if r.status == "ok"]


def test_shifts_are_against_every_reference():
    """Named by metric and reference."""
    maps = examine(
        layered(), [a_probe()], {"t": ClassEvidence(1)}, {"a": Saliency(), "b": InputXGradient()}
    )
    rows = measure_shifts(
        maps[0], {"first": maps[1], "best": maps[0]}, {"d": Difference()}, run="r"
    )
    assert [(r.metric, r.method, r.status) for r in rows] == [
        ("d/first", "a", "ok"), ("d/best", "a", "ok"),
    ]  # fmt: skip
    assert rows[0].value == float(maps[0].values.mean() - maps[1].values.mean())
    assert rows[1].value == 0


@pytest.mark.parametrize("values", [0.0, math.nan])
@pytest.mark.parametrize("which", ["map", "reference"])
def test_shifts_between_no_maps_are_not_measured(values, which):
    """A metric is promised two maps that are finite and not zero everywhere."""
    [ok] = examine(layered(), [a_probe()], {"t": ClassEvidence(1)}, {"m": Saliency()})
    status = "ok" if values == 0 else "failed"
    broken = replace(ok, status=status, values=torch.full((8, 8, 8), values))
    pair = (broken, ok) if which == "map" else (ok, broken)
    [row] = measure_shifts(pair[0], {"first": pair[1]}, {"d": Difference()})
    assert row.status != "ok"
    assert math.isnan(row.value)


def test_a_network_of_numbers_that_need_no_gradient():
    """A frozen network is explained like any other."""
    net = linear_net()
    expected = examine(net, [a_probe()], TARGETS, METHODS)
    net.requires_grad_(False)
    for a, b in zip(examine(net, [a_probe()], TARGETS, METHODS), expected, strict=True):
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_has_its_probes_precision(dtype):
    """Of any method."""
    probe = a_probe()
    same = Probe("s", probe.image.to(dtype), probe.label)
    methods = METHODS | {"noise": SmoothGrad(), "hires": HiResCAM()}
    for found in examine(layered(), [same], TARGETS, methods):
        assert found.values.dtype is dtype


def test_a_metric_that_raises_is_told_and_alone():
    """Its record is ``failed``; without a callback it comes out."""

    @dataclass(frozen=True)
    class Raises(Mean):
        def measure(self, attribution):
            raise LookupError("metric")

    told = []
    maps = examine(layered(), [a_probe()], {"t": ClassEvidence(1)}, {"m": Saliency()})
    metrics = {"bad": Raises(), "mean": Mean()}
    rows = measure(maps, metrics, failed=lambda *what: told.append(what))
    assert [(r.metric, r.status) for r in rows[-2:]] == [("bad", "failed"), ("mean", "ok")]
    [(probe, target, cell, error)] = told
    assert (probe, target, cell) == ("p", "t", "m/bad")
    assert isinstance(error, LookupError)
    with pytest.raises(LookupError, match="metric"):
        measure(maps, metrics)


def test_the_region_of_an_unsupported_target_is_not_counted():
    """It is not empty: it cannot be had."""
    targets = {"missed": ClassEvidence(1, "false_negative")}
    maps = examine(layered(), [a_probe(labeled=False)], targets, {"m": Saliency()})
    [size] = measure(maps, {})
    assert (size.metric, size.status) == ("region_voxels", "unsupported")


def test_a_probe_keeps_its_dice_where_one_target_failed():
    """The prediction is known all the same, and so are other targets' regions."""
    targets = {"lacks": ClassEvidence(7), "vessel": ClassEvidence(1)}
    cells = explain(
        Predictor(layered()), a_probe(), targets, {"m": Saliency()}, failed=lambda *_: None
    )
    by = {(r.metric, r.target): r for r in measure(cells, {})}
    assert by["dice", ""].status == "ok"
    assert by["dice", ""].value > 0
    assert by["region_voxels", "lacks"].status == "failed"
    assert by["region_voxels", "vessel"].value > 0
