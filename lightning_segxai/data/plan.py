"""Which patches an epoch draws, in which order, in which batches, and on which process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One patch of an epoch: the volume it comes from, and which of its patches it is."""

    volume: int
    number: int


@dataclass(frozen=True)
class EpochPlan:
    """The patches of every epoch, for one of the processes that train together.

    An epoch draws ``samples_per_volume`` patches of every volume, over all processes together and
    each of them once. Every process has the same number of batches, none has a volume of another
    process unless the volumes cannot be shared out evenly (then a process ends in the middle of
    one, and the next goes on there), and batches of a process are as large as ``batch_size``
    allows and differ by one patch at most. Only where a process would have an empty batch does
    it draw a patch twice. The plan depends on nothing but its fields and the epoch, and which
    patches are drawn does not depend on the processes at all.

    Args:
        volumes: How many volumes there are.
        samples_per_volume: Patches of each of them in an epoch.
        batch_size: Patches in a batch of a process, at most.
        seed: Another seed gives other epochs.
        rank: Number of this process.
        processes: How many train together.
    """

    volumes: int
    samples_per_volume: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        """Batches of an epoch, the same for every process."""
        share = math.ceil(self.volumes * self.samples_per_volume / self.processes)
        return math.ceil(share / self.batch_size)

    def share(self, epoch: int) -> list[Draw]:
        """This process's patches of an epoch, volume by volume."""
        patches = self.volumes * self.samples_per_volume
        order = _stream(self.seed, epoch).permutation(self.volumes).tolist()
        first, end = (patches * r // self.processes for r in (self.rank, self.rank + 1))
        mine = [divmod(at, self.samples_per_volume) for at in range(first, end)]
        draws = [Draw(order[place], number) for place, number in mine]
        if not draws:
            draws = [Draw(order[0], 0)]
        return draws + [draws[n % len(draws)] for n in range(len(self) - len(draws))]

    def batches(self, epoch: int) -> tuple[tuple[Draw, ...], ...]:
        """This process's batches of an epoch."""
        return _batches(self, epoch)

    def generator(self, epoch: int, draw: Draw) -> np.random.Generator:
        """The random numbers of one patch: the same ones in any batch, worker and process."""
        return _stream(self.seed, epoch, *draw)

    def running_number(self, epoch: int, draw: Draw) -> int:
        """Which patch of its volume it is, counted over all epochs.

        Volumes begin at different numbers, so that what comes in turn is in every batch.
        """
        return epoch * self.samples_per_volume + draw.number + draw.volume


@lru_cache(maxsize=4)
def _batches(plan: EpochPlan, epoch: int) -> tuple[tuple[Draw, ...], ...]:
    share = plan.share(epoch)
    order = _stream(plan.seed, epoch, plan.rank).permutation(len(share))
    return tuple(tuple(share[n] for n in part) for part in np.array_split(order, len(plan)))


def _stream(seed: int, *key: int) -> np.random.Generator:
    """Random numbers of their own for every key, whatever its length.

    In one list with the seed, zeros at the end would change nothing, and large seeds run into keys.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def dealt(
    count: int, batch_size: int, rank: int, processes: int, even: bool = True
) -> list[list[int]]:
    """Numbers 0 to ``count - 1`` in batches, for one of several processes, always the same.

    Each number is on one process, but for what it takes to leave none without a batch, and, where
    all shall have as many batches, none with fewer: then a process repeats some of its own.

    >>> dealt(5, 2, rank=0, processes=2), dealt(5, 2, rank=1, processes=2)
    ([[0, 2], [4]], [[1], [3]])

    Args:
        count: How many numbers.
        batch_size: Numbers in a batch, at most.
        rank: Number of the process.
        processes: How many there are.
        even: Whether every process needs as many batches as the others.
    """
    mine = list(range(rank, count, processes)) or [0] * min(count, 1)
    batches = math.ceil((math.ceil(count / processes) if even else len(mine)) / batch_size)
    mine += [mine[n % len(mine)] for n in range(batches - len(mine))]
    return [part.tolist() for part in np.array_split(mine, batches)] if batches else []
