from __future__ import annotations

import gc
import multiprocessing
from collections import Counter
from itertools import chain, pairwise

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_segxai.data import queue as queue_module
from lightning_segxai.data.keeping import Held, KeptVolumes, Passing
from lightning_segxai.data.loaders import SEEDS, CachedPatches, EpochBatches, patch_loader
from lightning_segxai.data.plan import EpochPlan
from lightning_segxai.data.preparation import Preparation
from lightning_segxai.data.queue import QueuedPatches, _volumes_held
from lightning_segxai.data.sampling import BalancedSampling, UniformSampling
from lightning_segxai.data.sources import SubjectFiles
from lightning_segxai.data.volumes import Volume

SIZE = (2, 2, 2)


def volumes_of(count):
    return KeptVolumes(
        [
            Held(Volume(f"v{n}", torch.full((3, 3, 3), float(n)), {}, np.eye(4), float(n)))
            for n in range(count)
        ]
    )


def queued(plan, volumes=None, workers=0):
    volumes = volumes_of(plan.volumes) if volumes is None else volumes
    return QueuedPatches(plan, volumes, SIZE, UniformSampling(), None, workers)


def rows(batch):
    return list(zip(batch["name"], batch[SEEDS].tolist(), strict=True))


def drawn(patches, epoch, first=0):
    batches = [rows(patches[epoch, number]) for number in range(first, len(patches))]
    return list(chain.from_iterable(batches))


def planned(plan, epoch):
    cached = CachedPatches(plan, volumes_of(plan.volumes), SIZE, UniformSampling(), None)
    return [row for n in range(len(plan)) for row in rows(cached[epoch, n])]


@given(
    volumes=st.integers(1, 40),
    samples=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    processes=st.integers(1, 5),
)
@example(volumes=5, samples=4, batch_size=2, processes=2)
@example(volumes=5, samples=4, batch_size=2, processes=3)
@example(volumes=17, samples=3, batch_size=4, processes=1)
@example(volumes=35, samples=2, batch_size=4, processes=2)
@example(volumes=1, samples=1, batch_size=1, processes=5)
@example(volumes=7, samples=2, batch_size=1, processes=4)
@settings(max_examples=15)
def test_queue_draws_what_is_planned(volumes, samples, batch_size, processes):
    """On every process and in every epoch the queue gives the planned patches, each as often."""
    for rank in range(processes):
        plan = EpochPlan(volumes, samples, batch_size, 3, rank, processes)
        patches = queued(plan)
        for epoch in range(2):
            assert Counter(drawn(patches, epoch)) == Counter(planned(plan, epoch))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_that_do_not_divide_evenly(processes, workers):
    """Over several epochs no process repeats or loses a patch, where volumes are cut in two."""
    ranks = [EpochPlan(5, 4, 3, 7, rank, processes) for rank in range(processes)]
    queues = [queued(plan, workers=workers) for plan in ranks]
    for epoch in range(3 if workers == 0 else 2):
        found = Counter(chain.from_iterable(drawn(patches, epoch) for patches in queues))
        assert found == Counter(planned(EpochPlan(5, 4, 3, 7), epoch))
        assert set(found.values()) == {1}


@given(whole=st.integers(0, 5000))
def test_the_queue_never_fills_up_amid_a_volume(whole):
    """What comes behind the last full queue, with two partial volumes, always has room."""
    held = _volumes_held(whole)
    assert 2 <= held <= 18
    assert whole % held + 2 <= held


def test_each_volume_is_read_once_in_an_epoch(monkeypatch):
    """A volume is asked for once, although patches of sixteen are shuffled together."""
    plan = EpochPlan(40, 3, 4)
    asked = []
    real = queue_module._Shares.__getitem__

    def read(shares, at):
        share = real(shares, at)
        asked.append(share.draws[0].volume)
        return share

    monkeypatch.setattr(queue_module._Shares, "__getitem__", read)
    drawn(queued(plan), 0)
    assert sorted(asked) == list(range(40))


def test_patches_of_many_volumes_are_mixed():
    """Neighboring patches are seldom of one volume, and the queue holds few volumes' patches."""
    plan = EpochPlan(40, 4, 4)
    patches = queued(plan)
    names, most = [], 0
    for number in range(len(plan)):
        names += patches[0, number]["name"]
        most = max(most, patches._queue.num_patches)
    same = sum(a == b for a, b in pairwise(names))
    assert same < 30  # of 159; 120 unmixed, 9 expected
    assert most <= 18 * 4


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_queue_is_the_same_again(seed):
    """Batches follow from the plan: not from the global generator, nor from what came before."""
    plan = EpochPlan(5, 3, 4, seed)
    torch.manual_seed(1)
    once = queued(plan)
    first = [drawn(once, epoch) for epoch in range(3)]
    torch.manual_seed(2)
    again = queued(plan)
    assert [drawn(again, epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert first[0] != first[1]


@pytest.mark.parametrize("first", range(1, 6))
def test_queue_goes_on_amid_an_epoch(first):
    """Asked for batch n at once, it gives what it would have given after the others."""
    plan = EpochPlan(6, 4, 4, 11)
    patches = queued(plan)
    batches = [rows(patches[1, number]) for number in range(6)]
    drawn(patches, 0)
    assert drawn(patches, 1, first) == list(chain.from_iterable(batches[first:]))


def test_queue_begins_again_after_it_was_left():
    """An epoch broken off, another begun, and the first one again are all complete."""
    plan = EpochPlan(6, 4, 4, 11)
    patches = queued(plan)
    patches[0, 0]
    patches[0, 1]
    assert Counter(drawn(patches, 1)) == Counter(planned(plan, 1))
    assert Counter(drawn(patches, 0)) == Counter(planned(plan, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_queue_over_files(tmp_path, workers):
    """Volumes that are read anew in each epoch give the patches that kept ones give."""
    keepers, held = [], []
    for n in range(3):
        numbers = np.random.default_rng(n)
        image, label = numbers.normal(100, 9, (6, 5, 4)), np.zeros((6, 5, 4), dtype=np.uint8)
        label[2:4, 2, 1:3] = 1
        paths = []
        for kind, array in (("image", image.astype(np.float32)), ("label", label)):
            paths.append(str(tmp_path / f"{kind}{n}.nii"))
            nib.save(nib.Nifti1Image(array, np.diag([-1, 1, 1, 1.0])), paths[-1])
        how = Preparation(
            SubjectFiles(*paths, name=f"v{n}"),
            tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
            BalancedSampling(),
        )
        volume = how.volume()
        keepers.append(Passing(how, volume.about, volume.index))
        held.append(Held(volume))

    plan = EpochPlan(3, 4, 3)

    def found(patches):
        loader = patch_loader(patches, EpochBatches(plan), 0, pin_memory=False)
        result = Counter()
        for batch in chain(loader, loader):
            for n, row in enumerate(rows(batch)):
                bits = [batch[key]["data"][n].numpy().tobytes() for key in ("image", "label")]
                result[(row, tuple(batch["location"][n].tolist()), *bits)] += 1
        return result

    sampling = BalancedSampling()
    passing = QueuedPatches(plan, KeptVolumes(keepers), SIZE, sampling, None, workers)
    kept = CachedPatches(plan, KeptVolumes(held), SIZE, sampling, None)
    assert found(passing) == found(kept)
    assert KeptVolumes(keepers).shapes == [(6, 5, 4)] * 3


def test_workers_end_with_the_queue():
    """Nothing waits for the garbage collection, which would then wait five seconds for each."""
    patches = queued(EpochPlan(5, 3, 4), workers=2)
    before = set(multiprocessing.active_children())
    patches[0, 0]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    gc.disable()
    try:
        del patches
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_an_error_while_reading_keeps_the_global_generator(monkeypatch):
    """Whatever goes wrong inside the queue, the training's random numbers are put back."""
    patches = queued(EpochPlan(3, 3, 2))

    def fail(*_):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(queue_module._Shares, "__getitem__", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="disk is gone"):
        patches[0, 0]
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.undo()
    assert Counter(drawn(patches, 0)) == Counter(planned(patches.plan, 0))
