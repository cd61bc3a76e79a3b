"""Sensitivity: known answers, a plain loop, Captum, properties."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest
import torch
from captum.metrics import sensitivity_max
from held import map_of, model_of, random_values
from nets_for_tests import Metered, Weigh, a_probe, layered

from lightning_segxai.faithfulness.base import explained
from lightning_segxai.faithfulness.stability import SensitivityMax
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.cams import GradCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.values import UnsupportedError

METHODS = {
    "saliency": Saliency(absolute=False),
    "ixg": InputXGradient(),
    "ig": IntegratedGradients(3),
    "smooth": SmoothGrad(samples=3),
    "cam": GradCAM("body.0"),
}


@dataclass(frozen=True)
class Constant(AttributionMethod):
    """Ignores the network and the volume."""

    def attribute(self, model, x):
        return random_values(x.shape[1:])


@dataclass(frozen=True)
class Volume(AttributionMethod):
    """The volume is its own map."""

    def attribute(self, model, x):
        return x.sum(0)


def own_map(model, method):
    return map_of(model, explained(model, method, model.probe.image))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_it_is_captums(method):
    """For the same neighbors, with the target where it was."""
    probe = a_probe((6, 6, 8), 2)
    model = model_of(layered(2, rectified=True), probe)
    metric = SensitivityMax(5, 0.1)
    near = torch.stack(list(metric.neighbors(model)))

    def maps(volumes):
        found = torch.stack([explained(model, method, x) for x in volumes[0]]).contiguous()
        return (found,)

    captums = sensitivity_max(maps, probe.image[None], lambda _: (near,), n_perturb_samples=5)
    found = metric.assess(model, own_map(model, method), method)
    assert found == pytest.approx(float(captums), abs=1e-10)
    assert found > 0


def test_known_answers():
    """0 for a linear network's gradient and for what ignores all; the volume's own change."""
    probe = a_probe((6, 6, 8))
    model = model_of(Weigh(0.0, 2.0), probe)
    for method in (Saliency(absolute=False), Constant()):
        assert SensitivityMax(3).assess(model, own_map(model, method), method) == 0.0
    metric = SensitivityMax(4, 0.25)
    moved = [float((n - probe.image).norm()) for n in metric.neighbors(model)]
    assert len(moved) == 4
    found = metric.assess(model, own_map(model, Volume()), Volume())
    assert found == pytest.approx(max(moved) / float(probe.image.norm()), abs=1e-12)


def test_neighbors_are_near():
    """Within the radius, and out to it; the same every time; others for another seed."""
    model = model_of(Weigh(0.0, 1.0), a_probe((6, 6, 8)))
    x = model.probe.image
    span = float(x.max() - x.min())
    for near in SensitivityMax(3, 0.25).neighbors(model):
        apart = float((near - x).abs().max())
        assert 0.24 * span < apart <= 0.25 * span
    one, same, other = (
        torch.stack(list(SensitivityMax(3, seed=s).neighbors(model))) for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert all(torch.equal(n, x) for n in SensitivityMax(2, 0.0).neighbors(model))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_radius_no_change(method):
    """To the bit, also of methods that draw noise: it is the same noise."""
    model = model_of(layered(), a_probe())
    assert SensitivityMax(2, 0.0).assess(model, own_map(model, method), method) == 0.0


def test_a_map_that_breaks_is_not_steady():
    """NaN for any neighbor is NaN, whatever the others are."""

    @dataclass(frozen=True)
    class Breaks(AttributionMethod):
        calls: list

        def attribute(self, model, x):
            self.calls.append(1)
            return x[0] * (math.nan if len(self.calls) == 2 else 1)

    model = model_of(layered(), a_probe())
    found = SensitivityMax(3).assess(model, map_of(model, random_values((8, 8, 8))), Breaks([]))
    assert math.isnan(found)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_cost_is_what_is_counted(method):
    """The method's own, for each draw."""
    net = Metered(layered())
    # the layer's name is that in the counting network
    method = GradCAM("net.body.0") if isinstance(method, GradCAM) else method
    model = model_of(net, a_probe((8, 8, 12)), window=(8, 8, 8))
    mapped = own_map(model, method)
    before = dict(vars(net.counts))
    metric = SensitivityMax(3)
    metric.assess(model, mapped, method)
    passes = metric.passes((8, 8, 12), len(model.windows.places), method)
    assert net.counts["forward"] - before["forward"] == passes.forward > 0
    assert net.counts["backward"] - before["backward"] == passes.backward > 0


def test_it_needs_the_method():
    """Said, and what to do."""
    model = model_of(layered(), a_probe())
    with pytest.raises(UnsupportedError, match=r"`SensitivityMax` .* Give `methods=`"):
        SensitivityMax().assess(model, map_of(model, random_values((8, 8, 8))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "(samples=0)` must be at least 1"),
        ({"radius": -0.1}, "(radius=-0.1)` must not be negative"),
        ({"radius": math.nan}, "(radius=nan)` must not be negative"),
    ],
)
def test_wrong_settings_die_at_once(arguments, message):
    """When the metric is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        SensitivityMax(**arguments)
