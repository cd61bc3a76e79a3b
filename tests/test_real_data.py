"""What must hold on real volumes; they are not part of the project, and without them this skips."""

from __future__ import annotations

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from scipy import ndimage
from torch import Tensor, nn

from lightning_segxai.callback import AttributionMonitor
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.probes import ProbeFile, read_probe
from lightning_segxai.data.subjects import PhantomCohort
from lightning_segxai.examine import examine, measure
from lightning_segxai.focus.location import MassInside
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.nets import UNet3d
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.task import SegmentationTask

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("SEGXAI_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
IMAGE = DATA / "topcow_066_crop_mra.nii.gz"
LABEL = DATA / "topcow_066_crop_binseg.nii.gz"
MANUAL = DATA / "ds003949_sub-000_vessel_manual.nii.gz"  # stored RAS
OTHER = DATA / "HQA_Subject0001_vessel_gt.nii.gz"  # stored LPS

pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in (IMAGE, LABEL, MANUAL, OTHER)),
    reason=f"the real volumes are not in {DATA}; SEGXAI_SHARED_DATA names another folder",
)


class Above(nn.Module):
    """One logit: by how much a voxel exceeds ``cut``. It looks at nothing but those that do."""

    def __init__(self, cut: float = 8.0) -> None:
        super().__init__()
        self.cut = cut
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x - self.cut).relu() - 0.05


def voxels_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def preprocessing():
    return MRADataModule(phantom=PhantomCohort(subjects=2)).preprocessing


def z_scores(image: np.ndarray) -> np.ndarray:
    """The data module's scaling, again: mean and deviation of the head.

    The head is the one set of brightest voxels that holds just what is brighter than a quarter of
    its own median.
    """
    voxels = image.astype(np.float64)
    ranked = np.sort(voxels, axis=None)[::-1]
    counts = np.arange(1, ranked.size)
    levels = ranked[counts // 2] / 4
    (count,) = counts[(ranked[counts - 1] > levels) & (levels >= ranked[counts])]
    assert count < 0.99 * ranked.size  # the crop has air, so that another scaling would be told
    return (voxels - ranked[:count].mean()) / ranked[:count].std()


@pytest.fixture(scope="module")
def crop():
    return read_probe(IMAGE, label=LABEL, name="real-crop", preprocessing=preprocessing())


def test_the_crop_becomes_a_probe_in_ras(crop) -> None:
    """A volume stored LPS is turned; size and spacing stay, and the label comes along."""
    assert nib.aff2axcodes(nib.load(IMAGE).affine) == ("L", "P", "S")
    assert nib.aff2axcodes(crop.affine) == ("R", "A", "S")
    assert tuple(crop.image.shape) == (1, 140, 123, 34)
    assert crop.spacing_mm == pytest.approx((0.296875, 0.296875, 0.6), abs=1e-4)
    assert int(crop.label.sum()) == int((voxels_of(LABEL) > 0).sum())


def test_every_voxel_of_the_crop_keeps_its_place_in_the_world(crop) -> None:
    """The probe holds, where its affine says a voxel is, what the file holds there."""
    file = nib.load(IMAGE)
    there = np.random.default_rng(0).integers(0, file.shape, size=(200, 3))
    world = nib.affines.apply_affine(file.affine, there)
    here = nib.affines.apply_affine(np.linalg.inv(crop.affine), world).round().astype(int)
    found = crop.image[0].numpy()[tuple(here.T)]

    np.testing.assert_allclose(found, z_scores(voxels_of(IMAGE))[tuple(there.T)], atol=1e-3)
    np.testing.assert_array_equal(
        crop.label.numpy()[tuple(here.T)], voxels_of(LABEL)[tuple(there.T)] > 0
    )


def test_the_crop_is_examined_by_windows(crop) -> None:
    """Windows of the training patch give finite maps on the crop's own grid."""
    net = UNet3d(channels=2, levels=2)
    maps = examine(
        net,
        [crop],
        {"vessel": ClassEvidence(1)},
        {"saliency": Saliency(), "ig": IntegratedGradients(steps=2)},
        window=32,
        overlap=0.0,
    )

    assert [a.status for a in maps] == ["ok", "ok"]
    for a in maps:
        assert tuple(a.values.shape) == tuple(a.prediction.shape) == (140, 123, 34)
        assert bool(torch.isfinite(a.values).all())
        assert bool(a.values.any())
        assert torch.equal(a.region, crop.label > 0)
    inside = [r.value for r in measure(maps, {"inside": MassInside()}) if r.metric == "inside"]
    assert all(0 < value < 1 for value in inside)


def test_windows_leave_no_seam_on_the_crop(crop) -> None:
    """A network without a field of view looks the same by overlapping windows as whole."""
    net, targets = Above(2.0), {"vessel": ClassEvidence(1)}
    methods = {"saliency": Saliency()}
    (whole,) = examine(net, [crop], targets, methods)
    (tiled,) = examine(net, [crop], targets, methods, window=32)

    torch.testing.assert_close(tiled.values, whole.values, rtol=1e-5, atol=0)
    assert torch.equal(tiled.prediction, whole.prediction)


@pytest.fixture(scope="module")
def explained(tmp_path_factory) -> Path:
    """What `segxai explain` wrote of the crop, for a network that sees the brightest voxels."""
    from lightning_segxai.cli import main

    here = tmp_path_factory.mktemp("explain")
    config = {
        "model": {
            "class_path": "lightning_segxai.SegmentationTask",
            "init_args": {"net": {"class_path": f"{__name__}.Above", "init_args": {"cut": 8.0}}},
        },
        "data": {
            "class_path": "lightning_segxai.MRADataModule",
            "init_args": {"phantom": {"subjects": 2}, "patch_size": 32},
        },
        "segxai": {"methods": {"saliency": {"class_path": "lightning_segxai.Saliency"}}},
    }
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    weights = SegmentationTask(Above()).state_dict()
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 120}, here / "last.ckpt")
    asked = {"config": here / "config.yaml", "ckpt": here / "last.ckpt", "out": here / "out"}
    asked |= {"image": IMAGE, "label": LABEL}
    main(["explain", *(part for k, v in asked.items() for part in (f"--{k}", str(v)))])
    return here / "out"


def test_explain_writes_maps_on_the_grid_of_the_file(explained) -> None:
    """Map and prediction have the file's shape and affine, stored LPS like the file."""
    file = nib.load(IMAGE)
    for path in ("maps/vessel/saliency.nii.gz", "prediction.nii.gz"):
        written = nib.load(explained / path)
        assert written.shape == file.shape
        np.testing.assert_allclose(written.affine, file.affine, atol=1e-4)
        assert nib.aff2axcodes(written.affine) == ("L", "P", "S")
        np.testing.assert_allclose(written.header.get_zooms(), file.header.get_zooms(), rtol=1e-5)


def test_explain_puts_every_voxel_of_a_map_where_it_was_in_the_file(explained) -> None:
    """The saliency of a network that sees only bright voxels marks the file's bright vessels."""
    scores, vessel = z_scores(voxels_of(IMAGE)), voxels_of(LABEL) > 0
    clear = np.abs(scores - 8.0) > 1e-3  # elsewhere float32 may decide
    marked = nib.load(explained / "maps/vessel/saliency.nii.gz").get_fdata()
    expected = (scores > 8.0) & vessel

    assert 50 < expected.sum() < 0.2 * vessel.sum()
    assert not np.array_equal(expected, expected[::-1, ::-1])  # a turned map would be told
    np.testing.assert_array_equal((marked > 0)[clear], expected[clear])
    np.testing.assert_allclose(marked[marked > 0], 1 / vessel.sum(), rtol=1e-4)
    brightest = np.unravel_index(np.where(vessel, scores, 0).argmax(), scores.shape)
    assert marked[brightest] > 0


def test_explain_puts_the_prediction_where_it_was_in_the_file(explained) -> None:
    """What the network says is vessel is what is bright in the file, voxel by voxel."""
    scores = z_scores(voxels_of(IMAGE))
    clear = np.abs(scores - 8.05) > 1e-3
    predicted = voxels_of(explained / "prediction.nii.gz") > 0

    np.testing.assert_array_equal(predicted[clear], (scores > 8.05)[clear])


def test_explain_writes_a_picture_and_records(explained) -> None:
    """The panel is a picture, and the records name the checkpoint's moment."""
    assert (explained / "panel.png").read_bytes().startswith(b"\x89PNG")
    header, first, *_ = (explained / "records.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (row["epoch"], row["step"]) == ("3", "120")


@pytest.fixture(scope="module", params=[MANUAL, OTHER], ids=["RAS", "LPS"])
def painted(request, tmp_path_factory) -> tuple[Path, Path]:
    """A box of a manual label, and the subjects that `experiments/painted.py` makes of it."""
    spec = spec_from_file_location("painted", REPOSITORY / "experiments" / "painted.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    here = tmp_path_factory.mktemp("painted")
    box = nib.load(request.param).slicer[90:250, 140:300, 10:90]
    nib.save(box, here / "label.nii.gz")
    asked = ["--label", here / "label.nii.gz", "--out", here / "root", "--volumes", 2]
    assert script.main([str(part) for part in (*asked, "--crop", 64, 48, 40)]) == 0
    return here / "label.nii.gz", here / "root"


def test_painted_vessels_are_brighter_than_what_surrounds_them(painted) -> None:
    """Nine vessel voxels in ten outshine nine in ten of the tissue two to four voxels off."""
    for path in sorted((painted[1] / "images").iterdir()):
        image = voxels_of(path)
        vessel = voxels_of(painted[1] / "labels" / path.name) > 0
        near, far = (ndimage.binary_dilation(vessel, iterations=n) for n in (2, 4))

        assert np.percentile(image[vessel], 10) > 1.3 * np.percentile(image[far & ~near], 90)
        assert np.median(image[vessel]) > 3 * np.median(image[far & ~near])


def test_painted_subjects_lie_where_their_label_was_and_apart(painted) -> None:
    """Each is a box of the label at its place in the world, and no two share a voxel."""
    source = nib.load(painted[0])
    used = np.zeros(source.shape, dtype=int)
    for path in sorted((painted[1] / "labels").iterdir()):
        file = nib.load(path)
        assert nib.load(painted[1] / "images" / path.name).shape == file.shape == (64, 48, 40)
        np.testing.assert_array_equal(
            nib.load(painted[1] / "images" / path.name).affine, file.affine
        )
        here = np.indices(file.shape).reshape(3, -1).T
        world = nib.affines.apply_affine(file.affine, here)
        there = nib.affines.apply_affine(np.linalg.inv(source.affine), world).round().astype(int)
        used[tuple(there.T)] += 1
        expected = np.asarray(source.dataobj)[tuple(there.T)] > 0
        np.testing.assert_array_equal(np.asarray(file.dataobj).reshape(-1) > 0, expected)
        assert expected.any()

    assert used.max() == 1


def test_painted_subjects_are_what_the_data_module_reads(painted) -> None:
    """Training and validation find their patches, at the label's spacing."""
    data = MRADataModule(root=painted[1], patch_size=32, probes=2)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    (first, second) = data.probes()

    assert tuple(batch["image"]["data"].shape[1:]) == (1, 32, 32, 32)
    assert first.name != second.name
    zooms = nib.load(painted[0]).header.get_zooms()
    assert first.spacing_mm == pytest.approx([float(z) for z in zooms], rel=1e-4)


def test_a_training_on_painted_vessels_is_watched_on_the_real_crop(painted, tmp_path) -> None:
    """The crop is a probe by windows: a picture and finite maps, before and after the training."""
    monitor = AttributionMonitor(
        probes=[ProbeFile(str(IMAGE), str(LABEL), "crop")],
        methods={"saliency": Saliency()},
        window=(64, 64, 36),
        sinks=[],
    )
    data = MRADataModule(root=painted[1], patch_size=16, samples_per_volume=4, probes=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[monitor],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="costs"):
        trainer.fit(SegmentationTask(UNet3d(channels=2, levels=2)), datamodule=data)

    folder = monitor.run.folder
    rows = folder.read_records()
    steps = sorted({row.step for row in rows})
    assert steps == [0, trainer.global_step]
    assert {row.status for row in rows if row.metric in ("dice", "mass_inside")} == {"ok"}
    for epoch, step in ((0, step) for step in steps):
        map_ = folder.read_nifti(folder.map_path("crop", "vessel", "saliency", epoch, step))
        assert tuple(map_.shape) == (140, 123, 34)
        assert bool(torch.isfinite(map_).all())
        assert float(map_.sum()) > 0
        assert folder.panel_path("crop", epoch, step).is_file()
