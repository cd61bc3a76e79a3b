"""Random masks over the whole volume, and what the score is where a voxel is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import PerPass, Veil, check_counts
from lightning_segxai.scored import Passes, ScoredModel, in_pieces
from lightning_segxai.values import Map, Shape, Volume


@dataclass(frozen=True)
class RISE(AttributionMethod):
    r"""How much higher the score is where a voxel is kept than on average, over random masks.

    $$a(v) = \frac{\sum_i m_i(v)\, S(b + m_i (x - b))}{\sum_i m_i(v)} - \frac1n \sum_i S(b + m_i
    (x - b))$$

    It is the paper's map with the masks' own coverage in place of its expectation, minus the mean
    score: the paper explains probabilities; a logit has no zero, and a mean that is large beside
    its changes would drown them in the chance of coverage. Masks are made on a lattice of cubes, 0
    or 1, put at a random place and interpolated linearly, as wide in millimeters along all axes,
    and of the whole volume. For a linear network it is, up to chance, ``1 - keep`` times the effect
    of the voxel's surroundings; with ``samples`` to infinity noise falls by their root. Costs
    ``samples`` forward passes, in memory that does not grow with them.

    Args:
        samples: Number of masks.
        cells: Cubes along the longest axis.
        keep: Probability that a node of the lattice is kept, in (0, 1).
        baseline: What hides, as for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once; ``auto``: as
            many as windows go through the network at once.

    Raises:
        ValueError: for less than two masks, less than one cell or perturbation per pass, a
            probability outside (0, 1), an unknown baseline, a width that is not positive.

    References:
        Petsiuk et al., "RISE: randomized input sampling for explanation of black-box models", 2018,
        arXiv:1806.07421.
    """

    samples: int = 256
    cells: int = 6
    keep: float = 0.5
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        check_counts(self, cells=self.cells, perturbations_per_pass=self.perturbations_per_pass)
        if self.samples < 2:
            raise ValueError(f"`RISE(samples={self.samples})` must be at least 2.")
        if not 0 < self.keep < 1:
            raise ValueError(f"`RISE(keep={self.keep})` must lie between 0 and 1.")
        Baseline(self.baseline, self.sigma_mm)

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``."""
        veil = Veil.of(model, x, self.baseline, self.sigma_mm)
        total, coverage = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        first: Tensor | None = None
        gained = x.new_zeros(())

        def look(masks: list[Map]) -> Tensor:
            return veil.score(torch.stack(masks))

        size = veil.per_pass(self.perturbations_per_pass)
        for masks, scores in in_pieces(self._masks(model, x), size, look):
            for mask, score in zip(masks, scores, strict=True):
                first = score if first is None else first  # it cancels, but for rounding
                total += (score - first) * mask
                gained += score - first
                coverage += mask
        kept = total / coverage - gained / self.samples
        return torch.where(coverage > 0, kept, torch.zeros_like(kept))

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The masks."""
        return Passes(self.samples * windows)

    def _masks(self, model: ScoredModel, x: Volume) -> Iterator[Map]:
        """The masks, one by one, always the same for the same seed."""
        generator, (i, j, k) = model.generator(), x.shape[1:]
        extent = [n * mm for n, mm in zip((i, j, k), model.probe.spacing_mm, strict=True)]
        edge = max(extent) / self.cells
        # a lattice as fine as this covers the axis wherever it is put
        nodes = [math.ceil(mm / edge - 1e-9) + 2 for mm in extent]
        for _ in range(self.samples):
            lattice = (torch.rand(nodes, generator=generator) < self.keep).to(x)
            places = torch.rand(3, generator=generator, dtype=torch.float64)
            hats = [
                _hats(n, mm / edge, many, float(at)).to(x)
                for n, mm, many, at in zip((i, j, k), extent, nodes, places, strict=True)
            ]
            yield torch.einsum("pqr,ip,jq,kr->ijk", lattice, *hats)


def _hats(voxels: int, cells: float, nodes: int, at: float) -> Tensor:
    """How much of each node is in each voxel of an axis; rows sum to one."""
    centers = (torch.arange(voxels, dtype=torch.float64) + 0.5) * cells / voxels + at
    distances = centers[:, None] - torch.arange(nodes, dtype=torch.float64)
    return (1 - distances.abs()).clamp_min(0)
