"""How well the network segments a probe: what the focus of a map is read against."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def dice(prediction: Int[Tensor, "i j k"], label: Int[Tensor, "i j k"]) -> float:
    """Dice of the foreground, in [0, 1], averaged over the classes in label or prediction.

    ``mean_c 2 |P_c & L_c| / (|P_c| + |L_c|)`` over the classes ``c > 0`` that occur. Two volumes
    without foreground agree: 1.

    >>> dice(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]]))
    0.6666666666666666

    References:
        Dice, "Measures of the amount of ecologic association between species", Ecology 26, 1945.
    """
    found, true = prediction.flatten().long(), label.flatten().long()
    classes = int(torch.maximum(found.max(), true.max())) + 1
    both = torch.bincount(true[found == true], minlength=classes)[1:].double()
    sizes = (torch.bincount(found, minlength=classes) + torch.bincount(true, minlength=classes))[
        1:
    ].double()
    present = sizes > 0
    if not bool(present.any()):
        return 1.0
    return float((2 * both[present] / sizes[present]).mean())
