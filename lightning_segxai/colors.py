"""The fixed color scales of all pictures, and the colors of a prediction's errors.

A map is drawn by its density: the magnitude of a voxel over the mean magnitude of the volume, on a
logarithmic scale from 1x to 1,000x. Nothing is fitted to the single picture, so pictures of other
epochs, runs and methods can be compared by eye.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Color = tuple[int, int, int]
"""Red, green, blue; 0 to 255."""

DECADES: Final = 3
"""The scale ends at ten to this power times the mean magnitude."""

# Okabe and Ito's colors: sky blue, vermilion and yellow differ in lightness and in blueness, so
# they stay apart under all three color vision deficiencies, and in gray.
OUTCOMES: Final[Mapping[str, Color]] = {
    "true positive": (86, 180, 233),
    "false positive": (213, 94, 0),
    "false negative": (240, 228, 66),
    "predicted, no label": (86, 180, 233),
}
"""What a prediction came to, and its color."""

_UNSIGNED: Final = np.array(  # matplotlib's inferno at every eighth
    [
        (0, 0, 4),
        (31, 12, 72),
        (87, 16, 110),
        (138, 34, 106),
        (188, 55, 84),
        (227, 89, 51),
        (249, 142, 9),
        (249, 203, 53),
        (252, 255, 164),
    ],
    dtype=np.float64,
)
# The two arms have equal lightness at equal density (linear in OKLab); inferno's purple would be
# taken for the blue arm by the color-blind, so the warm arm goes through brown.
_POSITIVE: Final = np.array(
    [
        (0, 0, 4),
        (52, 14, 0),
        (87, 38, 1),
        (122, 66, 2),
        (157, 96, 5),
        (191, 130, 4),
        (222, 166, 11),
        (251, 205, 22),
        (255, 229, 110),
    ],
    dtype=np.float64,
)
_NEGATIVE: Final = np.array(
    [
        (0, 0, 4),
        (0, 27, 61),
        (1, 56, 95),
        (4, 88, 129),
        (3, 122, 164),
        (6, 159, 197),
        (6, 197, 229),
        (75, 234, 255),
        (160, 242, 255),
    ],
    dtype=np.float64,
)
_STOPS: Final = np.linspace(0.0, 1.0, len(_UNSIGNED))


def mean_magnitude(values: Float[Tensor, "*axes"]) -> float | None:
    """The density that is 1x, or None where a map has none: not finite, empty, or zero everywhere.

    >>> mean_magnitude(torch.tensor([1.0, -3.0]))
    2.0
    """
    mean = float(values.detach().abs().mean(dtype=torch.float64))
    return mean if math.isfinite(mean) and mean > 0 else None


def positions(values: Float[np.ndarray, "*axes"], mean: float) -> Float[np.ndarray, "*axes"]:
    """Where values lie on the scale: 0 up to 1x, 1 from 1,000x on, with the sign of the value.

    >>> positions(np.array([0.2, 2.0, -20.0, 2000.0, 1e9]), mean=2.0).round(3).tolist()
    [0.0, 0.0, -0.333, 1.0, 1.0]
    """
    density = np.abs(values.astype(np.float64)) / mean
    return np.sign(values) * np.log10(np.clip(density, 1.0, 10.0**DECADES)) / DECADES


def paint(
    position: Float[np.ndarray, "*axes"], *, signed: bool = False
) -> UInt8[np.ndarray, "*axes 3"]:
    """Colors of positions on the scale.

    Signed maps are warm where positive and blue where negative; in unsigned ones the sign says
    nothing. At zero both scales are the same near-black.
    """
    height = np.clip(np.abs(position), 0.0, 1.0)
    color = _interpolated(height, _POSITIVE if signed else _UNSIGNED)
    if signed:
        below = position < 0
        color[below] = _interpolated(height[below], _NEGATIVE)
    return color


def _interpolated(
    height: Float[np.ndarray, "*axes"], table: Float[np.ndarray, "stops 3"]
) -> UInt8[np.ndarray, "*axes 3"]:
    color = np.empty((*height.shape, 3), dtype=np.uint8)
    for c in range(3):
        color[..., c] = np.rint(np.interp(height, _STOPS, table[:, c]))
    return color
