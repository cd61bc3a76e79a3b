"""Reads what W&B wrote offline, straight from a run's transaction log.

The log is LevelDB's log format: blocks of 32,768 bytes after a header of seven; a record is split
into chunks (full, first, middle, last), each with checksum, length and type; together they are one
protocol buffer. wandb has no public reader for it since its Python data store is gone.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = struct.Struct("<4sHB")
_CHUNK = struct.Struct("<IHB")
_FULL, _LAST = 1, 4


@dataclass
class WandbRun:
    """One offline run: its rows and everything else a dashboard would show."""

    folder: Path
    id: str = ""
    started_ns: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[wandb_internal_pb2.ArtifactRecord] = field(default_factory=list)
    alerts: list[wandb_internal_pb2.AlertRecord] = field(default_factory=list)
    finished: bool = False

    def file(self, media: dict[str, Any]) -> Path:
        """Where the file of a logged picture or table lies."""
        return self.folder / "files" / media["path"]


def read_runs(directory: Path, patience_s: float = 10.0) -> list[WandbRun]:
    """All offline runs under ``directory/wandb``, oldest first.

    The log is written in the background: it is read again until it has the record of the exit.
    """
    runs = [_read_run(log, patience_s) for log in directory.glob("wandb/offline-run-*/run-*.wandb")]
    return sorted(runs, key=lambda run: run.started_ns)


def _read_run(log: Path, patience_s: float) -> WandbRun:
    deadline = time.monotonic() + patience_s
    while True:
        run = _parse(log)
        if run.finished or time.monotonic() > deadline:
            return run
        time.sleep(0.1)


def _parse(log: Path) -> WandbRun:
    run = WandbRun(log.parent)
    for payload in _payloads(log.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id = record.run.run_id
            run.started_ns = record.run.start_time.ToNanoseconds()
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "alert":
            run.alerts.append(record.alert)
        elif kind == "exit":
            run.finished = True
    return run


def _items(items: Any) -> dict[str, Any]:
    """What was logged, put together again: W&B splits dictionaries into their leaves."""
    found: dict[str, Any] = {}
    for item in items:
        *branches, leaf = list(item.nested_key) or [item.key]
        place = found
        for branch in branches:
            place = place.setdefault(branch, {})
        place[leaf] = json.loads(item.value_json)
    return found


def _payloads(content: bytes) -> list[bytes]:
    found: list[bytes] = []
    if len(content) < _HEADER.size:
        return found
    assert _HEADER.unpack_from(content) == (b":W&B", 0xBEE1, 0)

    at, parts = _HEADER.size, b""
    while at + _CHUNK.size <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK.size:  # the rest of a block too short for a chunk is padding
            at += left
            continue
        _, length, kind = _CHUNK.unpack_from(content, at)
        at += _CHUNK.size
        if kind == 0 or at + length > len(content):
            break  # not flushed yet
        parts += content[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            found.append(parts)
            parts = b""
    return found
