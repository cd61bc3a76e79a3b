"""Guided backpropagation and deconvnet: what goes backward through a rectifier is rectified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_segxai.rules import lean
from lightning_segxai.rules.interception import RECTIFIERS, Interception, Rule, through
from lightning_segxai.values import Volume


@dataclass(frozen=True)
class Rectified(Rule):
    r"""Backward, only what is positive passes a rectifier.

    $$g_x = f'(x)\, \max(g_y, 0) \ \text{(guided)} \quad\text{or}\quad g_x = \max(g_y, 0)$$

    Every rectifier counts, leaky and smooth ones too; squashing activations, such as the sigmoid of
    a gate, keep their derivative.

    Args:
        derivative: Whether the activation's own derivative takes part: guided backpropagation with
            it, deconvnet without.
    """

    derivative: bool

    changes: ClassVar[str] = "rectifying activation (ReLU, LeakyReLU, PReLU, ELU, GELU, ...)"
    instead: ClassVar[str] = "`Saliency`"

    def interception(self, origins: Sequence[Volume], convolutions: int) -> Interception:
        """Handlers for all rectifiers."""
        return _Rectifying(self)


class _Rectifying(Interception):
    rule: Rectified

    def __init__(self, rule: Rectified) -> None:
        super().__init__(rule)
        self.handlers = {**dict.fromkeys(RECTIFIERS, self.rectify), "batch_norm": lean.batch_norm}

    def rectify(self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = plain(x, *args, **kwargs)
        if not x.requires_grad:
            return y
        self.met += 1
        if self.rule.derivative:
            self.kept += 1
        else:
            y = through(y, x)
        y.register_hook(lambda gradient: gradient.relu())
        return y
