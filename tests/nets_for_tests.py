"""Tiny networks whose attributions can be worked out by hand, and volumes to go with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_segxai.passes import Look
from lightning_segxai.values import Probe
from lightning_segxai.windows import Windows


def seeded(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64 and eval mode, with weights that a seed gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net.double().eval()


def a_probe(
    shape=(8, 8, 8), channels=1, *, name="p", labeled=True, classes=2, seed=0, **extra: Any
) -> Probe:
    """A random float64 volume, with a random label."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn((channels, *shape), generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes, shape, generator=generator) if labeled else None
    return Probe(name, image, label, **extra)


class Weigh(nn.Module):
    """Logits are the input times a number for each class: attributions are known by hand."""

    def __init__(self, *weights: float, bias: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * self.weights[:, None, None, None] + self.bias


class Power(nn.Module):
    """Two logits: zero, and the input to a power."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x**self.exponent], dim=1)


def linear_net(channels: int = 1, classes: int = 2, bias: bool = False) -> nn.Module:
    """Two convolutions and nothing between them."""
    return seeded(
        nn.Sequential(
            nn.Conv3d(channels, 2, 3, padding=1, bias=bias),
            nn.Conv3d(2, classes, 3, padding=1, bias=bias),
        )
    )


class Layered(nn.Module):
    """A body that halves the resolution, and a linear tail that brings it back."""

    def __init__(self, channels: int = 1, classes: int = 2, rectified: bool = False) -> None:
        super().__init__()
        act = nn.ReLU if rectified else nn.Tanh
        self.body = nn.Sequential(
            nn.Conv3d(channels, 3, 3, padding=1),
            act(),
            nn.AvgPool3d(2),
            nn.Conv3d(3, 4, 3, padding=1),
        )
        self.act = nn.ELU()
        self.tail = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(4, classes, 3, padding=1))

    def deep(self, x: Tensor) -> Tensor:
        return self.act(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.deep(x))


def layered(channels: int = 1, classes: int = 2, rectified: bool = False) -> Layered:
    net = seeded(Layered(channels, classes, rectified))
    assert isinstance(net, Layered)
    return net


class Answers(nn.Module):
    """Gives its logits in one of the forms that networks use."""

    def __init__(self, form: str, classes: int = 2) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv3d(1, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        logits = self.conv(x)
        coarse = F.avg_pool3d(logits, 2)
        return {
            "tensor": lambda: logits,
            "tuple": lambda: (logits, coarse),
            "coarse first": lambda: [coarse, logits],
            "list": lambda: [logits, coarse],
            "dict": lambda: {"name": "net", "coarse": coarse, "out": logits},
            "nested": lambda: {"features": coarse.mean(), "heads": (coarse, [logits])},
            "stacked": lambda: torch.stack([logits, logits * 0, logits * 7], dim=1),
            "coarse": lambda: coarse,
            "coarse tuple": lambda: (coarse, coarse),
            "features": lambda: (logits * 0 + 5, logits),
        }[self.form]()


class Normed(nn.Module):
    """BatchNorm that a fine-tuner froze, BatchNorm, InstanceNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.frozen = nn.BatchNorm3d(2)
        self.batch = nn.BatchNorm3d(2)
        self.instance = nn.InstanceNorm3d(2, affine=True)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv3d(2, 2, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("ghost", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.batch(self.frozen(self.conv(x))))
        return self.head(self.drop(self.act(x)))


def normed() -> Normed:
    """It trains, all but a BatchNorm and a convolution that are frozen."""
    net = seeded(Normed()).train()
    assert isinstance(net, Normed)
    net.frozen.eval()
    net.conv.requires_grad_(False)
    return net


class InPlace(nn.Module):
    """A convolution with an activation behind it that may overwrite its output."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 3, padding=1)
        self.act = nn.ReLU(inplace=inplace)
        self.head = nn.Conv3d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)))


class Reused(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)
        self.head = nn.Conv3d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x).tanh()))


class Halving(nn.Module):
    """Halves four times and doubles four times; refuses what it cannot halve; has odd layers."""

    def __init__(self, least: int = 8) -> None:
        super().__init__()
        self.least = least
        self.first = nn.Conv3d(1, 2, 3, padding=1)
        self.pool = nn.MaxPool3d(2)
        self.squeeze = nn.AdaptiveAvgPool3d(1)
        self.flat = nn.Flatten()
        self.head = nn.Conv3d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if any(size % self.least for size in x.shape[2:]):
            raise ValueError(f"sizes must be multiples of {self.least}, but got {x.shape[2:]}")
        x = self.first(x)
        coarse = self.pool(x)
        gate = self.flat(self.squeeze(coarse))[:, :, None, None, None]
        return self.head(F.interpolate(coarse, scale_factor=2) * gate)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: dict[str, int]) -> Tensor:
        ctx.counts = counts
        counts["forward"] += len(x)
        counts["calls"] += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.counts["backward"] += len(gradient)
        return gradient, None


class Tally:
    """Counts that outlive the guard, which restores containers of a network."""

    def __init__(self, **counts: int) -> None:
        self.update(**counts)

    def update(self, **counts: int) -> None:
        vars(self).update(counts)

    def __getitem__(self, name: str) -> int:
        return vars(self)[name]

    def __setitem__(self, name: str, count: int) -> None:
        vars(self)[name] = count


class Counting(nn.Module):
    """Counts the batch items that go through it, forward and backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.counts = Tally(forward=0, backward=0, calls=0)

    def forward(self, x: Tensor) -> Any:
        return self.net(_Count.apply(x, self.counts))


class Metered(nn.Module):
    """Counts batch items forward, and backward at its output: whatever the gradient is for.

    It has no function of its own, so rules that look into a network see what they would without.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.counts = Tally(forward=0, backward=0, calls=0)

    def forward(self, x: Tensor) -> Tensor:
        counts = self.counts
        counts["forward"] += len(x)
        counts["calls"] += 1
        logits = self.net(x)

        def note(gradient: Tensor) -> None:
            counts["backward"] += len(gradient)

        if logits.requires_grad:
            logits.register_hook(note)
        return logits


class Hungry(nn.Module):
    """Has memory for batches of a size only."""

    def __init__(self, net: nn.Module, room: int, error: Exception, backward: bool = False) -> None:
        super().__init__()
        self.net = net
        self.room = room
        self.error = error
        self.backward = backward
        self.refused = 0

    def forward(self, x: Tensor) -> Any:
        if len(x) > self.room:
            if not self.backward:
                self._refuse()
            if x.requires_grad:
                x.register_hook(lambda _: self._refuse())
        return self.net(x)

    def _refuse(self) -> None:
        self.refused += 1
        raise type(self.error)(*self.error.args)


def blended(
    net: nn.Module, x: Tensor, window: tuple[int, int, int] | None, overlap: float = 0.5
) -> Tensor:
    """Logits of a volume ``c i j k`` by windows, written down plainly; differentiable."""
    return sum(share * logits for share, logits, _ in pieces(net, x, window, overlap))


def pieces(
    net: nn.Module, x: Tensor, window: tuple[int, int, int] | None, overlap: float = 0.5
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each window its share, its logits in a volume of zeros, and its layer ``net.deep``."""
    shape = tuple(x.shape[1:])
    windows = Windows(shape, window or shape, overlap)
    found = []
    for place in windows.places:
        piece = x[(slice(None), *place)]
        i, j, k = piece.shape[1:]
        wi, wj, wk = window or (i, j, k)
        padded = F.pad(piece[None], [0, wk - k, 0, wj - j, 0, wi - i], mode="replicate")
        deep = net.deep(padded) if isinstance(net, Layered) else padded
        logits = net.tail(deep) if isinstance(net, Layered) else net(padded)
        share = torch.zeros(shape, dtype=x.dtype)
        share[place] = windows.share(place, x.dtype)
        whole = torch.zeros((logits.shape[1], *shape), dtype=x.dtype)
        whole[(slice(None), *place)] = logits[0, :, :i, :j, :k]
        found.append((share, whole, deep))
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    """Assert equality, relative to the largest value."""
    assert a.shape == b.shape
    scale = float(b.abs().amax())
    assert scale > 0
    assert float((a - b).abs().amax()) <= tolerance * scale


def no_look(_: Look) -> None:
    """Sees nothing."""
