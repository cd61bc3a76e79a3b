"""Faithfulness correlation: known answers, a plain loop, properties."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from held import Functional, a_volume, hidden_of, map_of, model_of, plain_score, random_values
from hypothesis import given, settings
from hypothesis import strategies as st
from nets_for_tests import Counting, Weigh, a_probe, layered, linear_net

from lightning_segxai.faithfulness.correlation import FaithfulnessCorrelation
from lightning_segxai.targets import ClassMargin


def plain_correlation(metric, net, model, values, window):
    """Part by part, in float64, Pearson's from numpy."""
    probe = model.probe
    behind = hidden_of(probe, metric.baseline, metric.sigma_mm)
    whole = plain_score(net, probe.image, model.weights, window)
    said, done = [], []
    for part in metric.parts(model):
        x = torch.where(part, behind, probe.image)
        said.append(sum(float(values[tuple(v)]) for v in part.nonzero()))
        done.append(whole - plain_score(net, x, model.weights, window))
    return np.corrcoef(said, done)[0, 1]


@pytest.mark.parametrize("window", [None, (6, 4, 4)], ids=["whole", "windows"])
@pytest.mark.parametrize("baseline", ["blurred", "noise", 0.5])
@pytest.mark.parametrize("block", [1, 3])
def test_it_is_that_of_a_plain_loop(baseline, window, block):
    """Every window blended."""
    probe = a_probe((6, 4, 8), 2, spacing_mm=(1.0, 1.0, 2.0))
    metric = FaithfulnessCorrelation(12, 0.2, baseline, block, sigma_mm=2.0)
    net = layered(2)
    model = model_of(net, probe, ClassMargin(1, 0), window=window)
    values = random_values(probe.shape)
    expected = plain_correlation(metric, net, model, values, window)
    assert metric.assess(model, map_of(model, values)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("window", [None, (8, 8, 4)])
@pytest.mark.parametrize("baseline", ["blurred", "noise", "zero"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_exact_effects_on_a_linear_network_are_one(block, baseline, window):
    """Gradient times what is lost: each part's sum is its effect."""
    probe = a_probe((8, 8, 8), 2)
    model = model_of(linear_net(2, bias=True), probe, window=window)
    x = probe.image.clone().requires_grad_()
    model(x[None]).sum().backward()
    exact = (x.grad * (probe.image - hidden_of(probe, baseline))).sum(0)
    metric = FaithfulnessCorrelation(baseline=baseline, block=block)
    assert metric.assess(model, map_of(model, exact)) == pytest.approx(1.0, abs=1e-10)
    assert metric.assess(model, map_of(model, -exact)) == pytest.approx(-1.0, abs=1e-10)


def test_an_unrelated_map_has_none():
    """Within four of its standard deviations."""
    model = model_of(Weigh(0.0, 1.0), a_probe((12, 12, 12)))
    metric = FaithfulnessCorrelation(200, baseline="zero", block=2)
    found = metric.assess(model, map_of(model, random_values((12, 12, 12), 5)))
    assert abs(found) < 4 / 199**0.5


@pytest.mark.parametrize(("block", "shape"), [(1, (3, 4, 5)), (2, (4, 5, 7)), (4, (9, 3, 8))])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_parts_are_cubes_of_the_share_asked(block, shape, share):
    """As many whole cubes as asked, at least one; different ones; at far faces they are cut."""
    model = model_of(Weigh(0.0, 1.0), a_probe(shape))
    metric = FaithfulnessCorrelation(20, share, block=block)
    cubes = [-(-n // block) for n in shape]
    parts = list(metric.parts(model))
    assert len(parts) == 20
    for part in parts:
        assert part.shape == shape
        chosen = 0
        for i, j, k in np.ndindex(*cubes):
            cube = part[
                i * block : (i + 1) * block,
                j * block : (j + 1) * block,
                k * block : (k + 1) * block,
            ]
            assert bool(cube.all()) or not bool(cube.any())
            chosen += bool(cube.all())
        assert chosen == max(1, round(share * np.prod(cubes)))
    assert any(not torch.equal(part, parts[0]) for part in parts) or np.prod(cubes) == chosen


def test_seeds():
    """The same every time; another draw for another seed, of the metric or the model."""
    probe = a_probe()
    values = random_values(probe.shape)

    def found(seed=0, model_seed=0):
        model = model_of(layered(), probe, seed=model_seed)
        return FaithfulnessCorrelation(seed=seed, block=2).assess(model, map_of(model, values))

    assert found() == found()
    assert len({found(), found(1), found(0, 5)}) == 3


@settings(max_examples=25)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100), block=st.integers(1, 4))
def test_properties(seed, scale, block):
    """Bounds; scale does not count; a map of opposite sign has the opposite number."""
    model = model_of(layered(), a_probe((4, 6, 8)))
    values = random_values((4, 6, 8), seed)
    metric = FaithfulnessCorrelation(8, 0.2, block=block)
    found = metric.assess(model, map_of(model, values))
    assert -1 <= found <= 1
    assert metric.assess(model, map_of(model, values * scale)) == pytest.approx(found, abs=1e-9)
    assert metric.assess(model, map_of(model, -values)) == pytest.approx(-found, abs=1e-10)


def test_nothing_varies():
    """A flat map, a network that does not look, and one that sees what was never hidden."""
    probe = a_probe()
    metric = FaithfulnessCorrelation(8)
    model = model_of(layered(), probe)
    assert metric.assess(model, map_of(model, torch.full((8, 8, 8), 0.1))) is None
    for net in (Weigh(0.0, 0.0, bias=3.0), Weigh(0.0, 1e-17, bias=1.0)):
        blind = model_of(net, probe)
        assert metric.assess(blind, map_of(blind, random_values((8, 8, 8)))) is None
    nowhere = model_of(Functional(lambda x: x[0, 0, 0, 0] * 0 + 2), probe)
    assert metric.assess(nowhere, map_of(nowhere, random_values((8, 8, 8)))) is None


def test_a_network_of_small_logits_is_no_blind_one():
    """Its effects are small beside one, but not beside its scores."""
    probe = a_volume(random_values((8, 8, 8)))
    model = model_of(Weigh(0.0, 1e-6), probe)
    found = FaithfulnessCorrelation(8, baseline="zero").assess(model, map_of(model, probe.image[0]))
    assert found == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("looks_per_pass", [1, 3, "auto"])
@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_the_cost_is_what_is_counted(window, looks_per_pass):
    """Forward only, whatever the batch."""
    probe, net = a_probe((8, 8, 12)), Counting(layered())
    model = model_of(net, probe, window=window, looks_per_pass=looks_per_pass)
    mapped = map_of(model, random_values(probe.shape))
    before = net.counts["forward"]
    metric = FaithfulnessCorrelation(11)
    metric.assess(model, mapped)
    passes = metric.passes((8, 8, 12), len(model.windows.places))
    assert net.counts["forward"] - before == passes.forward == 12 * len(model.windows.places)
    assert net.counts["backward"] == passes.backward == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "(samples=1)` must be at least 2"),
        ({"share": 0.0}, "(share=0.0)` must lie between 0 and 1"),
        ({"share": 1.0}, "(share=1.0)` must lie between 0 and 1"),
        ({"block": 0}, "(block=0)` must be at least 1"),
        ({"sigma_mm": 0.0}, "`sigma_mm` must be positive"),
    ],
)
def test_wrong_settings_die_at_once(arguments, message):
    """When the metric is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        FaithfulnessCorrelation(**arguments)
