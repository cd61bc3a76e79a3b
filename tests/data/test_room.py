from __future__ import annotations

from collections import namedtuple

import pytest

from lightning_segxai.data import room

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made-up /proc and /sys/fs/cgroup, and a disk: ``set_up(free=..., disk=..., files)``."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(room, "_PROC", proc)
    monkeypatch.setattr(room, "_CGROUP", cgroup)

    def set_up(available=None, disk=100 * GIB, group="0::/\n", **files):
        (proc / "self").mkdir(parents=True, exist_ok=True)
        if group is not None:
            (proc / "self/cgroup").write_text(group)
        if available is not None:
            text = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {available // 1024} kB\n"
            (proc / "meminfo").write_text(text)
        for name, text in files.items():
            path = cgroup / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))
        asked = []
        monkeypatch.setattr(
            room.shutil, "disk_usage", lambda p: asked.append(p) or Usage(disk, 0, disk)
        )
        return asked

    return set_up


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def group(folder, names, limit, used, stat=""):
    return {f"{folder}{name}": v for name, v in zip(names, (limit, used, stat), strict=True)}


@pytest.mark.parametrize(
    ("of_process", "files", "free"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/\n", group("", V2, "max\n", 5 * GIB), 8 * GIB),
        ("0::/\n", group("", V2, 4 * GIB, 1 * GIB), 3 * GIB),
        ("0::/\n", group("", V2, 4 * GIB, 3 * GIB, f"anon 1\ninactive_file {GIB}\n"), 2 * GIB),
        ("0::/\n", group("", V2, 32 * GIB, 1 * GIB), 8 * GIB),
        ("0::/\n", group("", V2, 4 * GIB, 5 * GIB), 0),
        ("0::/\n", {"memory.max": 4 * GIB}, 8 * GIB),
        # a batch system's group, seen from outside; the limit is one of a group around it
        ("0::/job/step\n", group("job/step/", V2, "max", GIB) | group("job/", V2, GIB, 0), GIB),
        ("0::/job/step\n", group("job/step/", V2, 2 * GIB, GIB) | group("job/", V2, GIB, 0), GIB),
        # the first version of control groups
        ("4:memory:/job\n0::/\n", group("memory/job/", V1, 3 * GIB, GIB), 2 * GIB),
        (
            "4:memory:/job\n",
            group("memory/job/", V1, 3 * GIB, 2 * GIB, f"total_inactive_file {GIB}\n"),
            2 * GIB,
        ),
        ("4:memory:/outside\n", group("memory/", V1, 3 * GIB, GIB), 2 * GIB),
        ("4:memory:/job\n", group("memory/job/", V1, 2**63 - 4096, GIB), 8 * GIB),
    ],
)
def test_free_memory_is_the_least_of_machine_and_groups(machine, of_process, files, free):
    """What is free is the least that the machine and every control group around leave."""
    machine(available=8 * GIB, group=of_process, **files)
    assert room.free_memory() == free


def test_without_linux_half_the_memory_is_free(machine, monkeypatch):
    """Where nothing tells what is free, half of the machine's memory is taken to be."""
    machine(group=None)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(room.os, "sysconf", pages.__getitem__)
    assert room.free_memory() == 4096 * 500


def test_free_memory_of_this_machine_is_plausible():
    """The real readings give something between 1 MB and 100 TB."""
    assert 2**20 < room.free_memory() < 100 * 2**40


@pytest.mark.parametrize(
    ("needed", "processes", "disk", "cache"),
    [
        (0, 1, 0, "memory"),
        (4 * GIB, 1, 0, "memory"),
        (4 * GIB + 1, 1, 100 * GIB, "disk"),
        (2 * GIB, 2, 0, "memory"),
        (2 * GIB + 1, 2, 100 * GIB, "disk"),
        (9 * GIB - 1, 1, 10 * GIB, "disk"),
        (9 * GIB, 1, 10 * GIB, "none"),
        (5 * GIB, 8, 6 * GIB, "disk"),  # the processes share the files
        (5 * GIB, 1, 0, "none"),
    ],
)
def test_choice_at_its_borders(machine, tmp_path, needed, processes, disk, cache):
    """Half of the free memory is enough for all processes' volumes, or nine tenths of the disk."""
    machine(available=8 * GIB, disk=disk)
    assert room.chosen_cache(needed, tmp_path, processes) == cache


def test_a_folder_that_does_not_exist_yet(machine, tmp_path, monkeypatch):
    """The disk that is asked is that of the first folder above that exists."""
    asked = machine(available=0)
    assert room.chosen_cache(1, tmp_path / "not" / "yet") == "disk"
    monkeypatch.chdir(tmp_path)
    room.chosen_cache(1, room.Path("not/yet"))
    assert asked == [tmp_path, room.Path()]
    assert not (tmp_path / "not").exists()
