"""Infidelity: known answers, a plain loop, Captum, properties."""

from __future__ import annotations

import re

import pytest
import torch
from captum.metrics import infidelity
from held import Functional, a_volume, hidden_of, map_of, model_of, plain_score, random_values
from hypothesis import given, settings
from hypothesis import strategies as st
from nets_for_tests import Counting, Weigh, a_probe, layered, linear_net

from lightning_segxai.faithfulness.infidelity import Infidelity
from lightning_segxai.faithfulness.parts import random_parts


def plain_infidelity(metric, net, model, values, window):
    """Draw by draw, with the best scale of the map found by a search among candidates."""
    x = model.probe.image
    whole = plain_score(net, x, model.weights, window)
    said, done = [], []
    if metric.perturbation == "parts":
        behind = hidden_of(model.probe, metric.baseline, metric.sigma_mm)
        generator = torch.Generator().manual_seed(metric.seed)
        for part in random_parts(
            tuple(x.shape[1:]), metric.samples, metric.share, metric.block, generator
        ):
            said.append(sum(float(values[tuple(v)]) for v in part.nonzero()))
            hidden = torch.where(part, behind, x)
            done.append(whole - plain_score(net, hidden, model.weights, window))
    else:
        for drawn in metric.perturbations(model):
            said.append(
                sum(float(d) * float(v) for d, v in zip(drawn.ravel(), values.ravel(), strict=True))
            )
            done.append(whole - plain_score(net, x - drawn, model.weights, window))
    best = sum(s * d for s, d in zip(said, done, strict=True)) / sum(s * s for s in said)

    def missed(scale):
        return sum((scale * s - d) ** 2 for s, d in zip(said, done, strict=True)) / sum(
            d * d for d in done
        )

    found = missed(max(0.0, best))
    assert all(missed(max(0.0, best * f)) >= found for f in (0.0, 0.9, 1.1))
    return found


@pytest.mark.parametrize("window", [None, (6, 4, 4)], ids=["whole", "windows"])
@pytest.mark.parametrize("perturbation", ["parts", "noise"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_that_of_a_plain_loop(perturbation, window, seed):
    """Every window blended, two channels."""
    probe = a_probe((6, 4, 8), 2, spacing_mm=(1.0, 1.0, 2.0))
    metric = Infidelity(12, perturbation, 0.2, block=2, noise=0.1, seed=seed, sigma_mm=2.0)
    net = layered(2)
    model = model_of(net, probe, window=window)
    values = random_values(probe.shape)
    expected = plain_infidelity(metric, net, model, values, window)
    assert metric.assess(model, map_of(model, values)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("baseline", ["blurred", "zero"])
def test_exact_effects_on_a_linear_network_have_none(baseline):
    """Gradient times what is lost, for parts; the gradient, for noise; the negative of it has 1."""
    probe = a_probe((8, 8, 8), 2)
    model = model_of(linear_net(2, bias=True), probe)
    x = probe.image.clone().requires_grad_()
    model(x[None]).sum().backward()
    lost = (x.grad * (probe.image - hidden_of(probe, baseline))).sum(0)
    cases = {Infidelity(baseline=baseline): lost, Infidelity(perturbation="noise"): x.grad.sum(0)}
    for metric, exact in cases.items():
        for scale in (1.0, 7.0):
            found = metric.assess(model, map_of(model, scale * exact))
            assert found == pytest.approx(0.0, abs=1e-9)
        assert metric.assess(model, map_of(model, -exact)) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_it_is_captums_but_for_the_scores_scale_and_the_sign(seed):
    """Captum's normalized one over the mean squared effect; 1 where Captum turns the map around."""
    probe = a_probe((6, 6, 6), seed=seed)
    model = model_of(layered(), probe)
    values = random_values((6, 6, 6), seed)
    metric = Infidelity(16, "noise", noise=0.05)
    drawn = torch.stack([d[None] for d in metric.perturbations(model)])
    with torch.no_grad():
        whole = model(probe.image[None])
        done = (whole - model(probe.image[None] - drawn)).double()
        said = (drawn * values).flatten(1).sum(1)
        captums = infidelity(
            model,
            lambda x: (drawn, x - drawn),
            probe.image[None],
            values[None, None],
            n_perturb_samples=16,
            normalize=True,
        )
    share = float(captums) / float((done**2).mean())
    expected = share if float(said @ done) > 0 else 1.0
    assert metric.assess(model, map_of(model, values)) == pytest.approx(expected, abs=1e-9)
    turned = metric.assess(model, map_of(model, -values))
    assert sorted([expected, turned]) == pytest.approx([share, 1.0], abs=1e-9)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    scale=st.floats(0.01, 100),
    perturbation=st.sampled_from(["parts", "noise"]),
)
def test_properties(seed, scale, perturbation):
    """Bounds; the map's scale does not count; of a map and its negative one has 1."""
    model = model_of(layered(), a_probe((4, 6, 8)))
    values = random_values((4, 6, 8), seed)
    metric = Infidelity(8, perturbation, 0.2, block=2)
    found = metric.assess(model, map_of(model, values))
    assert 0 <= found <= 1
    assert metric.assess(model, map_of(model, values * scale)) == pytest.approx(found, abs=1e-9)
    assert 1.0 in (found, metric.assess(model, map_of(model, -values)))


def test_an_unrelated_map_tells_next_to_nothing():
    """Of 200 draws of noise."""
    model = model_of(Weigh(0.0, 1.0), a_probe((12, 12, 12)))
    values = random_values((12, 12, 12), 5)
    found = Infidelity(200, "noise").assess(model, map_of(model, values))
    assert 0.9 < found <= 1


def test_nothing_changes():
    """A network that does not look has no effects to be told."""
    probe = a_volume(random_values((8, 8, 8)))
    values = random_values((8, 8, 8))
    blind = model_of(Weigh(0.0, 0.0, bias=3.0), probe)
    nowhere = model_of(Functional(lambda x: x[0, 0, 0, 0] * 0 + 2), probe)
    for perturbation in ("parts", "noise"):
        for model in (blind, nowhere):
            assert Infidelity(8, perturbation).assess(model, map_of(model, values)) is None


@pytest.mark.parametrize("perturbation", ["parts", "noise"])
@pytest.mark.parametrize("looks_per_pass", [1, 3, "auto"])
def test_the_cost_is_what_is_counted(looks_per_pass, perturbation):
    """Forward only, whatever the batch."""
    probe, net = a_probe((8, 8, 12)), Counting(layered())
    model = model_of(net, probe, window=(8, 8, 8), looks_per_pass=looks_per_pass)
    mapped = map_of(model, random_values(probe.shape))
    before = net.counts["forward"]
    metric = Infidelity(11, perturbation)
    metric.assess(model, mapped)
    passes = metric.passes((8, 8, 12), len(model.windows.places))
    assert net.counts["forward"] - before == passes.forward == 12 * len(model.windows.places)
    assert net.counts["backward"] == passes.backward == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "(samples=1)` must be at least 2"),
        ({"share": 0.0}, "(share=0.0)` must lie between 0 and 1"),
        ({"noise": 0.0}, "(noise=0.0)` must be positive"),
        ({"noise": float("nan")}, "(noise=nan)` must be positive"),
        ({"block": 0}, "(block=0)` must be at least 1"),
        ({"sigma_mm": 0.0}, "`sigma_mm` must be positive"),
    ],
)
def test_wrong_settings_die_at_once(arguments, message):
    """When the metric is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Infidelity(**arguments)
