"""Trainings of a second, observed or not, and what they leave behind."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn

from lightning_segxai import (
    AttributionMonitor,
    GradCAM,
    MassInside,
    MRADataModule,
    PhantomCohort,
    Probe,
    RankCorrelation,
    Record,
    Saliency,
    SegmentationTask,
    UNet3d,
)


@cache
def tiny_data(probes: int = 2) -> MRADataModule:
    """One validation subject, and eight training patches in four batches."""
    cohort = PhantomCohort(subjects=3, shape=(32, 32, 24))
    data = MRADataModule(
        phantom=cohort, patch_size=16, batch_size=2, samples_per_volume=4, probes=probes
    )
    data.setup()
    return data


def tiny_task(seed: int = 0, net: nn.Module | None = None) -> SegmentationTask:
    """A U-Net of two levels, or another network; the same weights for the same seed."""
    torch.manual_seed(seed)
    return SegmentationTask(UNet3d(channels=2, levels=2) if net is None else net, lr=0.01)


def tiny_monitor(**changes: Any) -> AttributionMonitor:
    """Two methods, one metric, one shift: two forward and two backward passes for two probes."""
    settings: dict[str, Any] = {
        "methods": {"saliency": Saliency(), "grad_cam": GradCAM(layer="net.encoder.0")},
        "metrics": {"mass_inside": MassInside()},
        "shifts": {"rank_correlation": RankCorrelation()},
        "sinks": [],
    }
    return AttributionMonitor(**(settings | changes))


def tiny_trainer(root: Path, *callbacks: Any, lightning: Any = pl, **changes: Any) -> Any:
    """A quiet Trainer: one batch of validation, everything logged."""
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "callbacks": list(callbacks),
        "max_epochs": 1,
        "num_sanity_val_steps": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 1,
    }
    return lightning.Trainer(**(settings | changes))


def still_pairs(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Image and label of random patches, the same ones each time."""
    generator = torch.Generator().manual_seed(3)
    image = torch.rand((count, 1, 8, 8, 8), generator=generator)
    return [(x, (x > 0.7).long()) for x in image]


def plain_task(lightning: Any = pl) -> Any:
    """A module of any namespace, for batches of pairs or dictionaries, with a metric of its own."""

    class PlainTask(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = UNet3d(channels=2, levels=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self._loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self._loss(batch), batch_size=1)

        def on_validation_epoch_end(self) -> None:
            self.log("val_late", 0.25)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def _loss(self, batch: Any) -> Tensor:
            image, label = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
            return nn.functional.binary_cross_entropy_with_logits(self(image), label.float())

    return PlainTask()


def quick_pictures(monkeypatch: Any) -> None:
    """Panels of one pixel: drawing takes longer than the training."""
    monkeypatch.setattr(
        "lightning_segxai.observe.render", lambda *_, **__: Image.new("RGB", (1, 1))
    )


def records(monitor: AttributionMonitor) -> list[Record]:
    """The rows of ``records.csv``."""
    assert monitor.run is not None
    return monitor.run.folder.read_records()


def moments(monitor: AttributionMonitor) -> list[tuple[int, int]]:
    """Epoch and step of each observation, in the order in which they were written."""
    return list(dict.fromkeys((r.epoch, r.step) for r in records(monitor)))


def cell(record: Record) -> tuple[Any, ...]:
    """What a row is a number of: there must not be two."""
    r = record
    return r.epoch, r.step, r.probe, r.target, r.method, r.metric


def metrics_rows(monitor: AttributionMonitor) -> list[tuple[int, int, str, float]]:
    """The rows of ``metrics.csv``."""
    assert monitor.run is not None
    lines = (monitor.run.folder.root / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,name,value"
    parts = [line.split(",") for line in lines[1:]]
    return [(int(epoch), int(step), name, float(value)) for epoch, step, name, value in parts]


def a_probe(name: str = "given", edge: int = 16) -> Probe:
    """A labeled random volume."""
    image = torch.rand((1, edge, edge, edge), generator=torch.Generator().manual_seed(5))
    return Probe(name, image, (image[0] > 0.8).long())


class Diary(Logger):
    """A logger that keeps all it is told, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = str(root)
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "diary"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str:
        return self.root

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))
