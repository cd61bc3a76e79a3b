"""What the bare monitor asks: one target, three methods, every metric."""

from __future__ import annotations

from lightning_segxai.focus.anatomy import (
    MassAtCaliber,
    MassAtDistance,
    MiddleShare,
    ReachQuantile,
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
from lightning_segxai.focus.shift import CenterShift, RankCorrelation, TopOverlap
from lightning_segxai.focus.similarity import StructuralSimilarity
from lightning_segxai.focus.spread import EffectiveVolume, Entropy, Gini
from lightning_segxai.focus.transport import EarthMovers
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
        "reach_50": ReachQuantile(0.5),
        "reach_90": ReachQuantile(0.9),
        "mass_0_1_mm": MassAtDistance(above=0.0, below=1.0),
        "mass_1_3_mm": MassAtDistance(above=1.0, below=3.0),
        "mass_3_10_mm": MassAtDistance(above=3.0, below=10.0),
        "mass_beyond_10_mm": MassAtDistance(above=10.0, below=None),
        "thin_share": MassAtCaliber(below=0.75),
        "medium_share": MassAtCaliber(above=0.75, below=1.5),
        "thick_share": MassAtCaliber(above=1.5, below=None),
        "middle_share": MiddleShare(),
        "total_mass": TotalMass(),
        "sign_balance": SignBalance(),
    }


def default_shifts() -> dict[str, ShiftMetric]:
    """All shift metrics."""
    return {
        "rank_correlation": RankCorrelation(),
        "top_overlap": TopOverlap(),
        "center_shift": CenterShift(),
        "structural_similarity": StructuralSimilarity(),
        "earth_movers": EarthMovers(),
    }
