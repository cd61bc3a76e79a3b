from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchio as tio
from scipy.stats import ks_2samp

from lightning_segxai.data.effects import add_noise_, blur_, flip_, power_, shade_, thicken_
from lightning_segxai.data.motion import move_

SHAPES = [(8, 11, 14), (13, 9, 10), (16, 16, 16), (7, 5, 24)]
SPACING_MM = (0.5, 0.75, 1.0)


def values(shape):
    return torch.randn(1, *shape)


def affine(oblique=False, spacing=SPACING_MM, origin=(-20.0, 31.0, 7.0)):
    turn = np.eye(3)
    if oblique:
        turn[:2, :2] = [[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]
        turn[:, 0] *= -1
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag(spacing)
    matrix[:3, 3] = origin
    return matrix


def by_torchio(transform, data, matrix=None):
    image = tio.ScalarImage(tensor=data.clone(), affine=affine() if matrix is None else matrix)
    return transform(image).data


def assert_same(ours, theirs, relative=1e-5):
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_flip_is_torchios(shape, axes):
    """The same voxels are reversed as by tio.Flip."""
    data = values(shape)
    theirs = by_torchio(tio.Flip(axes), data) if axes else data.clone()
    flip_(data, axes)
    torch.testing.assert_close(data, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 0.74, 1.0, 1.34, 3.0])
@pytest.mark.parametrize("make", [torch.Tensor.clone, torch.Tensor.abs, torch.zeros_like])
def test_gamma_is_torchios(gamma, make):
    """Signed, positive and constant patches get tio.Gamma's values, without a NaN."""
    data = make(values(SHAPES[0]) * 50)
    data[0, 0, 0, :3] = torch.tensor([0.0, 1e-10, 1e4])
    theirs = by_torchio(tio.Gamma(gamma), data)
    power_(data, gamma)
    torch.testing.assert_close(data, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std_mm", [(0.0, 0.4, 1.3), (0.05, 0.7, 3.0), (2.5, 0.0, 0.0)])
def test_blur_is_torchios(shape, std_mm):
    """Widths in millimeters, mirrored borders and the cut at 4 sigma are tio.Blur's."""
    data = values(shape)
    theirs = by_torchio(tio.Blur(std_mm), data)
    blur_(data, np.divide(std_mm, SPACING_MM).tolist())
    assert_same(data, theirs)


def test_blur_is_exact_where_products_of_matrices_are_not():
    """A training that asks for fast products of float32 matrices leaves the blur as it is."""
    data = values((16, 16, 16))
    fast = data.clone()
    blur_(data, (0.8, 0.8, 0.8))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        blur_(fast, (0.8, 0.8, 0.8))
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(fast, data, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (6, 1, 9)])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_bias_field_is_torchios(shape, order):
    """Exponents, their order and the range of the coordinates are tio.BiasField's."""
    count = (order + 1) * (order + 2) * (order + 3) // 6
    coefficients = np.random.default_rng(order).uniform(-0.5, 0.5, count).tolist()
    data = values(shape)
    theirs = by_torchio(tio.BiasField(coefficients, order), data)
    shade_(data, coefficients, order)
    assert_same(data, theirs)


# Where the middle lies between two slices, SimpleITK's choice hangs on a rounding
THICKER = [
    (n, downsampling)
    for n in (8, 9, 13, 22)
    for downsampling in (1.0, 1.23, 1.71, 2.6, 4.7)
    if n % 2 or int(n / downsampling) % 2 == 0
]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("n", "downsampling"), THICKER)
def test_anisotropy_is_torchios(axis, downsampling, n):
    """Kept slices, weights between them and the zeros beyond are tio.RandomAnisotropy's."""
    shape = [7, 6, 5]
    shape[axis] = n
    data = values(shape)
    transform = tio.RandomAnisotropy(axes=(axis,), downsampling=(downsampling, downsampling))
    # Spacings that are no binary fractions make TorchIO lose slices of the other axes
    theirs = by_torchio(transform, data)
    thicken_(data, axis, np.float32(downsampling).item())
    assert_same(data, theirs)


def test_thick_slices_of_a_known_row():
    """Of 6 slices at a factor of 2, those at 0.5, 2.5, 4.5 are kept, each the upper neighbor."""
    data = torch.tensor([0.0, 10.0, 20.0, 30.0, 40.0, 50.0]).view(1, 1, 1, 6)
    thicken_(data, 2, 2.0)
    assert data.flatten().tolist() == [10.0, 15.0, 25.0, 35.0, 45.0, 50.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("poses", [1, 2, 4])
@pytest.mark.parametrize("oblique", [False, True])
def test_motion_is_torchios(shape, poses, oblique):
    """Poses about the world's origin, and the spectrum composed of them, are tio.Motion's."""
    draw = np.random.default_rng(poses)
    degrees = draw.uniform(-5, 5, (poses, 3))
    shifts = draw.uniform(-2, 2, (poses, 3))
    times = (np.arange(1, poses + 1) + draw.uniform(-0.3, 0.3, poses)) / (poses + 1)
    data = values(shape)
    matrix = affine(oblique)
    theirs = by_torchio(tio.Motion(degrees, shifts, times, "linear"), data, matrix)
    move_(data, matrix, degrees, shifts, times)
    assert_same(data, theirs)


def test_motion_in_slabs_is_motion_at_once(monkeypatch):
    """How many slices are sampled together changes nothing."""
    parts, whole = (values((9, 6, 7)) for _ in range(2))
    whole.copy_(parts)
    motion = (affine(), np.full((1, 3), 3.0), np.full((1, 3), 1.0), np.array([0.3]))
    move_(whole, *motion)
    monkeypatch.setattr("lightning_segxai.data.motion._SLAB_VOXELS", 6 * 7 * 2)
    move_(parts, *motion)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_no_motion_changes_nothing():
    """Poses without a turn and a shift give the image back."""
    data = values((8, 9, 10))
    before = data.clone()
    move_(data, affine(True), np.zeros((2, 3)), np.zeros((2, 3)), np.array([0.3, 0.7]))
    torch.testing.assert_close(data, before, rtol=0, atol=1e-5)


def test_noise_is_white_and_gaussian():
    """Mean and deviation are the given ones, neighbors are independent, a seed repeats."""
    data, again = torch.zeros(1, 24, 24, 24), torch.zeros(1, 24, 24, 24)
    add_noise_(data, mean=2.0, std=0.5, seed=3)
    add_noise_(again, mean=2.0, std=0.5, seed=3)
    torch.testing.assert_close(data, again, rtol=0, atol=0)
    noise = (data - 2) / 0.5
    count = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.square().mean() - 1) < 4 * math.sqrt(2 / count)
    for axis in (1, 2, 3):
        assert abs((noise * noise.roll(1, axis)).mean()) < 4 / math.sqrt(count)
    assert ks_2samp(noise.flatten(), torch.randn(count)).pvalue > 1e-3
