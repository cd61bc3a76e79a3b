"""How alike two maps look: structure in small neighborhoods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool3d

from lightning_segxai.focus.base import ShiftMetric
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
        now, then = _scaled(attribution), _scaled(reference)
        size = [min(self.window, edge) for edge in now.shape]
        voxels = math.prod(size)
        if voxels < 2:
            return None
        span = float(torch.maximum(now.max(), then.max()) - torch.minimum(now.min(), then.min()))
        if span == 0.0:
            return 1.0  # both are the same everywhere, and equal
        # around their centers, beside which small variances would be lost
        center_now, center_then = now.mean(), then.mean()
        now, then = now - center_now, then - center_then
        means = partial(_means, size=size, stride=self.stride)
        m_now, m_then = means(now), means(then)
        sample = voxels / (voxels - 1)
        v_now = sample * (means(now * now) - m_now**2)
        v_then = sample * (means(then * then) - m_then**2)
        shared = sample * (means(now * then) - m_now * m_then)
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        m_now, m_then = m_now + center_now, m_then + center_then
        alike = (2 * m_now * m_then + c1) * (2 * shared + c2)
        most = (m_now**2 + m_then**2 + c1) * (v_now + v_then + c2)
        return min(1.0, max(-1.0, float((alike / most).mean())))


def _means(
    values: Float[Tensor, "i j k"], size: list[int], stride: int
) -> Float[Tensor, "windows_i windows_j windows_k"]:
    return avg_pool3d(values[None], size, stride)[0]


def _scaled(attribution: Attribution) -> Float[Tensor, "i j k"]:
    values = attribution.values.detach().double()
    return values / values.abs().max()
