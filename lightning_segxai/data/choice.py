"""Which volumes to explain: the probes that a configuration file asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_segxai.data.places import (
    Center,
    bifurcation_centers,
    missed_centers,
    thinnest_centers,
    vessel_centers,
)
from lightning_segxai.data.probes import volume_probe
from lightning_segxai.data.volumes import Volume
from lightning_segxai.values import Probe, Shape


@dataclass(frozen=True)
class Landmark:
    """A place in a subject's volume.

    Args:
        subject: Name of the volume.
        mm: World coordinates in millimeters, to the right, anterior, superior.
    """

    subject: str
    mm: tuple[float, float, float]


@dataclass(frozen=True)
class ProbeChoice:
    """Which volumes to explain.

    Args:
        n: How many, at most; landmarks are all taken.
        kind: Patches of the training size of the validation volumes: those that hold the most
            vessel (``vessels``), around the ``thinnest`` vessels, around ``bifurcations`` of the
            thickest, around the largest pieces of vessel that a checkpoint missed
            (``largest_missed``), or around ``landmarks`` of any volume; or validation volumes
            ``whole``.
        landmarks: Places by the names that the probes get.
        ckpt: Checkpoint of the network whose misses are looked for.

    Raises:
        ValueError: for a negative number, and where ``landmarks`` or ``ckpt`` is missing for its
            kind or given for another.
    """

    n: int = 4
    kind: Literal["vessels", "whole", "landmarks", "thinnest", "bifurcations", "largest_missed"] = (
        "vessels"
    )
    landmarks: dict[str, Landmark] | None = None
    ckpt: str | None = None

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"`ProbeChoice(n={self.n})` must be at least 0.")
        for key, kind in (("landmarks", "landmarks"), ("ckpt", "largest_missed")):
            if (getattr(self, key) is not None) != (self.kind == kind):
                raise ValueError(
                    f'`ProbeChoice` needs `{key}` for kind="{kind}" and for no other, but got '
                    f'kind="{self.kind}", {key}={getattr(self, key)!r}.'
                )


Segment = Callable[[str, Float[Tensor, "c i j k"]], Int[Tensor, "i j k"]]
"""Path of a checkpoint and a volume to the class of every voxel."""


def chosen_probes(
    choice: ProbeChoice,
    volumes: Sequence[Volume],
    others: Iterable[Volume],
    size: Shape,
    segment: Segment | None = None,
) -> list[Probe]:
    """The probes of a choice; no random number is drawn.

    Args:
        choice: Which.
        volumes: The validation volumes.
        others: Further volumes in which a landmark may lie.
        size: Voxels of a patch.
        segment: For what a network has missed.

    Raises:
        ValueError: for a landmark in no volume, and where ``segment`` is needed and missing.
    """
    if choice.kind == "landmarks":
        return _at_landmarks(choice, chain(volumes, others), size)
    if choice.kind == "whole":
        return [volume_probe(volume, volume.name) for volume in volumes[: choice.n]]
    if choice.kind == "largest_missed":
        places = _missed(choice, volumes, segment)
    else:
        places = _in_turn(choice, volumes, size)
    if len(places) < choice.n:
        warnings.warn(
            f"`MRADataModule(probes={choice.n})` found only {len(places)} distinct places of kind "
            f'"{choice.kind}" for patches of {size} voxels in {len(volumes)} validation volumes.',
            stacklevel=3,
        )
    return [volume_probe(volumes[at], name, center, size) for at, name, center in places]


def _in_turn(
    choice: ProbeChoice, volumes: Sequence[Volume], size: Shape
) -> list[tuple[int, str, Center]]:
    """Places of each volume in turn, the best of each first."""
    word = "" if choice.kind == "vessels" else f"{choice.kind}-"
    rows = []
    for at, volume in enumerate(volumes):
        label = volume.maps.get("label", torch.zeros(volume.shape))
        if choice.kind == "vessels":
            centers = vessel_centers(label, size, choice.n)
        else:
            find = thinnest_centers if choice.kind == "thinnest" else bifurcation_centers
            centers = find(label, volume.spacing_mm, size, choice.n)
        rows.append(
            [(at, f"{volume.name}-{word}{n}", center) for n, center in enumerate(centers, start=1)]
        )
    return [row[n] for n in range(choice.n) for row in rows if n < len(row)][: choice.n]


def _missed(
    choice: ProbeChoice, volumes: Sequence[Volume], segment: Segment | None
) -> list[tuple[int, str, Center]]:
    """The largest missed pieces of all volumes together."""
    if segment is None:
        raise ValueError(
            '`ProbeChoice(kind="largest_missed")` needs the network: use it under an '
            "`AttributionMonitor`, or call `probes(segment=...)`."
        )
    pieces: list[tuple[int, int, str, Center]] = []
    for at, volume in enumerate(volumes):
        if "label" in volume.maps:
            predicted = segment(str(choice.ckpt), volume.image[None])
            found = missed_centers(volume.maps["label"], predicted, choice.n)
            pieces += [
                (-voxels, at, f"{volume.name}-missed-{n}", center)
                for n, (voxels, center) in enumerate(found, start=1)
            ]
    return [(at, name, center) for _, at, name, center in sorted(pieces)[: choice.n]]


def _at_landmarks(choice: ProbeChoice, volumes: Iterable[Volume], size: Shape) -> list[Probe]:
    landmarks = choice.landmarks or {}
    wanted = {landmark.subject for landmark in landmarks.values()}
    names, by_name = [], {}
    for volume in volumes:  # one by one: they may not fit into memory together
        names.append(volume.name)
        if volume.name in wanted:
            by_name[volume.name] = volume
    probes = []
    for name, landmark in landmarks.items():
        if landmark.subject not in by_name:
            raise ValueError(
                f'Landmark "{name}" lies in subject "{landmark.subject}", but there are only '
                f"{', '.join(names)}."
            )
        volume = by_name[landmark.subject]
        i, j, k = np.round(np.linalg.inv(volume.affine) @ [*landmark.mm, 1.0])[:3].astype(int)
        if not all(0 <= c < n for c, n in zip((i, j, k), volume.shape, strict=True)):
            raise ValueError(
                f'Landmark "{name}" at {landmark.mm} mm lies outside of subject '
                f'"{landmark.subject}" (voxel {i}, {j}, {k} of {volume.shape}).'
            )
        probes.append(volume_probe(volume, name, (int(i), int(j), int(k)), size))
    return probes
