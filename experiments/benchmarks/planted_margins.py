"""By how much the map of a method does better than its own values at random places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_segxai import (
    Attribution,
    AttributionMethod,
    ClassEvidence,
    Deletion,
    Insertion,
    MassInside,
    Probe,
    RandomBaseline,
    assess,
    examine,
    measure,
)

TARGETS = {"vessel": ClassEvidence(1)}
FAITHFULNESS = {
    "deletion": Deletion(),
    "insertion": Insertion(),
    "random_deletion": RandomBaseline(Deletion()),
    "random_insertion": RandomBaseline(Insertion()),
}
METRICS = {"mass": MassInside("cause")}
MARGINS = ("deletion", "insertion", "mass")


def elsewhere(attribution: Attribution, seed: int) -> Attribution:
    """The map's own values at random voxels."""
    values = attribution.values
    places = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    return replace(attribution, values=values.flatten()[places].reshape(values.shape))


def margins(
    net: nn.Module, probe: Probe, methods: Mapping[str, AttributionMethod], seed: int
) -> dict[str, dict[str, float]]:
    """By how much each method does better than chance; NaN where a number cannot be had."""
    return margins_of(net, examine(net, [probe], TARGETS, methods, seed=seed), seed)


def margins_of(
    net: nn.Module, maps: Sequence[Attribution], seed: int
) -> dict[str, dict[str, float]]:
    """The same of maps of one volume, by their method."""
    held = assess(net, maps, TARGETS, FAITHFULNESS, seed=seed)
    inside = measure(maps, METRICS)
    chance = measure([elsewhere(one, seed) for one in maps], METRICS)
    found = {(row.method, row.metric): row.value for row in [*held, *inside]}
    found |= {(row.method, "random_mass"): row.value for row in chance if row.metric == "mass"}
    signs = {"deletion": -1, "insertion": 1, "mass": 1}
    return {
        one.method: {
            name: sign * (found[one.method, name] - found[one.method, f"random_{name}"])
            for name, sign in signs.items()
        }
        for one in maps
    }
