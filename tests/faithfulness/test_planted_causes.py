"""Where trained networks decide by a known cause, faithful methods find it and random maps do not.

The full table of methods and kinds is `experiments/benchmarks/planted.py`.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from planted_nets import held_out_dice, planted_case
from torch import nn

from lightning_segxai.assess import assess
from lightning_segxai.examine import examine
from lightning_segxai.faithfulness import Randomization
from lightning_segxai.focus.location import MassInside
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.deeplift import DeepLift
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import FeatureAblation

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

from planted_margins import TARGETS, elsewhere, margins, margins_of
from planted_training import HELD_OUT, RECIPES

SEEDS = range(10)
FAITHFUL = {
    "saliency": Saliency(),
    "smooth_grad": SmoothGrad(samples=4),
    "integrated_gradients": IntegratedGradients(),
    "deep_lift": DeepLift(),
    "feature_ablation": FeatureAblation(),
}


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    """Tests of one seed follow each other, so that its networks are trained once."""
    return request.param


@pytest.mark.parametrize("kind", ["spots", "shortcut"])
def test_faithful_methods_beat_their_random_map(kind, seed):
    """By each of Deletion, Insertion and MassInside of the cause, in ten seeds of ten."""
    case = planted_case(kind, seed)

    found = margins(case.net, case.probe, FAITHFUL, seed)

    lost = {
        (method, metric): value
        for method, values in found.items()
        for metric, value in values.items()
        if not value > 0
    }
    assert held_out_dice(kind, seed) > 0.75
    assert not lost


@dataclass(frozen=True)
class Reinitialized(AttributionMethod):
    """Broken: the gradient of a network of other weights than the one it is asked about."""

    net: nn.Module

    def attribute(self, model, x):
        other = replace(model.predictor, module=self.net, parameters={})
        return Saliency().attribute(replace(model, predictor=other), x)


def test_a_broken_method_fails_randomization(seed):
    """It stays the same map to the end; the faithful gradient is lost, in ten seeds of ten."""
    case = planted_case("spots", seed)
    other = copy.deepcopy(case.net)
    torch.manual_seed(seed)
    for part in other.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    methods = {"broken": Reinitialized(other.eval()), "saliency": Saliency()}

    maps = examine(case.net, [case.probe], TARGETS, methods, seed=seed)
    rows = assess(
        case.net, maps, TARGETS, {"randomization": Randomization()}, methods=methods, seed=seed
    )

    broken, faithful = (r.value for r in rows)
    assert broken > 0.999
    assert faithful < 0.8


def test_the_trained_network_decides_by_the_band(seed):
    """Without the band, and nothing else changed, it must take most of what it found for veins."""
    net = planted_case("shortcut", seed).net
    make = RECIPES["shortcut"].make
    found = []
    for band in (False, True):
        twins = [make(HELD_OUT + seed + 100 * n, band) for n in range(3)]
        with torch.no_grad():
            arteries = net(torch.stack([torch.from_numpy(t.image)[None] for t in twins]))[:, 0] > 0
        filled = torch.stack([torch.from_numpy(t.regions["tubes"]) for t in twins])
        found.append(int(arteries[filled].sum()))

    assert found[0] < 0.5 * found[1]


def test_a_black_baseline_is_blind_to_a_dark_cause(seed):
    """Integrated gradients from black and the input times the gradient must miss the band.

    Both start about where the band already is: less of them lies there than of a flat map.
    """
    case = planted_case("shortcut", seed)
    blind = {"black": IntegratedGradients(baseline="minimum"), "input": InputXGradient()}

    maps = examine(case.net, [case.probe], TARGETS, blind, seed=seed)

    share = float(case.probe.regions["cause"].double().mean())
    for one in maps:
        assert MassInside("cause").measure(one) < share


def test_a_random_map_does_not_pass():
    """Held against another random map it wins by all three now and then, not in ten of ten."""
    wins = 0
    for seed in SEEDS:
        case = planted_case("spots", seed)
        [one] = examine(case.net, [case.probe], TARGETS, {"saliency": Saliency()}, seed=seed)
        [found] = margins_of(case.net, [elsewhere(one, 100 + seed)], seed).values()
        wins += all(value > 0 for value in found.values())

    assert wins <= 5
