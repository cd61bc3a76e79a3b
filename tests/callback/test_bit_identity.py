"""Training with the monitor is training without it, to the last bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.loggers import WandbLogger
from tiny_training import (
    Diary,
    moments,
    quick_pictures,
    records,
    tiny_data,
    tiny_monitor,
    tiny_trainer,
)
from torch import Tensor, nn

import lightning_segxai.observe
from lightning_segxai import (
    AttributionMethod,
    AttributionMonitor,
    MRADataModule,
    Occlusion,
    PhantomCohort,
    Saliency,
    ScoredModel,
    SegmentationTask,
    SmoothGrad,
    UNet3d,
)

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "phantom.yaml"


class RestlessTask(SegmentationTask):
    """Draws from the generators of torch and numpy at every step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.rand(()) + np.random.random()
        return super().training_step(batch, batch_idx) * (1 + 0.1 * noise)


def restless_task() -> RestlessTask:
    """Dropout in front of a network with batch norm."""
    torch.manual_seed(0)
    return RestlessTask(nn.Sequential(nn.Dropout(0.2), UNet3d(channels=2, levels=2)), lr=0.01)


def left_behind(root: Path, monitor: AttributionMonitor | None, **changes: Any) -> dict[str, Any]:
    """All that one training leaves: what it logged, weights, optimizer, random numbers."""
    pl.seed_everything(7, verbose=False)
    diary, task = Diary(root), restless_task()
    trainer = tiny_trainer(
        root, *([] if monitor is None else [monitor]), logger=diary, max_epochs=2, **changes
    )
    pl.seed_everything(11, verbose=False)
    trainer.fit(task, datamodule=tiny_data())
    return {"logged": diary.lines, **state(task, trainer)}


def state(task: Any, trainer: Any) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in task.state_dict().items()},
        "grads": {k: p.grad for k, p in task.named_parameters()},
        "flags": {k: (p.requires_grad,) for k, p in task.named_parameters()},
        "modes": {k: m.training for k, m in task.named_modules()},
        "hooks": {k: len(m._forward_hooks) for k, m in task.named_modules()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places at which two states are not the same to the last bit."""
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where} has other keys"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where} has {len(one)} and {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for n, pair in pairs for d in differences(*pair, f"{where}/{n}")]
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [where]
    if isinstance(one, float) and math.isnan(one):
        return [] if math.isnan(other) else [where]
    return [] if one == other else [where]


@dataclass(frozen=True)
class Vandal(AttributionMethod):
    """Does everything that disturbs a training, and raises half-way."""

    def attribute(self, model: ScoredModel, x: Any) -> Any:
        net = model.predictor.module
        net.train()
        model(x[None]).sum().backward()
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        for part in net.modules():
            part.register_forward_hook(lambda *_: None)
            if isinstance(part, nn.BatchNorm3d):
                part.running_mean = part.running_mean + 1
                part.running_var.mul_(3)
        net.net.register_forward_hook(lambda _module, _args, output: output * 2)
        net.net.left_here = torch.zeros(3)
        torch.rand(5)
        np.random.random(5)
        torch.set_grad_enabled(False)
        net.log("val_loss", 1e6)
        net.log("vandal", 1e6)
        raise RuntimeError("half-way")


MONITORS = {
    "bare": lambda: AttributionMonitor(sinks=[]),
    "noise": lambda: tiny_monitor(methods={"noise": SmoothGrad(inner=Saliency(), samples=2)}),
    "windows": lambda: tiny_monitor(
        methods={"saliency": Saliency(), "occlusion": Occlusion(size_voxels=8, stride_voxels=8)},
        window=8,
        looks_per_pass=3,
    ),
    "vandal": lambda: tiny_monitor(methods={"vandal": Vandal(), "saliency": Saliency()}),
}
TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"val_check_interval": 2},
    "accumulating": {"val_check_interval": 2, "accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("bare", "plain"),
        ("noise", "several"),
        ("windows", "bf16"),
        ("vandal", "plain"),
        ("vandal", "accumulating"),
        ("noise", "accumulating"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*costs ", "ignore:.*half-way")
def test_nothing_of_the_training_changes(kind, training, tmp_path, monkeypatch):
    """Losses, weights, buffers, gradients, optimizer and generators are the same, bit by bit."""
    quick_pictures(monkeypatch)
    monitor = MONITORS[kind]()

    without = left_behind(tmp_path / "without", None, **TRAINERS[training])
    observed = left_behind(tmp_path / "with", monitor, **TRAINERS[training])

    assert len(records(monitor)) > 0
    assert sum("val_loss" in line for _, line in without["logged"]) >= 2
    assert sum("train_loss" in line for _, line in without["logged"]) >= 2
    assert differences(without, observed) == []


@pytest.mark.filterwarnings("ignore:.*costs ", "ignore:.*half-way")
@pytest.mark.parametrize("kind", ["noise", "vandal"])
def test_these_tests_would_see_a_disturbance(kind, tmp_path, monkeypatch):
    """Without the guard's restoring, what the monitor does shows in weights and losses."""

    @contextmanager
    def careless(module: nn.Module, seed: int) -> Any:
        torch.manual_seed(seed)
        module.eval()
        with torch.enable_grad():
            yield

    quick_pictures(monkeypatch)
    changes = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    without = left_behind(tmp_path / "without", None, **changes)
    monkeypatch.setattr(lightning_segxai.observe, "undisturbed", careless)
    try:
        disturbed = left_behind(tmp_path / "with", MONITORS[kind](), **changes)
    except RuntimeError:
        return  # a training that breaks is disturbed
    finally:
        torch.set_grad_enabled(True)

    found = differences(without, disturbed)
    assert any(place.startswith("/weights") for place in found)
    assert any(place.startswith("/logged") for place in found)


def shrunk_experiment(root: Path, observed: bool) -> tuple[Any, dict[str, Any]]:
    """The phantom experiment with its own settings, on smaller heads and a smaller network."""
    import wandb

    asked = yaml.safe_load(EXPERIMENT.read_text())
    settings = asked["trainer"] | {"default_root_dir": root, "max_epochs": 1}
    logger = settings.pop("logger")["init_args"] | {"save_dir": str(root)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AttributionMonitor, "segxai")
    segxai = parser.instantiate(parser.parse_object({"segxai": asked["segxai"]})).segxai
    monitor = segxai if observed else None
    pl.seed_everything(asked["seed_everything"], verbose=False)
    net = UNet3d(**(asked["model"]["init_args"]["net"]["init_args"] | {"channels": 2}))
    task = SegmentationTask(net, lr=asked["model"]["init_args"]["lr"])
    data = asked["data"]["init_args"] | {
        "phantom": PhantomCohort(subjects=3, shape=(32, 32, 24)),
        "patch_size": 16,
        "batch_size": 2,
        "samples_per_volume": 4,
        "probes": 1,
    }
    diary = Diary(root)
    trainer = pl.Trainer(
        **settings,
        callbacks=[] if monitor is None else [monitor],
        logger=[WandbLogger(**logger), diary],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(task, datamodule=MRADataModule(**data))
    wandb.finish()
    return monitor, {"logged": diary.lines, **state(task, trainer)}


@pytest.mark.filterwarnings("ignore:.*costs ")
def test_the_phantom_experiment_is_not_disturbed(offline):
    """With the experiment's settings, W&B sink and pictures included, nothing changes."""
    _, without = shrunk_experiment(offline / "without", observed=False)
    monitor, observed = shrunk_experiment(offline / "with", observed=True)

    assert moments(monitor) == [(0, 0), (0, 2), (0, 4)]
    assert differences(without, observed) == []


IN_PLAIN_PYTHON = """
    import random, sys, warnings
    from pathlib import Path
    import pytorch_lightning as pl
    import torch
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from tiny_training import tiny_data, tiny_monitor, tiny_task, tiny_trainer

    def trained(*callbacks):
        task = tiny_task()
        pl.seed_everything(3, verbose=False)
        trainer = tiny_trainer(Path(sys.argv[1]), *callbacks)
        trainer.fit(task, datamodule=tiny_data(probes=1))
        return random.getstate(), [p.tolist() for p in task.parameters()]

    monitor = tiny_monitor()
    print(trained() == trained(monitor), len(monitor.run.folder.read_records()) > 0)
"""


def test_pythons_generator_is_not_drawn_from(tmp_path):
    """Not here but in a process of its own: the tests' type checks draw from it themselves."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_PLAIN_PYTHON), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.stdout.splitlines()[-1] == "True True", done.stderr[-2000:]
