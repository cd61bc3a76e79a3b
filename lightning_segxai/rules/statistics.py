"""Normalizations written out: which statistics instance, group and layer norms divide by."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_segxai.values import UnsupportedError

NORMS = frozenset(("instance_norm", "group_norm", "layer_norm"))
"""Names of the functions that normalize by statistics of their own input."""

Norm = Literal["frozen", "exact"]
"""How a rule treats them: statistics as constants, or written out as mean, product and rsqrt."""


def check_norm(who: object, norm: str) -> None:
    """Raise a ValueError for another word."""
    if norm not in get_args(Norm):
        raise ValueError(f"`{type(who).__name__}(norm={norm!r})` must be frozen or exact.")


_SIGNATURES = {name: inspect.signature(getattr(F, name)) for name in (*NORMS, "batch_norm")}


@dataclass(frozen=True, eq=False)
class Normalization:
    """One call of a norm: the axes of its statistics in a regrouped view, and its affine part.

    Args:
        grouped: Shape of the input with its channels split into groups.
        axes: Axes of that shape over which mean and variance go.
        epsilon: Added to the variance.
        scale: Broadcastable to the input; None is one.
        shift: Likewise; None is zero.
    """

    grouped: tuple[int, ...]
    axes: tuple[int, ...]
    epsilon: float
    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Read a call; None where it uses fixed running statistics, as batch norm in eval does."""
        call = _bound(name, x, args, kwargs)
        shape, weight, bias = tuple(x.shape), call.get("weight"), call.get("bias")
        if name == "layer_norm":
            axes = tuple(range(x.ndim - len(call["normalized_shape"]), x.ndim))
            return cls(shape, axes, call["eps"], weight, bias)
        if name == "instance_norm" and not call["use_input_stats"]:
            return None
        groups = call["num_groups"] if name == "group_norm" else shape[1]
        grouped = (shape[0], groups, shape[1] // groups, *shape[2:])
        return cls(
            grouped,
            tuple(range(2, len(grouped))),
            call["eps"],
            _of_channels(weight, x),
            _of_channels(bias, x),
        )

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the group, of the input's shape; linear."""
        return self._spread(x.reshape(self._like(x)).mean(self.axes, keepdim=True), x)

    def _spread(self, statistic: Tensor, x: Tensor) -> Tensor:
        return statistic.expand(self._like(x)).reshape(x.shape)

    def _like(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), *self.grouped[1:])

    def constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift that the norm comes down to at ``x``, its statistics as constants."""
        with torch.no_grad():
            if x.dtype in (torch.float16, torch.bfloat16):  # squares overflow in half precision
                scale, shift = self.constants(x.float())
                return scale.to(x.dtype), shift.to(x.dtype)
            mean = self.mean(x)
            scale = (self.mean((x - mean) ** 2) + self.epsilon).rsqrt()
            if self.scale is not None:
                scale = scale * self.scale
            shift = -mean * scale
            return scale, shift if self.shift is None else shift + self.shift


def running_constants(
    name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Scale and shift of a batch or instance norm with running statistics, for each channel.

    Raises:
        UnsupportedError: where it uses the statistics of the batch.
    """
    call = _bound(name, x, args, kwargs)
    if name == "batch_norm":
        refuse_batch_statistics(call)
    scale = (call["running_var"] + call["eps"]).rsqrt()
    if call["weight"] is not None:
        scale = scale * call["weight"]
    shift = -call["running_mean"] * scale
    if call["bias"] is not None:
        shift = shift + call["bias"]
    return _of_channels(scale, x), _of_channels(shift, x)


def refuse_batch_statistics(call: Mapping[str, Any]) -> None:
    """Raise an UnsupportedError for a batch norm without running statistics."""
    if _mixes(call):
        raise UnsupportedError(
            "A BatchNorm without running statistics mixes the rows of a batch, which rules put "
            "side by side. Use `track_running_stats=True`, or another norm."
        )


def of_batch(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a batch norm's statistics are those of the batch."""
    return _mixes(_bound("batch_norm", x, args, kwargs))


def _mixes(call: Mapping[str, Any]) -> bool:
    return call["training"] or call["running_mean"] is None


def refuse_mixing(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a batch norm whose statistics are those of the batch."""
    refuse_batch_statistics(_bound("batch_norm", x, args, kwargs))


def _bound(
    name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their names.

    Raises:
        UnsupportedError: for torch's own form of it, whose arguments have another order.
    """
    try:
        given = _SIGNATURES[name].bind(x, *args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(
            f"Rules know `torch.nn.functional.{name}`, not `torch.{name}`. Call that."
        ) from error
    given.apply_defaults()
    return given.arguments


def _of_channels(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.reshape(1, -1, *(1,) * (x.ndim - 2))
