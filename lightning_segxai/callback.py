"""The Lightning callback: when to look, where to write, and never to disturb the training."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_segxai.alerts import Alert, check_alerts
from lightning_segxai.checkpoints import segment
from lightning_segxai.chronicle import Chronicle
from lightning_segxai.cost import cost, cost_of_assessing
from lightning_segxai.data.batches import batch_probes
from lightning_segxai.data.probes import ProbeFile
from lightning_segxai.defaults import (
    default_methods,
    default_metrics,
    default_shifts,
    default_targets,
)
from lightning_segxai.failures import Failures, Mistakes, OnError
from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.folder import RunFolder
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.observe import Questions, observe
from lightning_segxai.scored import Outputs, Predictor
from lightning_segxai.sinks.base import Observation, Run, Sink, means
from lightning_segxai.sinks.files import FileSink
from lightning_segxai.sinks.wandb import WandbSink
from lightning_segxai.targets import Target
from lightning_segxai.timeline import Timeline
from lightning_segxai.trainer_run import (
    averaging_before,
    logging_step,
    run_place,
    settings,
    share_of_epoch,
    unused,
)
from lightning_segxai.values import Probe, as_shape, checked_name

# A Trainer runs callbacks of any namespace, but a LightningCLI knows only those of its own.
_BASES = tuple(
    import_module(namespace).Callback
    for package, namespace in (
        ("pytorch_lightning", "pytorch_lightning"),
        ("lightning", "lightning.pytorch"),
    )
    if find_spec(package) is not None
)

_KINDS = {
    "targets": "target",
    "methods": "method",
    "metrics": "metric",
    "shifts": "shift metric",
    "faithfulness": "faithfulness metric",
}

BATCH_PROBES = 4
"""How many probes are taken from the first validation batch, where there are no others."""


class AttributionMonitor(*_BASES):  # type: ignore[misc]  # chosen by what is installed
    """Shows where a segmentation network looks, at every validation of its training.

    It explains the network on fixed probe volumes, measures where the attribution lies and how it
    moved, and writes maps, pictures and numbers to the run's folder and to Weights & Biases.
    Training with it is bit-identical to training without it. Scalars are also logged to the
    trainer as ``<name>/metric/<metric>/<target>/<method>`` (mean over the probes), so that
    `ModelCheckpoint` and `EarlyStopping` can monitor them; between observations they keep their
    last value.

    The sanity check is a rehearsal: one probe is explained and forgotten, so that a wrong layer
    name ends the run in its first minute. The untrained network is recorded at step 0.

    Put it before a `WeightAveraging` callback, or it sees other weights than the validation.

    Args:
        probes: The fixed volumes, or their files. None: the data module's ``probes()``, else the
            first validation batch.
        targets: What is explained, by name. None: `vessel`, the evidence for class 1.
        methods: How, by name. None: `saliency`, `integrated_gradients` and `grad_cam`.
        metrics: What is measured of a map, by name. None: all of this package.
        shifts: What is measured between a map and the first, previous and best one, by name. None:
            all of this package.
        faithfulness: How maps are held against the network, by name. None: not at all, as it costs
            passes (`passes` of each metric; the log says how many in all).
        alerts: What is told, in the log and by Weights & Biases, when a number goes beyond a
            threshold and stays there, by name.
        sinks: Where observations are written besides the run's folder. None: Weights & Biases.
        every_n_validations: Validations from one observation to the next.
        faithfulness_every_n_validations: Validations from one assessment to the next; it is made
            with the first observation that is due then, and of the untrained network.
        window: Edges of sliding windows in voxels; None takes probes whole.
        overlap: Share of a window that the next one covers again.
        outputs: Whether the network's outputs are `softmax` or `sigmoid`. None: one channel is
            sigmoid, more are softmax.
        threshold: Probability from which a class counts as predicted.
        logits: From the network's output to full-resolution logits, where it cannot be guessed.
        looks_per_pass: Windows that go through the network at once.
        keep: Which maps stay on disk: `all`, `last`, or those of every n-th validation. The first,
            previous and best ones always stay.
        on_error: What a failing method does: `warn` and go on, `disable` it, or `raise`.
        seed: Seed of all noise, the same at every validation.
        name: First part of all keys, and the folder's name; tells two monitors apart.

    Raises:
        ValueError: for a name, number or word that cannot be.
    """

    def __init__(
        self,
        probes: list[ProbeFile | Probe] | None = None,
        targets: dict[str, Target] | None = None,
        methods: dict[str, AttributionMethod] | None = None,
        metrics: dict[str, FocusMetric] | None = None,
        shifts: dict[str, ShiftMetric] | None = None,
        faithfulness: dict[str, FaithfulnessMetric] | None = None,
        alerts: dict[str, Alert] | None = None,
        sinks: list[Sink] | None = None,
        every_n_validations: int = 1,
        faithfulness_every_n_validations: int = 5,
        window: int | tuple[int, int, int] | None = None,
        overlap: float = 0.5,
        outputs: Outputs | None = None,
        threshold: float = 0.5,
        logits: Callable[[Any], Tensor] | None = None,
        looks_per_pass: int | Literal["auto"] = "auto",
        keep: Literal["all", "last"] | int = "all",
        on_error: OnError = "warn",
        seed: int = 0,
        name: str = "segxai",
    ) -> None:
        cadences = {
            "every_n_validations": every_n_validations,
            "faithfulness_every_n_validations": faithfulness_every_n_validations,
        }
        for cadence, n in cadences.items():
            if n < 1:
                raise ValueError(f"`AttributionMonitor({cadence}={n})` must be at least 1.")
        if on_error not in ("warn", "disable", "raise"):
            raise ValueError(
                f"`AttributionMonitor(on_error={on_error!r})` must be warn, disable or raise."
            )
        self.name = checked_name(name, "monitor")
        self._asked = Questions(
            default_targets() if targets is None else dict(targets),
            default_methods() if methods is None else dict(methods),
            default_metrics() if metrics is None else dict(metrics),
            default_shifts() if shifts is None else dict(shifts),
            dict(faithfulness or {}),
        )
        for kind, one in _KINDS.items():
            for key in getattr(self._asked, kind):
                checked_name(key, one)
        for kind, given in (("probes", probes), ("targets", targets), ("methods", methods)):
            if given is not None and not given:
                raise ValueError(f"`AttributionMonitor({kind}={given})` needs at least one.")
        self.alerts = dict(alerts or {})
        check_alerts(
            self.alerts,
            targets=self._asked.targets,
            methods=self._asked.methods,
            metrics=self._asked.columns,
        )
        self.sinks: list[Sink] = [FileSink(), *([WandbSink()] if sinks is None else sinks)]
        self.every_n_validations = every_n_validations
        self.faithfulness_every_n_validations = faithfulness_every_n_validations
        self.keep = keep
        self.on_error = on_error
        self.seed = seed
        self.cli_config: dict[str, Any] | None = None
        self._given = probes
        self._how: dict[str, Any] = {
            "window": None if window is None else as_shape(window, "window"),
            "overlap": overlap,
            "outputs": outputs,
            "threshold": threshold,
            "logits": logits,
            "looks_per_pass": looks_per_pass,
        }
        self.predictor(torch.nn.Identity())  # a bad number ends the run where it was given
        Timeline(RunFolder(Path()), keep)
        self._forget_run()

    def _forget_run(self) -> None:
        self.probes: tuple[Probe, ...] = ()
        self._failures = Failures(self.on_error)
        self._chronicle: Chronicle | None = None
        self._own_predictor: Predictor | None = None
        self._pending: Observation | None = None
        self._resumed: dict[str, Any] = {}
        self._validations = 0
        self._rehearsed = False
        self._scalars: dict[str, float] = {}

    @property
    def run(self) -> Run | None:
        """The run that is being written; None before it began."""
        return None if self._chronicle is None else self._chronicle.run

    @property
    def questions(self) -> Questions:
        """What is asked, without what failed and is disabled."""
        if self.on_error != "disable":
            return self._asked
        return self._asked.without(self._failures.methods, self._failures.metrics)

    def predictor(self, module: torch.nn.Module) -> Predictor:
        """How this monitor runs a network."""
        return Predictor(module, **self._how)

    @property
    def state_key(self) -> str:
        """One for each name, so that two monitors can be in one checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Names and counts only: anything else would make the user's checkpoint unloadable."""
        if self._chronicle is None:
            return dict(self._resumed)
        return {**self._chronicle.state_dict(), "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._resumed = dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything is computed."""
        if stage != "fit":
            return
        self._forget_run()
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"`AttributionMonitor` needs a single process, but this run has "
                f"{trainer.world_size}. Use `Trainer(devices=1)`."
            )
        if self._given is not None:
            self._find_probes(trainer)  # a file that cannot be read ends the run here
        averaging = averaging_before(trainer, self)
        if averaging is not None:
            warnings.warn(
                f"`AttributionMonitor` stands after `{averaging}` and sees the raw weights, while "
                "the validation sees averaged ones. List the monitor first.",
                stacklevel=2,
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the run, and record the untrained network."""
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "`AttributionMonitor` works at validations, but this run has none. Give the "
                "Trainer validation data and the module a `validation_step`."
            )
        self._find_probes(trainer)
        if not self.probes:
            return  # the first validation batch will bring them
        if not self._rehearsed:
            self._rehearse(trainer, pl_module)
        if trainer.fast_dev_run:
            return
        story = self._open(trainer, pl_module)
        self._tell_cost(trainer)
        if trainer.global_step == 0 and story.last_step < 0:
            self._observe(trainer, pl_module, story, logging_step=0)
            self._write(story)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take probes from the first batch, where nobody else gives any."""
        if trainer.state.fn == "fit" and batch_idx == 0 and dataloader_idx == 0:
            self._find_probes(trainer)
            if not self.probes:
                self.probes = tuple(batch_probes(batch, BATCH_PROBES))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the network; in the sanity check as a rehearsal."""
        if trainer.state.fn != "fit":
            return
        self._find_probes(trainer)
        if self.probes and (trainer.sanity_checking or trainer.fast_dev_run):
            self._rehearse(trainer, pl_module)
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        if not self.probes:
            raise MisconfigurationException(
                "`AttributionMonitor` has no probes: none were given, the data module has no "
                "`probes()`, and no validation batch was seen."
            )
        story = self._chronicle or self._open(trainer, pl_module)
        self._validations += 1
        due = self._validations % self.every_n_validations == 0
        # With accumulated gradients a step can be validated twice; the weights are the same.
        if due and trainer.global_step > story.last_step:
            self._observe(trainer, pl_module, story, logging_step=logging_step(trainer))
        for key, value in self._scalars.items():
            pl_module.log(key, value, logger=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write down what was seen, with the validation's own metrics, which are there by now."""
        story = self._chronicle
        if trainer.state.fn != "fit" or trainer.sanity_checking or story is None:
            return
        self._write(story)
        ours = tuple(f"{c.name}/" for c in trainer.callbacks if isinstance(c, AttributionMonitor))
        logged = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if not key.startswith(ours) and torch.as_tensor(value).numel() == 1
        }
        story.write_metrics(trainer.current_epoch, trainer.global_step, logged)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the sinks."""
        if self._chronicle is not None:
            self._chronicle.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the sinks; what was recorded stays."""
        if trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)

    def _find_probes(self, trainer: Any) -> None:
        """Given ones, else those of the resumed run, else the data module's."""
        if self.probes:
            return
        if self._given is not None:
            preprocessing = getattr(trainer.datamodule, "preprocessing", None)
            self.probes = tuple(
                probe.read(preprocessing) if isinstance(probe, ProbeFile) else probe
                for probe in self._given
            )
        elif self._resumed and Path(self._resumed["folder"]).is_dir():
            folder = RunFolder(Path(self._resumed["folder"]))
            self.probes = tuple(folder.load_probe(name) for name in self._resumed["probes"])
        elif hasattr(trainer.datamodule, "probes"):
            self.probes = tuple(self._of_datamodule(trainer))
        names = [probe.name for probe in self.probes]
        if len(set(names)) < len(names):
            raise ValueError(f"`AttributionMonitor` needs probes of different names, got {names}.")

    def _of_datamodule(self, trainer: Any) -> list[Probe]:
        """The data module's probes; one that looks for what a network missed gets the network."""
        data = trainer.datamodule
        if "segment" not in inspect.signature(data.probes).parameters:
            return list(data.probes())
        predictor = self._predictor_in(trainer, trainer.lightning_module)
        window = getattr(data, "patch_size", None)
        return list(data.probes(segment=partial(segment, predictor, trainer, window)))

    def _predictor_in(self, trainer: Any, pl_module: Any) -> Predictor:
        if self._own_predictor is None or self._own_predictor.module is not pl_module:
            self._own_predictor = replace(
                self.predictor(pl_module),
                forward_context=trainer.precision_plugin.forward_context,
            )
        return self._own_predictor

    def _rehearse(self, trainer: Any, pl_module: Any) -> None:
        """Explain one probe and forget it. What is wrong with the configuration ends the run."""
        self._rehearsed = True
        mistakes = Mistakes(self._failures.cell)
        observe(
            self._predictor_in(trainer, pl_module),
            self.probes[:1],
            self.questions,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            logging_step=0,
            run="",
            timeline=None,
            seed=self.seed,
            failed=None if self.on_error == "raise" else mistakes,
        )
        mistakes.let_out()

    def _open(self, trainer: Any, pl_module: Any) -> Chronicle:
        run_id, root = run_place(trainer, self.name)
        lost = self._resumed.get("folder", "")
        if lost and not Path(lost).is_dir():
            warnings.warn(
                f"`AttributionMonitor`: the resumed run's folder {lost} is not there any more. Its "
                f"story begins anew in {root}.",
                stacklevel=2,
            )
        resumed = self._resumed if Path(self._resumed.get("folder", "")).is_dir() else {}
        if resumed:
            run_id, root = resumed["run"], Path(resumed["folder"])
        asked = {
            kind: {name: repr(value) for name, value in getattr(self.questions, kind).items()}
            for kind in _KINDS
        }
        asked["alerts"] = {name: repr(alert) for name, alert in self.alerts.items()}
        how = {key: getattr(value, "__qualname__", value) for key, value in self._how.items()}
        cadences = ("every_n_validations", "faithfulness_every_n_validations")
        mine = {**asked, **how, **{c: getattr(self, c) for c in cadences}, "seed": self.seed}
        run = Run(
            id=run_id,
            monitor=self.name,
            folder=RunFolder(root if resumed else unused(root)),
            probes=self.probes,
            settings=settings(trainer, pl_module, mine, self.cli_config),
            loggers=tuple(trainer.loggers),
        )
        self._chronicle = Chronicle.begin(run, self.sinks, self.keep, self._failures, self.alerts)
        splits = getattr(trainer.datamodule, "splits", None)
        if isinstance(splits, list) and all(
            isinstance(row, Mapping) and {"name", "split"} <= row.keys() for row in splits
        ):
            self._chronicle.write_splits(splits)
        if resumed:
            self._chronicle.go_on(resumed, trainer.global_step)
            # The checkpoint may have been saved before the validation of its step.
            validated = len(self._chronicle.run.folder.metric_moments())
            self._validations = max(resumed["validations"], validated)
        return self._chronicle

    def _tell_cost(self, trainer: Any) -> None:
        """Say what the monitor costs, as a count of passes and as a share of an epoch."""
        predictor = self._predictor_in(trainer, trainer.lightning_module)
        asked = self.questions
        total = cost(predictor, self.probes, asked.targets, asked.methods)
        held = cost_of_assessing(
            predictor, self.probes, asked.targets, asked.methods, asked.faithfulness
        )
        windows = [predictor.windows(probe.shape) for probe in self.probes]
        voxels = max(math.prod(s.stop - s.start for s in w.places[0]) for w in windows)
        seldom = max(self.every_n_validations, self.faithfulness_every_n_validations)
        mean = total.passes + held.passes * self.every_n_validations / seldom
        share = share_of_epoch(trainer, mean, voxels, self.every_n_validations)
        text = f"{self.name}: each observation of {len(self.probes)} probes takes {total}"
        if held.passes:
            text += f", and {held} more to assess faithfulness every {seldom} validations"
        if share is None:
            trainer.print(f"{text}.")
            return
        trainer.print(f"{text}; in an epoch, {share:.1%} of the passes of the training.")
        if share > 0.05:
            warnings.warn(
                f"`AttributionMonitor` costs {share:.0%} of the training's passes. Raise "
                "`every_n_validations`, or ask for fewer probes, methods or steps.",
                stacklevel=2,
            )

    def _observe(self, trainer: Any, pl_module: Any, story: Chronicle, logging_step: int) -> None:
        asked = self.questions
        if not self._assesses():
            asked = replace(asked, faithfulness={})

        def look() -> None:
            self._pending = observe(
                self._predictor_in(trainer, pl_module),
                self.probes,
                asked,
                epoch=trainer.current_epoch,
                step=trainer.global_step,
                logging_step=logging_step,
                run=story.run.id,
                timeline=story.timeline,
                seed=self.seed,
                failed=None if self.on_error == "raise" else self._failures.cell,
                stop=lambda: bool(trainer.received_sigterm),
            )

        self._failures.attempt("the observation", look)
        if self._pending is not None:
            self._pending = story.watched(self._pending)
            self._scalars |= means(self.name, self._pending.records)

    def _assesses(self) -> bool:
        """Whether faithfulness is due since the last observation; of the untrained network, too."""
        n = self.faithfulness_every_n_validations
        before = self._validations - self.every_n_validations
        return self._validations == 0 or self._validations // n > before // n

    def _write(self, story: Chronicle) -> None:
        if self._pending is not None:
            story.write(self._pending)
            self._pending = None
