"""What several metrics ask of one map, made once while the map is being measured.

Sorting the voxels of a map takes longer than most metrics, and of the latest map they all want it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.values import Attribution

_MAPS = 2  # one, and the earlier one that it is compared with
_KEPT_BYTES = 512 * 2**20
_kept: WeakKeyDictionary[Attribution, dict[Hashable, Tensor]] = WeakKeyDictionary()


def made_once(attribution: Attribution, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What is made of a map, from what is kept where it was asked for before.

    Of the two maps asked for last it is kept, while they live and as long as there is room; what
    there is no room for is made each time. It is shared: nobody may write into it.

    Args:
        attribution: The map, which is never kept alive.
        what: Name of what is made, and the settings that it depends on.
        make: Makes it.
    """
    values = attribution.values
    # a map that was written into is another one; inference tensors do not tell
    key = (what, 0 if values.is_inference() else values._version)
    own = _kept.pop(attribution, {})
    _kept[attribution] = own  # the last now
    if key not in own:
        own[key] = make()
        while len(_kept) > 1 and (len(_kept) > _MAPS or _bytes_kept() > _KEPT_BYTES):
            del _kept[next(iter(_kept))]
        if _bytes_kept() > _KEPT_BYTES:
            return own.pop(key)
    return own[key]


def magnitude(attribution: Attribution) -> Float[Tensor, "i j k"]:
    """``|a|`` of each voxel, in float64."""
    return made_once(attribution, "magnitude", lambda: attribution.values.detach().abs().double())


def ordered(attribution: Attribution) -> Float[Tensor, " voxels"]:
    """``|a|`` in ascending order, in float64."""

    def sort() -> Tensor:
        values = attribution.values.detach().abs()
        # narrow types sort faster; only bfloat16 is unknown to numpy
        numbers = values.float() if values.dtype is torch.bfloat16 else values
        return torch.from_numpy(np.sort(numbers.numpy(), axis=None)).double()

    return made_once(attribution, "ordered", sort)


def _bytes_kept() -> int:
    return sum(made.nbytes for own in _kept.values() for made in own.values())
