"""One validation observed: every probe explained, measured, compared with before, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from PIL import Image

from lightning_segxai.alerts import NumberOf
from lightning_segxai.assess import assess_maps
from lightning_segxai.examine import (
    OF_MAP,
    OF_PROBE,
    OF_TARGET,
    measure,
    measure_shifts,
    record,
    unseen,
)
from lightning_segxai.explain import Failure, explain
from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.focus.ranks import similarity
from lightning_segxai.guard import undisturbed
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.render import render
from lightning_segxai.scored import Predictor
from lightning_segxai.sinks.base import Observation
from lightning_segxai.targets import Target
from lightning_segxai.timeline import Reference, Timeline
from lightning_segxai.values import Attribution, Probe, Record

_EARLIER: tuple[Reference, ...] = get_args(Reference)


@dataclass(frozen=True)
class Questions:
    """What is asked of a network, by name.

    Raises:
        ValueError: for a name that two numbers of a map would have.
    """

    targets: Mapping[str, Target]
    methods: Mapping[str, AttributionMethod]
    metrics: Mapping[str, FocusMetric]
    shifts: Mapping[str, ShiftMetric]
    faithfulness: Mapping[str, FaithfulnessMetric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = (*self.metrics, *self.faithfulness)
        taken = [name for name in (*OF_MAP, *OF_TARGET, *OF_PROBE) if name in names]
        taken += [name for name in self.metrics if name in self.faithfulness]
        if taken:
            raise ValueError(
                f"The metric name {taken[0]!r} stands for another number of the same map already. "
                "Choose another name."
            )

    @property
    def columns(self) -> dict[str, NumberOf]:
        """All names that the metric column may hold, and what each is a number of."""
        moved = [f"{name}/{which}" for name in (*self.shifts, "same_region") for which in _EARLIER]
        of_map: dict[str, NumberOf] = dict.fromkeys(
            (*self.metrics, *moved, *self.faithfulness, *OF_MAP), "map"
        )
        of_target: dict[str, NumberOf] = dict.fromkeys(OF_TARGET, "target")
        return of_map | of_target | dict.fromkeys(OF_PROBE, "probe")

    def without(self, methods: Collection[str], metrics: Collection[str]) -> Questions:
        """The same, but for some methods and some metrics."""
        return Questions(
            self.targets,
            {name: method for name, method in self.methods.items() if name not in methods},
            {name: metric for name, metric in self.metrics.items() if name not in metrics},
            {name: shift for name, shift in self.shifts.items() if name not in metrics},
            {name: held for name, held in self.faithfulness.items() if name not in metrics},
        )


def observe(
    predictor: Predictor,
    probes: Sequence[Probe],
    questions: Questions,
    *,
    epoch: int,
    step: int,
    logging_step: int,
    run: str,
    timeline: Timeline | None,
    seed: int,
    failed: Failure | None,
    stop: Callable[[], bool] = lambda: False,
) -> Observation:
    """Explain, assess, measure and draw all probes; the network is left as it was.

    Args:
        predictor: The network.
        probes: The fixed volumes.
        questions: What is asked.
        epoch: Epoch of the training.
        step: Global step of the training.
        logging_step: The step under which Lightning logs this validation's own metrics.
        run: The run's id, for the records.
        timeline: The earlier maps; None where there are none to be compared with.
        seed: Seed of all noise.
        failed: Told of what fails; None lets the first failure out.
        stop: Asked between probes; True leaves the other probes out.
    """
    maps: list[Attribution] = []
    assessed: list[Record] = []
    with undisturbed(predictor.module, seed):
        for probe in probes:
            if stop():
                break
            found = explain(
                predictor, probe, questions.targets, questions.methods, seed=seed, failed=failed
            )
            of_probe = [replace(a, epoch=epoch, step=step) for a in found]
            maps += of_probe
            assessed += assess_maps(
                predictor,
                of_probe,
                questions.targets,
                questions.faithfulness,
                questions.methods,
                seed=seed,
                run=run,
                failed=failed,
            )
    shifts: list[Record] = []
    if timeline is not None:
        for n, attribution in enumerate(maps):
            if attribution.status == "ok":
                references = timeline.references(attribution)
                maps[n] = _beside_untrained(attribution, references)
                shifts += _shifts(attribution, references, timeline, questions.shifts, run, failed)
    records = measure(maps, questions.metrics, run=run, failed=failed) + shifts + assessed
    predictions = {a.probe.name: a.prediction for a in maps if not unseen(a)}
    panels = _panels(maps, records, run, failed)
    return Observation(epoch, step, logging_step, tuple(maps), tuple(records), predictions, panels)


def _panels(
    maps: Sequence[Attribution], records: Sequence[Record], run: str, failed: Failure | None
) -> dict[str, Image.Image]:
    """A picture of each probe; one that cannot be drawn takes no number with it."""
    overlaps = {r.probe: r.value for r in records if r.metric == "dice" and r.status == "ok"}
    panels: dict[str, Image.Image] = {}
    for name in dict.fromkeys(a.probe.name for a in maps):
        of_probe = [a for a in maps if a.probe.name == name]
        try:
            panels[name] = render(of_probe, title=run, dice=overlaps.get(name))
        except Exception as error:  # numbers are worth more than a picture of them
            if failed is None:
                raise
            failed(name, of_probe[0].target, "the picture", error)
    return panels


def _beside_untrained(
    attribution: Attribution, references: Mapping[Reference, Attribution]
) -> Attribution:
    """The map, with its similarity to that of the untrained network, where that is known."""
    first = references.get("first")
    if first is None or first.step > 0 or attribution.step == 0:
        return attribution
    if not bool(attribution.values.any()) or not bool(first.values.any()):
        return attribution
    return replace(attribution, untrained_similarity=similarity(attribution, first))


def _shifts(
    attribution: Attribution,
    references: Mapping[Reference, Attribution],
    timeline: Timeline,
    shifts: Mapping[str, ShiftMetric],
    run: str,
    failed: Failure | None,
) -> list[Record]:
    """How far the map moved, and whether it still explains the same voxels."""
    by_name = {str(which): earlier for which, earlier in references.items()}
    rows = measure_shifts(attribution, by_name, shifts, run=run, failed=failed)
    rows += (
        record(
            run,
            attribution,
            f"same_region/{which}",
            "1",
            float(timeline.same_region(attribution, which)),
        )
        for which in references
    )
    return rows


def mean_dice(records: Sequence[Record]) -> float | None:
    """Mean Dice of the probes at one validation; None without a labeled probe."""
    found = [r.value for r in records if r.metric == "dice" and r.status == "ok"]
    return sum(found) / len(found) if found else None
