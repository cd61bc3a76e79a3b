"""A map of a probe brought back onto the grid of the file that the probe was read from."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import torchio as tio
from jaxtyping import Float, Float64
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from lightning_segxai.data.grids import moved, resampled
from lightning_segxai.values import Probe


def to_file_grid(
    values: Float[Tensor, "i j k"], probe: Probe, reference: str | Path
) -> tuple[Float[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """A map of a probe on the grid of the file that the probe was read from.

    Where the two grids differ by the order and the direction of their axes and by whole voxels,
    values are only moved: each keeps its place in the world and its exact value. Otherwise the
    preprocessing has resampled, and the map is resampled back linearly; its positive and its
    negative part then each keep their sum, and a single value may change. Outside of the probe
    the map is 0.

    Args:
        values: The map, on the probe's own grid.
        probe: Where it was made.
        reference: The NIfTI file.

    Returns:
        The map as the file's array would be indexed, and the file's affine.

    Raises:
        ValueError: where the map is not on the probe's grid, or the file cannot be read.
    """
    if values.shape != probe.shape:
        raise ValueError(
            f'`to_file_grid` needs a map of {tuple(probe.shape)} voxels, as probe "{probe.name}" '
            f"has them, but got {tuple(values.shape)}."
        )
    try:
        # Compared by the reader that made the probe (a header may hold two affines that differ),
        # returned as NiBabel tells it, like the file's own voxels
        file = tio.ScalarImage(reference)
        shape, to_world = tuple(file.spatial_shape), file.affine
        affine = np.asarray(cast(SpatialImage, nib.load(reference)).affine, dtype=np.float64)
    except Exception as error:  # whatever the readers of a broken file raise
        raise ValueError(f"`to_file_grid` cannot read {reference}: {error}") from error
    to_probe = np.linalg.inv(np.asarray(probe.affine)) @ to_world
    whole = np.round(to_probe)
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in shape))])
    array = values.detach().cpu().numpy()
    if np.abs(corners @ (to_probe - whole).T).max() < 0.05:
        return moved(array, whole.astype(int), shape), affine
    return resampled(array, to_probe, shape), affine
