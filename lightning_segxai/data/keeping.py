"""Where the volumes of a training are while it lasts: in memory, mapped from disk, or nowhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from lightning_segxai.data.cache import DamagedEntryError, VolumeCache
from lightning_segxai.data.preparation import Preparation
from lightning_segxai.data.volumes import About, Volume
from lightning_segxai.values import Shape


@dataclass(frozen=True)
class Held:
    """A volume in memory."""

    volume: Volume

    @property
    def about(self) -> About:
        """What is known of it without its voxels."""
        return self.volume.about

    def read(self) -> Volume:
        """The volume."""
        return self.volume


class Mapped:
    """A volume in the cache on disk; made again where its entry is damaged or gone.

    Args:
        cache: The cache.
        key: Its entry.
        about: What is known of it.
        preparation: How to make it again.
    """

    def __init__(
        self, cache: VolumeCache, key: str, about: About, preparation: Preparation
    ) -> None:
        self.cache = cache
        self.key = key
        self.about = about
        self.preparation = preparation
        self._volume: Volume | None = None

    def read(self) -> Volume:
        """The volume, mapped to memory once."""
        if self._volume is None:
            self._volume = self._read()
        return self._volume

    def _read(self) -> Volume:
        name = self.preparation.source.name
        try:
            return self.cache.read(self.key, name)
        except (DamagedEntryError, FileNotFoundError) as error:
            warnings.warn(
                f'The cached volume of subject "{name}" is damaged or gone ({error}); it is made '
                "again.",
                stacklevel=2,
            )
        volume = self.preparation.volume()
        try:
            self.cache.discard(self.key)
            self.cache.write(self.key, volume)
            return self.cache.read(self.key, name)
        except (OSError, DamagedEntryError):
            return volume  # no room on the disk: it stays in memory

    def __getstate__(self) -> dict[str, Any]:
        # another process maps the files itself instead of getting a copy
        return {**self.__dict__, "_volume": None}


@dataclass(frozen=True)
class Passing:
    """A volume that is read and preprocessed whenever it is asked for; only its index is kept."""

    preparation: Preparation
    about: About
    index: Mapping[str, np.ndarray]

    def read(self) -> Volume:
        """The volume, made anew."""
        return self.preparation.again(self.index)


Keeper = Held | Mapped | Passing
"""What gives one volume, again and again."""


class KeptVolumes(Sequence[Volume]):
    """Volumes by number; the one asked for last stays at hand.

    Args:
        keepers: What gives each of them.
    """

    def __init__(self, keepers: Sequence[Keeper]) -> None:
        self.keepers = list(keepers)
        self._latest: tuple[int, Volume] | None = None

    def __len__(self) -> int:
        return len(self.keepers)

    @property
    def passing(self) -> bool:
        """Whether some of them are made anew whenever they are asked for."""
        return any(isinstance(keeper, Passing) for keeper in self.keepers)

    @property
    def shapes(self) -> list[Shape]:
        """Voxels of the volumes, which are not read for it."""
        return [keeper.about.shape for keeper in self.keepers]

    @overload
    def __getitem__(self, at: int) -> Volume: ...
    @overload
    def __getitem__(self, at: slice) -> KeptVolumes: ...
    def __getitem__(self, at: int | slice) -> Volume | KeptVolumes:
        if isinstance(at, slice):
            return KeptVolumes(self.keepers[at])
        if self._latest is None or self._latest[0] != at:
            self._latest = None  # before the next one is read
            self._latest = (at, self.keepers[at].read())
        return self._latest[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}
