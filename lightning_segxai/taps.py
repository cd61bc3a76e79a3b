"""Layers: finding them by name, keeping their outputs, and bringing their maps to the input's grid.

A tap never disturbs the network, whatever in-place activation stands behind the layer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_segxai.scored import Predictor, Rehearsal, ScoredModel, in_pieces
from lightning_segxai.values import Map, Shape, Volume
from lightning_segxai.windows import Place


class tapped:  # noqa: N801 - a context manager reads like a verb
    """Keep the outputs of layers during a forward, without disturbing it.

    The network gets a clone and the original is kept, so that an in-place activation behind the
    layer cannot overwrite it. A layer that is called again keeps its last call.
    """

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        self.modules = {name: module.get_submodule(name) for name in sorted(names)}
        self.calls = dict.fromkeys(self.modules, 0)

    def __enter__(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                kept[name] = output
                self.calls[name] += 1
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
        ValueError: if there is no such layer, its name fits several, or its output is no volume.
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
    fits = [name for name in volumes if f".{name}.".count(f".{layer}.")]
    if len(fits) > 1:
        raise ValueError(
            f'`layer="{layer}"` fits {len(fits)} layers of `{network}`: {", ".join(fits[:8])}. '
            "Give the whole path of one."
        )
    close = fits or difflib.get_close_matches(layer, volumes, n=5, cutoff=0.3) or list(volumes)[:5]
    raise ValueError(
        f'`layer="{layer}"`: no such layer in `{network}`. Layers close to it: {", ".join(close)}.'
    )


@torch.no_grad()
def project(model: ScoredModel, x: Volume, layer: str, weights: Float[Tensor, " channels"]) -> Map:
    """A weighted sum of a layer's channels, each window's on the input's grid, blended.

    One forward for each window.
    """
    windows = model.predictor.windows(x.shape[1:])
    blended = x.new_zeros(x.shape[1:])
    for place, activation, padded in activations(model.predictor, x, layer):
        part = to_window(weighted(activation.to(x.dtype), weights), padded, place)
        blended[place] += part * windows.share(place, x.dtype).to(x.device)
    return blended


def activations(
    predictor: Predictor, x: Volume, layer: str
) -> Iterator[tuple[Place, Float[Tensor, "channels p q r"], Shape]]:
    """What a layer says in each window: its place, the activation, and the padded window's shape.

    One forward for each window, made when it is asked for.
    """
    windows = predictor.windows(x.shape[1:])
    rehearsal = predictor.rehearse(x[(slice(None), *windows.places[0])])
    name = resolve_layer(predictor, rehearsal, layer)

    def look(batch: list[Place]) -> Tensor:
        with torch.no_grad(), tapped(predictor.module, {name}) as taps:
            predictor.window_logits(torch.stack([x[(slice(None), *p)] for p in batch]))
        return taps[name]

    for batch, found in in_pieces(windows.places, predictor.batch(windows.places[0]), look):
        for place, activation in zip(batch, found, strict=True):
            yield place, widened(activation), rehearsal.padded


def widened(x: Tensor) -> Tensor:
    """Half precision in float32: sums over a layer overflow in it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def weighted(channels: Float[Tensor, "c i j k"], weights: Float[Tensor, " c"]) -> Map:
    """The sum of channels, each times its weight."""
    return torch.einsum("cijk,c->ijk", channels, weights)


def to_window(values: Float[Tensor, "p q r"], padded: Shape, place: Place) -> Map:
    """A layer's map on the grid of its window: trilinear, cropped where the window was padded."""
    i, j, k = (s.stop - s.start for s in place)
    if values.shape != padded:
        values = F.interpolate(values[None, None], padded, mode="trilinear")[0, 0]
    return values[:i, :j, :k]


def spread(values: Float[Tensor, "p q r"], padded: Shape, place: Place) -> Map:
    """A layer's map on the grid of its window, its sum kept: for maps that share out a score.

    Trilinear, with each voxel of the layer given away whole; what falls into the padding goes to
    the last voxel before it, whose copy the padding is.

    >>> spread(torch.ones(1, 1, 2), (1, 1, 4), (slice(0, 1), slice(0, 1), slice(0, 3))).tolist()
    [[[0.5, 0.5, 1.0]]]
    """
    i, j, k = (
        _shares(size, wide, s.stop - s.start).to(values)
        for size, wide, s in zip(values.shape, padded, place, strict=True)
    )
    return torch.einsum("pqr,pi,qj,rk->ijk", values, i, j, k)


def _shares(size: int, padded: int, cropped: int) -> Float[Tensor, "from to"]:
    """How the voxels of an axis are shared out over a longer or shorter one; rows sum to one."""
    rows = torch.eye(size, dtype=torch.float64)[:, None]
    if size != padded:
        rows = F.interpolate(rows, padded, mode="linear")
    shares = rows[:, 0] / rows[:, 0].sum(dim=1, keepdim=True).clamp_min(1e-12)
    # a much coarser grid may skip a voxel of the layer altogether: it goes to the nearest
    for lost in torch.nonzero(shares.sum(dim=1) < 0.5).flatten().tolist():
        shares[lost, min(padded - 1, int((lost + 0.5) * padded / size))] = 1.0
    kept = shares[:, :cropped].clone()
    kept[:, -1] += shares[:, cropped:].sum(dim=1)
    return kept
