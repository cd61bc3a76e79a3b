"""What a map says in numbers: where its attribution lies, how it is spread, how it moved."""

from __future__ import annotations

from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.focus.location import (
    AveragePrecision,
    MassInside,
    PointingHit,
    RankInside,
    Reach,
)
from lightning_segxai.focus.overlap import dice
from lightning_segxai.focus.shift import CenterShift, RankCorrelation, TopOverlap
from lightning_segxai.focus.spread import EffectiveVolume, Entropy, Gini

__all__ = [
    "AveragePrecision",
    "CenterShift",
    "EffectiveVolume",
    "Entropy",
    "FocusMetric",
    "Gini",
    "MassInside",
    "PointingHit",
    "RankCorrelation",
    "RankInside",
    "Reach",
    "ShiftMetric",
    "TopOverlap",
    "dice",
]
