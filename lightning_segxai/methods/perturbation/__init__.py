"""Methods that hide parts of the volume and watch the score, by Captum; forward passes only."""

from lightning_segxai.methods.perturbation.ablation import FeatureAblation, FeaturePermutation
from lightning_segxai.methods.perturbation.occlusion import Occlusion
from lightning_segxai.methods.perturbation.shapley import ShapleyValueSampling
from lightning_segxai.methods.perturbation.surrogates import KernelShap, Lime

__all__ = [
    "FeatureAblation",
    "FeaturePermutation",
    "KernelShap",
    "Lime",
    "Occlusion",
    "ShapleyValueSampling",
]
