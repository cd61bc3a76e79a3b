"""Checkpoints of Lightning: read without running code, loaded, and segmented with."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_segxai.guard import undisturbed
from lightning_segxai.scored import Passes, Predictor
from lightning_segxai.values import Shape, Volume


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of Lightning.

    Raises:
        ValueError: if there is none, or it is none, or it holds more than plain data.
    """
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}.")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        content["state_dict"]
    except Exception as error:  # torch raises half a dozen kinds for a file that is not its own
        raise ValueError(
            f"{path} is not a checkpoint of Lightning that loads with `weights_only=True` "
            f"({type(error).__name__}). Give the file that `segxai fit` saved."
        ) from error
    return content


def load_weights(module: nn.Module, path: Path) -> tuple[int, int]:
    """Load a checkpoint's weights; never anything that could run code.

    Returns:
        Epoch and global step of the checkpoint.

    Raises:
        ValueError: if the file is no checkpoint, or of another network.
    """
    content = read_checkpoint(path)
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise ValueError(
            f"{path} holds weights of another network than the configuration's "
            f"`{type(module).__name__}`.{''.join(first)}"
        ) from error
    return int(content.get("epoch", 0)), int(content.get("global_step", 0))


def segment(
    predictor: Predictor, trainer: object, window: Shape | None, ckpt: str, image: Volume
) -> Int[Tensor, "i j k"]:
    """The class of every voxel, by a network with the weights of a checkpoint.

    The network itself is left alone: a copy of it gets the weights.

    Args:
        predictor: How the network is run.
        trainer: What the copy shall not hold, though the network may.
        window: Voxels of the windows where the predictor has none.
        ckpt: The checkpoint.
        image: The volume, preprocessed.

    Raises:
        ValueError: for a checkpoint that cannot be read or is another network's.
    """
    twin = copy.deepcopy(predictor.module, {id(trainer): None})
    load_weights(twin, Path(ckpt))
    own = replace(
        predictor,
        module=twin,
        window=predictor.window or window,
        passes=Passes(),
        rehearsals={},
    )
    with undisturbed(twin, seed=0):
        return own.decisive(own.predict(image.to(own.device))).argmax(dim=0).cpu()
