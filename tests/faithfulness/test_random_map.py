"""The zero of a faithfulness metric, and that faithful maps beat it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from held import Functional, a_volume, map_of, model_of, random_values
from nets_for_tests import Weigh, a_probe, layered

from lightning_segxai.explain import explain
from lightning_segxai.faithfulness import (
    Deletion,
    FaithfulnessCorrelation,
    FaithfulnessMetric,
    Insertion,
    RandomBaseline,
)
from lightning_segxai.methods.gradients import InputXGradient
from lightning_segxai.scored import Passes, Predictor
from lightning_segxai.targets import VoxelEvidence

FIRST = VoxelEvidence((0, 0, 0))


@dataclass(frozen=True, eq=False)
class Collects(FaithfulnessMetric):
    """Keeps what it is given, and says 1, 2, 3 ..., or nothing."""

    maps: list
    none_at: int = 99

    unit = "mm"
    range = (0.0, 5.0)
    higher_is_better = True
    reading = "how many maps it saw"

    def assess(self, model, attribution, method=None):
        self.maps.append(attribution.values)
        return None if len(self.maps) == self.none_at else float(len(self.maps))

    def passes(self, shape, windows, method=None):
        return Passes(2 * windows, 3)


def test_the_same_values_elsewhere():
    """Each permutation another one; the mean; costs, unit and range are the metric's."""
    inner = Collects([])
    metric = RandomBaseline(inner, repeats=3)
    model = model_of(layered(), a_probe())
    values = random_values((8, 8, 8))

    assert metric.assess(model, map_of(model, values)) == 2.0
    assert len(inner.maps) == 3
    for found in inner.maps:
        assert torch.equal(found.flatten().sort().values, values.flatten().sort().values)
        assert float((found == values).double().mean()) < 0.05
    assert not torch.equal(inner.maps[0], inner.maps[1])
    assert metric.passes((8, 8, 8), 4) == Passes(24, 9)
    assert (metric.unit, metric.range, metric.higher_is_better) == ("mm", (0.0, 5.0), None)
    assert "Collects" in metric.reading


def test_the_same_seed_the_same_permutation():
    """Another draw for another seed, of its own or the model's."""
    values = random_values((8, 8, 8))

    def permuted(seed=0, model_seed=0):
        inner = Collects([])
        model = model_of(layered(), a_probe(), seed=model_seed)
        RandomBaseline(inner, seed=seed).assess(model, map_of(model, values))
        return inner.maps[0]

    assert torch.equal(permuted(), permuted())
    assert not torch.equal(permuted(), permuted(1))
    assert not torch.equal(permuted(), permuted(0, 1))


def test_none_where_the_metric_has_none():
    """Also in one of the repeats."""
    model = model_of(layered(), a_probe())
    assert (
        RandomBaseline(Collects([], 2), 3).assess(model, map_of(model, torch.ones(8, 8, 8))) is None
    )


def test_no_repeats_are_refused():
    """When the metric is written down."""
    with pytest.raises(ValueError, match=r"`RandomBaseline\(repeats=0\)` must be at least 1"):
        RandomBaseline(Deletion(), 0)


@pytest.mark.parametrize("kind", [Deletion, Insertion])
def test_a_half_on_a_linear_uniform_network(kind):
    """All voxels do the same: any order gives a half. Else it is a half in mean."""
    uniform = model_of(Weigh(0.0, 2.0), a_volume(torch.ones(6, 6, 6)))
    exact = map_of(uniform, random_values((6, 6, 6)))
    found = RandomBaseline(kind(baseline="zero")).assess(uniform, exact)
    assert found == pytest.approx(0.5, abs=1e-12)
    varied = model_of(Weigh(0.0, 2.0), a_volume(torch.rand(10, 10, 10)))
    best = map_of(varied, varied.probe.image[0])
    found = RandomBaseline(kind(baseline="zero"), repeats=10).assess(varied, best)
    assert found == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_faithful_maps_beat_random_ones(seed):
    """Some bright voxels are the cause of a smooth score: in ten of ten seeds, by each metric.

    Bright, since a blurred baseline takes away only what differs from its surroundings: of causes
    above and below them, the effects would cancel, and areas by their sum would say little.
    """
    generator = torch.Generator().manual_seed(seed)
    cause = (torch.rand(10, 10, 10, generator=generator) < 0.05).double()
    probe = a_volume(torch.rand(10, 10, 10, generator=generator) + 0.5 + 2 * cause)
    net = Functional(lambda x: 5 * torch.tanh((cause * x[0] ** 2).sum() / 500))
    [found] = explain(Predictor(net), probe, {"t": FIRST}, {"m": InputXGradient()}, seed=seed)
    model = model_of(net, probe, FIRST, seed=seed)
    better = {
        Deletion(): -1,
        Insertion(): 1,
        Deletion(baseline="zero"): -1,
        Insertion(baseline="zero"): 1,
        FaithfulnessCorrelation(baseline="zero", block=1): 1,
        FaithfulnessCorrelation(baseline="zero", block=2): 1,
    }
    for metric, sign in better.items():
        mine = metric.assess(model, found)
        chance = RandomBaseline(metric).assess(model, found)
        assert sign * (mine - chance) > 0.1, (metric, mine, chance)
