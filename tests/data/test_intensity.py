from __future__ import annotations

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given
from hypothesis import strategies as st

from lightning_segxai.data.intensity import ForegroundNormalization, PercentileScaling
from lightning_segxai.data.phantom import tof_phantom


def of(array):
    return tio.Subject(image=tio.ScalarImage(tensor=torch.as_tensor(array)[None].float()))


def scaled(transform, array):
    return transform(of(array))["image"].data[0].numpy()


def noise(shape=(12, 10, 9), seed=0, low=100.0, high=30.0):
    return np.random.default_rng(seed).normal(low, high, shape).astype(np.float32)


@pytest.fixture(scope="module")
def phantom():
    return tof_phantom(shape=(96, 96, 64))


def test_known_normalization():
    """The head's mean becomes 0 and its deviation 1; the air has no part in them."""
    array = np.full((4, 4, 4), 100.0, dtype=np.float32)
    array[:2] = 140
    array[0, 0] = 3  # air, below a quarter of 140
    found = scaled(ForegroundNormalization(), array)
    head = np.concatenate([np.full(32, 100.0), np.full(28, 140.0)])

    assert found[3, 0, 0] == pytest.approx((100 - head.mean()) / head.std(), rel=1e-5)
    assert found[1, 0, 0] == pytest.approx((140 - head.mean()) / head.std(), rel=1e-5)
    assert found[0, 0, 0] == pytest.approx((3 - head.mean()) / head.std(), rel=1e-5)


@given(seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1.0, 50.0]))
def test_normalization_matches_the_plain_way(seed, scale):
    """It is what NumPy gives in float64 for what is brighter than a quarter of its median."""
    numbers = np.random.default_rng(seed)
    array = (numbers.gamma(2, scale, (7, 6, 5)) * (numbers.random((7, 6, 5)) > 0.2)).astype("f4")
    bright = np.sort(array[array > np.percentile(array, 99, method="lower") / 4].ravel())
    rest = np.sort(array.ravel())[::-1].astype(np.float64)
    # the largest set of brightest voxels that leaves out what is not brighter than a quarter of
    # its median, found from above by one voxel after the other
    count = len(bright)
    while rest[count] > np.percentile(rest[:count], 50, method="lower") / 4:
        count += 1
    head = rest[:count]
    expected = (array - head.mean()) / head.std()
    assert np.allclose(scaled(ForegroundNormalization(), array), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 0, 0), (0, 0, 32), (20, 20, 20), (60, 60, 60)])
def test_air_does_not_count(phantom, shape):
    """More air around a head, up to nine tenths of all, changes its values by less than 2 %."""
    alone = scaled(ForegroundNormalization(), phantom.image)
    numbers = np.random.default_rng(0)
    larger = np.add(phantom.image.shape, shape)
    air = np.hypot(numbers.normal(0, 3, larger), numbers.normal(0, 3, larger)).astype(np.float32)
    inside = tuple(
        slice(p // 2, p // 2 + n) for p, n in zip(shape, phantom.image.shape, strict=True)
    )
    air[inside] = phantom.image
    padded = scaled(ForegroundNormalization(), air)[inside]

    # the values have a deviation of 1
    assert np.abs(padded - alone)[phantom.brain].max() < 0.02


def test_a_head_in_zeros_may_be_small():
    """Around a skull-stripped brain everything is 0, and however much of it does not count."""
    array = np.zeros((40, 40, 40), dtype=np.float32)
    array[10:20, 10:20, 10:20] = noise((10, 10, 10)).clip(30)
    brain = array[10:20, 10:20, 10:20]
    found = scaled(ForegroundNormalization(), array)[10:20, 10:20, 10:20]
    kept = brain[brain > 0].astype(np.float64)
    assert np.allclose(found, (brain - kept.mean()) / kept.std(), atol=1e-5)


def test_negative_values_are_taken_whole():
    """A volume that was scaled before is normalized by all of its voxels."""
    array = noise(low=0)
    found = scaled(ForegroundNormalization(), array)
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.0, 1e-30, 0.0])
@pytest.mark.parametrize("air", [0.0, 0.01])
def test_one_value_cannot_be_normalized(value, air, recwarn):
    """A head of one value is refused, although a rounded deviation of it may not be 0."""
    array = np.full((11, 10, 9), value, dtype=np.float32)
    array[:2] *= air
    with pytest.raises(ValueError, match="brighter than air have the same value"):
        scaled(ForegroundNormalization(), array)
    assert not recwarn


def test_nothing_is_clipped_by_default(phantom):
    """The brightest voxels keep their order and their distances; both scalings are linear."""
    order = phantom.image.ravel().argsort()[-500:]
    bright = phantom.image.ravel()[order].astype(np.float64)
    for transform in (ForegroundNormalization(), PercentileScaling()):
        found = scaled(transform, phantom.image).ravel()
        slope = (found[order[-1]] - found[order[0]]) / (bright[-1] - bright[0])
        assert np.allclose(found[order] - found[order[0]], slope * (bright - bright[0]), atol=1e-4)


def test_saturated_vessels(phantom):
    """By default no vessel voxel is cut; with the usual percentile and clipping most are."""

    def saturated(**settings):
        found = scaled(PercentileScaling(**settings), phantom.image)
        top = found == found.max()
        return top[phantom.label > 0].sum() - 1  # one voxel is the brightest anyway

    vessels = int((phantom.label > 0).sum())
    assert saturated() == 0
    assert saturated(upper=100, clip=True) == 0
    assert saturated(upper=99.5, clip=True) > 0.3 * vessels
    assert saturated(upper=99.5) == 0


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 99.95), (0, 100), (10, 60), (33.3, 66.7)])
@given(seed=st.integers(0, 30), size=st.integers(2, 12))
def test_percentiles_become_0_and_1(lower, upper, seed, size):
    """The voxels at the percentiles, as NumPy finds them, become 0 and 1, the rest linearly."""
    array = noise((size, 3, 5), seed)
    low, high = np.percentile(array, [lower, upper], method="lower")
    found = scaled(PercentileScaling(lower, upper), array)
    expected = (array.astype(np.float64) - low) / (np.float64(high) - low)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found[array == low] == pytest.approx(0)
    assert found[array == high] == pytest.approx(1)
    clipped = scaled(PercentileScaling(lower, upper, clip=True), array)
    assert np.allclose(clipped, expected.clip(0, 1), rtol=1e-5, atol=1e-5)
    assert clipped.min() == 0
    assert clipped.max() == 1


@pytest.mark.parametrize("limits", [(-1, 50), (50, 50), (60, 50), (0, 100.5), (float("nan"), 50)])
def test_percentiles_are_checked(limits):
    """Percentiles out of order or range are refused."""
    with pytest.raises(ValueError, match=r"needs 0 <= lower < upper <= 100"):
        PercentileScaling(*limits)


def test_percentiles_of_an_empty_volume():
    """Where both percentiles are one value, the reason is told."""
    array = np.zeros((20, 20, 20), dtype=np.float32)
    array[0, 0, :3] = 5
    with pytest.raises(ValueError, match=r"0\.5 and 99\.95 are both 0\. .*mostly empty"):
        scaled(PercentileScaling(), array)


@pytest.mark.parametrize("transform", [ForegroundNormalization(), PercentileScaling()])
def test_labels_and_whole_numbers(transform):
    """Labels stay; an image of whole numbers is scaled in float32; the original is not changed."""
    image = torch.arange(60, dtype=torch.int16).reshape(1, 3, 4, 5) * 10
    label = torch.ones(1, 3, 4, 5, dtype=torch.uint8)
    subject = tio.Subject(image=tio.ScalarImage(tensor=image), label=tio.LabelMap(tensor=label))
    found = transform(subject)
    assert found["image"].data.dtype is torch.float32
    assert torch.equal(found["label"].data, label)
    assert torch.equal(subject["image"].data, image)


@pytest.mark.parametrize("transform", [ForegroundNormalization(), PercentileScaling()])
def test_bits_do_not_depend_on_threads(phantom, transform):
    """One thread and two give the same bits: else a cached volume would differ from a new one."""
    one = scaled(transform, phantom.image)
    torch.set_num_threads(2)
    try:
        two = scaled(transform, phantom.image)
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    "transform", [ForegroundNormalization(), PercentileScaling(1, 99, clip=True)]
)
def test_the_history_tells_the_settings(transform):
    """TorchIO's history can do again what was done."""
    subject = of(noise())
    done = transform(subject)
    again = done.get_composed_history()(subject)
    assert torch.equal(again["image"].data, done["image"].data)
