"""How much memory there is for volumes, and where to keep them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

Cache = Literal["memory", "disk", "none"]
"""Where preprocessed volumes are kept: in memory, in files mapped to memory, or nowhere."""

_SHARE = 0.5  # of the free memory that volumes may take; the network wants some, too


def chosen_cache(needed: int, folder: Path, processes: int = 1) -> Cache:
    """Memory if the volumes fit into half of what is free, else disk if it has room, else none.

    Args:
        needed: Bytes of all volumes.
        folder: Where the files would lie; it need not exist yet.
        processes: Processes of this machine that would each hold them.
    """
    if needed * processes <= _SHARE * free_memory():
        return "memory"
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return "disk" if needed < 0.9 * shutil.disk_usage(there).free else "none"


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    free = _meminfo_available()
    limit, used = _number("memory.max"), _number("memory.current")
    if limit is not None and used is not None:
        # files that the kernel keeps in memory count as used, and go when memory is wanted
        free = min(free, limit - used + (_inactive_files() or 0))
    return max(free, 0)


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _inactive_files() -> int | None:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None
