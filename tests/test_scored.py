"""A network seen through a target: any kind of output, padding, windows, one rehearsal."""

from __future__ import annotations

import contextlib
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets_for_tests import (
    Answers,
    Counting,
    Halving,
    Hungry,
    Weigh,
    a_probe,
    blended,
    close,
    layered,
    linear_net,
    seeded,
)
from torch import nn

from lightning_segxai.methods.gradients import InputXGradient
from lightning_segxai.nets import UNet3d
from lightning_segxai.scored import Passes, Predictor, ScoredModel, describe, in_pieces
from lightning_segxai.targets import ClassEvidence, ClassMargin
from lightning_segxai.values import Probe

X = torch.randn(1, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("net", "outputs", "expected"),
    [
        (Weigh(2), None, [0, 2]),
        (Weigh(2), "sigmoid", [0, 2]),
        (Weigh(1, 2), None, [1, 2]),
        (Weigh(1, 2), "softmax", [1, 2]),
        (Weigh(1, 2), "sigmoid", [0, 1, 2]),
        (Weigh(1, 2, 3), None, [1, 2, 3]),
        (Weigh(1, 2, 3), "sigmoid", [0, 1, 2, 3]),
    ],
)
def test_every_class_has_a_channel(net, outputs, expected):
    """A sigmoid network gets a background of zeros; a softmax network has its own."""
    logits = Predictor(net, outputs=outputs).predict(X)
    assert torch.equal(logits, torch.stack([weight * X[0] for weight in expected]))


def test_softmax_needs_two_channels():
    """One channel cannot compete with itself."""
    with pytest.raises(ValueError, match=r'`Weigh` has one\. Use "sigmoid"'):
        Predictor(Weigh(1), outputs="softmax").predict(X)


@pytest.mark.parametrize(
    "form", ["tensor", "tuple", "coarse first", "list", "dict", "nested", "stacked"]
)
def test_logits_are_found_in_any_kind_of_output(form):
    """The first tensor of full resolution, wherever it is."""
    net = seeded(Answers(form))
    with torch.no_grad():
        assert torch.equal(Predictor(net).predict(X), net.conv(X[None])[0])


def test_a_callable_says_where_logits_are():
    """It goes before our guess, and sees the raw output."""
    net = seeded(Answers("features"))
    with torch.no_grad():
        own = net.conv(X[None])[0]
        assert torch.equal(Predictor(net).predict(X), own * 0 + 5)  # the guess is wrong here
        assert torch.equal(Predictor(net, logits=lambda out: out[1]).predict(X), own)


def test_probabilities_are_made_logits_by_the_callable():
    """The score is then of the logits."""
    net = nn.Sequential(Weigh(1), nn.Sigmoid())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = Predictor(net, logits=torch.logit).predict(X)
    assert torch.allclose(logits[1], X[0])


@pytest.mark.parametrize("activation", [nn.Softmax(1), nn.Sigmoid()])
def test_outputs_that_look_like_probabilities_warn(activation):
    """Once for a shape, naming the network and the way out."""
    predictor = Predictor(nn.Sequential(linear_net(), activation))
    with pytest.warns(UserWarning, match=r"`Sequential` lie in \[0, 1\].*`logits=`"):
        predictor.predict(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(X)


def test_an_untrained_network_does_not_warn():
    """Its logits may all lie in [0, 1], close together."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=3).eval()
    torch.nn.init.constant_(net.head.bias, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = Predictor(net).predict(torch.randn(1, 16, 16, 16))
    assert 0 < float(logits[1].min()) < float(logits[1].max()) < 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_a_rehearsal_without_memory_is_not_taken_for_a_wrong_size(error):
    """It comes out as what it is, at once."""
    net = Hungry(linear_net(), 0, error)
    with pytest.raises(type(error), match=str(error)):
        Predictor(net).predict(X)
    assert net.refused == 1


def test_logits_do_not_warn():
    """Neither do constant ones, which an untrained network may give."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Predictor(linear_net()).predict(X)
        Predictor(Weigh(0, 0)).predict(X)


@pytest.mark.parametrize(
    ("net", "found"),
    [
        (Answers("coarse"), "a tensor of shape (1, 2, 4, 4, 4)"),
        (Answers("coarse tuple"), "a tuple of a tensor of shape (1, 2, 4, 4, 4), a tensor"),
        (nn.Flatten(), "a tensor of shape (1, 512)"),
    ],
)
def test_a_network_without_full_resolution_is_refused(net, found):
    """The error names the network, the volume, what came out and what to do."""
    with pytest.raises(ValueError, match="full-resolution") as caught:
        Predictor(seeded(net)).predict(X)
    text = str(caught.value)
    assert f"`{type(net).__name__}`" in text
    assert "(1, 8, 8, 8)" in text
    assert found in text
    assert "`logits=` can pick or make them" in text


def test_an_output_that_is_no_tensor_is_described():
    """In a few words."""
    assert describe({"a": torch.zeros(2), "b": (None, "c")}) == (
        "a dict of a: a tensor of shape (2,), b: a tuple of a NoneType, a str"
    )


def test_a_network_that_never_accepts_shows_its_first_answer():
    """The first line of its own words."""
    with pytest.raises(ValueError, match="sizes must be multiples of 999"):
        Predictor(seeded(Halving(999))).predict(X)


def test_a_programming_mistake_is_not_taken_for_a_wrong_size():
    """A KeyError comes out as it is."""
    with pytest.raises(KeyError, match="features"):
        Predictor(seeded(Answers("dict")), logits=lambda out: out["features"]).predict(X)


def test_an_odd_volume_is_padded_to_what_the_network_accepts():
    """140 x 123 x 34 through a U-Net of four levels: padded by its last voxels, cropped back."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=4).eval()
    x = torch.randn(1, 140, 123, 34)
    predictor = Predictor(net)
    logits = predictor.predict(x)

    assert logits.shape == (2, 140, 123, 34)
    [rehearsal] = predictor.rehearsals.values()
    assert rehearsal.padded == (144, 128, 40)
    padded = nn.functional.pad(x[None], [0, 6, 0, 5, 0, 4], mode="replicate")
    with torch.no_grad():
        assert torch.equal(logits[1], net(padded)[0, 0, :140, :123, :34])


def test_the_gradient_of_padding_goes_back_to_the_last_voxel():
    """A padded volume is explained on its own grid."""
    net = seeded(Halving(8))
    probe = a_probe((7, 8, 5))
    predictor = Predictor(net)
    weights = ClassEvidence(1, "everywhere").weights(probe, predictor.predict(probe.image))
    map_ = InputXGradient().attribute(ScoredModel(predictor, probe, weights), probe.image)

    x = probe.image.clone().requires_grad_()
    (
        weights
        * net(nn.functional.pad(x[None], [0, 3, 0, 0, 0, 1], mode="replicate"))[0, :, :7, :, :5]
    ).sum().backward()
    close(map_, (x * x.grad).sum(0).detach())


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_one_rehearsal_for_each_shape(window):
    """One pass finds out what is accepted; later passes of that shape just run."""
    net = Counting(linear_net())
    predictor = Predictor(net, window)
    first, second = torch.randn(1, 8, 8, 12).double(), torch.randn(1, 12, 8, 8).double()
    places = 1 if window is None else 2
    for x in (first, first + 1):
        predictor.predict(x)
    assert net.counts["forward"] == 1 + 2 * places
    predictor.predict(second)
    shapes = 2 if window is None else 1  # the window is the same
    assert net.counts["forward"] == shapes + 3 * places
    assert predictor.passes.forward == net.counts["forward"]
    assert len(predictor.rehearsals) == shapes


def test_the_rehearsal_leaves_no_hooks():
    """Also when the network refuses."""
    for net in (linear_net(), seeded(Halving(8)), seeded(Answers("coarse"))):
        with contextlib.suppress(ValueError):
            Predictor(net).predict(torch.randn(1, 7, 8, 8, dtype=torch.float64))
        assert not any(m._forward_hooks for m in net.modules())


def test_the_rehearsal_lists_layers_in_execution_order():
    """Names, shapes of the padded batch of one, without the network itself."""
    layers = Predictor(layered()).rehearse(X).layers
    names = ["body.0", "body.1", "body.2", "body.3", "body", "act", "tail.0", "tail.1", "tail"]
    assert list(layers) == names
    assert layers["act"] == (1, 4, 4, 4, 4)


@pytest.mark.parametrize("window", [None, (8, 8, 8), (8, 6, 8)])
@pytest.mark.parametrize("shape", [(9, 12, 8), (10, 11, 6)])
def test_the_score_of_a_batch_is_that_of_each_blended_volume(window, shape):
    """By windows or whole, differentiable, and equal to the sum over blended logits."""
    net = linear_net(2, bias=True) if window is None else layered(2)
    probe = a_probe(shape, 2)
    predictor = Predictor(net, window)
    logits = predictor.predict(probe.image)
    model = ScoredModel.aim(predictor, probe, ClassMargin(1, 0), logits)
    x = torch.stack([probe.image, probe.image * 2, probe.image - 1]).requires_grad_()
    scores = model(x)

    by_hand = torch.stack([(model.weights * blended(net, one, window)).sum() for one in x])
    close(scores.detach(), by_hand.detach())
    assert model.score(logits) == pytest.approx(float(by_hand[0].detach()), rel=1e-12)
    [ours] = torch.autograd.grad(scores.sum(), x)
    [plain] = torch.autograd.grad(by_hand.sum(), x)
    close(ours, plain)


def test_a_network_of_another_precision():
    """A float32 network on a float64 probe: the map has the probe's precision."""
    net = linear_net().float()
    logits = Predictor(net).predict(X)
    assert logits.dtype is torch.float64
    with torch.no_grad():
        assert torch.equal(logits, net(X[None].float())[0].double())


def test_the_context_of_the_forward_is_entered_around_the_network():
    """Autocast, say: the network runs in bfloat16, everything else in the probe's dtype."""
    seen = []
    net = linear_net().float()
    net[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    predictor = Predictor(net, forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert predictor.predict(X.float()).dtype is torch.float32
    assert set(seen) == {torch.bfloat16}


def test_looks_per_pass_depend_on_shapes_only():
    """Eight small windows, or one of 64^3; or what the user says."""

    def place(*edges):
        return tuple(slice(3, 3 + edge) for edge in edges)

    auto = Predictor(Weigh(1))
    assert auto.batch(place(8, 8, 8)) == 8
    assert auto.batch(place(64, 64, 32)) == 2
    assert auto.batch(place(64, 64, 64)) == 1
    assert auto.batch(place(140, 123, 34)) == 1
    assert Predictor(Weigh(1), looks_per_pass=3).batch(place(8, 8, 8)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "`threshold` must lie between 0 and 1, but got 0.0"),
        ({"threshold": 1.0}, "`threshold`"),
        ({"looks_per_pass": 0}, "`looks_per_pass` must be at least 1, but got 0"),
        ({"looks_per_pass": -2}, "`looks_per_pass`"),
    ],
)
def test_wrong_settings_die_at_once(settings, message):
    """When the predictor is made."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Predictor(Weigh(1), **settings)


def test_the_score_is_summed_in_float64():
    """Large regions do not lose the last digits."""
    probe = Probe("p", torch.full((1, 64, 64, 16), 0.1))
    predictor = Predictor(Weigh(1).float())
    logits = predictor.predict(probe.image)
    model = ScoredModel.aim(predictor, probe, ClassEvidence(1, "everywhere"), logits)
    exact = 65536 * float(torch.tensor(0.1))
    assert model.score(logits) == pytest.approx(exact, rel=1e-12)
    assert model.voxels == 65536


def test_noise_of_a_model_is_that_of_its_seed():
    """A fresh generator each time."""
    model = ScoredModel(Predictor(Weigh(1)), a_probe(), torch.zeros(2, 8, 8, 8), seed=5)
    a = torch.randn(3, generator=model.generator())
    assert torch.equal(a, torch.randn(3, generator=model.generator()))
    assert torch.equal(a, torch.randn(3, generator=torch.Generator().manual_seed(5)))


@given(
    st.lists(st.integers(-5, 5), max_size=30), st.integers(1, 9), st.integers(1, 9), st.booleans()
)
def test_work_comes_in_pieces_of_what_is_alike(work, size, room, mixed):
    """In order, every item once, no larger than the size; halved where memory lacks."""
    tried = []

    def look(piece):
        tried.append(len(piece))
        if len(piece) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-item for item in piece]

    alike = (lambda _: 0) if mixed else (lambda item: item < 0)
    found = list(in_pieces(iter(work), size, look, alike))
    assert [item for piece, _ in found for item in piece] == work
    for piece, result in found:
        assert result == [-item for item in piece]
        assert 1 <= len(piece) <= min(size, room)
        assert len({alike(item) for item in piece}) == 1
    assert max(tried, default=0) <= size


def test_an_error_outside_of_the_look_does_not_make_a_piece_come_twice():
    """What is done with a result is not retried."""
    seen = []

    def consume():
        for piece, _ in in_pieces(range(8), 4, len):
            seen.extend(piece)
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        consume()
    assert seen == [0, 1, 2, 3]


def test_work_is_taken_when_it_is_needed():
    """An endless one is looked at piece by piece."""
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield taken[-1]

    pieces_of_it = in_pieces(endless(), 3, sum)
    assert [next(pieces_of_it)[1] for _ in range(2)] == [3, 12]
    assert len(taken) == 6


def test_passes_are_counted_as_batch_items():
    """Forward by the predictor, from none."""
    predictor = Predictor(layered(), (8, 8, 8))
    assert predictor.passes == Passes(0, 0)
    predictor.predict(a_probe((8, 8, 12)).image)
    assert predictor.passes == Passes(1 + 2, 0)  # the rehearsal, and two windows
