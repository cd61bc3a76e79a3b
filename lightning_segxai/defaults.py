"""What the bare monitor asks: one target, three methods, every metric."""

from __future__ import annotations

from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.focus.location import (
    AveragePrecision,
    MassInside,
    PointingHit,
    RankInside,
    Reach,
)
from lightning_segxai.focus.shift import CenterShift, RankCorrelation, TopOverlap
from lightning_segxai.focus.spread import EffectiveVolume, Entropy, Gini
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.cams import GradCAM
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.targets import ClassEvidence, Target


def default_targets() -> dict[str, Target]:
    """The evidence for class 1, where the label says it is."""
    return {"vessel": ClassEvidence(1)}


def default_methods() -> dict[str, AttributionMethod]:
    """One plain gradient, one path and one layer method: 17 forward and backward passes."""
    return {
        "saliency": Saliency(),
        "integrated_gradients": IntegratedGradients(),
        "grad_cam": GradCAM(),
    }


def default_metrics() -> dict[str, FocusMetric]:
    """All focus metrics, on the probe's label where they ask for a region."""
    return {
        "mass_inside": MassInside(),
        "rank_inside": RankInside(),
        "pointing_hit": PointingHit(),
        "average_precision": AveragePrecision(),
        "gini": Gini(),
        "entropy": Entropy(),
        "effective_volume": EffectiveVolume(),
        "reach": Reach(),
    }


def default_shifts() -> dict[str, ShiftMetric]:
    """All shift metrics."""
    return {
        "rank_correlation": RankCorrelation(),
        "top_overlap": TopOverlap(),
        "center_shift": CenterShift(),
    }
