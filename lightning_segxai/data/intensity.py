"""Intensity scalings for ToF-MRA that leave the brightest voxels, the vessels, as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torchio as tio
from jaxtyping import Float
from torch import Tensor
from torchio.transforms.intensity_transform import IntensityTransform


class ForegroundNormalization(IntensityTransform):
    """Z-normalization by the mean and the deviation of the head, without the air around it.

    The head is what is brighter than a quarter of its own median. Air has a tenth of the tissue's
    signal, and the rule does not depend on how much air or how many vessels there are, while
    voxels above the mean, TorchIO's usual mask, are tissue in a whole head and vessels in a crop.
    A volume with negative values is taken whole. Nothing is clipped.

    Sums are in float64, so that the result does not depend on the number of threads.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.args_names: list[str] = []

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        for image in self.get_images(subject):
            values = image.data.float()
            head = _head(values) if values.min() >= 0 else values
            # not by the deviation, which rounding keeps above 0
            if not head.numel() or head.min() == head.max():
                raise ValueError("All voxels that are brighter than air have the same value.")
            numbers = head.double().flatten().numpy()
            mean, deviation = numbers.mean(), numbers.std()
            image.set_data((values - np.float32(mean).item()) / np.float32(deviation).item())
        return subject


class PercentileScaling(IntensityTransform):
    """Two percentiles become 0 and 1; what lies beyond them goes on, unless it is clipped.

    Args:
        lower: Percentile that becomes 0.
        upper: Percentile that becomes 1. Vessels are 0.15 to 0.8 % of a head: at 99.5 half of
            them would lie beyond.
        clip: Whether to cut what lies beyond, which flattens what an attribution should see.
        **kwargs: TorchIO's, of every transform.

    Raises:
        ValueError: unless ``0 <= lower < upper <= 100``.
    """

    def __init__(
        self, lower: float = 0.5, upper: float = 99.95, clip: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= lower < upper <= 100:
            raise ValueError(
                f"`PercentileScaling(lower={lower}, upper={upper})` needs 0 <= lower < upper <= "
                "100."
            )
        self.lower, self.upper, self.clip = lower, upper, clip
        self.args_names = ["lower", "upper", "clip"]

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        for image in self.get_images(subject):
            values = image.data.float()
            low, high = (_quantile(values, percent) for percent in (self.lower, self.upper))
            if not high > low:
                raise ValueError(
                    f"The percentiles {self.lower} and {self.upper} are both {low:g}. Is the "
                    "volume mostly empty? Use `ForegroundNormalization`, or other percentiles."
                )
            scaled = (values - low) / (high - low)
            image.set_data(scaled.clamp(0, 1) if self.clip else scaled)
        return subject


def _head(values: Float[Tensor, "1 i j k"]) -> Float[Tensor, " n"]:
    """The voxels brighter than a quarter of their own median, looked for from above.

    A brighter level has a brighter median, so that the levels go one way and come to an end, and
    air is never among what they are made of.
    """
    level = _quantile(values, 99) / 4
    while True:
        head = values[values > level]
        found = _quantile(head, 50) / 4 if head.numel() else level
        if found == level:
            return head
        level = found


def _quantile(values: Float[Tensor, "..."], percent: float) -> float:
    """The voxel value at a percentile, the lower one where it lies between two."""
    numbers = values.flatten()
    place = int(percent / 100 * (len(numbers) - 1))
    return float(torch.from_numpy(np.partition(numbers.numpy(), place))[place])
