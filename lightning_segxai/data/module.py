"""The LightningDataModule for ToF-MRA: patches for training, probes for the monitor."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torchio as tio
from torch.utils.data import DataLoader, Dataset

from lightning_segxai.data.augmentation import Augmentation, light_augmentation
from lightning_segxai.data.cache import default_folder
from lightning_segxai.data.choice import ProbeChoice, Segment, chosen_probes
from lightning_segxai.data.evaluation import FixedBatches, still_loader, tiles, whole
from lightning_segxai.data.finding import find_subjects
from lightning_segxai.data.gathering import Gathered, gather
from lightning_segxai.data.intensity import ForegroundNormalization
from lightning_segxai.data.keeping import KeptVolumes
from lightning_segxai.data.loaders import (
    Batch,
    CachedPatches,
    EpochBatches,
    PatchLoader,
    augmented_later,
    patch_loader,
)
from lightning_segxai.data.plan import EpochPlan
from lightning_segxai.data.probes import ProbeFile
from lightning_segxai.data.queue import QueuedPatches
from lightning_segxai.data.room import Cache
from lightning_segxai.data.sampling import BalancedSampling, Sampling
from lightning_segxai.data.sources import PhantomSubject, Source, SubjectFiles
from lightning_segxai.data.splits import assign_splits, check_shares, split_rows
from lightning_segxai.data.subjects import PhantomCohort
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


class MRADataModule(*_BASES):  # type: ignore[misc]  # chosen by what is installed
    """Patches of ToF-MRA volumes with vessel labels, and the probes that the monitor explains.

    Volumes come from ``root``: a folder with ``images/<name>.nii.gz`` and
    ``labels/<name>.nii.gz``, a BIDS tree (``anat/*_angio.nii.gz``, masks in derivatives as
    ``desc-vessel_mask``), or a CSV with the columns ``image`` and ``label`` (paths relative to the
    CSV) and, where wanted, ``split`` (``train``, ``val`` or ``test``), ``subject``, ``name``,
    ``weights``, ``map_<name>`` and any metadata. They may be listed as
    ``subjects``, or made up. NIfTI, NRRD, MetaImage and DICOM series (a folder each) are read.

    Volumes are checked, turned to RAS, scaled and kept once, in memory or as files mapped to it;
    all problems are told in one report before the training begins. A training patch follows from
    the run's seed, the epoch and its number alone, whatever the number of workers and processes.
    Validation covers every validation volume by the same tiles each time. Test and predict loaders
    give the test volumes whole, or the validation volumes where there are none. No loader touches
    the random numbers of the training, and a checkpoint in the middle of an epoch resumes there.

    A batch is TorchIO's: ``batch["image"]["data"]`` (b c i j k), ``batch["label"]["data"]``
    (b 1 i j k), their ``affine``, ``batch["name"]``, and ``batch["location"]``, the first voxel of
    each patch and its end.

    Args:
        root: Folder of pairs, BIDS tree or CSV.
        phantom: Subjects to make up instead.
        subjects: Files to use instead, one by one.
        patch_size: Voxels of a patch, one number or three; smaller volumes are padded.
        batch_size: Patches in a batch.
        samples_per_volume: Patches drawn from each training volume in an epoch, by all processes
            together.
        probes: How many patches to explain, or which (`ProbeChoice`), or files to explain whole.
        validation_share: Share of the subjects kept for validation, in (0, 1); at least one.
        test_share: Share kept for testing, in [0, 1).
        fold: Number of the fold that validates, from 0, instead of a share.
        folds: Number of folds.
        num_workers: Processes that prepare batches beside the training.
        spacing_mm: Edge lengths that volumes are resampled to, in millimeters, one number or
            three; where it is None, they stay as they are.
        intensity: How to scale intensities; `ForegroundNormalization` where it is None. Percentiles
            that clip would flatten most vessels, which are less than 1 % of the voxels and the
            brightest.
        augmentation: TorchIO transforms of a training patch; a light set where it is None.
        sampling: Where patches are drawn; `BalancedSampling` where it is None.
        cache: Where preprocessed volumes are kept: ``memory``, ``disk``, or ``none`` (TorchIO's
            queue reads them anew in every epoch). Where it is None, in memory if half of what is
            free is enough, else on disk if that has room.
        cache_dir: Folder of the cache on disk; ``lightning-segxai`` in the user's cache folder
            where it is None.
        classes: Number of classes, background included, to check labels against; any where it is
            None.
        seed: Of the split.

    Raises:
        ValueError: unless exactly one of ``root``, ``phantom`` and ``subjects`` is given, and for
            numbers out of range.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        phantom: PhantomCohort | None = None,
        subjects: list[SubjectFiles] | None = None,
        patch_size: int | tuple[int, int, int] = 64,
        batch_size: int = 4,
        samples_per_volume: int = 16,
        probes: int | ProbeChoice | list[ProbeFile] = 4,
        validation_share: float = 0.2,
        test_share: float = 0.0,
        fold: int | None = None,
        folds: int | None = None,
        num_workers: int = 0,
        spacing_mm: float | tuple[float, float, float] | None = None,
        intensity: tio.Transform | None = None,
        augmentation: list[tio.Transform] | None = None,
        sampling: Sampling | None = None,
        cache: Cache | None = None,
        cache_dir: str | Path | None = None,
        classes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {"root": root, "phantom": phantom, "subjects": subjects}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                "`MRADataModule` needs either `root`, a folder, BIDS tree or CSV of images and "
                "labels, or `phantom`, subjects to make up, or `subjects`, a list of files, but "
                f"got {', '.join(f'{key}={value!r}' for key, value in given.items())}."
            )
        for name, count, least in (
            ("batch_size", batch_size, 1),
            ("samples_per_volume", samples_per_volume, 1),
            ("num_workers", num_workers, 0),
            ("probes", probes if isinstance(probes, int) else 0, 0),
        ):
            if count < least:
                raise ValueError(f"`MRADataModule({name}={count})` must be at least {least}.")
        check_shares(validation_share, test_share, fold, folds)
        if cache not in (None, *get_args(Cache)):
            raise ValueError(
                f"`MRADataModule(cache={cache!r})` must be one of {get_args(Cache)}, or None to "
                "choose by the free memory."
            )
        if spacing_mm is not None and not np.all(np.asarray(spacing_mm, dtype=float) > 0):
            raise ValueError(f"`MRADataModule(spacing_mm={spacing_mm})` needs numbers above 0.")
        self.root = root
        self.phantom = phantom
        self.subjects = subjects
        self.patch_size = as_shape(patch_size, "patch_size")
        self.batch_size = batch_size
        self.samples_per_volume = samples_per_volume
        self.validation_share = validation_share
        self.test_share = test_share
        self.fold = fold
        self.folds = folds
        self.num_workers = num_workers
        self.spacing_mm = spacing_mm
        self.intensity = ForegroundNormalization() if intensity is None else intensity
        self.augmentation = light_augmentation() if augmentation is None else augmentation
        self.sampling = BalancedSampling() if sampling is None else sampling
        self.cache = cache
        self.cache_dir = default_folder() if cache_dir is None else Path(cache_dir).expanduser()
        self.classes = classes
        self.seed = seed
        self._probes = probes
        for name, value, kind in (
            ("intensity", self.intensity, tio.Transform),
            ("augmentation", self.augmentation, list),
            ("sampling", self.sampling, Sampling),
            ("probes", probes, int | ProbeChoice | list),
        ):
            if not isinstance(value, kind):
                wanted = getattr(kind, "__name__", "number, `ProbeChoice` or list")
                raise TypeError(f"`MRADataModule({name}={value!r})` must be a {wanted}.")
        self._split: dict[str, KeptVolumes] = {}
        self._rows: list[dict[str, str]] | None = None
        self._stream_seed: int | None = None
        self._resumed_seed: int | None = None

    @property
    def preprocessing(self) -> tio.Compose:
        """What is done to every volume before the network sees it; draws no random number."""
        resampling = [] if self.spacing_mm is None else [tio.Resample(self.spacing_mm)]
        return tio.Compose([tio.ToCanonical(), *resampling, self.intensity])

    def sources(self) -> list[Source]:
        """The subjects' volumes, not yet read, in a fixed order.

        Raises:
            ValueError: for what cannot be found or paired.
        """
        if self.phantom is not None:
            return [PhantomSubject(self.phantom, n) for n in range(self.phantom.subjects)]
        return list(self.subjects if self.subjects is not None else find_subjects(str(self.root)))

    def prepare_data(self) -> None:
        """Fill the cache on disk, in one process of each machine; the others then only open it."""
        if self.cache != "memory" and self._place()[1] > 1:
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read, check, preprocess and split the subjects, once.

        Raises:
            ValueError: with one line for each subject that cannot be used, or where there are
                fewer than two.
        """
        if self._split:
            return
        sources = self.sources()
        splits = self._assigned(sources)
        gathered = self.gather(sources, splits)
        gathered.tell()
        self._rows = split_rows(sources, splits)
        self._split = {
            split: KeptVolumes(
                [
                    gathered.keepers[s.name]
                    for s, its in zip(sources, splits, strict=True)
                    if its == split
                ]
            )
            for split in ("train", "val", "test")
        }

    def gather(self, sources: Sequence[Source], splits: Sequence[str]) -> Gathered:
        """Read, check, preprocess and keep volumes, and collect what is wrong with them.

        Args:
            sources: The volumes, not yet read.
            splits: ``train``, ``val`` or ``test`` for each.
        """
        return gather(
            sources,
            splits,
            self.preprocessing,
            self.sampling,
            patch_size=self.patch_size,
            classes=self.classes,
            cache=self.cache,
            folder=self.cache_dir,
            processes=self._local_processes(),
        )

    def _assigned(self, sources: list[Source]) -> list[str]:
        return assign_splits(
            sources,
            validation_share=self.validation_share,
            test_share=self.test_share,
            fold=self.fold,
            folds=self.folds,
            seed=self.seed,
        )

    @property
    def splits(self) -> list[dict[str, str]]:
        """Who trains, validates and tests: a row for each volume."""
        if self._rows is not None:
            return self._rows
        sources = self.sources()
        return split_rows(sources, self._assigned(sources))

    def train_dataloader(self) -> PatchLoader:
        """Augmented patches, shuffled over volumes; repeatable under ``seed_everything``.

        Every volume gives the same number of patches in an epoch.
        """
        plan = self._plan()
        own = Augmentation(self.augmentation)
        augmentation = None if self._on_gpu() and own.vectorized else own
        if augmentation is None:
            # only now: Lightning takes the module's hook where the data module has none
            self.on_after_batch_transfer = self._augmented_on_device
        volumes = self._volumes("train")
        batches = EpochBatches(plan)
        if volumes.passing:
            dataset: Dataset[Batch] = QueuedPatches(
                plan, volumes, self.patch_size, self.sampling, augmentation, self.num_workers
            )
            return patch_loader(dataset, batches, 0, self._on_gpu())
        dataset = CachedPatches(plan, volumes, self.patch_size, self.sampling, augmentation)
        return patch_loader(dataset, batches, self.num_workers, self._on_gpu())

    def _plan(self) -> EpochPlan:
        """The epochs of this run; a resumed run goes on with the seed that it began with."""
        seed = torch.initial_seed() if self._resumed_seed is None else self._resumed_seed
        rank, processes = self._place()
        if processes > 1 and self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)  # without a seed, each rank has its own
        self._stream_seed = seed
        return EpochPlan(
            len(self._volumes("train")),
            self.samples_per_volume,
            self.batch_size,
            seed,
            rank,
            processes,
        )

    def _augmented_on_device(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment what waits for it, then let the LightningModule do its own."""
        batch = augmented_later(batch, Augmentation(self.augmentation))
        return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same tiles of every validation volume, in the same order."""
        volumes = self._volumes("val")
        places = tiles(volumes.shapes, self.patch_size)
        return self._still(volumes, places, self.batch_size, even=True)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test volumes, whole, one by one; the validation volumes where there are none."""
        volumes = self._volumes("test") or self._volumes("val")
        return self._still(volumes, whole(volumes.shapes), 1, even=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """As for testing."""
        return self.test_dataloader()

    def _still(
        self, volumes: KeptVolumes, places: Any, batch_size: int, even: bool
    ) -> DataLoader[Batch]:
        batches = FixedBatches(len(places), batch_size, *self._place(), even=even)
        return still_loader(volumes, places, batches, self.num_workers)

    def probes(self, segment: Segment | None = None) -> list[Probe]:
        """The volumes to explain, always the same; no random number of the run is drawn.

        Files are taken whole. Otherwise they are made of the validation subjects, see
        `ProbeChoice`.

        Args:
            segment: Path of a checkpoint and a volume to classes, for probes that look for what
                a network has missed; the monitor gives it.
        """
        if isinstance(self._probes, list):
            return [spec.read(self.preprocessing) for spec in self._probes]
        choice = ProbeChoice(n=self._probes) if isinstance(self._probes, int) else self._probes
        others = chain(self._volumes("test"), self._volumes("train"))
        return chosen_probes(choice, self._volumes("val"), others, self.patch_size, segment)

    def state_dict(self) -> dict[str, Any]:
        """The seed of the epochs, for a run that nobody seeded."""
        return {} if self._stream_seed is None else {"stream_seed": self._stream_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epochs of the run that is resumed."""
        self._resumed_seed = state_dict.get("stream_seed")

    def _volumes(self, split: str) -> KeptVolumes:
        self.setup()
        return self._split[split]

    def _place(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _local_processes(self) -> int:
        if self.trainer is None:
            return self._place()[1]
        return max(1, self._place()[1] // int(getattr(self.trainer, "num_nodes", 1)))

    def _on_gpu(self) -> bool:
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        return device is not None and device.type == "cuda"
