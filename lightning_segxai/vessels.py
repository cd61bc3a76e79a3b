"""The geometry of a region in millimeters, for targets, sampling and metrics.

Regions stay the same from epoch to epoch, so what is slow to make of one is kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt
from torch import Tensor

# Enough for the regions of a few whole heads; bounded in bytes because probes differ that much.
_KEPT_BYTES = 512 * 2**20
_kept: OrderedDict[str, Float[Tensor, "i j k"]] = OrderedDict()


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
    inside = np.ascontiguousarray(mask.cpu().numpy())
    key = f"{inside.shape} {spacing_mm} {hashlib.sha256(inside.data).hexdigest()}"
    distance = _kept.get(key)
    if distance is None:
        if not inside.any():
            raise ValueError(
                "`distance_mm` needs a mask with at least one voxel, but got an empty one of "
                f"{inside.shape}. Leave empty regions out before."
            )
        outside = distance_transform_edt(~inside, sampling=spacing_mm)
        distance = torch.from_numpy(outside.astype(np.float32))
        _kept[key] = distance
        while len(_kept) > 1 and sum(d.nbytes for d in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    return distance.clone()  # a caller who writes into it must not change what others get
