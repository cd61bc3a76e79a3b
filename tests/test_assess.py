"""Maps held against the network: one record for each metric, whatever becomes of it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from nets_for_tests import Counting, a_probe, layered, normed

import lightning_segxai.faithfulness
from lightning_segxai.assess import assess
from lightning_segxai.examine import examine
from lightning_segxai.faithfulness import (
    Deletion,
    EfficientRandomization,
    FaithfulnessCorrelation,
    FaithfulnessMetric,
    Insertion,
    RandomBaseline,
    Randomization,
    SensitivityMax,
)
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.scored import Passes, Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin, Target
from lightning_segxai.values import UnsupportedError

TARGETS = {"vessel": ClassEvidence(1), "margin": ClassMargin(0, 1)}
METHODS = {"saliency": Saliency(), "ixg": InputXGradient()}
FAITHFULNESS = {
    "deletion": Deletion(4),
    "insertion": Insertion(4, by="dice"),
    "correlation": FaithfulnessCorrelation(8, 0.2),
    "deletion_random": RandomBaseline(Deletion(4)),
}


@dataclass(frozen=True)
class Says(FaithfulnessMetric):
    """A number, or an exception; after doing something to the network."""

    what: object = 1.0

    unit = "logit"
    range = (-math.inf, math.inf)
    higher_is_better = None
    reading = "nothing"

    def assess(self, model, attribution, method=None):
        model.predictor.module.train()
        torch.rand(3)
        if isinstance(self.what, Exception):
            raise self.what
        return self.what

    def passes(self, shape, windows, method=None):
        return Passes()


def explained(net=None, probes=None, **settings):
    return examine(net or layered(), probes or [a_probe()], TARGETS, METHODS, **settings)


@pytest.mark.parametrize("window", [None, (8, 8, 4)], ids=["whole", "windows"])
def test_a_record_for_each_map_and_metric_in_this_order(window):
    """As the metric says of the network seen through the map's own target."""
    probes = [a_probe(name="a"), a_probe((8, 6, 8), name="b", seed=1)]
    net = layered()
    maps = explained(net, probes, window=window, seed=3)
    rows = assess(net, maps, TARGETS, FAITHFULNESS, window=window, seed=3, run="r1")

    assert [(r.probe, r.target, r.method, r.metric) for r in rows] == [
        (p, t, m, f) for p in "ab" for t in TARGETS for m in METHODS for f in FAITHFULNESS
    ]
    cells = [(a, name) for a in maps for name in FAITHFULNESS]
    for row, (a, name) in zip(rows, cells, strict=True):
        predictor = Predictor(net, window)
        logits = predictor.predict(a.probe.image)
        model = ScoredModel.aim(predictor, a.probe, TARGETS[a.target], logits, seed=3)
        assert row.value == pytest.approx(FAITHFULNESS[name].assess(model, a), abs=1e-10)
        assert (row.status, row.unit, row.run) == ("ok", FAITHFULNESS[name].unit, "r1")
        assert row.fingerprint == a.probe.fingerprint


def test_settings_reach_the_predictor():
    """Outputs, threshold and logits: the same region as when it was explained, without a word."""
    settings = {
        "window": 6, "overlap": 0.25, "outputs": "sigmoid", "threshold": 0.7, "looks_per_pass": 2,
        "logits": lambda out: out * 2,
    }  # fmt: skip
    targets = {"p": ClassEvidence(1, "predicted")}
    maps = examine(layered(), [a_probe()], targets, METHODS, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = assess(layered(), maps, targets, FAITHFULNESS, **settings)
    assert all(row.status == "ok" for row in rows)
    with pytest.warns(UserWarning, match='The target "p" is elsewhere in probe "p"'):
        assess(layered(), maps, targets, {"says": Says()})


def test_the_network_is_left_as_it_was():
    """In training, with a frozen BatchNorm, dropout, gradients and random state."""
    net = normed()
    net(torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)).sum().backward()
    maps = explained(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    grads = [p.grad for p in net.parameters()]
    generator = torch.get_rng_state()

    rows = assess(net, maps, TARGETS, FAITHFULNESS | {"says": Says()})
    assert all(row.status == "ok" for row in rows)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(a is b for a, b in zip([p.grad for p in net.parameters()], grads, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_a_metric_does_does_not_reach_the_next():
    """One that trains the network's dropout is alone with it."""
    net = normed()
    maps = explained(net)
    alone = assess(net, maps, TARGETS, {"deletion": Deletion(4)})
    after = assess(net, maps, TARGETS, {"says": Says(), "deletion": Deletion(4)})
    assert [r for r in after if r.metric == "deletion"] == alone


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_under_any_grad_mode(mode):
    """As in a validation."""
    net = layered()
    maps = explained(net)
    expected = assess(net, maps, TARGETS, FAITHFULNESS)
    with mode():
        assert assess(net, maps, TARGETS, FAITHFULNESS) == expected


@pytest.mark.parametrize(
    ("what", "status"),
    [(2.5, "ok"), (None, "unsupported"), (math.nan, "nonfinite"), (-math.inf, "nonfinite"),
     (UnsupportedError("no"), "unsupported")],
)  # fmt: skip
def test_what_a_metric_says_is_kept_or_why_it_says_nothing(what, status):
    """A record in any case."""
    [row] = assess(layered(), explained()[:1], TARGETS, {"says": Says(what)})
    assert row.status == status
    assert row.value == 2.5 or math.isnan(row.value)


@pytest.mark.parametrize("status", ["failed", "empty", "unsupported", "nonfinite"])
def test_a_map_that_is_none_is_not_assessed(status):
    """Its records have its status, a map of zeros is empty; the network is not asked."""
    net = Counting(layered())
    [a] = explained()[:1]
    bad = replace(a, values=a.values * math.nan, status=status)
    zeros = replace(a, values=a.values * 0)
    rows = assess(net, [bad, zeros], TARGETS, FAITHFULNESS)
    assert [r.status for r in rows] == [status] * 4 + ["empty"] * 4
    assert all(math.isnan(r.value) for r in rows)
    assert net.counts["forward"] == 0


def test_a_metric_that_raises_fails_alone():
    """It is told, or comes out where nobody listens."""
    told = []
    faithfulness = {"bad": Says(LookupError("bad")), "says": Says()}
    maps = explained()[:1]
    rows = assess(layered(), maps, TARGETS, faithfulness, failed=lambda *what: told.append(what))
    assert [r.status for r in rows] == ["failed", "ok"]
    [(probe, target, cell, error)] = told
    assert (probe, target, cell) == ("p", "vessel", "saliency/bad")
    assert isinstance(error, LookupError)
    with pytest.raises(LookupError, match="bad"):
        assess(layered(), maps, TARGETS, faithfulness)


class Broken(Target):
    """Raises."""

    def weights(self, probe, logits):
        raise LookupError("target")


def test_a_target_that_cannot_be_aimed_fails_its_own():
    """The others are assessed."""
    told = []
    rows = assess(
        layered(), explained(), TARGETS | {"margin": Broken()}, {"says": Says()},
        failed=lambda *what: told.append(what[1]),
    )  # fmt: skip
    assert [r.status for r in rows] == ["ok", "ok", "failed", "failed"]
    assert told == ["margin", "margin"]


def test_a_map_of_an_unknown_target_is_a_mistake():
    """Said before anything is computed."""
    with pytest.raises(ValueError, match="but got none called margin"):
        assess(layered(), explained(), {"vessel": ClassEvidence(1)}, FAITHFULNESS)


def test_nothing_gives_nothing():
    """No maps, or no metrics."""
    assert assess(layered(), [], TARGETS, FAITHFULNESS) == []
    assert assess(layered(), explained(), TARGETS, {}) == []


@pytest.mark.parametrize("window", [None, (8, 8, 4)])
def test_the_cost_is_what_is_counted(window):
    """One prediction for each probe, the one pass that finds out what fits, and the metrics'."""
    net = Counting(layered())
    maps = explained(layered(), window=window)
    windows = len(Predictor(net, window).windows((8, 8, 8)).places)
    assess(net, maps, TARGETS, FAITHFULNESS, window=window)
    each = [m.passes((8, 8, 8), windows) for m in FAITHFULNESS.values()]
    own = sum(p.forward for p in each)
    assert own == windows * (5 + 5 + 9 + 5)
    assert net.counts["forward"] == 1 + windows + len(maps) * own
    assert net.counts["backward"] == 0


@pytest.mark.parametrize("window", [None, (8, 8, 4)], ids=["whole", "windows"])
def test_metrics_that_explain_again_are_given_the_method(window):
    """That of the map's own name; the very map comes again; without it they are unsupported."""
    again = {"sensitivity": SensitivityMax(2, 0.0), "randomization": Randomization(2),
             "efficient": EfficientRandomization(), "deletion": Deletion(4)}  # fmt: skip
    net, methods = layered(rectified=True), METHODS | {"smooth": SmoothGrad(samples=2)}
    probes = [a_probe(name="a"), a_probe(name="b", seed=1)]
    maps = examine(net, probes, TARGETS, methods, window=window, seed=3)
    rows = assess(net, maps, TARGETS, again, methods=methods, window=window, seed=3)
    assert {r.status for r in rows} == {"ok"}
    found = [r.value for r in rows if r.metric == "sensitivity"]
    assert found == pytest.approx([0.0] * len(maps), abs=1e-12)
    assert all(r.value < 0.99 for r in rows if r.metric == "randomization")

    unknown = assess(net, maps, TARGETS, again, methods={"ixg": InputXGradient()}, window=window)
    for row in unknown:
        known = row.metric == "deletion" or row.method == "ixg"
        assert row.status == ("ok" if known else "unsupported")


def test_its_names_are_the_packages():
    """All that a user names."""
    assert lightning_segxai.assess is assess
    for name in lightning_segxai.faithfulness.__all__:
        kind = getattr(lightning_segxai.faithfulness, name)
        assert getattr(lightning_segxai, name) is kind
