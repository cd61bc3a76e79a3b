"""Alerts: a number that stays beyond a threshold is told; a pure function of the run's records."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_segxai.values import Record, checked_name

NumberOf = Literal["probe", "target", "map"]
"""What a metric is a number of: the probe itself, a target in it, or a map."""

PREFIX = "alert/"
"""How the metric of an alert's own records begins."""


@dataclass(frozen=True)
class Alert:
    """Tell when a metric, averaged over the probes, is beyond a threshold and stays there.

    Each cell (target and method) is watched on its own. An alert is raised while the cell's value
    has been beyond the threshold at the last ``for_epochs`` observations, and told when it becomes
    raised; it is told again only after it was not raised in between. An observation is a
    validation at which the monitor looks and measures the metric: with ``every_n_validations=2``,
    two observations are four validations. One that has no value for the cell, because the metric
    failed or is not supported, ends the row. The untrained network, at step 0, does not count.

    >>> Alert("mass_inside", below=0.2, for_epochs=3, method="saliency")
    Alert(metric='mass_inside', above=None, below=0.2, for_epochs=3, target=None, method='saliency')

    Args:
        metric: A name of the metric column, such as `mass_inside` or `rank_correlation/first`.
        above: Values greater than this are beyond; in the metric's unit.
        below: Values smaller than this are beyond; give this or ``above``.
        for_epochs: Observations in a row that must be beyond.
        target: Name of the target. None: any, each counted on its own.
        method: Name of the method. None: any, each counted on its own.

    Raises:
        ValueError: unless there is one threshold, a finite one, and at least one observation.
    """

    metric: str
    above: float | None = None
    below: float | None = None
    for_epochs: int = 1
    target: str | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        who = f'`Alert("{self.metric}")`'
        if (self.above is None) == (self.below is None):
            raise ValueError(
                f"{who} needs either `above` or `below`, but got above={self.above} and "
                f"below={self.below}. Make two alerts of two thresholds."
            )
        if not math.isfinite(self.threshold):
            raise ValueError(f"{who} needs a finite threshold, but got {self.threshold}.")
        if self.for_epochs < 1:
            raise ValueError(f"{who} needs `for_epochs` of at least 1, but got {self.for_epochs}.")

    @property
    def threshold(self) -> float:
        """The one that was given."""
        given = self.above if self.above is not None else self.below
        assert given is not None
        return given

    @property
    def side(self) -> Literal["above", "below"]:
        """Where values are beyond the threshold."""
        return "above" if self.above is not None else "below"

    def beyond(self, value: float) -> bool:
        """Whether a value is beyond the threshold; NaN, a missing value, is not."""
        return value > self.threshold if self.side == "above" else value < self.threshold

    def watches(self, record: Record) -> bool:
        """Whether a record is of the metric, and of a cell, that the alert is about."""
        return (
            record.metric == self.metric
            and record.step > 0
            and self.target in (None, record.target)
            and self.method in (None, record.method)
        )


@dataclass(frozen=True)
class Raised:
    """An alert that has just become raised.

    Args:
        name: The alert's name.
        subject: The metric and its cell, such as ``mass_inside of vessel/saliency``.
        finding: What was found, such as ``0.12 at epoch 7, below 0.2 for 3 observations``.
    """

    name: str
    subject: str
    finding: str

    def __str__(self) -> str:
        return f'alert "{self.name}": {self.subject} is {self.finding}.'


def watch(
    alerts: Mapping[str, Alert], before: Iterable[Record], now: Sequence[Record]
) -> tuple[list[Record], list[Raised]]:
    """What the alerts say of an observation.

    Nothing is remembered but the records, so that a resumed run goes on as if it had never stopped.

    Args:
        alerts: The alerts, by name.
        before: All records of the earlier observations, those of the alerts included.
        now: The records of the observation.

    Returns:
        For each alert, and each probe of each cell that it watches, a record ``alert/<name>``: 1
        while the alert is raised, 0 while it is not, and without a value, as the metric's own
        record is, where the cell has none. Then the alerts that have become raised.
    """
    before = list(before)
    records: list[Record] = []
    told: list[Raised] = []
    for name, alert in alerts.items():
        own = PREFIX + name
        earlier = _by_cell(r for r in before if alert.watches(r))
        states = _by_cell(r for r in before if r.metric == own)
        for cell, observed in _by_cell(r for r in now if alert.watches(r)).items():
            (rows,) = observed.values()
            value = _mean(rows)
            past = earlier.get(cell, {})
            in_a_row = _row(alert, [*map(_mean, past.values()), value])
            raised = in_a_row >= alert.for_epochs
            records += (
                replace(r, metric=own, unit="1", value=math.nan)
                if math.isnan(value)
                else replace(r, metric=own, unit="1", value=float(raised), status="ok")
                for r in rows
            )
            last = _mean(states.get(cell, {}).get(max(past, default=0), []))
            if raised and last != 1.0:
                told.append(Raised(name, _subject(alert, cell), _finding(alert, rows, in_a_row)))
    return records, told


def check_alerts(
    alerts: Mapping[str, Alert],
    *,
    targets: Collection[str],
    methods: Collection[str],
    metrics: Mapping[str, NumberOf],
) -> None:
    """Refuse alerts of what is never computed.

    Args:
        alerts: The alerts, by name.
        targets: Names of the targets.
        methods: Names of the methods.
        metrics: All that the metric column may hold, and what each is a number of.

    Raises:
        ValueError: for a bad name, and for a metric, target or method that there is not.
    """
    for name, alert in alerts.items():
        who = f'Alert "{checked_name(name, "alert")}"'
        for what, asked, known in (
            ("metric", alert.metric, list(metrics)),
            ("target", alert.target, list(targets)),
            ("method", alert.method, list(methods)),
        ):
            if asked is not None and asked not in known:
                raise ValueError(
                    f'{who} needs a {what} that is computed, but got "{asked}". '
                    f"Close to it: {', '.join(_close(asked, known)) or 'none'}."
                )
        of = metrics[alert.metric]
        for what, asked, has in (
            ("target", alert.target, of != "probe"),
            ("method", alert.method, of == "map"),
        ):
            if asked is not None and not has:
                raise ValueError(
                    f'{who} asks for {what} "{asked}", but {alert.metric} is a number of the '
                    f"{of}. Leave `{what}` out."
                )


def _close(name: str, known: Sequence[str]) -> Sequence[str]:
    """Names that may have been meant, those of a metric without its reference first."""
    longer = [k for k in known if k.startswith(f"{name}/")]
    return longer or difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]


def _by_cell(records: Iterable[Record]) -> dict[tuple[str, str], dict[int, list[Record]]]:
    """Records by target and method, then by step."""
    cells: dict[tuple[str, str], dict[int, list[Record]]] = {}
    for r in records:
        cells.setdefault((r.target, r.method), {}).setdefault(r.step, []).append(r)
    return {cell: dict(sorted(steps.items())) for cell, steps in cells.items()}


def _mean(rows: Sequence[Record]) -> float:
    """Mean over the probes; NaN where none has a value."""
    found = [r.value for r in rows if r.status == "ok"]
    return math.fsum(found) / len(found) if found else math.nan


def _row(alert: Alert, values: Sequence[float]) -> int:
    """How many of the last values are beyond the threshold, without a gap."""
    count = 0
    for value in reversed(values):
        if not alert.beyond(value):
            break
        count += 1
    return count


def _subject(alert: Alert, cell: tuple[str, str]) -> str:
    place = "/".join(part for part in cell if part)
    return f"{alert.metric} of {place}" if place else alert.metric


def _finding(alert: Alert, rows: Sequence[Record], in_a_row: int) -> str:
    value, unit = _mean(rows), rows[0].unit
    found = f"{value:.3g}" if unit == "1" else f"{value:.3g} {unit}"
    stays = f" for {in_a_row} observations" if in_a_row > 1 else ""
    return f"{found} at epoch {rows[0].epoch}, {alert.side} {alert.threshold:g}{stays}"
