"""A configured network without a training: its layers, and its explanation of one file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from lightning_segxai.callback import AttributionMonitor
from lightning_segxai.checkpoints import load_weights
from lightning_segxai.cost import cost
from lightning_segxai.data.file_grid import to_file_grid
from lightning_segxai.data.probes import read_probe
from lightning_segxai.explain import resolved_layers
from lightning_segxai.failures import Mistakes
from lightning_segxai.focus.overlap import dice
from lightning_segxai.folder import RunFolder
from lightning_segxai.guard import undisturbed
from lightning_segxai.observe import observe
from lightning_segxai.scored import Predictor
from lightning_segxai.taps import resolve_layer
from lightning_segxai.values import as_shape


def show_layers(
    module: nn.Module,
    data: Any,
    monitor: AttributionMonitor,
    shape: Sequence[int] | None,
    channels: int,
) -> None:
    """Print the layers that can be explained, in execution order, with their output shapes.

    Args:
        module: The network.
        data: The data module, whose patch size is taken where ``shape`` is None.
        monitor: How to run the network.
        shape: Voxels of the volume.
        channels: Channels of the volume.

    Raises:
        ValueError: if the network does not run on such a volume.
    """
    size = as_shape(list(shape) if shape else getattr(data, "patch_size", 64), "shape")
    predictor = monitor.predictor(module)
    with undisturbed(module, seed=0):
        volume = torch.randn(channels, *size, device=predictor.device)
        rehearsal = predictor.rehearse(volume)
        auto = resolve_layer(predictor, rehearsal, "auto")
    table = Table(title=f"{type(module).__name__} for a volume of {channels} x {size}")
    for column in ("layer", "module", "channels", "voxels"):
        table.add_column(column, justify="right" if column in ("channels", "voxels") else "left")
    for name, output in rehearsal.layers.items():
        if len(output) == 5:
            kind = type(module.get_submodule(name)).__name__
            mark = "  <- auto" if name == auto else ""
            voxels = " x ".join(str(n) for n in output[2:])
            table.add_row(name + mark, kind, str(output[1]), voxels)
    Console().print(table)


def explain_file(
    module: nn.Module,
    data: Any,
    monitor: AttributionMonitor,
    trainer: Any,
    *,
    ckpt: str,
    image: str,
    label: str | None,
    out: str,
) -> None:
    """Explain a trained network on a volume from disk, whole, by windows of the training patch.

    Writes ``maps/<target>/<method>.nii.gz`` and ``prediction.nii.gz`` in the file's own grid and
    affine, ``panel.png`` and ``records.csv``. Nothing is written before all is computed.

    Args:
        module: The network, as configured.
        data: The data module, for its preprocessing and patch size.
        monitor: What to explain and how.
        trainer: On which device, and in which precision.
        ckpt: Checkpoint of the training.
        image: The volume.
        label: Its label, where the truth is known.
        out: Folder to write to.

    Raises:
        ValueError: for a checkpoint or volume that cannot be read, or does not fit.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`segxai explain --out {out}` needs a new or empty folder.")
    moment = load_weights(module, Path(ckpt))
    module.to(trainer.strategy.root_device)
    probe = read_probe(image, label=label, preprocessing=getattr(data, "preprocessing", None))
    predictor = replace(
        monitor.predictor(module), forward_context=trainer.precision_plugin.forward_context
    )
    if predictor.window is None and hasattr(data, "patch_size"):
        predictor = replace(predictor, window=as_shape(data.patch_size, "patch_size"))
    questions = monitor.questions
    with undisturbed(module, monitor.seed):  # a wrong name is told before the work, not after it
        for method in questions.methods.values():
            resolved_layers(predictor, probe.image.to(predictor.device), method)
    total = cost(predictor, [probe], questions.targets, questions.methods)
    mistakes = Mistakes(_told)
    with _progress(predictor, total.passes, f"explaining {probe.name}"):
        seen = observe(
            predictor,
            [probe],
            questions,
            epoch=moment[0],
            step=moment[1],
            logging_step=0,
            run=Path(ckpt).stem,
            timeline=None,
            seed=monitor.seed,
            failed=mistakes,
        )
    mistakes.let_out()
    if probe.name not in seen.predictions:
        raise ValueError(f"{image} could not be segmented: {seen.attributions[0].reason}")
    folder = RunFolder(target)
    for a in seen.attributions:
        if a.status == "ok":
            values, affine = to_file_grid(a.values, probe, Path(image))
            path = folder.root / "maps" / a.target / f"{a.method}.nii.gz"
            folder.write_nifti(path, torch.from_numpy(values.copy()), affine)
        else:
            print(f"{a.target}/{a.method}: {a.status}: {a.reason}", file=sys.stderr)
    prediction, affine = to_file_grid(seen.predictions[probe.name].float(), probe, Path(image))
    whole = torch.from_numpy(prediction.copy()).round().to(torch.uint8)
    folder.write_nifti(folder.root / "prediction.nii.gz", whole, affine)
    folder.append_records(seen.records)
    for panel in seen.panels.values():
        panel.save(folder.root / "panel.png")
    if probe.label is not None:
        print(f"Dice {dice(seen.predictions[probe.name], probe.label):.3f}")
    print(f"written to {folder.root}")


def _told(probe: str, target: str, method: str, error: Exception) -> None:
    print(f"{probe}: {target}/{method}: {type(error).__name__}: {error}", file=sys.stderr)


@contextmanager
def _progress(predictor: Predictor, total: int, what: str) -> Iterator[None]:
    """A bar of the passes made so far, in a terminal."""
    done = threading.Event()
    with Progress(disable=not sys.stderr.isatty(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def watch() -> None:
            while not done.wait(0.2):
                passes = predictor.passes
                bar.update(task, completed=passes.forward + passes.backward)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
