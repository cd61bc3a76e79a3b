"""The W&B sink: pictures, a table and curves, in one row of the run's history per validation."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_segxai.folder import plain
from lightning_segxai.sinks.base import Observation, Run, Sink, means
from lightning_segxai.values import Record

TABLE_ROWS = 10_000
"""W&B cuts longer tables in the run's file, at their new end."""
FILES_PER_RUN = 900
"""W&B asks for fewer than 1,000 files; some are its own."""
TITLE = 63
"""Characters that the title of a W&B alert may have."""

_KEYS = ("epoch", "step", "probe", "target", "method")


@dataclass(frozen=True)
class WandbSink(Sink):
    """Shows each validation in Weights & Biases, through the run's ``WandbLogger``.

    All keys start with the monitor's name, here ``segxai``:

    * ``segxai/probe/<probe>``: the picture of a probe;
    * ``segxai/table``: all validations so far, one row for each validation, probe, target and
      method, metrics as columns; a probe's own numbers (``dice``) stand in each of its rows;
    * ``segxai/metric/<metric>/<target>/<method>``: mean over the probes whose status is ``ok``;
      a probe's own numbers are ``segxai/metric/dice``, or with the target where they have one;
    * ``epoch``.

    The config gets ``segxai`` (settings, and the probes' fingerprints), the summary the last value
    of each metric, and at the end the run's folder becomes the artifact ``segxai-<run id>`` of type
    ``attributions``. An alert that becomes raised is sent as a W&B alert, which mails or
    posts it to whoever asked for that. Without a ``WandbLogger`` the sink does nothing.

    A run of many validations would exceed the 1,000 files that W&B bears. So the first 450 files'
    worth of validations shows every picture and table, the next as many validations every second,
    then every fourth, and so on; the curves and the run's folder miss nothing.

    Args:
        table: Whether to log the table.
        pictures: Whether to log the pictures.
    """

    table: bool = True
    pictures: bool = True

    def open(self, run: Run) -> None:
        """Put settings and fingerprints into the config."""
        for _, experiment in _live(run.loggers):
            content = {
                "settings": plain(run.settings),
                "probes": {probe.name: probe.fingerprint for probe in run.probes},
            }
            experiment.config.update({run.monitor: content}, allow_val_change=True)

    def write(self, run: Run, observation: Observation) -> None:
        """Log one validation as one row of the history, then send its alerts."""
        for logger, _ in _live(run.loggers):
            # media belong to the run that logged them first, so each logger gets its own
            logger.log_metrics(self._row(run, observation), step=observation.logging_step)
        for _, experiment in _live(run.loggers):
            for alert in observation.alerts:
                # W&B drops alerts of one title within a minute, but two cells may share a cut one
                experiment.alert(
                    title=f"{alert.name}: {alert.subject}"[:TITLE],
                    text=f"{run.monitor} {alert}",
                    level="WARN",
                    wait_duration=0.001,
                )

    def close(self, run: Run) -> None:
        """Put the final values into the summary and the folder into an artifact."""
        validations: dict[tuple[int, int], list[Record]] = defaultdict(list)
        for record in run.folder.read_records():
            validations[record.epoch, record.step].append(record)
        final: dict[str, float] = {}
        for records in validations.values():
            final |= means(run.monitor, records)
        for _, experiment in _live(run.loggers):
            experiment.summary.update(final)
            experiment.log_artifact(_artifact(run))

    def _row(self, run: Run, observation: Observation) -> dict[str, Any]:
        import wandb

        now = (observation.epoch, observation.step)
        before = [r for r in run.folder.read_records() if (r.epoch, r.step) != now]
        past = len({(r.epoch, r.step) for r in before})
        panels = observation.panels if self.pictures else {}
        row: dict[str, Any] = {"epoch": observation.epoch}
        row |= means(run.monitor, observation.records)
        if _shown(past, len(panels) + self.table):
            for probe, panel in panels.items():
                file = run.folder.panel_path(probe, *now)
                # to compress it a second time would take longer than all metrics
                row[f"{run.monitor}/probe/{probe}"] = wandb.Image(
                    str(file) if file.exists() else panel
                )
            if self.table:
                columns, rows = _tabulate([*before, *observation.records])
                kinds = [int, int, str, str, str] + [float] * (len(columns) - len(_KEYS))
                row[f"{run.monitor}/table"] = wandb.Table(
                    columns=[*columns], data=[*rows], dtype=kinds
                )
        return row


def _live(loggers: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """The W&B loggers with their runs; not those that only pretend (rank > 0, disabled)."""
    for logger in loggers:
        # by name: `lightning` and `pytorch_lightning` each have a class of their own
        if any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__):
            experiment = logger.experiment
            if type(experiment).__name__ != "_DummyExperiment" and not experiment.disabled:
                yield logger, experiment


def _shown(past: int, files: int) -> bool:
    """Whether the validation after ``past`` others may add so many files.

    Each stretch of validations adds half of what the one before it added, so the sum is bounded.
    """
    stretch = max(1, FILES_PER_RUN // (2 * max(1, files)))
    return past % 2 ** (past // stretch) == 0


def _tabulate(records: Iterable[Record]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table; a missing number is None."""
    cells: dict[tuple[int, int, str, str, str], dict[str, float]] = {}
    metrics: dict[str, None] = {}
    for r in records:
        cell = cells.setdefault((r.epoch, r.step, r.probe, r.target, r.method), {})
        metrics[r.metric] = None
        if r.status == "ok":
            cell[r.metric] = r.value
    explained = {cell[:3] for cell in cells if cell[4]}
    rows: list[list[Any]] = []
    for (epoch, step, probe, target, method), own in cells.items():
        if method or (epoch, step, probe) not in explained:
            of_probe = cells.get((epoch, step, probe, "", ""), {})
            of_target = cells.get((epoch, step, probe, target, ""), {})
            values = of_probe | of_target | own
            rows.append([epoch, step, probe, target, method, *(values.get(m) for m in metrics)])
    if len(rows) > TABLE_ROWS:
        warnings.warn(
            f"The W&B table holds the newest {TABLE_ROWS} rows only; all rows are in records.csv.",
            stacklevel=2,
        )
    return [*_KEYS, *metrics], rows[-TABLE_ROWS:]


def _artifact(run: Run) -> Any:
    import wandb

    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{run.monitor}-{run.id}")
    artifact = wandb.Artifact(name, type="attributions")
    root = run.folder.root
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            # volumes and pictures never change once written: copying them would double the disk
            # that a run takes; the tables grow when it is resumed
            grows = path.parent == root
            artifact.add_file(
                str(path),
                name=path.relative_to(root).as_posix(),
                policy="mutable" if grows else "immutable",
                skip_cache=True,
            )
    return artifact
