"""Watch where a 3D vessel segmentation network looks while it trains.

Names are imported from their modules when they are first used, so that importing the package costs
next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOMES = {
    "alerts": ["Alert"],
    "assess": ["assess"],
    "callback": ["AttributionMonitor"],
    "consistency": ["DeformationConsistency"],
    "data.choice": ["Landmark", "ProbeChoice"],
    "data.deformation": ["RandomSplineDeformation"],
    "data.intensity": ["ForegroundNormalization", "PercentileScaling"],
    "data.module": ["MRADataModule"],
    "data.phantom": ["Phantom", "paint_tof", "tof_phantom"],
    "data.planted": ["Planted", "planted_spots", "planted_tubes"],
    "data.probes": ["ProbeFile", "read_probe"],
    "data.sampling": [
        "BalancedSampling",
        "CaliberSampling",
        "Sampling",
        "UniformSampling",
        "WeightedSampling",
    ],
    "data.sources": ["SubjectFiles"],
    "data.subjects": ["PhantomCohort"],
    "deformations": ["SplineDeformation"],
    "examine": ["examine", "measure"],
    "faithfulness.base": ["FaithfulnessMetric"],
    "faithfulness.correlation": ["FaithfulnessCorrelation"],
    "faithfulness.deletion": ["Deletion", "Insertion"],
    "faithfulness.infidelity": ["Infidelity"],
    "faithfulness.random_map": ["RandomBaseline"],
    "faithfulness.randomization": ["EfficientRandomization", "Randomization"],
    "faithfulness.stability": ["SensitivityMax"],
    "focus.anatomy": ["MassAtCaliber", "MassAtDistance", "MiddleShare", "ReachQuantile"],
    "focus.balance": ["SignBalance", "TotalMass"],
    "focus.base": ["FocusMetric", "ShiftMetric"],
    "focus.location": ["AveragePrecision", "MassInside", "PointingHit", "RankInside", "Reach"],
    "focus.shift": ["CenterShift", "RankCorrelation", "TopOverlap"],
    "focus.similarity": ["StructuralSimilarity"],
    "focus.spread": ["EffectiveVolume", "Entropy", "Gini"],
    "focus.transport": ["EarthMovers"],
    "losses": ["DeepSupervision", "FocalTverskyLoss"],
    "methods.base": ["AttributionMethod", "Complete", "JointMethod", "LookMethod"],
    "methods.cams": ["GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM"],
    "methods.deeplift": ["DeepLift", "DeepLiftShap", "LayerDeepLift"],
    "methods.gradients": ["InputXGradient", "Saliency"],
    "methods.guided": ["Deconvolution", "GuidedBackprop", "GuidedGradCAM"],
    "methods.layer_guided": ["LayerGuidedBackprop"],
    "methods.layer_integral": ["LayerIntegratedGradients"],
    "methods.layer_paths": ["InternalInfluence", "LayerConductance", "LayerGradientShap"],
    "methods.layers": ["LayerActivation", "LayerGradientXActivation"],
    "methods.noise": ["SmoothGrad", "SquareGrad", "VarGrad"],
    "methods.paths": ["ExpectedGradients", "IntegratedGradients"],
    "methods.perturbation": [
        "FeatureAblation",
        "FeaturePermutation",
        "KernelShap",
        "Lime",
        "Occlusion",
        "ShapleyValueSampling",
    ],
    "methods.relevance": ["LRP", "ContrastiveExcitationBackprop", "ExcitationBackprop"],
    "methods.rise": ["RISE"],
    "methods.scorecam": ["ScoreCAM"],
    "nets": ["UNet3d"],
    "scored": ["ScoredModel"],
    "sinks.base": ["Observation", "Run", "Sink"],
    "sinks.files": ["FileSink"],
    "sinks.wandb": ["WandbSink"],
    "structures": ["BorderEvidence", "ComponentEvidence", "GraphEvidence"],
    "targets": ["ClassEvidence", "ClassMargin", "Target", "VoxelEvidence"],
    "task": ["SegmentationTask"],
    "values": ["Attribution", "Probe", "Record"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Package(ModuleType):
    """Keeps `examine` the function: Python binds a submodule of that name here when it loads it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
