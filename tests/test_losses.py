"""Focal Tversky and deep supervision: known answers, limits, oracles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss, TverskyLoss
from torch import nn

from lightning_segxai.losses import DeepSupervision, FocalTverskyLoss, finest, foreground, heads

YES, NO = 1e3, -1e3  # logits of certainty


def volume(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, 1, -1)


def random_case(channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, channels, 4, 5, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(0, max(2, channels), (2, 1, 4, 5, 6), generator=generator)
    return logits, label


def test_known_answer():
    """2 hits, 1 miss, 1 false find: TI = 3/(3 + .7 + .3) = .75, and the loss is .25 ** .75."""
    loss = FocalTverskyLoss()(volume(YES, YES, NO, YES, NO), volume(1, 1, 1, 0, 0).long())
    assert float(loss) == pytest.approx(0.25**0.75, rel=1e-12)


def test_misses_weigh_more_than_false_finds():
    """At alpha .7 one miss costs 7/3 of one false find, in 1 - TI over TI."""
    linear = FocalTverskyLoss(gamma=1)
    miss = float(linear(volume(YES, NO), volume(1, 1).long()))
    found = float(linear(volume(YES, YES), volume(1, 0).long()))
    assert miss / (1 - miss) == pytest.approx(7 / 3 * found / (1 - found))


def test_the_perfect_prediction_costs_nothing_and_its_gradient_is_finite():
    """At the optimum, where the power's slope is infinite, loss and gradient are 0, not NaN."""
    for label in (volume(1, 0, 0).long(), volume(0, 0, 0).long()):
        logits = torch.where(label == 1, YES, NO).float().requires_grad_()
        loss = FocalTverskyLoss()(logits, label)
        loss.backward()
        assert float(loss.detach()) < 1e-8
        assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_alpha_beta_half_and_gamma_one_are_soft_dice():
    """With equal halves and no focus it is MONAI's soft Dice loss over the batch."""
    logits, label = random_case()
    ours = FocalTverskyLoss(alpha=0.5, beta=0.5, gamma=1, smooth=1)
    # both sides of the fraction are doubled in Dice, smoothing included
    theirs = DiceLoss(sigmoid=True, batch=True, smooth_nr=2, smooth_dr=2)
    assert float(ours(logits, label)) == pytest.approx(float(theirs(logits, label)), rel=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_gamma_one_is_monais_tversky_loss(channels):
    """Without focus it is MONAI's Tversky loss, whose alpha and beta are named the other way."""
    logits, label = random_case(channels)
    theirs = TverskyLoss(
        include_background=channels == 1,
        to_onehot_y=channels > 1,
        sigmoid=channels == 1,
        softmax=channels > 1,
        alpha=0.3,
        beta=0.7,
        smooth_nr=1,
        smooth_dr=1,
        batch=True,
    )
    assert float(FocalTverskyLoss(gamma=1)(logits, label)) == pytest.approx(
        float(theirs(logits, label)), rel=1e-12
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient(channels):
    """The gradient is the one of finite differences."""
    logits, label = random_case(channels)
    logits = logits[:1, :, :2, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: FocalTverskyLoss()(x, label[:1, :, :2, :2, :2]), logits
    )


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(0, 1e4),
    alpha=st.floats(0, 2),
    beta=st.floats(0, 2),
    gamma=st.floats(0.1, 3),
    channels=st.sampled_from([1, 2, 4]),
)
def test_between_zero_and_one(seed, scale, alpha, beta, gamma, channels):
    """Loss is in [0, 1] and its gradient finite, whatever the logits and the settings."""
    logits, label = random_case(channels, seed)
    logits = (scale * logits).requires_grad_()
    loss = FocalTverskyLoss(alpha, beta, gamma)(logits, label)
    loss.backward()
    assert 0 <= float(loss.detach()) <= 1
    assert bool(torch.isfinite(logits.grad).all())


def test_both_shapes_and_all_integer_types_of_label():
    """A label with or without its channel axis, of any integer type, gives one loss."""
    logits, label = random_case()
    loss = FocalTverskyLoss()(logits, label)
    assert torch.equal(loss, FocalTverskyLoss()(logits, label[:, 0]))
    assert torch.equal(loss, FocalTverskyLoss()(logits, label.to(torch.uint8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    """128k voxels, more than float16 can count, are summed without overflow under autocast."""
    logits = torch.full((2, 1, 40, 40, 40), 2.0, dtype=dtype)
    label = torch.ones(2, 1, 40, 40, 40, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FocalTverskyLoss(gamma=1)(logits, label)
    p = 1 / (1 + math.exp(-2))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1 - p / (p + 0.7 * (1 - p)), rel=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_probabilities_against_a_sure_truth_are_the_loss_of_logits(channels):
    """With a truth of zeros and ones, `between` is the loss of the label, bit for bit."""
    logits, label = random_case(channels)
    truth = torch.cat([label == c for c in range(1, max(2, channels))], dim=1)
    loss = FocalTverskyLoss().between(foreground(logits), truth.double())
    assert torch.equal(loss, FocalTverskyLoss()(logits, label))


def test_between_equal_maps_known_answer():
    """Of p everywhere on both sides, p (1 - p) is in error for each p of what is there."""
    for p in (0.0, 0.2, 0.5, 1.0):
        maps = torch.full((2, 1, 3, 3, 3), p, dtype=torch.float64)
        error, there = 54 * p * (1 - p), 54 * p
        expected = (error / (there + 1)) ** 0.75  # alpha + beta is 1
        assert float(FocalTverskyLoss().between(maps, maps)) == pytest.approx(expected, abs=1e-8)


def test_between_has_gradients_of_both_sides():
    """They are those of finite differences, for what was found and for the truth."""
    found, truth = (
        torch.rand(1, 2, 2, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(FocalTverskyLoss().between, (found, truth))


def test_the_finest_output_is_the_first_of_the_inputs_size():
    """Smaller outputs before it are passed over."""
    half, full, second = (torch.full((1, 1, n, n, n), float(n)) for n in (2, 4, 4))
    assert finest((half, full, second), (4, 4, 4), nn.Identity()) is full
    with pytest.raises(ValueError, match=r"\(8, 8, 8\), but `Identity` returned \(2, 2, 2\)"):
        finest(half, (8, 8, 8), nn.Identity())


def test_nan_stays_nan():
    """A NaN in the logits is a NaN of the loss, not hidden by the clamp."""
    logits, label = random_case()
    logits[0, 0, 0, 0, 0] = math.nan
    assert math.isnan(float(FocalTverskyLoss()(logits, label)))


def test_deep_supervision_is_the_weighted_sum_of_upsampled_heads():
    """Three heads are each upsampled by repetition and weighed with 1, .66 and .34."""
    torch.manual_seed(0)
    label = torch.randint(0, 2, (2, 1, 8, 8, 8))
    full, half, quarter = (torch.randn(2, 1, n, n, n).double() for n in (8, 4, 2))
    loss = FocalTverskyLoss()
    repeated = [
        logits.repeat_interleave(8 // logits.shape[2], 2)
        .repeat_interleave(8 // logits.shape[2], 3)
        .repeat_interleave(8 // logits.shape[2], 4)
        for logits in (full, half, quarter)
    ]
    expected = sum(w * loss(r, label) for w, r in zip((1, 0.66, 0.34), repeated, strict=True))
    assert torch.allclose(DeepSupervision(loss)((full, half, quarter), label), expected)


def test_deep_supervision_of_one_output_is_the_loss():
    """A single tensor, as in evaluation, goes to the loss with the first weight."""
    logits, label = random_case()
    loss = FocalTverskyLoss()
    assert torch.equal(DeepSupervision(loss)(logits, label), loss(logits, label))
    assert torch.equal(DeepSupervision(loss, (2.0,))((logits,), label), 2 * loss(logits, label))


def test_deep_supervision_takes_other_peoples_losses():
    """Any loss of logits and label can be supervised."""

    class CrossEntropy(nn.Module):
        def forward(self, logits, label):
            return F.cross_entropy(logits, label[:, 0])

    logits, label = random_case(3)
    supervised = DeepSupervision(CrossEntropy(), (1.0, 0.5))((logits, logits), label)
    assert float(supervised) == pytest.approx(1.5 * float(CrossEntropy()(logits, label)))


def test_heads_of_every_kind_of_output():
    """Tensor, tuple, list, dict and MONAI's stacked heads become one tuple of tensors."""
    a, b = torch.zeros(2, 1, 4, 4, 4), torch.ones(2, 1, 4, 4, 4)
    for outputs in ((a, b), [a, b], {"out": a, "aux": b}, torch.stack([a, b], dim=1)):
        first, second = heads(outputs)
        assert torch.equal(first, a)
        assert torch.equal(second, b)
    assert heads(a) == (a,)


@pytest.mark.parametrize("outputs", [None, (), ("logits",), torch.zeros(2, 3)])
def test_what_is_no_output_is_refused(outputs):
    """What cannot be logits is refused with what was found."""
    with pytest.raises(TypeError, match="needs to return logits of five axes"):
        heads(outputs)


def test_errors_say_what_is_needed():
    """Wrong labels, settings and numbers of heads are refused with what was found."""
    logits, label = random_case()
    with pytest.raises(ValueError, match="classes 0 to 1, but found 0 to 2"):
        FocalTverskyLoss()(logits, label + (label == 1).long())
    with pytest.raises(ValueError, match="`DeepSupervision`"):
        FocalTverskyLoss()(logits[..., :3], label)
    with pytest.raises(ValueError, match="needs two tensors of one shape"):
        FocalTverskyLoss().between(logits, logits[:, :, :2])
    with pytest.raises(ValueError, match="has 1 weights, but the network returned 2"):
        DeepSupervision(FocalTverskyLoss(), (1.0,))((logits, logits), label)
    with pytest.raises(ValueError, match="at least 0"):
        FocalTverskyLoss(alpha=-0.1)
    with pytest.raises(ValueError, match="both above 0"):
        FocalTverskyLoss(smooth=0.0)
