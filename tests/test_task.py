"""SegmentationTask: windows against MONAI, scores, what is logged and saved."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchio as tio
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.metrics import compute_dice
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_segxai.losses import DeepSupervision, FocalTverskyLoss
from lightning_segxai.nets import UNet3d
from lightning_segxai.task import SegmentationTask, cldice, dice

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


class Constant(nn.Module):
    """Logits that are the input times a weight, so that a volume says what is predicted."""

    def __init__(self, channels: int = 1, heads: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.heads = heads

    def forward(self, x: Tensor) -> Any:
        logits = x * self.weight[:, None, None, None]
        return logits if self.heads == 1 else (logits,) * self.heads


def subjects(count: int = 2, size: int = 8, classes: int = 2) -> tio.SubjectsDataset:
    generator = torch.Generator().manual_seed(0)
    return tio.SubjectsDataset(
        [
            tio.Subject(
                image=tio.ScalarImage(tensor=torch.rand(1, size, size, size, generator=generator)),
                label=tio.LabelMap(
                    tensor=torch.randint(classes, (1, size, size, size), generator=generator)
                ),
            )
            for _ in range(count)
        ]
    )


def loader(**sizes: int) -> DataLoader:
    return tio.SubjectsLoader(subjects(**sizes), batch_size=2)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )


def batch_of(image: Tensor, label: Tensor) -> dict[str, Any]:
    return {"image": {"data": image}, "label": {"data": label}}


def scores(task: SegmentationTask, *batches: dict[str, Any]) -> dict[str, float]:
    [metrics] = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    ).validate(task, DataLoader(list(batches), batch_size=None), verbose=False)
    return dict(metrics)


def tube(*, at: int = 4, length: int = 12) -> Tensor:
    mask = torch.zeros(12, 9, 9, dtype=torch.bool)
    mask[:length, at - 1 : at + 2, 3:6] = True
    return mask


def test_windows_are_monais():
    """A volume by windows is MONAI's Gaussian sliding window inference, with the same network."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=3)
    for _ in range(30):  # norms of an untrained network would leave next to no signal
        net(torch.randn(2, 1, 16, 16, 16))
    net.eval()
    volume = torch.randn(1, 20, 27, 16)
    ours = SegmentationTask(net).predict_volume(volume, window=16, overlap=0.5)
    with torch.no_grad():
        theirs = sliding_window_inference(
            volume[None], (16, 16, 16), 2, net, overlap=0.5, mode="gaussian"
        )[0]
    assert (ours - theirs).abs().max() < 1e-5
    assert ours.std() > 0.1


def test_a_short_volume_is_padded_by_its_last_voxels():
    """Where the volume is shorter than the window, its far end is repeated and cropped again."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=3).eval()
    volume = torch.randn(1, 16, 10, 16)
    padded = torch.cat([volume, volume[:, :, -1:].expand(1, 16, 6, 16)], dim=2)
    with torch.no_grad():
        expected = net(padded[None])[0, :, :, :10]
    assert torch.allclose(SegmentationTask(net).predict_volume(volume, window=16), expected)


def test_prediction_leaves_the_network_as_it_was():
    """Modes, statistics of norms and gradients are those before the prediction."""
    net = UNet3d(channels=2, levels=2, supervision=())
    net.encoder[0].eval()
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    logits = SegmentationTask(net, window=8).predict_volume(torch.randn(1, 12, 8, 8))
    assert not logits.requires_grad
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_predict_step_gives_logits_without_a_label(tmp_path):
    """The Trainer predicts logits of the volumes of a batch, of a supervised network too."""
    net = UNet3d(out_channels=3, channels=2, levels=3, supervision=(1,))
    task = SegmentationTask(net, window=8)
    batches = DataLoader([{"image": {"data": torch.rand(2, 1, 12, 8, 8)}}], batch_size=None)
    [logits] = trainer(tmp_path).predict(task, batches)
    assert logits.shape == (2, 3, 12, 8, 8)


def test_dice_is_monais():
    """Dice of random masks is MONAI's."""
    torch.manual_seed(0)
    found, truth = (torch.rand(6, 7, 8) > 0.6 for _ in range(2))
    assert dice(found, truth) == pytest.approx(
        float(compute_dice(found[None, None], truth[None, None]))
    )


def test_cldice_known_answers():
    """A tube found whole has 1, found half of its length 2/3, one that runs beside it 0."""
    truth = tube()
    assert cldice(truth, truth) == 1.0
    # the half's whole centerline is right, and half of the true one is found, up to its end caps
    assert cldice(tube(length=6), truth) == pytest.approx(2 / 3, abs=0.07)
    assert cldice(tube(at=7), truth) == 0.0


def test_cldice_sees_a_gap_where_dice_does_not_see_a_thin_tube():
    """A tube of half the radius keeps its clDice of 1 where its Dice is 1/5."""
    truth = tube()
    thin = torch.zeros_like(truth)
    thin[:, 4, 4] = True
    assert cldice(thin, truth) == 1.0
    assert dice(thin, truth) == pytest.approx(2 / 10)


def test_cldice_of_a_piece_that_thinning_removes():
    """A cube of 2 voxels, of which thinning leaves nothing, is its own centerline."""
    cube = torch.zeros(6, 6, 6, dtype=torch.bool)
    cube[2:4, 2:4, 2:4] = True
    assert cldice(cube, cube) == 1.0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), filled=st.floats(0, 1))
def test_scores_are_symmetric_and_between_zero_and_one(seed, filled):
    """Both scores are in [0, 1], the same in both directions, None for empty masks only."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(5, 5, 5, generator=generator) < filled for _ in range(2))
    for score in (dice, cldice):
        value = score(a, b)
        if not (a.any() or b.any()):
            assert value is None
        else:
            assert 0 <= value <= 1
            assert value == pytest.approx(score(b, a))


def test_validation_logs_the_mean_over_volumes_that_have_a_score():
    """An empty volume predicted empty counts for the loss alone; a missed vessel counts as 0."""
    truth = tube()[None, None]
    right, empty = truth.float() * 20 - 10, torch.full((1, 1, 12, 9, 9), -10.0)
    task = SegmentationTask(Constant())
    batches = [
        batch_of(torch.cat([right, empty]), torch.cat([truth, truth]).long()),
        batch_of(empty, torch.zeros_like(truth).long()),
    ]
    metrics = scores(task, *batches)
    assert metrics["val_dice"] == pytest.approx(0.5)
    assert metrics["val_cldice"] == pytest.approx(0.5)
    losses = [float(task.loss(b["image"]["data"], b["label"]["data"])) for b in batches]
    assert metrics["val_loss"] == pytest.approx((2 * losses[0] + losses[1]) / 3, rel=1e-4)


def test_validation_without_any_vessel_is_nan():
    """Where no volume of the epoch has a score, it is NaN rather than an invented number."""
    image, label = torch.full((1, 1, 4, 4, 4), -9.0), torch.zeros(1, 1, 4, 4, 4).long()
    metrics = scores(SegmentationTask(Constant()), batch_of(image, label))
    assert math.isnan(metrics["val_dice"])
    assert math.isnan(metrics["val_cldice"])
    assert math.isfinite(metrics["val_loss"])


def test_many_classes_are_scored_one_by_one():
    """Of two foreground classes, one found and one missed, the mean Dice is one half."""
    label = torch.zeros(1, 1, 8, 8, 8).long()
    label[..., 1:4] = 1
    label[..., 5:7] = 2
    logits = torch.zeros(1, 3, 8, 8, 8)
    logits[:, 0] = 1
    logits[:, 1] = 9.0 * (label[:, 0] == 1)
    task = SegmentationTask(nn.Identity())
    metrics = scores(task, batch_of(logits, label))
    assert metrics["val_dice"] == pytest.approx(0.5)


@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (3, 3)])
@pytest.mark.parametrize("supervision", [(), (1, 2)])
def test_training_lowers_the_loss(tmp_path, classes, channels, supervision):
    """Fit runs on TorchIO batches, logs the four keys, and the loss goes down."""
    pl.seed_everything(0)
    net = UNet3d(out_channels=channels, channels=2, levels=4, supervision=supervision)
    task = SegmentationTask(net, lr=0.01)
    data = loader(classes=classes)
    before = scores(task, *data)["val_loss"]
    fit = trainer(tmp_path, max_epochs=8)
    fit.fit(task, data, data)
    assert fit.callback_metrics["val_loss"] < before
    assert set(fit.callback_metrics) == {"train_loss", "val_loss", "val_dice", "val_cldice"}


def test_a_stacked_or_foreign_loss_is_used_as_it_is():
    """A loss of MONAI takes the logits and the label b 1 i j k."""
    batch = next(iter(loader()))
    task = SegmentationTask(Constant(), loss=DiceLoss(sigmoid=True))
    expected = DiceLoss(sigmoid=True)(batch["image"]["data"], batch["label"]["data"])
    assert torch.equal(task.training_step(batch, 0), expected)


def test_the_default_loss_is_deep_supervision_of_focal_tversky():
    """Three equal outputs cost 1 + .66 + .34 times the focal Tversky loss of one."""
    batch = next(iter(loader()))
    one = FocalTverskyLoss()(batch["image"]["data"], batch["label"]["data"].long())
    assert torch.allclose(SegmentationTask(Constant(heads=3)).training_step(batch, 0), 2 * one)


def test_a_loss_of_one_output_is_refused_for_several():
    """The error says how to wrap the loss."""
    task = SegmentationTask(Constant(heads=3), loss=FocalTverskyLoss())
    with pytest.raises(ValueError, match=r"Wrap it: `DeepSupervision\(FocalTverskyLoss\(\)\)`"):
        task.training_step(next(iter(loader())), 0)


def test_nan_is_not_hidden(tmp_path):
    """A network of NaN trains to a NaN that is logged."""
    net = Constant()
    nn.init.constant_(net.weight, math.nan)
    fit = trainer(tmp_path)
    fit.fit(SegmentationTask(net), loader(), loader())
    assert math.isnan(fit.callback_metrics["train_loss"])
    assert math.isnan(fit.callback_metrics["val_loss"])


@pytest.mark.parametrize(
    ("batch", "missing", "found"),
    [
        ({"image": torch.zeros(1), "seg": torch.zeros(1)}, "image", r"\['image', 'seg'\]"),
        ({"image": {"data": torch.zeros(1, 1, 4, 4, 4)}}, "label", r"\['image'\]"),
        ([torch.zeros(1), torch.zeros(1)], "image", "list"),
    ],
)
def test_other_batches_are_refused_by_what_is_needed(batch, missing, found):
    """The error names the missing key and the keys that are there."""
    with pytest.raises(ValueError, match=rf'needs batch\["{missing}"\]\["data"\].*{found}'):
        SegmentationTask(Constant()).training_step(batch, 0)


def test_a_network_of_another_size_is_refused():
    """Logits smaller than the volume have no place in it."""
    with pytest.raises(ValueError, match=r"size of its input, \(8, 8, 8\), but `MaxPool3d`"):
        SegmentationTask(nn.MaxPool3d(2)).predict_volume(torch.rand(1, 8, 8, 8))


def test_the_checkpoint_is_loaded_without_pickle(tmp_path):
    """torch.load(weights_only=True) takes the checkpoint, which restores settings and weights."""
    task = SegmentationTask(
        UNet3d(channels=2, levels=2, supervision=()),
        DeepSupervision(FocalTverskyLoss()),
        lr=0.02,
        window=(8, 8, 8),
    )
    fit = trainer(tmp_path)
    fit.fit(task, loader(), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"lr": 0.02, "window": (8, 8, 8), "overlap": 0.5}
    again = SegmentationTask.load_from_checkpoint(
        tmp_path / "last.ckpt", net=UNet3d(channels=2, levels=2), weights_only=True
    )
    volume = torch.rand(1, 12, 8, 8)
    assert torch.equal(again.predict_volume(volume), task.predict_volume(volume))


class Phantoms(pl.LightningDataModule):
    """Something to train on for the command line."""

    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader()


def test_from_the_command_line(tmp_path, monkeypatch):
    """LightningCLI builds net and loss by class_path; the checkpoint still loads weights only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["segxai"])
    net = {
        "class_path": "lightning_segxai.nets.UNet3d",
        "init_args": {"channels": 2, "levels": 4, "supervision": [1, 2]},
    }
    loss = {
        "class_path": "lightning_segxai.losses.DeepSupervision",
        "init_args": {"loss": {"class_path": "lightning_segxai.losses.FocalTverskyLoss"}},
    }
    task = {
        "class_path": "lightning_segxai.task.SegmentationTask",
        "init_args": {"net": net, "loss": loss, "lr": 0.01, "window": 8},
    }
    quiet = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    config = {"seed_everything": 1, "trainer": quiet, "model": task}
    Path("given.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        SegmentationTask,
        Phantoms,
        subclass_mode_model=True,
        args=["fit", "--config", "given.yaml"],
    )
    assert cli.model.net.supervision == (1, 2)
    saved = torch.load(cli.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["hyper_parameters"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("name", "parameters", "heads"),
    [
        ("ds6_unet.yaml", 103_536_449, 1),
        ("ds6_unet_mss.yaml", 103_546_883, 3),
        ("ds6_attention_unet.yaml", 103_887_981, 1),
        ("ds6_deformation.yaml", 103_546_883, 3),
    ],
)
def test_the_experiments_of_ds6(name, parameters, heads):
    """Each file describes the published network, loss and training."""
    config = yaml.safe_load((EXPERIMENTS / name).read_text())

    def build(spec: dict[str, Any]) -> Any:
        package, kind = spec["class_path"].rsplit(".", 1)
        arguments = {
            key: build(value) if isinstance(value, dict) else value
            for key, value in spec.get("init_args", {}).items()
        }
        return getattr(importlib.import_module(package), kind)(**arguments)

    with torch.device("meta"):
        task = build(config["model"])
    assert sum(p.numel() for p in task.parameters()) == parameters
    assert 1 + len(task.net.supervision) == heads
    assert isinstance(task.loss, DeepSupervision) == (heads > 1)
    assert (task.consistency is not None) == (name == "ds6_deformation.yaml")
    assert (task.lr, task.window) == (0.01, (64, 64, 64))
    assert (config["trainer"]["max_epochs"], config["trainer"]["precision"]) == (50, "16-mixed")
    assert config["data"]["init_args"]["patch_size"] == 64
    assert config["data"]["init_args"]["batch_size"] == 15
