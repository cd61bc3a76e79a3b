"""The passes through the network, made once and shared by all methods that ask for the same ones.

Most attribution methods are functions of the same few forward and backward passes. A *trajectory*
says at which inputs the network is looked at; a `Look` is what one pass of one window showed:
the gradient of the target's score with respect to the input and, for tapped layers, activation and
gradient. Looks are folded one by one and forgotten, so memory grows neither with the steps of a
path nor with the number of windows.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_segxai.baselines import Baseline
from lightning_segxai.scored import Predictor, Rehearsal, ScoredModel, in_pieces
from lightning_segxai.values import Logits, Map, Probe, Volume
from lightning_segxai.windows import Place


@dataclass(frozen=True, eq=False)
class Point:
    """An input at which the network is looked at.

    Args:
        input: The whole volume that the network is given.
        origin: The volume explained there: the probe's image, or a noisy copy of it.
        baseline: Where the path comes from, on a path.
        weight: Weight of this point in the path's mean.
    """

    input: Volume
    origin: Volume
    baseline: Volume | None = None
    weight: float = 1.0


class Trajectory(ABC):
    """The inputs at which a method looks at the network. Equal trajectories are walked once."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of points."""

    @abstractmethod
    def points(self, x: Volume, probe: Probe, generator: torch.Generator) -> Iterator[Point]:
        """The points, made one by one."""


@dataclass(frozen=True)
class Here(Trajectory):
    """The volume itself."""

    @property
    def count(self) -> int:
        """Number of points."""
        return 1

    def points(self, x: Volume, probe: Probe, generator: torch.Generator) -> Iterator[Point]:
        """The volume itself."""
        yield Point(x, x)


@dataclass(frozen=True)
class Line(Trajectory):
    """Points on the straight line from a baseline, at the nodes of Gauss-Legendre quadrature."""

    steps: int
    baseline: Baseline

    @property
    def count(self) -> int:
        """Number of points."""
        return self.steps

    def points(self, x: Volume, probe: Probe, generator: torch.Generator) -> Iterator[Point]:
        """From near the baseline to near the volume; the weights sum to one."""
        start = self.baseline.make(x, probe.spacing_mm, generator)
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        for node, weight in zip(nodes, weights, strict=True):
            along = start + float(node + 1) / 2 * (x - start)
            yield Point(along, x, start, float(weight) / 2)


@dataclass(frozen=True)
class Cloud(Trajectory):
    """Noisy copies of the volume, each with a trajectory of its own."""

    samples: int
    noise: float
    inner: Trajectory

    @property
    def count(self) -> int:
        """Number of points."""
        return self.samples * self.inner.count

    def points(self, x: Volume, probe: Probe, generator: torch.Generator) -> Iterator[Point]:
        """The inner trajectory's points around each copy, copy after copy."""
        deviation = self.noise * (x.amax() - x.amin())
        for _ in range(self.samples):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
            yield from self.inner.points(x + deviation * noise, probe, generator)


@dataclass(frozen=True, eq=False)
class LayerLook:
    """What one look showed of a layer."""

    activation: Float[Tensor, "c i j k"]
    gradient: Float[Tensor, "c i j k"]


@dataclass(frozen=True, eq=False)
class Look:
    """What one pass of one window showed, for one target.

    Args:
        point: Where the network was looked at.
        place: Where the window lies in the volume.
        gradient: Gradient of the score with respect to this window of the input. The window's
            share in the blended prediction is in it: over windows, gradients add up.
        layers: Activation and gradient of each layer, under the name it was asked for.
        complete: Whether this was the last window of the point.
        padded: The shape that the window was padded to for the network.
    """

    point: Point
    place: Place
    gradient: Float[Tensor, "c i j k"]
    layers: Mapping[str, LayerLook]
    complete: bool
    padded: tuple[int, int, int]

    @property
    def at(self) -> tuple[slice, slice, slice, slice]:
        """Index of the window in a volume with channels."""
        return (slice(None), *self.place)

    @property
    def whole(self) -> bool:
        """Whether the window is the whole volume."""
        return self.gradient.shape == self.point.origin.shape


class Fold(Protocol):
    """One map in the making: the target it is of, and what it does with a look."""

    @property
    def model(self) -> ScoredModel:
        """The network seen through the target."""
        ...

    def see(self, look: Look) -> None:
        """Fold one look in."""
        ...


Aim = Callable[[Logits], Sequence[Fold]]
"""Gives the folds of one walk, from the logits of the first window of its first point."""


def walk(
    predictor: Predictor,
    probe: Probe,
    x: Volume,
    trajectory: Trajectory,
    layers: tuple[str, ...],
    aim: Aim,
    generator: torch.Generator,
) -> None:
    """Walk a trajectory once, window by window, and let every fold see every look.

    One forward for each window of each point, and one backward for each target that is asked for.

    Args:
        predictor: The network.
        probe: Whose geometry baselines need.
        x: The volume to explain.
        trajectory: Where to look.
        layers: Layers to tap, as users name them.
        aim: Gives the folds.
        generator: Seeded; for noise.
    """
    windows = predictor.windows(x.shape[1:])
    last = windows.places[-1]
    rehearsal = predictor.rehearse(x[(slice(None), *windows.places[0])])
    resolved = {layer: resolve_layer(predictor, rehearsal, layer) for layer in layers}
    work = (
        (point, place)
        for point in trajectory.points(x, probe, generator)
        for place in windows.places
    )
    folds: Sequence[Fold] | None = None
    models: list[ScoredModel] = []

    def look(batch: list[tuple[Point, Place]]) -> tuple[dict[str, Tensor], list[_Gradients]]:
        nonlocal folds, models
        inputs = torch.stack([point.input[(slice(None), *place)] for point, place in batch])
        seen = _see(predictor, inputs, resolved)
        if folds is None:
            folds = aim(seen.logits[0].detach())
            models = list({id(fold.model): fold.model for fold in folds}.values())
        gradients = [
            seen.gradients(
                torch.stack([model.window_weights(windows, place) for _, place in batch]),
                keep=model is not models[-1],
            )
            for model in models
        ]
        return {name: a.detach() for name, a in seen.activations.items()}, gradients

    for batch, (activations, gradients) in in_pieces(
        work, predictor.batch(windows.places[0]), look
    ):
        if not folds:
            return
        predictor.passes.backward += len(batch) * len(models)
        for n, (point, place) in enumerate(batch):
            for model, (by_input, by_layer) in zip(models, gradients, strict=True):
                shown = Look(
                    point,
                    place,
                    by_input[n],
                    {name: LayerLook(activations[name][n], by_layer[name][n]) for name in layers},
                    place == last,
                    rehearsal.padded,
                )
                for fold in folds:
                    if fold.model is model:
                        fold.see(shown)


_Gradients = tuple[Tensor, dict[str, Tensor]]
"""Of each window's score: with respect to its input, and to its layers."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A forward pass with its graph."""

    inputs: Tensor
    logits: Tensor
    activations: dict[str, Tensor]

    def gradients(self, weights: Tensor, keep: bool) -> _Gradients:
        """Gradients of each window's score with respect to its input and its layers."""
        if not self.logits.requires_grad:
            raise RuntimeError(
                "the network's output has no gradient with respect to its input: it detaches, "
                "rounds, or runs under no_grad"
            )
        wanted = [self.inputs, *self.activations.values()]
        found = iter(
            torch.autograd.grad(
                (weights * self.logits).sum(),
                [t for t in wanted if t.requires_grad],  # a detached branch's layer does not
                retain_graph=keep,
                allow_unused=True,
            )
        )
        filled = []
        for tensor in wanted:
            gradient = next(found) if tensor.requires_grad else None
            filled.append(torch.zeros_like(tensor) if gradient is None else gradient)
        return filled[0], dict(zip(self.activations, filled[1:], strict=True))


def _see(predictor: Predictor, inputs: Tensor, resolved: Mapping[str, str]) -> _Seen:
    inputs = inputs.detach().requires_grad_()
    with tapped(predictor.module, set(resolved.values())) as taps:
        logits = predictor.window_logits(inputs)
    return _Seen(inputs, logits, {asked: taps[name] for asked, name in resolved.items()})


class tapped:  # noqa: N801 - a context manager reads like a verb
    """Keep the outputs of layers during a forward, without disturbing it.

    The network gets a clone and the original is kept, so that an in-place activation behind the
    layer cannot overwrite it. A layer that is called again keeps its last call.
    """

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        self.modules = {name: module.get_submodule(name) for name in sorted(names)}

    def __enter__(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                kept[name] = output
                return output.clone()

            return hook

        self.handles = [m.register_forward_hook(keep(name)) for name, m in self.modules.items()]
        return kept

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def resolve_layer(predictor: Predictor, rehearsal: Rehearsal, layer: str) -> str:
    """The module's dotted path for a layer that a user named.

    Args:
        predictor: The network.
        rehearsal: What its layers give for a window.
        layer: A dotted path, or ``auto``: the last module, in execution order, with the smallest
            spatial output of at least four voxels along each axis.

    Raises:
        ValueError: if there is no such layer, or its output is no volume.
    """
    network = type(predictor.module).__name__
    volumes = {name: shape for name, shape in rehearsal.layers.items() if len(shape) == 5}
    if layer == "auto":
        sizes = {
            name: math.prod(shape[2:]) for name, shape in volumes.items() if min(shape[2:]) >= 4
        }
        if not sizes:
            raise ValueError(
                f'`layer="auto"` needs a layer of at least 4 x 4 x 4 voxels, but `{network}` has '
                f"none for a window of {rehearsal.padded}. Name a layer."
            )
        smallest = min(sizes.values())
        return [name for name, size in sizes.items() if size == smallest][-1]
    if layer in volumes:
        return layer
    if layer in rehearsal.layers:
        raise ValueError(
            f'`layer="{layer}"` of `{network}` gives a tensor of shape '
            f"{tuple(rehearsal.layers[layer])}, but a volume (b, c, i, j, k) is needed."
        )
    close = difflib.get_close_matches(layer, volumes, n=5, cutoff=0.3) or list(volumes)[:5]
    raise ValueError(
        f'`layer="{layer}"`: no such layer in `{network}`. Layers close to it: {", ".join(close)}.'
    )


@torch.no_grad()
def project(model: ScoredModel, x: Volume, layer: str, weights: Float[Tensor, " channels"]) -> Map:
    """A weighted sum of a layer's channels, each window's on the input's grid, blended.

    One forward for each window.
    """
    predictor = model.predictor
    windows = predictor.windows(x.shape[1:])
    rehearsal = predictor.rehearse(x[(slice(None), *windows.places[0])])
    name = resolve_layer(predictor, rehearsal, layer)
    blended = x.new_zeros(x.shape[1:])

    def look(batch: list[Place]) -> Tensor:
        with tapped(predictor.module, {name}) as taps:
            predictor.window_logits(torch.stack([x[(slice(None), *p)] for p in batch]))
        return taps[name]

    for batch, activations in in_pieces(windows.places, predictor.batch(windows.places[0]), look):
        for place, activation in zip(batch, activations, strict=True):
            part = to_window(weighted(activation.to(x.dtype), weights), rehearsal.padded, place)
            blended[place] += part * windows.share(place, x.dtype).to(x.device)
    return blended


def weighted(channels: Float[Tensor, "c i j k"], weights: Float[Tensor, " c"]) -> Map:
    """The sum of channels, each times its weight."""
    return torch.einsum("cijk,c->ijk", channels, weights)


def to_window(values: Float[Tensor, "p q r"], padded: tuple[int, int, int], place: Place) -> Map:
    """A layer's map on the grid of its window: trilinear, cropped where the window was padded."""
    i, j, k = (s.stop - s.start for s in place)
    if values.shape != padded:
        values = F.interpolate(values[None, None], padded, mode="trilinear")[0, 0]
    return values[:i, :j, :k]
