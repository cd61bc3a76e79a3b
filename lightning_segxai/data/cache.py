"""Preprocessed volumes on disk, as arrays that are mapped to memory.

An entry is a folder named by what it was made from and how: ``entry.json``, and for each part of
the volume a file of bare little-endian numbers in index order, of the kind and shape that
``entry.json`` tells. It is written under another name and renamed, so that several processes may
make it at once and nobody reads half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_segxai.data.grids import spacing_of
from lightning_segxai.data.volumes import About, Volume

FORMAT = 1
_KINDS = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
_UNFINISHED = ".unfinished-"
_DAY_S = 86_400
_FRESH_S = 2.0  # a file this new might be written again within one tick of its clock


class DamagedEntryError(ValueError):
    """An entry of the cache is not what was written."""


def default_folder() -> Path:
    """``lightning-segxai`` in ``$XDG_CACHE_HOME``, in ``~/.cache``, or among temporary files."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        caches = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # a user without a home, in a container say
        caches = Path(tempfile.gettempdir())
    return caches / "lightning-segxai"


class VolumeCache:
    """A folder of preprocessed volumes.

    Entries of other settings stay; the folder can be deleted whenever no training reads it.

    Args:
        folder: Where the entries lie; made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry whose files have the sizes that were written."""
        try:
            self._entry(key)
        except (DamagedEntryError, FileNotFoundError):
            return False
        return True

    def read(self, key: str, name: str) -> Volume:
        """The volume of an entry, its arrays mapped to memory and checked.

        Args:
            key: The entry.
            name: Name of the volume; entries have none.

        Raises:
            FileNotFoundError: where there is no such entry.
            DamagedEntryError: where it is not what was written.
        """
        entry = self._entry(key)
        read = {part: self._tensor(key, part, about) for part, about in entry["parts"].items()}
        return Volume(
            name=name,
            image=read["image"],
            maps={p.removeprefix("map-"): t for p, t in read.items() if p.startswith("map-")},
            affine=np.array(entry["affine"]),
            floor=entry["floor"],
            index={
                p.removeprefix("index-"): t.numpy()
                for p, t in read.items()
                if p.startswith("index-")
            },
            preprocessing=entry["preprocessing"],
            source=entry["source"],
        )

    def about(self, key: str) -> About:
        """What is known of an entry's volume without reading it.

        Raises:
            FileNotFoundError: where there is no such entry.
            DamagedEntryError: where it is not what was written.
        """
        entry = self._entry(key)
        i, j, k = entry["parts"]["image"]["shape"]
        return About((i, j, k), spacing_of(np.array(entry["affine"])), entry["source"])

    def write(self, key: str, volume: Volume) -> None:
        """Make an entry; a damaged one is replaced, one whose files have the right sizes stays.

        Raises:
            ValueError: for a kind of numbers that an index or a map cannot have.
            OSError: where the disk is full or the folder cannot be written; nothing is left then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        try:
            parts = {
                "image": volume.image.numpy(),
                **{f"map-{name}": values.numpy() for name, values in volume.maps.items()},
                **{f"index-{name}": np.asarray(a) for name, a in volume.index.items()},
            }
            entry = {
                "format": FORMAT,
                "affine": volume.affine.tolist(),
                "floor": volume.floor,
                "preprocessing": volume.preprocessing,
                "source": volume.source,
                "parts": {part: _saved(made, part, array) for part, array in parts.items()},
            }
            entry["crc32"] = _told_checksum(entry)
            _flushed(made / "entry.json", json.dumps(entry, indent=1).encode())
            made.chmod(0o755)  # mkdtemp made it for this user alone
            self._put(made, self.folder / key)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _put(self, made: Path, entry: Path) -> None:
        while True:
            try:
                made.rename(entry)
                return
            except OSError as error:
                if entry.name in self:
                    return  # another process was faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self.discard(entry.name)

    def discard(self, key: str) -> None:
        """Remove an entry, where there is one; whoever has it mapped to memory keeps it."""
        if not (self.folder / key).exists():
            return
        old = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        try:
            (self.folder / key).rename(old / "old")
        except FileNotFoundError:
            pass  # another process did
        finally:
            shutil.rmtree(old, ignore_errors=True)

    def content(self, file: Path) -> str:
        """SHA-256 of a file; read again only when its size or time of change are new."""
        state = file.stat()
        changed = [state.st_mtime_ns, state.st_ctime_ns]
        seen = {"size": state.st_size, "inode": state.st_ino, "changed_ns": changed}
        name = hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:24]
        note = self.folder / "seen" / f"{name}.json"
        try:
            known = json.loads(note.read_text())
            if {key: known[key] for key in seen} == seen:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # never seen, or half a note
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - state.st_mtime > _FRESH_S:
            try:
                note.parent.mkdir(parents=True, exist_ok=True)
                _replaced(note, json.dumps(seen | {"sha256": digest}).encode())
            except OSError:
                pass  # only slower next time
        return digest

    def _entry(self, key: str) -> dict[str, Any]:
        folder = self.folder / key
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        try:
            entry: dict[str, Any] = json.loads((folder / "entry.json").read_text())
            if entry["format"] != FORMAT or entry.pop("crc32") != _told_checksum(entry):
                raise DamagedEntryError(f"{folder / 'entry.json'} is not what was written.")
            for part, about in entry["parts"].items():
                if _file(folder, part).stat().st_size != about["bytes"]:
                    raise DamagedEntryError(f"{_file(folder, part)} has another size.")
        except DamagedEntryError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedEntryError(f"{folder}: {type(error).__name__}: {error}") from error
        return entry

    def _tensor(self, key: str, part: str, about: Mapping[str, Any]) -> Tensor:
        """An array mapped to memory, without keeping a file open as NumPy's maps do."""
        file = _file(self.folder / key, part)
        kind, count = _KINDS[about["kind"]], math.prod(about["shape"])
        tensor = torch.empty(0, dtype=kind)
        try:
            if count:
                tensor = torch.from_file(str(file), shared=False, size=count, dtype=kind)
        except (OSError, RuntimeError) as error:
            raise DamagedEntryError(f"{file}: {error}") from error
        if _checksum(tensor.numpy()) != about["crc32"]:
            raise DamagedEntryError(f"{file} has other bytes than were written.")
        return tensor.view(about["shape"])

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            try:
                if time.time() - left.stat().st_mtime > _DAY_S:
                    shutil.rmtree(left, ignore_errors=True)
            except OSError:
                pass  # its owner was faster


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.raw"


def _saved(folder: Path, part: str, array: np.ndarray) -> dict[str, Any]:
    if array.dtype.name not in _KINDS:
        raise ValueError(
            f"The cache keeps arrays of {', '.join(_KINDS)}, but {part} is of {array.dtype.name}."
        )
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    _flushed(_file(folder, part), array.data)
    return {
        "kind": array.dtype.name,
        "shape": list(array.shape),
        "bytes": array.nbytes,
        "crc32": _checksum(array),
    }


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _told_checksum(entry: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _flushed(file: Path, content: bytes | memoryview) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _replaced(file: Path, content: bytes) -> None:
    handle, made = tempfile.mkstemp(prefix=_UNFINISHED, dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(made).replace(file)
    except OSError:
        Path(made).unlink(missing_ok=True)
        raise
