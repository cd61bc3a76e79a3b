"""One probe explained: every distinct trajectory walked once, for all targets and methods on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_segxai.guard import undisturbed
from lightning_segxai.methods.base import (
    AttributionMethod,
    Complete,
    LookMethod,
    MapInMaking,
    values_of,
)
from lightning_segxai.passes import Look, walk
from lightning_segxai.rules.interception import Rule
from lightning_segxai.scored import Predictor, ScoredModel, describe
from lightning_segxai.taps import resolve_layer
from lightning_segxai.targets import Target, voxels
from lightning_segxai.trajectories import Trajectory
from lightning_segxai.values import (
    Attribution,
    Logits,
    Map,
    Probe,
    Status,
    UnsupportedError,
    Volume,
    checked_name,
)

Failure = Callable[[str, str, str, Exception], None]
"""Told of each cell that failed: probe, target, method, and the exception."""


def explain(
    predictor: Predictor,
    probe: Probe,
    targets: Mapping[str, Target],
    methods: Mapping[str, AttributionMethod],
    *,
    seed: int = 0,
    failed: Failure | None = None,
) -> list[Attribution]:
    """Explain one probe; to be called inside `guard.undisturbed`.

    Args:
        predictor: The network.
        probe: The volume.
        targets: What to explain, by name.
        methods: How, by name.
        seed: Seed of all noise.
        failed: Told of failures, which become attributions of status ``failed``; None lets the
            first one out.

    Returns:
        One attribution for each target and method, in this order.
    """
    for name in (*targets, *methods):
        checked_name(name, "target or method")
    return _Explanation(predictor, probe, targets, methods, seed, failed).run()


@dataclass(eq=False)
class _Cell:
    """One map to be had, or why there is none."""

    target: str
    name: str
    method: AttributionMethod
    values: Map | None = None
    layer: str = ""
    parts: tuple[LookMethod, ...] = ()
    made: dict[int, Map | Complete] = field(default_factory=dict)
    error: float | None = None
    cancellation: float | None = None
    seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""

    @property
    def open(self) -> bool:
        """Whether its map is still to be made."""
        return self.status == "ok" and self.values is None


_Way = tuple[Trajectory, Rule | None]
"""What equal methods share: where to look, and how functions run backward there."""

_Part = tuple[_Cell, int]
"""One of the methods that a cell's map is made of."""


def _way(part: _Part) -> _Way:
    cell, n = part
    method = cell.parts[n]
    assert method.trajectory is not None
    return method.trajectory, method.rule


@dataclass(eq=False)
class _Explanation:
    """All that is known while one probe is explained."""

    predictor: Predictor
    probe: Probe
    targets: Mapping[str, Target]
    methods: Mapping[str, AttributionMethod]
    seed: int
    failed: Failure | None
    logits: Logits | None = None
    models: dict[str, ScoredModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x = self.probe.image.detach().to(self.predictor.device)
        self.windows = self.predictor.windows(self.x.shape[1:])
        self.cells = [
            _Cell(target, name, method)
            for target in self.targets
            for name, method in self.methods.items()
        ]

    def run(self) -> list[Attribution]:
        """Predict, aim every target, walk every trajectory; then the methods that walk alone."""
        for cell in self.cells:
            self._try([cell], partial(self._resolve, cell))
        walks: dict[_Way, list[_Part]] = {}
        for cell in self.cells:
            for n in range(len(cell.parts)):
                walks.setdefault(_way((cell, n)), []).append((cell, n))
        ways = [(t, rule) for t, rule in walks if t.starts_here and rule is None]
        # a look at the whole volume itself is the prediction too
        if ways and len(self.windows.places) == 1:
            first = walks.pop(ways[0])
            self._try(_cells(first), partial(self._walk, *ways[0], first))
        if self.logits is None:
            self._try(self.cells, self._predict)
        for (trajectory, rule), parts in walks.items():
            self._try(_cells(parts), partial(self._walk, trajectory, rule, parts))
        for cell in self.cells:
            self._try([cell], partial(self._alone, cell))
        return [self._attribution(cell) for cell in self.cells]

    def _try(self, cells: list[_Cell], work: Callable[[], None]) -> None:
        """Do the work, if any cell is open; a failure is that of the cells that are."""
        if not any(cell.open for cell in cells):
            return
        try:
            work()
        except UnsupportedError as error:
            for cell in cells:
                if cell.open:
                    cell.status, cell.reason = "unsupported", str(error)
        except Exception as error:  # a method is anybody's code: what it raises is told and kept
            if self.failed is None:
                raise
            for cell in cells:
                if cell.open:
                    cell.status, cell.reason = "failed", f"{type(error).__name__}: {error}"
                    self.failed(self.probe.name, cell.target, cell.name, error)

    def _resolve(self, cell: _Cell) -> None:
        """Find the cell's layers and ways, so that a wrong one fails by itself."""
        parts = cell.method.parts
        for part in parts:
            hash((part.trajectory, part.rule))  # it is a key
        cell.parts = parts
        found = resolved_layers(self.predictor, self.x, cell.method)
        cell.layer = found[0] if cell.method.layer else ""

    def _predict(self) -> None:
        self._aim(self.predictor.predict(self.x))

    def _aim(self, logits: Logits) -> None:
        """Fix every target on the prediction."""
        self.logits = logits
        for name in self.targets:
            cells = [cell for cell in self.cells if cell.target == name]
            self._try(cells, partial(self._aim_at, name, cells, logits))

    def _aim_at(self, name: str, cells: list[_Cell], logits: Logits) -> None:
        target = self.targets[name]
        model = ScoredModel.aim(self.predictor, self.probe, target, logits, self.seed)
        self.models[name] = model
        if model.voxels == 0:
            for cell in cells:
                cell.status, cell.reason = "empty", "the region has no voxel"

    def _walk(self, trajectory: Trajectory, rule: Rule | None, parts: list[_Part]) -> None:
        begin = time.perf_counter()
        folds: list[_CellFold] = []

        def aim(logits: Logits) -> list[_CellFold]:
            if self.logits is None:
                self._aim(logits)
            for part in parts:
                if part[0].open:
                    self._try([part[0]], partial(begin_fold, part))
            return folds

        def begin_fold(part: _Part) -> None:
            cell, n = part
            method, model = cell.parts[n], self.models[cell.target]
            making = MapInMaking(method, model, method.start(model, self.x))
            folds.append(_CellFold(self, cell, n, making))

        layers = dict.fromkeys(
            layer for cell, n in parts if cell.open for layer in cell.parts[n].layers
        )
        generator = torch.Generator().manual_seed(self.seed)
        walk(self.predictor, self.probe, self.x, trajectory, rule, tuple(layers), aim, generator)
        shared = (time.perf_counter() - begin) / max(1, len(folds))
        for fold in folds:
            begin = time.perf_counter()
            self._try([fold.cell], fold.finish)
            fold.cell.seconds += shared + time.perf_counter() - begin

    def _alone(self, cell: _Cell) -> None:
        begin = time.perf_counter()
        # somebody's code: what it does to the network must not reach the next cell
        with undisturbed(self.predictor.module, self.seed):
            made = cell.method.attribute(self.models[cell.target], self.x)
        self.keep(cell, made)
        cell.seconds = time.perf_counter() - begin

    def _attribution(self, cell: _Cell) -> Attribution:
        model = self.models.get(cell.target)
        values = torch.full((1, 1, 1), math.nan).expand(self.probe.shape)
        if model is not None and cell.values is not None and cell.status == "ok":
            values = (cell.values / (model.voxels if cell.method.shares_score else 1)).cpu()
        score = math.nan
        if model is not None and self.logits is not None and model.voxels > 0:
            score = model.score(self.logits) / model.voxels
        return Attribution(
            probe=self.probe,
            target=cell.target,
            method=cell.name,
            layer=cell.layer,
            values=values,
            unit=cell.method.unit,
            region=(
                torch.zeros(self.probe.shape, dtype=torch.bool)
                if model is None
                else voxels(model.weights).cpu()
            ),
            prediction=self.prediction,
            score=score,
            completeness_error=cell.error,
            cancellation=cell.cancellation,
            seconds=cell.seconds,
            status=cell.status,
            reason=cell.reason,
        )

    def keep(self, cell: _Cell, given: Any) -> None:
        """Check a map and its axiom; a stranger's method may give anything."""
        made = values_of(given)
        if not isinstance(made, Tensor) or made.shape != self.probe.shape:
            raise ValueError(
                f"`{cell.method}` gave {describe(made)}, but a map of the probe's "
                f"{tuple(self.probe.shape)} voxels is needed."
            )
        made = made.detach()
        if not bool(torch.isfinite(made).all()):
            logits = self.logits is not None and bool(torch.isfinite(self.logits).all())
            cell.status = "nonfinite"
            cell.reason = f"NaN or infinity in the map, {'not' if logits else 'and'} in the logits"
            return
        if isinstance(given, Complete):
            self._hold_to_axiom(cell, made, given.start)
        cell.values = made

    @cached_property
    def prediction(self) -> Tensor:
        """The class of each voxel, the same for all cells; zeros where nothing was predicted."""
        if self.logits is None:
            return torch.zeros(self.probe.shape, dtype=torch.long)
        return self.predictor.decisive(self.logits).argmax(dim=0).cpu()

    def _hold_to_axiom(self, cell: _Cell, made: Map, start: float) -> None:
        """How far the map's sum is from the score difference, and how much of it cancels."""
        assert self.logits is not None  # a map was made
        score = self.models[cell.target].score(self.logits)
        difference = score - start
        if abs(difference) <= 1e-6 * max(1.0, abs(score)):
            return
        total, absolute = float(made.double().sum()), float(made.double().abs().sum())
        cell.error = abs(total - difference) / abs(difference)
        cell.cancellation = absolute / abs(difference)


def resolved_layers(predictor: Predictor, x: Volume, method: AttributionMethod) -> list[str]:
    """The full paths of the layers that a method asks for, its own first.

    Raises:
        ValueError: if there is no such layer, or its output is no volume.
    """
    layers = [method.layer] if method.layer else []
    layers += [layer for part in method.parts for layer in part.layers]
    if not layers:
        return []
    rehearsal = predictor.rehearse(x[(slice(None), *predictor.windows(x.shape[1:]).places[0])])
    return [resolve_layer(predictor, rehearsal, layer) for layer in layers]


def _cells(parts: list[_Part]) -> list[_Cell]:
    """The cells that parts belong to."""
    return list({id(cell): cell for cell, _ in parts}.values())


@dataclass(frozen=True, eq=False)
class _CellFold:
    """A map in the making whose failure is its own, not that of the others on the same walk."""

    whole: _Explanation
    cell: _Cell
    part: int
    making: MapInMaking

    @property
    def model(self) -> ScoredModel:
        """The network seen through the cell's target."""
        return self.making.model

    def see(self, look: Look) -> None:
        """Fold one look in."""
        self.whole._try([self.cell], partial(self.making.see, look))

    def finish(self) -> None:
        """Make the part's map, and the cell's with the last one."""
        model, cell, x = self.making.model, self.cell, self.whole.x
        cell.made[self.part] = self.making.method.finish(model, x, self.making.state)
        if len(cell.made) == len(cell.parts):
            made = [cell.made[n] for n in range(len(cell.parts))]
            self.whole.keep(cell, cell.method.join(model, x, made))
