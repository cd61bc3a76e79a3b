"""Patches of a subject: cut, drawn at random for training, laid out or chosen for looking."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
import torchio as tio
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from lightning_segxai.values import Shape


def start_around(center: Sequence[int], size: Shape, shape: Sequence[int]) -> Shape:
    """First voxel of the patch around ``center``, moved inside the volume where it fits.

    Along an axis where the volume is shorter than the patch, the volume lies in its middle.

    >>> start_around((0, 50, 3), (32, 32, 8), (100, 100, 4))
    (0, 34, -2)
    """
    i, j, k = (
        min(max(c - s // 2, 0), n - s) if n >= s else -((s - n) // 2)
        for c, s, n in zip(center, size, shape, strict=True)
    )
    return i, j, k


def cut(subject: tio.Subject, start: Shape, size: Shape) -> tio.Subject:
    """The patch of ``size`` voxels from ``start``, its affine moved along; draws no random number.

    Outside of the volume an image continues with its minimum and a label map with 0.
    """
    shape = subject.spatial_shape
    inside = tuple(
        slice(max(a, 0), min(a + s, n)) for a, s, n in zip(start, size, shape, strict=True)
    )
    margins = [
        m
        for a, s, n in zip(start[::-1], size[::-1], shape[::-1], strict=True)
        for m in (max(-a, 0), max(a + s - n, 0))
    ]
    patch: dict[str, object] = {}
    for key, value in subject.items():
        if not isinstance(value, tio.Image):
            patch[key] = value
            continue
        is_label = isinstance(value, tio.LabelMap)
        data = value.data[(slice(None), *inside)].clone()
        if any(margins):
            fill = 0 if is_label else value.data.min().item()
            data = F.pad(data, margins, value=fill)
        affine = value.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        patch[key] = (tio.LabelMap if is_label else tio.ScalarImage)(tensor=data, affine=affine)
    patch["location"] = torch.tensor([*start, *(a + s for a, s in zip(start, size, strict=True))])
    found = tio.Subject(patch)
    found.applied_transforms = list(subject.applied_transforms)
    return found


class BalancedSampler(tio.data.PatchSampler):
    """Patches in turn around a vessel voxel and anywhere, in equal numbers.

    Vessels are 0.15 to 0.8 % of a ToF volume, and patches drawn anywhere would mostly train on
    the rest. Unlike TorchIO's ``LabelSampler`` it takes volumes without a label, labels within
    half a patch of the border, and volumes smaller than the patch, which ``cut`` pads.

    Args:
        patch_size: Voxels along i, j, k.
    """

    def __init__(self, patch_size: Shape) -> None:
        super().__init__(patch_size)
        self.size = patch_size

    def __call__(
        self, subject: tio.Subject, num_patches: int | None = None
    ) -> Generator[tio.Subject]:
        """Patches without end, or ``num_patches`` of them."""
        shape = subject.spatial_shape
        vessels = torch.nonzero(subject.get_image("label").data[0] > 0)
        n = 0
        while num_patches is None or n < num_patches:
            if n % 2 == 0 and len(vessels):
                center = vessels[int(torch.randint(len(vessels), ()))].tolist()
                start = start_around(center, self.size, shape)
            else:
                i, j, k = (
                    int(torch.randint(a - s + 1, ())) if a >= s else -((s - a) // 2)
                    for a, s in zip(shape, self.size, strict=True)
                )
                start = i, j, k
            yield cut(subject, start, self.size)
            n += 1


class Augmented(Dataset[tio.Subject]):
    """Patches of a queue, each changed by a transform of its own.

    On the patch rather than on the volume: 4 ms against 80 ms, and patches of one volume differ.
    """

    def __init__(self, queue: tio.Queue, transform: tio.Transform) -> None:
        self.queue = queue
        self.transform = transform

    def __len__(self) -> int:
        return len(self.queue)

    def __getitem__(self, index: int) -> tio.Subject:
        patch: tio.Subject = self.queue[index]
        return self.transform(patch)


class Tiles(Dataset[tio.Subject]):
    """Patches side by side that cover every subject, always the same and in the same order.

    The last patch along an axis is moved inside the volume, so that it overlaps its neighbor.
    Together they hold vessels in the share that the volumes have.
    """

    def __init__(self, subjects: Sequence[tio.Subject], size: Shape) -> None:
        self.size = size
        self.places = [(s, start) for s in subjects for start in self._starts(s.spatial_shape)]

    def _starts(self, shape: Sequence[int]) -> list[Shape]:
        centers = (
            [s // 2 + n * s for n in range(math.ceil(a / s))]
            for a, s in zip(shape, self.size, strict=True)
        )
        return [start_around(center, self.size, shape) for center in product(*centers)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tio.Subject:
        subject, start = self.places[index]
        return cut(subject, start, self.size)


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
