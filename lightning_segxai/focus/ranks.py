"""The order of a map's voxels, and how much of it maps have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.values import Attribution


def ranks(values: Float[Tensor, "i j k"]) -> Float[Tensor, " voxels"]:
    """The rank of each voxel, tied ones given their mean rank, less the mean of all ranks."""
    # Ranks need no float64, and narrow types sort faster; only bfloat16 is unknown to numpy.
    values = values.detach().flatten()
    numbers = (values.float() if values.dtype is torch.bfloat16 else values).numpy()
    order = np.argsort(numbers)
    ordered = numbers[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(starts, append=ordered.size)
    found = np.empty(ordered.size)
    found[order] = np.repeat(starts + (sizes - ordered.size) / 2, sizes)
    return torch.from_numpy(found)


def correlation(one: Float[Tensor, " voxels"], other: Float[Tensor, " voxels"]) -> float | None:
    """Spearman correlation from two results of `ranks`; None where one of them has no order."""
    size = math.sqrt(float(one @ one)) * math.sqrt(float(other @ other))
    return None if size == 0.0 else min(1.0, max(-1.0, float(one @ other) / size))


def similarity(attribution: Attribution, reference: Attribution) -> float | None:
    """Spearman correlation of ``|a|`` and ``|b|``; None where one is the same everywhere."""
    return correlation(ranks(attribution.values.abs()), ranks(reference.values.abs()))


def agreement(attributions: Sequence[Attribution]) -> list[float | None]:
    """How far each map of one cell agrees with those of the other methods, in [-1, 1].

    The mean Spearman correlation of ``|a|`` with each of the others. Methods that agree may still
    all be wrong; where they do not, at most one of them is right.

    Args:
        attributions: Maps of the same target on the same probe, finite, not zero everywhere.

    Returns:
        One number for each; None for a map that is the same everywhere, and without another one.

    References:
        Krishna et al., "The disagreement problem in explainable machine learning", TMLR 2024,
        arXiv:2202.01602.
    """
    ordered = [ranks(attribution.values.abs()) for attribution in attributions]
    means: list[float | None] = []
    for n, own in enumerate(ordered):
        found = [correlation(own, other) for m, other in enumerate(ordered) if m != n]
        known = [value for value in found if value is not None]
        means.append(math.fsum(known) / len(known) if known else None)
    return means
