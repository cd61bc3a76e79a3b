"""Constant BatchNorms that keep nothing for the way back, so a look takes about half the memory.

In eval mode a BatchNorm is a scale and a shift of each channel, and its gradient needs the scale
alone; torch keeps its whole input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_segxai.rules.interception import Interception
from lightning_segxai.rules.statistics import of_batch, running_constants


class _Scaled(torch.autograd.Function):
    """A function's own value, and a scale for its gradient."""

    own = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(scale)
        return plain(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        [scale] = ctx.saved_tensors
        return gradients[0] * scale, None, None


def batch_norm(plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A BatchNorm with running statistics; with those of the batch, it is torch's own."""
    if plain is not F.batch_norm:  # torch's own form has its arguments in another order
        return plain(x, *args, **kwargs)
    if not (x.requires_grad and torch.is_grad_enabled()) or of_batch(x, args, kwargs):
        return plain(x, *args, **kwargs)
    with torch.no_grad():
        scale, _ = running_constants("batch_norm", x, args, kwargs)
    scaled: Tensor = _Scaled.apply(x, scale, lambda z: plain(z, *args, **kwargs))
    return scaled


class Lean(Interception):
    """No rule: the gradient, for less memory."""

    def __init__(self) -> None:
        super().__init__(None)
        self.handlers = {"batch_norm": batch_norm}
