"""Where in a volume a probe is worth its passes: full of vessels, thin ones, bifurcations."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from lightning_segxai.values import Shape
from lightning_segxai.vessels import centerline, largest_lack

Center = tuple[int, int, int]
"""The voxel in the middle of a probe."""

_SEGMENT_VOXELS = 5  # shorter pieces of a centerline are spurs of the thinning


def thinnest_centers(
    label: Shaped[Tensor, "i j k"],
    spacing_mm: tuple[float, float, float],
    size: Shape,
    count: int,
) -> list[Center]:
    """The middles of the thinnest vessel segments, at most ``count``, half a patch apart."""
    line = centerline(label > 0, spacing_mm)
    middles: list[tuple[float, Center]] = []
    for segment in line.segment.unique().tolist():
        mine = line.segment == segment
        if segment and int(mine.sum()) >= _SEGMENT_VOXELS:
            ijk = line.ijk[mine]
            middle = ijk[(ijk - ijk.double().mean(0)).norm(dim=1).argmin()]
            middles.append((float(line.radius_mm[mine][0]), _center(middle)))
    return _spread([center for _, center in sorted(middles)], size, count)


def bifurcation_centers(
    label: Shaped[Tensor, "i j k"],
    spacing_mm: tuple[float, float, float],
    size: Shape,
    count: int,
) -> list[Center]:
    """The bifurcations of the thickest vessels, at most ``count``, half a patch apart."""
    line = centerline(label > 0, spacing_mm)
    radius = line.radius_mm[line.bifurcations]
    order = radius.argsort(descending=True, stable=True)
    centers = [_center(ijk) for ijk in line.ijk[line.bifurcations][order]]
    return _spread(centers, size, count)


def missed_centers(
    label: Shaped[Tensor, "i j k"], predicted: Shaped[Tensor, "i j k"], count: int
) -> list[tuple[int, Center]]:
    """The largest pieces of vessel that a prediction lacks, at most ``count``: voxels and middle.

    See `largest_lack` for what a piece is.
    """
    truth, found = label > 0, predicted > 0
    pieces: list[tuple[int, Center]] = []
    while len(pieces) < count:
        piece = largest_lack(truth, found)
        ijk = torch.nonzero(piece)
        if not len(ijk):
            break
        middle = ijk[(ijk - ijk.double().mean(0)).norm(dim=1).argmin()]
        pieces.append((len(ijk), _center(middle)))
        found |= piece
    return pieces


def _spread(ranked: list[Center], size: Shape, count: int) -> list[Center]:
    """The first of a ranked list that lie at least half a patch apart along some axis."""
    edge = torch.tensor(size)
    chosen: list[Center] = []
    for center in ranked:
        if len(chosen) == count:
            break
        here = torch.tensor(center)
        if all(bool(((here - torch.tensor(c)).abs() * 2 >= edge).any()) for c in chosen):
            chosen.append(center)
    return chosen


def _center(ijk: Int[Tensor, "3"]) -> Center:
    i, j, k = ijk.tolist()
    return i, j, k


def vessel_centers(
    label: Shaped[Tensor, "i j k"], size: Shape, count: int
) -> list[tuple[int, int, int]]:
    """Centers of the patches that hold the most vessel, at most ``count`` of them, distinct.

    The first is the fullest patch around any vessel voxel, each next one the fullest at least
    half a patch away from those before along some axis, then a quarter. A label without vessels
    gives the middle of the volume. No random number is drawn.
    """
    shape = tuple(label.shape)
    vessels = torch.nonzero(label > 0)
    if not len(vessels):
        return [(shape[0] // 2, shape[1] // 2, shape[2] // 2)][:count]
    edge = torch.tensor([min(s, n) for s, n in zip(size, shape, strict=True)])
    starts = torch.minimum((vessels - edge // 2).clamp_min(0), torch.tensor(shape) - edge)
    held = _held(label > 0, starts, edge)
    chosen: list[int] = []
    for apart in (0.5, 0.25):
        free = torch.ones(len(starts), dtype=torch.bool)
        for c in chosen:
            free &= _apart(starts, c, edge) >= apart
        while len(chosen) < count and bool(free.any()):
            best = int(torch.where(free, held, -1).argmax())
            chosen.append(best)
            free &= _apart(starts, best, edge) >= apart
    i_j_k = ((starts[c] + edge // 2).tolist() for c in chosen)
    return [(i, j, k) for i, j, k in i_j_k]


def _apart(starts: Tensor, which: int, edge: Tensor) -> Tensor:
    return ((starts - starts[which]).abs() / edge).amax(dim=1)


def _held(vessel: Bool[Tensor, "i j k"], starts: Tensor, edge: Tensor) -> Tensor:
    """Vessel voxels in the patch from each start, by a summed-area table."""
    table = F.pad(vessel.int(), (1, 0, 1, 0, 1, 0))
    for axis in range(3):
        table = table.cumsum(axis, dtype=torch.int32)
    held = torch.zeros(len(starts), dtype=torch.int32)
    for corner in product((0, 1), repeat=3):
        i, j, k = (starts + edge * torch.tensor(corner)).T
        held += (-1) ** (3 - sum(corner)) * table[i, j, k]
    return held
