"""What a sink is: the end of the way, where the observation of one validation is written down."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from PIL import Image
from torch import Tensor

from lightning_segxai.alerts import Raised
from lightning_segxai.folder import RunFolder
from lightning_segxai.values import Attribution, Probe, Record


@dataclass(frozen=True, eq=False)
class Run:
    """The training run, as sinks see it.

    Args:
        id: The logger's run id or version; names the run in ``records.csv``.
        monitor: Name of the monitor; first part of every key.
        folder: Where its files are.
        probes: The fixed volumes.
        settings: What is written to ``run.json`` and to the logger's config; no secrets.
        loggers: The trainer's loggers.
    """

    id: str
    monitor: str
    folder: RunFolder
    probes: tuple[Probe, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    loggers: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Observation:
    """All that one validation brought.

    Args:
        epoch: Epoch of the training.
        step: Global step of the training.
        logging_step: The step under which Lightning logs this validation's own metrics.
        attributions: The maps, one for each probe, target and method.
        records: The numbers.
        predictions: Class of each voxel, by probe name.
        panels: One montage for each probe, by probe name.
        alerts: Those that have just become raised.
    """

    epoch: int
    step: int
    logging_step: int
    attributions: tuple[Attribution, ...]
    records: tuple[Record, ...]
    predictions: Mapping[str, Int[Tensor, "i j k"]]
    panels: Mapping[str, Image.Image]
    alerts: tuple[Raised, ...] = ()


class Sink(ABC):
    """Writes observations somewhere; a frozen dataclass, for all that it knows is in `Run`."""

    def open(self, run: Run) -> None:  # noqa: B027 - most sinks need no beginning
        """Called once before the first observation, also on resume."""

    @abstractmethod
    def write(self, run: Run, observation: Observation) -> None:
        """Called once for each validation, on the process that logs."""

    def close(self, run: Run) -> None:  # noqa: B027 - nor an end
        """Called once at the end of the training."""


def means(monitor: str, records: Iterable[Record]) -> dict[str, float]:
    """Each metric's mean over the probes, under the key ``<monitor>/metric/...``.

    Of the records of one validation; only those of status ``ok`` count.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for r in records:
        if r.status == "ok":
            parts = (monitor, "metric", r.metric, r.target, r.method)
            values["/".join(part for part in parts if part)].append(r.value)
    return {key: math.fsum(found) / len(found) for key, found in values.items()}
