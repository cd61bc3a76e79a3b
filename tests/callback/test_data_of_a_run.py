"""What a run keeps of its data module: the split, and probes that ask for the network."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import quick_pictures, tiny_monitor, tiny_task, tiny_trainer

from lightning_segxai import MRADataModule, PhantomCohort, ProbeChoice
from lightning_segxai.checkpoints import segment
from lightning_segxai.scored import Predictor

pytestmark = pytest.mark.filterwarnings("ignore:.*costs ", "ignore:.*LeafSpec")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """None of these tests looks at a picture."""
    quick_pictures(monkeypatch)


def data(**changes):
    cohort = PhantomCohort(subjects=4, shape=(32, 32, 24))
    small = {"patch_size": 16, "batch_size": 2, "samples_per_volume": 2, "probes": 1}
    return MRADataModule(phantom=cohort, **(small | changes))


def test_the_split_is_kept(tmp_path):
    """`splits.csv` lies in the run's folder, and another split on resume is warned of."""
    monitor = tiny_monitor()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "one")
    module = data()
    tiny_trainer(tmp_path, monitor, saving, enable_checkpointing=True).fit(
        tiny_task(), datamodule=module
    )
    folder = monitor.run.folder

    assert folder.read_splits() == module.splits
    assert {row["split"] for row in module.splits} == {"train", "val"}
    again = tiny_trainer(tmp_path, tiny_monitor(), saving, enable_checkpointing=True, max_epochs=2)
    with pytest.warns(UserWarning, match="resumed run was split otherwise"):
        again.fit(tiny_task(), datamodule=data(seed=5), ckpt_path=tmp_path / "one.ckpt")
    assert folder.read_splits() == module.splits  # what it trained on at first


def checkpoint(path, seed):
    """A checkpoint of the tiny network with other weights, which sees few vessels."""
    trainer = tiny_trainer(path.parent, enable_checkpointing=True)
    task = tiny_task(seed)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return str(path)


def test_a_checkpoint_segments_without_the_network_knowing(tmp_path):
    """The class of every voxel is that of the checkpoint's network; the network itself stays."""
    path = checkpoint(tmp_path / "other.ckpt", seed=5)
    task, other = tiny_task(0), tiny_task(5).eval()
    before = copy.deepcopy(task.state_dict())
    image = torch.randn(1, 24, 20, 16)

    found = segment(Predictor(task), object(), None, path, image)
    windowed = segment(Predictor(task), object(), (16, 16, 16), path, image)

    with torch.no_grad():
        logits = other(image[None])
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert torch.equal(found, (logits[0, 0] > 0).long())
    assert torch.equal(windowed, (other.predict_volume(image, 16)[0] > 0).long())
    assert task.training
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())


def test_probes_lie_where_a_checkpoint_missed_most(tmp_path):
    """The monitor lends the network to the data module, and training stays as it was."""
    path = checkpoint(tmp_path / "other.ckpt", seed=5)
    weights = []
    for monitored in (False, True):
        choice = ProbeChoice(n=2, kind="largest_missed", ckpt=path)
        module = data(probes=choice, validation_share=0.5)
        monitor = tiny_monitor()
        task = tiny_task()
        torch.manual_seed(3)
        tiny_trainer(tmp_path, *[monitor] * monitored).fit(task, datamodule=module)
        weights.append(task.state_dict())

    names = [probe.name for probe in monitor.probes]
    assert len(names) == 2
    assert all("-missed-" in name for name in names)
    assert all(probe.label.any() for probe in monitor.probes)
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
