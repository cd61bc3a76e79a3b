"""How much memory there is for volumes, and where to keep them."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

Cache = Literal["memory", "disk", "none"]
"""Where preprocessed volumes are kept: in memory, in files mapped to memory, or nowhere."""

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 4 * 2**30  # bytes that are taken to be free where the system cannot be asked
_SHARE = 0.5  # of the free memory that volumes may take; the network wants some, too


def chosen_cache(needed: int, folder: Path, processes: int = 1) -> Cache:
    """Memory if the volumes fit into half of what is free, else disk if it has room, else none.

    Args:
        needed: Bytes of all volumes.
        folder: Where the files would lie; it need not exist yet.
        processes: Processes of this machine that would each hold them.
    """
    if fits(needed, processes):
        return "memory"
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return "disk" if needed < 0.9 * shutil.disk_usage(there).free else "none"


def fits(needed: int, processes: int = 1) -> bool:
    """Whether so many bytes, once for each process, are at most half of the free memory."""
    return needed * processes <= _SHARE * free_memory()


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control groups."""
    return max(min([_meminfo_available(), *_groups_available()]), 0)


def _groups_available() -> list[int]:
    """What each control group around this process leaves, of those that have a limit."""
    try:
        lines = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return []
    own = {names: Path(path.lstrip("/")) for _, names, path in lines}
    found = []
    for names, base, limit, used, inactive in (
        ("", _CGROUP, "memory.max", "memory.current", "inactive_file"),
        (
            "memory",
            _CGROUP / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        path = own.get(names, Path())
        for group in (base / path, *(base / above for above in path.parents)):
            most, taken = _number(group / limit), _number(group / used)
            if most is not None and taken is not None:
                # files that the kernel keeps in memory count as used, and go when it is wanted
                found.append(most - taken + _counted(group / "memory.stat", inactive))
    return found


def _meminfo_available() -> int:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # not POSIX
        return _UNKNOWN


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _counted(file: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in file.read_text().splitlines())[name])
    except (OSError, KeyError, ValueError):
        return 0


def give_back() -> None:
    """Return freed memory to the system; glibc keeps what arrays of a volume's size have left."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
