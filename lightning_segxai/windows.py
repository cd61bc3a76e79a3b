"""Placing and blending of sliding windows: how a patch-based network sees a larger volume.

The blended prediction is a weighted mean of the windows' logits, ``L(v) = sum_w n_w(v) l_w(v)``
with ``sum_w n_w(v) = 1``. It is linear in them, so a score of the whole volume splits into a sum
over windows, and its gradient can be gathered window by window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.values import Shape

Place = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Windows:
    """Overlapping windows that cover a volume, and the share of each in the blended prediction.

    Placement and weights are those of MONAI's ``sliding_window_inference(mode="gaussian")``: a step
    of ``window * (1 - overlap)``, the last window of an axis moved inside, a Gaussian of an eighth
    of the window as standard deviation. Where an axis is shorter than the window, its one place is
    as short as the volume, and who looks through it pads it to the window.

    Args:
        shape: Voxels of the volume.
        window: Voxels of a window.
        overlap: Share of a window that the next one covers again, in [0, 1).

    Raises:
        ValueError: for an overlap outside [0, 1).
    """

    shape: Shape
    window: Shape
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"`overlap` must be at least 0 and below 1, but got {self.overlap}.")

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where each window lies in the volume.

        >>> [p[0] for p in Windows((10, 4, 4), (4, 4, 4), 0.5).places]
        [slice(0, 4, None), slice(2, 6, None), slice(4, 8, None), slice(6, 10, None)]
        """
        axes = []
        for size, edge in zip(self.shape, self.window, strict=True):
            step = max(1, int(edge * (1 - self.overlap)))
            count = max(1, math.ceil((size - edge) / step) + 1)
            starts = dict.fromkeys(max(0, min(n * step, size - edge)) for n in range(count))
            axes.append([slice(start, min(start + edge, size)) for start in starts])
        return tuple((i, j, k) for i, j, k in product(*axes))

    def share(self, place: Place, dtype: torch.dtype = torch.float32) -> Float[Tensor, "i j k"]:
        """Weight of the window at ``place`` at each of its voxels; over windows it sums to one."""
        if len(self.places) == 1:
            return torch.ones(self.shape, dtype=dtype)
        i, j, k = (s.stop - s.start for s in place)
        return (self._bump[:i, :j, :k] / self._total[place]).to(dtype)

    @cached_property
    def _bump(self) -> Float[Tensor, "i j k"]:
        i, j, k = (
            torch.exp(-0.5 * ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 8)) ** 2)
            for n in self.window
        )
        bump = i[:, None, None] * j[None, :, None] * k[None, None, :]
        return bump.clamp_min(1e-3)  # a voxel seen only by a window's corner still counts

    @cached_property
    def _total(self) -> Float[Tensor, "i j k"]:
        total = torch.zeros(self.shape, dtype=torch.float64)
        for place in self.places:
            total[place] += self._bump[tuple(slice(0, s.stop - s.start) for s in place)]
        return total
