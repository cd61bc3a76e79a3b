"""The folder of a run: where each file lies, and how it is written and read back.

Every file is written under a temporary name and renamed, so that a reader never meets half of one;
the tables grow by whole lines. Nothing here knows of Lightning or W&B.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from lightning_segxai.values import RECORD_COLUMNS, Attribution, Mask, Probe, Record, checked_name

FORMAT = 1
METRIC_COLUMNS = ("epoch", "step", "name", "value")

_STAMP = re.compile(r"e(\d+)-s(\d+)\..+")
_MAPS, _PREDICTIONS, _PANELS = "maps", "predictions", "panels"
_RECORDS, _METRICS, _SPLITS = "records.csv", "metrics.csv", "splits.csv"


def moment(name: str) -> tuple[int, int] | None:
    """Epoch and step of a map, prediction or panel by its file name; None for another file.

    >>> moment("e0003-s000120.nii.gz")
    (3, 120)
    """
    stamp = _STAMP.fullmatch(name)
    return (int(stamp[1]), int(stamp[2])) if stamp else None


def plain(content: Any) -> Any:
    """The content as JSON can hold it: what JSON does not know becomes its text.

    >>> plain({"root": Path("data"), "sizes": (1, 2), "limit": float("inf")})
    {'root': 'data', 'sizes': [1, 2], 'limit': 'Infinity'}
    """
    return json.loads(json.dumps(content, default=str), parse_constant=str)


def region_note(region: Mask) -> str:
    """What a map's header says of the region it explains, so that a moved region shows."""
    voxels = region.detach().cpu().numpy().astype("|u1").tobytes()
    return f"segxai region={hashlib.sha1(voxels, usedforsecurity=False).hexdigest()[:12]}"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    ``run.json``, ``records.csv``, ``metrics.csv``, ``probes/<probe>/``,
    ``maps/<probe>/<target>/<method>/``, ``predictions/<probe>/`` and ``panels/<probe>/``; the last
    three hold one file per validation, named by epoch and step (``e0003-s000120``).

    Args:
        root: The folder; it is made when the first file is written.
    """

    root: Path

    def map_path(self, probe: str, target: str, method: str, epoch: int, step: int) -> Path:
        """Where the map of one cell at one validation lies."""
        names = (
            checked_name(probe, "probe"),
            checked_name(target, "target"),
            checked_name(method, "method"),
        )
        return self.root.joinpath(_MAPS, *names, f"{_stamp(epoch, step)}.nii.gz")

    def prediction_path(self, probe: str, epoch: int, step: int) -> Path:
        """Where the network's class of each voxel at one validation lies."""
        folder = self.root / _PREDICTIONS / checked_name(probe, "probe")
        return folder / f"{_stamp(epoch, step)}.nii.gz"

    def panel_path(self, probe: str, epoch: int, step: int) -> Path:
        """Where the picture of one probe at one validation lies."""
        folder = self.root / _PANELS / checked_name(probe, "probe")
        return folder / f"{_stamp(epoch, step)}.png"

    def probe_paths(self, probe: str, regions: Iterable[str] = ()) -> dict[str, Path]:
        """Where a probe's ``image``, ``label`` and ``region-<name>`` lie."""
        folder = self.root / "probes" / checked_name(probe, "probe")
        parts = ["image", "label", *(f"region-{checked_name(r, 'region')}" for r in regions)]
        return {part: folder / f"{part}.nii.gz" for part in parts}

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write a file such that it is there as a whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # uuid4 draws from the system: the run's random numbers stay as they are
        draft = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            draft.write_bytes(content)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def write_nifti(
        self,
        path: Path,
        values: Shaped[Tensor, "*axes"],
        affine: Num[np.ndarray, "4 4"] | None,
        note: str = "",
    ) -> None:
        """Write a volume: float32, or the smallest of uint8, int16 and int32 for whole numbers.

        Equal volumes give equal files.

        Args:
            path: Where to; ends in ``.nii.gz``.
            values: The volume; a fourth axis, if any, is the last.
            affine: Voxel indices to world millimeters.
            note: Up to 79 ASCII characters for the header.
        """
        image = nib.Nifti1Image(_storable(values), affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = note.encode("ascii")
        # level 4: maps hardly shrink at any level, labels halve from 1 to 4 at the same speed
        self.write_bytes(path, gzip.compress(image.to_bytes(), 4, mtime=0))

    def read_nifti(self, path: Path) -> Shaped[Tensor, "*axes"]:
        """The volume of a file: float32, or int64 for whole numbers."""
        image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
        stored = np.asanyarray(image.dataobj)
        kind = np.float32 if stored.dtype.kind == "f" else np.int64
        return torch.from_numpy(stored.astype(kind, order="C"))

    def read_note(self, path: Path) -> str:
        """The note in a file's header; the voxels are not read."""
        with gzip.open(path) as file:
            header = nib.Nifti1Header.from_fileobj(file, check=False)
        return bytes(header["descrip"].item()).decode("ascii")

    def write_map(self, attribution: Attribution) -> Path:
        """Write the map of an attribution, noting the region it explains."""
        a = attribution
        path = self.map_path(a.probe.name, a.target, a.method, a.epoch, a.step)
        self.write_nifti(path, a.values, a.probe.affine, region_note(a.region))
        return path

    def write_json(self, content: Mapping[str, Any]) -> None:
        """Write ``run.json``; the number of the format is put first."""
        text = json.dumps({"format": FORMAT, **plain(content)}, indent=1, ensure_ascii=False)
        self.write_bytes(self.root / "run.json", f"{text}\n".encode())

    def read_json(self) -> dict[str, Any]:
        """The content of ``run.json``, empty where there is none yet.

        Raises:
            ValueError: if another version wrote it.
        """
        path = self.root / "run.json"
        if not path.exists():
            return {}
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path} needs format {FORMAT}, but has {content.get('format')!r}. "
                "Read it with the version of lightning-segxai that wrote it."
            )
        return content

    def save_probe(self, probe: Probe) -> None:
        """Keep a probe, such that `load_probe` gives one of the same fingerprint.

        Raises:
            ValueError: if the folder has another probe of this name.
        """
        content = self.read_json()
        saved = content.setdefault("probes", {})
        if probe.name in saved:
            if saved[probe.name]["fingerprint"] != probe.fingerprint:
                raise ValueError(
                    f'{self.root} has another probe "{probe.name}" (fingerprint '
                    f"{saved[probe.name]['fingerprint']}, now {probe.fingerprint}). "
                    "Give the probe another name, or the run another folder."
                )
            return
        paths = self.probe_paths(probe.name, probe.regions)
        image = probe.image[0] if len(probe.image) == 1 else probe.image.movedim(0, -1)
        self.write_nifti(paths["image"], image, probe.affine)
        if probe.label is not None:
            self.write_nifti(paths["label"], probe.label, probe.affine)
        for region, mask in probe.regions.items():
            self.write_nifti(paths[f"region-{region}"], mask, probe.affine)
        saved[probe.name] = {
            "fingerprint": probe.fingerprint,
            "shape": list(probe.shape),
            "spacing_mm": list(probe.spacing_mm),
            "affine": np.asarray(probe.affine).tolist(),  # NIfTI rounds it to float32
            "label": probe.label is not None,
            "regions": list(probe.regions),
            "preprocessing": probe.preprocessing,
            "source": probe.source,
            "voxels": probe.voxels,
        }
        self.write_json(content)

    def load_probe(self, name: str) -> Probe:
        """The probe that `save_probe` kept.

        Raises:
            ValueError: if there is none of this name, or its files were changed.
        """
        saved = self.read_json().get("probes", {})
        if name not in saved:
            raise ValueError(f'{self.root} has no probe "{name}". It has: {", ".join(saved)}.')
        entry = saved[name]
        paths = self.probe_paths(name, entry["regions"])
        image = self.read_nifti(paths["image"])
        probe = Probe(
            name,
            image[None] if image.ndim == 3 else image.movedim(-1, 0).contiguous(),
            label=self.read_nifti(paths["label"]) if entry["label"] else None,
            spacing_mm=tuple(entry["spacing_mm"]),
            affine=np.array(entry["affine"]),
            regions={r: self.read_nifti(paths[f"region-{r}"]).bool() for r in entry["regions"]},
            preprocessing=entry["preprocessing"],
            source=entry.get("source", ""),
        )
        saved_voxels = entry.get("voxels", probe.voxels)  # older runs did not keep it
        if (probe.fingerprint, probe.voxels) != (entry["fingerprint"], saved_voxels):
            raise ValueError(
                f'{paths["image"].parent} no longer holds the probe "{name}" of the run '
                f"(fingerprint {entry['fingerprint']}, now {probe.fingerprint}). Restore its files."
            )
        return probe

    def write_splits(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Write ``splits.csv``: the volumes, and which of them train, validate and test."""
        table = io.StringIO()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write_bytes(self.root / _SPLITS, table.getvalue().encode())

    def read_splits(self) -> list[dict[str, str]]:
        """All rows of ``splits.csv``; none where there is no such file."""
        path = self.root / _SPLITS
        return (
            list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
            if path.exists()
            else []
        )

    def append_records(self, records: Iterable[Record]) -> None:
        """Add rows to ``records.csv``."""
        rows = [[getattr(record, column) for column in RECORD_COLUMNS] for record in records]
        self._append(_RECORDS, RECORD_COLUMNS, rows)

    def read_records(self) -> list[Record]:
        """All rows of ``records.csv``; a torn last line is ignored."""
        typed = {"epoch": int, "step": int, "value": float}
        return [
            Record(**{column: typed.get(column, str)(text) for column, text in row.items()})
            for row in self._rows(_RECORDS)
        ]

    def append_metrics(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Add what the Trainer logged at one validation to ``metrics.csv``."""
        rows = [[epoch, step, name, value] for name, value in metrics.items()]
        self._append(_METRICS, METRIC_COLUMNS, rows)

    def metric_moments(self) -> list[tuple[int, int]]:
        """Epoch and step of each validation in ``metrics.csv``."""
        rows = self._rows("metrics.csv")
        return list(dict.fromkeys((int(row["epoch"]), int(row["step"])) for row in rows))

    def truncate_after(self, step: int) -> None:
        """Remove what came after a step, as a run needs that goes on from its checkpoint."""
        for name, columns in ((_RECORDS, RECORD_COLUMNS), (_METRICS, METRIC_COLUMNS)):
            rows = self._rows(name)
            kept = [list(row.values()) for row in rows if int(row["step"]) <= step]
            if len(kept) < len(rows):
                self.write_bytes(self.root / name, _csv([columns, *kept]))
        for folder in (_MAPS, _PREDICTIONS, _PANELS):
            for path in (self.root / folder).rglob("e*-s*.*"):
                when = moment(path.name)
                if when is not None and when[1] > step:
                    path.unlink()
        for draft in self.root.rglob(".*.partial"):  # of a process that was killed
            draft.unlink()

    def _append(self, name: str, columns: Sequence[str], rows: list[list[Any]]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / name).open("a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # a row must not be glued to a torn line
            file.write(_csv(rows if whole else [columns, *rows]))

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].decode()
        return list(csv.DictReader(io.StringIO(whole, newline="")))


def _stamp(epoch: int, step: int) -> str:
    return f"e{epoch:04d}-s{step:06d}"


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """The rows as text; floats by ``repr``, so that they come back to the last bit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([repr(float(v)) if isinstance(v, float) else v for v in row] for row in rows)
    return text.getvalue().encode()


def _storable(values: Tensor) -> np.ndarray:
    if values.is_floating_point():
        return values.detach().to("cpu", torch.float32).numpy()
    array = values.detach().cpu().numpy()
    low, high = int(array.min()), int(array.max())
    limits = (np.iinfo(kind) for kind in (np.uint8, np.int16, np.int32))
    return array.astype(next(i.dtype for i in limits if i.min <= low and high <= i.max))
