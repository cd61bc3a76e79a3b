"""Geometry of voxel grids: a map on one grid brought to another."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num
from scipy import ndimage


def spacing_of(affine: Num[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Edge lengths of a voxel in the affine's unit.

    >>> spacing_of(np.diag([-0.5, 0.5, 0.8, 1.0]))
    (0.5, 0.5, 0.8)
    """
    i, j, k = np.sqrt((np.asarray(affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0)).tolist()
    return i, j, k


def moved(
    values: Float[np.ndarray, "i j k"], to_probe: Num[np.ndarray, "4 4"], shape: tuple[int, ...]
) -> Float[np.ndarray, "x y z"]:
    """Values on a grid of ``shape`` that has the same voxels in another order; 0 outside.

    Args:
        values: On the probe's grid.
        to_probe: From indices of the new grid to the probe's, in whole numbers.
        shape: Voxels of the new grid.
    """
    axes = np.abs(to_probe[:3, :3]).argmax(axis=0)  # the probe's axis along each of the file's
    signs = to_probe[axes, range(3)]
    turned = values.transpose(axes)[tuple(slice(None, None, s) for s in signs)]
    # Where the file's voxel 0 lies among the turned values
    first = np.where(signs > 0, to_probe[axes, 3], np.array(turned.shape) - 1 - to_probe[axes, 3])
    back = np.zeros(shape, dtype=values.dtype)
    sizes = list(zip(first.tolist(), shape, turned.shape, strict=True))
    here = tuple(slice(max(-f, 0), max(min(n, m - f), 0)) for f, n, m in sizes)
    there = tuple(slice(max(f, 0), max(min(n + f, m), 0)) for f, n, m in sizes)
    back[here] = turned[there]
    return back


def resampled(
    values: Float[np.ndarray, "i j k"], to_probe: Num[np.ndarray, "4 4"], shape: tuple[int, ...]
) -> Float[np.ndarray, "x y z"]:
    """Values on a grid of other voxels, linearly; positive and negative parts keep their sums.

    Args:
        values: On the probe's grid.
        to_probe: From indices of the new grid to the probe's.
        shape: Voxels of the new grid.
    """
    back = np.zeros(shape)
    for part in (values.clip(min=0), values.clip(max=0)):
        # "grid-constant" blends to 0 beyond the outermost voxels, half a voxel further out
        moved = ndimage.affine_transform(
            part.astype(np.float64), to_probe, output_shape=shape, order=1, mode="grid-constant"
        )
        total = moved.sum()
        back += moved * (part.sum(dtype=np.float64) / total if total else 0.0)
    return back.astype(values.dtype)
