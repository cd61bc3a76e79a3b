"""Deformation-aware learning: a slow re-implementation, known answers, training that repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from scipy.ndimage import map_coordinates
from scipy.special import expit, softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_segxai.consistency import DeformationConsistency
from lightning_segxai.deformations import SplineDeformation, warp
from lightning_segxai.losses import DeepSupervision, FocalTverskyLoss, heads
from lightning_segxai.nets import UNet3d
from lightning_segxai.task import SegmentationTask

SHAPE = (12, 10, 8)
STRONG = SplineDeformation(displacement=(0.4,))


class Logits(nn.Module):
    """Probabilities that are the voxels: pointwise and linear, so that T commutes with them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.logit()


class Pattern(nn.Module):
    """The same logits whatever the volume: it cannot follow any deformation."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), *self.logits.shape[1:])


class Heads(nn.Module):
    """A convolution at full resolution, and the same at half of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.full = nn.Conv3d(1, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        logits = self.full(x)
        return logits, nn.functional.avg_pool3d(logits, 2)


def batch(classes: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 1, *SHAPE, generator=generator, dtype=dtype)
    label = torch.randint(classes, (2, 1, *SHAPE), generator=generator)
    return {"image": {"data": image}, "label": {"data": label}}


def trainer(folder: Path, epochs: int = 1, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=epochs,
        **{"enable_checkpointing": False, **settings},
    )


def loader() -> DataLoader:
    return DataLoader([batch(), batch()], batch_size=None)


def terms(net: nn.Module, consistency: DeformationConsistency, loss: nn.Module) -> list[float]:
    """What the consistency adds for the batch, in float64."""
    image, label = (batch(dtype=torch.float64)[key]["data"] for key in ("image", "label"))
    return [
        float(term.detach())
        for term in consistency.terms(net, loss, image, label, net(image), (0, 0, 0))
    ]


def slow_focal_tversky(found: np.ndarray, truth: np.ndarray) -> float:
    losses = []
    for p, y in zip(np.moveaxis(found, 1, 0), np.moveaxis(truth, 1, 0), strict=True):
        hit, missed, wrong = (p * y).sum(), ((1 - p) * y).sum(), (p * (1 - y)).sum()
        losses.append((1 - (hit + 1) / (hit + 0.7 * missed + 0.3 * wrong + 1)) ** 0.75)
    return float(np.mean(losses))


def slow_warp(volumes: Tensor, field: Tensor, order: int) -> Tensor:
    at = np.indices(field.shape[1:]) + field.numpy()
    warped = [
        [map_coordinates(v, at, order=order, mode="nearest") for v in channels]
        for channels in volumes.numpy()
    ]
    return torch.from_numpy(np.array(warped))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_a_slow_reimplementation(channels):
    """Two supervised losses and the weighted focal Tversky of p(Tx) against T p(x), by SciPy."""
    net = Heads(channels).double()
    data = batch(max(2, channels), torch.float64)
    consistency = DeformationConsistency(STRONG, weight=0.6, seed=4)
    loss = SegmentationTask(net, consistency=consistency).training_step(data, 3)

    image, label = data["image"]["data"], data["label"]["data"]
    field = consistency.draw(SHAPE, (0, 3, 0)).double()
    moved_image, moved_label = slow_warp(image, field, 1), slow_warp(label, field, 0)
    assert not torch.equal(moved_label, label)
    with torch.no_grad():
        (full, half), (moved_full, moved_half) = net(image), net(moved_image)

    def probabilities(logits: Tensor) -> np.ndarray:
        values = logits.numpy()
        return expit(values) if channels == 1 else softmax(values, axis=1)[:, 1:]

    def supervised(fine: Tensor, coarse: Tensor, truth: Tensor) -> float:
        one_hot = np.concatenate([truth.numpy() == c for c in range(1, max(2, channels))], axis=1)
        up = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        return slow_focal_tversky(probabilities(fine), one_hot) + 0.66 * slow_focal_tversky(
            probabilities(up), one_hot
        )

    difference = slow_focal_tversky(
        probabilities(moved_full),
        slow_warp(torch.from_numpy(probabilities(full)), field, 1).numpy(),
    )
    expected = supervised(full, half, label) + supervised(moved_full, moved_half, moved_label)
    assert float(loss.detach()) == pytest.approx(expected + 0.6 * difference, rel=1e-9)


def test_a_constant_prediction_known_answer():
    """Where p is everywhere the same, T changes nothing: N p (1 - p) of N p is in error."""
    for p, voxels in ((0.25, 2 * 960), (1 - 1e-12, 2 * 960)):
        pattern = torch.full((1, 1, *SHAPE), p, dtype=torch.float64).logit()
        _, difference = terms(Pattern(pattern), DeformationConsistency(STRONG), FocalTverskyLoss())
        expected = (voxels * p * (1 - p) / (voxels * p + 1)) ** 0.75
        assert difference == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_a_network_that_follows_the_deformation_has_equal_maps_on_both_sides():
    """For a pointwise linear p, p(Tx) is T p(x)."""
    consistency = DeformationConsistency(STRONG)
    image = batch(dtype=torch.float64)["image"]["data"]
    warped = warp(image, consistency.draw(SHAPE, (0, 0, 0)))
    _, difference = terms(Logits(), consistency, FocalTverskyLoss())
    expected = FocalTverskyLoss().between(warped, warped)
    assert difference == pytest.approx(float(expected), rel=1e-9)


def test_a_network_that_cannot_follow_costs_more_than_one_that_need_not():
    """A sure ball that stays where it is differs from the ball deformed; without T it does not."""
    at = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    ball = torch.where(at.norm(dim=0) < 0.7, 50.0, -50.0)[None, None].double()
    still = DeformationConsistency(SplineDeformation(displacement=(0.0,)))
    _, moved = terms(Pattern(ball), DeformationConsistency(STRONG), FocalTverskyLoss())
    deformed, kept = terms(Pattern(ball), still, FocalTverskyLoss())
    assert kept < 1e-8
    assert moved > 0.05
    data = batch(dtype=torch.float64)
    as_it_is = FocalTverskyLoss()(ball.expand(2, -1, -1, -1, -1), data["label"]["data"])
    assert deformed == pytest.approx(float(as_it_is), rel=1e-12)


def test_gradients_flow_through_both_predictions():
    """The gradient is the sum of those with one side detached, and neither of them is 0."""
    data = batch(dtype=torch.float64)
    image, label = data["image"]["data"], data["label"]["data"]
    net = nn.Conv3d(1, 1, 3, padding=1).double()
    consistency = DeformationConsistency(STRONG)

    def gradient(deformed: bool, plain: bool) -> Tensor:
        def maybe(x: Tensor) -> Tensor:
            return net(x) if deformed else net(x).detach()

        outputs = net(image) if plain else net(image).detach()
        moved = _Calls(maybe)
        _, difference = consistency.terms(
            moved, FocalTverskyLoss(), image, label, outputs, (0, 0, 0)
        )
        [found] = torch.autograd.grad(difference, [net.weight])
        return found

    both, first, second = (
        gradient(*sides) for sides in ((True, True), (True, False), (False, True))
    )
    assert torch.allclose(both, first + second)
    assert float(first.abs().max()) > 1e-3
    assert float(second.abs().max()) > 1e-3


class _Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_deformation_depends_on_seed_epoch_batch_and_rank_alone():
    """Five different ones, each the same when asked again; nothing else is drawn from."""
    before = torch.get_rng_state()
    steps = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    fields = [DeformationConsistency().draw(SHAPE, step) for step in steps]
    fields.append(DeformationConsistency(seed=1).draw(SHAPE, steps[0]))
    for n, one in enumerate(fields):
        assert all(not torch.equal(one, other) for other in fields[:n])
    torch.manual_seed(99)
    assert torch.equal(DeformationConsistency().draw(SHAPE, (0, 1, 0)), fields[2])
    torch.set_rng_state(before)
    task = SegmentationTask(Logits(), consistency=DeformationConsistency())
    task.training_step(batch(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_under_autocast_the_predictions_are_compared_in_float32():
    """The term is a float32 close to that of full precision, its gradient finite."""
    torch.manual_seed(0)
    net = Heads(1)
    image, label = batch()["image"]["data"], batch()["label"]["data"]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = net(image)
            assert (heads(outputs)[0].dtype == torch.bfloat16) is enabled
            _, difference = DeformationConsistency(STRONG).terms(
                net, DeepSupervision(FocalTverskyLoss()), image, label, outputs, (0, 0, 0)
            )
        assert difference.dtype == torch.float32
        [slope] = torch.autograd.grad(difference, [net.full.weight])
        assert bool(torch.isfinite(slope).all())
        found.append(float(difference.detach()))
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def fitted(folder: Path, epochs: int, start: Path | None = None, **settings: Any) -> Any:
    pl.seed_everything(0)
    task = SegmentationTask(UNet3d(channels=2, levels=2, supervision=()), lr=0.01, **settings)
    fit = trainer(folder, epochs)
    fit.fit(task, loader(), ckpt_path=start)
    return fit, task


def test_training_repeats_bit_for_bit_also_when_it_is_resumed(tmp_path):
    """Two epochs in one go, again, and with a stop in between give one network; T matters."""
    consistency = DeformationConsistency(STRONG)
    _, once = fitted(tmp_path, 2, consistency=consistency)
    _, again = fitted(tmp_path, 2, consistency=consistency)
    half, _ = fitted(tmp_path, 1, consistency=consistency)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fitted(tmp_path, 2, tmp_path / "half.ckpt", consistency=consistency)
    _, other = fitted(tmp_path, 2, consistency=DeformationConsistency(STRONG, seed=1))
    same = [
        [torch.equal(a, b) for a, b in zip(once.parameters(), task.parameters(), strict=True)]
        for task in (again, resumed, other)
    ]
    assert all(same[0])
    assert all(same[1])
    assert not any(same[2][:2])


def test_what_is_logged_and_saved(tmp_path):
    """train_loss is the sum, train_consistency its last term; the checkpoint needs no pickle."""
    consistency = DeformationConsistency(STRONG, FocalTverskyLoss(gamma=1), weight=2.0)
    fit, task = fitted(tmp_path, 1, consistency=consistency)
    assert set(fit.callback_metrics) == {"train_loss", "train_consistency"}
    assert 0 < fit.callback_metrics["train_consistency"] < 1
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"lr": 0.01, "window": None, "overlap": 0.5}
    again = SegmentationTask.load_from_checkpoint(
        tmp_path / "last.ckpt", net=UNet3d(channels=2, levels=2), weights_only=True
    )
    assert again.consistency is None
    volume = torch.rand(1, 8, 8, 8)
    assert torch.equal(again.predict_volume(volume), task.predict_volume(volume))


def test_without_consistency_nothing_is_added(tmp_path):
    """The loss is that of one pass, and nothing else is logged."""
    fit, _ = fitted(tmp_path, 1)
    assert set(fit.callback_metrics) == {"train_loss"}
    task, data = SegmentationTask(Logits()), batch()
    expected = task.loss(task(data["image"]["data"]), data["label"]["data"])
    assert torch.equal(task.training_step(data, 0), expected)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"class_path": "DeformationConsistency"}, DeformationConsistency()),
        (
            {
                "class_path": "DeformationConsistency",
                "init_args": {"weight": 0.5, "deformation": {"control_points": [7]}},
            },
            DeformationConsistency(SplineDeformation((7,)), weight=0.5),
        ),
        ({"seed": 3}, DeformationConsistency(seed=3)),
    ],
)
def test_from_yaml(given, made):
    """By the short name of the class, or by its arguments alone."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationTask, "model")
    init = {"net": {"class_path": "lightning_segxai.nets.UNet3d"}, "consistency": given}
    config = parser.parse_object({"model": {"class_path": "SegmentationTask", "init_args": init}})
    assert parser.instantiate_classes(config).model.consistency == made


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"weight": np.nan}, {"seed": -1}])
def test_negative_settings_are_refused(settings):
    """The error says what is needed."""
    with pytest.raises(ValueError, match="needs both to be at least 0"):
        DeformationConsistency(**settings)
