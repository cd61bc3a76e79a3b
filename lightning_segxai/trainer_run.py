"""What a Trainer says of its run: id, folder, settings, steps. Reads it, and changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_LIGHTNING = {
    "training",
    "prepare_data_per_node",
    "allow_zero_length_dataloader_with_multiple_devices",
}
_SECRET = re.compile(r"(^|[_\-.]|api)(key|token|secret|password|credential)s?$", re.IGNORECASE)


def run_place(trainer: Any, monitor: str) -> tuple[str, Path]:
    """The run's id and the monitor's folder, as `ModelCheckpoint` resolves its own.

    ``<save_dir>/<logger's name>/<run id or version>/<monitor>``; without a logger
    ``<default_root_dir>/<monitor>/<time>``.
    """
    if trainer.loggers:
        logger = trainer.loggers[0]
        root = logger.save_dir or trainer.default_root_dir
        version = logger.version
        version = version if isinstance(version, str) else f"version_{version}"
        return version, Path(root).absolute() / str(logger.name) / version / monitor
    # Not random: the generators are the training's.
    made = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    return made, Path(trainer.default_root_dir).absolute() / monitor / made


def unused(folder: Path) -> Path:
    """The folder, or the first of ``<folder>-v1``, ``-v2``, ... that holds no run yet."""
    version, free = 0, folder
    while (free / "records.csv").exists():
        version += 1
        free = folder.with_name(f"{folder.name}-v{version}")
    return free


def logging_step(trainer: Any) -> int:
    """The step under which Lightning logs the metrics of the validation that is going on.

    It is private in Lightning 2.6 (`LearningRateMonitor` reads it, too), so the public step stands
    in where it is not there.
    """
    loop = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def settings(trainer: Any, module: Any, monitor: dict[str, Any], cli: Any) -> dict[str, Any]:
    """What made this run, for ``run.json`` and the logger's config; without secrets."""
    data = getattr(trainer, "datamodule", None)
    return {
        "monitor": monitor,
        "model": _described(module),
        "data": None if data is None else _described(data),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "cli": without_secrets(cli),
    }


def _described(part: Any) -> dict[str, Any]:
    """The class, its hyper-parameters and plain attributes, and the classes of its modules."""
    children = part.named_children() if hasattr(part, "named_children") else ()
    plain = {
        key: value
        for key, value in vars(part).items()
        if not key.startswith("_") and isinstance(value, bool | int | float | str | tuple)
    }
    own = {key: value for key, value in plain.items() if key not in _LIGHTNING}
    return without_secrets(
        {
            "class": f"{type(part).__module__}.{type(part).__qualname__}",
            **own,
            **dict(getattr(part, "hparams", {})),
            **{name: type(child).__qualname__ for name, child in children},
        }
    )


def without_secrets(content: Any) -> Any:
    """The same, with every value under a key that sounds like a secret left out."""
    if isinstance(content, Mapping):
        return {
            str(key): without_secrets(value)
            for key, value in content.items()
            if not _SECRET.search(str(key))
        }
    if isinstance(content, list | tuple):
        return [without_secrets(value) for value in content]
    return content


def share_of_epoch(trainer: Any, passes: float, voxels: int, every_n: int) -> float | None:
    """What the observations of an epoch cost, as a share of the passes of its training.

    Passes are weighed by their voxels; a training step counts as two passes for each patch.

    Args:
        trainer: The trainer, while it trains.
        passes: Windows that an observation sends through the network, forward and backward; a mean
            where they differ.
        voxels: Voxels of a window.
        every_n: Validations from one observation to the next.

    Returns:
        The share, or None where the size of an epoch is not known.
    """
    loader = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    patch = getattr(trainer.datamodule, "patch_size", None) if trainer.datamodule else None
    batches = trainer.num_training_batches
    # a loader of whole batches leaves their size to the data module
    size = int(
        getattr(loader, "batch_size", None) or getattr(trainer.datamodule, "batch_size", None) or 1
    )
    interval = trainer.val_check_batch  # None where it is a time
    if dataset is None or not isinstance(batches, int) or batches < 1 or not interval:
        return None
    patch_voxels = patch[0] * patch[1] * patch[2] if isinstance(patch, tuple) else voxels
    observations = batches / interval / (trainer.check_val_every_n_epoch or 1) / every_n
    return observations * passes * voxels / (2 * batches * size * patch_voxels)


def averaging_before(trainer: Any, monitor: Any) -> str | None:
    """Name of a weight-averaging callback that stands before the monitor."""
    for callback in trainer.callbacks:
        if callback is monitor:
            return None
        if any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__):
            return type(callback).__name__
    return None
