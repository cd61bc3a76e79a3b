from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchio as tio
from scipy.stats import ks_2samp

from lightning_segxai.data import vectorized
from lightning_segxai.data.vectorized import PatchImage, change, has_twin

SPACING_MM = (0.5, 0.75, 1.0)
AFFINE = np.diag([*SPACING_MM, 1.0])


def motion_of_torchio(t):
    times, *poses = t.get_params(t.degrees_range, t.translation_range, t.num_transforms)
    return np.concatenate([*(np.ravel(pose) for pose in poses), times])


# What a twin gives to its effect, and what TorchIO draws, as rows of numbers
DRAWS = {
    "flip": (
        tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.3),
        ("flip_", lambda _, axes: [axis in axes for axis in range(3)]),
        lambda t: t.get_params(t.flip_probability),
    ),
    "gamma": (
        tio.RandomGamma(log_gamma=(-0.2, 0.4)),
        ("power_", lambda _, gamma: [gamma]),
        lambda t: [t.get_params(t.log_gamma_range)],
    ),
    "noise": (
        tio.RandomNoise(mean=0.3, std=(0.1, 0.4)),
        ("add_noise_", lambda _, mean, std, seed: [mean, std]),
        lambda t: t.get_params(t.mean_range, t.std_range)[:2],
    ),
    "blur": (
        tio.RandomBlur(std=(0, 1, 0.5, 0.6, 0, 2)),
        ("blur_", lambda _, sigmas: np.multiply(sigmas, SPACING_MM)),
        lambda t: t.get_params(t.std_ranges),
    ),
    "bias": (
        tio.RandomBiasField(coefficients=0.3, order=2),
        ("shade_", lambda _, coefficients, order: coefficients),
        lambda t: t.get_params(t.order, t.coefficients_range),
    ),
    "anisotropy": (
        tio.RandomAnisotropy(axes=(0, 2), downsampling=(1.2, 3)),
        ("thicken_", lambda _, axis, downsampling: [axis, downsampling]),
        lambda t: t.get_params(t.axes, t.downsampling_range),
    ),
    "motion": (
        tio.RandomMotion(degrees=(1, 3), translation=2, num_transforms=3),
        ("move_", lambda _, __, *drawn: np.concatenate([np.ravel(d) for d in drawn])),
        motion_of_torchio,
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_parameters_are_distributed_as_torchios(name, monkeypatch):
    """Each parameter of a twin and of TorchIO comes from one distribution."""
    transform, (effect, row), theirs = DRAWS[name]
    drawn = []
    monkeypatch.setattr(vectorized, effect, lambda *a, **k: drawn.append(row(*a, **k)))
    patch = [PatchImage("image", torch.rand(1, 2, 2, 2), AFFINE, scalar=True)]
    for seed in range(1000):
        change(transform, patch, np.random.default_rng(seed))
    ours = np.array(drawn, float)
    expected = np.array([theirs(transform) for _ in range(1000)], float)
    assert ours.shape == expected.shape
    for one, other in zip(ours.T, expected.T, strict=True):
        assert ks_2samp(one, other, method="asymp").pvalue > 1e-3
    if ours.shape[1] > 1:
        mixed = np.corrcoef(ours.T) - np.eye(ours.shape[1])
        assert np.abs(mixed).max() < 0.15


@pytest.mark.parametrize("p", [0, 0.3, 1])
def test_a_transform_is_applied_as_often_as_its_probability(p):
    """The share of changed patches is p, and exactly none or all at 0 and 1."""
    transform = tio.RandomGamma(log_gamma=(0.5, 1), p=p)
    changed = 0
    for seed in range(1000):
        data = torch.full((1, 1, 1, 1), 2.0)
        patch = [PatchImage("image", data, AFFINE, scalar=True)]
        change(transform, patch, np.random.default_rng(seed))
        changed += data.item() != 2
    assert abs(changed - 1000 * p) <= 4 * math.sqrt(1000 * p * (1 - p))


def test_a_flip_moves_labels_too_and_other_twins_do_not():
    """Label and image stay on each other; intensities alone get gamma and thick slices."""
    label = torch.randint(0, 3, (1, 6, 5, 4), dtype=torch.uint8)
    image = label.float()
    before = label.clone()
    patch = [
        PatchImage("image", image, AFFINE, True),
        PatchImage("label", label, AFFINE, False),
    ]
    change(tio.RandomFlip(axes=(0, 2), flip_probability=1), patch, np.random.default_rng(0))
    assert torch.equal(label, before.flip(1, 3))
    assert torch.equal(image, label.float())
    moved = label.clone()
    for transform in (tio.RandomGamma((0.5, 1)), tio.RandomAnisotropy(axes=2)):
        change(transform, patch, np.random.default_rng(0))
    assert torch.equal(label, moved)
    assert not torch.equal(image, label.float())


def test_images_are_included_and_excluded_by_name():
    """A transform's include and exclude choose among the images of the patch."""
    for settings, changed in (
        ({"include": ["image"]}, (True, False)),
        ({"exclude": ["image"]}, (False, True)),
    ):
        data = [torch.full((1, 2, 2, 2), 2.0) for _ in range(2)]
        patch = [
            PatchImage(name, one, AFFINE, True)
            for name, one in zip(("image", "weights"), data, strict=True)
        ]
        change(tio.RandomGamma((0.5, 1), **settings), patch, np.random.default_rng(0))
        assert tuple(bool((one != 2).all()) for one in data) == changed


class OwnGamma(tio.RandomGamma):
    """Whatever it does, it has no twin."""


@pytest.mark.parametrize(
    "transform",
    [
        OwnGamma(),
        tio.RandomFlip(axes=("left",)),
        tio.RandomGamma(keep={"image": "before"}),
        tio.RandomAnisotropy(scalars_only=False),
        tio.RandomAnisotropy(image_interpolation="bspline"),
        tio.RandomMotion(image_interpolation="nearest"),
        tio.RandomAffine(),
        tio.Compose([tio.RandomFlip()]),
    ],
    ids=lambda transform: transform.name,
)
def test_other_transforms_and_settings_have_no_twin(transform):
    """What a twin would not do alike is left to TorchIO."""
    assert not has_twin(transform)


@pytest.mark.parametrize("transform", [t for t, *_ in DRAWS.values()], ids=list(DRAWS))
def test_changes_stay_in_the_memory_and_the_type_of_the_batch(transform):
    """Twins write into the patch, several channels of half precision included."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        data = torch.rand(2, 6, 7, 8).to(dtype)
        before = data.clone()
        patch = [PatchImage("image", data, AFFINE, scalar=True)]
        for seed in range(4):
            change(transform, patch, np.random.default_rng(seed))
        assert data.isfinite().all()
        assert not torch.equal(data, before)
