"""Deletion and insertion: known answers, a plain loop, properties."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from held import (
    Functional,
    a_volume,
    hidden_of,
    map_of,
    model_of,
    plain_score,
    random_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nets_for_tests import Counting, Weigh, a_probe, blended, layered, seeded
from torch import nn

from lightning_segxai.faithfulness.base import together
from lightning_segxai.faithfulness.deletion import Deletion, Insertion, Ranking
from lightning_segxai.targets import ClassEvidence, ClassMargin

BOTH = pytest.mark.parametrize("kind", [Deletion, Insertion])
SHAPE = (3, 4, 2)
coarse = hnp.arrays(np.int8, SHAPE, elements=st.integers(-3, 3))


def plain_kept(values, steps, deletes):
    """How much of each voxel is there at each point, counted voxel by voxel."""
    flat = values.flatten().tolist()
    for n in range(steps + 1):
        count = n * len(flat) / steps
        first = []
        for a in flat:
            above, tied = sum(b > a for b in flat), sum(b == a for b in flat)
            first.append(min(1.0, max(0.0, (count - above) / tied)))
        kept = [1 - f for f in first] if deletes else first
        yield torch.tensor(kept, dtype=torch.float64).reshape(values.shape)


def plain_area(curve):
    return sum((a + b) / 2 for a, b in pairwise(curve)) / (len(curve) - 1)


def perturbed(metric, probe, values):
    behind = hidden_of(probe, metric.baseline, metric.sigma_mm)
    for kept in plain_kept(values, metric.steps, isinstance(metric, Deletion)):
        yield behind + kept * (probe.image - behind)


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("window", [None, (6, 4, 4)], ids=["whole", "windows"])
@pytest.mark.parametrize("baseline", ["blurred", "noise", 0.5])
@BOTH
def test_the_area_is_that_of_a_plain_loop(kind, baseline, window, tied):
    """Every voxel counted, every window blended; steps that do not divide the voxels."""
    probe = a_probe((6, 4, 8), 2, spacing_mm=(1.0, 1.0, 2.0))
    net, metric = layered(2), kind(5, baseline, sigma_mm=2.0)
    model = model_of(net, probe, ClassMargin(1, 0), window=window)
    values = random_values(probe.shape)
    values = values.round() if tied else values
    scores = [plain_score(net, x, model.weights, window) for x in perturbed(metric, probe, values)]
    whole, bare = (
        plain_score(net, x, model.weights, window)
        for x in (probe.image, hidden_of(probe, baseline, 2.0))
    )
    curve = [(s - bare) / (whole - bare) for s in scores]

    assert metric.curve(model, map_of(model, values)).tolist() == pytest.approx(curve, abs=1e-10)
    found = metric.assess(model, map_of(model, values))
    assert found == pytest.approx(plain_area(curve), abs=1e-10)
    ends = curve if kind is Deletion else curve[::-1]
    assert (ends[0], ends[-1]) == pytest.approx((1.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("window", [None, (6, 4, 4)], ids=["whole", "windows"])
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
@BOTH
def test_dice_is_that_of_a_plain_loop(kind, outputs, window):
    """The perturbed probabilities against the unperturbed prediction, over the whole volume."""
    probe = a_probe((6, 4, 8))
    net, metric = layered(1, 3 if outputs == "softmax" else 2), kind(4, "noise", "dice")
    model = model_of(net, probe, ClassEvidence(2, "everywhere"), window=window, outputs=outputs)
    values = random_values(probe.shape)
    mapped = map_of(model, values)
    mask = mapped.prediction == 2
    assert 0 < int(mask.sum()) < mask.numel()
    curve = []
    with torch.no_grad():
        for x in perturbed(metric, probe, values):
            logits = blended(net, x, window)
            p = logits.softmax(0)[2] if outputs == "softmax" else logits[1].sigmoid()
            curve.append(float(2 * p[mask].sum() / (p.sum() + mask.sum())))

    assert metric.assess(model, mapped) == pytest.approx(plain_area(curve), abs=1e-10)


def test_dice_of_one_channel_is_that_of_its_sigmoid():
    """A background of zeros is no second opinion; the threshold moves the mask only."""
    probe = a_probe()
    net = Weigh(3.0)
    model = model_of(net, probe, threshold=0.7)
    curve = Deletion(1, "zero", "dice").curve(model, map_of(model, random_values(probe.shape)))
    for x, found in zip((probe.image, probe.image * 0), curve.tolist(), strict=True):
        p, mask = (3 * x[0]).sigmoid(), (3 * probe.image[0]).sigmoid() > 0.7
        expected = float(2 * p[mask].sum() / (p.sum() + mask.sum()))
        assert found == pytest.approx(expected, abs=1e-12)


def test_dice_of_two_classes_is_their_mean():
    """The classes that the target speaks for, where both are predicted."""
    probe = a_probe()

    class Both(ClassEvidence):
        def weights(self, probe, logits):
            return torch.ones_like(logits) * torch.tensor([-1.0, 1, 1])[:, None, None, None]

    net = layered(1, 3)
    both = model_of(net, probe, Both())
    values = random_values(probe.shape)
    each = [
        Deletion(3, by="dice").assess(
            model_of(net, probe, ClassEvidence(c, "everywhere")), map_of(both, values)
        )
        for c in (1, 2)
    ]
    found = Deletion(3, by="dice").assess(both, map_of(both, values))
    assert found == pytest.approx(sum(each) / 2, abs=1e-12)


@BOTH
def test_what_was_not_predicted_has_no_dice(kind):
    """Nothing to overlap with."""
    probe = a_volume(torch.rand(4, 4, 4))
    model = model_of(Weigh(0.0, -1.0), probe)
    assert kind(by="dice").assess(model, map_of(model, random_values((4, 4, 4)))) is None


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_of_a_linear_network_it_has_a_closed_form(steps):
    """Effects 4, 3, 2, 1 ...: the curve is what is left of their sum."""
    image = torch.arange(16, 0, -1).reshape(4, 2, 2)
    model = model_of(Weigh(0.0, 2.0), a_volume(image))
    exact = map_of(model, 2.0 * image)
    total = 16 * 17 / 2
    curve = [(16 - m) * (17 - m) / 2 / total for m in range(0, 17, 16 // steps)]
    found = Deletion(steps, "zero").curve(model, exact)
    assert found.tolist() == pytest.approx(curve, abs=1e-12)
    grown = Insertion(steps, "zero").curve(model, exact)
    assert grown.tolist() == pytest.approx([1 - c for c in curve], abs=1e-12)
    mirrored = Deletion(steps, "zero").assess(model, map_of(model, -2.0 * image))
    assert mirrored == pytest.approx(1 - plain_area(curve), abs=1e-12)


@pytest.mark.parametrize("steps", [4, 16, 27])
def test_a_cause_of_one_voxel_goes_with_the_first_step(steps):
    """The right map: all at once. The opposite one: at the last."""
    image = torch.rand(3, 3, 3) + 1
    cause = torch.zeros(3, 3, 3)
    cause[1, 0, 2] = 1.0
    model = model_of(Functional(lambda x: 7 * x[0, 1, 0, 2] ** 3), a_volume(image))
    # the others distinct, so that no plateau fades
    right = map_of(model, cause + random_values((3, 3, 3)) * 1e-3)
    opposite = map_of(model, -right.values)
    one = pytest.approx(0.5 / steps, abs=1e-12)
    assert Deletion(steps, "zero").assess(model, right) == one
    assert 1 - Insertion(steps, "zero").assess(model, right) == one
    assert 1 - Deletion(steps, "zero").assess(model, opposite) == one
    assert Insertion(steps, "zero").assess(model, opposite) == one
    assert Deletion(steps, "zero").curve(model, right).tolist()[1:] == [0.0] * steps


@BOTH
def test_a_flat_map_fades_the_whole_volume(kind):
    """A half on a linear network: no voxel comes before another."""
    model = model_of(Weigh(0.0, 2.0), a_probe((3, 5, 2)))
    flat = map_of(model, torch.full((3, 5, 2), -4.0))
    assert kind(7).assess(model, flat) == pytest.approx(0.5, abs=1e-12)


def test_what_speaks_against_goes_last():
    """Ranked by sign: a network is helped by the loss of what speaks against."""
    image = torch.tensor([[[5.0, 1.0, -4.0, 0.5]]])
    model = model_of(Weigh(0.0, 1.0), a_volume(image))
    found = Deletion(4, "zero").curve(model, map_of(model, image))
    assert found.tolist() == pytest.approx([1.0, -2.5 / 2.5, -3.5 / 2.5, -4 / 2.5, 0.0])
    grown = Insertion(4, "zero").curve(model, map_of(model, image))
    assert grown.tolist() == pytest.approx([0.0, 5 / 2.5, 6 / 2.5, 6.5 / 2.5, 1.0])


@pytest.mark.parametrize("net", [Weigh(0.0, 0.0, bias=3.0), Weigh(0.0, 1e-9, bias=1e3)])
@BOTH
def test_a_baseline_that_says_the_same_gives_nothing(kind, net):
    """No difference to normalize by."""
    model = model_of(net, a_probe())
    assert kind().assess(model, map_of(model, random_values((8, 8, 8)))) is None


@settings(max_examples=40)
@given(values=coarse, count=st.floats(0, math.prod(SHAPE)))
def test_the_first_voxels_are_as_many_as_asked(values, count):
    """Also a fraction of one; higher values before lower ones, and equal ones alike."""
    values = torch.from_numpy(values).double()
    first = Ranking.of(values).top(count)
    assert float(first.sum()) == pytest.approx(count, abs=1e-9)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    for level in values.unique():
        assert len(first[values == level].unique()) == 1
        higher, lower = first[values > level], first[values <= level]
        if len(higher):
            assert float(higher.min()) >= float(lower.max())


@settings(max_examples=25)
@given(values=coarse, scale=st.floats(0.01, 100), by=st.sampled_from(["score", "dice"]))
def test_properties(values, scale, by):
    """Scale does not count; deletion of the negative is insertion; a dice stays in its bounds."""
    probe = a_probe(SHAPE)
    model = model_of(seeded(nn.Conv3d(1, 2, 3, padding=1)), probe)
    values = torch.from_numpy(values).double()

    def found(kind, values):
        return kind(5, by=by).assess(model, map_of(model, values))

    area = found(Deletion, values)
    assert area == pytest.approx(found(Deletion, values * scale), abs=1e-10)
    assert area == pytest.approx(found(Insertion, -values), abs=1e-10)
    low, high = Deletion(by=by).range
    assert low <= area <= high


@pytest.mark.parametrize("by", ["score", "dice"])
@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
@BOTH
def test_a_flipped_world_is_the_same(kind, axes, by):
    """Volume and map together, ties and all: the order in memory does not count."""
    probe = a_probe((5, 4, 6))
    net = seeded(nn.Sequential(nn.Conv3d(1, 3, 1), nn.Tanh(), nn.Conv3d(3, 2, 1)))
    values = random_values(probe.shape).round()
    model = model_of(net, probe)
    flipped = model_of(net, a_volume(probe.image[0].flip(axes)))
    assert kind(7, by=by).assess(flipped, map_of(flipped, values.flip(axes))) == pytest.approx(
        kind(7, by=by).assess(model, map_of(model, values)), abs=1e-10
    )


@pytest.mark.parametrize("looks_per_pass", [1, 3, 64, "auto"])
@BOTH
def test_the_batch_does_not_count(kind, looks_per_pass):
    """Points go through the network together, or one by one."""
    probe = a_probe((8, 8, 4))
    model = model_of(layered(), probe, looks_per_pass=looks_per_pass)
    alone = model_of(layered(), probe, looks_per_pass=2)
    for by in ("score", "dice"):
        mapped = map_of(model, random_values(probe.shape))
        assert kind(by=by).assess(model, mapped) == pytest.approx(
            kind(by=by).assess(alone, mapped), abs=1e-10
        )


@pytest.mark.parametrize(
    ("window", "looks_per_pass", "volumes"),
    [(None, 5, 5), (4, 16, 2), (4, 3, 1), (None, "auto", 8)],
)
def test_no_more_volumes_are_made_than_fill_a_pass(window, looks_per_pass, volumes):
    """Eight windows of half an edge cover the volume, without overlap."""
    window = None if window is None else (window,) * 3
    settings = {"window": window, "overlap": 0.0, "looks_per_pass": looks_per_pass}
    assert together(model_of(layered(), a_probe(), **settings)) == volumes


@pytest.mark.parametrize("by", ["score", "dice"])
@pytest.mark.parametrize("window", [None, (8, 8, 8)])
@BOTH
def test_the_cost_is_what_is_counted(kind, window, by):
    """Forward only: each point and window once."""
    probe, net = a_probe((8, 8, 12)), Counting(layered())
    model = model_of(net, probe, window=window)
    mapped = map_of(model, random_values(probe.shape))
    before = net.counts["forward"]
    metric = kind(6, by=by)
    assert metric.assess(model, mapped) is not None
    passes = metric.passes((8, 8, 12), len(model.windows.places))
    assert net.counts["forward"] - before == passes.forward == 7 * len(model.windows.places)
    assert net.counts["backward"] == passes.backward == 0


def test_single_precision_is_near():
    """As networks are trained."""
    probe = a_probe((8, 8, 8))
    small = a_volume(probe.image[0])
    object.__setattr__(small, "image", probe.image.float())
    values = random_values(probe.shape)
    double, single = model_of(layered(), probe), model_of(layered().float(), small)
    assert Deletion().assess(single, map_of(single, values.float())) == pytest.approx(
        Deletion().assess(double, map_of(double, values)), abs=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "(steps=0)` must be at least 1"),
        ({"baseline": math.inf}, "`baseline=inf` must be a finite number"),
        ({"sigma_mm": 0.0}, "`sigma_mm` must be positive"),
    ],
)
@BOTH
def test_wrong_settings_die_at_once(kind, arguments, message):
    """When the metric is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**arguments)


@BOTH
def test_another_yardstick_is_refused(kind):
    """Also where nobody checks types."""
    metric = kind()
    object.__setattr__(metric, "by", "iou")
    with pytest.raises(ValueError, match=r"\(by='iou'\)` must be one of score, dice"):
        metric.check()


def test_a_reader_is_told_the_direction():
    """Deletion is better when lower, insertion when higher."""
    assert Deletion().higher_is_better is False
    assert Insertion().higher_is_better is True
    assert "compare with random" in Deletion().reading
    assert Insertion().unit == "1"
