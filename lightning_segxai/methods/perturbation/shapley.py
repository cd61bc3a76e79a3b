"""Shapley values of supervoxels, by switching them on in random orders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from captum.attr import ShapleyValueSampling as CaptumShapleyValueSampling
from torch import Tensor

from lightning_segxai.baselines import Blank
from lightning_segxai.methods.base import Complete
from lightning_segxai.methods.hiding import PerPass
from lightning_segxai.methods.perturbation.switches import HidingMethod
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Shape, Volume


@dataclass(frozen=True)
class ShapleyValueSampling(HidingMethod):
    r"""What a supervoxel adds to the score, averaged over random orders of showing them.

    $$a(v) = \frac{1}{|P|}\, \mathbb E_\sigma \big( S(x_{\sigma, \le P}) - S(x_{\sigma, < P})
    \big), \quad v \in P$$

    where all but the supervoxels up to ``P`` in the order ``σ`` are the baseline. Complete: every
    order's sum is ``S(x) - S(b)``, so that few samples cost accuracy and never the axiom. For a
    linear network one order is exact, and it is `FeatureAblation`. Shared out evenly over the
    voxels of a supervoxel. Costs ``samples`` forward passes for each supervoxel, of which there are
    at most as many as asked for, and two for the baseline; by Captum.

    Args:
        supervoxels: Number of supervoxels that is asked for.
        compactness: Difference of intensity that counts as much as distance, as for
            `FeatureAblation`.
        samples: Number of orders.
        baseline: What hides, as for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once, or ``auto``.

    Raises:
        ValueError: for less than one supervoxel, order or perturbation per pass, a compactness or
            width that is not positive, an unknown baseline.

    References:
        Castro et al., "Polynomial calculation of the Shapley value based on sampling", Computers &
        Operations Research 36, 2009; Štrumbelj and Kononenko, "An efficient explanation of
        individual classifications using game theory", JMLR 11, 2010.
    """

    supervoxels: int = 64
    compactness: float = 0.1
    samples: int = 8
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        self.check(samples=self.samples)

    def attribute(self, model: ScoredModel, x: Volume) -> Complete:
        """The map of ``x``."""
        switches = self.switches(model, x)
        effects: Tensor = CaptumShapleyValueSampling(switches).attribute(
            switches.all_on,
            n_samples=self.samples,
            perturbations_per_eval=switches.veil.per_pass(self.perturbations_per_pass),
            show_progress=False,
        )
        start = switches(torch.zeros_like(switches.all_on))
        return Complete(switches.map(effects), float(start))

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The supervoxels of each order, and the baseline; less where SLIC finds fewer."""
        return Passes((self.samples * self.most(shape) + 2) * windows)
