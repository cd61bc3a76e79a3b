"""Random smooth deformations without folds: drawn once, they move images, labels and predictions.

A deformation T is kept as a field of displacements in voxels, ``(T x)(p) = x(p + field(p))``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lightning_segxai.values import Shape

_FIRST_STEP = 1 / 16  # voxels, of scaling and squaring


@dataclass(frozen=True)
class SplineDeformation:
    r"""Diffeomorphic deformations of DS6: the flow of a random cubic B-spline.

    $$v(p) = \sum_c \beta^3(p / h - c) \, w_c, \qquad w_c \sim \mathcal U(-D, D)^3, \qquad
    T = \exp(v)$$

    The control points are ``h`` apart, the first and the last of each axis in the middle of the
    first and the last voxel. A spline reaches over two control points to either side, so with
    two locked layers the border of the volume does not move at all, and with 5 control points only
    the one in the middle of the volume moves. The number of control points, the same for each
    axis, and D are drawn for each deformation. No voxel moves farther than D, and most much less:
    the peak of a spline in three dimensions is 0.3, so DS6's deformations of patches of 64^3 stay
    below one voxel, mostly below a quarter of one. DS6's published code takes 5, 6 and 7 as the
    voxels between control points; in a patch of 64^3 that is ``control_points=(14, 12, 10)`` here.

    Args:
        control_points: Numbers of control points along an axis to draw from.
        displacement: Largest displacements D of a control point to draw from, in units of half
            the edge of the volume, from its first to its last voxel.
        locked_borders: Outermost layers of control points that do not move.

    Raises:
        ValueError: without numbers to draw from, for negative ones, or where all control points
            are locked.

    References:
        Chatterjee et al., "DS6, Deformation-Aware Semi-Supervised Learning: Application to Small
        Vessel Segmentation with Noisy Training Data", J. Imaging 8(10):259, 2022.
        Sandkuehler et al., "AirLab: Autograd Image Registration Laboratory", 2018,
        arXiv:1806.09907.
    """

    control_points: tuple[int, ...] = (5, 6, 7)
    displacement: tuple[float, ...] = (0.01, 0.015, 0.02, 0.025, 0.03)
    locked_borders: int = 2

    def __post_init__(self) -> None:
        if self.locked_borders < 0:
            raise ValueError(
                f"`SplineDeformation(locked_borders={self.locked_borders})` must be at least 0."
            )
        least = max(2, 2 * self.locked_borders + 1)
        if not self.control_points or min(self.control_points) < least:
            raise ValueError(
                f"`SplineDeformation(control_points={self.control_points})` needs at least {least} "
                f"of them along each axis with locked_borders={self.locked_borders}; fewer would "
                "not move. Take more, or lock fewer borders."
            )
        if not self.displacement or not all(0 <= d < math.inf for d in self.displacement):
            raise ValueError(
                f"`SplineDeformation(displacement={self.displacement})` needs numbers of at least "
                "0, in units of half the edge of the volume."
            )

    def draw(self, shape: Shape, generator: torch.Generator) -> Float[Tensor, "3 i j k"]:
        """The displacements of a deformation, in voxels.

        Args:
            shape: Voxels of the volumes to be deformed.
            generator: The only source of random numbers; the field is on its device.
        """
        return flow(self.velocity(shape, generator))

    def velocity(self, shape: Shape, generator: torch.Generator) -> Float[Tensor, "3 i j k"]:
        """What `draw` takes the flow of; its negative flows back."""
        device = generator.device

        def choice(count: int) -> int:
            return int(torch.randint(count, (), generator=generator, device=device))

        points = self.control_points[choice(len(self.control_points))]
        share = self.displacement[choice(len(self.displacement))]
        free = points - 2 * self.locked_borders
        values = 2 * torch.rand(3, free, free, free, generator=generator, device=device) - 1
        halves = torch.tensor([(size - 1) / 2 for size in shape], device=device)
        return spline(share * halves[:, None, None, None] * values, shape, self.locked_borders)


def spline(
    values: Float[Tensor, "n a b c"], shape: Shape, locked: int = 0
) -> Float[Tensor, "n i j k"]:
    """Uniform cubic B-splines with the given values of the control points, at every voxel.

    Args:
        values: Of the control points that are not locked. The spline does not pass through them.
        shape: Voxels; the outermost control points lie in the middle of the outermost voxels.
        locked: Layers of control points around ``values`` that are 0, as are all beyond.
    """
    with torch.autocast(values.device.type, enabled=False):  # products of matrices, at half else
        for size in shape:  # each turn uses up the first axis and appends its voxels as the last
            count = values.shape[1]
            last = count + 2 * locked - 1
            voxels = torch.linspace(0, last, size, dtype=values.dtype, device=values.device)
            x = (voxels[:, None] - locked - torch.arange(count, device=values.device)).abs()
            near, far = 2 / 3 - x**2 + x**3 / 2, (2 - x).clamp_min(0) ** 3 / 6
            values = torch.tensordot(values, torch.where(x < 1, near, far), dims=([1], [1]))
    return values


def flow(velocity: Float[Tensor, "3 i j k"]) -> Float[Tensor, "3 i j k"]:
    r"""Displacements, in voxels, of what moves with a velocity for one unit of time.

    Scaling and squaring: $\exp(v) = \exp(v / 2^n)^{2^n}$, from steps of at most 1/16 voxel. The
    result is as smooth and as free of folds as the velocity is smooth; ``flow(-velocity)`` is its
    inverse up to interpolation.

    References:
        Arsigny et al., "A log-Euclidean framework for statistics on diffeomorphisms", MICCAI 2006.
    """
    fastest = float(velocity.abs().max())
    squarings = max(0, math.ceil(math.log2(fastest / _FIRST_STEP))) if fastest else 0
    field = velocity / 2**squarings
    for _ in range(squarings):
        field = field + warp(field[None], field)[0]
    return field


def warp(
    volumes: Num[Tensor, "b c i j k"],
    field: Float[Tensor, "3 _ _ _"],
    mode: Literal["linear", "nearest"] = "linear",
) -> Num[Tensor, "b c i j k"]:
    """Volumes deformed by one field, ``x(p + field(p))``; beyond the border, the border goes on.

    Gradients flow to the volumes. It gathers voxels rather than use torch's ``grid_sample``,
    whose gradient on a GPU is not repeatable, and which knows no integers.

    Args:
        volumes: Images, labels or probabilities.
        field: Displacements in voxels, on the device of the volumes.
        mode: ``linear`` between the eight voxels around, in float32 or better; ``nearest`` takes
            one voxel, for labels.

    Raises:
        ValueError: for a field of another shape, and for integers in linear mode.
    """
    shape = volumes.shape[2:]
    if field.shape != (3, *shape):
        raise ValueError(
            f"`warp` got volumes of {tuple(shape)} voxels, hence needs a field of shape "
            f"{(3, *shape)}, but got {tuple(field.shape)}."
        )
    if mode == "linear" and not volumes.is_floating_point():
        raise ValueError(
            f'`warp(mode="linear")` needs floating point, but got {volumes.dtype}. '
            'Labels are warped with mode "nearest".'
        )
    dtype = torch.promote_types(volumes.dtype, torch.float32)
    dtype = dtype if mode == "linear" else field.dtype
    places = []
    for axis, size in enumerate(shape):
        along = torch.arange(size, dtype=dtype, device=field.device)
        along = along.view([-1 if axis == other else 1 for other in range(3)])
        places.append((along + field[axis].to(dtype)).clamp(0, size - 1))
    if mode == "nearest":
        return _gathered(volumes, _numbers([place.round() for place in places], shape))
    lows = [p.floor().clamp_max(max(0, n - 2)) for p, n in zip(places, shape, strict=True)]
    base = _numbers(lows, shape)
    steps = (shape[1] * shape[2], shape[2], 1)
    offsets = [(0, step if size > 1 else 0) for step, size in zip(steps, shape, strict=True)]
    corners = [_gathered(volumes, base + sum(offset)).to(dtype) for offset in product(*offsets)]
    for place, low in zip(places, lows, strict=True):  # halves the corners, one axis at a time
        half, weight = len(corners) // 2, place - low
        corners = [
            torch.lerp(a, b, weight) for a, b in zip(corners[:half], corners[half:], strict=True)
        ]
    return corners[0].to(volumes.dtype)


def _numbers(places: list[Tensor], shape: torch.Size) -> Int[Tensor, "i j k"]:
    """Of whole coordinates, how many voxels lie before each in memory."""
    i, j, k = (place.long() for place in places)
    return (i * shape[1] + j) * shape[2] + k


def _gathered(
    volumes: Num[Tensor, "b c i j k"], numbers: Int[Tensor, "i j k"]
) -> Num[Tensor, "b c i j k"]:
    flat = volumes.flatten(2)
    return flat.gather(2, numbers.flatten().expand(*flat.shape[:2], -1)).view(volumes.shape)
