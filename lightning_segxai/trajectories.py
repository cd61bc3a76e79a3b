"""Where the network is looked at: the points of a trajectory, and their order.

Points come in *groups* that share the volume they start from. A group is walked window by window:
all its points in one window, then the next, so that what a method keeps of a window is small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.baselines import Baseline
from lightning_segxai.values import Probe, Volume
from lightning_segxai.windows import Place


@dataclass(frozen=True, eq=False)
class Point:
    """An input at which the network is looked at: ``baseline + along * (end - baseline)``.

    Args:
        origin: The volume explained there: the probe's image, or a noisy copy of it.
        baseline: Where the way to it comes from, if there is one.
        along: How far on the way, from 0 (the baseline) to 1.
        weight: Weight of this point in the trajectory's mean; 0 for one that is only looked at
            forward.
        end: Where the way leads, if not to the origin.
    """

    origin: Volume
    baseline: Volume | None = None
    along: float = 1.0
    weight: float = 1.0
    end: Volume | None = None

    @property
    def input(self) -> Volume:
        """The whole volume that the network is given."""
        return self.crop((slice(None), slice(None), slice(None)))

    def crop(self, place: Place) -> Float[Tensor, "c i j k"]:
        """The part of it that a window sees."""
        at = (slice(None), *place)
        end = (self.origin if self.end is None else self.end)[at]
        if self.baseline is None or self.along == 1:
            return end
        return self.baseline[at] + self.along * (end - self.baseline[at])

    def way(self, place: Place) -> Float[Tensor, "c i j k"]:
        """From the baseline to the end, in a window."""
        at = (slice(None), *place)
        assert self.baseline is not None
        return (self.origin if self.end is None else self.end)[at] - self.baseline[at]


class Trajectory(ABC):
    """The inputs at which a method looks at the network. Equal trajectories are walked once."""

    starts_here = False
    """Whether the first point is the volume itself, so that looking there is predicting it."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of points with a gradient."""

    @property
    def ends(self) -> int:
        """Number of points that are only looked at forward."""
        return 0

    @property
    def copies(self) -> int:
        """Number of groups."""
        return 1

    @abstractmethod
    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """The points, group by group, made when they are asked for."""


@dataclass(frozen=True)
class Here(Trajectory):
    """The volume itself."""

    starts_here = True

    @property
    def count(self) -> int:
        """Number of points with a gradient."""
        return 1

    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """The volume itself."""
        yield (Point(x),)


@dataclass(frozen=True)
class Line(Trajectory):
    """The straight line between a volume and its baseline, at the nodes of Gauss-Legendre.

    Both ends are looked at too, forward only: they say what the score gained on the way.
    """

    steps: int
    baseline: Baseline

    starts_here = True

    @property
    def count(self) -> int:
        """Number of points with a gradient."""
        return self.steps

    @property
    def ends(self) -> int:
        """The volume and the baseline."""
        return 2

    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """From the volume to the baseline; the weights sum to one."""
        start = self.baseline.make(x, probe.spacing_mm, generator)
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        inner = [
            Point(x, start, float(node + 1) / 2, float(weight) / 2)
            for node, weight in zip(nodes[::-1], weights[::-1], strict=True)
        ]
        yield Point(x, start, 1.0, 0.0), *inner, Point(x, start, 0.0, 0.0)


@dataclass(frozen=True)
class Pair(Trajectory):
    """The volume beside each of several baselines, in one pass, for rules that compare the two."""

    baselines: tuple[Baseline, ...]

    starts_here = True

    @property
    def count(self) -> int:
        """Number of points with a gradient."""
        return len(self.baselines)

    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """The volume, once for each baseline."""
        yield tuple(
            Point(x, baseline.make(x, probe.spacing_mm, generator), 1.0, 1 / len(self.baselines))
            for baseline in self.baselines
        )


@dataclass(frozen=True)
class Scatter(Trajectory):
    """Points drawn on the lines from several baselines, at least one on each.

    How far along is drawn from as many equal parts of a line as it has samples, one from each; the
    noise is of the volume's range. The volume and the baselines are looked at too, forward only.
    """

    samples: int
    baselines: tuple[Baseline, ...]
    noise: float = 0.0

    starts_here = True

    @property
    def count(self) -> int:
        """Number of points with a gradient."""
        return self.samples

    @property
    def ends(self) -> int:
        """The volume and the baselines."""
        return 1 + len(self.baselines)

    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """The volume, the baselines, and the samples."""
        starts = [baseline.make(x, probe.spacing_mm, generator) for baseline in self.baselines]
        shares = torch.rand(self.samples, generator=generator).tolist()
        ends = [Point(x, None, 1.0, 0.0), *(Point(x, start, 0.0, 0.0) for start in starts)]
        drawn = []
        for n, share in enumerate(shares):
            part, which = divmod(n, len(starts))
            parts = len(range(which, self.samples, len(starts)))
            # each baseline has the same weight, however often it is drawn
            weight = 1 / (len(starts) * parts)
            end = noisy(x, self.noise, generator) if self.noise else None
            drawn.append(Point(x, starts[which], (part + share) / parts, weight, end))
        yield (*ends, *drawn)


@dataclass(frozen=True)
class Cloud(Trajectory):
    """Noisy copies of the volume, each with a trajectory of its own."""

    samples: int
    noise: float
    inner: Trajectory

    @property
    def count(self) -> int:
        """Number of points with a gradient."""
        return self.samples * self.inner.count

    @property
    def ends(self) -> int:
        """Number of points that are only looked at forward."""
        return self.samples * self.inner.ends

    @property
    def copies(self) -> int:
        """Number of groups."""
        return self.samples * self.inner.copies

    def groups(
        self, x: Volume, probe: Probe, generator: torch.Generator
    ) -> Iterator[tuple[Point, ...]]:
        """The inner trajectory's groups around each copy, copy after copy."""
        for _ in range(self.samples):
            yield from self.inner.groups(noisy(x, self.noise, generator), probe, generator)


def noisy(x: Volume, noise: float, generator: torch.Generator) -> Volume:
    """A copy with normal noise of a fraction of the volume's intensity range."""
    drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
    return x + noise * (x.amax() - x.amin()) * drawn
