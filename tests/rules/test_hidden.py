"""What a rule does not see, or cannot tell, is refused; what it holds is let go of."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from nets_for_tests import a_probe, layered, seeded
from torch import nn

from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAMPlusPlus
from lightning_segxai.methods.deeplift import DeepLift, LayerDeepLift
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.guided import Deconvolution, GuidedBackprop
from lightning_segxai.methods.layer_guided import LayerGuidedBackprop
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.relevance import (
    LRP,
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
)
from lightning_segxai.rules.relevance import Relevance
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence

TARGET = {"t": ClassEvidence(1, "everywhere")}


def only(net, method, probe=None, **settings):
    [found] = explain(Predictor(net, **settings), probe or a_probe(), TARGET, {"m": method})
    return found


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


class Between(nn.Module):
    """Two convolutions, a ReLU, and a function between them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 3, 3, padding=1)
        self.second = nn.Conv3d(3, 3, 3, padding=1)
        self.head = nn.Conv3d(3, 2, 1)
        self.function = function

    def forward(self, x):
        return self.head(F.relu(self.second(self.function(self.first(x)))))


@pytest.mark.parametrize("method", [GuidedBackprop(), Deconvolution(), DeepLift(), LRP()])
def test_a_scripted_function_is_refused(method):
    """Even where the rule met another activation, which it did see."""
    found = only(seeded(Between(scripted)), method)
    assert found.status == "unsupported"
    assert "could not see all activations" in found.reason
    assert only(seeded(Between(F.relu)), method).status == "ok"


@pytest.mark.parametrize("method", [DeepLift(), LRP(), ExcitationBackprop()])
def test_a_function_without_a_rule_is_refused(method):
    """By its name, with what to use instead."""
    found = only(seeded(Between(lambda x: F.normalize(x, dim=1))), method)
    assert found.status == "unsupported"
    assert "has no rule for `normalize`. Use `IntegratedGradients`" in found.reason


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        lambda x: x.abs() ** 2,
        lambda x: x.abs().sqrt(),
        lambda x: x / (x.abs().mean(dim=(2, 3, 4), keepdim=True) + 1),
        lambda x: x * x.mean(dim=(2, 3, 4), keepdim=True).softmax(dim=1),
    ],
    ids=["exp", "square", "root", "quotient", "softmax gate"],
)
def test_excitation_goes_through_other_functions_unchanged(function):
    """As much of it arrives as without the function, which is passed or only weighs."""
    net = seeded(Between(function))
    with torch.no_grad():
        for part in (net.first, net.second, net.head):
            part.weight.abs_()
            part.bias.zero_()
    probe = a_probe()
    object.__setattr__(probe, "image", probe.image.abs())
    found = only(net, ExcitationBackprop(), probe)
    assert float(found.values.sum()) == pytest.approx(1, abs=1e-6)


class Heads(nn.Module):
    """A main head, and an auxiliary one that runs before or after it."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.body, self.last = nn.Conv3d(1, 3, 3, padding=1), last
        self.main, self.auxiliary = nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 1)

    def forward(self, x):
        x = self.body(x).relu()
        if self.last:
            return self.main(x), self.auxiliary(x)
        coarse = self.auxiliary(x)
        return self.main(x), coarse


def test_contrast_needs_the_last_convolution_to_be_the_head():
    """An auxiliary head that runs after it would leave nothing but zeros."""
    refused = only(seeded(Heads(last=True)), ContrastiveExcitationBackprop())
    assert refused.status == "unsupported"
    assert "Run auxiliary heads before the main one" in refused.reason
    found = only(seeded(Heads(last=False)), ContrastiveExcitationBackprop())
    assert found.status == "ok"
    assert bool(found.values.any())


def test_the_first_layer_has_nothing_to_guide():
    """Rectifiers behind it do not count."""
    net = seeded(
        nn.Sequential(
            nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 3, padding=1), nn.ReLU(),
            nn.Conv3d(2, 2, 1),
        )
    )  # fmt: skip
    assert only(net, LayerGuidedBackprop("0")).status == "unsupported"
    assert only(net, LayerGuidedBackprop("2")).status == "ok"


class TokensFirst(nn.Module):
    """Puts the batch behind the voxels for a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.LayerNorm(4)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        y = self.first(x)
        tokens = self.norm(y.flatten(2).permute(2, 0, 1)).relu()
        return self.head(tokens.permute(1, 2, 0).reshape(y.shape))


def test_a_layers_deep_lift_that_does_not_add_up_is_refused():
    """A network that mixes volume and baseline gets the reason, not a map."""
    found = only(seeded(TokensFirst()), LayerDeepLift("first"))
    assert found.status == "unsupported"
    assert "has something that its rule does not see" in found.reason


def test_sums_over_a_layer_do_not_overflow_in_half_precision():
    """Grad-CAM++ of a layer whose sum is beyond float16 is that of float32."""
    net = seeded(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1)))
    with torch.no_grad():
        net[0].bias.add_(8)
    net = net.float()
    probe = a_probe((24, 24, 24))
    object.__setattr__(probe, "image", probe.image.float())
    plain = only(net, GradCAMPlusPlus("1"), probe).values
    half = only(
        net, GradCAMPlusPlus("1"), probe,
        forward_context=lambda: torch.autocast("cpu", torch.float16),
    ).values  # fmt: skip
    assert float(plain.max()) > 0
    assert torch.allclose(half, plain, rtol=0.02, atol=0.02 * float(plain.max()))


def test_torchs_own_batch_norm_is_explained():
    """Its arguments have another order than those of the functional form."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)

        def forward(self, x):
            n = self.norm
            kept = (n.weight, n.bias, n.running_mean, n.running_var)
            return torch.batch_norm(self.conv(x), *kept, False, 0.1, 1e-5, False)

    net = seeded(Own())
    assert only(net, Saliency()).status == "ok"
    refused = only(net, LRP())
    assert refused.status == "unsupported"
    assert "not `torch.batch_norm`" in refused.reason


@pytest.mark.parametrize("method", [LRP(), ExcitationBackprop(), GuidedBackprop(), DeepLift()])
def test_nothing_is_kept_of_a_look(monkeypatch, method):
    """Without the garbage collector: memory does not grow with the windows."""
    alive = []
    plain = Relevance.interception

    def noted(self, *args):
        mode = plain(self, *args)
        alive.append(weakref.ref(mode))
        return mode

    monkeypatch.setattr(Relevance, "interception", noted)
    gc.collect()
    gc.disable()
    try:
        found = only(layered(rectified=True), method, a_probe((8, 8, 24)), window=(8, 8, 8))
        assert found.status == "ok"
        assert not any(ref() is not None for ref in alive[:-1])
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [DeepLift, LayerDeepLift, IntegratedGradients])
def test_another_word_for_the_norms_dies_at_once(kind):
    """Past the type checker, too."""
    method = kind()
    object.__setattr__(method, "norm", "frosen")
    with pytest.raises(ValueError, match="must be frozen or exact"):
        method.__post_init__()
