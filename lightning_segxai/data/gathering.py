"""All subjects read, checked and kept before a training, with one report of what is wrong."""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torchio as tio
from rich.console import Console
from rich.progress import track

from lightning_segxai.data.cache import DamagedEntryError, VolumeCache
from lightning_segxai.data.keeping import Held, Keeper, Mapped, Passing
from lightning_segxai.data.preparation import Preparation
from lightning_segxai.data.room import Cache, chosen_cache, give_back
from lightning_segxai.data.sampling import Sampling
from lightning_segxai.data.sources import Source
from lightning_segxai.data.volumes import Volume
from lightning_segxai.values import Shape


@dataclass
class Gathered:
    """The volumes of a training, and what is wrong with them.

    Args:
        cache: Where they are kept; None before the first was read.
        keepers: Of the usable ones, by name, in the order of the sources.
        errors: Why others cannot be used.
        warnings: What should be known of the usable ones.
    """

    cache: Cache | None
    keepers: dict[str, Keeper] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def tell(self, count: int) -> None:
        """Warn of what should be known, or refuse.

        Args:
            count: How many subjects there were.

        Raises:
            ValueError: with one line for each subject that cannot be used, the warnings behind.
        """
        if self.errors:
            lines = "\n  ".join([*self.errors, *self.warnings])
            broken = count - len(self.keepers)
            what = f"{broken} of {count} subjects" if broken else f"these {count} subjects"
            raise ValueError(f"`MRADataModule` cannot use {what}:\n  {lines}")
        for text in self.warnings:
            warnings.warn(text, stacklevel=3)


def gather(
    sources: Sequence[Source],
    splits: Sequence[str],
    transform: tio.Transform,
    sampling: Sampling,
    *,
    patch_size: Shape,
    classes: int | None,
    cache: Cache | None,
    folder: Path,
    processes: int,
) -> Gathered:
    """Read, check, preprocess and keep all volumes; nothing is raised for what is wrong with them.

    Args:
        sources: The subjects' volumes, not yet read.
        splits: The split of each.
        transform: The preprocessing.
        sampling: Makes the index.
        patch_size: Voxels of a training patch.
        classes: Number of classes to check labels against; any where it is None.
        cache: Where to keep them; decided by the first volume and the free memory where it is None.
        folder: Of the cache on disk.
        processes: Processes of this machine that keep volumes.
    """
    found = Gathered(cache)
    shelf = VolumeCache(folder)
    quiet = not sys.stderr.isatty()
    for source in track(
        sources, "reading volumes", console=Console(stderr=True), disable=quiet, transient=True
    ):
        preparation = Preparation(source, transform, sampling, classes)
        try:
            if found.cache != "disk" or not _known(found, shelf, preparation):
                volume = preparation.volume()
                if found.cache is None:
                    needed = volume.nbytes * len(sources)
                    found.cache = chosen_cache(needed, folder, processes)
                _keep(found, shelf, preparation, volume)
        except ValueError as error:
            found.errors.append(str(error))
        give_back()
    _look_over(found, {s.name: split for s, split in zip(sources, splits, strict=True)}, patch_size)
    return found


def _known(found: Gathered, shelf: VolumeCache, preparation: Preparation) -> bool:
    """Whether the cache on disk has it."""
    name = preparation.source.name
    try:
        key = preparation.key(shelf)
        about = shelf.about(key)
    except DamagedEntryError as error:
        warnings.warn(
            f'The cached volume of subject "{name}" is damaged ({error}); it is made again.',
            stacklevel=4,
        )
        return False
    except OSError:  # not there, or a source that cannot be read: told when it is
        return False
    found.keepers[name] = Mapped(shelf, key, about, preparation)
    return True


def _keep(found: Gathered, shelf: VolumeCache, preparation: Preparation, volume: Volume) -> None:
    if found.cache == "disk":
        key = preparation.key(shelf)
        try:
            shelf.write(key, volume)
        except OSError as error:
            found.cache = "memory"
            found.warnings.append(
                f"The cache in {shelf.folder} takes no more volumes ({error}): from subject "
                f'"{volume.name}" on they are kept in memory. Make room, or give another '
                "`cache_dir`."
            )
        else:
            found.keepers[volume.name] = Mapped(shelf, key, volume.about, preparation)
            return
    if found.cache == "none":
        found.keepers[volume.name] = Passing(preparation, volume.about, volume.index)
    else:
        found.keepers[volume.name] = Held(volume)


def _look_over(found: Gathered, splits: dict[str, str], patch_size: Shape) -> None:
    """What is wrong with the volumes together, or should be known."""
    about = {name: keeper.about for name, keeper in found.keepers.items()}
    twins = defaultdict(list)
    for name, one in about.items():
        twins[one.source].append(name)
    for names in twins.values():
        if len({splits[name] for name in names}) > 1:
            told = ", ".join(f'"{name}" ({splits[name]})' for name in names)
            found.errors.append(
                f"Subjects {told} have the very same image, which would train and judge at once. "
                "Keep one of them, or put them into one split."
            )
    small = [
        name
        for name, one in about.items()
        if any(n < s for n, s in zip(one.shape, patch_size, strict=True))
    ]
    if small:
        found.warnings.append(
            f"{len(small)} volumes are smaller than the patch of {patch_size} voxels and "
            f"are padded with their minimum: {', '.join(small[:10])}."
        )
    spacings = Counter(tuple(round(s, 2) for s in one.spacing_mm) for one in about.values())
    if len(spacings) > 1:
        told = ", ".join(
            f"{i:g} x {j:g} x {k:g} mm ({count})" for (i, j, k), count in spacings.most_common(5)
        )
        found.warnings.append(
            f"The volumes have {len(spacings)} different spacings: {told}. A vessel has another "
            "size in voxels in each; `MRADataModule(spacing_mm=...)` resamples them to one."
        )
