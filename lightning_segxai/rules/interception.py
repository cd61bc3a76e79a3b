"""Interception: some functions of a network get another backward, its values stay what they are.

A `torch.overrides.TorchFunctionMode` sees the functions themselves, so a module, an in-place or
reused module, a functional call and a tensor's method are all the same to it. Each function that a
rule changes gives the network's own value, and the gradient of another expression: its *path*.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionMeta
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_segxai.values import UnsupportedError, Volume

Function = Callable[..., Any]

CONVOLUTIONS = frozenset(
    f"conv{transposed}{axes}d" for transposed in ("", "_transpose") for axes in (1, 2, 3)
) | {"linear"}
"""Names of the functions that weigh and sum."""

RECTIFIERS = frozenset(
    {"relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu"}
    | {"mish", "softplus", "hardswish", "hardtanh", "threshold", "clamp", "clamp_min", "clip"}
)
"""Names of the activations that let the positive pass and hold the negative back."""

SQUASHERS = frozenset(
    {"sigmoid", "hardsigmoid", "logsigmoid", "tanh", "tanhshrink", "softsign", "softshrink"}
)
"""Names of the other activations."""

ELEMENTWISE = (
    RECTIFIERS
    | SQUASHERS
    | {"exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "abs", "reciprocal", "pow", "erf"}
)
"""Names of the functions of each number by itself."""

UNRULED = frozenset(
    {"amax", "amin", "max", "min", "maximum", "minimum", "norm", "vector_norm", "std", "var"}
    | {"normalize", "rms_norm", "local_response_norm", "glu", "multi_head_attention_forward"}
    | {"logsumexp", "cumprod", "prod", "cosine_similarity", "bilinear", "softmin", "lstm", "gru"}
)
"""Functions that are not linear and have no rule; what is in them would not be seen."""


class Rule(ABC):
    """How some functions run backward. A subclass is a frozen dataclass, so equal rules are one."""

    partner: ClassVar[Literal["baseline", "origin"] | None] = None
    """A second volume that goes through the network in the same batch, to be compared with."""
    changes: ClassVar[str] = ""
    """What functions it changes, for the error where a network has none."""
    instead: ClassVar[str] = ""
    """What to use on a network that has none."""
    of_activations: ClassVar[bool] = True
    """Whether it changes activations, and one that it did not see makes its map wrong."""

    @abstractmethod
    def interception(self, origins: Sequence[Volume], convolutions: int) -> Interception:
        """A fresh interception for one forward pass.

        Args:
            origins: The whole volume that each row of the batch is a window of.
            convolutions: How often the network calls a convolution or linear function.
        """

    def seed(self, weights: Tensor, logits: Tensor) -> Tensor:
        """What the backward pass starts with at each logit; by default the target's weight."""
        return weights

    def check(self, module: nn.Module) -> None:
        """Refuse a network whose functions cannot be seen.

        Raises:
            UnsupportedError: for scripted and traced modules.
        """
        for name, part in module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                where = f"its part {name}" if name else "it"
                raise UnsupportedError(
                    f"`{self}` cannot see into `{type(module).__name__}`: {where} is scripted or "
                    "traced. Explain the module that it was made from."
                )


class Interception(TorchFunctionMode):
    """One forward pass, and its backward pass, under a rule.

    A subclass names its handlers: by the name of a function, what is called in its place, with the
    function in its out-of-place form as the first argument.
    """

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.rule = rule
        self.met = 0
        self.kept = 0  # activations whose own node stays in the graph
        self.handlers: Mapping[str, Callable[..., Any]] = {}
        self.parameters: set[nn.Parameter] = set()

    @contextmanager
    def watching(self, given: Tensor) -> Iterator[None]:
        """While the network runs forward on ``given``."""
        with self:
            yield

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """While it runs backward, for checkpointed parts that run forward once more.

        The parameters that it met are constants, as they were forward.
        """
        trained = [p for p in self.parameters if p.requires_grad]
        try:
            for p in trained:
                p.requires_grad_(False)
            with self, torch.enable_grad():
                yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    def close(self) -> None:
        """Let go of all tensors at once: handlers refer to it, and it to them."""
        self.handlers = {}
        self.parameters.clear()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return self._backward(*args, **kwargs)
        self.parameters.update(a for a in (*args, *kwargs.values()) if isinstance(a, nn.Parameter))
        name, in_place = named(func)
        handler = self.handlers.get(name)
        if handler is None:
            return self.other(func, args, kwargs)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        plain, in_place = out_of_place(func, name, in_place, args, kwargs)
        if not in_place:
            return handler(plain, *args, **kwargs)
        # what others hold of an overwritten tensor must change as well
        return args[0].copy_(handler(plain, self.fresh(args[0]), *args[1:], **kwargs))

    def _backward(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        grad_outputs: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """A backward pass that checkpointed parts run forward in under this very mode.

        `torch.autograd.grad` leaves the mode where it is given tensors, but not for their edges.
        """
        if grad_outputs is None:
            grad_outputs = [torch.ones_like(output) for output in outputs]
        ends, starts = ([get_gradient_edge(t) for t in tensors] for tensors in (outputs, inputs))
        with self:
            return torch.autograd.grad(ends, starts, grad_outputs, **kwargs)

    def fresh(self, x: Tensor) -> Tensor:
        """A tensor as it is before it is written into."""
        return x.clone()

    def refusal(self, name: str) -> Callable[..., Any]:
        """What stands for a function without a rule."""

        def refuse(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(a, Tensor) and a.requires_grad for a in args):
                raise UnsupportedError(
                    f"`{self.rule}` has no rule for `{name}`. Use `IntegratedGradients`."
                )
            return plain(*args, **kwargs)

        return refuse

    def other(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function that no handler is for."""
        return func(*args, **kwargs)


@cache
def named(func: Function) -> tuple[str, bool]:
    """The name of a function, and whether it is its in-place form.

    >>> named(torch.relu_), named(torch.Tensor.add), named(F.max_pool3d)
    (('relu', True), ('add', False), ('max_pool3d', False))
    """
    for name, pool in _POOLS.items():
        if func is pool:  # boolean_dispatch hides their names
            return name, False
    name = getattr(func, "__name__", "").split(".")[0]
    if name.startswith("__"):
        return name, False
    return _ALIASES.get(name.rstrip("_"), name.rstrip("_")), name.endswith("_")


_POOLS = {
    f"{kind}max_pool{axes}d": getattr(F, f"{kind}max_pool{axes}d")
    for kind in ("", "adaptive_")
    for axes in (1, 2, 3)
}
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "bmm": "matmul",
    "mm": "matmul",
    "log_sigmoid": "logsigmoid",
    "_threshold": "threshold",
    "subtract": "sub",
    "convolution": "conv3d",
    **{f"{name}_with_indices": name for name in _POOLS},
}


def out_of_place(
    func: Function, name: str, in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, bool]:
    """The function that writes nowhere, and whether the one that was called does."""
    if in_place:
        for home in (torch, F, Tensor, torch._C._nn):
            if hasattr(home, name):
                return getattr(home, name), True
        raise UnsupportedError(f"There is no out-of-place form of `{func}`.")
    if inspect.isfunction(func) and "inplace" in (parameters := _parameters(func)):
        at = parameters.index("inplace")
        writes = kwargs.get("inplace", args[at] if at < len(args) else False)
        return _Writeless(func, at), bool(writes)
    return func, False


class _Writeless:
    """A function whose argument ``inplace`` is False, whatever it is called with."""

    def __init__(self, func: Function, at: int) -> None:
        self.func, self.at, self.__name__ = func, at, func.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(False if n == self.at else arg for n, arg in enumerate(args))
        if len(args) <= self.at:
            kwargs = {**kwargs, "inplace": False}
        return self.func(*args, **kwargs)


@cache
def _parameters(func: Function) -> tuple[str, ...]:
    return tuple(inspect.signature(func, follow_wrapped=False).parameters)


_RECTIFYING = frozenset(
    {"Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Hardswish"}
    | {"Hardtanh", "RreluWithNoise", "DifferentiableGraph"}
)
"""Names of the nodes that activations leave in a graph, and scripted functions."""


class _Through(torch.autograd.Function):
    """One value forward, another's gradient backward."""

    own = True

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, gradients[0]


def through(value: Tensor, path: Tensor) -> Tensor:
    """The value of one expression with the gradient of another of the same shape."""
    passed: Tensor = _Through.apply(value.detach(), path)
    return passed


def stabilized(values: Tensor, epsilon: float) -> Tensor:
    """A denominator kept away from zero: ``z + epsilon sign(z)``, with ``sign(0) = 1``.

    Half precision has no such small numbers; its smallest normal one takes their place.
    """
    epsilon = max(epsilon, torch.finfo(values.dtype).tiny)
    return values + epsilon * torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def refuse_unseen(logits: Tensor, module: nn.Module, mode: Interception) -> None:
    """Refuse what a rule could not see or change in a forward pass.

    Raises:
        UnsupportedError: where it met no function to change, or a custom autograd function.
    """
    assert mode.rule is not None
    network = type(module).__name__
    waiting, seen = [logits.grad_fn], set()
    rectifiers = clamps = 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        kind = node.name().split("::")[-1].split("Backward")[0]
        rectifiers += kind in _RECTIFYING
        clamps += kind in ("Clamp", "ClampMin", "Threshold")
        custom: Any = getattr(type(node), "_forward_cls", None)
        if isinstance(custom, FunctionMeta):
            if getattr(custom, "own", False):
                continue
            if custom.__name__ == "CheckpointFunction":
                raise UnsupportedError(
                    f"`{mode.rule}` cannot see into reentrant checkpointing in `{network}`. Use "
                    "`checkpoint(..., use_reentrant=False)`."
                )
            raise UnsupportedError(
                f"`{mode.rule}` cannot see into the custom autograd function "
                f"`{custom.__name__}` of `{network}`. Use its plain form in the network, or "
                f"{mode.rule.instead}."
            )
    head = getattr(mode, "head", None)
    if head is not None and head not in seen:
        raise UnsupportedError(
            f"`{mode.rule}` negates the last convolution that `{network}` runs, but its logits do "
            "not come from there. Run auxiliary heads before the main one, or not at all."
        )
    if mode.rule.of_activations and rectifiers > mode.kept:
        raise UnsupportedError(
            f"`{mode.rule}` could not see all activations of `{network}`: a scripted function, or "
            "one that torch runs in parts, has some. Use plain functions in the network, or "
            f"{mode.rule.instead}."
        )
    if mode.met == 0 or (mode.kept and not rectifiers + clamps):  # none before a layer, say
        raise UnsupportedError(
            f"`{mode.rule}` found no {mode.rule.changes} in `{network}`, so its map would be that "
            f"of the plain gradient. Use {mode.rule.instead}."
        )


class counted(TorchFunctionMode):  # noqa: N801 - a context manager reads like a verb
    """Counts how often convolutions and linear functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.convolutions += named(func)[0] in CONVOLUTIONS
        return func(*args, **(kwargs or {}))
