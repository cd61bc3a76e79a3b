"""Linear models of the score, fitted to random settings of the supervoxels' switches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import Lime as CaptumLime
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.baselines import Blank
from lightning_segxai.methods.base import Complete
from lightning_segxai.methods.hiding import PerPass
from lightning_segxai.methods.perturbation.switches import HidingMethod, Switches
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(frozen=True)
class KernelShap(HidingMethod):
    r"""Shapley values of supervoxels, as the weights of a linear model of the score.

    $$a(v) = \frac{w_P}{|P|}, \quad w = \arg\min_w \sum_z \pi(z) \big( S(x_z) - S(b) - w^\top z
    \big)^2$$

    over settings ``z`` of the switches, whose number of supervoxels is drawn by Shapley's kernel
    ``π``; the first two show all and nothing, with a weight of a million. Complete up to that
    weight. For a linear network it is exact, and `FeatureAblation`. With all settings it would be
    what `ShapleyValueSampling` is with all orders. Shared out evenly over the voxels of a
    supervoxel. Costs ``samples`` forward passes and one for the baseline; by Captum and
    scikit-learn.

    Args:
        supervoxels: Number of supervoxels that is asked for.
        compactness: Difference of intensity that counts as much as distance, as for
            `FeatureAblation`.
        samples: Number of settings: more than supervoxels, better several times as many.
        baseline: What hides, as for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once, or ``auto``.

    Raises:
        ValueError: for less than one supervoxel or perturbation per pass, samples that do not
            determine the model, a compactness or width that is not positive, an unknown baseline.

    References:
        Lundberg and Lee, "A unified approach to interpreting model predictions", 2017,
        arXiv:1705.07874.
    """

    supervoxels: int = 64
    compactness: float = 0.1
    samples: int = 256
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        self.check(samples=self.samples)
        if self.samples <= self.supervoxels:
            raise ValueError(
                f"`KernelShap(supervoxels={self.supervoxels}, samples={self.samples})` needs more "
                "samples than supervoxels, or the weights of its linear model are not determined."
            )

    def attribute(self, model: ScoredModel, x: Volume) -> Complete:
        """The map of ``x``."""
        switches = self.switches(model, x)
        gain = _Gain(switches)
        if switches.all_on.shape[1] == 1:  # Captum's kernel divides by zero
            return Complete(switches.map(gain(switches.all_on)[None]), gain.start)
        shap = CaptumKernelShap(gain)
        shap.interpretable_model = _LeastSquares()
        effects: Tensor = shap.attribute(
            switches.all_on,
            n_samples=self.samples,
            perturbations_per_eval=switches.veil.per_pass(self.perturbations_per_pass),
            show_progress=False,
        )
        return Complete(switches.map(effects), gain.start)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The settings, and the baseline; two where there is but one supervoxel."""
        return Passes((self.samples + 1 if self.most(shape) > 1 else 2) * windows)


@dataclass(frozen=True)
class Lime(HidingMethod):
    r"""The weights of a sparse linear model of the score, near the volume.

    $$a(v) = \frac{w_P}{|P|}, \quad w = \arg\min_w \frac{1}{2 \sum_z \pi(z)} \sum_z \pi(z)
    \big( S(x_z) - S(b) - w_0 - w^\top z \big)^2 + \alpha \lVert w \rVert_1$$

    over settings ``z`` that show each supervoxel with a probability of a half, with weights ``π(z)
    = exp(-d² / 2 σ²)`` by the cosine distance ``d`` of ``z`` from all shown. Each weight is drawn
    towards zero by about four times the penalty. With ``penalty=0`` and a linear network it is
    exact, and `FeatureAblation`. It is not complete. Shared out evenly over the voxels of a
    supervoxel. Costs ``samples`` forward passes and one for the baseline; by Captum and
    scikit-learn.

    Args:
        supervoxels: Number of supervoxels that is asked for.
        compactness: Difference of intensity that counts as much as distance, as for
            `FeatureAblation`.
        samples: Number of settings, better several times as many as supervoxels.
        penalty: The ``α`` of the Lasso, in logits of the mean over the target's region.
        kernel_width: The ``σ`` of the weights, in cosine distance: 0 to 1.
        baseline: What hides, as for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once, or ``auto``.

    Raises:
        ValueError: for less than one supervoxel or perturbation per pass, less than two samples, a
            negative penalty, a kernel, compactness or blur whose width is not positive, an unknown
            baseline.

    References:
        Ribeiro et al., "Why should I trust you?", 2016, arXiv:1602.04938; the width and the even
        chance are those of its authors' code for images.
    """

    supervoxels: int = 64
    compactness: float = 0.1
    samples: int = 256
    penalty: float = 0.001
    kernel_width: float = 0.25
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        self.check(samples=self.samples)
        if self.samples < 2:
            raise ValueError(f"`Lime(samples={self.samples})` must be at least 2.")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"`Lime(penalty={self.penalty})` must not be negative.")
        if not self.kernel_width > 0:
            raise ValueError(f"`Lime(kernel_width={self.kernel_width})` must be positive.")

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``."""
        switches = self.switches(model, x)
        lime = CaptumLime(
            _Gain(switches, model.voxels),
            interpretable_model=_Lasso(alpha=self.penalty) if self.penalty else _LeastSquares(),
            similarity_func=self._nearness,
        )
        effects: Tensor = lime.attribute(
            switches.all_on,
            n_samples=self.samples,
            perturbations_per_eval=switches.veil.per_pass(self.perturbations_per_pass),
            show_progress=False,
        )
        return switches.map(effects * model.voxels)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The settings, and the baseline."""
        return Passes((self.samples + 1) * windows)

    def _nearness(self, all_on: Tensor, on: Tensor, _: Tensor, **__: Any) -> float:
        """The weight of a setting."""
        distance = 1 - math.sqrt(float(on.mean()))  # a cosine, since the other is all ones
        return math.exp(-(distance**2) / (2 * self.kernel_width**2))


class _Gain:
    """How much more the score is than the baseline's: Captum goes on in float32."""

    def __init__(self, switches: Switches, divisor: int = 1) -> None:
        self.switches, self.divisor = switches, divisor
        self.start = float(switches(torch.zeros_like(switches.all_on)))

    def __call__(self, on: Float[Tensor, "b regions"]) -> Float[Tensor, " b"]:
        """The gain of each setting of the switches."""
        return (self.switches(on) - self.start) / self.divisor


class _InDouble:
    """Fits in float64 what Captum hands over in float32: weights of a million ask for it."""

    def fit(self, train_data: Iterable[list[Tensor]], **settings: Any) -> Any:
        """Fit settings, scores and weights."""
        return super().fit([[t.double() for t in batch] for batch in train_data], **settings)  # type: ignore[misc]  # Captum is untyped


class _LeastSquares(_InDouble, SkLearnLinearRegression):
    """Without a penalty."""


class _Lasso(_InDouble, SkLearnLasso):
    """With one on the sum of the absolute weights."""
