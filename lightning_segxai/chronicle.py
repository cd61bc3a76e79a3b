"""A run as it is written down: opened, gone on with after a resume, and closed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from lightning_segxai.alerts import Alert, watch
from lightning_segxai.failures import Failures
from lightning_segxai.observe import mean_dice
from lightning_segxai.sinks.base import Observation, Run, Sink
from lightning_segxai.timeline import Timeline


@dataclass(eq=False)
class Chronicle:
    """Hands observations to the sinks, keeps the earlier maps, and knows how far the run came.

    Args:
        run: The run.
        sinks: Where observations are written.
        timeline: The earlier maps.
        failures: What becomes of a sink's failure.
        alerts: What to watch in the numbers, by name.
        last_step: Global step of the last observation; -1 before the first.
    """

    run: Run
    sinks: Sequence[Sink]
    timeline: Timeline
    failures: Failures
    alerts: Mapping[str, Alert] = field(default_factory=dict)
    last_step: int = -1

    @classmethod
    def begin(
        cls,
        run: Run,
        sinks: Sequence[Sink],
        keep: Literal["all", "last"] | int,
        failures: Failures,
        alerts: Mapping[str, Alert],
    ) -> Chronicle:
        """Open the sinks.

        Raises:
            ValueError: if the folder holds another run's probes.
        """
        own = cls(run, sinks, Timeline(run.folder, keep), failures, alerts)
        for sink in sinks:
            failures.attempt(type(sink).__name__, partial(sink.open, run), let_out=(ValueError,))
        return own

    def go_on(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a checkpoint: what was written after its step is removed.

        `ModelCheckpoint(every_n_train_steps=...)` saves before the validation of that step, and
        Lightning does not repeat it on resume: its rows and maps stay, and the timeline, which the
        checkpoint knows without them, takes them in.
        """
        folder = self.run.folder
        folder.truncate_after(step)
        self.timeline.load_state_dict(state["timeline"])
        self.last_step = state["last_step"]
        late = [r for r in folder.read_records() if r.step > self.last_step]
        for epoch, at in dict.fromkeys((r.epoch, r.step) for r in late):
            rows = [r for r in late if (r.epoch, r.step) == (epoch, at)]
            cells = dict.fromkeys((r.probe, r.target, r.method) for r in rows if r.method)
            paths = [folder.map_path(*cell, epoch, at) for cell in cells]
            self.timeline.advance_maps([p for p in paths if p.exists()], mean_dice(rows))
            self.last_step = at

    def watched(self, seen: Observation) -> Observation:
        """The observation, with what the alerts say of it and of those before it."""
        said = seen

        def look() -> None:
            nonlocal said
            before = [r for r in self.run.folder.read_records() if r.step < seen.step]
            rows, raised = watch(self.alerts, before, seen.records)
            said = replace(seen, records=(*seen.records, *rows), alerts=tuple(raised))

        if self.alerts:
            self.failures.attempt("the alerts", look)
        return said

    def write(self, seen: Observation) -> None:
        """Hand an observation to the sinks, then its maps to the timeline; tell its alerts."""
        for sink in self.sinks:
            self.failures.attempt(type(sink).__name__, partial(sink.write, self.run, seen))
        advance = partial(self.timeline.advance, seen.attributions, mean_dice(seen.records))
        self.failures.attempt("timeline", advance)
        self.last_step = seen.step
        for alert in seen.alerts:
            warnings.warn(f"{self.run.monitor} {alert}", stacklevel=2)

    def write_splits(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Keep who trained and who validated; of a resumed run, what it was split into at first."""
        folder = self.run.folder
        before = {row["name"]: row["split"] for row in folder.read_splits()}
        now = {str(row["name"]): str(row["split"]) for row in rows}
        if before and before != now:
            warnings.warn(
                f"`AttributionMonitor`: the resumed run was split otherwise (see "
                f"{folder.root}/splits.csv): what it trained on may be validated on now.",
                stacklevel=2,
            )
        if not before:
            self.failures.attempt("splits.csv", partial(folder.write_splits, rows))

    def write_metrics(self, epoch: int, step: int, logged: Mapping[str, float]) -> None:
        """Keep what the trainer logged at a validation."""
        write = partial(self.run.folder.append_metrics, epoch, step, logged)
        self.failures.attempt("metrics.csv", write)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self.sinks:
            self.failures.attempt(type(sink).__name__, partial(sink.close, self.run))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, of primitives only."""
        return {
            "folder": str(self.run.folder.root),
            "run": self.run.id,
            "probes": [probe.name for probe in self.run.probes],
            "last_step": self.last_step,
            "timeline": self.timeline.state_dict(),
        }
