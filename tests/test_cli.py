"""The command line: help, errors of one line, and every command on tiny data."""

import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import wandb
import yaml
from wandb_log import read_runs

from lightning_segxai import cli
from lightning_segxai.demo import config_path, demo
from lightning_segxai.folder import RunFolder

TINY = [
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.phantom.subjects=3",
    "--data.init_args.phantom.shape=[32,32,24]",
    "--data.init_args.patch_size=16",
    "--data.init_args.samples_per_volume=8",
    "--data.init_args.probes=2",
    "--model.init_args.net.init_args.channels=2",
    "--model.init_args.net.init_args.levels=2",
]


def configuration(root: Path, **segxai) -> Path:
    """A file like the phantom experiment, small, without a logger."""
    content = yaml.safe_load(config_path().read_text())
    content["trainer"] |= {"max_epochs": 1, "logger": False, "default_root_dir": str(root)}
    content["trainer"]["enable_progress_bar"] = False
    content["model"]["init_args"]["net"]["init_args"] = {"channels": 2, "levels": 2}
    small = {"phantom": {"subjects": 3, "shape": [32, 32, 24]}, "patch_size": 16, "probes": 1}
    content["data"]["init_args"] = small | {"samples_per_volume": 8}
    content["segxai"] = segxai
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_filename(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration and the checkpoint of its training."""
    root = tmp_path_factory.mktemp("trained")
    everywhere = {"class_path": "ClassEvidence", "init_args": {"region": "everywhere"}}
    methods = {"saliency": "Saliency", "cam": "GradCAM"}
    config = configuration(root, methods=methods, targets={"vessel": everywhere})
    cli.main(["fit", "--config", str(config)])
    return config, next(root.rglob("*.ckpt"))


def refused(capsys, args: list[str]) -> str:
    """The one line that a user's mistake is answered with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    error = capsys.readouterr().err.strip().splitlines()

    assert stop.value.code == 2
    assert error[-1].startswith("segxai: error: ")
    assert "Traceback" not in "".join(error)
    return error[-1]


def test_settings_may_follow_where_nothing_is_trained(tmp_path, capsys):
    """`data` and `layers` take a setting after the file, as `fit` does; `demo` takes none."""
    config = configuration(tmp_path)
    cli.main(["layers", "--config", str(config), "--model.init_args.net.init_args.levels=3"])
    out = str(tmp_path / "look")
    cli.main(["data", "--config", str(config), "--data.init_args.patch_size=8", "--out", out])
    printed = capsys.readouterr().out

    assert "net.encoder.2" in printed
    assert "8 x 8 x 8 voxels" in printed
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--nothing"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "args", [["--help"], ["fit", "--help"], ["explain", "--help"], ["data", "--help"]]
)
def test_help_is_a_success(capsys, args):
    """It names the commands, or the monitor's arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    text = capsys.readouterr().out

    assert stop.value.code == 0
    told = {"--help": "layers", "fit": "--segxai.methods", "explain": "--ckpt", "data": "data-look"}
    assert told[args[0]] in text


def test_the_demo_leaves_everything_in_its_wandb_run(tmp_path, monkeypatch, capsys):
    """For each observation one row with the montages, the table and the scalars, by epoch."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    out = tmp_path / "demo"
    wandb.finish()
    wandb.teardown()  # what other tests set up in this process would decide where the run goes

    demo(str(out), lambda args: cli.run_lightning([*args, *TINY], quiet=True))

    printed = capsys.readouterr().out
    wandb.finish()
    wandb.teardown()
    [run] = read_runs(out)
    rows = [row for row in run.history if "segxai/table" in row]
    folder = RunFolder(next(out.rglob("records.csv")).parent)
    records = folder.read_records()
    moments = list(dict.fromkeys((r.epoch, r.step) for r in records))
    names = set(json.loads((folder.root / "run.json").read_text())["probes"])
    assert run.finished
    assert len(moments) == 3  # untrained, and every other of four validations
    assert len(rows) == len(moments)
    for row, (epoch, step) in zip(rows, moments, strict=True):
        assert row["epoch"] == epoch
        assert {key.removeprefix("segxai/probe/") for key in row if "/probe/" in key} == names
        now = [r for r in records if (r.epoch, r.step) == (epoch, step) and r.status == "ok"]
        for metric in ("mass_inside", "reach"):
            wanted = [r.value for r in now if (r.metric, r.method) == (metric, "saliency")]
            key = f"segxai/metric/{metric}/vessel/saliency"
            assert row[key] == pytest.approx(np.mean(wanted))
    for told in ("final validation Dice", "peak memory", "untrained", str(folder.root)):
        assert told in printed.replace("\n", "")


def test_explain_writes_in_the_grid_of_the_file(trained, tmp_path):
    """Maps, prediction, picture and numbers, for a volume stored LPS and without a label."""
    affine = np.diag([-0.6, -0.6, 0.8, 1.0])
    image = np.random.default_rng(0).normal(100, 20, (30, 28, 21)).astype(np.float32)
    path = volume(tmp_path / "scan.nii.gz", image, affine)
    out = tmp_path / "out"

    cli.main(explain_args(trained, tmp_path, image=path, out=out))

    written = nib.load(out / "maps/vessel/saliency.nii.gz")
    assert written.shape == image.shape
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)
    assert np.abs(written.get_fdata()).max() > 0
    assert nib.load(out / "prediction.nii.gz").shape == image.shape
    assert (out / "panel.png").stat().st_size > 1000
    assert {r.metric for r in RunFolder(out).read_records()} >= {"gini", "entropy"}


def test_layers_are_listed_with_their_shapes(trained, capsys):
    """In a table that marks the one that ``auto`` is."""
    cli.main(["layers", "--config", str(trained[0])])
    table = capsys.readouterr().out

    assert "net.head" in table
    assert "<- auto" in table
    assert "16 x 16 x 16" in table


def test_metrics_are_listed_and_take_no_settings(capsys):
    """With the groups that they belong to; `--config` is another command's."""
    cli.main(["metrics"])

    assert "focus: where one map lies" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["metrics", "--config", "x.yaml"])
    assert stop.value.code == 2


def test_data_are_looked_at_before_a_training(tmp_path, capsys):
    """A table and two pictures; the status is 0, but 2 where a subject cannot be used."""
    config, out = configuration(tmp_path), tmp_path / "look"
    args = ["data", "--config", str(config), "--out", str(out)]

    cli.main(args)
    text = capsys.readouterr().out

    assert text.count("32 x 32 x 24") == 3
    assert {path.name for path in out.iterdir()} == {"subjects.png", "patches.png"}
    for n in range(3):
        for folder in ("images", "labels"):
            (tmp_path / "pairs" / folder).mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(n).random((18, 18, 18), "f4")
            array = values if folder == "images" else np.uint8(values > (0.9 if n else 2))
            volume(tmp_path / "pairs" / folder / f"p{n}.nii.gz", array)
    content = yaml.safe_load(config.read_text())
    content["data"]["init_args"] = {"root": str(tmp_path / "pairs"), "patch_size": 16}
    config.write_text(yaml.safe_dump(content))
    (out / "subjects.png").unlink()

    assert refused(capsys, args) == "segxai: error: 1 of 3 subjects cannot be used, see above."
    assert (out / "subjects.png").exists()


BAD_IMAGES = {
    "nan": (np.full((8, 8, 8), np.nan, np.float32), "NaN"),
    "infinity": (np.full((8, 8, 8), np.inf, np.float32), "infinity"),
    "2d": (np.zeros((8, 8), np.float32), "3D"),
    "4d": (np.zeros((8, 8, 8, 2), np.float32), "3D"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_refused(trained, tmp_path, capsys, kind):
    """With one line, and nothing written."""
    image, told = BAD_IMAGES[kind]
    path, out = volume(tmp_path / "bad.nii.gz", image), tmp_path / "out"
    args = explain_args(trained, tmp_path, image=path, out=out)

    assert told.lower() in refused(capsys, args).lower()
    assert not out.exists()


def explain_args(trained: tuple[Path, Path], tmp_path: Path, **changed: Path) -> list[str]:
    good = volume(tmp_path / "good.nii.gz", np.random.default_rng(0).random((20, 20, 20), "f4"))
    given = {"config": trained[0], "ckpt": trained[1], "image": good, "out": tmp_path / "out"}
    return ["explain", *(f"--{key}={value}" for key, value in (given | changed).items())]


def test_files_that_are_not_what_they_should_be_are_refused(trained, tmp_path, capsys):
    """Missing or corrupt volumes, labels on another grid, and files that are no checkpoint."""
    junk = tmp_path / "junk.nii.gz"
    junk.write_bytes(b"no volume")
    other = volume(tmp_path / "other.nii.gz", np.zeros((20, 20, 19), np.uint8))
    moved = volume(tmp_path / "moved.nii.gz", np.zeros((20, 20, 20), np.uint8), np.eye(4) * 2)
    pickled = tmp_path / "pickled.ckpt"
    torch.save({"state_dict": {}, "code": partial(print)}, pickled)
    sevens = volume(tmp_path / "sevens.nii.gz", np.full((20, 20, 20), 7, np.uint8))
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, foreign)
    out = tmp_path / "out"

    assert "missing.nii.gz" in refused(
        capsys, explain_args(trained, tmp_path, image=tmp_path / "missing.nii.gz")
    )
    assert "junk.nii.gz" in refused(capsys, explain_args(trained, tmp_path, image=junk))
    assert "(20, 20, 19)" in refused(capsys, explain_args(trained, tmp_path, label=other))
    assert "affine" in refused(capsys, explain_args(trained, tmp_path, label=moved))
    assert "classes" in refused(capsys, explain_args(trained, tmp_path, label=sevens))
    for wrong in (junk, pickled, tmp_path / "missing.ckpt"):
        assert "checkpoint" in refused(capsys, explain_args(trained, tmp_path, ckpt=wrong))
    assert "another network" in refused(capsys, explain_args(trained, tmp_path, ckpt=foreign))
    assert not out.exists()
    out.write_text("a file")
    assert "empty folder" in refused(capsys, explain_args(trained, tmp_path))
    resumed = ["fit", f"--config={trained[0]}", f"--ckpt_path={junk.with_suffix('.ckpt')}"]
    assert "checkpoint" in refused(capsys, resumed)


def test_configurations_that_cannot_be_are_refused(tmp_path, capsys):
    """An unknown key, a layer that does not exist, a name that is a path."""
    unknown = configuration(tmp_path, stepz=3)
    assert "stepz" in refused(capsys, ["fit", f"--config={unknown}"])

    cam = {"class_path": "GradCAM", "init_args": {"layer": "net.encodr"}}
    layer = configuration(tmp_path, methods={"cam": cam})
    assert "net.encoder" in refused(capsys, ["fit", f"--config={layer}"])

    missing = {"class_path": "ClassEvidence", "init_args": {"label": 3}}
    alone = configuration(tmp_path, targets={"third": missing}, methods={"only": "Saliency"})
    assert "label=3" in refused(capsys, ["fit", f"--config={alone}"])

    for kind, name in (("methods", "Saliency"), ("metrics", "Gini")):
        path = configuration(tmp_path, **{kind: {"../x": name}})
        assert "../x" in refused(capsys, ["fit", f"--config={path}"])
    probe = volume(tmp_path / "probe.nii.gz", np.random.default_rng(0).random((16, 16, 16), "f4"))
    path = configuration(tmp_path, probes=[{"image": str(probe), "name": "../x"}])
    assert "../x" in refused(capsys, ["fit", f"--config={path}"])
    path = configuration(tmp_path, probes=[{"image": "nowhere.nii.gz"}])
    assert "nowhere.nii.gz" in refused(capsys, ["fit", f"--config={path}"])

    blind = configuration(tmp_path)
    assert "none" in refused(capsys, ["fit", f"--config={blind}", "--trainer.limit_val_batches=0"])
    assert "nowhere.yaml" in refused(capsys, ["fit", "--config=nowhere.yaml"])
