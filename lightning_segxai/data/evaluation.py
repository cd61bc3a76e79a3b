"""Batches for validation, tests and prediction: the same ones each time, without any randomness."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_segxai.data.loaders import Batch, unchanged
from lightning_segxai.data.plan import dealt
from lightning_segxai.data.sampling import start_around
from lightning_segxai.data.volumes import Volume, batch_of
from lightning_segxai.values import Shape


class Places(Dataset[Batch]):
    """Batches of fixed places, without any randomness: for validation, tests and prediction.

    Args:
        volumes: What patches are cut from.
        places: Volume, first voxel and voxels of each patch; equal voxels within a batch.
    """

    def __init__(
        self, volumes: Sequence[Volume], places: Sequence[tuple[int, Shape, Shape]]
    ) -> None:
        self.volumes = volumes
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: Sequence[int] | int) -> Batch:
        places = [self.places[n] for n in ([chosen] if isinstance(chosen, int) else chosen)]
        size = places[0][2]
        return batch_of([(self.volumes[at], start) for at, start, _ in places], size)


class FixedBatches(DistributedSampler[list[int]]):
    """The same batches in every epoch, shared out over the processes.

    Args:
        count: How many places there are.
        batch_size: Places in a batch, at most.
        rank: Number of this process.
        processes: How many there are.
        even: Whether every process needs as many batches as the others, as in the validations of
            a training, whose processes wait for each other.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
        even: bool = True,
    ) -> None:
        self.batches = dealt(count, batch_size, rank, processes, even)
        again = sum(map(len, self.batches)) - len(range(rank, count, processes))
        if again:
            warnings.warn(
                f"Process {rank} of {processes} looks at {again} of {count} volumes or tiles "
                "again, so as not to be without a batch: scores count them twice. Use fewer "
                "processes, or a `batch_size` above 1.",
                stacklevel=2,
            )
        sized: Any = range(count)  # as in `EpochBatches`, any sized thing will do
        super().__init__(sized, processes, rank, shuffle=False)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def tiles(shapes: Sequence[Shape], size: Shape) -> list[tuple[int, Shape, Shape]]:
    """Patches side by side that cover every volume.

    The last patch along an axis is moved inside the volume, so that it overlaps its neighbor.
    Together they hold vessels in the share that the volumes have.
    """
    return [
        (at, start_around(center, size, shape), size)
        for at, shape in enumerate(shapes)
        for center in product(
            *([s // 2 + n * s for n in range(-(-a // s))] for a, s in zip(shape, size, strict=True))
        )
    ]


def whole(shapes: Sequence[Shape]) -> list[tuple[int, Shape, Shape]]:
    """Every volume as one patch."""
    return [(at, (0, 0, 0), shape) for at, shape in enumerate(shapes)]


def still_loader(
    volumes: Sequence[Volume],
    places: Sequence[tuple[int, Shape, Shape]],
    batches: FixedBatches,
    num_workers: int,
) -> DataLoader[Batch]:
    """A loader that draws no random number of the run, not even the seed of its workers."""
    return DataLoader(
        Places(volumes, places),
        batch_size=None,
        collate_fn=unchanged,
        sampler=batches,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
