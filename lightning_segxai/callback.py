"""The Lightning callback: when to look, where to write, and never to disturb the training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_segxai.data.probes import ProbeFile, batch_probes
from lightning_segxai.defaults import (
    default_methods,
    default_metrics,
    default_shifts,
    default_targets,
)
from lightning_segxai.examine import cost
from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.folder import RunFolder
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.observe import Questions, mean_dice, observe
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

BATCH_PROBES = 4
"""How many probes are taken from the first validation batch, where there are no others."""


class AttributionMonitor(*_BASES):  # type: ignore[misc]
    """Shows where a segmentation network looks, at every validation of its training.

    It explains the network on fixed probe volumes, measures where the attribution lies and how it
    moved, and writes maps, pictures and numbers to the run's folder and to Weights & Biases.
    Training with it is bit-identical to training without it. Scalars are also logged to the
    trainer as ``<name>/metric/<metric>/<target>/<method>`` (mean over the probes), so that
    `ModelCheckpoint` and `EarlyStopping` can monitor them.

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
        sinks: Where observations are written besides the run's folder. None: Weights & Biases.
        every_n_validations: Validations from one observation to the next.
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
        sinks: list[Sink] | None = None,
        every_n_validations: int = 1,
        window: int | tuple[int, int, int] | None = None,
        overlap: float = 0.5,
        outputs: Outputs | None = None,
        threshold: float = 0.5,
        logits: Callable[[Any], Tensor] | None = None,
        looks_per_pass: int | Literal["auto"] = "auto",
        keep: Literal["all", "last"] | int = "all",
        on_error: Literal["warn", "disable", "raise"] = "warn",
        seed: int = 0,
        name: str = "segxai",
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(
                f"`AttributionMonitor(every_n_validations={every_n_validations})` must be at "
                "least 1."
            )
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
        )
        for key in (*self._asked.targets, *self._asked.methods):
            checked_name(key, "target or method")
        self.sinks: list[Sink] = [FileSink(), *([WandbSink()] if sinks is None else sinks)]
        self.every_n_validations = every_n_validations
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
        self.questions = self._asked  # all of them: methods that failed have another chance
        self.probes: tuple[Probe, ...] = ()
        self.run: Run | None = None
        self.timeline: Timeline | None = None
        self._own_predictor: Predictor | None = None
        self._pending: Observation | None = None
        self._resumed: dict[str, Any] = {}
        self._validations = 0
        self._last_step = -1
        self._rehearsed = False
        self._scalars: dict[str, float] = {}
        self._told: set[str] = set()

    def predictor(self, module: torch.nn.Module) -> Predictor:
        """How this monitor runs a network."""
        return Predictor(module, **self._how)

    @property
    def state_key(self) -> str:
        """One for each name, so that two monitors can be in one checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Names and counts only: anything else would make the user's checkpoint unloadable."""
        if self.run is None or self.timeline is None:
            return dict(self._resumed)
        return {
            "folder": str(self.run.folder.root),
            "run": self.run.id,
            "probes": [probe.name for probe in self.probes],
            "validations": self._validations,
            "last_step": self._last_step,
            "timeline": self.timeline.state_dict(),
        }

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
        self._open(trainer, pl_module)
        self._tell_cost(trainer)
        if trainer.global_step == 0 and self._last_step < 0:
            self._observe(trainer, pl_module, logging_step=0)
            self._write()

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
        self._validations += 1
        if self.run is None:
            self._open(trainer, pl_module)
        # With accumulated gradients a step can be validated twice; the weights are the same.
        due = self._validations % self.every_n_validations == 0
        if due and trainer.global_step > self._last_step:
            self._observe(trainer, pl_module, logging_step=logging_step(trainer))
            records = self._pending.records if self._pending is not None else ()
            self._scalars = means(self.name, records)
        if due:
            for key, value in self._scalars.items():
                pl_module.log(key, value, logger=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write down what was seen, with the validation's own metrics, which are there by now."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.run is None:
            return
        self._write()
        ours = tuple(f"{c.name}/" for c in trainer.callbacks if isinstance(c, AttributionMonitor))
        logged = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if not key.startswith(ours) and torch.as_tensor(value).numel() == 1
        }
        write = self.run.folder.append_metrics
        now = (trainer.current_epoch, trainer.global_step)
        self._attempt("metrics.csv", partial(write, *now, logged))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the sinks."""
        if self.run is not None:
            for sink in self.sinks:
                self._attempt(type(sink).__name__, partial(sink.close, self.run))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the sinks; what was recorded stays."""
        if trainer.state.fn != "fit":
            return
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
            self.probes = tuple(trainer.datamodule.probes())
        names = [probe.name for probe in self.probes]
        if len(set(names)) < len(names):
            raise ValueError(f"`AttributionMonitor` needs probes of different names, got {names}.")

    def _predictor_in(self, trainer: Any, pl_module: Any) -> Predictor:
        if self._own_predictor is None or self._own_predictor.module is not pl_module:
            self._own_predictor = replace(
                self.predictor(pl_module),
                forward_context=trainer.precision_plugin.forward_context,
            )
        return self._own_predictor

    def _rehearse(self, trainer: Any, pl_module: Any) -> None:
        """Explain one probe and forget it. What is wrong with the configuration ends the run."""

        def failed(probe: str, target: str, method: str, error: Exception) -> None:
            if isinstance(error, ValueError | TypeError):
                raise error
            self._failed(probe, target, method, error)

        self._rehearsed = True
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
            failed=failed,
        )

    def _open(self, trainer: Any, pl_module: Any) -> None:
        run_id, root = run_place(trainer, self.name)
        resumed = self._resumed if Path(self._resumed.get("folder", "")).is_dir() else {}
        if resumed:
            run_id, root = resumed["run"], Path(resumed["folder"])
        folder = RunFolder(root if resumed else unused(root))
        self.timeline = Timeline(folder, self.keep)
        if resumed:
            self._validations, self._last_step = resumed["validations"], resumed["last_step"]
            folder.truncate_after(trainer.global_step)
            self.timeline.load_state_dict(resumed["timeline"])
            self._catch_up(folder)
        asked = {
            kind: {name: repr(value) for name, value in getattr(self.questions, kind).items()}
            for kind in ("targets", "methods", "metrics", "shifts")
        }
        how = {key: getattr(value, "__qualname__", value) for key, value in self._how.items()}
        mine = {**asked, **how, "every_n_validations": self.every_n_validations, "seed": self.seed}
        self.run = Run(
            id=run_id,
            monitor=self.name,
            folder=folder,
            probes=self.probes,
            settings=settings(trainer, pl_module, mine, self.cli_config),
            loggers=tuple(trainer.loggers),
        )
        for sink in self.sinks:
            self._attempt(type(sink).__name__, partial(sink.open, self.run))

    def _catch_up(self, folder: RunFolder) -> None:
        """Take in the validation of the checkpoint's own step, where it came after the saving.

        `ModelCheckpoint(every_n_train_steps=...)` saves before the validation of that step, and
        Lightning does not repeat it on resume: its rows and maps stay.
        """
        assert self.timeline is not None
        late = [r for r in folder.read_records() if r.step > self._last_step]
        for epoch, step in dict.fromkeys((r.epoch, r.step) for r in late):
            rows = [r for r in late if (r.epoch, r.step) == (epoch, step)]
            cells = dict.fromkeys((r.probe, r.target, r.method) for r in rows if r.method)
            paths = [folder.map_path(*cell, epoch, step) for cell in cells]
            self.timeline.advance_maps([p for p in paths if p.exists()], mean_dice(rows))
            self._validations += 1
            self._last_step = step

    def _tell_cost(self, trainer: Any) -> None:
        """Say what the monitor costs, as a count of passes and as a share of an epoch."""
        predictor = self._predictor_in(trainer, trainer.lightning_module)
        total = cost(predictor, self.probes, self.questions.targets, self.questions.methods)
        windows = [predictor.windows(probe.shape) for probe in self.probes]
        voxels = max(math.prod(s.stop - s.start for s in w.places[0]) for w in windows)
        share = share_of_epoch(trainer, total.passes, voxels, self.every_n_validations)
        text = (
            f"{self.name}: each observation of {len(self.probes)} probes takes {total.forward} "
            f"forward and {total.backward} backward passes"
        )
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

    def _observe(self, trainer: Any, pl_module: Any, logging_step: int) -> None:
        assert self.run is not None
        look = partial(
            observe,
            self._predictor_in(trainer, pl_module),
            self.probes,
            self.questions,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            logging_step=logging_step,
            run=self.run.id,
            timeline=self.timeline,
            seed=self.seed,
            failed=None if self.on_error == "raise" else self._failed,
            stop=lambda: bool(trainer.received_sigterm),
        )

        def keep() -> None:
            self._pending = look()

        self._attempt("the observation", keep)

    def _write(self) -> None:
        """Hand the observation to the sinks, and the maps to the timeline."""
        if self.run is None or self.timeline is None or self._pending is None:
            return
        seen, self._pending = self._pending, None
        for sink in self.sinks:
            self._attempt(type(sink).__name__, partial(sink.write, self.run, seen))
        self._attempt(
            "timeline", partial(self.timeline.advance, seen.attributions, mean_dice(seen.records))
        )
        self._last_step = seen.step

    def _failed(self, probe: str, target: str, method: str, error: Exception) -> None:
        """Told once for each cell; the record says it every time."""
        self._warn(
            f"{probe}/{target}/{method}",
            f'`AttributionMonitor`: {method} of target "{target}" failed on probe "{probe}": '
            f"{type(error).__name__}: {error}. Training goes on.",
        )
        if self.on_error == "disable":
            _, *metric = method.split("/")  # a metric is told as method/metric
            gone = metric[0] if metric else method
            self.questions = self.questions.without(gone, metric=bool(metric))

    def _attempt(self, who: str, work: Callable[[], Any]) -> None:
        """Do what may fail at the ends (a full disk, a dead server) without ending the training."""
        try:
            work()
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._warn(
                who,
                f"`AttributionMonitor`: {who} failed: {type(error).__name__}: {error}. Training "
                "goes on.",
            )

    def _warn(self, about: str, text: str) -> None:
        if about not in self._told:
            self._told.add(about)
            warnings.warn(text, stacklevel=2)
