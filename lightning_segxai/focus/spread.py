"""How widely the attribution is spread, wherever it lies.

All of these read ``|a|``, in float64, and none changes when voxels trade places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.focus.base import FocusMetric
from lightning_segxai.focus.kept import made_once, magnitude, ordered
from lightning_segxai.values import Attribution


def _entropy(attribution: Attribution) -> float:
    def sum_up() -> Tensor:
        mass = magnitude(attribution)
        return torch.special.entr(mass / mass.sum()).sum()

    return max(0.0, float(made_once(attribution, "entropy", sum_up)))


@dataclass(frozen=True)
class Gini(FocusMetric):
    """Inequality of the attribution among the voxels (sparseness).

    ``sum_i (2 i - n - 1) |a|_(i) / (n sum |a|)`` over the ``n`` voxels in ascending order, in
    [0, 1). A flat map has 0, a single voxel ``1 - 1/n``.

    References:
        Hurley and Rickard, "Comparing measures of sparsity", IEEE Trans. Inf. Theory 55, 2009,
        arXiv:0811.4706; for attributions Chalasani et al., ICML 2020, arXiv:1810.06583.
    """

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = None
    reading = "0: all voxels alike; near 1: a few voxels hold all attribution."

    def measure(self, attribution: Attribution) -> float | None:
        ascending = ordered(attribution)
        n = len(ascending)
        ranks = torch.arange(1 - n, n, 2, dtype=torch.float64)
        return max(0.0, float(ranks @ ascending / (n * ascending.sum())))


@dataclass(frozen=True)
class Entropy(FocusMetric):
    """Entropy of the attribution over the voxels (complexity), in nats.

    ``-sum_v p_v ln p_v`` with ``p = |a| / sum |a|``, in [0, ln n]. A single voxel has 0, a flat
    map of ``n`` voxels ``ln n``.

    References:
        Bhatt et al., "Evaluating and aggregating feature-based model explanations", IJCAI 2020,
        arXiv:2005.00631.
    """

    unit = "nat"
    range = (0.0, float("inf"))
    higher_is_better = None
    reading = "0: one voxel; ln(voxels): spread evenly over all."

    def measure(self, attribution: Attribution) -> float | None:
        return _entropy(attribution)


@dataclass(frozen=True)
class EffectiveVolume(FocusMetric):
    """Volume over which a flat map would spread that has the same entropy, in mm3.

    ``exp(H) * voxel volume`` with ``H`` the entropy in nats. A map flat on a region has the
    region's volume, a single voxel its own.

    References:
        Hill, "Diversity and evenness: a unifying notation and its consequences", Ecology 54,
        1973 (the number of order 1).
    """

    unit = "mm3"
    range = (0.0, float("inf"))
    higher_is_better = None
    reading = "The volume that the network attends to, as if it did so evenly."

    def measure(self, attribution: Attribution) -> float | None:
        return math.exp(_entropy(attribution)) * math.prod(attribution.probe.spacing_mm)
