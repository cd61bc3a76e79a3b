"""What a map says in numbers: where its attribution lies, how it is spread, how it moved."""

from __future__ import annotations

from lightning_segxai.focus.anatomy import (
    MassAtCaliber,
    MassAtDistance,
    MiddleShare,
    Profile,
    ReachQuantile,
    caliber_profile,
    distance_profile,
)
from lightning_segxai.focus.balance import SignBalance, TotalMass
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
from lightning_segxai.focus.similarity import StructuralSimilarity
from lightning_segxai.focus.spread import EffectiveVolume, Entropy, Gini
from lightning_segxai.focus.transport import EarthMovers

__all__ = [
    "AveragePrecision",
    "CenterShift",
    "EarthMovers",
    "EffectiveVolume",
    "Entropy",
    "FocusMetric",
    "Gini",
    "MassAtCaliber",
    "MassAtDistance",
    "MassInside",
    "MiddleShare",
    "PointingHit",
    "Profile",
    "RankCorrelation",
    "RankInside",
    "Reach",
    "ReachQuantile",
    "ShiftMetric",
    "SignBalance",
    "StructuralSimilarity",
    "TopOverlap",
    "TotalMass",
    "caliber_profile",
    "dice",
    "distance_profile",
]
