from __future__ import annotations

import math
from collections import Counter
from itertools import chain, pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_segxai.data.plan import Draw, EpochPlan, dealt

COUNTS = {
    "volumes": st.integers(1, 9),
    "samples": st.integers(1, 8),
    "batch_size": st.integers(1, 7),
    "processes": st.integers(1, 5),
    "epoch": st.integers(0, 3),
    "seed": st.integers(0, 2**64 - 1),
}


def plans(volumes, samples, batch_size, processes=1, seed=0):
    return [
        EpochPlan(volumes, samples, batch_size, seed, rank, processes) for rank in range(processes)
    ]


def drawn(plan, epoch):
    return list(chain.from_iterable(plan.batches(epoch)))


@given(**COUNTS)
def test_every_patch_is_drawn_once(volumes, samples, batch_size, processes, epoch, seed):
    """All processes together draw each patch once, and twice only where a batch would be empty."""
    ranks = plans(volumes, samples, batch_size, processes, seed)
    counts = Counter(chain.from_iterable(drawn(plan, epoch) for plan in ranks))

    assert set(counts) == {Draw(v, n) for v, n in product(range(volumes), range(samples))}
    repeated = counts.total() - len(counts)
    patches = volumes * samples
    shares = [patches * (r + 1) // processes - patches * r // processes for r in range(processes)]
    assert repeated == sum(max(len(ranks[0]) - share, 0) for share in shares)


@given(**COUNTS)
def test_processes_have_as_many_batches(volumes, samples, batch_size, processes, epoch, seed):
    """All processes have as many batches, none empty, of sizes that differ by one at most."""
    for plan in plans(volumes, samples, batch_size, processes, seed):
        sizes = [len(batch) for batch in plan.batches(epoch)]
        share = math.ceil(volumes * samples / processes)
        assert len(sizes) == len(plan) == math.ceil(share / batch_size)
        assert 1 <= min(sizes) <= max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


@given(**COUNTS)
def test_volumes_stay_on_one_process(volumes, samples, batch_size, processes, epoch, seed):
    """No volume is shared where they divide evenly, else at most one fewer than processes."""
    ranks = plans(volumes, samples, batch_size, processes, seed)
    if volumes * samples < processes:
        return  # some processes have only repetitions
    on = Counter(chain.from_iterable({d.volume for d in plan.share(epoch)} for plan in ranks))
    shared = sum(count - 1 for count in on.values())
    assert shared == 0 if volumes % processes == 0 else shared <= processes - 1


@given(**COUNTS)
def test_the_share_goes_volume_by_volume(volumes, samples, batch_size, processes, epoch, seed):
    """A share is what its batches hold, a volume's patches beside each other and in order."""
    for plan in plans(volumes, samples, batch_size, processes, seed):
        share = plan.share(epoch)
        assert sorted(share) == sorted(drawn(plan, epoch))
        own = list(dict.fromkeys(share))
        changes = [a.volume for a, b in pairwise(own) if a.volume != b.volume]
        assert len(changes) == len(set(changes))
        assert all(b.number == a.number + 1 for a, b in pairwise(own) if a.volume == b.volume)


@pytest.mark.parametrize("seed", [0, 5, 2**32, 2**64 - 1])
def test_seed_and_epoch_give_another_order(seed):
    """An epoch is the same each time; other epochs and seeds mix volumes and batches otherwise."""
    plan, (again,) = EpochPlan(30, 4, 4, seed), plans(30, 4, 4, seed=seed)
    others = [(plan, 1), (EpochPlan(30, 4, 4, (seed + 1) % 2**64), 0)]

    assert plan.batches(0) == again.batches(0)
    for other, epoch in others:
        assert other.batches(epoch) != plan.batches(0)
        assert other.share(epoch) != plan.share(0)


def test_numbers_of_a_patch_do_not_depend_on_the_process():
    """The same patch has the same random numbers on every process, and no other patch has them."""
    ranks = plans(4, 5, 2, processes=3, seed=2**64 - 1)
    draws = [Draw(v, n) for v, n in product(range(4), range(5))]
    states = [
        [tuple(plan.generator(e, d).integers(2**63, size=2)) for e in (0, 1) for d in draws]
        for plan in ranks
    ]

    assert states[0] == states[1] == states[2]
    assert len(set(states[0])) == 2 * len(draws)


def test_no_two_streams_of_random_numbers_are_one(monkeypatch):
    """Orders of volumes, orders of batches and patches have random numbers of their own.

    In a list with the seed, zeros at the end change nothing, so that [seed, epoch] would be the
    patch [seed, epoch, 0, 0], and a seed above 2**32 runs into the epoch.
    """
    seen = []
    make = np.random.default_rng

    def recorded(sequence):
        seen.append(tuple(make(sequence).integers(2**63, size=2)))
        return make(sequence)

    monkeypatch.setattr(np.random, "default_rng", recorded)
    count = 0
    for seed in (0, 1, 3 + 2**32, 3):
        for plan in plans(4, 4, 2, processes=2, seed=seed):
            for epoch in range(3):
                plan.batches(epoch)  # one order of volumes, which both processes have, and one own
                count += 1 + (plan.rank == 0)
                if plan.rank == 0:
                    draws = [Draw(v, n) for v, n in product(range(4), range(4))]
                    [plan.generator(epoch, draw) for draw in draws]
                    count += len(draws)
    assert len(set(seen)) == count


def test_patches_of_a_volume_are_counted_on():
    """Over the epochs a volume's patches have consecutive numbers, from its own number on."""
    plan = EpochPlan(3, 4, 2)
    numbers = [plan.running_number(epoch, Draw(2, n)) for epoch in range(3) for n in range(4)]
    assert numbers == list(range(2, 14))


@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 7),
    processes=st.integers(1, 6),
)
def test_dealt_properties(count, batch_size, processes):
    """Each number goes to one process, in as many batches as the others have, none empty."""
    ranks = [dealt(count, batch_size, rank, processes) for rank in range(processes)]
    counts = Counter(chain.from_iterable(chain.from_iterable(ranks)))

    assert set(counts) == set(range(count))
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert all(1 <= size <= batch_size for size in sizes)
    for rank, batches in enumerate(ranks):
        given_out = list(chain.from_iterable(batches))
        own = list(range(rank, count, processes))
        assert given_out[: len(own)] == own
        assert len(given_out) == max(len(own), len(batches))
        assert max(map(len, batches), default=0) - min(map(len, batches), default=0) <= 1


def test_no_volume_gives_no_batch():
    """A plan of nothing is empty."""
    assert len(EpochPlan(0, 4, 2)) == 0
    assert dealt(0, 2, rank=0, processes=3) == []
