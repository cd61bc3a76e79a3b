"""What explaining and assessing take, counted in windows that go through the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.rules.interception import Rule
from lightning_segxai.scored import Passes, Predictor
from lightning_segxai.targets import Target
from lightning_segxai.trajectories import Trajectory
from lightning_segxai.values import Probe


@dataclass(frozen=True)
class Cost:
    """Windows sent through the network."""

    forward: int
    backward: int

    @property
    def passes(self) -> int:
        """Both together."""
        return self.forward + self.backward

    def __add__(self, other: Passes | Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __str__(self) -> str:
        return f"{self.forward} forward and {self.backward} backward passes"


def cost(
    predictor: Predictor,
    probes: Iterable[Probe],
    targets: Mapping[str, Target],
    methods: Mapping[str, AttributionMethod],
) -> Cost:
    """What explaining these probes takes; less where a region turns out empty.

    Every distinct trajectory under a distinct rule costs a forward pass for each of its points, and
    a backward pass for each point with a gradient and each target; twice as many under a rule that
    sends a second volume along. The prediction is the look at the volume itself, or, by several
    windows, a forward pass of its own. Each is times the number of windows. The one pass that finds
    out what a new network accepts is not in it.
    """
    forward = backward = 0
    for probe in probes:
        i, j, k = probe.shape
        windows = len(predictor.windows(probe.shape).places)
        walks: set[tuple[Trajectory, Rule | None]] = set()
        alone = Cost(0, 0)
        for method in methods.values():
            walks |= {(p.trajectory, p.rule) for p in method.parts if p.trajectory is not None}
            alone += method.extra_passes((i, j, k), windows)
        rows = {way: 2 if way[1] is not None and way[1].partner else 1 for way in walks}
        looks = sum(n * (way[0].count + way[0].ends) for way, n in rows.items())
        gradients = sum(n * way[0].count for way, n in rows.items())
        seen = windows == 1 and any(t.starts_here and rule is None for t, rule in walks)
        forward += windows * (looks + (not seen)) + alone.forward * len(targets)
        backward += (windows * gradients + alone.backward) * len(targets)
    return Cost(forward, backward)


def cost_of_assessing(
    predictor: Predictor,
    probes: Iterable[Probe],
    targets: Mapping[str, Target],
    methods: Mapping[str, AttributionMethod],
    faithfulness: Mapping[str, FaithfulnessMetric],
) -> Cost:
    """What holding the maps of these probes against the network takes; less for empty maps.

    The prediction that targets are fixed on, for each probe, and the metrics' own for each map.
    """
    total = Cost(0, 0)
    if not faithfulness:
        return total
    for probe in probes:
        i, j, k = probe.shape
        windows = len(predictor.windows(probe.shape).places)
        total += Cost(windows, 0)
        for method in methods.values():
            for metric in faithfulness.values():
                each = metric.passes((i, j, k), windows, method)
                total += Cost(each.forward * len(targets), each.backward * len(targets))
    return total
