from __future__ import annotations

import hashlib
import importlib
import inspect
import random
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from pytorch_lightning import seed_everything

from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.probes import ProbeFile, read_probe
from lightning_segxai.data.subjects import PhantomCohort

COHORT = PhantomCohort(subjects=4, shape=(40, 40, 32))
NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def module(**settings):
    settings = {"phantom": COHORT, "patch_size": 16, "samples_per_volume": 4, **settings}
    data = MRADataModule(**settings)
    data.setup()
    return data


@pytest.fixture(scope="module")
def ready():
    return module(validation_share=0.4)


def md5(loader):
    digest = hashlib.md5()
    for batch in loader:
        digest.update("".join(batch["name"]).encode())
        for key in ("image", "label"):
            digest.update(batch[key]["data"].numpy().tobytes())
    return digest.hexdigest()


def names(data, split):
    return [row["name"] for row in data.splits if row["split"] == split]


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def write(root, name, image, label):
    for folder, array in (("images", image), ("labels", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / folder / f"{name}.nii.gz")


def folder(root, names="abc", shape=(20, 18, 16)):
    draw = np.random.default_rng(0)
    for name in names:
        image = draw.normal(100, 10, shape).astype(np.float32)
        label = np.zeros(shape, dtype=np.uint8)
        label[8:10, 8:10] = 1
        write(root, name, image + np.float32(300) * label, label)
    return root


def test_batches_are_torchios(ready):
    """A batch holds float32 images, whole-number labels of the same patch, and names."""
    batch = next(iter(ready.train_dataloader()))

    assert batch["image"]["data"].shape == (4, 1, 16, 16, 16)
    assert batch["image"]["data"].dtype is torch.float32
    assert batch["label"]["data"].shape == (4, 1, 16, 16, 16)
    assert not batch["label"]["data"].is_floating_point()
    assert all(name.startswith("phantom-") for name in batch["name"])


def test_label_stays_on_its_image(tmp_path):
    """What is bright in a patch is what its label says, through augmentation too."""
    data = module(
        root=str(folder(tmp_path)), phantom=None, augmentation=[tio.RandomFlip(axes=(0, 1, 2))]
    )
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert torch.equal(batch["image"]["data"] > 3, batch["label"]["data"] == 1)


def test_split_is_by_subject_and_by_seed(tmp_path):
    """Training and validation share no subject and miss none; the seed decides which."""
    folder(tmp_path, "abcdefgh", shape=(12, 12, 12))

    def split(**settings):
        data = module(root=tmp_path, phantom=None, patch_size=8, **settings)
        return [names(data, part) for part in ("train", "val")]

    training, validation = split(validation_share=0.4)

    assert len(validation) == 3
    assert sorted(training + validation) == list("abcdefgh")
    assert split(validation_share=0.4) == [training, validation]
    assert split(validation_share=0.4, seed=1) != [training, validation]
    assert len(split(validation_share=0.01)[1]) == 1
    assert len(split(validation_share=0.99)[0]) == 1


def test_intensities_are_normalized_and_not_clipped(tmp_path):
    """Where there is no air, all voxels together get mean 0 and deviation 1, by one factor."""
    data = module(root=folder(tmp_path), phantom=None)
    for batch in data.test_dataloader():
        raw = nib.load(tmp_path / "images" / f"{batch['name'][0]}.nii.gz").get_fdata()
        expected = (raw - raw.mean()) / raw.std()
        assert np.allclose(batch["image"]["data"][0, 0].numpy(), expected, atol=1e-4)


def test_training_epochs_repeat_with_the_seed(ready):
    """Two epochs have the same patches whenever the seed is the same, and differ among them."""

    def epochs(seed):
        seed_everything(seed, workers=True, verbose=False)
        loader = ready.train_dataloader()
        return [md5(loader) for _ in range(2)]

    first = epochs(7)

    assert epochs(7) == first
    assert first[0] != first[1]
    assert epochs(8)[0] != first[0]


def test_every_volume_gives_as_many_patches(ready):
    """In each epoch every training subject is drawn from equally."""
    loader = ready.train_dataloader()
    for _ in range(2):
        batches = list(loader)
        drawn = [name for batch in batches for name in batch["name"]]
        assert sorted(drawn) == sorted(names(ready, "train") * 4)


def test_validation_is_always_the_same_and_draws_no_random_number(ready):
    """Validation patches repeat, cover the volumes, and leave the generators alone."""
    loader = ready.val_dataloader()
    before = states()
    first = md5(loader)
    torch.rand(3)
    assert md5(loader) == first
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    assert md5(ready.val_dataloader()) == first
    assert states() == before

    covered = torch.zeros(2, 40, 40, 32)
    subjects = names(ready, "val")
    for batch in loader:
        for name, (i, j, k, *ends) in zip(batch["name"], batch["location"].tolist(), strict=True):
            covered[subjects.index(name), i : ends[0], j : ends[1], k : ends[2]] += 1
    assert (covered > 0).all()


def test_test_and_predict_give_whole_volumes(ready):
    """Each validation volume comes whole and once."""
    for loader in (ready.test_dataloader(), ready.predict_dataloader()):
        shapes = [tuple(batch["image"]["data"].shape) for batch in loader]
        assert shapes == [(1, 1, 40, 40, 32)] * 2


def test_default_probes_are_vessel_patches_of_validation_subjects(ready):
    """Four distinct patches of the training size, spread over subjects, with vessels in them."""
    probes = ready.probes()
    subjects = names(ready, "val")

    assert [p.name for p in probes] == [f"{s}-{n}" for n in (1, 2) for s in subjects]
    assert len({p.fingerprint for p in probes}) == 4
    for probe in probes:
        assert probe.shape == (16, 16, 16)
        assert probe.label.sum() > 0
        assert probe.regions["brain"].any()
        assert probe.spacing_mm == pytest.approx(COHORT.spacing_mm)
        assert "ForegroundNormalization" in probe.preprocessing


def test_probes_repeat_and_draw_no_random_number():
    """The same probes come from any seed of the run, even where they read the data first."""
    prints = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        data = MRADataModule(phantom=PhantomCohort(3, (32, 32, 24)), patch_size=8)
        prints.append([p.fingerprint for p in data.probes()])
        assert states() == before
    assert prints[0] == prints[1]


def test_probes_from_files_get_the_preprocessing(tmp_path):
    """Files are explained whole, scaled as the training volumes are."""
    folder(tmp_path)
    path, label = (str(tmp_path / d / "b.nii.gz") for d in ("images", "labels"))
    data = MRADataModule(root=tmp_path, probes=[ProbeFile(path, label, "b")])
    (probe,) = data.probes()

    assert probe.shape == (20, 18, 16)
    assert probe.fingerprint == read_probe(path, label, "b", data.preprocessing).fingerprint


def test_too_few_places_are_said():
    """Where the volumes do not hold as many distinct patches, fewer come with a warning."""
    data = module(patch_size=(40, 40, 32), phantom=PhantomCohort(2, (40, 40, 32)))
    with pytest.warns(UserWarning, match=r"probes=4.* only 1 distinct"):
        assert len(data.probes()) == 1


def test_small_volumes_are_padded_and_named(tmp_path):
    """Volumes smaller than the patch train, validate and are explained all the same."""
    with pytest.warns(UserWarning, match=r"3 volumes are smaller .* a, b, c"):
        data = module(root=folder(tmp_path), phantom=None, patch_size=(16, 16, 24))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch["image"]["data"].shape[2:] == (16, 16, 24)
    with pytest.warns(UserWarning, match=r"padded|only 1 distinct"):
        assert data.probes()[0].shape == (16, 16, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"either `root`.* or `phantom`.*root=None, phantom=None, subjects=None"),
        ({"root": "x", "phantom": COHORT}, r"either `root`.*root='x'"),
        ({"root": "x", "validation_share": 1.0}, r"validation_share=1\.0"),
        ({"root": "x", "batch_size": 0}, r"batch_size=0.*at least 1"),
        ({"root": "x", "patch_size": 0}, r"`patch_size` needs one or three"),
        ({"root": "x", "probes": -1}, r"probes=-1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    """A configuration that cannot work ends before any data are read."""
    with pytest.raises(ValueError, match=message):
        MRADataModule(**settings)


def test_setup_names_every_broken_subject(tmp_path):
    """All unusable volumes are told in one error."""
    folder(tmp_path, "abcd")
    write(tmp_path, "b", np.ones((4, 4, 4), np.float32), np.ones((4, 4, 4), np.uint8))
    (tmp_path / "images" / "d.nii.gz").write_text("broken")
    with pytest.raises(ValueError, match=r"(?s)2 of 4 subjects:.*\"b\".*same value.*\"d\""):
        module(root=tmp_path, phantom=None)


def test_setup_checks_classes_and_number(tmp_path):
    """Labels beyond the classes, and a single subject, are refused."""
    with pytest.raises(ValueError, match=r"at least 2 subjects.*found 1 in all: a"):
        module(root=folder(tmp_path, "a"), phantom=None)
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 0, but holds 1"):
        module(root=folder(tmp_path), phantom=None, classes=1)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
def test_runs_in_the_trainer_of(namespace, tmp_path):
    """Both namespaces' Trainers fit, validate, test and predict with it."""
    lightning = importlib.import_module(namespace)

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv3d(1, 2, 1)

        def training_step(self, batch, _):
            logits = self.conv(batch["image"]["data"])
            return torch.nn.functional.cross_entropy(logits, batch["label"]["data"][:, 0].long())

        validation_step = test_step = training_step

        def predict_step(self, batch, _):
            return self.conv(batch["image"]["data"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = MRADataModule(phantom=PhantomCohort(3, (24, 24, 24)), patch_size=16)
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    net = Net()
    trainer.fit(net, datamodule=data)
    trainer.test(net, datamodule=data, verbose=False)

    assert trainer.global_step == 2
    assert trainer.predict(net, datamodule=data)[0].shape == (1, 2, 24, 24, 24)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_builds_from_yaml_in_the_cli_of(namespace, tmp_path):
    """A configuration file describes the phantom, transforms and probe files."""
    cli = importlib.import_module(f"{namespace}.cli")
    config = tmp_path / "config.yaml"
    config.write_text(
        """
data:
  phantom: {subjects: 3, shape: [24, 24, 24]}
  patch_size: [16, 16, 8]
  intensity:
    class_path: torchio.RescaleIntensity
    init_args: {percentiles: [0.5, 99.95]}
  augmentation:
    - class_path: torchio.RandomFlip
      init_args: {axes: [0]}
  probes:
    - {image: a.nii.gz, name: a}
"""
    )
    demo = importlib.import_module(f"{namespace}.demos.boring_classes").BoringModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether Lightning warns depends on how pytest was called
        built = cli.LightningCLI(
            demo,
            MRADataModule,
            args=["--config", str(config)],
            run=False,
            save_config_callback=None,
            trainer_defaults={"logger": False, "accelerator": "cpu"},
        )
    data = built.datamodule

    assert data.phantom == PhantomCohort(3, (24, 24, 24))
    assert data.patch_size == (16, 16, 8)
    assert data.intensity.percentiles == (0.5, 99.95)
    assert [type(t).__name__ for t in data.augmentation] == ["RandomFlip"]
    assert data._probes == [ProbeFile("a.nii.gz", name="a")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cache": "dsik"}, "ValueError: `MRADataModule(cache='dsik')` must be one of"),
        ({"sampling": "uniform"}, "TypeError: `MRADataModule(sampling='uniform')` must be a Sampl"),
        ({"probes": "thinnest"}, "TypeError: `MRADataModule(probes='thinnest')` must be a number"),
        (
            {"augmentation": "flip"},
            "TypeError: `MRADataModule(augmentation='flip')` must be a l",
        ),
        ({"spacing_mm": 0.0}, "ValueError: `MRADataModule(spacing_mm=0.0)` needs numbers above 0"),
    ],
)
def test_arguments_of_another_kind_are_named(given, told):
    """In plain Python too, where nobody has checked them before."""
    init = inspect.unwrap(MRADataModule.__init__)
    with pytest.raises((ValueError, TypeError)) as error:
        init(MRADataModule.__new__(MRADataModule), "x", **given)
    assert f"{type(error.value).__name__}: {error.value}".startswith(told)
