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
from lightning_segxai.data.room import Cache, chosen_cache, fits, give_back
from lightning_segxai.data.sampling import Sampling
from lightning_segxai.data.sources import Source
from lightning_segxai.data.volumes import Volume
from lightning_segxai.values import Shape


@dataclass
class Gathered:
    """The volumes of a training, and what is wrong with them.

    Args:
        cache: Where they are kept; None before the first was read.
        full: Whether the disk took no more, so that not all are where they should be.
        keepers: Of the usable ones, by name, in the order of the sources.
        errors: Why others cannot be used, by name.
        together: What is wrong with several that could be used alone.
        warnings: What should be known of the usable ones.
    """

    cache: Cache | None
    full: bool = False
    keepers: dict[str, Keeper] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    together: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def tell(self) -> None:
        """Warn of what should be known, or refuse.

        Raises:
            ValueError: with one line for each subject that cannot be used, the warnings behind.
        """
        if self.errors or self.together:
            lines = "\n  ".join([*self.errors.values(), *self.together, *self.warnings])
            count = len(self.keepers) + len(self.errors)
            what = f"{len(self.errors)} of {count}" if self.errors else f"these {count}"
            raise ValueError(f"`MRADataModule` cannot use {what} subjects:\n  {lines}")
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
    console, quiet = Console(stderr=True), not sys.stderr.isatty()
    bar = track(sources, "reading volumes", console=console, disable=quiet, transient=True)
    for at, source in enumerate(bar):
        preparation = Preparation(source, transform, sampling, classes)
        try:
            keeper = _known(shelf, preparation) if found.cache == "disk" else None
            if keeper is None:
                volume = preparation.volume()
                if found.cache is None:
                    needed = volume.nbytes * len(sources)
                    found.cache = chosen_cache(needed, folder, processes)
                room = fits(volume.nbytes * (len(sources) - at), processes)
                keeper = _kept(found, shelf, preparation, volume, room)
            found.keepers[source.name] = keeper
        except ValueError as error:
            found.errors[source.name] = str(error)
        except Exception as error:  # readers, transforms and samplings are anybody's code
            found.errors[source.name] = (
                f'Subject "{source.name}" cannot be prepared: {type(error).__name__}: {error}'
            )
        give_back()
    _look_over(found, {s.name: split for s, split in zip(sources, splits, strict=True)}, patch_size)
    return found


def _known(shelf: VolumeCache, preparation: Preparation) -> Keeper | None:
    """The volume in the cache on disk, where it is there and whole by its files' sizes."""
    try:
        key = preparation.key(shelf)
        return Mapped(shelf, key, shelf.about(key), preparation)
    except DamagedEntryError as error:
        warnings.warn(
            f'The cached volume of subject "{preparation.source.name}" is damaged ({error}); it is '
            "made again.",
            stacklevel=4,
        )
    except OSError:  # not there, or a source that cannot be read: told when it is
        pass
    return None


def _kept(
    found: Gathered, shelf: VolumeCache, preparation: Preparation, volume: Volume, room: bool
) -> Keeper:
    """A volume where it is to be kept; on a full disk, in memory if there is room for the rest."""
    if found.cache == "disk" and not found.full:
        try:
            key = preparation.key(shelf)
            shelf.write(key, volume)
            return Mapped(shelf, key, volume.about, preparation)
        except OSError as error:
            found.full = True
            found.warnings.append(
                f"The cache in {shelf.folder} takes no more volumes ({error}): from subject "
                f'"{volume.name}" on they are '
                + ("kept in memory" if room else "read anew in every epoch")
                + ". Make room, or give another `cache_dir`."
            )
    if found.cache == "memory" or (found.full and room):
        return Held(volume)
    return Passing(preparation, volume.about, volume.index)


def _look_over(found: Gathered, splits: dict[str, str], patch_size: Shape) -> None:
    """What is wrong with the volumes together, or should be known."""
    about = {name: keeper.about for name, keeper in found.keepers.items()}
    twins = defaultdict(list)
    for name, one in about.items():
        twins[one.source].append(name)
    for names in twins.values():
        if len({splits[name] for name in names}) > 1:
            told = ", ".join(f'"{name}" ({splits[name]})' for name in names)
            found.together.append(
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
