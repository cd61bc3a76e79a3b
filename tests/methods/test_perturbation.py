"""Methods that hide supervoxels: known answers, Captum on the volume itself, and what they cost."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from captum import attr
from captum._utils.models.linear_model import SkLearnLasso
from nets_for_tests import Counting, Hungry, Weigh, a_probe, blended, close, layered, linear_net
from torch import nn

from lightning_segxai.baselines import Baseline
from lightning_segxai.explain import explain
from lightning_segxai.methods.base import Complete
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.perturbation import (
    FeatureAblation,
    FeaturePermutation,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyValueSampling,
)
from lightning_segxai.methods.perturbation.ablation import drawn
from lightning_segxai.methods.rise import RISE
from lightning_segxai.methods.supervoxels import per_voxel, supervoxels
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.values import Probe

EVERYWHERE = ClassEvidence(1, "everywhere")
HIDING = [
    FeatureAblation(supervoxels=9),
    ShapleyValueSampling(supervoxels=9, samples=3),
    KernelShap(supervoxels=9, samples=40),
    Lime(supervoxels=9, samples=40),
]
ALL = [*HIDING, FeaturePermutation(supervoxels=9, samples=2)]
EXACT = [*HIDING[:3], Lime(supervoxels=9, samples=40, penalty=0)]


def name_of(method):
    return type(method).__name__


def only(net, probe, method, target=EVERYWHERE, seed=0, **settings):
    [found] = explain(Predictor(net, **settings), probe, {"t": target}, {"m": method}, seed=seed)
    assert found.status == "ok"
    return found


def numbers_of(probe, count=9):
    return supervoxels(probe.image, probe.spacing_mm, count, 0.1)


def behind(probe, kind="blurred", sigma_mm=5.0):
    return Baseline(kind, sigma_mm).make(
        probe.image, probe.spacing_mm, torch.Generator().manual_seed(0)
    )


def summed(values, numbers):
    """The sum over each supervoxel."""
    return torch.stack([values[numbers == n].sum() for n in range(int(numbers.max()) + 1)])


@pytest.mark.parametrize("kind", ["blurred", "noise", "minimum", "zero", 0.7])
@pytest.mark.parametrize("method", EXACT, ids=name_of)
def test_of_a_linear_network_all_are_exact(method, kind):
    """Weight times the way to the baseline, summed over the supervoxel and shared out evenly."""
    probe = a_probe((8, 8, 6), 2, spacing_mm=(1.0, 1.0, 1.5))
    numbers = numbers_of(probe)
    effects = summed(3 * (probe.image - behind(probe, kind)).sum(0), numbers)
    method = type(method)(**{**vars(method), "baseline": kind})
    found = only(Weigh(0, 3, bias=5.0), probe, method)
    close(found.values * probe.image[0].numel(), per_voxel(effects, numbers), 1e-6)  # float32
    assert found.unit == "logit"


def test_feature_ablation_keeps_all_digits():
    """Captum's float32 is not in it."""
    probe = a_probe((8, 8, 8), 2)
    effects = summed(3 * (probe.image - behind(probe)).sum(0), numbers_of(probe))
    found = only(Weigh(0, 3), probe, FeatureAblation(supervoxels=9))
    close(found.values * 512, per_voxel(effects, numbers_of(probe)))


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize("method", HIDING, ids=name_of)
def test_captum_on_masks_of_the_volume(method, window):
    """What Captum says of the plainly blended score, with a feature mask for all channels."""
    net, target = layered(2, 3), ClassMargin(2, 1)
    probe = a_probe((12, 8, 6), 2, classes=3, spacing_mm=(1.0, 1.0, 2.0))
    with torch.no_grad():
        weights = target.weights(probe, blended(net, probe.image, window))
    numbers = numbers_of(probe)
    region = int((probe.label == 2).sum())

    def score(x):
        with torch.no_grad():
            return torch.stack([(weights * blended(net, v, window)).sum() for v in x]) / region

    settings = {"n_samples": method.samples} if hasattr(method, "samples") else {}
    theirs = getattr(attr, name_of(method))(score)
    if isinstance(method, Lime):
        theirs = attr.Lime(
            score,
            interpretable_model=SkLearnLasso(alpha=method.penalty),
            similarity_func=lambda x, y, z: None,
        )
        theirs.similarity_func = lambda x, y, z, **_: math.exp(
            -((1 - math.sqrt(float(z.double().mean()))) ** 2) / 2 / 0.25**2
        )
    torch.manual_seed(0)
    effects = theirs.attribute(
        probe.image[None],
        baselines=behind(probe)[None],
        feature_mask=numbers[None, None],
        **settings,
    )
    effects = effects.reshape(2, *probe.shape).double()
    assert torch.equal(effects[0], effects[1])
    sizes = torch.bincount(numbers.flatten())[numbers]
    close(only(net, probe, method, target, window=window).values, effects[0] / sizes, 1e-4)


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize("kind", ["blurred", "zero"])
@pytest.mark.parametrize("method", HIDING[1:3], ids=name_of)
def test_shapley_values_are_complete(method, kind, window):
    """On a network that is not linear they sum to the score minus the baseline's."""
    probe = a_probe((12, 8, 6), 2)
    method = type(method)(**{**vars(method), "baseline": kind})
    found = only(layered(2), probe, method, window=window)
    assert found.completeness_error < 1e-5
    with torch.no_grad():
        ends = [
            float(blended(layered(2), x, window)[1].mean())
            for x in (probe.image, behind(probe, kind))
        ]
    assert float(found.values.sum()) == pytest.approx(ends[0] - ends[1], rel=1e-5)


def test_of_two_supervoxels_shapley_values_are_known():
    """The mean of both orders, up to chance."""
    probe = a_probe((8, 4, 4))
    numbers = numbers_of(probe, 2)

    def score(on):
        with torch.no_grad():
            mixed = torch.where(on[numbers], probe.image, torch.zeros(()).double())
            return float(layered()(mixed[None])[0, 1].sum())

    none, first, second, both = (
        score(torch.tensor(on))
        for on in ((False, False), (True, False), (False, True), (True,) * 2)
    )
    effects = torch.tensor([first - none + both - second, second - none + both - first]) / 2
    plain = per_voxel(effects.double(), numbers) / 128
    fitted = KernelShap(2, samples=300, baseline="zero")
    close(only(layered(), probe, fitted).values, plain, 0.05)
    sampled = ShapleyValueSampling(2, samples=300, baseline="zero")
    close(only(layered(), probe, sampled).values, plain, 0.05)


def test_feature_ablation_of_a_network_that_needs_both():
    """Each counts for all of what both make: it is no sharing out, and not complete."""
    probe = Probe("p", torch.ones(1, 2, 1, 1, dtype=torch.float64))

    class Both(nn.Module):
        def forward(self, x):
            return x.prod(dim=2, keepdim=True).expand_as(x)

    found = only(Both(), probe, FeatureAblation(supervoxels=2, baseline="zero"))
    assert found.values.flatten().tolist() == [1, 1]
    assert found.completeness_error is None
    shared = only(Both(), probe, ShapleyValueSampling(2, samples=50, baseline="zero"))
    assert float(shared.values.sum()) == pytest.approx(1)


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_a_voxel_counts_as_much_as_any_other_of_its_supervoxel(method):
    """The probe's own supervoxels, numbered in no order."""
    probe = a_probe((8, 8, 8), 2)
    values = only(layered(2), probe, method).values
    for region in range(9):
        inside = values[numbers_of(probe) == region]
        assert len(inside) > 0
        assert torch.equal(inside, inside[:1].expand_as(inside))


def test_permutation_of_a_linear_network():
    """The weights times what is lost, averaged over draws."""
    probe = a_probe((8, 8, 8), 2)
    numbers, generator = numbers_of(probe), torch.Generator().manual_seed(0)
    effects = torch.zeros(9).double()
    for _ in range(3):
        lost = probe.image - drawn(probe.image, numbers, generator)
        effects += summed(2 * lost.sum(0), numbers) / 3
    found = only(Weigh(0, 2), probe, FeaturePermutation(supervoxels=9, samples=3))
    close(found.values * 512, per_voxel(effects, numbers))


def test_permutation_is_captums_with_a_function_of_our_own():
    """Captum's own skips batches of one, so it is given the volume twice."""
    net, probe = layered(2), a_probe((8, 8, 8), 2)
    numbers = numbers_of(probe)
    filled = drawn(probe.image, numbers, torch.Generator().manual_seed(0))

    def score(x):
        with torch.no_grad():
            return net(x)[:, 1].mean(dim=(1, 2, 3))

    theirs = attr.FeaturePermutation(score, lambda x, mask: torch.where(mask, filled, x))
    alone = theirs.attribute(probe.image[None], feature_mask=numbers[None, None])
    assert not bool(alone.any())  # Captum 0.9; once it is mended, ours can call it
    twice = probe.image.expand(2, *probe.image.shape)
    effects = theirs.attribute(twice, feature_mask=numbers[None, None])[0, 0]
    sizes = torch.bincount(numbers.flatten())[numbers]
    found = only(net, probe, FeaturePermutation(supervoxels=9, samples=1))
    close(found.values, effects / sizes)


def test_voxels_are_drawn_from_outside():
    """Whole voxels, none twice where there are enough, others for another supervoxel or draw."""
    where = torch.arange(6 * 5 * 4).reshape(1, 6, 5, 4).double()
    numbers = numbers_of(Probe("p", torch.randn(1, 6, 5, 4)), 7)
    generator = torch.Generator().manual_seed(0)
    first, second = (drawn(torch.cat([where, -where]), numbers, generator) for _ in range(2))
    assert torch.equal(first[0], -first[1])
    assert not torch.equal(first, second)
    for region in range(7):
        came_from = first[0][numbers == region].long()
        assert region not in numbers.flatten()[came_from]
        assert len(came_from.unique()) == len(came_from)


def test_a_supervoxel_larger_than_the_rest_takes_voxels_again():
    """Each as often as any other, but for one."""
    numbers = torch.tensor([0] * 8 + [1] * 3).reshape(1, 1, 11)
    x = torch.arange(11.0).reshape(1, 1, 1, 11)
    filled = drawn(x, numbers, torch.Generator()).flatten()
    counts = torch.bincount(filled[:8].long(), minlength=11)[8:]
    assert sorted(counts.tolist()) == [2, 3, 3]
    assert bool((filled[8:] < 8).all())


@pytest.mark.parametrize("method", [FeatureAblation, Lime, ShapleyValueSampling, KernelShap])
def test_one_supervoxel_is_the_whole_volume(method):
    """Its effect is all of the score's difference."""
    probe = a_probe((4, 4, 4))
    with torch.no_grad():
        full, empty = (float(layered()(x[None])[0, 1].mean()) for x in (probe.image, behind(probe)))
    settings = {"penalty": 0} if method is Lime else {}
    found = only(layered(), probe, method(supervoxels=1, **settings))
    close(found.values, torch.full((4, 4, 4), (full - empty) / 64).double(), 1e-5)


def test_one_supervoxel_is_shuffled_in_itself():
    """There is nothing to draw from."""
    probe = a_probe((4, 4, 4))
    filled = drawn(probe.image, torch.zeros(4, 4, 4, dtype=torch.long), torch.Generator())
    assert torch.equal(filled.flatten().sort().values, probe.image.flatten().sort().values)
    linear = only(Weigh(0, 1), probe, FeaturePermutation(supervoxels=1)).values
    assert float(linear.abs().amax()) < 1e-12


@pytest.mark.parametrize("method", [*ALL, Occlusion(4, 4), RISE(samples=8)], ids=name_of)
def test_a_constant_volume_has_nothing_to_hide(method):
    """Its blurred baseline is itself: zero, and no error."""
    probe = Probe("p", torch.full((1, 8, 8, 8), 2.0, dtype=torch.float64))
    found = only(layered(), probe, method)
    assert float(found.values.abs().amax()) < 1e-6
    assert found.completeness_error is None


@pytest.mark.parametrize("shape", [(1, 9, 9), (12, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("method", [*ALL, RISE(samples=8)], ids=name_of)
def test_thin_and_tiny_volumes(method, shape):
    """There are fewer voxels than supervoxels."""
    found = only(linear_net(), a_probe(shape), method)
    assert tuple(found.values.shape) == shape
    assert bool(found.values.any())


@pytest.mark.parametrize("method", [*ALL, Occlusion(4, 4), RISE(samples=9)], ids=name_of)
def test_how_many_go_together_does_not_matter(method):
    """One, seven, or as many as windows would."""
    probe = a_probe((12, 8, 6), 2)
    maps = [
        only(
            layered(2),
            probe,
            type(method)(**{**vars(method), "perturbations_per_pass": many}),
            window=(8, 8, 8),
        ).values
        for many in (1, 7, "auto")
    ]
    close(maps[1], maps[0], 1e-6)
    close(maps[2], maps[0], 1e-6)


def test_so_many_go_together():
    """One forward of the network for the volume, one for each piece of the nine."""
    net = Counting(layered())
    predictor = Predictor(net, looks_per_pass=20)
    predictor.rehearse(a_probe().image)
    before = net.counts["calls"]
    method = FeatureAblation(supervoxels=9, perturbations_per_pass=4)
    explain(predictor, a_probe(), {"t": EVERYWHERE}, {"m": method})
    assert net.counts["calls"] - before == 2 + 3  # the prediction, the volume, 4 + 4 + 1


@pytest.mark.parametrize("method", [*ALL, Occlusion(4, 4), RISE(samples=9)], ids=name_of)
def test_batches_are_halved_where_memory_ends(method):
    """And the map is the same."""
    probe = a_probe((8, 8, 8), 2)
    method = type(method)(**{**vars(method), "perturbations_per_pass": 7})
    refused = []

    class Full(torch.OutOfMemoryError):
        def __init__(self, *words):
            refused.append(words)  # the network's own count is restored by the guard

    hungry = Hungry(layered(2), 2, Full("CUDA out of memory."))
    close(only(hungry, probe, method).values, only(layered(2), probe, method).values, 1e-6)
    assert len(refused) > 1


@pytest.mark.parametrize("method", [*ALL, RISE(samples=8)], ids=name_of)
def test_chance_is_the_same_every_time(method):
    """Whatever was drawn before; and nothing of it is left behind."""
    probe, net = a_probe((8, 8, 8), 2), layered(2)
    torch.manual_seed(1)
    a = only(net, probe, method).values
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = only(net, probe, method).values
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    other = only(net, probe, method, seed=5).values
    assert torch.equal(a, other) is (type(method) is FeatureAblation)


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_the_cost_is_what_is_counted(method, window):
    """Beyond the prediction; batch items that a counting network sees."""
    probe, net = a_probe((8, 8, 12)), Counting(layered())
    predictor = Predictor(net, window)
    windows = len(predictor.windows(probe.shape).places)
    predictor.rehearse(probe.image[(slice(None), *predictor.windows(probe.shape).places[0])])
    before = net.counts["forward"]
    explain(predictor, probe, {"t": EVERYWHERE}, {"m": method})
    announced = method.extra_passes((8, 8, 12), windows)
    assert net.counts["forward"] - before == windows + announced.forward
    assert net.counts["backward"] == announced.backward == 0


@pytest.mark.parametrize("count", [1, 2, 64])
@pytest.mark.parametrize("method", [type(method) for method in ALL])
def test_the_cost_is_never_more_than_announced(method, count):
    """With fewer voxels than supervoxels, and with one."""
    probe, net = a_probe((2, 2, 2)), Counting(linear_net())
    predictor = Predictor(net)
    predictor.rehearse(probe.image)
    before = net.counts["forward"]
    explain(predictor, probe, {"t": EVERYWHERE}, {"m": method(supervoxels=count)})
    announced = method(supervoxels=count).extra_passes((2, 2, 2), 1)
    assert net.counts["forward"] - before == 1 + announced.forward


def test_costs_by_hand():
    """By two windows."""
    shape = (8, 8, 12)
    assert FeatureAblation().extra_passes(shape, 2).forward == 65 * 2
    assert ShapleyValueSampling(samples=3).extra_passes(shape, 2).forward == (3 * 64 + 2) * 2
    assert KernelShap(samples=100).extra_passes(shape, 2).forward == 101 * 2
    assert Lime(samples=100).extra_passes(shape, 2).forward == 101 * 2
    assert FeaturePermutation(samples=3).extra_passes(shape, 2).forward == 3 * 65 * 2
    assert FeatureAblation().extra_passes((2, 2, 1), 1).forward == 5


def test_a_penalty_makes_weights_zero():
    """Supervoxels that do little come out as nothing; the larger the penalty, the more."""
    probe = a_probe((8, 8, 8))
    zeros = [
        int((only(layered(), probe, Lime(9, samples=60, penalty=p)).values == 0).sum())
        for p in (0, 0.03, 1e6)
    ]
    assert zeros[0] == 0
    assert 0 < zeros[1] < 512
    assert zeros[2] == 512


def test_a_wide_kernel_weighs_all_settings_alike():
    """Then it is plain least squares over the settings; a narrow one differs."""
    probe = a_probe((8, 8, 8))
    wide, wider, narrow = (
        only(layered(), probe, Lime(9, samples=60, penalty=0, kernel_width=w)).values
        for w in (1e3, 1e4, 0.1)
    )
    close(wide, wider, 1e-5)
    assert not torch.allclose(wide, narrow, rtol=1e-2)


def test_supervoxels_are_the_probes_whatever_copy_is_explained():
    """Noisy copies are cut alike, so that their mean is of something."""
    probe = a_probe((8, 8, 8), 2)
    values = only(layered(2), probe, SmoothGrad(FeatureAblation(supervoxels=9), 2, 0.5)).values
    assert len(values.unique()) <= 9


class Dark(nn.Module):
    """Sees nothing but what is darker than a half."""

    def forward(self, x):
        dark = (0.5 - x).relu()
        return torch.cat([torch.zeros_like(dark), dark], dim=1)


@pytest.mark.parametrize(
    "method",
    [
        FeatureAblation(supervoxels=20),
        ShapleyValueSampling(supervoxels=20),
        KernelShap(supervoxels=20),
        Lime(supervoxels=20),
        FeaturePermutation(supervoxels=20),
        Occlusion(2, 1),
        RISE(samples=200, cells=8),
    ],
    ids=name_of,
)
def test_evidence_in_a_dark_band_is_found(method):
    """With a blurred baseline, as a constant one at its value would not: most of it lies there."""
    image = 1 + 0.05 * a_probe((12, 12, 12)).image
    band = torch.zeros(12, 12, 12, dtype=torch.bool)
    band[:, 5:7] = True
    image[0][band] = 0.0
    values = only(Dark(), Probe("dark", image), method).values.relu()
    share = float(values[band].sum() / values.sum())
    chance = 1 / 6
    assert share > (0.8 if hasattr(method, "supervoxels") else 2 * chance)


def test_a_baseline_of_the_evidences_own_value_is_blind():
    """The reason for a blurred one."""
    image = 1 + 0.05 * a_probe((12, 12, 12)).image
    image[0, :, 5:7] = 0.0
    found = only(Dark(), Probe("dark", image), FeatureAblation(supervoxels=20, baseline="minimum"))
    band = found.values[:, 5:7]
    assert float(band.abs().amax()) < 0.01 * float(found.values.abs().amax())


def test_float32_stays_float32():
    """As the probe is."""
    probe = Probe("p", a_probe().image.float())
    for method in ALL:
        assert only(layered().float(), probe, method).values.dtype == torch.float32


@pytest.mark.parametrize("method", HIDING[1:3], ids=name_of)
def test_attribute_gives_where_it_starts(method):
    """The baseline's score, whole and undivided."""
    probe, net = a_probe((8, 8, 8)), layered()
    predictor = Predictor(net)
    logits = predictor.predict(probe.image)
    model = ScoredModel.aim(predictor, probe, EVERYWHERE, logits)
    made = method.attribute(model, probe.image)
    assert isinstance(made, Complete)
    assert made.start == pytest.approx(model.score(predictor.predict(behind(probe))))


COMMON = [
    ({"supervoxels": 0}, "(supervoxels=0)` must be at least 1."),
    ({"compactness": 0.0}, "(compactness=0.0)` must be positive"),
    ({"compactness": math.nan}, "(compactness=nan)` must be positive"),
    ({"perturbations_per_pass": 0}, '(perturbations_per_pass=0)` must be at least 1 or "auto"'),
    ({"samples": 0}, "(samples=0)` must be at least 1."),
    ({"sigma_mm": 0.0}, "`sigma_mm` must be positive"),
]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (method, settings, message)
        for method in map(type, ALL)
        for settings, message in COMMON
        if set(settings) <= set(inspect.signature(method).parameters)
    ]
    + [
        (KernelShap, {"samples": 64}, "(supervoxels=64, samples=64)` needs more samples than"),
        (Lime, {"samples": 1}, "(samples=1)` must be at least 2"),
        (Lime, {"penalty": -1.0}, "(penalty=-1.0)` must not be negative"),
        (Lime, {"kernel_width": 0.0}, "(kernel_width=0.0)` must be positive"),
        (Occlusion, {"perturbations_per_pass": -1}, "(perturbations_per_pass=-1)` must be at"),
    ],
)
def test_wrong_settings_die_at_once(method, settings, message):
    """When the method is written down, by its name."""
    who = "" if message.startswith("`") else f"`{method.__name__}"
    with pytest.raises(ValueError, match=re.escape(who + message)):
        method(**settings)


def test_methods_are_values():
    """Equal settings are equal methods."""
    for method in ALL:
        assert type(method)(**vars(method)) == method
        assert hash(type(method)(**vars(method))) == hash(method)
