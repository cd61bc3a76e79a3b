"""Integrated gradients whose steps go where the score changes in a way that they do not follow."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_segxai.baselines import Baseline
from lightning_segxai.methods.base import Complete, LookMethod
from lightning_segxai.passes import Look
from lightning_segxai.rules.interception import Rule
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.trajectories import Point, Trajectory
from lightning_segxai.values import Map, Probe, Volume

NODES = 4
"""Points on each stretch of the path."""
STRETCHES = 4
"""Stretches that the path starts with."""
LEAST = NODES * (STRETCHES + 2)
"""The fewest points with which a stretch can be divided."""


@dataclass(frozen=True, eq=False)
class _Between(Trajectory):
    """A stretch of the straight line, and some points of it that are only looked at forward."""

    baseline: Volume
    low: float
    high: float
    edges: tuple[float, ...]

    @property
    def count(self) -> int:
        """Number of points with a gradient."""
        return NODES

    @property
    def ends(self) -> int:
        """Number of edges whose score is not known yet."""
        return len(self.edges)

    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """The edges, and the nodes of Gauss-Legendre between them."""
        start = self.baseline
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        width = self.high - self.low
        yield (
            *(Point(x, start, edge, 0.0) for edge in self.edges),
            *(
                Point(x, start, self.low + width * float(node + 1) / 2, width * float(weight) / 2)
                for node, weight in zip(nodes, weights, strict=True)
            ),
        )


@dataclass(eq=False)
class _Part:
    """A stretch's map, and the scores at its edges."""

    values: Tensor
    scores: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stretch(LookMethod):
    """The part of integrated gradients that a stretch of the path makes."""

    between: _Between
    backward: Rule | None

    @property
    def trajectory(self) -> _Between:
        return self.between

    @property
    def rule(self) -> Rule | None:
        return self.backward

    def start(self, model: ScoredModel, x: Volume) -> _Part:
        return _Part(torch.zeros_like(x))

    def update(self, state: _Part, look: Look) -> None:
        if look.point.weight:
            state.values[look.at] += look.point.weight * look.point.way(look.place) * look.gradient
        else:
            known = state.scores.get(look.point.along, 0.0)
            state.scores[look.point.along] = known + look.score

    def finish(self, model: ScoredModel, x: Volume, state: _Part) -> Map:
        return state.values.sum(dim=0)


def divisions(steps: int) -> int:
    """How often a stretch is divided, with so many points at most."""
    return (steps - NODES * STRETCHES) // (2 * NODES)


def passes(steps: int, windows: int, rows: int) -> Passes:
    """What the stretches send through."""
    looks = NODES * (STRETCHES + 2 * divisions(steps))
    forward = looks + STRETCHES + 1 + divisions(steps)
    return Passes(forward * windows * rows, looks * windows * rows)


def refined(
    model: ScoredModel, x: Volume, baseline: Baseline, rule: Rule | None, steps: int
) -> Complete:
    """Divide, again and again, the stretch whose gradients miss its gain of score by most."""
    scores: dict[float, float] = {}
    start = baseline.make(x, model.probe.spacing_mm, model.generator())

    def stretch(low: float, high: float) -> tuple[float, float, float, Map]:
        edges = tuple(edge for edge in (low, high) if edge not in scores)
        method = _Stretch(_Between(start, low, high, edges), rule)
        part = method.looked(model, x)
        scores.update(part.scores)
        values = method.finish(model, x, part)
        miss = abs(float(values.double().sum()) - (scores[high] - scores[low]))
        return -miss, low, high, values

    cuts = [n / STRETCHES for n in range(STRETCHES + 1)]
    parts = [stretch(low, high) for low, high in pairwise(cuts)]
    heapq.heapify(parts)
    for _ in range(divisions(steps)):
        _, low, high, _ = heapq.heappop(parts)
        middle = (low + high) / 2
        heapq.heappush(parts, stretch(low, middle))
        heapq.heappush(parts, stretch(middle, high))
    return Complete(torch.stack([values for *_, values in parts]).sum(dim=0), scores[0.0])
