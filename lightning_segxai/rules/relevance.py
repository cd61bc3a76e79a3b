r"""Layer-wise relevance propagation and excitation backprop.

Written as a modified gradient: relevance is *value times gradient* at every tensor, so whatever is
linear and not intercepted obeys LRP-0 by itself. Each convolution, merged with the norm behind it,
passes $R_i = \sum_j c_{ij} R_j / \sum_i c_{ij}$ for its rule's contributions $c_{ij}$. At the
network's own input the gradient *is* the relevance, since rules for the first layer do not vanish
where the input is zero.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_segxai.rules.interception import (
    CONVOLUTIONS,
    ELEMENTWISE,
    UNRULED,
    Interception,
    Rule,
    named,
    out_of_place,
    stabilized,
    through,
)
from lightning_segxai.rules.statistics import NORMS, Normalization, running_constants
from lightning_segxai.values import UnsupportedError, Volume

_TINY = 1e-12
_CARRIES = frozenset(
    {"to", "float", "double", "half", "bfloat16", "contiguous", "view", "reshape", "pad"}
)
"""Names of the functions whose answer is still the input."""


@dataclass(frozen=True)
class Relevance(Rule):
    r"""How relevance is shared out by convolutions.

    Args:
        convolutions: ``z+``: contributions $x_i^+ w_{ij}^+ + x_i^- w_{ij}^-$, which are positive;
            ``epsilon``: $x_i w_{ij}$.
        first: What the first convolution does instead: ``w2``: $w_{ij}^2$; ``zb``: $x_i w_{ij} -
            l\, w_{ij}^+ - h\, w_{ij}^-$ for the volume's lowest and highest value of the channel;
            ``same``: nothing else.
        epsilon: Added to every denominator, with its sign.
        excitation: Start with the target's weights instead of weighted logits, and leave biases and
            negative parts of sums out.
        contrast: Negate the weights of the last convolution.
    """

    convolutions: Literal["z+", "epsilon"] = "z+"
    first: Literal["w2", "zb", "same"] = "w2"
    epsilon: float = 1e-6
    excitation: bool = False
    contrast: bool = False

    changes: ClassVar[str] = "convolution or linear function"
    instead: ClassVar[str] = "`InputXGradient`"

    def interception(self, origins: Sequence[Volume], convolutions: int) -> Interception:
        """Handlers for convolutions, norms, activations and products."""
        bounds = None
        if self.first == "zb":
            axes = (1, 2, 3)
            bounds = (
                torch.stack([x.amin(axes) for x in origins]),
                torch.stack([x.amax(axes) for x in origins]),
            )
        return _Propagation(self, bounds, convolutions)

    def seed(self, weights: Tensor, logits: Tensor) -> Tensor:
        """Relevance over logit, where relevance starts with the weights."""
        return weights / stabilized(logits, _TINY) if self.excitation else weights


@dataclass(frozen=True, eq=False)
class _Weighing:
    """A convolution's contributions, for both signs of the scale that a norm may put behind it.

    Those for a negative scale are made when a norm has one.
    """

    out: Tensor
    positive: Tensor
    negative: Callable[[], Tensor]
    absorbs: Literal["square", "signed", "positive", "nothing"]
    bias: Tensor | None
    version: int = 0

    def gave(self, x: Tensor) -> bool:
        """Whether it is the convolution's answer, and nothing wrote into it since."""
        return x is self.out and x._version == self.version

    def handed_on(self, out: Tensor) -> _Weighing:
        """The same, of another tensor that is its answer."""
        return replace(self, out=out, version=out._version)

    def negated(self) -> _Weighing:
        """Of the negative weights."""
        return replace(self, positive=-self.negative(), negative=lambda: -self.positive)


class _Propagation(Interception):
    rule: Relevance

    def __init__(
        self, rule: Relevance, bounds: tuple[Tensor, Tensor] | None, convolutions: int
    ) -> None:
        super().__init__(rule)
        self.bounds = bounds
        self.last_call = convolutions
        self.given: list[Tensor] = []
        self.latest: _Weighing | None = None
        self.head: Any = None  # what the logits must come from, where it is negated
        self.handlers = {
            **{name: self._weigh(name) for name in CONVOLUTIONS},
            **{name: self._normalize(name) for name in NORMS},
            "batch_norm": self.batch_norm,
            "mul": self.product,
            "matmul": self.product,
            "einsum": self.einsum,
            "clone": self.clone,
        }
        self.handlers |= dict.fromkeys(ELEMENTWISE, self.passing)
        self.handlers |= dict.fromkeys(("softmax", "log_softmax"), self.constant)
        self.handlers |= {name: self.refusal(name) for name in UNRULED}
        self.handlers |= {
            "div": self.quotient,
            "scaled_dot_product_attention": self.attention,
        }
        if rule.excitation:
            self.handlers["add"] = self.sum

    def watching(self, given: Tensor) -> Any:
        """From here on the input is known."""
        self.given.append(given)
        return super().watching(given)

    def close(self) -> None:
        """And of the input and the latest convolution."""
        super().close()
        self.given, self.latest = [], None

    def other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Linear functions obey LRP-0; at the input, value times gradient is made the gradient."""
        name, in_place = named(func)
        weighed = tuple(map(self._weighed, args))
        if all(map(operator.is_, weighed, args)):
            return func(*args, **kwargs)
        if name in _CARRIES:
            found = func(*args, **kwargs)
            self.given.append(found)
            return found
        if in_place and self._is_input(args[0]):
            self.given = [given for given in self.given if given is not args[0]]
            plain, _ = out_of_place(func, name, in_place, args, kwargs)
            return args[0].copy_(plain(*weighed, **kwargs))
        if name == "__setitem__":  # what it leaves of the input is the input
            weighed = (args[0], *weighed[1:])
        return func(*weighed, **kwargs)

    def _weighed(self, argument: Any) -> Any:
        """The argument, or the input in it by its value."""
        if isinstance(argument, tuple | list) and any(map(self._is_input, argument)):
            return type(argument)(map(self._weighed, argument))
        return _weigh_input(argument, argument) if self._is_input(argument) else argument

    def fresh(self, x: Tensor) -> Tensor:
        """The input is no longer what it was once it is written into."""
        if not self._is_input(x):
            return super().fresh(x)
        self.given = [given for given in self.given if given is not x]
        return _weigh_input(x, x)

    def _is_input(self, x: Any) -> bool:
        return any(x is given for given in self.given)

    def _weigh(self, name: str) -> Callable[..., Tensor]:
        def weigh(
            plain: Callable[..., Tensor],
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            out = plain(x, weight, bias, *args, **kwargs)
            self.last_call -= 1
            if self.rule.contrast and self.last_call < 0:
                raise UnsupportedError(
                    f"`{self.rule}` cannot tell the last convolution of a network that runs parts "
                    "of its forward again, as checkpointing does."
                )
            if not x.requires_grad:
                return out
            self.met += 1

            def convolve(values: Tensor, weights: Tensor) -> Tensor:
                return plain(values, weights, None, *args, **kwargs)

            if bias is not None and name != "linear":  # whose channels are last
                bias = bias.reshape(1, -1, *(1,) * (out.ndim - 2))
            weighing = _Weighing(out, *self._contributions(convolve, x, weight), bias)
            negate = self.rule.contrast and self.last_call == 0
            if negate:
                weighing = weighing.negated()
            passed = self._passed(weighing, out, torch.ones(()).to(out), None)
            if negate:
                self.head = weighing.positive.grad_fn
            self.latest = weighing.handed_on(passed)
            return passed

        return weigh

    def _contributions(
        self, convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor], Literal["square", "signed", "positive", "nothing"]]:
        """For a positive and for a negative scale; and what the bias absorbs beside them."""
        is_input = self._is_input(x)
        kind = self.rule.convolutions
        if is_input and self.rule.first == "w2":
            squares = convolve(_weigh_input(x, torch.ones_like(x)), w**2)
            return squares, lambda: squares, "square"
        if is_input and self.rule.first == "zb":
            assert self.bounds is not None
            shape = (*self.bounds[0].shape, *(1,) * (x.ndim - 2))
            low, high = (b.to(x).reshape(shape).expand_as(x) for b in self.bounds)
            above, below = w.clamp(min=0), w.clamp(max=0)
            whole = convolve(_weigh_input(x, x), w)
            low, high = _weigh_input(x, low), _weigh_input(x, high)
            return (
                whole - convolve(low, above) - convolve(high, below),
                lambda: whole - convolve(low, below) - convolve(high, above),
                "nothing",
            )
        if kind == "epsilon":
            whole = convolve(_weigh_input(x, x) if is_input else x, w)
            return whole, lambda: whole, "signed"
        up, down = x.clamp(min=0), x.clamp(max=0)
        if is_input:
            up, down = _weigh_input(x, up), _weigh_input(x, down)
        above, below = w.clamp(min=0), w.clamp(max=0)
        signed = bool((x < 0).any())

        def both(with_up: Tensor, with_down: Tensor) -> Tensor:
            weighed = convolve(up, with_up)
            return weighed + convolve(down, with_down) if signed else weighed

        # each by itself: the whole less the positive would leave rounding where there is nothing
        return both(above, below), lambda: both(below, above), "positive"

    def _passed(
        self, weighing: _Weighing, value: Tensor, scale: Tensor, shift: Tensor | None
    ) -> Tensor:
        """The value of a convolution and its norm, passing relevance by its contributions."""
        if weighing.absorbs == "square":
            contributions = weighing.positive * scale**2
        elif bool((scale < 0).any()):
            contributions = torch.where(scale >= 0, weighing.positive, weighing.negative()) * scale
        else:
            contributions = weighing.positive * scale
        whole = contributions.detach()
        bias = weighing.bias * scale if weighing.bias is not None else None
        if shift is not None:
            bias = shift if bias is None else bias + shift
        if bias is not None and not self.rule.excitation:
            whole = whole + _absorbed(bias, weighing)
        share = value.detach() / stabilized(
            whole, _TINY if self.rule.excitation else self.rule.epsilon
        )
        return through(value, contributions * share)

    def _normalize(self, name: str) -> Callable[..., Tensor]:
        def normalize(plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = plain(x, *args, **kwargs)
            if not x.requires_grad:
                return y
            norm = Normalization.of(name, x, args, kwargs)
            if norm is None:
                return self._affine(x, y, *running_constants(name, x, args, kwargs))
            return self._affine(x, y, *norm.constants(x))

        return normalize

    def batch_norm(
        self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Merged with the convolution before it."""
        y = plain(x, *args, **kwargs)
        if not x.requires_grad:
            return y
        return self._affine(x, y, *running_constants("batch_norm", x, args, kwargs))

    def _affine(self, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        latest = self.latest
        if latest is not None and latest.gave(x):
            return self._passed(latest, y, scale, shift)
        return self._value_over(x, y)

    def clone(self, plain: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        """What a tap gives the network is still the convolution's answer."""
        y = plain(x, **kwargs)
        if self._is_input(x):
            self.given.append(y)
        latest = self.latest
        if latest is not None and latest.gave(x):
            self.latest = latest.handed_on(y)
        return y

    def passing(self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An activation passes its relevance on as it is."""
        x = self._weighed(x)
        y = plain(x, *args, **kwargs)
        return self._value_over(x, y) if x.requires_grad else y

    def _value_over(self, x: Tensor, y: Tensor) -> Tensor:
        return through(y, x * (y / stabilized(x, _TINY)).detach())

    def constant(
        self, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Shares of a softmax only weigh what they are multiplied with."""
        return plain(x, *args, **kwargs).detach()

    def quotient(self, plain: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Tensor:
        """The numerator gets all of the relevance."""
        a, b = self._weighed(a), self._weighed(b)
        return plain(a, b.detach() if isinstance(b, Tensor) else b, **kwargs)

    def attention(
        self,
        plain: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The values get all of the relevance; the shares only weigh them."""
        return plain(q.detach(), k.detach(), self._weighed(v), *args, **kwargs)

    def product(self, plain: Callable[..., Tensor], a: Any, b: Any, *args: Any) -> Tensor:
        """Each factor gets half of the relevance."""
        a, b = self._weighed(a), self._weighed(b)
        y = plain(a, b, *args)
        if not all(isinstance(x, Tensor) and x.requires_grad for x in (a, b)):
            return y
        return through(y, (plain(a, b.detach()) + plain(a.detach(), b)) / 2)

    def einsum(self, plain: Callable[..., Tensor], equation: str, *operands: Any) -> Tensor:
        """A product, if it has two factors."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if len(operands) == 2:
            return self.product(lambda a, b: plain(equation, a, b), *operands)
        return plain(equation, *map(self._weighed, operands))

    def sum(self, plain: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Tensor:
        """Of two that vary, the positive parts share."""
        a, b = self._weighed(a), self._weighed(b)
        y = plain(a, b, **kwargs)
        if not all(isinstance(x, Tensor) and x.requires_grad for x in (a, b)):
            return y
        above = a.clamp(min=0) + b.clamp(min=0)
        return through(y, above * (y / stabilized(above, _TINY)).detach())


def _absorbed(bias: Tensor, weighing: _Weighing) -> Tensor:
    """What the bias keeps of the relevance."""
    if weighing.absorbs == "square":
        return bias**2
    if weighing.absorbs == "nothing":
        return torch.zeros_like(bias)
    return bias if weighing.absorbs == "signed" else bias.clamp(min=0)


def _weigh_input(x: Tensor, by: Tensor) -> Tensor:
    """A value in the place of the input, whose gradient at the input is value times gradient."""
    by = by.detach().clone()  # the network may write into its input later
    return through(by, x * by)
