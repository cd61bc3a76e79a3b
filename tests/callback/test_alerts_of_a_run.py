"""Alerts in a training: the log, the records, W&B, and a resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
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
from lightning_segxai.alerts import Alert

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*costs ", "ignore:.*does not have many workers", "ignore:.*LeafSpec"
)

# a share of the mass is never below 0 and always below 2
ALERTS = {
    "always": Alert("mass_inside", below=2.0, for_epochs=2, method="saliency"),
    "never": Alert("mass_inside", below=0.0),
}
KEY = "segxai/metric/alert/always/vessel/saliency"


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """None of these tests looks at a picture."""
    quick_pictures(monkeypatch)


def fitted(root: Path, monitor: Any, epochs: int = 3, ckpt: Any = None, **changes: Any) -> Any:
    """The trainer after a fit, and what our alerts said in the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = ModelCheckpoint(root / "kept", "{step}", save_top_k=-1)
        trainer = tiny_trainer(
            root, monitor, kept, max_epochs=epochs, enable_checkpointing=True, **changes
        )
        trainer.fit(tiny_task(), datamodule=tiny_data(), ckpt_path=ckpt)
    said = [str(w.message) for w in caught]
    return trainer, [text for text in said if "alert" in text]


def states(monitor: Any, name: str) -> list[tuple[int, str, str, float]]:
    return [
        (r.step, r.probe, r.method, r.value)
        for r in records(monitor)
        if r.metric == f"alert/{name}" and r.status == "ok"
    ]


def test_an_alert_reaches_log_records_and_wandb(offline):
    """It is told at the second validation, once, and kept as numbers at all of them."""
    import wandb

    monitor = tiny_monitor(sinks=[WandbSink()], alerts=ALERTS)
    logger = WandbLogger(project="vessels", save_dir=str(offline), offline=True)
    trainer, said = fitted(offline, monitor, logger=logger)
    wandb.finish()
    (run,) = read_runs(offline)

    assert moments(monitor) == [(0, 0), (0, 4), (1, 8), (2, 12)]
    (text,) = said
    found = [r.value for r in records(monitor) if r.metric == "mass_inside" and r.step == 8]
    assert text == (
        'segxai alert "always": mass_inside of vessel/saliency is '
        f"{(found[0] + found[2]) / 2:.3g} at epoch 1, below 2 for 2 observations."
    )
    (sent,) = run.alerts
    assert sent.title == "always: mass_inside of vessel/saliency"
    assert (sent.text, sent.level) == (text, "WARN")

    probes = [p.name for p in monitor.probes]
    assert states(monitor, "always") == [
        (step, probe, "saliency", value)
        for step, value in ((4, 0.0), (8, 1.0), (12, 1.0))
        for probe in probes
    ]
    assert {value for *_, value in states(monitor, "never")} == {0.0}
    assert len(states(monitor, "never")) == 3 * 2 * len(probes)

    assert [row[KEY] for row in run.history if KEY in row] == [0, 1, 1]
    assert float(trainer.callback_metrics[KEY]) == 1.0
    tables = [row["segxai/table"] for row in run.history if "segxai/table" in row]
    table = json.loads(run.file(tables[-1]).read_text())
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert len(rows) == 4 * 2 * len(probes)
    assert {(r["step"], r["alert/always"]) for r in rows if r["method"] == "saliency"} == {
        (0, None),
        (4, 0),
        (8, 1),
        (12, 1),
    }
    settings = json.loads((monitor.run.folder.root / "run.json").read_text())["settings"]
    assert settings["monitor"]["alerts"] == {name: repr(a) for name, a in ALERTS.items()}


def test_an_alert_that_cannot_be_sent_does_not_end_the_training(offline, monkeypatch):
    """The failure is told, and the row was logged before."""
    import wandb

    def dead(*_: Any, **__: Any) -> None:
        raise OSError("no server")

    monkeypatch.setattr(wandb.Run, "alert", dead)
    monitor = tiny_monitor(sinks=[WandbSink(table=False)], alerts=ALERTS)
    logger = WandbLogger(project="vessels", save_dir=str(offline), offline=True)
    with pytest.warns(UserWarning, match="WandbSink failed: OSError: no server"):
        tiny_trainer(offline, monitor, max_epochs=3, logger=logger).fit(
            tiny_task(), datamodule=tiny_data()
        )
    wandb.finish()
    (run,) = read_runs(offline)

    assert moments(monitor)[-1] == (2, 12)
    assert [row[KEY] for row in run.history if KEY in row] == [0, 1, 1]


def test_long_titles_are_cut_for_wandb(offline):
    """W&B takes fewer than 64 characters; the text has all."""
    import wandb

    name = "a-name-as-long-as-this-one-that-is-hardly-ever-given-to-any-alert"
    monitor = tiny_monitor(
        sinks=[WandbSink(table=False)], alerts={name: Alert("mass_inside", below=2.0)}
    )
    logger = WandbLogger(project="vessels", save_dir=str(offline), offline=True)
    fitted(offline, monitor, epochs=1, logger=logger)
    wandb.finish()
    (run,) = read_runs(offline)

    assert [len(sent.title) for sent in run.alerts] == [63, 63]
    assert ["vessel/saliency" in sent.text for sent in run.alerts] == [True, False]


def test_records_that_cannot_be_read_cost_no_observation(tmp_path, monkeypatch):
    """The alerts are told to have failed; the numbers are written."""

    def torn(_: Any) -> Any:
        raise OSError("torn")

    monitor = tiny_monitor(alerts=ALERTS)
    with monkeypatch.context() as patched:
        patched.setattr("lightning_segxai.folder.RunFolder.read_records", torn)
        with pytest.warns(UserWarning, match="the alerts failed: OSError: torn"):
            tiny_trainer(tmp_path, monitor).fit(tiny_task(), datamodule=tiny_data())

    assert moments(monitor) == [(0, 0), (0, 4)]
    assert states(monitor, "always") == []


def test_a_resumed_run_counts_on(tmp_path):
    """One validation before the checkpoint and one after it are two in a row."""
    first = tiny_monitor(alerts=ALERTS)
    _, said = fitted(tmp_path, first, epochs=2)
    assert len(said) == 1
    ckpt = tmp_path / "kept" / "step=4.ckpt"
    resumed = tiny_monitor(alerts=ALERTS)
    _, again = fitted(tmp_path, resumed, epochs=3, ckpt=ckpt)

    assert len(again) == 1
    assert "at epoch 1" in again[0]
    assert [(step, value) for step, *_, value in states(resumed, "always")][::2] == [
        (4, 0.0),
        (8, 1.0),
        (12, 1.0),
    ]


def test_all_that_is_recorded_can_have_an_alert(tmp_path):
    """Every metric of a run is among those that the monitor says it computes, at its place."""
    monitor = tiny_monitor()
    tiny_trainer(tmp_path, monitor, max_epochs=2).fit(tiny_task(), datamodule=tiny_data())

    columns = monitor.questions.columns
    of = {
        r.metric: "map" if r.method else "target" if r.target else "probe" for r in records(monitor)
    }
    assert of.items() <= columns.items()
    assert set(columns) - set(of) == {"completeness_error", "cancellation", "doubtful"}


@pytest.mark.parametrize(
    ("alert", "said"),
    [
        (Alert("mass_outside", above=0.5), r"metric.*mass_outside.*Close to it:.*mass_inside"),
        (Alert("mass_inside", above=0.5, method="sal"), r"method.*Close to it: saliency"),
        (Alert("mass_inside", above=0.5, target="vessels"), r"target.*Close to it: vessel"),
    ],
)
def test_an_alert_of_what_this_monitor_does_not_compute_is_refused(alert, said):
    """By the constructor."""
    with pytest.raises(ValueError, match=said):
        tiny_monitor(alerts={"a": alert})
