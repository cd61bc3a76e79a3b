"""Supervoxels: a volume cut into regions of like intensity, to be hidden one by one."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from skimage.segmentation import slic
from torch import Tensor

from lightning_segxai.values import Shape, Volume

_MOST_CUBES = 128**3  # two seconds on one core; a volume of 512^3 would take minutes


def supervoxels(
    image: Volume, spacing_mm: tuple[float, float, float], count: int, compactness: float
) -> Int[Tensor, "i j k"]:
    """The number of each voxel's supervoxel, 0 to at most ``count - 1``; each has a voxel.

    By scikit-image's SLIC on a grid of cubes: of the mean edge of the voxels, or coarser where the
    volume would be more than two million cubes. All channels count. Small pieces are kept from a
    tenth of the mean size on, since vessels are thin: with scikit-image's half, they are swallowed
    by what is around them. Where fewer come out than wanted, SLIC is given more seeds; where more,
    the two neighbors whose union spreads least, by SLIC's own distance, become one. Always the same
    for the same volume.

    Args:
        image: The volume.
        spacing_mm: Edge lengths of a voxel in millimeters.
        count: The number wanted.
        compactness: Difference of intensity, as a fraction of the volume's range, that counts as
            much as the distance from one supervoxel to the next.

    References:
        Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", 2012,
        IEEE TPAMI 34.
    """
    i, j, k = image.shape[1:]
    cubes = _cubes((i, j, k), spacing_mm)
    coarse = F.interpolate(image.detach().cpu().double()[None], cubes, mode="area")[0].numpy()
    for seeds in (count, 2 * count, 4 * count, 8 * count):
        numbers = slic(
            coarse,
            n_segments=min(seeds, math.prod(cubes)),
            compactness=compactness,
            convert2lab=False,  # three channels are no colors
            min_size_factor=0.1,
            start_label=0,
            channel_axis=0,
        )
        if numbers.max() + 1 >= count or seeds >= math.prod(cubes):
            break
    spread = float(np.ptp(coarse)) or 1.0
    numbers = _merged(numbers, coarse / (spread * compactness), count)
    rows = [
        ((np.arange(size) + 0.5) * cube / size).astype(int)
        for size, cube in zip((i, j, k), cubes, strict=True)
    ]
    # a cube between two voxels is nobody's, and its supervoxel may be gone
    _, numbers = np.unique(numbers[np.ix_(*rows)], return_inverse=True)
    return torch.from_numpy(numbers.reshape(i, j, k)).to(image.device)


def per_voxel(
    effects: Float[Tensor, " regions"], numbers: Int[Tensor, "i j k"]
) -> Float[Tensor, "i j k"]:
    """The effect of each supervoxel, shared out evenly over its voxels: the sum is kept.

    >>> per_voxel(torch.tensor([6.0, 1.0]), torch.tensor([[[0, 0, 1]]])).tolist()
    [[[3.0, 3.0, 1.0]]]
    """
    return (effects / torch.bincount(numbers.flatten(), minlength=len(effects)))[numbers]


def _cubes(shape: Shape, spacing_mm: tuple[float, float, float]) -> Shape:
    """How many cubes along each axis."""
    edge = math.prod(spacing_mm) ** (1 / 3) * max(1.0, math.prod(shape) / _MOST_CUBES) ** (1 / 3)
    i, j, k = (max(1, round(size * mm / edge)) for size, mm in zip(shape, spacing_mm, strict=True))
    return i, j, k


def _merged(
    numbers: Int[np.ndarray, "i j k"], features: Float[np.ndarray, "c i j k"], count: int
) -> Int[np.ndarray, "i j k"]:
    """At most ``count`` regions: Ward's clustering of neighbors, by intensity and place.

    Args:
        numbers: The region of each voxel.
        features: Intensities in units of the distance between regions.
        count: The most regions.
    """
    found = int(numbers.max()) + 1
    if found <= count:
        return numbers
    sizes = np.bincount(numbers.ravel()).astype(float)
    step = (numbers.size / count) ** (1 / 3)
    places = np.indices(numbers.shape) / step
    means = np.stack(
        [np.bincount(numbers.ravel(), f.ravel()) / sizes for f in (*features, *places)], axis=1
    )
    pairs = np.concatenate([_touching(numbers, axis) for axis in range(3)])
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)

    def costs(pairs: Int[np.ndarray, "pairs 2"]) -> Float[np.ndarray, " pairs"]:
        a, b = pairs.T
        distance = ((means[a] - means[b]) ** 2).sum(axis=1)
        return sizes[a] * sizes[b] / (sizes[a] + sizes[b]) * distance

    cost, new = costs(pairs), np.arange(found)
    for _ in range(found - count):
        both = pairs[cost.argmin()]
        kept, gone = both.tolist()
        means[kept] = np.average(means[both], axis=0, weights=sizes[both])
        sizes[kept] += sizes[gone]
        new[new == gone] = kept
        pairs[pairs == gone] = kept
        apart = pairs[:, 0] != pairs[:, 1]
        pairs, cost = pairs[apart], cost[apart]
        changed = (pairs == kept).any(axis=1)
        cost[changed] = costs(pairs[changed])
    return np.unique(new, return_inverse=True)[1][new[numbers]]


def _touching(numbers: Int[np.ndarray, "i j k"], axis: int) -> Int[np.ndarray, "pairs 2"]:
    """Which regions are neighbors along an axis."""
    ahead = np.moveaxis(numbers, axis, 0)
    pairs = np.stack([ahead[1:].ravel(), ahead[:-1].ravel()], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]
