"""What W&B must get, read back from what real offline runs wrote."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from wandb_log import read_runs

from lightning_segxai.folder import RunFolder
from lightning_segxai.sinks.base import Observation, Run, means
from lightning_segxai.sinks.files import FileSink
from lightning_segxai.sinks.wandb import WandbSink, _shown, _tabulate
from lightning_segxai.values import Probe, Record

PROBES = tuple(Probe(name, torch.rand(1, 2, 2, 2)) for name in ("left", "right"))


@pytest.fixture
def offline(offline):
    """Where W&B writes."""
    return offline / "wandb_dir"


def a_record(step: int, probe: str, metric: str, value: float, method="ig", target="vessel", **kw):
    return Record(
        "r1", step // 10, step, probe, "f" * 16, target, method, "", metric, "1", value, **kw
    )


def records_at(step: int) -> tuple[Record, ...]:
    """Two probes; the second one's map failed at step 20."""
    failed = {"status": "failed"} if step == 20 else {}
    right = math.nan if failed else 0.5
    return (
        a_record(step, "left", "dice", step / 100, method="", target=""),
        a_record(step, "right", "dice", 0.3, method="", target=""),
        a_record(step, "left", "region_voxels", 8.0, method=""),
        a_record(step, "left", "inside", 0.25),
        a_record(step, "right", "inside", right, **failed),
        a_record(step, "left", "center_shift/first", math.nan, status="unsupported"),
    )


def an_observation(step: int) -> Observation:
    panels = {p.name: Image.new("RGB", (8, 6), (200, 10 * n, step)) for n, p in enumerate(PROBES)}
    return Observation(step // 10, step, step - 1, (), records_at(step), {}, panels)


def a_note() -> PngInfo:
    note = PngInfo()
    note.add_text("by", "the file sink")
    return note


def a_run(root, loggers=(), run_id="r1") -> Run:
    settings = {"seed": 3, "limit": math.inf, "root": root}
    return Run(run_id, "segxai", RunFolder(root), PROBES, settings, tuple(loggers))


def train(run: Run, steps: list[int]) -> None:
    """The life of the sinks, as the callback leads it."""
    sinks = (FileSink(), WandbSink())
    for sink in sinks:
        sink.open(run)
    for step in steps:
        for sink in sinks:
            sink.write(run, an_observation(step))
    for sink in sinks:
        sink.close(run)


def test_two_runs_in_one_process_leave_all_that_a_dashboard_shows(offline, tmp_path):
    """A validation is one row of pictures, table, curves; then config, summary and artifact."""
    import wandb
    from pytorch_lightning.loggers import CSVLogger, WandbLogger

    for run_id, steps in (("r1", [0, 10, 20]), ("r2", [5])):
        logger = WandbLogger(project="test", save_dir=str(offline), id=run_id)
        others = CSVLogger(tmp_path / "csv")
        train(a_run(tmp_path / run_id, [others, logger], run_id), steps)
        wandb.finish()
    wandb.teardown()

    first, second = read_runs(offline)
    assert (first.id, second.id) == ("r1", "r2")
    assert (first.finished, second.finished) == (True, True)
    assert (len(first.history), len(second.history)) == (3, 1)
    for n, row in enumerate(first.history):
        step = 10 * n
        assert row["_step"] == n
        assert row["trainer/global_step"] == step - 1
        assert row["epoch"] == n
        assert row["segxai/metric/dice"] == pytest.approx((step / 100 + 0.3) / 2)
        assert row["segxai/metric/region_voxels/vessel"] == 8
        assert row["segxai/metric/inside/vessel/ig"] == (0.25 if step == 20 else 0.375)
        assert not any("center_shift" in key for key in row)
        for p, probe in enumerate(PROBES):
            with Image.open(first.file(row[f"segxai/probe/{probe.name}"])) as picture:
                assert np.array_equal(np.asarray(picture), np.full((6, 8, 3), (200, 10 * p, step)))
        table = json.loads(first.file(row["segxai/table"]).read_text())
        assert table["columns"] == [
            *("epoch", "step", "probe", "target", "method"),
            *("dice", "region_voxels", "inside", "center_shift/first"),
        ]
        assert len(table["data"]) == row["segxai/table"]["nrows"] == 2 * (n + 1)
    assert table["data"][-2:] == [
        [2, 20, "left", "vessel", "ig", 0.2, 8, 0.25, None],
        [2, 20, "right", "vessel", "ig", 0.3, None, None, None],
    ]

    assert first.config["segxai"] == {
        "settings": {"seed": 3, "limit": "Infinity", "root": str(tmp_path / "r1")},
        "probes": {p.name: p.fingerprint for p in PROBES},
    }
    assert first.summary["segxai/metric/dice"] == pytest.approx(0.25)
    assert first.summary["segxai/metric/inside/vessel/ig"] == 0.25
    (artifact,) = [a for a in first.artifacts if a.type == "attributions"]
    assert artifact.name == "segxai-r1"
    assert len(list((first.folder / "files" / "media").rglob("*.*"))) == 3 * 3
    held = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    written = (p for p in (tmp_path / "r1").rglob("*.*") if p.is_file())
    assert set(held) == {p.relative_to(tmp_path / "r1").as_posix() for p in written}
    picture = "panels/left/e0000-s000000.png"
    assert held[picture] == str(tmp_path / "r1" / picture)  # not copied
    assert held["records.csv"] != str(tmp_path / "r1" / "records.csv")  # may grow on resume


def test_a_disabled_run_is_left_alone(offline, tmp_path):
    """With mode="disabled" the files are written and W&B gets nothing."""
    from pytorch_lightning.loggers import WandbLogger

    run = a_run(tmp_path / "r1", [WandbLogger(project="test", mode="disabled")])
    train(run, [0])

    assert len(run.folder.read_records()) == len(records_at(0))
    assert read_runs(offline) == []


def test_without_wandb_logger_nothing_happens(tmp_path):
    """No logger, another logger, and the stand-in of a process that does not log are all fine."""
    from lightning_fabric.loggers.logger import _DummyExperiment

    class WandbLogger:
        experiment = _DummyExperiment()

        def log_metrics(self, metrics, step):
            pytest.fail("the stand-in was logged to")

    before = dict(os.environ)
    train(a_run(tmp_path / "r1", [object(), WandbLogger()]), [0])

    assert dict(os.environ) == before


class WandbLogger:
    """Keeps what is logged; found by its name like the loggers of both Lightnings."""

    class _Experiment:
        disabled = False

    def __init__(self):
        self.experiment = self._Experiment()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class ChildLogger(WandbLogger):
    """A user's own."""


def test_every_wandb_logger_gets_its_row_under_the_monitor_s_name(tmp_path):
    """Subclasses count, two loggers get objects of their own, and switches switch off."""
    loggers = [WandbLogger(), ChildLogger()]
    run = dataclasses.replace(a_run(tmp_path, loggers), monitor="focus")

    WandbSink(table=False).write(run, an_observation(10))
    WandbSink(pictures=False).write(run, an_observation(10))

    for logger in loggers:
        (step, pictures), (_, table) = logger.rows
        assert step == 9
        curves = {
            "epoch",
            "focus/metric/dice",
            "focus/metric/region_voxels/vessel",
            "focus/metric/inside/vessel/ig",
        }
        assert set(pictures) == curves | {"focus/probe/left", "focus/probe/right"}
        assert set(table) == curves | {"focus/table"}
    assert (
        loggers[0].rows[0][1]["focus/probe/left"] is not loggers[1].rows[0][1]["focus/probe/left"]
    )


def test_table_does_not_ask_which_sink_came_first(tmp_path):
    """This validation's rows stand in the table once, whether the file sink ran before or after."""
    logger = WandbLogger()
    run = a_run(tmp_path, [logger])
    seen = an_observation(10)

    WandbSink().write(run, seen)
    FileSink().open(run)
    run.folder.append_records(seen.records)
    WandbSink().write(run, seen)

    before, after = (metrics["segxai/table"].data for _, metrics in logger.rows)
    assert before == after
    assert len(after) == 2


def test_a_picture_that_is_a_file_already_is_not_compressed_again(offline, tmp_path):
    """W&B gets the run's file to the last byte; where there is none, the same picture."""
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    wandb.finish()
    wandb.teardown()  # the disabled run of another test would take the logger's place
    logger = WandbLogger(project="test", save_dir=str(offline), id="r1")
    run, seen = a_run(tmp_path / "r1", [logger]), an_observation(10)
    file = run.folder.panel_path("left", 1, 10)
    noted = io.BytesIO()  # the same picture, but no sink would write it so
    seen.panels["left"].save(noted, "PNG", pnginfo=a_note())
    run.folder.write_bytes(file, noted.getvalue())

    WandbSink().write(run, seen)
    wandb.finish()
    wandb.teardown()

    [found] = read_runs(offline)
    [row] = found.history
    assert found.file(row["segxai/probe/left"]).read_bytes() == file.read_bytes()
    with Image.open(found.file(row["segxai/probe/right"])) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(seen.panels["right"]))


def test_means_are_over_the_probes_that_have_a_value():
    """What is not ok does not count, and a mean over nothing is not logged."""
    records = [
        a_record(1, "a", "inside", 0.1),
        a_record(1, "b", "inside", 0.4),
        a_record(1, "c", "inside", math.nan, status="failed"),
        a_record(1, "a", "shift/first", math.nan, status="empty"),
    ]

    assert means("m", records) == {"m/metric/inside/vessel/ig": 0.25}


def test_probe_without_maps_has_its_row():
    """A probe that was only segmented still shows its Dice."""
    columns, rows = _tabulate([a_record(0, "left", "dice", 0.5, method="", target="")])

    assert columns == ["epoch", "step", "probe", "target", "method", "dice"]
    assert rows == [[0, 0, "left", "", "", 0.5]]


def test_table_keeps_the_newest_rows():
    """Beyond 10,000 rows the oldest go, and that is said once."""
    records = [a_record(step, "left", "inside", 0.5) for step in range(10_003)]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        _tabulate(records)
        _, rows = _tabulate(records)

    assert len(rows) == 10_000
    assert (rows[0][1], rows[-1][1]) == (3, 10_002)
    assert len([w for w in said if "newest 10000" in str(w.message)]) == 1


@pytest.mark.parametrize("files", [0, 1, 2, 5, 9])
def test_a_run_stays_under_a_thousand_files(files):
    """However long the training, W&B's limit holds; at first every validation shows."""
    shown = [past for past in range(20_000) if _shown(past, files)]

    assert len(shown) * files < 1000
    assert shown[:40] == list(range(40))
