"""Probes from a validation batch of anybody's data module."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_segxai.data.grids import spacing_of
from lightning_segxai.values import Probe


def batch_probes(batch: object, n: int) -> list[Probe]:
    """Probes from the first volumes of a validation batch.

    Understood are TorchIO's batches (a dictionary for each image), MONAI's (``image`` and
    ``label`` as tensors or MetaTensors, whose affine is kept), and pairs (image, label) or an
    image alone. Images are ``b c i j k``, labels ``b 1 i j k`` or ``b i j k``.

    Args:
        batch: What the dataloader gave.
        n: How many probes at most.

    Raises:
        ValueError: for anything else, saying what was found.
    """
    image, label, affines = _parts(batch)
    if image is None or image.ndim != 5 or (label is not None and _classes(label) is None):
        raise ValueError(
            "Probes need a validation batch with an image (b c i j k) and a label (b 1 i j k or "
            "b i j k): TorchIO's, a dictionary of `image` and `label`, or a pair of tensors. "
            f"Found {_seen(batch)}. Give `probes` to the monitor instead."
        )
    classes = None if label is None else _classes(label)
    names = _names(batch, len(image))
    return [
        Probe(
            name=names[at],
            image=image[at].detach().cpu().float().clone(),
            label=None if classes is None else classes[at].detach().cpu().long().clone(),
            spacing_mm=(1.0, 1.0, 1.0) if affines is None else spacing_of(affines[at]),
            affine=None if affines is None else affines[at],
            preprocessing="validation batch",
        )
        for at in range(min(n, len(image)))
    ]


def _parts(batch: object) -> tuple[Tensor | None, Tensor | None, np.ndarray | None]:
    """Image, label and affines (b 4 4) of a batch, each None where there is none."""
    image: object = batch
    label: object = None
    affine: object = None
    if isinstance(batch, Mapping):
        images = {k: v for k, v in batch.items() if isinstance(v, Mapping) and "data" in v}
        if images:
            kinds = {k: (v.get("type") or [""])[0] for k, v in images.items()}
            image = images.get("image") or _first(images, kinds, "intensity")
            label = images.get("label") or _first(images, kinds, "label")
        else:
            image, label = batch.get("image"), batch.get("label")
    elif isinstance(batch, list | tuple):
        image, label = (*batch, None)[:2] if len(batch) in (1, 2) else (None, None)
    if isinstance(image, Mapping):
        affine = image.get("affine")
        image = image["data"]
        label = label["data"] if isinstance(label, Mapping) else None
    else:
        affine = getattr(image, "affine", None)
    found = _plain(image)
    if found is None or affine is None:
        return found, _plain(label), None
    affines = np.asarray(torch.as_tensor(affine).cpu(), dtype=np.float64)
    return found, _plain(label), np.broadcast_to(affines, (len(found), 4, 4))


def _first(images: Mapping[str, object], kinds: Mapping[str, str], kind: str) -> object:
    return next((images[k] for k in images if kinds[k] == kind), None)


def _plain(value: object) -> Tensor | None:
    """The tensor itself, without MONAI's subclass around it."""
    if not isinstance(value, Tensor):
        return None
    return value.as_tensor() if hasattr(value, "as_tensor") else value


def _classes(label: Tensor) -> Tensor | None:
    """The label as ``b i j k``; None where it has several channels or another number of axes."""
    if label.ndim == 5 and label.shape[1] == 1:
        return label[:, 0]
    return label if label.ndim == 4 else None


def _names(batch: object, count: int) -> list[str]:
    given = batch.get("name") if isinstance(batch, Mapping) else None
    if not isinstance(given, list | tuple) or len(given) != count:
        given = ["batch"] * count
    stems = [re.sub(r"[^A-Za-z0-9._-]", "_", str(name)).lstrip(".")[:90] for name in given]
    return [f"{stem}-{stems[: at + 1].count(stem)}" for at, stem in enumerate(stems)]


def _seen(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {_seen(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, list | tuple):
        shown = [_seen(v) for v in batch[:6]] + ["..."] * (len(batch) > 6)
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(shown)})"
    return type(batch).__name__
