"""A fit with a WandbLogger, offline, and what a dashboard would show of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from tiny_training import (
    moments,
    quick_pictures,
    records,
    tiny_data,
    tiny_monitor,
    tiny_task,
    tiny_trainer,
)
from wandb_log import read_runs

from lightning_segxai import WandbSink

pytestmark = pytest.mark.filterwarnings("ignore:.*costs .*", "ignore:.*LeafSpec")


def fitted(root: Any, epochs: int, ckpt: Any = None, **changes: Any) -> Any:
    """A monitor after a fit logged to W&B."""
    import wandb

    monitor = tiny_monitor(sinks=[WandbSink()])
    logger = WandbLogger(project="vessels", save_dir=str(root), offline=True)
    kept = ModelCheckpoint(root / "kept", "{step}", save_top_k=-1)
    trainer = tiny_trainer(
        root,
        monitor,
        kept,
        logger=logger,
        max_epochs=epochs,
        enable_checkpointing=True,
        **changes,
    )
    trainer.fit(tiny_task(), datamodule=tiny_data(), ckpt_path=ckpt)
    wandb.finish()
    return monitor


def table_of(run: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged table's rows as dictionaries."""
    content = json.loads(run.file(row["segxai/table"]).read_text())
    return [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]


def test_each_observation_is_one_row_of_the_history(offline):
    """With all pictures, the table, all scalars and the epoch, at the validation's own step."""
    monitor = fitted(offline, 1, val_check_interval=2)
    (run,) = read_runs(offline)
    probes = [p.name for p in monitor.probes]

    assert moments(monitor) == [(0, 0), (0, 2), (0, 4)]
    ours = [row for row in run.history if any(key.startswith("segxai/") for key in row)]
    assert len(ours) == 3
    assert [row["epoch"] for row in ours] == [0, 0, 0]
    validations = [row["trainer/global_step"] for row in run.history if "val_loss" in row]
    assert [row["trainer/global_step"] for row in ours] == [0, *validations]
    for row, (epoch, step) in zip(ours, moments(monitor), strict=True):
        for probe in probes:
            picture = run.file(row[f"segxai/probe/{probe}"])
            written = monitor.run.folder.panel_path(probe, epoch, step)
            with Image.open(picture) as shown, Image.open(written) as kept:
                assert shown.convert("RGB").tobytes() == kept.convert("RGB").tobytes()
        inside = [
            r.value
            for r in records(monitor)
            if (r.step, r.metric, r.method) == (step, "mass_inside", "saliency")
        ]
        assert len(inside) == len(probes)
        assert row["segxai/metric/mass_inside/vessel/saliency"] == pytest.approx(sum(inside) / 2)
        rows = table_of(run, row)
        assert len(rows) == len({(r["step"], r["probe"], r["method"]) for r in rows})
        assert {r["step"] for r in rows} == {s for _, s in moments(monitor) if s <= step}
        assert len(rows) == 2 * len(probes) * len({r["step"] for r in rows})

    config = run.config["segxai"]
    assert config["probes"] == {p.name: p.fingerprint for p in monitor.probes}
    assert config["settings"]["monitor"]["methods"]["saliency"].startswith("Saliency(")
    last = ours[-1]["segxai/metric/mass_inside/vessel/saliency"]
    assert run.summary["segxai/metric/mass_inside/vessel/saliency"] == pytest.approx(last)
    (artifact,) = [a for a in run.artifacts if a.type == "attributions"]
    assert artifact.name == f"segxai-{monitor.run.id}"
    assert monitor.run.id == run.id
    inside_it = {entry.path for entry in artifact.manifest.contents}
    assert {"run.json", "records.csv", "metrics.csv"} <= inside_it
    assert f"maps/{probes[0]}/vessel/saliency/e0000-s000004.nii.gz" in inside_it
    assert monitor.run.folder.root == offline / "vessels" / run.id / "segxai"


def test_the_table_is_whole_again_after_a_resume(offline, monkeypatch):
    """The second W&B run shows the validations of the first one too, up to the checkpoint."""
    quick_pictures(monkeypatch)
    fitted(offline, 2)
    monitor = fitted(offline, 3, offline / "kept" / "step=4.ckpt")
    _, second = read_runs(offline)

    ours = [row for row in second.history if "segxai/table" in row]
    assert [row["epoch"] for row in ours] == [1, 2]
    assert {r["step"] for r in table_of(second, ours[-1])} == {0, 4, 8, 12}
    assert moments(monitor) == [(0, 0), (0, 4), (1, 8), (2, 12)]
