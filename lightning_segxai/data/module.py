"""The LightningDataModule for ToF-MRA: patches for training, probes for the monitor."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchio as tio

from lightning_segxai.data.augmentation import light_augmentation
from lightning_segxai.data.probes import ProbeFile, subject_probe
from lightning_segxai.data.sampling import (
    Augmented,
    BalancedSampler,
    Tiles,
    vessel_centers,
)
from lightning_segxai.data.subjects import (
    PhantomCohort,
    check_subject,
    folder_subjects,
    phantom_subjects,
    preprocessed,
)
from lightning_segxai.values import Probe, as_shape

# A Trainer and a LightningCLI know only the classes of their own namespace
_BASES = tuple(
    import_module(namespace).LightningDataModule
    for package, namespace in (
        ("pytorch_lightning", "pytorch_lightning"),
        ("lightning", "lightning.pytorch"),
    )
    if find_spec(package) is not None
)
_SHUFFLED_VOLUMES = 16  # patches of so many volumes are shuffled together, and held meanwhile


class MRADataModule(*_BASES):  # type: ignore[misc]  # chosen by what is installed
    """Patches of ToF-MRA volumes with vessel labels, and the probes that the monitor explains.

    Volumes are read from ``root/images/<name>.nii.gz`` and ``root/labels/<name>.nii.gz``, or made
    up. They are checked, turned to RAS, scaled and kept in memory once; subjects are split into
    training and validation. Training patches are drawn around a vessel voxel and anywhere in
    turn; validation goes over the same tiles of every validation volume each time and draws no
    random number. Test and predict loaders give the validation volumes whole.

    A batch holds ``batch["image"]["data"]`` (b c i j k), ``batch["label"]["data"]`` (b 1 i j k)
    and ``batch["name"]``.

    Args:
        root: Folder with ``images/`` and ``labels/``.
        phantom: Subjects to make up instead.
        patch_size: Voxels of a patch, one number or three; smaller volumes are padded.
        batch_size: Patches in a batch.
        samples_per_volume: Patches drawn from each training volume in an epoch.
        probes: How many patches to explain, or files to explain whole.
        validation_share: Share of the subjects kept for validation, in (0, 1); at least one.
        num_workers: Processes that prepare volumes beside the training.
        intensity: How to scale intensities; z-normalization over all voxels where it is None. (Over
            the voxels above the mean the same vessel would be 1 in a box full of vessels and 5 in
            the next.) Percentiles that clip would flatten most vessels, which are less than 1 % of
            the voxels and the brightest.
        augmentation: TorchIO transforms of a training patch; a light set where it is None.
        classes: Number of classes, background included, to check labels against; any where it is
            None.
        seed: Of the split.

    Raises:
        ValueError: unless exactly one of ``root`` and ``phantom`` is given, and for numbers out
            of range.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        phantom: PhantomCohort | None = None,
        patch_size: int | tuple[int, int, int] = 64,
        batch_size: int = 4,
        samples_per_volume: int = 16,
        probes: int | list[ProbeFile] = 4,
        validation_share: float = 0.2,
        num_workers: int = 0,
        intensity: tio.Transform | None = None,
        augmentation: list[tio.Transform] | None = None,
        classes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (root is None) == (phantom is None):
            raise ValueError(
                "`MRADataModule` needs either `root`, a folder of images and labels, or `phantom`, "
                f"subjects to make up, but got root={root!r} and phantom={phantom!r}."
            )
        if not 0 < validation_share < 1:
            raise ValueError(
                f"`MRADataModule(validation_share={validation_share})` must lie between 0 and 1."
            )
        for name, count, least in (
            ("batch_size", batch_size, 1),
            ("samples_per_volume", samples_per_volume, 1),
            ("num_workers", num_workers, 0),
            ("probes", probes if isinstance(probes, int) else 0, 0),
        ):
            if count < least:
                raise ValueError(f"`MRADataModule({name}={count})` must be at least {least}.")
        self.root = root
        self.phantom = phantom
        self.patch_size = as_shape(patch_size, "patch_size")
        self.batch_size = batch_size
        self.samples_per_volume = samples_per_volume
        self.validation_share = validation_share
        self.num_workers = num_workers
        self.intensity = tio.ZNormalization() if intensity is None else intensity
        self.augmentation = light_augmentation() if augmentation is None else augmentation
        self.classes = classes
        self.seed = seed
        self._probes = probes
        self._training: list[tio.Subject] = []
        self._validation: list[tio.Subject] = []

    @property
    def preprocessing(self) -> tio.Compose:
        """What is done to every volume before the network sees it; draws no random number."""
        return tio.Compose([tio.ToCanonical(), self.intensity])

    def setup(self, stage: str | None = None) -> None:
        """Read, check, preprocess and split the subjects, once.

        Raises:
            ValueError: with one line for each subject that cannot be used, or where there are
                fewer than two.
        """
        if self._training:
            return
        if self.phantom is not None:
            where, subjects = str(self.phantom), phantom_subjects(self.phantom)
        else:
            where, subjects = str(self.root), folder_subjects(str(self.root))
        if len(subjects) < 2:
            raise ValueError(
                "`MRADataModule` needs at least two subjects, one of them for validation, but "
                f"found only {subjects[0]['name']!r} in {where}."
            )
        ready = self._prepared(subjects)
        draw = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(ready), generator=draw).tolist()
        count = min(max(1, round(self.validation_share * len(ready))), len(ready) - 1)
        self._validation = [ready[n] for n in sorted(order[:count])]
        self._training = [_plain(ready[n]) for n in sorted(order[count:])]

    def _prepared(self, subjects: list[tio.Subject]) -> list[tio.Subject]:
        ready, broken, count = [], [], len(subjects)
        while subjects:
            subject = subjects.pop(0)  # its raw voxels go once it is prepared
            try:
                check_subject(subject, self.classes)
                ready.append(preprocessed(subject, self.preprocessing))
            except ValueError as error:
                broken.append(str(error))
        if broken:
            lines = "\n  ".join(broken)
            raise ValueError(
                f"`MRADataModule` cannot use {len(broken)} of {count} subjects:\n  {lines}"
            )
        small = [str(s["name"]) for s in ready if _smaller(s.spatial_shape, self.patch_size)]
        if small:
            warnings.warn(
                f"{len(small)} volumes are smaller than the patch of {self.patch_size} voxels and "
                f"are padded with their minimum: {', '.join(small[:10])}.",
                stacklevel=2,
            )
        return ready

    def train_dataloader(self) -> tio.SubjectsLoader:
        """Balanced, augmented patches, shuffled over volumes; repeatable under ``seed_everything``.

        Every volume gives the same number of patches in an epoch.
        """
        queue = tio.Queue(
            tio.SubjectsDataset(self._training),
            # A multiple of samples_per_volume: otherwise volumes are drawn from unequally
            max_length=self.samples_per_volume * min(len(self._training), _SHUFFLED_VOLUMES),
            samples_per_volume=self.samples_per_volume,
            sampler=BalancedSampler(self.patch_size),
            num_workers=self.num_workers,
            start_background=False,  # its workers would start before the epoch does
        )
        # No workers here: the queue lives in this process and has its own
        return tio.SubjectsLoader(
            Augmented(queue, tio.Compose(self.augmentation)), batch_size=self.batch_size
        )

    def val_dataloader(self) -> tio.SubjectsLoader:
        """The same tiles of every validation volume, in the same order."""
        tiles = Tiles([_plain(s) for s in self._validation], self.patch_size)
        return self._still(tiles, self.batch_size)

    def test_dataloader(self) -> tio.SubjectsLoader:
        """The validation volumes, whole, one by one."""
        return self._still([_plain(s) for s in self._validation], 1)

    def predict_dataloader(self) -> tio.SubjectsLoader:
        """The validation volumes, whole, one by one."""
        return self.test_dataloader()

    def _still(self, dataset: Any, batch_size: int) -> tio.SubjectsLoader:
        # Any DataLoader draws a seed for its workers; from a generator of its own, so that a
        # validation leaves the training's random numbers alone
        return tio.SubjectsLoader(
            dataset,
            batch_size=batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def probes(self) -> list[Probe]:
        """The volumes to explain, always the same; no random number of the run is drawn.

        Files are taken whole. Otherwise patches of the training size, around vessels, from each
        validation subject in turn and from distinct places, named ``<subject>-<n>``.
        """
        if not isinstance(self._probes, int):
            return [spec.read(self.preprocessing) for spec in self._probes]
        self.setup()
        wanted = self._probes
        places = []
        for subject in self._validation:
            label = subject.get_image("label").data[0]
            centers = vessel_centers(label, self.patch_size, wanted)
            places.append(
                [(subject, f"{subject['name']}-{n}", c) for n, c in enumerate(centers, start=1)]
            )
        in_turn = [row[n] for n in range(wanted) for row in places if n < len(row)][:wanted]
        if len(in_turn) < wanted:
            warnings.warn(
                f"`MRADataModule(probes={wanted})` found only {len(in_turn)} distinct places for "
                f"patches of {self.patch_size} voxels in {len(places)} validation volumes.",
                stacklevel=2,
            )
        return [subject_probe(s, name, center, self.patch_size) for s, name, center in in_turn]


def _smaller(shape: tuple[int, int, int], size: tuple[int, int, int]) -> bool:
    return any(n < s for n, s in zip(shape, size, strict=True))


def _plain(subject: tio.Subject) -> tio.Subject:
    """Only what a batch holds: batches need equal keys, and every key is copied for each patch."""
    return tio.Subject({key: subject[key] for key in ("image", "label", "name")})
