"""How far the attribution must be carried to make one map of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from scipy.sparse import csr_array
from torch import Tensor

from lightning_segxai.focus.base import ShiftMetric
from lightning_segxai.focus.kept import made_once, magnitude
from lightning_segxai.values import Attribution


@dataclass(frozen=True)
class EarthMovers(ShiftMetric):
    """Earth mover's distance between the two maps, in mm (first Wasserstein distance).

    ``min_T sum T_uv |x_u - x_v|`` over the plans ``T >= 0`` that carry ``|a| / sum |a|`` to
    ``|b| / sum |b|``: the mean way that attribution must go. Both are summed over a coarse grid of
    ``cells`` along the longest edge of the volume, and about as large ones along the others;
    ``x_u`` are the cells' middles. On that grid it is exact, found by linear programming; what
    moves within a cell is not seen.

    Args:
        cells: Cells along the longest edge in mm; the work grows with about their sixth power.

    Raises:
        ValueError: for fewer than 2 cells.

    References:
        Rubner, Tomasi & Guibas, "The earth mover's distance as a metric for image retrieval",
        IJCV 40, 2000.
    """

    cells: int = 6

    unit = "mm"
    range = (0.0, float("inf"))
    higher_is_better = None
    reading = "How far the attribution moved on average, also where its middle stayed."

    def __post_init__(self) -> None:
        if self.cells < 2:
            raise ValueError(
                f"`EarthMovers(cells={self.cells})` needs at least 2 cells along the longest edge."
            )

    def measure(self, attribution: Attribution, reference: Attribution) -> float | None:
        now, then = self._gathered(attribution), self._gathered(reference)
        surplus = (now - then).flatten().numpy()
        # what both have in a cell stays there: no plan is shorter, as ways obey the triangle rule
        give, take = np.flatnonzero(surplus > 0), np.flatnonzero(surplus < 0)
        carried = min(surplus[give].sum(), -surplus[take].sum())
        if carried < 1e-12:
            return 0.0
        supply = surplus[give] / surplus[give].sum()
        demand = surplus[take] / surplus[take].sum()
        middles = self._middles(attribution)
        ways = np.linalg.norm(middles[give][:, None] - middles[take][None], axis=2)
        ways_of = np.arange(ways.size)
        leaving, arriving = ways_of // len(take), len(give) + ways_of % len(take)
        sums = csr_array(
            (np.ones(2 * ways.size), (np.append(leaving, arriving), np.tile(ways_of, 2)))
        )
        plan = linprog(
            ways.ravel(),
            A_eq=sums[:-1],  # the last follows from the others
            b_eq=np.concatenate([supply, demand])[:-1],
            method="highs-ds",
            options={"presolve": False},  # it takes a third of the time, and finds nothing
        )
        if not plan.success:
            raise ValueError(f"`EarthMovers` found no plan of transport: {plan.message}")
        return max(0.0, float(plan.fun) * float(carried))

    def _gathered(self, attribution: Attribution) -> Float[Tensor, "cells_i cells_j cells_k"]:
        """Shares of the attribution in the cells."""

        def gather() -> Tensor:
            sums = magnitude(attribution).numpy()
            for axis, starts in enumerate(self._starts(attribution)):
                sums = np.add.reduceat(sums, starts, axis=axis)
            return torch.from_numpy(sums / sums.sum())

        return made_once(attribution, ("cells", self.cells), gather)

    def _starts(self, attribution: Attribution) -> list[np.ndarray]:
        """Index of each cell's first voxel, along each axis."""
        sizes, spacing = attribution.values.shape, attribution.probe.spacing_mm
        extent = [n * s for n, s in zip(sizes, spacing, strict=True)]
        edge = max(extent) / self.cells
        counts = [min(n, max(1, round(e / edge))) for n, e in zip(sizes, extent, strict=True)]
        return [np.arange(count) * n // count for n, count in zip(sizes, counts, strict=True)]

    def _middles(self, attribution: Attribution) -> np.ndarray:
        """The cells' middles in mm."""
        sizes, spacing = attribution.values.shape, attribution.probe.spacing_mm
        axes = [
            (starts + np.append(starts[1:], size) - 1) / 2 * edge
            for starts, size, edge in zip(self._starts(attribution), sizes, spacing, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
