"""How alike two maps look: structure in small neighborhoods."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool3d

from lightning_segxai.focus.base import ShiftMetric
from lightning_segxai.focus.kept import made_once
from lightning_segxai.values import Attribution


@dataclass(frozen=True)
class StructuralSimilarity(ShiftMetric):
    """Mean structural similarity (SSIM) of the two maps in 3D, with their signs.

    ``mean_w (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2))`` with
    means ``m``, variances ``s^2`` and covariance ``s_ab`` over cubes ``w`` of ``window`` voxels
    (of as many as there are along a shorter axis), sample statistics, ``c1 = (0.01 L)^2`` and
    ``c2 = (0.03 L)^2``. Each map is divided by its largest magnitude first, so that scale does not
    count, and ``L`` is the range of values of both. The same map has 1.

    Args:
        window: Edge of the cubes in voxels, at least 2.
        stride: Voxels from one cube to the next; 1 takes every cube, as Wang does. With the
            default, more than half of the window, every voxel far from the border is in a cube.

    Raises:
        ValueError: for a window or stride that is none.

    References:
        Wang et al., "Image quality assessment: from error visibility to structural similarity",
        IEEE TIP 13, 2004; for attributions Adebayo et al., NeurIPS 2018, arXiv:1810.03292.
    """

    window: int = 7
    stride: int = 4

    unit = "1"
    range = (-1.0, 1.0)
    higher_is_better = None
    reading = "1: the map looks as it did then; 0: no structure in common."

    def __post_init__(self) -> None:
        if self.window < 2 or self.stride < 1:
            raise ValueError(
                f"`StructuralSimilarity(window={self.window}, stride={self.stride})` needs a "
                "window of at least 2 voxels and a stride of at least 1."
            )

    def measure(self, attribution: Attribution, reference: Attribution) -> float | None:
        size = [min(self.window, edge) for edge in attribution.values.shape]
        voxels = math.prod(size)
        if voxels < 2:
            return None
        _, center_now, most_now, least_now = _landmarks(attribution).tolist()
        _, center_then, most_then, least_then = _landmarks(reference).tolist()
        span = max(most_now, most_then) - min(least_now, least_then)
        if span == 0.0:
            return 1.0  # both are the same everywhere, and equal
        m_now, v_now = self._windows(attribution, size)
        m_then, v_then = self._windows(reference, size)
        both = _means(_centered(attribution) * _centered(reference), size, self.stride)
        shared = voxels / (voxels - 1) * (both - m_now * m_then)
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        m_now, m_then = m_now + center_now, m_then + center_then
        alike = (2 * m_now * m_then + c1) * (2 * shared + c2)
        most = (m_now**2 + m_then**2 + c1) * (v_now + v_then + c2)
        return min(1.0, max(-1.0, float((alike / most).mean())))

    def _windows(
        self, attribution: Attribution, size: list[int]
    ) -> Float[Tensor, "2 windows_i windows_j windows_k"]:
        """Mean and sample variance in each cube, of the centered map."""

        def find() -> Tensor:
            values, voxels = _centered(attribution), math.prod(size)
            mean = _means(values, size, self.stride)
            square = _means(values * values, size, self.stride)
            return torch.stack((mean, voxels / (voxels - 1) * (square - mean**2)))

        return made_once(attribution, ("windows", *size, self.stride), find)


def _means(
    values: Float[Tensor, "i j k"], size: list[int], stride: int
) -> Float[Tensor, "windows_i windows_j windows_k"]:
    return avg_pool3d(values[None], size, stride)[0]


def _landmarks(attribution: Attribution) -> Float[Tensor, "4"]:
    """The largest magnitude; mean, largest and least value of the map divided by it."""

    def find() -> Tensor:
        values = attribution.values.detach()
        most, least = values.max().double(), values.min().double()
        magnitude = torch.maximum(most, -least)
        found = torch.stack((values.mean(dtype=torch.float64), most, least)) / magnitude
        return torch.cat((magnitude[None], found))

    return made_once(attribution, "landmarks", find)


def _centered(attribution: Attribution) -> Float[Tensor, "i j k"]:
    """The map divided by its largest magnitude, less its mean, beside which variances get lost."""

    def find() -> Tensor:
        magnitude, center, _, _ = _landmarks(attribution)
        return (attribution.values.detach().double() / magnitude).sub_(center)

    return made_once(attribution, "centered", find)
