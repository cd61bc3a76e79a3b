"""How fast and how lean the data module is, against TorchIO and MONAI: one line of JSON a number.

    python experiments/benchmarks/data.py                # all; twenty minutes
    python experiments/benchmarks/data.py memory start   # some

Twelve phantoms of 256 x 256 x 100 voxels, as compressed NIfTI; patches of 64^3 in batches of 4. One
thread computes in each process, so that workers are what adds speed. Each pipeline is taken at its
best of 0 and 2 workers, in the same run; speeds are told for the record, only ratios count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torchio as tio
from monai import data as monai_data
from monai import transforms as mt

from lightning_segxai import MRADataModule
from lightning_segxai.data.augmentation import light_augmentation
from lightning_segxai.data.phantom import tof_phantom

SHAPE, SPACING_MM = (256, 256, 100), (0.6, 0.6, 0.7)
VOLUMES, STORED = 12, 50
PATCH, BATCH, SAMPLES = 64, 4, 16
WORKERS = (0, 2)
FLIP_GAMMA_NOISE = [
    tio.RandomFlip(axes=(0,)),
    tio.RandomGamma(log_gamma=0.3, p=0.3),
    tio.RandomNoise(std=(0, 0.05), p=0.3),
]


def say(what: str, value: float, bound: str, **more: Any) -> None:
    """One number."""
    print(json.dumps({"what": what, "value": round(value, 4), "bound": bound, **more}), flush=True)


def volumes(root: Path, count: int) -> Path:
    """A folder of pairs; beyond twelve, volumes are one of those with another voxel changed."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for n in range(count):
        name = f"head-{n:02d}.nii.gz"
        if (root / "labels" / name).exists():
            continue
        phantom = tof_phantom(SHAPE, SPACING_MM, seed=n % VOLUMES)
        phantom.image[0, 0, 0] += n // VOLUMES
        affine = np.diag([*SPACING_MM, 1.0])
        nib.save(nib.Nifti1Image(phantom.image, affine), root / "images" / name)
        nib.save(nib.Nifti1Image(phantom.label, affine), root / "labels" / name)
    return root


def ours(root: Path, cache: str, workers: int, augmentation: list[tio.Transform]) -> MRADataModule:
    """The data module, all but one volume in training."""
    return MRADataModule(
        root,
        patch_size=PATCH,
        batch_size=BATCH,
        samples_per_volume=SAMPLES,
        validation_share=1e-3,
        num_workers=workers,
        augmentation=augmentation,
        cache=cache,
        cache_dir=root / "cache",
    )


def speed(epoch: Callable[[], Iterable[Any]], seconds: float = 10.0) -> float:
    """Patches a second over whole epochs, after one that warms up."""
    patches, begin = 0, 0.0
    while True:
        for batch in epoch():
            patches += batch_length(batch)
        if not begin:
            patches, begin = 0, time.perf_counter()
        elif time.perf_counter() - begin > seconds:
            return patches / (time.perf_counter() - begin)


def batch_length(batch: Any) -> int:
    """Patches in a batch."""
    image = batch["image"]
    return len(image["data"] if isinstance(image, dict) else image)


def torchio_queue(
    root: Path, workers: int, augmentation: list[tio.Transform], on: str
) -> Callable[[], Iterable[Any]]:
    """TorchIO's queue and label sampler, augmenting the volume (its way) or the patch."""
    names = sorted(path.name for path in (root / "images").iterdir())[: VOLUMES - 1]
    subjects = [
        tio.Subject(
            image=tio.ScalarImage(root / "images" / name),
            label=tio.LabelMap(root / "labels" / name),
        )
        for name in names
    ]
    preprocessing = [tio.ToCanonical(), tio.ZNormalization()]
    steps = preprocessing + (augmentation if on == "volume" else [])
    patchwise = tio.Compose(augmentation) if on == "patch" and augmentation else None

    def epoch() -> Iterator[Any]:
        queue = tio.Queue(
            tio.SubjectsDataset(subjects, transform=tio.Compose(steps)),
            max_length=SAMPLES * len(subjects),
            samples_per_volume=SAMPLES,
            sampler=tio.LabelSampler(PATCH, label_name="label"),
            num_workers=workers,
            start_background=False,
        )
        patches = queue if patchwise is None else _Each(queue, patchwise)
        yield from tio.SubjectsLoader(patches, batch_size=BATCH)

    return epoch


class _Each(torch.utils.data.Dataset):
    """A queue whose patches go through a transform."""

    def __init__(self, queue: tio.Queue, transform: tio.Transform) -> None:
        self.queue, self.transform = queue, transform

    def __len__(self) -> int:
        return len(self.queue)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.queue[index])


def monai_cache(
    root: Path, workers: int, augmented: bool, samples: int, copied: bool
) -> Callable[[], Iterable[Any]]:
    """MONAI's cached volumes and indices, balanced crops, and the same light augmentation."""
    names = sorted(path.name for path in (root / "images").iterdir())[: VOLUMES - 1]
    keys = ["image", "label"]
    files = [{key: str(root / f"{key}s" / name) for key in keys} for name in names]
    gamma = (float(np.exp(-0.3)), float(np.exp(0.3)))
    random = [
        mt.RandFlipd(keys, prob=0.5, spatial_axis=0),
        mt.RandAdjustContrastd("image", prob=0.3, gamma=gamma),
        mt.RandGaussianNoised("image", prob=0.3, std=0.05),
    ]
    steps = [
        mt.LoadImaged(keys),
        mt.EnsureChannelFirstd(keys),
        mt.Orientationd(keys, axcodes="RAS", labels=None),
        mt.NormalizeIntensityd("image"),
        mt.FgBgToIndicesd("label"),
        mt.RandCropByPosNegLabeld(
            keys,
            label_key="label",
            spatial_size=(PATCH,) * 3,
            pos=1,
            neg=1,
            num_samples=samples,
            fg_indices_key="label_fg_indices",
            bg_indices_key="label_bg_indices",
        ),
        mt.SelectItemsd(keys),
        *(random if augmented else []),
    ]
    dataset = monai_data.CacheDataset(
        files, mt.Compose(steps), cache_rate=1.0, num_workers=1, progress=False, copy_cache=copied
    )
    loader = monai_data.DataLoader(
        dataset,
        batch_size=1,  # MONAI's batch: all crops of one volume
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def epoch() -> Iterator[Any]:
        for _ in range(SAMPLES // samples):
            yield from loader

    return epoch


def best(what: str, speeds: dict[str, float]) -> float:
    """The fastest setting of a pipeline; all are told."""
    told = {name: round(value, 1) for name, value in speeds.items()}
    say(f"patches/s, {what}", max(speeds.values()), "-", **told)
    return max(speeds.values())


def throughput(root: Path) -> None:
    """Patches a second, as ratios."""
    lists = {"none": [], "light": FLIP_GAMMA_NOISE, "default": light_augmentation()}
    mine = {}
    for name, transforms in lists.items():
        for cache in ("memory", "disk"):
            speeds = {}
            for workers in WORKERS:
                data = ours(root, cache, workers, transforms)
                loader = data.train_dataloader()
                speeds[f"{workers} workers"] = speed(lambda loader=loader: loader)
                del loader, data
            mine[name, cache] = best(f"ours, {cache}, augmentation {name}", speeds)
    for name in ("none", "default"):
        speeds = {
            f"on the {on}, {workers} workers": speed(torchio_queue(root, workers, lists[name], on))
            for on in (("volume", "patch") if name == "default" else ("patch",))
            for workers in WORKERS
        }
        theirs = best(f"TorchIO Queue and LabelSampler, augmentation {name}", speeds)
        bound = ">= 5" if name == "default" else "-"
        for cache in ("memory", "disk"):
            what = f"ours ({cache}) / TorchIO Queue and LabelSampler, augmentation {name}"
            say(what, mine[name, cache] / theirs, bound)
    for name, bound in (("none", ">= 2"), ("light", ">= 1.5")):
        speeds = {
            f"{workers} workers, {samples} crops, {'copied' if copied else 'not copied'}": speed(
                monai_cache(root, workers, name == "light", samples, copied)
            )
            for samples in (BATCH, SAMPLES)
            for copied in (True, False)
            for workers in WORKERS
        }
        theirs = best(f"MONAI CacheDataset, augmentation {name}", speeds)
        for cache in ("memory", "disk"):
            what = f"ours ({cache}) / MONAI CacheDataset, augmentation {name}"
            say(what, mine[name, cache] / theirs, bound)


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def memory_of(root: Path, cache: str) -> None:
    """In a process of its own: what setup and an epoch add, over the volumes' own size."""
    before = resident()
    data = ours(root, cache, 0, [])
    for _ in data.train_dataloader():
        pass
    own = VOLUMES * int(np.prod(SHAPE)) * (4 + 1)
    bound = "<= 1.3"
    say(f"resident memory / the volumes' own size, {cache}", (resident() - before) / own, bound)


def start_of(root: Path, cache: str) -> None:
    """In a process of its own: from the data module to the first batch of the training."""
    begin = time.perf_counter()
    next(iter(ours(root, cache, 0, light_augmentation()).train_dataloader()))
    say(
        f"seconds to the first batch, {STORED} volumes, warm cache on {cache}",
        time.perf_counter() - begin,
        "<= 2",
    )


def alone(part: str, root: Path, cache: str) -> None:
    """Run a part in a process of its own."""
    subprocess.run([sys.executable, __file__, part, str(root), cache], check=True)


def saturation(root: Path) -> None:
    """Vessel voxels at the largest value after scaling."""
    subject = tio.Subject(
        image=tio.ScalarImage(root / "images" / "head-00.nii.gz"),
        label=tio.LabelMap(root / "labels" / "head-00.nii.gz"),
    )
    clipping = tio.RescaleIntensity(percentiles=(0.5, 99.5))
    default = ours(root, "memory", 0, []).preprocessing
    for name, scaling, bound in (("default", default, "<= 0.01"), ("0.5-99.5", clipping, "-")):
        scaled = scaling(subject)
        vessels = scaled["image"].data[scaled["label"].data > 0]
        share = float((vessels == scaled["image"].data.max()).float().mean())
        say(f"share of vessel voxels saturated, {name} scaling", share, bound)


def main(parts: list[str]) -> None:
    """All parts, or some; a part of its own process has two arguments more."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if parts[:1] in (["memory-of"], ["start-of"]):
        {"memory-of": memory_of, "start-of": start_of}[parts[0]](Path(parts[1]), parts[2])
        return
    chosen = parts or ["saturation", "memory", "throughput", "start"]
    with tempfile.TemporaryDirectory() as folder:
        root = volumes(Path(folder) / "twelve", VOLUMES)
        for part in chosen:
            if part == "saturation":
                saturation(root)
            elif part == "throughput":
                throughput(root)
            elif part == "memory":
                for cache in ("memory", "disk"):
                    alone("memory-of", root, cache)
            elif part == "start":
                fifty = volumes(Path(folder) / "fifty", STORED)
                ours(fifty, "disk", 0, []).setup()
                alone("start-of", fifty, "disk")
            else:
                raise SystemExit(f"No part {part!r}: saturation, memory, throughput or start.")


if __name__ == "__main__":
    main(sys.argv[1:])
