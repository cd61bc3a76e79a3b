"""How much attribution there is, and how much of it speaks against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_segxai.focus.base import FocusMetric
from lightning_segxai.focus.kept import magnitude
from lightning_segxai.values import Attribution


@dataclass(frozen=True)
class TotalMass(FocusMetric):
    """All of the attribution, ``sum_v |a_v|``, in the unit of the map.

    It tells how strongly the score depends on the input, and whether the other numbers are those of
    next to nothing. Compare it over epochs of one method, not between methods.

    References:
        Terzieva et al., ECML PKDD 2023, doi:10.1007/978-3-031-74627-7_29, who follow it, and the
        entropy, over a training.
    """

    unit = "a.u."
    range = (0.0, float("inf"))
    higher_is_better = None
    reading = "How much attribution there is in all; compare epochs of one method only."

    def measure(self, attribution: Attribution) -> float | None:
        return float(magnitude(attribution).sum())


@dataclass(frozen=True)
class SignBalance(FocusMetric):
    """Attribution for against attribution against: ``sum_v a_v / sum_v |a_v|``, in [-1, 1].

    An absolute map has 1 by its nature.
    """

    unit = "1"
    range = (-1.0, 1.0)
    higher_is_better = None
    reading = "1: all speaks for the target; 0: as much against it; -1: all against."

    def measure(self, attribution: Attribution) -> float | None:
        net = attribution.values.detach().sum(dtype=torch.float64)
        return min(1.0, max(-1.0, float(net / magnitude(attribution).sum())))
