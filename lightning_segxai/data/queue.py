"""Patches through TorchIO's queue, for volumes that fit neither into memory nor on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torchio as tio
from torch import Tensor
from torch.utils.data import Dataset

from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.keeping import KeptVolumes
from lightning_segxai.data.loaders import Batch, augmented, drawn_place, epoch_and_number
from lightning_segxai.data.plan import Draw, EpochPlan
from lightning_segxai.data.sampling import Sampling
from lightning_segxai.data.volumes import Volume, batch_of, patch, patch_affine
from lightning_segxai.values import Shape

_SHUFFLED_VOLUMES = 16  # patches of so many volumes are shuffled together, and held meanwhile


class QueuedPatches(Dataset[Batch]):
    """Batches of an epoch, from volumes that workers read and preprocess anew in every epoch.

    The patches of an epoch are those that `CachedPatches` gives, bit for bit; only their order
    differs, since the patches of a volume come out together, shuffled among those of sixteen
    volumes. In the middle of an epoch it resumes by drawing again, and dropping, what came before.

    Args:
        plan: What the epochs hold.
        volumes: The training volumes, which are read when they are asked for.
        size: Voxels of a patch.
        sampling: Where patches are drawn.
        augmentation: What is done to patches; where it is None, each goes with its seed.
        num_workers: Processes that read volumes; the loader around this has none.
    """

    def __init__(
        self,
        plan: EpochPlan,
        volumes: KeptVolumes,
        size: Shape,
        sampling: Sampling,
        augmentation: Augmentation | None,
        num_workers: int,
    ) -> None:
        self.plan = plan
        self.volumes = volumes
        self.size = size
        self.sampling = sampling
        self.augmentation = augmentation
        self.num_workers = num_workers
        self._queue: tio.Queue | None = None
        self._next = (-1, 0)
        self._state: Tensor | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, key: tuple[int, int] | int) -> Batch:
        epoch, number = epoch_and_number(key)
        if self._queue is None or (epoch, number) != self._next:
            self._queue = self._opened(epoch)
            self._state = None
            for earlier in range(number):
                self._popped(self._queue, epoch, earlier)
        patches = self._popped(self._queue, epoch, number)
        self._next = (epoch, number + 1)
        batch = batch_of([(one.volume, (0, 0, 0)) for one in patches], self.size)
        batch["location"] += torch.tensor([[*one.start, *one.start] for one in patches])
        return augmented(batch, [one.seed for one in patches], self.augmentation)

    def _opened(self, epoch: int) -> tio.Queue:
        drawn = groupby(self.plan.share(epoch), lambda draw: draw.volume)
        shares = sorted((list(draws) for _, draws in drawn), key=len, reverse=True)
        most = len(shares[0])
        return tio.Queue(
            _Shares(self.volumes, shares),  # type: ignore[arg-type]  # it only asks for items
            max_length=most * _volumes_held(sum(len(draws) == most for draws in shares)),
            samples_per_volume=most,
            sampler=_PlannedSampler(self.plan, epoch, self.sampling, self.size),
            num_workers=self.num_workers,
            shuffle_subjects=False,  # the plan has shuffled them
            start_background=False,
        )

    def _popped(self, queue: tio.Queue, epoch: int, number: int) -> list[_Patch]:
        with self._own_generator(epoch):
            return [queue[0] for _ in self.plan.batches(epoch)[number]]

    @contextmanager
    def _own_generator(self, epoch: int) -> Iterator[None]:
        """TorchIO's queue shuffles by the global generator: here, by a state of its own."""
        before = torch.get_rng_state()
        if self._state is None:
            generator = torch.Generator().manual_seed(self.plan.seed % 2**32 + epoch)
            self._state = generator.get_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(before)


def _volumes_held(whole: int) -> int:
    """How many volumes' patches the queue holds, so that it never fills up amid a volume.

    TorchIO's queue would begin the epoch anew to get at the rest. Behind so many whole volumes
    come two at most of which this process has only some of the patches; there is room for both.
    """
    held = range(min(whole, _SHUFFLED_VOLUMES) + 2, 1, -1)
    return next(count for count in held if whole % count <= count - 2)


@dataclass(frozen=True)
class _Share:
    """A volume, and which of its patches are still to be drawn."""

    volume: Volume
    draws: list[Draw]

    @property
    def num_samples(self) -> int:
        """What the queue asks for: how many patches of this volume there are."""
        return len(self.draws)


@dataclass(frozen=True)
class _Patch:
    """A patch as a small volume, where it lay, and the seed of its augmentation."""

    volume: Volume
    start: Shape
    seed: int


class _Shares(Dataset[_Share]):
    """The volumes of an epoch in its order, read by the queue's workers."""

    def __init__(self, volumes: KeptVolumes, shares: Sequence[list[Draw]]) -> None:
        self.volumes = volumes
        self.shares = shares

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, at: int) -> _Share:
        draws = self.shares[at]
        return _Share(self.volumes[draws[0].volume], list(draws))


class _PlannedSampler(tio.data.PatchSampler):
    """Cuts the patches of the plan; the queue may come back for the rest of a volume's."""

    def __init__(self, plan: EpochPlan, epoch: int, sampling: Sampling, size: Shape) -> None:
        # not the dataset: in a circle, workers would wait for the garbage collection, then 5 s each
        super().__init__(size)
        self.plan = plan
        self.epoch = epoch
        self.sampling = sampling
        self.size = size

    def __call__(  # type: ignore[override]  # the queue hands on what the dataset gives
        self, share: _Share, num_patches: int | None = None
    ) -> Iterator[_Patch]:
        while share.draws:
            yield self._cut(share.volume, share.draws.pop(0))

    def _cut(self, volume: Volume, draw: Draw) -> _Patch:
        plan, size = self.plan, self.size
        start, seed = drawn_place(plan, self.epoch, draw, volume, size, self.sampling)
        maps = {"label": volume.maps["label"]} if "label" in volume.maps else {}
        # a copy, so that the volume itself can go
        small = replace(
            volume,
            image=patch(volume.image, start, size, volume.floor).clone(),
            maps={key: patch(values, start, size, 0).clone() for key, values in maps.items()},
            affine=patch_affine(volume, start),
            index={},
        )
        return _Patch(small, start, seed)
