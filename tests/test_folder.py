"""What the run's folder must keep: every bit of a probe, every row, and nothing half written."""

from __future__ import annotations

import csv
import gzip
import json
import math
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_segxai.folder import RunFolder, moment, plain, region_note
from lightning_segxai.values import RECORD_COLUMNS, Attribution, Probe, Record

ROTATED = np.array(
    [[0, -0.5, 0, 12345.678912], [0.6, 0, 0, -1 / 3], [0, 0, 0.7, 2e-5], [0, 0, 0, 1]]
)


def a_record(step: int = 10, value: float = 0.1, **changes) -> Record:
    return Record(
        **{
            "run": "r1",
            "epoch": step // 10,
            "step": step,
            "probe": "head",
            "fingerprint": "0" * 16,
            "target": "vessel",
            "method": "ig",
            "layer": "",
            "metric": "inside",
            "unit": "1",
            "value": value,
        }
        | changes
    )


def a_probe(channels: int = 1, name: str = "case_07") -> Probe:
    g = torch.Generator().manual_seed(7)
    return Probe(
        name,
        torch.randn(channels, 5, 6, 7, generator=g),
        label=torch.randint(0, 300, (5, 6, 7), generator=g),
        spacing_mm=(0.6, 0.5, 0.7),
        affine=ROTATED,
        regions={"brain": torch.rand(5, 6, 7, generator=g) > 0.5, "a.b": torch.zeros(5, 6, 7) > 1},
        preprocessing="ToCanonical(); ZNormalization(p=0.1)",
    )


def test_layout_is_the_published_one(tmp_path):
    """Other people's scripts find maps, predictions, panels and probes by these paths."""
    folder = RunFolder(tmp_path)

    found = [
        folder.map_path("head", "vessel", "ig", 3, 120),
        folder.prediction_path("head", 3, 120),
        folder.panel_path("head", 3, 120),
        *folder.probe_paths("head", ["brain"]).values(),
    ]

    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "maps/head/vessel/ig/e0003-s000120.nii.gz",
        "predictions/head/e0003-s000120.nii.gz",
        "panels/head/e0003-s000120.png",
        "probes/head/image.nii.gz",
        "probes/head/label.nii.gz",
        "probes/head/region-brain.nii.gz",
    ]


@pytest.mark.parametrize("bad", ["../x", "a/b", ".hidden", "", "x" * 101])
def test_names_that_would_leave_the_folder_are_refused(tmp_path, bad):
    """A name is checked before it becomes a path, wherever it stands in it."""
    folder = RunFolder(tmp_path)
    for path in (
        lambda: folder.map_path(bad, "t", "m", 0, 0),
        lambda: folder.map_path("p", bad, "m", 0, 0),
        lambda: folder.map_path("p", "t", bad, 0, 0),
        lambda: folder.prediction_path(bad, 0, 0),
        lambda: folder.panel_path(bad, 0, 0),
        lambda: folder.probe_paths(bad),
        lambda: folder.probe_paths("p", [bad]),
    ):
        with pytest.raises(ValueError, match="cannot become a file name"):
            path()


@given(st.integers(0, 10**6), st.integers(0, 10**9))
def test_moment_reads_what_paths_say(epoch, step):
    """Epoch and step come back from every stamped name, also beyond the padding."""
    folder = RunFolder(Path("run"))

    assert moment(folder.map_path("p", "t", "m", epoch, step).name) == (epoch, step)
    assert moment(folder.panel_path("p", epoch, step).name) == (epoch, step)
    assert moment(f".{epoch}.partial") is None


@pytest.mark.parametrize(
    ("values", "stored", "loaded"),
    [
        (torch.randn(3, 4, 5, dtype=torch.float64), np.float32, torch.float32),
        (torch.randn(3, 4, 5).bfloat16(), np.float32, torch.float32),
        (torch.randn(3, 4, 5, 2), np.float32, torch.float32),
        (torch.full((3, 4, 1), 255), np.uint8, torch.int64),
        (torch.full((3, 4, 5), 256), np.int16, torch.int64),
        (torch.full((3, 4, 5), -1, dtype=torch.int32), np.int16, torch.int64),
        (torch.full((3, 4, 5), 40000), np.int32, torch.int64),
        (torch.ones(3, 4, 5) > 0, np.uint8, torch.int64),
    ],
)
def test_volumes_come_back(tmp_path, values, stored, loaded):
    """A volume is stored small, readable by nibabel, and comes back equal to float32."""
    folder, path = RunFolder(tmp_path), tmp_path / "x" / "v.nii.gz"

    folder.write_nifti(path, values, ROTATED)

    image, back = nib.load(path), folder.read_nifti(path)
    assert image.get_data_dtype() == stored
    assert np.allclose(image.affine, ROTATED)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert back.dtype == loaded
    assert back.is_contiguous()
    assert torch.equal(back, values.to(loaded))


def test_equal_volumes_are_equal_files(tmp_path):
    """No time stamp or name gets into a file: what is equal is equal byte by byte."""
    folder, values = RunFolder(tmp_path), torch.arange(60.0).reshape(3, 4, 5)
    for name in ("a.nii.gz", "b.nii.gz"):
        folder.write_nifti(tmp_path / name, values, np.eye(4), "segxai region=0123456789ab")

    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert folder.read_note(tmp_path / "a.nii.gz") == "segxai region=0123456789ab"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    """When the disk is full, what was there stays as it was."""
    folder, path = RunFolder(tmp_path), tmp_path / "v.bin"
    folder.write_bytes(path, b"old")

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_bytes(path, b"new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_map_notes_its_region(tmp_path):
    """A map's header carries the digest of the region, which changes with a single voxel."""
    probe = a_probe()
    region = probe.regions["brain"]
    a = Attribution(
        probe, "vessel", "ig", "", torch.randn(5, 6, 7), "logit", region, probe.label, 1.0, 3, 120
    )
    folder = RunFolder(tmp_path)

    path = folder.write_map(a)

    moved = region.clone()
    moved[0, 0, 0] ^= True
    assert path == folder.map_path("case_07", "vessel", "ig", 3, 120)
    assert folder.read_note(path) == region_note(region) != region_note(moved)
    assert torch.equal(folder.read_nifti(path), a.values)
    # sha1 of one zero byte and one byte of one, by hand
    assert region_note(torch.tensor([[[False, True]]])) == "segxai region=3f2954645367"


@pytest.mark.parametrize("channels", [1, 3])
def test_probe_comes_back_with_its_fingerprint(tmp_path, channels):
    """A saved probe is the same probe: fingerprint, voxels, label, regions and geometry."""
    probe, folder = a_probe(channels), RunFolder(tmp_path)

    folder.save_probe(probe)
    folder.save_probe(probe)  # on resume
    back = RunFolder(tmp_path).load_probe("case_07")

    assert back.fingerprint == probe.fingerprint
    assert torch.equal(back.image, probe.image)
    assert torch.equal(back.label, probe.label)
    assert all(torch.equal(back.regions[r], probe.regions[r]) for r in probe.regions)
    assert np.array_equal(back.affine, probe.affine)
    assert back.spacing_mm == probe.spacing_mm
    assert back.preprocessing == probe.preprocessing
    entry = json.loads((tmp_path / "run.json").read_text())["probes"]["case_07"]
    assert entry["shape"] == [5, 6, 7]
    assert entry["fingerprint"] == probe.fingerprint


def test_probe_without_label_comes_back(tmp_path):
    """What a probe lacks it lacks after the round trip too."""
    probe = Probe("bare", torch.rand(1, 2, 3, 1))
    RunFolder(tmp_path).save_probe(probe)

    back = RunFolder(tmp_path).load_probe("bare")

    assert back.label is None
    assert back.regions == {}
    assert back.fingerprint == probe.fingerprint


def test_probe_mix_ups_are_refused(tmp_path):
    """Another volume under a known name, a missing name and a changed file are each said."""
    folder, probe = RunFolder(tmp_path), a_probe()
    folder.save_probe(probe)

    with pytest.raises(ValueError, match="another probe"):
        folder.save_probe(Probe("case_07", torch.zeros(1, 5, 6, 7)))
    with pytest.raises(ValueError, match='no probe "other"'):
        folder.load_probe("other")
    folder.write_nifti(folder.probe_paths("case_07")["label"], probe.label + 1, probe.affine)
    with pytest.raises(ValueError, match="no longer holds"):
        folder.load_probe("case_07")


def test_run_json_holds_plain_content(tmp_path):
    """run.json starts with its format; what JSON cannot hold becomes text; strict JSON."""
    folder = RunFolder(tmp_path)
    assert folder.read_json() == {}

    folder.write_json({"run": "r1", "settings": {"root": Path("data"), "limit": math.inf}})

    text = (tmp_path / "run.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert list(content) == ["format", "run", "settings"]
    assert content["format"] == 1
    assert content["settings"] == {"root": "data", "limit": "Infinity"}
    assert folder.read_json() == content == plain(content)


def test_run_json_of_another_version_is_refused(tmp_path):
    """A later format is not guessed at."""
    (tmp_path / "run.json").write_text('{"format": 2}')

    with pytest.raises(ValueError, match="needs format 1, but has 2"):
        RunFolder(tmp_path).read_json()


@settings(max_examples=30)
@given(
    st.lists(st.floats(), max_size=5),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8),
)
def test_records_come_back_to_the_last_bit(values, unit):
    """Rows are appended and read back equal, whatever the number and the unit's letters."""
    records = [a_record(10 * n, v, unit=unit, status="ok") for n, v in enumerate(values)]
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        assert folder.read_records() == []
        for record in records:
            folder.append_records([record])
        back = folder.read_records()

    assert [repr(r) for r in back] == [repr(r) for r in records]


def test_records_are_a_table_with_the_published_header(tmp_path):
    """records.csv is read by any CSV reader; NaN is the word nan."""
    RunFolder(tmp_path).append_records([a_record(value=math.nan, status="empty")])

    with (tmp_path / "records.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == RECORD_COLUMNS
    assert rows[1][-2:] == ["nan", "empty"]
    assert len(rows) == 2


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_is_ignored_and_repaired(tmp_path, cut):
    """A process killed while writing costs its last row and no other, then or later."""
    folder, path = RunFolder(tmp_path), tmp_path / "records.csv"
    folder.append_records([a_record(10), a_record(20)])
    path.write_bytes(path.read_bytes()[:-cut])

    assert folder.read_records() == [a_record(10)]

    folder.append_records([a_record(30)])
    assert folder.read_records() == [a_record(10), a_record(30)]


def test_torn_header_is_written_again(tmp_path):
    """A table whose header was cut is a table without rows."""
    (tmp_path / "records.csv").write_text("run,epo")
    folder = RunFolder(tmp_path)

    assert folder.read_records() == []
    folder.append_records([a_record(10)])
    assert folder.read_records() == [a_record(10)]


def test_metrics_are_appended(tmp_path):
    """metrics.csv has one row for each number that the Trainer logged."""
    folder = RunFolder(tmp_path)
    folder.append_metrics(0, 10, {"val/loss": 0.1})
    folder.append_metrics(1, 20, {"val/loss": 1 / 3})

    assert (tmp_path / "metrics.csv").read_text() == (
        f"epoch,step,name,value\n0,10,val/loss,0.1\n1,20,val/loss,{1 / 3!r}\n"
    )


def test_truncate_removes_what_came_later(tmp_path):
    """After a resume the folder is as it was at the checkpoint's step, byte by byte."""

    def write(folder, steps):
        for step in steps:
            folder.append_records([a_record(step)])
            folder.append_metrics(step // 10, step, {"val/loss": step / 7})
            volume = torch.full((2, 2, 2), step)
            folder.write_nifti(
                folder.map_path("p", "t", "m", step // 10, step), volume.float(), np.eye(4)
            )
            folder.write_nifti(folder.prediction_path("p", step // 10, step), volume, np.eye(4))
            folder.write_bytes(folder.panel_path("p", step // 10, step), b"png")

    def content(folder):
        files = (p for p in folder.root.rglob("*") if p.is_file())
        return {p.relative_to(folder.root).as_posix(): p.read_bytes() for p in files}

    straight, crashed = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    write(straight, [0, 10, 20])
    write(crashed, [0, 10, 20, 30, 1_000_000])
    (crashed.root / "maps" / ".0123.partial").write_bytes(b"half")

    crashed.truncate_after(20)

    assert content(crashed) == content(straight)
    RunFolder(tmp_path / "none").truncate_after(0)


def test_gzip_is_ordinary(tmp_path):
    """Any gzip reader opens a volume; its time stamp is zero."""
    RunFolder(tmp_path).write_nifti(tmp_path / "v.nii.gz", torch.zeros(2, 2, 2), np.eye(4))

    raw = (tmp_path / "v.nii.gz").read_bytes()
    assert raw[4:8] == b"\0\0\0\0"
    assert len(gzip.decompress(raw)) == 352 + 8 * 4
