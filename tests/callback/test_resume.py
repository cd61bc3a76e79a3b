"""A run that goes on from a checkpoint tells one story, as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny_training import (
    cell,
    metrics_rows,
    moments,
    plain_task,
    quick_pictures,
    records,
    still_pairs,
    tiny_data,
    tiny_monitor,
    tiny_task,
    tiny_trainer,
)
from torch.utils.data import DataLoader

from lightning_segxai import GradCAM, Saliency, SmoothGrad

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*costs .*", "ignore:.*does not have many workers", "ignore:.*LeafSpec"
)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """None of these tests looks at a picture."""
    quick_pictures(monkeypatch)


def fitted(root: Path, epochs: int, ckpt: Path | None = None, **changes: Any) -> Any:
    """A monitor after a training without any randomness; the probes come from a batch."""
    monitor = tiny_monitor(
        methods={
            "noise": SmoothGrad(inner=Saliency(), samples=2),
            "cam": GradCAM("net.encoder.0"),
        },
        every_n_validations=changes.pop("every_n", 1),
    )
    each = ModelCheckpoint(root / "kept", "{step}", save_top_k=-1, **changes.pop("checkpoint", {}))
    # one batch again and again: a DataLoader that is resumed in mid-epoch begins from the first
    same = DataLoader(still_pairs(2) * 4, batch_size=2)
    pairs = DataLoader(still_pairs(8), batch_size=2)
    trainer = tiny_trainer(
        root, monitor, each, max_epochs=epochs, enable_checkpointing=True, **changes
    )
    trainer.fit(plain_task(), same, pairs, ckpt_path=ckpt)
    return monitor


def story(monitor: Any) -> set[tuple[Any, ...]]:
    """All rows, but for the run's id, with values to the last bit."""
    return {(*cell(r), r.fingerprint, r.layer, repr(r.value), r.status) for r in records(monitor)}


def files(monitor: Any) -> dict[str, bytes]:
    """All maps and predictions."""
    root = monitor.run.folder.root
    found = (p for p in root.rglob("e*-s*.nii.gz"))
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "epoch ends": ({}, {}, "step=4.ckpt"),
    "validations": ({"val_check_interval": 2}, {}, "step=6.ckpt"),
    "every second validation": ({"val_check_interval": 2, "every_n": 2}, {}, "step=4.ckpt"),
    "steps": ({"val_check_interval": 2}, {"every_n_train_steps": 3}, "step=3.ckpt"),
    # Lightning saves before the validation of that step, and does not repeat it on resume
    "steps before their validation": (
        {"val_check_interval": 2},
        {"every_n_train_steps": 2},
        "step=6.ckpt",
    ),
    "last steps of an epoch": ({}, {"every_n_train_steps": 4}, "step=4.ckpt"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_resumed_run_is_an_uninterrupted_one(kind, tmp_path):
    """Rows, maps and references are those of a run that never stopped, bit by bit."""
    training, saving, ckpt = CHECKPOINTS[kind]
    whole = fitted(tmp_path / "whole", 3, **training, checkpoint=saving)
    stopped = fitted(tmp_path / "stopped", 2, **training, checkpoint=saving)
    kept = tmp_path / "stopped" / "kept" / ckpt
    resumed = fitted(tmp_path / "stopped", 3, kept, **training, checkpoint=saving)

    assert resumed.run.folder.root == stopped.run.folder.root
    assert resumed.run.id == stopped.run.id
    cells = [cell(r) for r in records(resumed)]
    assert len(set(cells)) == len(cells)
    assert moments(resumed) == moments(whole)
    assert story(resumed) == story(whole)
    assert files(resumed) == files(whole)
    states = [resumed.state_dict(), whole.state_dict()]
    for state in states:
        del state["folder"], state["run"]
    assert states[0] == states[1]
    # what the validations themselves said, too
    val = [[row for row in metrics_rows(m) if row[2].startswith("val")] for m in (resumed, whole)]
    assert val[0] == val[1]


def test_what_came_after_the_checkpoint_is_removed(tmp_path):
    """Rows and files of steps that the resumed run has not reached again."""
    before = fitted(tmp_path, 3)
    assert moments(before) == [(0, 0), (0, 4), (1, 8), (2, 12)]
    resumed = fitted(tmp_path, 2, tmp_path / "kept" / "step=4.ckpt")

    assert moments(resumed) == [(0, 0), (0, 4), (1, 8)]
    assert {name.rsplit("-s")[1] for name in files(resumed)} == {
        "000000.nii.gz",
        "000004.nii.gz",
        "000008.nii.gz",
    }
    assert {step for _, step, *_ in metrics_rows(resumed)} == {4, 8}


def test_probes_of_a_batch_are_read_back(tmp_path):
    """Not taken anew: another first batch would be other probes."""
    before = fitted(tmp_path, 1)
    monitor = tiny_monitor()
    others = DataLoader([(1 - image, label) for image, label in still_pairs(8)], batch_size=2)
    tiny_trainer(tmp_path, monitor, max_epochs=2).fit(
        plain_task(), others, others, ckpt_path=tmp_path / "kept" / "step=4.ckpt"
    )

    assert [p.fingerprint for p in monitor.probes] == [p.fingerprint for p in before.probes]
    assert len({r.fingerprint for r in records(monitor)}) == len(before.probes)


def test_a_checkpoint_holds_primitives_only(tmp_path):
    """A numpy number, say, would make the user's whole checkpoint unloadable."""
    monitor = tiny_monitor()
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    tiny_trainer(tmp_path, monitor, kept, enable_checkpointing=True).fit(
        tiny_task(), datamodule=tiny_data()
    )

    def check(content: Any) -> None:
        assert type(content) in (dict, list, str, int, float), type(content)
        for part in content.values() if isinstance(content, dict) else []:
            check(part)
        for part in content if isinstance(content, list | dict) else []:
            check(part)

    loaded = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    state = loaded["callbacks"][monitor.state_key]
    check(state)
    assert state == monitor.state_dict()
    assert state["folder"] == str(monitor.run.folder.root)
    assert state["last_step"] == 4
    assert len(json.dumps(state)) < 10_000


def test_a_state_before_the_run_is_open_says_nothing():
    """A monitor that has not looked yet has no state, and passes on what it was given."""
    monitor = tiny_monitor()
    assert monitor.state_dict() == {}
    given = {"folder": "/nowhere", "run": "r", "probes": ["p"]}
    monitor.load_state_dict(given)
    assert monitor.state_dict() == given


def test_a_checkpoint_whose_folder_is_gone_begins_anew(tmp_path):
    """Moved to another machine, say: the training goes on, in a new folder."""
    before = fitted(tmp_path, 1)
    shutil.rmtree(before.run.folder.root)
    resumed = fitted(tmp_path, 2, tmp_path / "kept" / "step=4.ckpt")

    assert moments(resumed) == [(1, 8)]
    assert (resumed.run.folder.root / "run.json").is_file()


def test_a_checkpoint_without_the_monitor_is_resumed(tmp_path):
    """The monitor may be added in the middle of a training."""
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    tiny_trainer(tmp_path, kept, enable_checkpointing=True).fit(tiny_task(), datamodule=tiny_data())
    monitor = tiny_monitor()
    tiny_trainer(tmp_path, monitor, max_epochs=2).fit(
        tiny_task(), datamodule=tiny_data(), ckpt_path=tmp_path / "kept" / "last.ckpt"
    )

    assert moments(monitor) == [(1, 8)]
