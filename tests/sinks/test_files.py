"""What the file sink must write: everything, once, and rows only after their files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_segxai.folder import RunFolder
from lightning_segxai.sinks.base import Observation, Run
from lightning_segxai.sinks.files import FileSink
from lightning_segxai.values import Attribution, Probe, Record

PROBE = Probe("head", torch.rand(1, 4, 4, 4), label=torch.ones(4, 4, 4, dtype=torch.int64))


def an_observation(step: int) -> Observation:
    record = Record(
        "r1", step // 10, step, "head", PROBE.fingerprint, "vessel", "ig", "", "inside", "1", 0.5
    )
    attribution = Attribution(
        probe=PROBE,
        target="vessel",
        method="ig",
        layer="",
        values=torch.rand(4, 4, 4),
        unit="logit",
        region=PROBE.label > 0,
        prediction=PROBE.label,
        score=1.0,
        epoch=step // 10,
        step=step,
    )
    failed = dataclasses.replace(
        attribution, method="lrp", values=attribution.values * math.nan, status="failed"
    )
    return Observation(
        epoch=step // 10,
        step=step,
        logging_step=step - 1,
        attributions=(attribution, failed),
        records=(record,),
        predictions={"head": PROBE.label},
        panels={"head": Image.new("RGB", (8, 4), (200, 100, 50))},
    )


def a_run(root, **settings) -> Run:
    return Run("r1", "segxai", RunFolder(root), (PROBE,), settings=settings)


def test_a_run_leaves_the_published_files(tmp_path):
    """One validation gives exactly the files of the layout; a failed map gives none."""
    run, sink, seen = a_run(tmp_path), FileSink(), an_observation(120)

    sink.open(run)
    sink.write(run, seen)
    sink.close(run)

    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        "maps/head/vessel/ig/e0012-s000120.nii.gz",
        "panels/head/e0012-s000120.png",
        "predictions/head/e0012-s000120.nii.gz",
        "probes/head/image.nii.gz",
        "probes/head/label.nii.gz",
        "records.csv",
        "run.json",
    ]
    assert run.folder.read_records() == list(seen.records)
    stored = run.folder.read_nifti(run.folder.map_path("head", "vessel", "ig", 12, 120))
    assert torch.equal(stored, seen.attributions[0].values)
    with Image.open(run.folder.panel_path("head", 12, 120)) as panel:
        assert np.array_equal(np.asarray(panel), np.asarray(seen.panels["head"]))


def test_run_json_says_what_was_run(tmp_path):
    """run.json has the published keys, the settings and the versions, and no pickle."""
    FileSink().open(a_run(tmp_path, monitor="AttributionMonitor()", seed=3))

    content = json.loads((tmp_path / "run.json").read_text())
    assert list(content) == ["format", "run", "name", "created", "versions", "settings", "probes"]
    assert content["settings"] == {"monitor": "AttributionMonitor()", "seed": 3}
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or (
        content["versions"]["torch"] == torch.__version__
    )
    assert content["probes"]["head"]["fingerprint"] == PROBE.fingerprint


def test_going_on_keeps_the_date_and_the_probes(tmp_path):
    """A resumed run is the same run: created once, settings those of now, rows appended."""
    run = a_run(tmp_path, seed=3)
    FileSink().open(run)
    FileSink().write(run, an_observation(10))
    created = run.folder.read_json() | {"created": "2026-01-01T00:00:00+00:00"}
    run.folder.write_json(created)

    again = a_run(tmp_path, seed=4)
    FileSink().open(again)
    FileSink().write(again, an_observation(20))

    content = run.folder.read_json()
    assert content["created"] == "2026-01-01T00:00:00+00:00"
    assert content["settings"] == {"seed": 4}
    assert list(content["probes"]) == ["head"]
    assert [r.step for r in run.folder.read_records()] == [10, 20]


def test_another_volume_under_the_same_name_is_refused(tmp_path):
    """One folder never mixes two volumes under one name."""
    FileSink().open(a_run(tmp_path))
    other = dataclasses.replace(a_run(tmp_path), probes=(Probe("head", torch.zeros(1, 4, 4, 4)),))

    with pytest.raises(ValueError, match='another probe "head"'):
        FileSink().open(other)


def test_rows_come_after_their_files(tmp_path, monkeypatch):
    """If a file cannot be written, no row speaks of it."""
    run = a_run(tmp_path)
    FileSink().open(run)
    written = RunFolder.write_bytes

    def full(self, path, content):
        if path.suffix == ".png":
            raise OSError("No space left on device")
        written(self, path, content)

    monkeypatch.setattr(RunFolder, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        FileSink().write(run, an_observation(10))

    assert not (tmp_path / "records.csv").exists()


def test_records_are_plain_csv(tmp_path):
    """The csv module alone reads what was written."""
    run = a_run(tmp_path)
    FileSink().write(run, an_observation(10))

    with (tmp_path / "records.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["probe"], row["metric"], row["value"], row["status"]) == (
        "head",
        "inside",
        "0.5",
        "ok",
    )
