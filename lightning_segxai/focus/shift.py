"""How far a map moved from an earlier map of the same cell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.focus.base import ShiftMetric
from lightning_segxai.focus.kept import made_once, magnitude, ordered
from lightning_segxai.focus.location import topmost
from lightning_segxai.focus.ranks import correlation, ranks
from lightning_segxai.values import Attribution


def _center_mm(attribution: Attribution) -> Float[Tensor, "3"]:
    def find() -> Tensor:
        mass = magnitude(attribution)
        total, plane = mass.sum(), mass.sum(dim=0)  # the volume is gone through as seldom as can be
        profiles = mass.sum(dim=(1, 2)), plane.sum(dim=1), plane.sum(dim=0)
        indices = [p / total @ torch.arange(len(p), dtype=torch.float64) for p in profiles]
        return torch.stack(indices) * torch.tensor(
            attribution.probe.spacing_mm, dtype=torch.float64
        )

    return made_once(attribution, "center", find)


@dataclass(frozen=True)
class RankCorrelation(ShiftMetric):
    """Spearman correlation of the two maps, with their signs.

    ``Pearson(rank(a), rank(b))``, tied voxels given their mean rank, in [-1, 1]. The same map at
    another scale has 1, a map of opposite sign -1, an unrelated one about 0. None where a map is
    the same everywhere, for it has no order.

    References:
        Spearman, "The proof and measurement of association between two things", Am. J. Psychol.
        15, 1904; for attributions Adebayo et al., "Sanity checks for saliency maps", NeurIPS
        2018, arXiv:1810.03292.
    """

    unit = "1"
    range = (-1.0, 1.0)
    higher_is_better = None
    reading = "1: voxels in the same order of importance as then; 0: no relation."

    def measure(self, attribution: Attribution, reference: Attribution) -> float | None:
        own, other = (
            made_once(a, "ranks", partial(ranks, a.values)) for a in (attribution, reference)
        )
        return correlation(own, other)


@dataclass(frozen=True)
class TopOverlap(ShiftMetric):
    """Share of the strongest voxels that were the strongest before.

    ``|top_K(|a|) & top_K(|b|)| / K`` with ``K`` the fraction of the voxels, rounded up, in
    [0, 1]; voxels tied for the last places share them, and of two shares the smaller one is
    common. The same map has 1, an unrelated one about the fraction.

    Args:
        fraction: Share of the voxels that are called the strongest, in (0, 1].

    Raises:
        ValueError: for a fraction outside (0, 1].

    References:
        Ghorbani et al., "Interpretation of neural networks is fragile", AAAI 2019,
        arXiv:1710.10547 (top-k intersection).
    """

    fraction: float = 0.01

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = None
    reading = "1: the strongest voxels are those of then; by chance it is the fraction."

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(
                f"`TopOverlap(fraction={self.fraction})` needs a share of the voxels above 0 and "
                "at most 1, such as 0.01."
            )

    def measure(self, attribution: Attribution, reference: Attribution) -> float | None:
        count = math.ceil(self.fraction * attribution.values.numel())
        voxels = magnitude(attribution) >= ordered(attribution)[-count]  # no other is a member now
        now, then = (topmost(a, count, voxels) for a in (attribution, reference))
        return min(1.0, float(torch.minimum(now, then).sum() / count))


@dataclass(frozen=True)
class CenterShift(ShiftMetric):
    """Distance between the centers of the two maps, in mm.

    ``|c(a) - c(b)|`` with ``c(a) = sum_v |a_v| x_v / sum_v |a_v|`` and ``x_v`` the voxel's place
    in mm. The same map at another scale or sign has 0; so may maps that differ about one center.
    """

    unit = "mm"
    range = (0.0, float("inf"))
    higher_is_better = None
    reading = "How far the middle of the attribution moved."

    def measure(self, attribution: Attribution, reference: Attribution) -> float | None:
        return float(torch.dist(_center_mm(attribution), _center_mm(reference)))
