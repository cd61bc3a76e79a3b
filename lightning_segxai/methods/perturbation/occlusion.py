"""A cube that goes over the volume and hides what lies under it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from captum.attr import Occlusion as CaptumOcclusion
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import PerPass, Veil, check_counts
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(frozen=True)
class Occlusion(AttributionMethod):
    r"""How far the score falls when a cube of the volume is replaced by the baseline.

    $$a(v) = \frac{1}{n_v} \sum_{B \ni v} \big( S(x) - S(x_{B \to b}) \big)$$

    over the ``n_v`` cubes that hold the voxel; all channels are hidden at once. With cubes of one
    voxel and a linear network it is the input minus the baseline, times the weights. Costs one
    forward pass for each cube and one for the volume; by Captum.

    Args:
        size_voxels: Edge of the cube.
        stride_voxels: Step from one cube to the next, at most the edge.
        baseline: What hides, as for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once; ``auto``: as
            many as windows go through the network at once.

    Raises:
        ValueError: for an edge or stride below one, a stride above the edge, an unknown baseline,
            a width that is not positive, or less than one perturbation per pass.

    References:
        Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2013,
        arXiv:1311.2901.
    """

    size_voxels: int = 8
    stride_voxels: int = 4
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.stride_voxels <= self.size_voxels:
            raise ValueError(
                f"`Occlusion(size_voxels={self.size_voxels}, stride_voxels={self.stride_voxels})` "
                "needs a stride of at least 1 and at most the size; else voxels are never hidden."
            )
        Baseline(self.baseline, self.sigma_mm)
        check_counts(self, perturbations_per_pass=self.perturbations_per_pass)

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``."""
        veil = Veil.of(model, x, self.baseline, self.sigma_mm)
        i, j, k = x.shape[1:]
        size, stride = self._geometry((i, j, k))
        with torch.no_grad():
            effect: Tensor = CaptumOcclusion(model).attribute(
                x[None],
                sliding_window_shapes=(len(x), *size),
                strides=(len(x), *stride),
                baselines=veil.behind[None],
                perturbations_per_eval=veil.per_pass(self.perturbations_per_pass),
                show_progress=False,
            )
        # a cube hides all channels, so each channel holds the same effect; Captum gives float32
        return effect[0, 0].to(x.dtype)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The cubes and the volume itself, each by all windows."""
        size, stride = self._geometry(shape)
        cubes = math.prod(
            1 + math.ceil((axis - edge) / step)
            for axis, edge, step in zip(shape, size, stride, strict=True)
        )
        return Passes((cubes + 1) * windows)

    def _geometry(self, shape: Shape) -> tuple[list[int], list[int]]:
        """Edges and strides, no larger than the volume."""
        size = [min(self.size_voxels, axis) for axis in shape]
        return size, [min(self.stride_voxels, edge) for edge in size]
