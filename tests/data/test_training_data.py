"""The data module in a Trainer: processes, resumed epochs, what is kept and what is told."""

import errno
import json
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchio as tio
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import seed_everything

from lightning_segxai import (
    CaliberSampling,
    ProbeChoice,
    Sampling,
    SubjectFiles,
    WeightedSampling,
)
from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.cache import VolumeCache
from lightning_segxai.data.loaders import SEEDS
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.subjects import PhantomCohort

COHORT = PhantomCohort(subjects=5, shape=(32, 32, 24))
SETTINGS = {"patch_size": 16, "batch_size": 3, "samples_per_volume": 5, "seed": 1}


def module(tmp_path, **settings):
    return MRADataModule(
        **{"phantom": COHORT, "cache_dir": tmp_path / "cache", **SETTINGS, **settings}
    )


def drawn(batches):
    """What was drawn: name, place and voxels of each patch."""
    return [
        (name, tuple(place), image.numpy().tobytes(), label.numpy().tobytes())
        for batch in batches
        for name, place, image, label in zip(
            batch["name"],
            batch["location"].tolist(),
            batch["image"]["data"],
            batch["label"]["data"],
            strict=True,
        )
    ]


class Watcher(pl.LightningModule):
    """Trains a weight on nothing, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, _):
        self.seen += drawn([batch])
        return (self.weight * batch["image"]["data"].mean()).sum()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **settings):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, "enable_checkpointing": False, **settings},
    )


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_an_epoch_resumes_in_its_middle(tmp_path, cache):
    """A checkpoint amid an epoch goes on with the very patches that were still to come."""
    seed_everything(3, workers=True, verbose=False)
    whole = Watcher()
    trainer(tmp_path).fit(whole, datamodule=module(tmp_path, cache=cache))

    seed_everything(3, workers=True, verbose=False)
    first = Watcher()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "amid", every_n_train_steps=9)
    trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=[saving]).fit(
        first, datamodule=module(tmp_path, cache=cache)
    )  # there are seven batches in an epoch
    seed_everything(99, workers=True, verbose=False)  # the run's seed is the checkpoint's
    rest = Watcher()
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saving]).fit(
        rest, datamodule=module(tmp_path, cache=cache), ckpt_path=tmp_path / "amid.ckpt"
    )

    assert len(whole.seen) == 2 * 4 * 5
    assert len(first.seen) == 20 + 6
    assert first.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)


def test_a_checkpoint_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    """Nothing is skipped or repeated where the epoch was over."""
    seed_everything(3, workers=True, verbose=False)
    whole, first, rest = Watcher(), Watcher(), Watcher()
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=module(tmp_path))
    seed_everything(3, workers=True, verbose=False)
    callback = pl.callbacks.ModelCheckpoint(tmp_path / "ends", save_last=True)
    trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[callback]).fit(
        first, datamodule=module(tmp_path)
    )
    trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[callback]).fit(
        rest, datamodule=module(tmp_path), ckpt_path=tmp_path / "ends" / "last.ckpt"
    )

    assert first.seen + rest.seen == whole.seen


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_on_purpose_sees_the_same_batch_again(tmp_path):
    """`overfit_batches` trains on one batch, in every epoch."""
    net = Watcher()
    trainer(tmp_path, overfit_batches=1, max_epochs=3).fit(net, datamodule=module(tmp_path))

    assert len(net.seen) == 9
    assert net.seen[:3] == net.seen[3:6] == net.seen[6:]


def test_augmentation_on_a_gpu_is_that_of_the_loader(tmp_path):
    """Batches that go to the device with their seeds come out as the loader makes them."""
    seed_everything(3, workers=True, verbose=False)
    data = module(tmp_path)
    loader = data.train_dataloader()
    expected = drawn([next(iter(loader))])
    loader = data.train_dataloader()
    loader.dataset.augmentation = None
    batch = next(iter(loader))
    assert SEEDS in batch

    class Doubled(pl.LightningModule):
        """A user's own hook, which comes after ours."""

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch, batch]

    data.trainer = SimpleNamespace(lightning_module=Doubled())
    moved = move_data_to_device({"a": [batch], "b": 3}, torch.device("cpu"))
    first, second = data._augmented_on_device(moved, 0)
    assert first is second
    assert drawn(first["a"]) == expected
    assert first["b"] == 3
    assert SEEDS not in first["a"][0]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
def test_a_cpu_training_leaves_the_hooks_to_the_module(tmp_path):
    """A LightningModule's own `on_after_batch_transfer` is called for every batch."""

    class Hooked(Watcher):
        hooked = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.hooked += 1
            return batch

    net = Hooked()
    trainer(tmp_path, max_epochs=1).fit(net, datamodule=module(tmp_path))
    assert net.hooked == 7 + 3


DISTRIBUTED = """
    import json, sys, warnings
    from pathlib import Path
    import pytorch_lightning as pl, torch
    from lightning_segxai import MRADataModule, PhantomCohort
    warnings.simplefilter("ignore")

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv3d(1, 1, 1)
            self.norm = torch.nn.BatchNorm3d(1)  # its buffers are synchronized in every forward
            self.seen, self.validated = [], []
        def forward(self, x):
            return self.norm(self.layer(x))
        def told(self, batch):
            places = map(tuple, batch["location"].tolist())
            return [(name, *place) for name, place in zip(batch["name"], places)]
        def training_step(self, batch, _):
            self.seen.append((self.current_epoch, self.told(batch)))
            return self(batch["image"]["data"]).mean()
        def validation_step(self, batch, _):
            self.validated.append((self.current_epoch, self.told(batch)))
            self.log("v", self(batch["image"]["data"]).mean(), sync_dist=True)
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    out, subjects, cache = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    net = Net()
    data = MRADataModule(
        phantom=PhantomCohort(subjects, (24, 24, 24)), patch_size=16, batch_size=3,
        samples_per_volume=4, cache=cache, cache_dir=out / "cache", validation_share=0.3,
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=out,
    )
    trainer.fit(net, datamodule=data)
    told = {"seen": net.seen, "validated": net.validated, "world": trainer.world_size,
            "train": [r["name"] for r in data.splits if r["split"] == "train"]}
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.parametrize(("subjects", "cache"), [(6, "disk"), (7, "none")])
def test_two_processes_share_an_epoch(tmp_path, subjects, cache):
    """Nobody seeds, shards or sets the epoch, and each patch is seen once, on one of two ranks.

    Where the volumes divide by two, no subject is on both.
    """
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    command = [sys.executable, str(script), str(tmp_path), str(subjects), cache]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:].decode()
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]

    train = ranks[0]["train"]
    assert [rank["world"] for rank in ranks] == [2, 2]
    epochs = []
    for epoch in (0, 1):
        batches = [[b for e, b in rank["seen"] if e == epoch] for rank in ranks]
        drawn = [[tuple(p) for batch in mine for p in batch] for mine in batches]
        assert len(batches[0]) == len(batches[1])
        assert Counter(p[0] for mine in drawn for p in mine) == dict.fromkeys(train, 4)
        if len(train) % 2 == 0:
            assert not {p[0] for p in drawn[0]} & {p[0] for p in drawn[1]}
        epochs.append(drawn)
        tiles = [tuple(p) for rank in ranks for e, b in rank["validated"] if e == epoch for p in b]
        assert len(tiles) == len(set(tiles)) == 8 * (subjects - len(train))
    assert epochs[0] != epochs[1]


def write(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def files(tmp_path, name, seed=0, affine=None, **changes):
    """A labeled volume on disk, with something wrong in it where changes say so."""
    image = np.random.default_rng(seed).normal(100, 10, (20, 18, 16)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[8:11, 8:11] = 1
    image = changes.pop("image", image)
    label = changes.pop("label", label)
    return SubjectFiles(
        image=write(tmp_path / f"{name}.nii.gz", image, affine),
        label=None
        if label is None
        else write(tmp_path / f"{name}-label.nii.gz", label, changes.pop("label_affine", affine)),
        name=name,
        **changes,
    )


def test_all_problems_are_told_at_once(tmp_path):
    """One error names every subject that cannot be used, why, and what else should be known."""
    nan = np.ones((20, 18, 16), np.float32)
    nan[3, 3, 3] = np.nan
    moved = np.eye(4)
    moved[0, 3] = 2.0
    subjects = [
        files(tmp_path, "good", 1),
        files(tmp_path, "fine", 2, affine=np.diag([0.5, 0.5, 0.8, 1])),
        files(tmp_path, "nan", image=nan),
        files(tmp_path, "unlabeled", 3, label=None),
        files(tmp_path, "empty", 4, label=np.zeros((20, 18, 16), np.uint8)),
        files(tmp_path, "other", 5, label=np.ones((4, 4, 4), np.uint8)),
        files(tmp_path, "moved", 6, label_affine=moved),
        files(tmp_path, "broken", 7),
    ]
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    with pytest.raises(ValueError, match="6 of 8 subjects") as error:
        module(tmp_path, phantom=None, subjects=subjects, patch_size=24).setup()

    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 8
    for name, told in (
        ("nan", "NaN or infinity"),
        ("unlabeled", "no label"),
        ("empty", "no vessel voxel"),
        ("other", "(4, 4, 4) voxels"),
        ("moved", "2 mm away"),
        ("broken", "cannot be read"),
    ):
        assert any(f'"{name}"' in line and told in line for line in lines), name
    assert "2 volumes are smaller than the patch of (24, 24, 24)" in lines[6]
    assert "2 different spacings: 1 x 1 x 1 mm (1), 0.5 x 0.5 x 0.8 mm (1)" in lines[7]
    assert "spacing_mm" in lines[7]


def test_one_image_in_two_splits_is_refused(tmp_path):
    """A volume that is trained and validated on under two names is found by its voxels."""
    subjects = [
        files(tmp_path, "a", 1, split="train"),
        files(tmp_path, "b", 2, split="train"),
        files(tmp_path, "copy-of-a", 1, split="val"),
    ]
    with pytest.raises(ValueError, match=r'"a" \(train\), "copy-of-a" \(val\) have the very same'):
        module(tmp_path, phantom=None, subjects=subjects).setup()


def test_spacings_are_made_equal(tmp_path):
    """With `spacing_mm` every volume, its label and its probes have that spacing."""
    subjects = [
        files(tmp_path, "a", 1),
        files(tmp_path, "b", 2, affine=np.diag([0.5, 0.5, 0.8, 1])),
    ]
    data = module(tmp_path, phantom=None, subjects=subjects, spacing_mm=0.8, patch_size=8)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            for affine in batch["image"]["affine"]:
                assert np.diag(affine)[:3] == pytest.approx((0.8, 0.8, 0.8))
    assert data.probes()[0].spacing_mm == pytest.approx((0.8, 0.8, 0.8))


def test_a_full_disk_falls_back_to_memory(tmp_path, monkeypatch):
    """Training goes on with what fits on the disk, and says where the rest is."""
    write = VolumeCache.write
    written = []

    def full(self, key, volume):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(key)
        write(self, key, volume)

    monkeypatch.setattr(VolumeCache, "write", full)
    seed_everything(3, verbose=False)
    data = module(tmp_path, cache="disk")
    with pytest.warns(UserWarning, match=r'No space left.*"phantom-02" on they are kept in memory'):
        data.setup()
    monkeypatch.undo()

    assert len(list((tmp_path / "cache").glob("*/entry.json"))) == 2
    expected = drawn(module(tmp_path, cache="memory").train_dataloader())
    assert drawn(data.train_dataloader()) == expected


def test_a_full_disk_and_little_memory_fall_back_to_reading_anew(tmp_path, monkeypatch):
    """What neither disk nor memory takes is read anew in every epoch, by TorchIO's queue."""

    def full(self, key, volume):
        raise OSError(errno.ENOSPC, "No space left on device")

    seed_everything(3, verbose=False)
    expected = sorted(drawn(module(tmp_path, cache="memory").train_dataloader()))
    monkeypatch.setattr(VolumeCache, "write", full)
    monkeypatch.setattr("lightning_segxai.data.room.free_memory", lambda: 1000)
    data = module(tmp_path, cache="disk")
    with pytest.warns(UserWarning, match=r'"phantom-00" on they are read anew in every epoch'):
        data.setup()

    loader = data.train_dataloader()
    assert type(loader.dataset).__name__ == "QueuedPatches"
    assert sorted(drawn(loader)) == expected


@dataclass(frozen=True)
class Broken(Sampling):
    """A user's sampling with a bug."""

    def index(self, volume):
        raise KeyError("bug")

    def start(self, volume, size, nth, generator):
        return (0, 0, 0)


def test_anybodys_failure_is_told_with_its_subject(tmp_path):
    """Whatever code fails while a volume is prepared, the report says on which."""
    with pytest.raises(ValueError, match=r'5 of 5 subjects:\n  Subject "phantom-00" cannot be'):
        module(tmp_path, sampling=Broken()).setup()


def test_vessels_that_resampling_loses_are_told(tmp_path):
    """A label without a vessel after the preprocessing is refused, by name."""
    thin = np.zeros((20, 18, 16), np.uint8)
    thin[9, 9, 9] = 1
    subjects = [files(tmp_path, "a", 1), files(tmp_path, "b", 2, label=thin)]
    with pytest.raises(ValueError, match=r'label of subject "b" has no vessel voxel left'):
        module(tmp_path, phantom=None, subjects=subjects, spacing_mm=4.0).setup()


def test_maps_of_fractions_keep_them(tmp_path):
    """A probability map among the maps is no label map: it can be sampled by."""
    chance = np.zeros((20, 18, 16), np.float32)
    chance[4, 5, 6] = 0.25
    maps = {"chance": write(tmp_path / "chance.nii.gz", chance)}
    subjects = [files(tmp_path, name, seed, maps=maps) for seed, name in enumerate("ab")]
    by_chance = WeightedSampling(map="chance")
    data = module(tmp_path, phantom=None, subjects=subjects, sampling=by_chance, patch_size=4)

    locations = [batch["location"] for batch in data.train_dataloader()]
    assert {tuple(place) for one in locations for place in one.tolist()} == {(2, 3, 4, 6, 7, 8)}


def test_volumes_are_tested_once_where_processes_allow(tmp_path):
    """Three volumes on two processes: two and one; a process without any repeats one, told."""
    data = module(tmp_path, test_share=0.6)
    seen = []
    for rank in (0, 1):
        data._place = lambda rank=rank: (rank, 2)
        seen += [batch["name"][0] for batch in data.test_dataloader()]
    assert sorted(seen) == [row["name"] for row in data.splits if row["split"] == "test"]
    data._place = lambda: (4, 5)
    with pytest.warns(UserWarning, match="Process 4 of 5 looks at 1 of 3 volumes or tiles again"):
        data.test_dataloader()


def test_a_damaged_entry_is_made_again(tmp_path):
    """Whatever was changed in the cache on disk, training sees the true volumes, and a warning."""
    seed_everything(3, verbose=False)
    expected = drawn(module(tmp_path, cache="disk").train_dataloader())
    image = next((tmp_path / "cache").glob("*/image.raw"))
    damaged = bytearray(image.read_bytes())
    damaged[1000] ^= 1
    image.write_bytes(damaged)
    (label,) = [
        p for p in (tmp_path / "cache").glob("*/map-label.raw") if p.parent != image.parent
    ][:1]
    label.write_bytes(label.read_bytes()[:-1])
    data = module(tmp_path, cache="disk")
    with pytest.warns(UserWarning, match="damaged") as told:
        found = drawn(data.train_dataloader()), list(data.test_dataloader())
    assert found[0] == expected
    assert len([w for w in told if "damaged" in str(w.message)]) == 2
    assert drawn(module(tmp_path, cache="disk").train_dataloader()) == expected


def test_fingerprints_do_not_depend_on_where_volumes_are_kept(tmp_path):
    """Memory, disk and nowhere, folder and number of threads: the same probes."""
    prints = set()
    for n, cache in enumerate(("memory", "disk", "disk", "none")):
        here = tmp_path / str(n)
        subjects = [files(here, name, seed) for seed, name in enumerate("abc")]
        data = module(tmp_path, phantom=None, subjects=subjects, cache=cache)
        with pytest.warns(UserWarning, match="only 1 distinct"):
            prints.add(tuple(p.fingerprint for p in data.probes()))
    assert len(prints) == 1


def test_maps_reach_the_sampling_and_the_probes(tmp_path):
    """Weights decide where patches lie and stay out of the scaling; other maps become regions."""
    weights = np.zeros((20, 18, 16), np.float32)
    weights[4, 5, 6] = 0.5
    brain = np.ones((20, 18, 16), np.uint8)
    given = {
        "weights": write(tmp_path / "w.nii.gz", weights),
        "maps": {"brain": write(tmp_path / "brain.nii.gz", brain)},
    }
    subjects = [files(tmp_path, name, seed, **given) for seed, name in enumerate("ab")]
    data = module(
        tmp_path, phantom=None, subjects=subjects, sampling=WeightedSampling(), patch_size=(4, 4, 4)
    )
    places = {
        tuple(place) for batch in data.train_dataloader() for place in batch["location"].tolist()
    }

    assert places == {(2, 3, 4, 6, 7, 8)}
    assert data.probes()[0].regions.keys() == {"brain"}


def test_splits_name_everyone(tmp_path):
    """Rows for `splits.csv`: each volume once, with its split, by folds too."""
    folds = []
    for fold in range(5):
        data = module(tmp_path, fold=fold, folds=5, sampling=CaliberSampling())
        rows = data.splits
        assert [row["name"] for row in rows] == [f"phantom-0{n}" for n in range(5)]
        folds += [row["name"] for row in rows if row["split"] == "val"]
    assert sorted(folds) == [f"phantom-0{n}" for n in range(5)]
    data = module(tmp_path, test_share=0.2)
    data.setup()
    tested = [b["name"][0] for b in data.test_dataloader()]
    assert [row["name"] for row in data.splits if row["split"] == "test"] == tested


def test_probes_of_a_kind_are_those_of_the_validation_subjects(tmp_path):
    """A choice of probes is followed, and looks for misses only with a network."""
    data = module(tmp_path, probes=ProbeChoice(n=1, kind="whole"))
    (whole,) = data.probes()
    assert whole.shape == (32, 32, 24)
    assert whole.name == next(row["name"] for row in data.splits if row["split"] == "val")

    missing = module(tmp_path, probes=ProbeChoice(n=1, kind="largest_missed", ckpt="x.ckpt"))
    with pytest.raises(ValueError, match="needs the network"):
        missing.probes()
    (probe,) = missing.probes(segment=lambda ckpt, image: torch.zeros(image.shape[1:]).int())
    assert probe.name.endswith("-missed-1")
    assert probe.label.any()


def test_strangers_transforms_run_too(tmp_path):
    """A transform without a vectorized twin is TorchIO's own, and repeats just the same."""
    seed_everything(3, verbose=False)
    strange = [tio.RandomGhosting(p=0.5), tio.RandomFlip(axes=("left",))]
    assert not Augmentation(strange).vectorized
    runs = [
        drawn(module(tmp_path, augmentation=strange, num_workers=workers).train_dataloader())
        for workers in (0, 2)
    ]
    assert runs[0] == runs[1]
