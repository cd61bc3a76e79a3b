"""The BIDS experiment as a user runs it, killed in the middle of an epoch and gone on with."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lightning_segxai.data.phantom import tof_phantom
from lightning_segxai.folder import RunFolder

CONFIG = Path(__file__).parents[1] / "experiments" / "bids.yaml"
TINY = [
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=false",
    "--trainer.callbacks.init_args.every_n_train_steps=10",  # there are 16 steps in an epoch
    "--model.init_args.net.init_args.channels=2",
    "--model.init_args.net.init_args.levels=2",
    "--data.init_args.patch_size=16",
    "--data.init_args.probes.init_args.n=1",
    "--data.init_args.cache=disk",
    "--data.init_args.cache_dir=cache",
    "--segxai.methods={saliency: Saliency}",
    "--segxai.every_n_validations=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a BIDS tree of five subjects, one of them with two sessions."""
    root = tmp_path_factory.mktemp("experiment")
    for n, session in ((0, ""), (1, ""), (2, ""), (3, ""), (4, "ses-1"), (4, "ses-2")):
        phantom = tof_phantom((32, 32, 24), (0.9, 0.9, 1.2), seed=n + 10 * (session == "ses-2"))
        affine = np.diag([*phantom.spacing_mm, 1.0])
        folder = Path(f"sub-{n:02d}") / session / "anat"
        stem = f"sub-{n:02d}_{session}_".replace("__", "_")
        for where, end, array in (
            (root / "bids", "angio", phantom.image),
            (root / "bids/derivatives/manual", "desc-vessel_mask", phantom.label),
        ):
            (where / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), where / folder / f"{stem}{end}.nii.gz")
    return root


def command(out: str, *more: str) -> list[str]:
    code = "from lightning_segxai.cli import main; main()"
    saved = f"--trainer.callbacks.init_args.dirpath={out}"
    root = f"--trainer.default_root_dir={out}"
    return [sys.executable, "-c", code, "fit", f"--config={CONFIG}", *TINY, saved, root, *more]


def fit(place: Path, out: str, *more: str) -> None:
    done = subprocess.run(command(out, *more), cwd=place, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:].decode()


def test_killed_amid_an_epoch_it_ends_as_if_it_had_not_been(place):
    """Weights are those of a run without the kill, to the last bit; each subject has one split."""
    fit(place, "whole")
    with subprocess.Popen(
        command("killed"),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as running:
        for _ in range(6000):
            if (place / "killed" / "last.ckpt").exists() or running.poll() is not None:
                break
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    killed = torch.load(place / "killed" / "last.ckpt", weights_only=True)
    assert killed["global_step"] == 10
    fit(place, "killed", "--ckpt_path=killed/last.ckpt")

    last = [torch.load(place / out / "last.ckpt", weights_only=True) for out in ("whole", "killed")]
    assert [one["global_step"] for one in last] == [30, 30]
    assert last[0]["state_dict"].keys() == last[1]["state_dict"].keys()
    for name, values in last[0]["state_dict"].items():
        assert torch.equal(values, last[1]["state_dict"][name]), name

    folders = [next((place / out).rglob("records.csv")).parent for out in ("whole", "killed")]
    tables = [list(csv.DictReader((folder / "splits.csv").open())) for folder in folders]
    assert tables[0] == tables[1]
    assert [row["name"] for row in tables[0]] == [
        *(f"sub-0{n}" for n in range(4)),
        "sub-04_ses-1",
        "sub-04_ses-2",
    ]
    split = {row["subject"]: row["split"] for row in tables[0]}
    assert [split[row["subject"]] for row in tables[0]] == [row["split"] for row in tables[0]]
    assert list(split.values()).count("val") == 1
    recorded = []
    for folder in folders:
        rows = RunFolder(folder).read_records()
        cells = [(r.epoch, r.step, r.probe, r.fingerprint, r.method, r.metric) for r in rows]
        recorded.append(dict(zip(cells, (repr(r.value) for r in rows), strict=True)))
        assert len(recorded[-1]) == len(rows)
    assert recorded[0] == recorded[1]
