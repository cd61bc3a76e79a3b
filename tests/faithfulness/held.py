"""A network, a target and a map to hold against each other."""

from __future__ import annotations

import torch
from nets_for_tests import blended
from torch import nn

from lightning_segxai.baselines import Baseline
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.values import Attribution, Probe

EVERYWHERE = ClassEvidence(1, "everywhere")


class Functional(nn.Module):
    """The score is a function of the volume: it is the second logit of the first voxel."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        logits = x.new_zeros(len(x), 2, *x.shape[2:])
        logits[:, 1, 0, 0, 0] = torch.stack([self.function(one) for one in x])
        return logits


def model_of(net, probe, target=EVERYWHERE, seed=0, **settings):
    """The network seen through the target, as `assess` sees it."""
    predictor = Predictor(net, **settings)
    return ScoredModel.aim(predictor, probe, target, predictor.predict(probe.image), seed)


def map_of(model, values):
    """A map of these values."""
    logits = model.predictor.predict(model.probe.image)
    return Attribution(
        probe=model.probe,
        target="vessel",
        method="m",
        layer="",
        values=torch.as_tensor(values),
        unit="logit",
        region=torch.ones(model.probe.shape, dtype=torch.bool),
        prediction=model.predictor.decisive(logits).argmax(0),
        score=model.score(logits),
    )


def a_volume(image, **extra):
    """A probe of one channel."""
    return Probe("p", torch.as_tensor(image)[None].double(), **extra)


def hidden_of(probe, baseline, sigma_mm=5.0):
    """The baseline of seed 0."""
    recipe = Baseline(baseline, sigma_mm)
    return recipe.make(probe.image, probe.spacing_mm, torch.Generator().manual_seed(0))


def plain_score(net, x, weights, window=None):
    """The score, written down: the weighted sum of blended logits."""
    with torch.no_grad():
        return float((weights * blended(net, x, window)).sum())


def random_values(shape, seed=0):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).double()
