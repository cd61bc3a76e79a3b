"""Baselines: what is put in place of the evidence."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter

from lightning_segxai.baselines import Baseline, draws

X = torch.randn(2, 9, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SPACING = (0.5, 1.0, 2.0)


def make(baseline, x=X, seed=0):
    return baseline.make(x, SPACING, torch.Generator().manual_seed(seed))


def test_zero_minimum_and_a_number_are_constant():
    """Zero, each channel's smallest value, and the number."""
    assert torch.equal(make(Baseline("zero")), torch.zeros_like(X))
    assert torch.equal(make(Baseline(-1.5)), torch.full_like(X, -1.5))
    assert torch.equal(make(Baseline(3)), torch.full_like(X, 3))
    lowest = make(Baseline("minimum"))
    for channel in range(2):
        assert torch.equal(lowest[channel], torch.full_like(X[0], float(X[channel].min())))


def test_blurred_is_scipys_gaussian_in_millimeters():
    """Each channel by itself; the width is in millimeters, so fewer voxels where they are long."""
    made = make(Baseline("blurred", 1.5))
    for channel in range(2):
        oracle = gaussian_filter(X[channel].numpy(), (3.0, 1.5, 0.75), mode="nearest")
        assert torch.allclose(made[channel], torch.from_numpy(oracle), atol=1e-14)


def test_a_constant_volume_is_its_own_blur():
    """The border adds nothing."""
    flat = torch.full((1, 5, 5, 5), 2.0)
    assert torch.allclose(make(Baseline("blurred", 5.0), flat), flat)


def test_noise_has_each_channels_mean_and_deviation():
    """Normal noise; the same from the same seed."""
    x = torch.randn(2, 24, 24, 24, dtype=torch.float64) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    x[1] += 10
    made = make(Baseline("noise"), x)
    for channel in range(2):
        assert abs(float(made[channel].mean() - x[channel].mean())) < 0.1 * float(x[channel].std())
        assert abs(float(made[channel].std() / x[channel].std()) - 1) < 0.05
    assert torch.equal(made, make(Baseline("noise"), x))
    assert not torch.equal(made, make(Baseline("noise"), x, seed=1))


@pytest.mark.parametrize("kind", ["blurred", "noise", "minimum", "zero", 0.5])
def test_baselines_keep_dtype_and_leave_the_volume(kind):
    """A float32 volume gets a float32 baseline, and is not touched."""
    x = X.float()
    before = x.clone()
    made = make(Baseline(kind), x)
    assert made.dtype is torch.float32
    assert made.shape == x.shape
    made.clone().zero_()
    assert torch.equal(x, before)


def test_an_unknown_word_lists_the_known_ones():
    """Misspelt kinds die when they are written, not when they are used."""
    with pytest.raises(Exception, match="blured"):
        Baseline("blured")


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_width_is_positive(sigma):
    """Nothing is blurred by nothing."""
    with pytest.raises(ValueError, match="`sigma_mm` must be positive"):
        Baseline("blurred", sigma)


def test_equal_recipes_are_one():
    """They are keys: a path is walked once for all methods that share it."""
    assert {Baseline("zero"): 1}[Baseline("zero")] == 1
    assert Baseline("blurred", 2.0) != Baseline("blurred", 3.0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_draws_are_different_baselines(count):
    """Blurs of several widths around the given one, and noises, in turn; equal calls are equal."""
    recipes = draws(count, 4.0)
    assert recipes == draws(count, 4.0)
    assert [r.blank for r in recipes] == ["blurred", "noise", "blurred", "noise", "blurred"][:count]
    assert [r.sigma_mm for r in recipes if r.blank == "blurred"] == [4.0, 2.0, 8.0][
        : (count + 1) // 2
    ]
    generator = torch.Generator().manual_seed(0)
    made = [r.make(X, SPACING, generator) for r in recipes]
    assert len({float(m[0, 0, 0, 0]) for m in made}) == count


def test_a_later_draw_is_another_noise_of_the_same_seed():
    """So that each of several noises is told by its number alone."""
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(X.shape, generator=generator, dtype=X.dtype) for _ in range(3)]
    for n, noise in enumerate(noises):
        made = make(Baseline("noise", draw=n), seed=3)
        for channel in range(2):
            expected = X[channel].mean() + X[channel].std() * noise[channel]
            assert torch.allclose(made[channel], expected, atol=1e-14)
