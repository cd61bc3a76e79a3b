"""Rules that send a second volume through the network: DeepLift's rescale rule, frozen norms.

The batch holds the volumes and, behind them, their partners; a function sees both halves at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_segxai.rules import lean
from lightning_segxai.rules.interception import (
    ELEMENTWISE,
    UNRULED,
    Interception,
    Rule,
    through,
)
from lightning_segxai.rules.statistics import NORMS, Norm, Normalization, refuse_mixing
from lightning_segxai.values import UnsupportedError, Volume


@dataclass(frozen=True)
class Frozen(Rule):
    """Instance, group and layer norms with the statistics of the origin, as constants.

    The network that is looked at is then another one, with the same answer at the origin.
    """

    partner = "origin"
    of_activations: ClassVar[bool] = False
    changes: ClassVar[str] = "instance, group or layer norm"
    instead: ClassVar[str] = '`norm="exact"`'

    def interception(self, origins: Sequence[Volume], convolutions: int) -> Interception:
        """Handlers for all norms."""
        return _Freezing(self, of_partner=True)


@dataclass(frozen=True)
class Rescaled(Rule):
    r"""DeepLift's rescale rule: an activation passes the slope between its two answers.

    $$m = \frac{f(x) - f(b)}{x - b}$$

    and its derivative where the two are equal. Max pooling passes the whole difference to the voxel
    that won it; a product passes to each factor the mean of the other, $\Delta(uv) = \bar v\,\Delta
    u + \bar u\,\Delta v$; a softmax is exponentials, their sum, its logarithm, and an exponential.

    Args:
        norm: ``frozen``: instance, group and layer norms with the volume's statistics as constants,
            for the baseline too, so that the map is complete for that network; ``exact``: written
            out as mean, product and rsqrt, so that it is complete for the network itself.
    """

    norm: Norm = "frozen"

    partner = "baseline"
    changes: ClassVar[str] = "activation, pooling, product or norm"
    instead: ClassVar[str] = "`IntegratedGradients(steps=1)`"

    def interception(self, origins: Sequence[Volume], convolutions: int) -> Interception:
        """Handlers for all that is not linear."""
        return _Rescaling(self)


class _Freezing(Interception):
    """Norms with the statistics of one half of the batch, for both."""

    def __init__(self, rule: Rule, of_partner: bool) -> None:
        super().__init__(rule)
        self.of_partner = of_partner
        self.handlers = {name: self._handler(name) for name in NORMS} | {"batch_norm": self.batch}

    def _handler(self, name: str) -> Callable[..., Tensor]:
        def normalize(plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            norm = Normalization.of(name, x, args, kwargs)
            if norm is None:
                return plain(x, *args, **kwargs)
            self.met += 1
            return self.norm(norm, plain, x, args, kwargs)

        return normalize

    def norm(
        self,
        norm: Normalization,
        plain: Callable[..., Tensor],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        constants = norm.constants(x.detach().chunk(2)[int(self.of_partner)])
        scale, shift = (torch.cat([c, c]) for c in constants)
        return x * scale + shift

    def batch(self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_mixing(x, args, kwargs)
        return lean.batch_norm(plain, x, *args, **kwargs)


class _Rescaling(_Freezing):
    rule: Rescaled

    def __init__(self, rule: Rescaled) -> None:
        super().__init__(rule, of_partner=False)
        pools = {
            f"{kind}max_pool{axes}d": self._pool(f"{kind}max_pool{axes}d", axes)
            for kind in ("", "adaptive_")
            for axes in (1, 2, 3)
        }
        self.handlers = {
            **self.handlers,
            **dict.fromkeys(ELEMENTWISE, self.elementwise),
            **pools,
            "mul": self.product,
            "matmul": self.product,
            "einsum": self.einsum,
            "div": self.quotient,
            "__rdiv__": self.reverse_quotient,
            "__rtruediv__": self.reverse_quotient,
            "softmax": self.softmax,
            "log_softmax": self.softmax,
            "scaled_dot_product_attention": self.attention,
            **{name: self.refusal(name) for name in UNRULED},
        }

    def elementwise(
        self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A function of each number by itself."""
        y = plain(x, *args, **kwargs)
        if any(_varies(other) for other in args):
            raise UnsupportedError(f"`{self.rule}` has no rule for `{plain}` of two that vary.")
        if not _varies(x):
            return y
        self.met += 1
        # hooks of its own: those of a checkpoint around it would run the part forward once more
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
            at = x.detach().chunk(2)[0].requires_grad_()
            [derivative] = torch.autograd.grad(plain(at, *args, **kwargs).sum(), at)
        slope = _slope(_difference(y), _difference(x), _size(x), derivative)
        return through(y, x * _twice(slope).to(x.dtype))

    def _pool(self, name: str, axes: int) -> Callable[..., Any]:
        def pool(plain: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            asked = getattr(plain, "__name__", "").endswith("_with_indices")
            y, won = getattr(F, name)(x, *args, **{**kwargs, "return_indices": True})
            if not _varies(x):
                return (y, won) if asked else y
            self.met += 1
            # the half with the higher answer says which voxel won the difference
            (y1, y0), (won1, won0) = _halves(y), won.chunk(2)
            winner = torch.where(y1 >= y0, won1, won0)
            shape = y.shape
            voxel = x.flatten(-axes).gather(-1, _twice(winner).flatten(-axes)).reshape(shape)
            one = torch.ones_like(y1)
            slope = _slope(y1 - y0, _difference(voxel), _size(voxel), one)
            answer = through(y, voxel * _twice(slope).to(x.dtype))
            return (answer, won) if asked else answer

        return pool

    def product(
        self, plain: Callable[..., Tensor], a: Any, b: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Any function that is linear in each of two factors."""
        y = plain(a, b, *args, **kwargs)
        if not (_varies(a) and _varies(b)):
            return y
        self.met += 1
        path = plain(a, _mean(b), *args, **kwargs) + plain(_mean(a), b, *args, **kwargs)
        return through(y, path)

    def einsum(self, plain: Callable[..., Tensor], equation: str, *operands: Any) -> Tensor:
        """A product, if it has two factors that vary."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        varying = [n for n, operand in enumerate(operands) if _varies(operand)]
        if len(varying) < 2:
            return plain(equation, *operands)
        if len(operands) > 2:
            raise UnsupportedError(f"`{self.rule}` has no rule for an einsum of three factors.")
        return self.product(lambda a, b: plain(equation, a, b), *operands)

    def quotient(self, plain: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Tensor:
        """A product with the reciprocal."""
        if not _varies(b):
            return plain(a, b, **kwargs)
        inverse = self.elementwise(torch.reciprocal, b)
        return through(plain(a, b, **kwargs), self.product(torch.mul, a, inverse))

    def reverse_quotient(self, plain: Callable[..., Tensor], b: Tensor, a: Any) -> Tensor:
        """A number over a tensor."""
        return self.quotient(lambda a, b: plain(b, a), a, b)

    def softmax(self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The exponential of its logarithm, which is less the logarithm of a sum of exponentials.

        A quotient of exponentials would cancel where the logits of the two are far apart.
        """
        y = plain(x, *args, **kwargs)
        if not _varies(x):
            return y
        dim: Any = kwargs.get("dim", args[0] if args else None)
        x = x - _twice(torch.maximum(*_halves(x)).amax(dim, keepdim=True)).to(x.dtype)
        total = self.elementwise(torch.exp, x).sum(dim, keepdim=True)
        logarithm = x - self.elementwise(torch.log, total)
        if "log" in getattr(plain, "__name__", ""):
            return through(y, logarithm)
        return through(y, self.elementwise(torch.exp, logarithm))

    def attention(
        self,
        plain: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Two products with a softmax between them."""
        settings = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, **kwargs}
        y = plain(query, key, value, **settings)
        if not any(map(_varies, (query, key, value))):
            return y
        if is_causal or kwargs.get("enable_gqa") or getattr(attn_mask, "dtype", None) == torch.bool:
            raise UnsupportedError(f"`{self.rule}` has no rule for masked or grouped attention.")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = self.product(torch.matmul, query, key.transpose(-2, -1)) * scale
        if attn_mask is not None:
            logits = logits + attn_mask
        shares = self.softmax(torch.softmax, logits, dim=-1)
        return through(y, self.product(torch.matmul, shares, value))

    def norm(
        self,
        norm: Normalization,
        plain: Callable[..., Tensor],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if self.rule.norm == "frozen" or not _varies(x):
            return super().norm(norm, plain, x, args, kwargs)
        centered = x - norm.mean(x)
        variance = norm.mean(self.product(torch.mul, centered, centered))
        scale = self.elementwise(torch.rsqrt, variance + norm.epsilon)
        path = self.product(torch.mul, centered, scale)
        if norm.scale is not None:
            path = path * norm.scale
        return through(plain(x, *args, **kwargs), path)


def _itself(x: Tensor) -> Tensor:
    return x


def _varies(x: Any) -> bool:
    """Whether it depends on the input; parameters are constants under a rule."""
    return isinstance(x, Tensor) and x.requires_grad


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Volumes and partners, in a precision to divide in."""
    x = x.detach()
    half = x.dtype in (torch.float16, torch.bfloat16)
    volumes, partners = (x.float() if half else x).chunk(2)
    return volumes, partners


def _difference(x: Tensor) -> Tensor:
    volumes, partners = _halves(x)
    return volumes - partners


def _size(x: Tensor) -> Tensor:
    volumes, partners = _halves(x)
    return torch.maximum(volumes.abs(), partners.abs())


def _slope(rise: Tensor, run: Tensor, size: Tensor, otherwise: Tensor) -> Tensor:
    """Rise over run; the derivative where the run is no more than rounding."""
    flat = run.abs() <= 32 * torch.finfo(run.dtype).eps * size
    return torch.where(flat, otherwise, rise / torch.where(flat, torch.ones_like(run), run))


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def _mean(x: Tensor) -> Tensor:
    """The mean of volume and partner, in the place of both."""
    volumes, partners = x.detach().chunk(2)
    return _twice((volumes + partners) / 2)
