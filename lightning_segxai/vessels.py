"""The geometry of a region in millimeters, for targets, sampling and metrics.

Regions stay the same from epoch to epoch, so what is slow to make of one is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import binary_dilation, convolve, distance_transform_edt, label
from skimage.morphology import skeletonize
from torch import Tensor

from lightning_segxai.values import Mask, Shape

# Enough for the regions of a few whole heads; bounded in bytes because probes differ that much.
_KEPT_BYTES = 512 * 2**20
_kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

_TOUCHING = np.ones((3, 3, 3), dtype=np.uint8)  # a voxel and its 26 neighbors


def distance_mm(
    mask: Bool[Tensor, "i j k"], spacing_mm: tuple[float, float, float]
) -> Float[Tensor, "i j k"]:
    """Distance of each voxel's center to the center of the nearest voxel of the mask, in mm.

    ``d(v) = min_{m in mask} |spacing * (v - m)|``, 0 inside. Exact to single precision; the
    latest results are kept, found by what the mask and the spacing are, not by who holds them.

    >>> distance_mm(torch.tensor([[[True, False, False]]]), (1.0, 1.0, 0.5)).tolist()
    [[[0.0, 0.5, 1.0]]]

    Args:
        mask: The region.
        spacing_mm: Edge lengths of a voxel along i, j, k.

    Raises:
        ValueError: for a mask without a voxel, from which nothing has a distance.

    References:
        Maurer et al., "A linear time algorithm for computing exact Euclidean distance transforms
        of binary images in arbitrary dimensions", IEEE TPAMI 25, 2003.
    """
    (distance,) = _made_once(
        "distance", mask, spacing_mm, partial(_distance, spacing_mm=spacing_mm)
    )
    return distance


def wall_distance_mm(mask: Mask, spacing_mm: tuple[float, float, float]) -> Float[Tensor, "i j k"]:
    """Distance of each voxel's center from the wall of a region, in mm: negative inside.

    Outside it is `distance_mm`, to the nearest voxel inside; inside it is minus the distance to
    the nearest voxel outside. So it is never 0, and the wall lies between the two voxels. The
    latest results are kept, as for `distance_mm`.

    >>> line = torch.tensor([[[True, True, False, False]]])
    >>> wall_distance_mm(line, (1.0, 1.0, 0.5)).tolist()
    [[[-1.0, -0.5, 0.5, 1.0]]]

    Args:
        mask: The region.
        spacing_mm: Edge lengths of a voxel along i, j, k.

    Raises:
        ValueError: for a mask without a voxel, or without a voxel outside of it: it has no wall.
    """
    (distance,) = _made_once(
        "wall", mask, spacing_mm, partial(_wall_distance, spacing_mm=spacing_mm)
    )
    return distance


@dataclass(frozen=True, eq=False)
class Centerline:
    """The centerline of a region, voxel by voxel, cut into segments at its bifurcations.

    Args:
        shape: Voxels of the volume along i, j, k.
        ijk: Indices of the centerline's voxels, in index order.
        neighbors: How many of the 26 voxels around each are on the centerline too.
        segment: Number of the segment each lies on, from 1; 0 for a voxel of a bifurcation.
        radius_mm: Mean over the voxel's segment of the distance to the nearest voxel outside the
            region; at a bifurcation, that of the voxel alone. Infinite where nothing is outside.
    """

    shape: Shape
    ijk: Int[Tensor, "n 3"]
    neighbors: Int[Tensor, " n"]
    segment: Int[Tensor, " n"]
    radius_mm: Float[Tensor, " n"]

    @property
    def endpoints(self) -> Bool[Tensor, " n"]:
        """The voxels with one neighbor."""
        return self.neighbors == 1

    @property
    def bifurcations(self) -> Bool[Tensor, " n"]:
        """The voxels with three neighbors or more."""
        return self.neighbors >= 3

    @property
    def dividing_radius_mm(self) -> float:
        """The radius that parts the segments' voxels most evenly; NaN without a segment.

        Of the radii that segments have, it is the one that most nearly half of the voxels are
        below: a median that gives a segment in the middle to the side that is short of voxels.
        """
        radii, voxels = self.radius_mm[self.segment > 0].unique(return_counts=True)
        if not len(radii):
            return math.nan
        below = voxels.cumsum(0) - voxels
        return float(radii[(2 * below - voxels.sum()).abs().argmin()])

    def mask(self, chosen: Bool[Tensor, " n"]) -> Mask:
        """The volume in which the chosen voxels of the centerline are True."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask[tuple(self.ijk[chosen].T)] = True
        return mask


def centerline(mask: Mask, spacing_mm: tuple[float, float, float]) -> Centerline:
    """The centerline of a region, its end points, bifurcations and segments.

    The centerline is made by thinning, and ends up to a radius before the tip of a vessel, or
    before the face where it leaves the volume. A straight piece of an even number of voxels across
    may lose more, or vanish (https://github.com/scikit-image/scikit-image/issues/3757, open in
    0.26). The latest results are kept, as for `distance_mm`.

    >>> line = torch.zeros(3, 3, 5, dtype=torch.bool)
    >>> line[1, 1] = True
    >>> found = centerline(line, (1.0, 1.0, 1.0))
    >>> found.endpoints.tolist(), found.dividing_radius_mm
    ([True, False, False, False, True], 1.0)

    Args:
        mask: The region; without a voxel it has a centerline without one.
        spacing_mm: Edge lengths of a voxel along i, j, k.

    References:
        Lee, Kashyap & Chu, "Building skeleton models via 3-D medial surface/axis thinning
        algorithms", CVGIP: Graphical Models and Image Processing 56, 1994.
    """
    shape = mask.shape[0], mask.shape[1], mask.shape[2]
    made = _made_once("centerline", mask, spacing_mm, partial(_centerline, spacing_mm=spacing_mm))
    return Centerline(shape, *made)


def caliber_mm(mask: Mask, spacing_mm: tuple[float, float, float]) -> Float[Tensor, "i j k"]:
    """Radius of the vessel that each voxel is nearest to, in mm.

    It is the ``radius_mm`` of the nearest voxel of the `centerline`, so the voxels of a segment
    have one caliber; those of a piece that thinning leaves nothing of have that of another vessel.
    A region whose centerline is empty has its largest distance from the wall everywhere. The latest
    results are kept, as for `distance_mm`.

    >>> line = torch.zeros(3, 3, 5, dtype=torch.bool)
    >>> line[1, 1] = True
    >>> caliber_mm(line, (0.5, 1.0, 1.0)).unique().tolist()
    [0.5]

    Args:
        mask: The region.
        spacing_mm: Edge lengths of a voxel along i, j, k.

    Raises:
        ValueError: for a mask without a voxel, which has no caliber.
    """
    (caliber,) = _made_once("caliber", mask, spacing_mm, partial(_caliber, spacing_mm=spacing_mm))
    return caliber


def largest_component(mask: Mask) -> Mask:
    """The largest piece of a region whose voxels touch by a face, an edge or a corner.

    Of equals it is the first in index order; of a region without a voxel, no voxel.

    >>> largest_component(torch.tensor([[[True, False, True, True]]])).tolist()
    [[[False, False, True, True]]]
    """
    labels, _ = label(mask.cpu().numpy(), structure=_TOUCHING)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    if not sizes.any():
        return torch.zeros(mask.shape, dtype=torch.bool)
    first = (sizes == sizes.max())[labels].argmax()
    return torch.from_numpy(labels == labels.ravel()[first])


def largest_lack(mask: Mask, other: Mask) -> Mask:
    """The largest piece of a region that another lacks, shells around what they share left out.

    Where the other is a little too thin, a shell one voxel thick remains around all that both
    have, and would be the largest piece of all. So only lacking voxels that do not touch the other
    region, by a face, an edge or a corner, are put together; the largest piece of these is then
    grown by the lacking voxels that touch it.

    >>> largest_lack(torch.ones(1, 1, 5, dtype=torch.bool),
    ...              torch.tensor([[[True, False, False, False, False]]])).tolist()
    [[[False, True, True, True, True]]]

    Args:
        mask: The region.
        other: The region it is compared with.
    """
    theirs = other.cpu().numpy()
    lacking = mask.cpu().numpy() & ~theirs
    seeds = lacking & ~binary_dilation(theirs, _TOUCHING)
    piece = largest_component(torch.from_numpy(seeds)).numpy()
    return torch.from_numpy(lacking & binary_dilation(piece, _TOUCHING))


def border(mask: Mask) -> Mask:
    """The voxels of a region that share a face with a voxel outside it, on the mask's device.

    Where the volume ends, nothing is outside.

    >>> border(torch.tensor([[[True, True, False, True]]])).tolist()
    [[[False, True, False, True]]]
    """
    beside = torch.zeros_like(mask)
    for axis, size in enumerate(mask.shape):
        change = mask.diff(dim=axis)
        beside.narrow(axis, 0, size - 1).logical_or_(change)
        beside.narrow(axis, 1, size - 1).logical_or_(change)
    return mask & beside


def _made_once(
    what: str,
    mask: Mask,
    spacing_mm: tuple[float, float, float],
    make: Callable[[np.ndarray], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """What is made of a region, from what is kept where an equal region was asked for before."""
    inside = np.ascontiguousarray(mask.cpu().numpy())
    key = f"{what} {inside.shape} {spacing_mm} {hashlib.sha256(inside.data).hexdigest()}"
    made = _kept.get(key)
    if made is None:
        made = make(inside)
        _kept[key] = made
        while len(_kept) > 1 and _bytes_kept() > _KEPT_BYTES:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    # a caller who writes into it must not change what others get
    return tuple(tensor.clone() for tensor in made)


def _bytes_kept() -> int:
    return sum(tensor.nbytes for made in _kept.values() for tensor in made)


def _distance(inside: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[Tensor, ...]:
    if not inside.any():
        raise ValueError(
            "`distance_mm` needs a mask with at least one voxel, but got an empty one of "
            f"{inside.shape}. Leave empty regions out before."
        )
    outside = distance_transform_edt(~inside, sampling=spacing_mm)
    return (torch.from_numpy(outside.astype(np.float32)),)


def _wall_distance(
    inside: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[Tensor, ...]:
    if inside.all() or not inside.any():
        raise ValueError(
            "`wall_distance_mm` needs a mask with voxels inside and outside, but got "
            f"{int(inside.sum())} of {inside.size} inside. Leave regions without a wall out before."
        )
    outside = distance_transform_edt(~inside, sampling=spacing_mm)
    depth = distance_transform_edt(inside, sampling=spacing_mm)
    return (torch.from_numpy((outside - depth).astype(np.float32)),)


def _caliber(inside: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[Tensor, ...]:
    if not inside.any():
        raise ValueError(
            "`caliber_mm` needs a mask with at least one voxel, but got an empty one of "
            f"{inside.shape}. Leave empty regions out before."
        )
    line = centerline(torch.from_numpy(inside), spacing_mm)
    if not len(line.ijk):
        widest = np.inf
        if not inside.all():
            widest = distance_transform_edt(inside, sampling=spacing_mm).max()
        return (torch.full(inside.shape, float(widest)),)
    radius = np.zeros(inside.shape, dtype=np.float32)
    radius[tuple(line.ijk.numpy().T)] = line.radius_mm.numpy()
    away = np.ones(inside.shape, dtype=bool)
    away[tuple(line.ijk.numpy().T)] = False
    nearest = distance_transform_edt(
        away, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    return (torch.from_numpy(radius[tuple(nearest)]),)


def _centerline(inside: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[Tensor, ...]:
    skeleton = skeletonize(inside)
    around = convolve(skeleton.astype(np.uint8), _TOUCHING, mode="constant")[skeleton] - 1
    ordinary = skeleton.copy()
    ordinary[skeleton] = around < 3
    segment = label(ordinary, structure=_TOUCHING)[0][skeleton]
    if inside.all():
        radius = np.full(len(segment), np.inf)
    else:
        radius = distance_transform_edt(inside, sampling=spacing_mm)[skeleton]
    mean = np.bincount(segment, weights=radius) / np.maximum(np.bincount(segment), 1)
    radius = np.where(segment > 0, mean[segment], radius)
    return (
        torch.from_numpy(np.argwhere(skeleton)),
        torch.from_numpy(around.astype(np.int64)),
        torch.from_numpy(segment.astype(np.int64)),
        torch.from_numpy(radius),
    )
