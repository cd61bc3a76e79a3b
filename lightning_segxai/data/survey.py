"""What there is to know of all subjects before a training: one row for each, and their sums.

Nothing is trained and nothing is refused here; reasons are kept, for `inspection` to tell.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torchio as tio
from jaxtyping import Float, Shaped
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_segxai.data.augmentation import Augmentation
from lightning_segxai.data.gathering import Gathered, gather
from lightning_segxai.data.grids import spacing_of
from lightning_segxai.data.keeping import KeptVolumes
from lightning_segxai.data.loaders import CachedPatches
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.plan import EpochPlan
from lightning_segxai.data.room import Cache
from lightning_segxai.data.sources import Source
from lightning_segxai.data.volumes import Volume, patch
from lightning_segxai.values import Probe, Shape

T = TypeVar("T")

_SATURATED = 0.01  # share of the vessel voxels that may have the volume's largest value
_PATCHES = 16  # of each training volume, to learn how much vessel they hold


@dataclass(frozen=True, eq=False)
class SubjectRow:
    """One subject's volume as it is on disk, turned to RAS; None is what cannot be known.

    Args:
        name: Its own.
        subject: The person.
        split: ``train``, ``val`` or ``test``; empty where the splits are wrong.
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel in millimeters.
        intensity: Minimum, median, percentile 99.95 and maximum.
        vessel_voxels: Voxels of the label that are not background.
        vessel_share: Their share of the volume, in [0, 1].
        topped: Share of them that have the image's largest value.
        errors: Why it cannot be used.
        warnings: What should be known of it.
        nbytes: Memory that it takes after preprocessing.
        flat: Its projection after preprocessing, where it can be used.
    """

    name: str
    subject: str
    split: str
    shape: Shape | None = None
    spacing_mm: tuple[float, float, float] | None = None
    intensity: tuple[float, float, float, float] | None = None
    vessel_voxels: int | None = None
    vessel_share: float | None = None
    topped: float = 0.0
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    nbytes: int = 0
    flat: Probe | None = None


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
    gathered = gather(
        sources,
        splits,
        data.preprocessing,
        data.sampling,
        patch_size=data.patch_size,
        classes=data.classes,
        cache=data.cache,
        folder=data.cache_dir,
        processes=1,
    )
    reasons = _reasons(sources, gathered)
    rows = []
    for source, split in _told(list(zip(sources, splits, strict=True)), "looking at volumes"):
        row = SubjectRow(source.name, source.subject, split, errors=reasons[source.name])
        row = _with_file(row, source)
        if source.name in gathered.keepers:
            row = _with_volume(row, gathered.keepers[source.name].read(), data)
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
        errors=(*alone, *gathered.errors),
        warnings=(*gathered.warnings, *(text for row in rows for text in row.warnings)),
        cache=gathered.cache if gathered.keepers else None,
        spacings=tuple(keeper.about.spacing_mm for keeper in gathered.keepers.values()),
        plan=plan,
        vessel_shares=() if plan is None else tuple(_vessel_shares(data, plan, volumes)),
        volumes=volumes,
    )


def first_patches(data: MRADataModule, found: Survey, batches: int, most: int) -> list[Probe]:
    """Projections of the first training patches as the network gets them.

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
    shown: list[Probe] = []
    for number in range(min(batches, len(found.plan))):
        drawn = found.plan.batches(0)[number]
        if shown and len(shown) + len(drawn) > most:
            break
        batch = patches[0, number]
        image, label = batch["image"], batch["label"]
        for n, name in enumerate(batch["name"][:most]):
            spacing = spacing_of(image["affine"][n])
            shown.append(_flat(name, image["data"][n, 0], label["data"][n, 0], spacing))
    return shown


def _reasons(sources: Sequence[Source], gathered: Gathered) -> dict[str, tuple[str, ...]]:
    """Errors by the names of the volumes: of one alone, in their order, and then of several."""
    broken = [source.name for source in sources if source.name not in gathered.keepers]
    own = dict(zip(broken, gathered.errors, strict=False))
    shared = gathered.errors[len(broken) :]
    return {
        source.name: tuple([own[source.name]] if source.name in own else [])
        + tuple(text for text in shared if f'"{source.name}"' in text)
        for source in sources
    }


def _with_file(row: SubjectRow, source: Source) -> SubjectRow:
    """What the files hold, as far as they can be read; why not is told by `check_subject`."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            subject = source.read()
            image = tio.ToCanonical()(subject.get_image("image"))
            i, j, k = image.spatial_shape
            row = replace(
                row,
                shape=(i, j, k),
                spacing_mm=tuple(image.spacing),
                intensity=_intensity(image.data),
            )
            label = tio.ToCanonical()(subject.get_image("label")).data
    except Exception:  # whatever the readers of a broken file raise
        return row
    vessels = int((label > 0).sum())
    return replace(
        row,
        vessel_voxels=vessels,
        vessel_share=vessels / label.numel(),
        topped=_topped(image.data, label) if image.data.shape == label.shape else 0.0,
    )


def _intensity(values: Shaped[Tensor, "c i j k"]) -> tuple[float, float, float, float] | None:
    numbers = values.numpy().ravel()
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        return None
    last = len(finite) - 1
    places = [0, last // 2, int(0.9995 * last), last]
    low, median, high, top = np.partition(finite, places)[places].tolist()
    return low, median, high, top


def _topped(image: Shaped[Tensor, "*axes"], label: Shaped[Tensor, "*axes"]) -> float:
    """Share of the vessel voxels with the image's largest value; 0 for a single one."""
    inside = image[label > 0]
    count = int((inside == image.max()).sum())
    return count / len(inside) if count > 1 else 0.0


def _with_volume(row: SubjectRow, volume: Volume, data: MRADataModule) -> SubjectRow:
    label = volume.maps["label"]
    share = _topped(volume.image, label)
    told: tuple[str, ...] = ()
    if share > _SATURATED:
        why = (
            "have the largest value of the file: something has cut them off before"
            if row.topped > _SATURATED
            else f"have the largest value after preprocessing: `{type(data.intensity).__name__}` "
            "flattens them. Scale without clipping, as `ForegroundNormalization` does"
        )
        told = (f'Subject "{row.name}": {100 * share:.2g} % of the vessel voxels {why}.',)
    flat = _flat(volume.name, volume.image, label, volume.spacing_mm)
    return replace(row, nbytes=volume.nbytes, warnings=told, flat=flat)


def _flat(
    name: str,
    image: Float[Tensor, "i j k"],
    label: Shaped[Tensor, "i j k"],
    spacing_mm: tuple[float, float, float],
) -> Probe:
    """The largest values along k, from the feet: the patient's right is where i begins."""
    return Probe(
        name=name,
        image=image.amax(dim=2).flip(0)[None, :, :, None],
        label=(label > 0).any(dim=2).flip(0)[:, :, None].to(torch.uint8),
        spacing_mm=spacing_mm,
        affine=np.diag([-spacing_mm[0], *spacing_mm[1:], 1.0]),
    )


def _vessel_shares(data: MRADataModule, plan: EpochPlan, volumes: KeptVolumes) -> Iterator[float]:
    draws = [draw for draw in plan.share(0) if draw.number < _PATCHES]
    for draw in _told(draws, "drawing patches"):
        volume = volumes[draw.volume]
        nth, generator = plan.running_number(0, draw), plan.generator(0, draw)
        start = data.sampling.start(volume, data.patch_size, nth, generator)
        label = patch(volume.maps["label"], start, data.patch_size, 0)
        yield float((label > 0).float().mean())


def _told(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar of how many are done, in a terminal."""
    quiet = not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(items, what, console=console, disable=quiet, transient=True)
