"""Batches for training and validation: always the same ones for a seed, and resumable.

Randomness belongs to the patch: its place and its augmentation follow from the seed, the epoch and
its number alone. So neither workers nor processes nor a resumed run change what is drawn, and no
random number of the training is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.plan import Draw, EpochPlan, dealt
from lightning_segxai.data.sampling import Sampling, start_around
from lightning_segxai.data.volumes import Volume, batch_of
from lightning_segxai.values import Shape

Batch = dict[str, Any]

SEEDS = "augmentation_seeds"
"""Where a batch that is augmented on the device has the seeds of its patches."""


class EpochBatches(DistributedSampler[tuple[int, int]]):
    """The batches of this process, as (epoch, number).

    It is a ``DistributedSampler``, so that Lightning leaves it as it is instead of sharing out
    the batches a second time, and tells it the epoch.

    Args:
        plan: What the epochs hold.
    """

    def __init__(self, plan: EpochPlan) -> None:
        # nothing of the base is used but what it is
        super().__init__(range(len(plan)), plan.processes, plan.rank, shuffle=False)  # type: ignore[arg-type]
        self.plan = plan
        self.first = 0

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Go on with this epoch: at its beginning, unless it is the one that was resumed."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def resume(self, epoch: int, batches: int) -> None:
        """Go on behind so many batches of an epoch."""
        self.epoch, self.first = (epoch, batches) if batches < len(self) else (epoch + 1, 0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # changes nothing: a DataLoader with workers begins twice
        return iter([(self.epoch, number) for number in range(self.first, len(self))])


class PatchLoader(DataLoader[Batch]):
    """A ``DataLoader`` over `EpochBatches` that a checkpoint remembers in the middle of an epoch.

    Lightning asks a loader with ``state_dict`` and ``load_state_dict`` by itself. Workers may be
    ahead; what counts is what was given. Where nobody tells the epoch, each pass is the next one.
    """

    _at: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = self.sampler
        if not isinstance(batches, EpochBatches):  # Lightning's own, for `overfit_batches`
            yield from super().__iter__()
            return
        self._at = (batches.epoch, batches.first)
        given = super().__iter__()
        batches.epoch, batches.first = batches.epoch + 1, 0
        for batch in given:
            self._at = (self._at[0], self._at[1] + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches were given, and of how many."""
        return {"epoch": self._at[0], "batches": self._at[1], "of": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was called."""
        if state["of"] != len(self):
            warnings.warn(
                f"The resumed run was in an epoch of {state['of']} batches; now an epoch has "
                f"{len(self)}. The rest of this epoch is not what was still to come.",
                stacklevel=2,
            )
        self._at = (state["epoch"], state["batches"])
        if isinstance(self.sampler, EpochBatches):
            self.sampler.resume(*self._at)


class CachedPatches(Dataset[Batch]):
    """Batches of an epoch, cut straight from the kept volumes.

    Args:
        plan: What the epochs hold.
        volumes: The training volumes, with the index of ``sampling``.
        size: Voxels of a patch.
        sampling: Where patches are drawn.
        augmentation: What is done to them; where it is None, each patch goes with its seed.
    """

    def __init__(
        self,
        plan: EpochPlan,
        volumes: Sequence[Volume],
        size: Shape,
        sampling: Sampling,
        augmentation: Augmentation | None,
    ) -> None:
        self.plan = plan
        self.volumes = volumes
        self.size = size
        self.sampling = sampling
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, key: tuple[int, int] | int) -> Batch:
        epoch, number = epoch_and_number(key)
        places, seeds = [], []
        for draw in self.plan.batches(epoch)[number]:
            volume = self.volumes[draw.volume]
            start, seed = drawn_place(self.plan, epoch, draw, volume, self.size, self.sampling)
            places.append((volume, start))
            seeds.append(seed)
        return augmented(batch_of(places, self.size), seeds, self.augmentation)


def epoch_and_number(key: tuple[int, int] | int) -> tuple[int, int]:
    """A batch as `EpochBatches` tells it; a bare number, of Lightning's sampler, is of epoch 0."""
    return key if isinstance(key, tuple) else (0, key)


def drawn_place(
    plan: EpochPlan, epoch: int, draw: Draw, volume: Volume, size: Shape, sampling: Sampling
) -> tuple[Shape, int]:
    """First voxel of a patch, and the seed of its augmentation."""
    generator, nth = plan.generator(epoch, draw), plan.running_number(epoch, draw)
    start = sampling.start(volume, size, nth, generator)
    return start, int(generator.integers(2**63))


def augmented(batch: Batch, seeds: Sequence[int], augmentation: Augmentation | None) -> Batch:
    """The augmented batch; where that is done later, the batch with its seeds."""
    tensor = torch.tensor(seeds, dtype=torch.int64)
    return {**batch, SEEDS: tensor} if augmentation is None else augmentation(batch, tensor)


def augmented_later(batches: Any, augmentation: Augmentation) -> Any:
    """The same, with every batch augmented that waits for it, in whatever collection it lies."""
    if isinstance(batches, dict) and SEEDS in batches:
        rest = {key: value for key, value in batches.items() if key != SEEDS}
        return augmentation(rest, batches[SEEDS].cpu())
    if isinstance(batches, dict):
        return {key: augmented_later(one, augmentation) for key, one in batches.items()}
    if type(batches) in (list, tuple):
        return type(batches)(augmented_later(one, augmentation) for one in batches)
    return batches


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
        super().__init__(range(count), processes, rank, shuffle=False)  # type: ignore[arg-type]

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
        collate_fn=_unchanged,
        sampler=batches,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )


def patch_loader(
    dataset: Dataset[Batch], batches: EpochBatches, num_workers: int, pin_memory: bool
) -> PatchLoader:
    """A loader of training batches; its workers stay from epoch to epoch."""
    return PatchLoader(
        dataset,
        batch_size=None,
        collate_fn=_unchanged,
        sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )


def _unchanged(batch: Any) -> Any:
    """Affines stay NumPy's, as TorchIO has them: PyTorch's default would make tensors of them."""
    return batch
