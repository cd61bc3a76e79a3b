"""Random parts of a volume, what a map says of them, and what their loss does to the score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.faithfulness.base import together
from lightning_segxai.methods.hiding import Veil
from lightning_segxai.scored import in_pieces
from lightning_segxai.values import Map, Mask, Shape


def random_parts(
    shape: Shape, samples: int, share: float, block: int, generator: torch.Generator
) -> Iterator[Mask]:
    """The voxels of each random part: a share of the cubes that the volume is cut into.

    Args:
        shape: Voxels of the volume.
        samples: Number of parts.
        share: Share of the cubes that are in a part; at least one is.
        block: Edge of a cube in voxels; at the far faces of the volume they may be cut.
        generator: Source of the draws.
    """
    i, j, k = shape
    cubes = [math.ceil(n / block) for n in (i, j, k)]
    total = math.prod(cubes)
    count = min(max(1, round(share * total)), total)
    for _ in range(samples):
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[torch.randperm(total, generator=generator)[:count]] = True
        part = chosen.reshape(cubes)
        for axis in range(3):
            part = part.repeat_interleave(block, dim=axis)
        yield part[:i, :j, :k]


def said_and_done(
    veil: Veil, values: Map, parts: Iterable[Mask]
) -> tuple[Float[Tensor, " parts"], Float[Tensor, " parts"], float]:
    """The map's sum over each part, what the score loses with it, and the score itself."""

    def look(hidden: list[Mask]) -> Tensor:
        return veil.score(~torch.stack(hidden).to(veil.x.device)).double().cpu()

    whole = look([torch.zeros(values.shape, dtype=torch.bool)])[0]
    sums: list[Tensor] = []
    effects: list[Tensor] = []
    for hidden, scores in in_pieces(parts, together(veil.model), look):
        sums += [values[part].sum() for part in hidden]
        effects += list(whole - scores)
    return torch.stack(sums), torch.stack(effects), float(whole)
