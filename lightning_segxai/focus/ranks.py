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
    values = values.detach().flatten()
    if values.dtype is torch.float64:
        order, larger = _argsorted(values.numpy())
    else:
        order, larger = _sorted_words(values.float().numpy())
    found = np.arange(order.size, dtype=np.float64)
    tied = ~larger
    tied[:-1] |= tied[1:]  # the first of a run of equal ones, too
    places = np.flatnonzero(tied)
    run = np.cumsum(larger[places]) - 1
    found[places] = (np.bincount(run, weights=places) / np.bincount(run))[run]
    result = np.empty_like(found)
    result[order] = found - (order.size - 1) / 2
    return torch.from_numpy(result)


def _argsorted(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the ascending numbers stand, and whether each is larger than the one before it."""
    order = np.argsort(numbers)
    ascending = numbers[order]
    return order, np.concatenate(([True], ascending[1:] > ascending[:-1]))


def _sorted_words(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_argsorted`, of float32 in half the time: numbers and places are sorted as one word.

    The bits of a float, read as an integer, are in the order of the floats, but that negative ones
    are in reverse until all bits below the sign are flipped.
    """
    bits = (numbers + np.float32(0.0)).view(np.int32)  # + 0.0: no negative zero
    words = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    words |= np.arange(numbers.size, dtype=np.int64)
    words.sort()
    ascending = words >> 32
    return words & 0xFFFFFFFF, np.concatenate(([True], ascending[1:] > ascending[:-1]))


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
