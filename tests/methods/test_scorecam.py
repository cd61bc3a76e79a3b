"""ScoreCAM in 3D: channels as masks, whole and by windows, against plain re-implementations."""

from __future__ import annotations

import re

import pytest
import torch
from nets_for_tests import Counting, Hungry, a_probe, blended, close, layered, pieces
from torch import nn
from torch.nn.functional import interpolate

from lightning_segxai.baselines import Baseline
from lightning_segxai.explain import explain
from lightning_segxai.methods.scorecam import ScoreCAM
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.values import Probe
from lightning_segxai.windows import Windows

EVERYWHERE = ClassEvidence(1, "everywhere")


def only(net, probe, method, target=EVERYWHERE, **settings):
    [found] = explain(Predictor(net, **settings), probe, {"t": target}, {"m": method})
    assert found.status == "ok"
    return found


def channels_of(net, probe, window):
    """The channels of the deep layer on the volume's grid, blended as logits are."""
    whole = torch.zeros(4, *probe.shape, dtype=torch.float64)
    padded = window or tuple(probe.shape)
    places = Windows(tuple(probe.shape), padded).places
    with torch.no_grad():
        found = pieces(net, probe.image, window)
    for place, (share, _, deep) in zip(places, found, strict=True):
        i, j, k = (s.stop - s.start for s in place)
        up = interpolate(deep, padded, mode="trilinear")[0, :, :i, :j, :k]
        whole[(slice(None), *place)] += up * share[place]
    return whole


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize("shape", [(12, 16, 8), (6, 12, 8)])
@pytest.mark.parametrize("count", [2, 4, 64])
@pytest.mark.parametrize("kind", ["blurred", "zero"])
def test_channels_weighed_by_the_score_of_what_they_keep(window, shape, count, kind):
    """A plain loop over all channels; relative to the baseline's score, which cancels."""
    net, target = layered(2, 3), ClassMargin(2, 1)
    probe = a_probe(shape, 2, classes=3)
    hidden = Baseline(kind).make(probe.image, (1, 1, 1), torch.Generator())
    with torch.no_grad():
        weights = target.weights(probe, blended(net, probe.image, window))

    def score(x):
        with torch.no_grad():
            return (weights * blended(net, x, window)).sum() / (probe.label == 2).sum()

    channels = channels_of(net, probe, window)
    deep = torch.cat([d[0].flatten(1) for *_, d in pieces(net, probe.image, window)], dim=1)
    chosen = deep.var(dim=1).argsort(descending=True)[:count].tolist()
    scores = []
    for channel in channels[chosen]:
        mask = (channel - channel.min()) / (channel.max() - channel.min())
        scores.append(score(mask * probe.image + (1 - mask) * hidden) - score(hidden))
    alpha = torch.stack(scores).softmax(dim=0)
    plain = sum(a * channels[c] for a, c in zip(alpha, chosen, strict=True)).relu()
    found = only(net, probe, ScoreCAM("act", count, kind), target, window=window)
    close(found.values, plain)
    assert (found.unit, found.layer) == ("a.u.", "act")


def a_layer(*weights):
    """A layer of channels that are the input times a number, and the mean of them behind."""
    net = nn.Sequential(
        nn.Conv3d(1, len(weights), 1, bias=False), nn.Conv3d(len(weights), 2, 1, bias=False)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(weights).reshape(-1, 1, 1, 1, 1))
        net[1].weight.fill_(1 / len(weights))
    return net


def test_channels_that_do_the_same_count_the_same():
    """Then it is the positive part of their mean."""
    probe = a_probe((4, 4, 4))
    values = only(a_layer(1.0, 2.0, 3.0), probe, ScoreCAM("0")).values
    close(values, 2 * probe.image[0].relu())


def test_the_channels_of_largest_variance():
    """Others have no weight at all."""
    probe = a_probe((4, 4, 4))
    values = only(a_layer(1.0, -5.0, 3.0), probe, ScoreCAM("0", channels=1)).values
    close(values, (-5 * probe.image[0]).relu())


def test_a_constant_channel_hides_all():
    """And does no harm: it has no range to be scaled by."""
    probe = a_probe((4, 4, 4))
    assert bool(only(a_layer(0.0, 1.0), probe, ScoreCAM("0")).values.isfinite().all())
    flat = Probe("flat", torch.ones(1, 4, 4, 4, dtype=torch.float64))
    close(only(a_layer(1.0, 3.0), flat, ScoreCAM("0")).values, torch.full((4, 4, 4), 2.0).double())


def test_a_better_channel_counts_more():
    """The one that keeps the evidence."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Identity()

        def forward(self, x):
            parts = self.parts(torch.cat([x.relu(), (-x).relu()], dim=1))
            return torch.cat([torch.zeros_like(x), 30 * parts[:, :1]], dim=1)

    probe = a_probe((4, 4, 4))
    values = only(Two(), probe, ScoreCAM("parts", baseline="zero")).values
    bright = probe.image[0] > 0
    assert float(values[bright].sum()) > 50 * float(values[~bright].sum())


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
def test_how_many_go_together_does_not_matter(window):
    """Nor does memory that ends at two."""
    probe = a_probe((8, 8, 12), 2)
    plain = only(layered(2), probe, ScoreCAM("act"), window=window).values
    for many in (1, 3):
        method = ScoreCAM("act", perturbations_per_pass=many)
        close(only(layered(2), probe, method, window=window).values, plain)
    refused = []

    class Full(torch.OutOfMemoryError):
        def __init__(self, *words):
            refused.append(words)  # the network's own count is restored by the guard

    hungry = Hungry(layered(2), 2, Full("CUDA out of memory."))
    method = ScoreCAM("net.act", perturbations_per_pass=4)
    close(only(hungry, probe, method, window=window).values, plain)
    assert len(refused) > 1


@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
@pytest.mark.parametrize(("channels", "counted"), [(3, 3), (4, 4), (64, 4)])
def test_the_cost_is_what_is_counted(window, channels, counted):
    """Where the layer has as many channels; less where it has fewer."""
    probe, net = a_probe((8, 8, 12)), Counting(layered())
    predictor = Predictor(net, window)
    windows = len(predictor.windows(probe.shape).places)
    predictor.rehearse(probe.image[(slice(None), *predictor.windows(probe.shape).places[0])])
    before = net.counts["forward"]
    method = ScoreCAM("net.act", channels)
    explain(predictor, probe, {"t": EVERYWHERE}, {"m": method})
    assert net.counts["forward"] - before == windows * (1 + 1 + counted)
    assert method.extra_passes((8, 8, 12), windows).forward == windows * (1 + channels)
    assert net.counts["backward"] == 0


def test_auto_and_unknown_layers():
    """As for all layers."""
    assert only(layered(), a_probe(), ScoreCAM()).layer == "act"
    with pytest.raises(ValueError, match="no such layer"):
        only(layered(), a_probe(), ScoreCAM("nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "`ScoreCAM(channels=0)` must be at least 1."),
        ({"perturbations_per_pass": 0}, "`ScoreCAM(perturbations_per_pass=0)` must be at least 1"),
        ({"sigma_mm": 0.0}, "`sigma_mm` must be positive"),
    ],
)
def test_wrong_settings_die_at_once(settings, message):
    """When the method is written down."""
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoreCAM(**settings)
