from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, islice, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, SequentialSampler

import lightning_segxai
from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.evaluation import FixedBatches, still_loader, tiles, whole
from lightning_segxai.data.keeping import Held, KeptVolumes
from lightning_segxai.data.loaders import (
    SEEDS,
    CachedPatches,
    EpochBatches,
    PatchLoader,
    patch_loader,
)
from lightning_segxai.data.plan import EpochPlan
from lightning_segxai.data.queue import QueuedPatches
from lightning_segxai.data.sampling import BalancedSampling
from lightning_segxai.data.volumes import Volume, patch

SIZE = (4, 3, 5)
SAMPLING = BalancedSampling()


def volumes_of(count, shape=(8, 7, 6)):
    made = []
    for n in range(count):
        numbers = torch.Generator().manual_seed(n)
        image = torch.randn(shape, generator=numbers)
        label = (torch.rand(shape, generator=numbers) > 0.9).byte()
        affine = np.diag([0.5, 0.6, 0.7 + n, 1.0])
        bare = Volume(f"v{n}", image, {"label": label}, affine, float(image.min()))
        index = SAMPLING.index(bare)
        made.append(Volume(bare.name, image, bare.maps, affine, bare.floor, index))
    return KeptVolumes([Held(volume) for volume in made])


def loader_of(backend, plan, volumes=None, augmentation=None, workers=0):
    volumes = volumes_of(plan.volumes) if volumes is None else volumes
    batches = EpochBatches(plan)
    if backend == "queue":
        dataset = QueuedPatches(plan, volumes, SIZE, SAMPLING, augmentation, workers)
        return patch_loader(dataset, batches, 0, pin_memory=False)
    dataset = CachedPatches(plan, volumes, SIZE, SAMPLING, augmentation)
    return patch_loader(dataset, batches, workers, pin_memory=False)


def patches(batches):
    """What identifies every patch, bit for bit, batch by batch."""
    found = []
    for batch in batches:
        rows = []
        for n, name in enumerate(batch["name"]):
            place = tuple(batch["location"][n].tolist())
            bits = [batch[key]["data"][n].numpy().tobytes() for key in ("image", "label")]
            affine = np.asarray(batch["image"]["affine"][n]).tobytes()
            seed = batch[SEEDS][n].item() if SEEDS in batch else None
            rows.append((name, place, seed, affine, *bits))
        found.append(tuple(rows))
    return found


def flat(batches):
    return Counter(chain.from_iterable(batches))


BACKENDS = ("cached", "queue")


@pytest.mark.parametrize("workers", [0, 2])
def test_both_backends_give_the_same_patches(workers):
    """Queue and kept volumes give the same patches in an epoch, bit for bit, with any workers."""
    plan = EpochPlan(5, 4, 3, seed=2**64 - 1)
    loaders = [loader_of(backend, plan, workers=workers) for backend in BACKENDS]
    for _ in range(2):
        cached, queued = (patches(loader) for loader in loaders)
        assert flat(cached) == flat(queued)
        assert len(flat(cached)) == 20
        assert [len(b) for b in cached] == [len(b) for b in queued]


class CachedEpoch:
    """The batches of an epoch in the plainest way: cut from the volumes by the plan."""

    def __init__(self, plan, epoch):
        self.plan = plan
        self.epoch = epoch

    def __iter__(self):
        volumes = volumes_of(self.plan.volumes)
        dataset = CachedPatches(self.plan, volumes, SIZE, SAMPLING, None)
        return (dataset[self.epoch, n] for n in range(len(self.plan)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_change_nothing(backend):
    """The batches of three epochs are the same, in the same order, without and with workers."""
    plan = EpochPlan(3, 3, 2, seed=5)
    alone, helped = (loader_of(backend, plan, workers=workers) for workers in (0, 2))
    for _ in range(3):
        assert patches(alone) == patches(helped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patch_is_what_lies_there(backend):
    """Image, label and affine of a patch are the volume's at the place it tells."""
    volumes = volumes_of(3, shape=(8, 2, 6))  # shorter than the patch along j
    by_name = {volume.name: volume for volume in volumes}
    for batch in loader_of(backend, EpochPlan(3, 4, 5), volumes):
        for n, name in enumerate(batch["name"]):
            one, row = by_name[name], batch["location"][n].tolist()
            start = tuple(row[:3])
            assert row[3:] == [a + s for a, s in zip(start, SIZE, strict=True)]
            image = patch(one.image, start, SIZE, one.floor)
            assert torch.equal(batch["image"]["data"][n, 0], image)
            assert torch.equal(
                batch["label"]["data"][n, 0], patch(one.maps["label"], start, SIZE, 0)
            )
            world = np.asarray(batch["image"]["affine"][n]) @ [1, 1, 1, 1]
            assert np.allclose(world, one.affine @ [*(a + 1 for a in start), 1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["cached", "queue", "still"])
def test_loaders_leave_a_batch_as_it_is(loader, workers):
    """Affines stay in NumPy, as TorchIO's: tensors would be moved to a GPU, in float64."""
    plan, volumes = EpochPlan(2, 2, 2), volumes_of(2)
    if loader == "still":
        batch = next(
            iter(still_loader(volumes, whole(volumes.shapes), FixedBatches(2, 1), workers))
        )
    else:
        batch = next(iter(loader_of(loader, plan, volumes, workers=workers)))
    for key in ("image", "label"):
        assert isinstance(batch[key]["affine"], np.ndarray)
        assert batch[key]["affine"].dtype == np.float64
        assert isinstance(batch[key]["data"], torch.Tensor)
    assert isinstance(batch["name"], list)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_share_around_vessels_holds_over_the_epochs(backend):
    """Of a volume's patches over epochs of odd length, every second one is around a vessel."""
    volumes = KeptVolumes([Held(replace(k.volume, index={})) for k in volumes_of(3).keepers])
    for keeper in volumes.keepers:  # one vessel voxel, and patches of one voxel
        keeper.volume.maps["label"].zero_()[3, 3, 3] = 1
        keeper.volume.index["vessels"] = np.array([(3 * 7 + 3) * 6 + 3], dtype=np.int32)
    loader = loader_of(backend, EpochPlan(3, 3, 2), volumes)
    loader.dataset.size = (1, 1, 1)
    hits = Counter()
    for _ in range(20):
        for batch in loader:
            names = [
                n for n, v in zip(batch["name"], batch["label"]["data"], strict=True) if v.any()
            ]
            hits.update(names)
    # of 60 patches of each, 30 are around the voxel, and 30 anywhere among 336
    assert len(hits) == 3
    assert all(30 <= hit <= 33 for hit in hits.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_augmentation_follows_from_the_seed_of_the_patch(backend):
    """Augmented in the loader or later by the batch's seeds is the same; workers do not matter."""
    plan = EpochPlan(3, 3, 2, seed=3)
    augmentation = Augmentation([tio.RandomFlip((0, 1)), tio.RandomNoise(), tio.RandomSwap(2, 3)])
    inside = patches(loader_of(backend, plan, augmentation=augmentation))
    with_workers = patches(loader_of(backend, plan, augmentation=augmentation, workers=2))
    later = []
    for batch in loader_of(backend, plan):
        seeds = batch.pop(SEEDS)
        later.append(augmentation(batch, seeds))

    assert inside == with_workers == patches(later)


# --- resuming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_epoch_goes_on_where_it_was(backend, workers):
    """After n batches, a new loader with the state gives the other batches, and the next epoch."""
    plan = EpochPlan(5, 3, 4, seed=9)
    volumes = volumes_of(5)
    straight = loader_of(backend, plan, volumes)
    epochs = [patches(straight) for _ in range(3)]
    for count in (0, 1, 3, 4) if workers == 0 else (3,):
        broken = loader_of(backend, plan, volumes, workers=workers)
        list(broken)
        running = iter(broken)
        assert patches(islice(running, count)) == epochs[1][:count]
        state = broken.state_dict()
        running.close()

        resumed = loader_of(backend, plan, volumes, workers=workers)
        resumed.load_state_dict(state)
        if 0 < count < 4:
            assert state == {"epoch": 1, "batches": count, "of": 4}
            assert resumed.state_dict() == state
            assert patches(resumed) == epochs[1][count:]
        elif count == 0:  # the second pass had not begun: the first one is done
            assert patches(resumed) == epochs[1]
        assert patches(resumed) == epochs[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_processes_resume_together(backend):
    """Two processes resumed in the middle of an epoch draw all the patches that are left."""
    volumes = volumes_of(5)
    ranks = [EpochPlan(5, 3, 2, seed=1, rank=rank, processes=2) for rank in range(2)]
    given, left = [], []
    for plan in ranks:
        loader = loader_of(backend, plan, volumes)
        given += patches(islice(loader, 2))
        resumed = loader_of(backend, plan, volumes)
        resumed.load_state_dict(loader.state_dict())
        resumed.sampler.set_epoch(0)  # as Lightning does
        left += patches(resumed)

    everything = patches(loader_of("cached", EpochPlan(5, 3, 2, seed=1), volumes))
    assert flat(given) + flat(left) == flat(everything)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_remembered_again_and_again(backend):
    """A run that is resumed twice within an epoch still gives each batch once."""
    plan, volumes = EpochPlan(4, 4, 2, seed=4), volumes_of(4)
    whole_epoch = patches(loader_of(backend, plan, volumes))
    found, state = [], None
    for count in (3, 2, 99):
        loader = loader_of(backend, plan, volumes)
        if state is not None:
            loader.load_state_dict(state)
        found += patches(islice(loader, count))
        state = loader.state_dict()
    assert found == whole_epoch
    assert state == {"epoch": 0, "batches": 8, "of": 8}


def test_workers_that_are_ahead_do_not_count():
    """The state tells what was given, not what workers have prepared."""
    loader = loader_of("cached", EpochPlan(4, 4, 2), workers=2)
    running = iter(loader)
    next(running)
    assert loader.state_dict() == {"epoch": 0, "batches": 1, "of": 8}
    running.close()


# --- epochs


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_pass_is_the_next_epoch(backend, workers):
    """Where nobody tells the epoch, passes are epochs 0, 1, 2, with workers that stay."""
    plan, volumes = EpochPlan(3, 3, 2, seed=8), volumes_of(3)
    loader = loader_of(backend, plan, volumes, workers=workers)
    for epoch in range(3):
        assert flat(patches(loader)) == flat(patches(CachedEpoch(plan, epoch)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_can_be_told(backend):
    """`set_epoch` decides which epoch the next pass is, also an earlier one and the same again."""
    plan, volumes = EpochPlan(3, 3, 2, seed=8), volumes_of(3)
    loader = loader_of(backend, plan, volumes)
    for epoch in (4, 4, 2, 0, 1):
        loader.sampler.set_epoch(epoch)
        assert flat(patches(loader)) == flat(patches(CachedEpoch(plan, epoch)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_epoch_is_begun_at_its_beginning(backend):
    """Resuming is forgotten where another epoch is told than the resumed one."""
    plan, volumes = EpochPlan(3, 3, 2), volumes_of(3)
    loader = loader_of(backend, plan, volumes)
    loader.load_state_dict({"epoch": 2, "batches": 3, "of": len(loader)})
    loader.sampler.set_epoch(1)
    assert flat(patches(loader)) == flat(patches(CachedEpoch(plan, 1)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_that_is_broken_off_and_begun_again(backend, workers):
    """Breaking off, as `limit_train_batches` does, leaves the next pass a whole next epoch."""
    plan, volumes = EpochPlan(3, 4, 2, seed=8), volumes_of(3)
    loader = loader_of(backend, plan, volumes, workers=workers)
    straight = loader_of(backend, plan, volumes)
    expected = [patches(straight) for _ in range(4)]
    for epoch, count in enumerate((1, 3, 2, 99)):
        assert patches(islice(loader, count)) == expected[epoch][:count]


@pytest.mark.parametrize("backend", BACKENDS)
def test_overfitting_stays_in_the_first_epoch(backend):
    """With a plain sampler, which Lightning puts in place to overfit, each pass is epoch 0."""
    plan, volumes = EpochPlan(3, 3, 2, seed=8), volumes_of(3)
    planned = loader_of(backend, plan, volumes)
    frozen = PatchLoader(
        planned.dataset,
        batch_size=None,
        sampler=SequentialSampler(planned.dataset),
        collate_fn=planned.collate_fn,
    )
    expected = patches(loader_of(backend, plan, volumes))
    for _ in range(3):
        assert patches(frozen) == expected


def test_lightning_leaves_the_sampler_alone():
    """The samplers count as distributed ones, and their lengths are this process's batches."""
    plan = EpochPlan(5, 3, 2, rank=1, processes=2)
    for sampler, length in ((EpochBatches(plan), 4), (FixedBatches(7, 2, 1, 2), 2)):
        assert isinstance(sampler, DistributedSampler)
        assert len(sampler) == len(list(sampler)) == length
    assert len(loader_of("cached", plan)) == len(loader_of("queue", plan)) == 4


def generator_states():
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["cached", "queue", "still"])
def test_no_loader_touches_the_global_generators(loader, workers):
    """torch and NumPy go on as if there were no loader; nor do they change what it gives."""
    plan, volumes = EpochPlan(3, 3, 2, seed=8), volumes_of(3)

    def made():
        if loader == "still":
            places = tiles(volumes.shapes, SIZE)
            return still_loader(volumes, places, FixedBatches(len(places), 2), workers)
        augmentation = Augmentation([tio.RandomFlip(), tio.RandomNoise(), tio.RandomSwap(2, 3)])
        return loader_of(loader, plan, volumes, augmentation, workers)

    before = generator_states()
    first = made()
    found = [patches(first), patches(islice(first, 1))]
    assert generator_states() == before

    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    second = made()
    assert found == [patches(second), patches(islice(second, 1))]


def python_random_is_kept():
    """What the test below runs."""
    plan, volumes = EpochPlan(3, 3, 2, seed=8), volumes_of(3)
    augmentation = Augmentation([tio.RandomFlip(), tio.RandomNoise(), tio.RandomSwap(2, 3)])
    places = tiles(volumes.shapes, SIZE)
    before = random.getstate()
    for loader in (
        *(loader_of(b, plan, volumes, augmentation, w) for b in BACKENDS for w in (0, 2)),
        still_loader(volumes, places, FixedBatches(len(places), 2), 0),
    ):
        list(loader)
    return random.getstate() == before


def test_no_loader_touches_pythons_generator():
    """Python's `random` goes on, too; told in a process without beartype, which draws from it."""
    code = "import test_loaders; print(test_loaders.python_random_is_kept())"
    folder, package = Path(__file__).parent, Path(lightning_segxai.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{package}"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split() == ["True"]


# --- validation


@given(shapes=st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=3))
def test_tiles_cover_every_voxel(shapes):
    """Every voxel lies in a tile, and as few tiles as possible do it."""
    places = tiles(shapes, SIZE)
    seen = [torch.zeros(shape, dtype=torch.int32) for shape in shapes]
    for at, start, size in places:
        assert size == SIZE
        corner = [max(a, 0) for a in start]
        end = [a + s for a, s in zip(start, size, strict=True)]
        seen[at][tuple(slice(a, e) for a, e in zip(corner, end, strict=True))] += 1
        for a, e, n, s in zip(start, end, shapes[at], size, strict=True):
            assert (a >= 0 and e <= n) if n >= s else (a <= 0 and e >= n)
    assert all(bool((s > 0).all()) for s in seen)
    fewest = sum(
        int(np.prod([-(-n // s) for n, s in zip(shape, SIZE, strict=True)])) for shape in shapes
    )
    assert len(places) == len(set(places)) == fewest


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_the_same_each_time(workers):
    """Tiles come in the same batches on every pass, and are what lies there."""
    volumes = volumes_of(2, shape=(8, 2, 6))
    places = tiles(volumes.shapes, SIZE)
    loader = still_loader(volumes, places, FixedBatches(len(places), 3), workers)
    first = list(loader)

    assert patches(first) == patches(loader)
    rows = list(chain.from_iterable(patches(first)))
    assert [(name, place[:3]) for name, place, *_ in rows] == [(f"v{at}", s) for at, s, _ in places]
    image = first[0]["image"]["data"][0, 0]
    assert torch.equal(image, patch(volumes[0].image, places[0][1], SIZE, volumes[0].floor))


def test_processes_validate_all_tiles_together():
    """Each tile is on one of the processes, which have as many batches as the others."""
    volumes = volumes_of(3)
    places = tiles(volumes.shapes, SIZE)
    loaders = [
        still_loader(volumes, places, FixedBatches(len(places), 2, r, 3), 0) for r in range(3)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    together = flat(chain.from_iterable(patches(loader) for loader in loaders))
    assert together == flat(patches(still_loader(volumes, places, FixedBatches(len(places), 2), 0)))


def test_whole_volumes_are_one_patch_each():
    """Testing sees every volume as it is, whatever its shape."""
    volumes = KeptVolumes([*volumes_of(1).keepers, *volumes_of(2, shape=(5, 9, 3)).keepers[1:]])
    places = whole(volumes.shapes)
    batches = list(still_loader(volumes, places, FixedBatches(2, 1), 0))
    for batch, volume in zip(batches, volumes, strict=True):
        assert torch.equal(batch["image"]["data"][0, 0], volume.image)
        assert torch.equal(batch["label"]["data"][0, 0], volume.maps["label"])
        assert np.array_equal(batch["image"]["affine"][0], volume.affine)


def test_no_place_gives_no_batch():
    """Without a volume a loader ends at once."""
    assert list(still_loader(KeptVolumes([]), [], FixedBatches(0, 2), 0)) == []


def test_epochs_differ():
    """No two of many epochs have the same batches, nor does a patch come back at its place."""
    plan, volumes = EpochPlan(3, 3, 2), volumes_of(3)
    loader = loader_of("cached", plan, volumes)
    epochs = [patches(loader) for _ in range(6)]
    assert all(a != b for a, b in product(epochs, epochs) if a is not b)
    seeds = [{row[2] for row in chain.from_iterable(epoch)} for epoch in epochs]
    assert all(not a & b for a, b in pairwise(seeds))
