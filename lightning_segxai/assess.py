"""Maps and faithfulness metrics in, records out: what is measured with the network at hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_segxai.examine import measured
from lightning_segxai.explain import Failure
from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.guard import undisturbed
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.scored import Outputs, Predictor, ScoredModel
from lightning_segxai.targets import Target, voxels
from lightning_segxai.values import Attribution, Logits, Probe, Record, as_shape


def assess(
    net: nn.Module,
    attributions: Iterable[Attribution],
    targets: Mapping[str, Target],
    faithfulness: Mapping[str, FaithfulnessMetric],
    *,
    methods: Mapping[str, AttributionMethod] | None = None,
    window: int | tuple[int, int, int] | None = None,
    overlap: float = 0.5,
    outputs: Outputs | None = None,
    threshold: float = 0.5,
    logits: Callable[[Any], Tensor] | None = None,
    looks_per_pass: int | Literal["auto"] = "auto",
    seed: int = 0,
    run: str = "",
    failed: Failure | None = None,
) -> list[Record]:
    """Hold maps against the network that they explain; the network is left as it was.

    Args:
        net: The network that was explained, as it was then.
        attributions: The maps.
        targets: What they explain, by name, as it was given to `examine`.
        faithfulness: Faithfulness metrics, by name.
        methods: What made the maps, by name, as it was given to `examine`: for metrics that
            explain the network again.
        window: As for `examine`, like all below.
        overlap: Share of a window that the next one covers again.
        outputs: ``softmax`` or ``sigmoid``; None: one channel is sigmoid, more are softmax.
        threshold: Probability from which a class counts as predicted.
        logits: From the network's output to full-resolution logits, where it cannot be guessed.
        looks_per_pass: Windows that go through the network at once.
        seed: Seed of all noise.
        run: The training run, for the records.
        failed: Told of metrics that raise, whose records are then ``failed``; None lets the first
            one out.

    Returns:
        For each map a record for each metric, in this order. A metric that cannot be had is
        ``unsupported``, of a map of zeros ``empty``, of a map that failed as the map is. Targets
        are fixed on the network's prediction of the unperturbed volume, as they were for the maps,
        which costs one forward pass for each probe beside the metrics' own.

    Raises:
        ValueError: for a map of a target that is not among these, and a window that cannot be.
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
    return assess_maps(
        predictor,
        attributions,
        targets,
        faithfulness,
        methods or {},
        seed=seed,
        run=run,
        failed=failed,
    )


def assess_maps(
    predictor: Predictor,
    attributions: Iterable[Attribution],
    targets: Mapping[str, Target],
    faithfulness: Mapping[str, FaithfulnessMetric],
    methods: Mapping[str, AttributionMethod],
    *,
    seed: int = 0,
    run: str = "",
    failed: Failure | None = None,
) -> list[Record]:
    """The same for a network that is already wrapped."""
    attributions = list(attributions)
    unknown = sorted({a.target for a in attributions} - set(targets))
    if unknown:
        raise ValueError(
            f"`assess` needs the targets that the maps explain, but got none called "
            f"{', '.join(unknown)}. Give the ones given to `examine`."
        )
    rows: list[Record] = []
    if not faithfulness:
        return rows
    with undisturbed(predictor.module, seed):
        for _, maps in groupby(attributions, lambda a: id(a.probe)):
            of_probe = list(maps)
            aims = _Aims(predictor, of_probe[0].probe, targets, seed)
            rows += [
                measured(run, (a,), name, metric.unit, aims.held_to(metric, methods), failed)
                for a in of_probe
                for name, metric in faithfulness.items()
            ]
    return rows


@dataclass(frozen=True, eq=False)
class _Aims:
    """The network seen through each target of a probe, once a map asks for it."""

    predictor: Predictor
    probe: Probe
    targets: Mapping[str, Target]
    seed: int
    models: dict[str, ScoredModel] = field(default_factory=dict)

    @cached_property
    def logits(self) -> Logits:
        """What the targets are fixed on."""
        return self.predictor.predict(self.probe.image.detach().to(self.predictor.device))

    def held_to(
        self, metric: FaithfulnessMetric, methods: Mapping[str, AttributionMethod]
    ) -> Callable[[Attribution], float | None]:
        """The metric as a function of the map alone."""

        def assessed(attribution: Attribution) -> float | None:
            model = self._model(attribution)
            # somebody's code: what it does to the network must not reach the next one
            with undisturbed(self.predictor.module, self.seed):
                return metric.assess(model, attribution, methods.get(attribution.method))

        return assessed

    def _model(self, attribution: Attribution) -> ScoredModel:
        name = attribution.target
        if name not in self.models:
            target = self.targets[name]
            model = ScoredModel.aim(self.predictor, self.probe, target, self.logits, self.seed)
            if not torch.equal(voxels(model.weights).cpu(), attribution.region):
                warnings.warn(
                    f'The target "{name}" is elsewhere in probe "{self.probe.name}" than when it '
                    "was explained: another network, or another target of that name? The maps "
                    "are held against this one.",
                    stacklevel=2,
                )
            self.models[name] = model
        return self.models[name]
