"""Batches for training: always the same ones for a seed, and resumable.

Randomness belongs to the patch: its place and its augmentation follow from the seed, the epoch and
its number alone. So neither workers nor processes nor a resumed run change what is drawn, and no
random number of the training is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.plan import Draw, EpochPlan
from lightning_segxai.data.sampling import Sampling
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
        # nothing of the base is used but what it is: any sized thing will do as its data set
        sized: Any = range(len(plan))
        super().__init__(sized, plan.processes, plan.rank, shuffle=False)
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

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator
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


def patch_loader(
    dataset: Dataset[Batch], batches: EpochBatches, num_workers: int, pin_memory: bool
) -> PatchLoader:
    """A loader of training batches; its workers stay from epoch to epoch."""
    return PatchLoader(
        dataset,
        batch_size=None,
        collate_fn=unchanged,
        sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )


def unchanged(batch: Any) -> Any:
    """Affines stay NumPy's, as TorchIO has them: PyTorch's default would make tensors of them."""
    return batch
