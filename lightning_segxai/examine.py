"""The pipeline, free of Lightning: probes, targets and methods in, attributions and records out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_segxai.explain import Failure, explain
from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.focus.overlap import dice
from lightning_segxai.focus.ranks import agreement
from lightning_segxai.guard import undisturbed
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.scored import Outputs, Predictor
from lightning_segxai.targets import Target
from lightning_segxai.values import Attribution, Probe, Record, Status, UnsupportedError, as_shape

OF_PROBE = ("dice",)
OF_TARGET = ("region_voxels",)
OF_MAP = (
    "completeness_error",
    "cancellation",
    "doubtful",
    "untrained_similarity",
    "unmoved",
    "agreement",
)
"""What `measure` says without being asked: of a probe, of a target in it, of a map."""


def examine(
    net: nn.Module,
    probes: Sequence[Probe],
    targets: Mapping[str, Target],
    methods: Mapping[str, AttributionMethod],
    *,
    window: int | tuple[int, int, int] | None = None,
    overlap: float = 0.5,
    outputs: Outputs | None = None,
    threshold: float = 0.5,
    logits: Callable[[Any], Tensor] | None = None,
    looks_per_pass: int | Literal["auto"] = "auto",
    seed: int = 0,
) -> list[Attribution]:
    """Explain a network on probes, for every target and method; the network is left as it was.

    Args:
        net: Any network from ``b c i j k`` to logits ``b classes i j k``.
        probes: The volumes.
        targets: What to explain, by name.
        methods: How, by name.
        window: Edges of sliding windows in voxels; None takes probes whole.
        overlap: Share of a window that the next one covers again.
        outputs: ``softmax`` or ``sigmoid``; None: one channel is sigmoid, more are softmax.
        threshold: Probability from which a class counts as predicted.
        logits: From the network's output to full-resolution logits, where it cannot be guessed.
        looks_per_pass: Windows that go through the network at once.
        seed: Seed of all noise.

    Returns:
        One attribution for each probe, target and method, in this order. An empty region gives the
        status ``empty``, a region that needs a label the probe lacks ``unsupported``, a NaN
        ``nonfinite``; the map is then NaN.

    Raises:
        ValueError: for a layer, class, window or name that cannot be.
    """
    predictor = Predictor(
        net,
        None if window is None else as_shape(window, "window"),
        overlap,
        outputs,
        threshold,
        logits,
        looks_per_pass,
    )
    names = [probe.name for probe in probes]
    if len(set(names)) < len(names):
        raise ValueError(f"`examine` needs probes of different names, but got {', '.join(names)}.")
    with undisturbed(net, seed):
        return [
            attribution
            for probe in probes
            for attribution in explain(predictor, probe, targets, methods, seed=seed)
        ]


def measure(
    attributions: Iterable[Attribution],
    metrics: Mapping[str, FocusMetric],
    *,
    run: str = "",
    failed: Failure | None = None,
) -> list[Record]:
    """Measure maps, each by every metric, and the probes themselves.

    Args:
        attributions: The maps.
        metrics: Focus metrics, by name.
        run: The training run, for the records.
        failed: Told of metrics that raise, whose records are then ``failed``; None lets the first
            one out.

    Returns:
        For each probe `dice` (where it has a label); for each target its `region_voxels`; for each
        map the metrics, and `completeness_error`, `cancellation` and `doubtful` (1 or 0) where it
        has the axiom, `untrained_similarity` and `unmoved` (1 or 0) where the untrained network's
        map is known, and `agreement` where several methods explain the target. A metric that
        cannot be had is ``unsupported``, of a map of zeros ``empty``,
        of a map that failed as the map is.
    """
    attributions = list(attributions)
    predicted = {a.probe.name: a for a in reversed(attributions) if not unseen(a)}
    rows: list[Record] = []
    seen: set[tuple[str, ...]] = set()
    for attribution in attributions:
        probe = attribution.probe
        if (probe.name,) not in seen and probe.label is not None:
            seen.add((probe.name,))
            known = predicted.get(probe.name)
            overlap = math.nan if known is None else dice(known.prediction, probe.label)
            status: Status = "failed" if known is None else "ok"
            rows.append(record(run, attribution, "dice", "1", overlap, status, of="probe"))
        if (probe.name, attribution.target) not in seen:
            seen.add((probe.name, attribution.target))
            # a method may be unsupported where the target is not
            aimed = attribution.status == "empty" or not math.isnan(attribution.score)
            size = float(attribution.region.sum()) if aimed else math.nan
            status = "ok" if aimed else attribution.status
            rows.append(
                record(run, attribution, "region_voxels", "voxel", size, status, of="target")
            )
        axiom = {
            "completeness_error": attribution.completeness_error,
            "cancellation": attribution.cancellation,
        }
        if attribution.completeness_error is not None:
            axiom["doubtful"] = float(attribution.doubtful)
        if attribution.untrained_similarity is not None:
            axiom["untrained_similarity"] = attribution.untrained_similarity
            axiom["unmoved"] = float(attribution.unmoved)
        rows += [
            record(run, attribution, name, "1", value)
            for name, value in axiom.items()
            if value is not None
        ]
        rows += [
            measured(run, (attribution,), name, metric.unit, metric.measure, failed)
            for name, metric in metrics.items()
        ]
    return rows + _agreements(attributions, run)


def _agreements(attributions: Sequence[Attribution], run: str) -> list[Record]:
    """How far the methods of a cell agree, where there are several."""
    cells: dict[tuple[str, str], list[Attribution]] = {}
    for attribution in attributions:
        cells.setdefault((attribution.probe.name, attribution.target), []).append(attribution)
    rows: list[Record] = []
    for maps in cells.values():
        told = {id(a): _unmeasurable(a) for a in maps}
        sound = [a for a in maps if told[id(a)] is None]
        if len(sound) < 2:
            continue
        found = dict(zip(map(id, sound), agreement(sound), strict=True))
        for a in maps:
            value, status = found.get(id(a)), told[id(a)] or "unsupported"
            rows.append(
                record(run, a, "agreement", "1", math.nan, status)
                if value is None
                else record(run, a, "agreement", "1", value)
            )
    return rows


def _unmeasurable(attribution: Attribution) -> Status | None:
    """Why nothing can be measured of a map; None where it can."""
    if attribution.status != "ok":
        return attribution.status
    return None if bool(attribution.values.any()) else "empty"


def measure_shifts(
    attribution: Attribution,
    references: Mapping[str, Attribution],
    shifts: Mapping[str, ShiftMetric],
    *,
    run: str = "",
    failed: Failure | None = None,
) -> list[Record]:
    """Measure how far a map moved from each of the earlier maps of its cell.

    Args:
        attribution: The map.
        references: Earlier maps by name, such as ``first``, ``previous``, ``best``.
        shifts: Shift metrics, by name.
        run: The training run, for the records.
        failed: Told of metrics that raise, as for `measure`.

    Returns:
        One record for each metric and reference, named ``metric/reference``.
    """
    rows: list[Record] = []
    known: dict[int, list[Record]] = {}  # the best map is often the previous one, too
    for which, reference in references.items():
        same = known.get(id(reference.values))
        own = [
            measured(
                run,
                (attribution, reference),
                f"{name}/{which}",
                metric.unit,
                metric.measure,
                failed,
            )
            if same is None
            else replace(same[n], metric=f"{name}/{which}")
            for n, (name, metric) in enumerate(shifts.items())
        ]
        known.setdefault(id(reference.values), own)
        rows += own
    return rows


def measured(
    run: str,
    maps: tuple[Attribution, ...],
    name: str,
    unit: str,
    metric: Callable[..., float | None],
    failed: Failure | None,
) -> Record:
    """The record of a metric of one map, or of two; why there is no number, where there is none."""
    attribution = maps[0]
    for one in maps:
        why = _unmeasurable(one)
        if why is not None:
            return record(run, attribution, name, unit, math.nan, why)
    try:
        value = metric(*maps)
    except UnsupportedError:
        return record(run, attribution, name, unit, math.nan, "unsupported")
    except Exception as error:  # a metric is anybody's code
        if failed is None:
            raise
        failed(attribution.probe.name, attribution.target, f"{attribution.method}/{name}", error)
        return record(run, attribution, name, unit, math.nan, "failed")
    if value is None:
        return record(run, attribution, name, unit, math.nan, "unsupported")
    return record(run, attribution, name, unit, value)


def unseen(attribution: Attribution) -> bool:
    """Whether it failed before the target was aimed: region and prediction are not known."""
    return attribution.status == "failed" and math.isnan(attribution.score)


def record(
    run: str,
    attribution: Attribution,
    metric: str,
    unit: str,
    value: float,
    status: Status = "ok",
    of: Literal["probe", "target", "map"] = "map",
) -> Record:
    """A record of a map, or of the target or probe that it belongs to."""
    if status == "ok" and not math.isfinite(value):
        value, status = math.nan, "nonfinite"
    return Record(
        run=run,
        epoch=attribution.epoch,
        step=attribution.step,
        probe=attribution.probe.name,
        fingerprint=attribution.probe.fingerprint,
        target="" if of == "probe" else attribution.target,
        method=attribution.method if of == "map" else "",
        layer=attribution.layer if of == "map" else "",
        metric=metric,
        unit=unit,
        value=value,
        status=status,
    )
