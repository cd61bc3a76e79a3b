"""What there is to know of all subjects before a training: one row for each, and their sums.

Nothing is trained and nothing is refused here; reasons are kept, for `inspection` to tell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.gathering import Gathered
from lightning_segxai.data.grids import spacing_of
from lightning_segxai.data.keeping import KeptVolumes
from lightning_segxai.data.loaders import CachedPatches, drawn_place
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.plan import EpochPlan
from lightning_segxai.data.room import Cache
from lightning_segxai.data.sources import Source
from lightning_segxai.data.subject_rows import SubjectRow, flat, saturations, with_file, with_volume
from lightning_segxai.data.volumes import patch
from lightning_segxai.values import Probe

T = TypeVar("T")

_PATCHES = 16  # of each training volume, to learn how much vessel they hold


@dataclass(frozen=True, eq=False)
class Survey:
    """All subjects together.

    Args:
        rows: One for each volume, in the order of the sources.
        errors: What is wrong, in full, whether with one of them or with several.
        warnings: What should be known, in full.
        cache: Where volumes are kept; None where not one can be used.
        spacings: Of each usable volume after preprocessing, in millimeters.
        plan: The epochs; None where there is nothing to train on.
        vessel_shares: Of patches that an epoch draws, in [0, 1].
        volumes: The usable ones that are trained on.
    """

    rows: tuple[SubjectRow, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    cache: Cache | None
    spacings: tuple[tuple[float, float, float], ...]
    plan: EpochPlan | None
    vessel_shares: tuple[float, ...]
    volumes: KeptVolumes


def survey(data: MRADataModule) -> Survey:
    """Read, check, preprocess and keep all subjects as for a training, and look at each.

    Raises:
        ValueError: where the subjects cannot be listed at all.
    """
    sources = data.sources()
    alone: list[str] = []
    try:
        splits = [row["split"] for row in data.splits]
    except ValueError as error:
        splits = [""] * len(sources)
        alone.append(str(error))
    gathered = data.gather(sources, splits)
    reasons = _reasons(sources, gathered)
    rows = []
    for source, split in _told(list(zip(sources, splits, strict=True)), "looking at volumes"):
        row = SubjectRow(source.name, source.subject, split, errors=reasons[source.name])
        if not any("cannot be read" in text for text in row.errors):  # not the half of a file
            row = with_file(row, source)
        if source.name in gathered.keepers:
            row = with_volume(row, gathered.keepers[source.name].read())
        rows.append(row)
    trained = [row.name for row in rows if row.split == "train" and row.name in gathered.keepers]
    volumes = KeptVolumes([gathered.keepers[name] for name in trained])
    plan = None
    if trained:
        # The seed of the run, as a training would take it: its first patches are shown
        seed = torch.initial_seed()
        plan = EpochPlan(len(volumes), data.samples_per_volume, data.batch_size, seed)
    return Survey(
        rows=tuple(rows),
        errors=(*alone, *gathered.errors.values(), *gathered.together),
        warnings=(*gathered.warnings, *saturations(rows, type(data.intensity).__name__)),
        cache=gathered.cache if gathered.keepers else None,
        spacings=tuple(keeper.about.spacing_mm for keeper in gathered.keepers.values()),
        plan=plan,
        vessel_shares=() if plan is None else tuple(_vessel_shares(data, plan, volumes)),
        volumes=volumes,
    )


def first_patches(
    data: MRADataModule, found: Survey, batches: int, most: int
) -> list[tuple[Probe, float]]:
    """Projections of the first training patches as the network gets them, with their vessel share.

    Args:
        data: Where they come from.
        found: Its survey.
        batches: How many batches, at most.
        most: How many patches, at most.
    """
    if found.plan is None:
        return []
    augmentation = Augmentation(data.augmentation)
    patches = CachedPatches(found.plan, found.volumes, data.patch_size, data.sampling, augmentation)
    shown: list[tuple[Probe, float]] = []
    for number in range(min(batches, len(found.plan))):
        drawn = found.plan.batches(0)[number]
        if shown and len(shown) + len(drawn) > most:
            break
        batch = patches[0, number]
        image, label = batch["image"], batch["label"]
        for n, name in enumerate(batch["name"][:most]):
            spacing, mask = spacing_of(image["affine"][n]), label["data"][n, 0]
            shown_flat = flat(name, image["data"][n, 0], mask, spacing)
            shown.append((shown_flat, float((mask > 0).float().mean())))
    return shown


def _reasons(sources: Sequence[Source], gathered: Gathered) -> dict[str, tuple[str, ...]]:
    """Errors by the names of the volumes: of one alone, and then of several."""
    return {
        source.name: tuple([gathered.errors[source.name]] if source.name in gathered.errors else [])
        + tuple(text for text in gathered.together if f'"{source.name}"' in text)
        for source in sources
    }


def _vessel_shares(data: MRADataModule, plan: EpochPlan, volumes: KeptVolumes) -> Iterator[float]:
    draws = [draw for draw in plan.share(0) if draw.number < _PATCHES]
    for draw in _told(draws, "drawing patches"):
        volume = volumes[draw.volume]
        start, _ = drawn_place(plan, 0, draw, volume, data.patch_size, data.sampling)
        label = patch(volume.maps["label"], start, data.patch_size, 0)
        yield float((label > 0).float().mean())


def _told(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar of how many are done, in a terminal."""
    quiet = not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(items, what, console=console, disable=quiet, transient=True)
