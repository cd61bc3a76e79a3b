"""Layers: finding them by name, keeping their outputs, bringing maps to the input's grid."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets_for_tests import (
    Counting,
    Halving,
    InPlace,
    Reused,
    a_probe,
    close,
    layered,
    linear_net,
    pieces,
    seeded,
)
from torch import nn

from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.methods.layers import LayerActivation
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.taps import (
    activations,
    project,
    resolve_layer,
    spread,
    tapped,
    to_window,
    weighted,
)
from lightning_segxai.targets import ClassEvidence


def test_a_tap_survives_an_inplace_activation():
    """The tapped layer's output is what it was before it was overwritten, and so is the map."""
    methods = {
        "act": LayerActivation("conv"),
        "hires": HiResCAM("conv", relu=False),
        "cam": GradCAM("conv", relu=False),
        "behind": HiResCAM("act", relu=False),
        "saliency": Saliency(),
    }
    probe = a_probe()

    def maps(inplace):
        predictor = Predictor(seeded(InPlace(inplace)))
        return [a.values for a in explain(predictor, probe, {"t": ClassEvidence(1)}, methods)]

    for changed, plain in zip(maps(True), maps(False), strict=True):
        assert torch.equal(changed, plain)
        assert changed.any()
    net = seeded(InPlace(True))
    with tapped(net, {"conv"}) as taps, torch.no_grad():
        net(probe.image[None])
        assert bool((taps["conv"] < 0).any())


def test_a_tap_does_not_change_the_network():
    """Neither while it is there nor afterwards, and other people's hooks stay."""
    net = seeded(InPlace(True))
    seen = []
    net.conv.register_forward_hook(lambda *_: seen.append(1))
    x = a_probe().image[None]
    with torch.no_grad():
        plain = net(x)
        with tapped(net, {"conv", "act"}):
            assert torch.equal(net(x), plain)
        assert torch.equal(net(x), plain)
    assert len(seen) == 3
    assert [len(m._forward_hooks) for m in (net.conv, net.act, net.head)] == [1, 0, 0]


def test_taps_are_removed_after_an_error():
    """No hook of ours survives."""
    net = seeded(InPlace(True))
    with pytest.raises(RuntimeError, match="mine"), tapped(net, {"conv"}):
        raise RuntimeError("mine")
    assert not net.conv._forward_hooks


def rehearsed(net, shape=(8, 8, 8)):
    predictor = Predictor(net)
    return predictor, predictor.rehearse(torch.randn(1, *shape, dtype=torch.float64))


def test_auto_is_the_last_of_the_smallest_layers():
    """In execution order; smaller than four voxels along an axis does not count."""
    assert resolve_layer(*rehearsed(layered()), "auto") == "act"
    assert resolve_layer(*rehearsed(seeded(Halving(8))), "auto") == "pool"
    # 6 / 2 = 3 voxels along an axis are too few, so it is the last layer of full size
    assert resolve_layer(*rehearsed(seeded(Halving(2)), (8, 8, 6)), "auto") == "head"
    assert resolve_layer(*rehearsed(linear_net()), "auto") == "1"


def test_auto_finds_nothing_in_a_small_window():
    """The error says the window and what to do."""
    with pytest.raises(ValueError, match=r"at least 4 x 4 x 4.*\(3, 8, 8\). Name a layer"):
        resolve_layer(*rehearsed(linear_net(), (3, 8, 8)), "auto")


def test_a_wrong_layer_lists_close_ones():
    """The network and the layers that were probably meant."""
    with pytest.raises(ValueError, match=r'`layer="bodi.3"`: no such layer in `Layered`.*body\.3'):
        resolve_layer(*rehearsed(layered()), "bodi.3")
    with pytest.raises(ValueError, match=r"close to it: body\.0"):
        resolve_layer(*rehearsed(layered()), "§§§")


def test_a_layer_that_gives_no_volume_is_refused():
    """With its shape."""
    with pytest.raises(
        ValueError, match=r'`layer="flat"` of `Halving` gives .*\(1, 2\), but a vol'
    ):
        resolve_layer(*rehearsed(seeded(Halving(8))), "flat")


def test_a_named_layer_is_itself():
    """Nested paths too."""
    assert resolve_layer(*rehearsed(layered()), "body.3") == "body.3"


def test_a_layers_map_on_the_grid_of_its_window():
    """Trilinear to the padded window, cropped to the place."""
    values = torch.arange(8.0, dtype=torch.float64).reshape(2, 2, 2)
    place = (slice(3, 6), slice(0, 4), slice(1, 3))
    found = to_window(values, (4, 4, 4), place)
    oracle = nn.functional.interpolate(values[None, None], (4, 4, 4), mode="trilinear")[0, 0]
    assert torch.equal(found, oracle[:3, :4, :2])
    assert torch.equal(to_window(oracle, (4, 4, 4), place), oracle[:3, :4, :2])


def test_projected_channels_blend_as_logits_do():
    """Weighted channels of each window, on its grid, times its share."""
    probe = a_probe((12, 8, 7))
    net = layered()
    predictor = Predictor(net, (8, 8, 8))
    model = ScoredModel(predictor, probe, torch.zeros(2, 12, 8, 7))
    weights = torch.tensor([1.0, -2, 3, 0.5], dtype=torch.float64)
    plain = torch.zeros(12, 8, 7, dtype=torch.float64)
    places = predictor.windows(probe.shape).places
    for place, (share, _, deep) in zip(places, pieces(net, probe.image, (8, 8, 8)), strict=True):
        channels = (deep[0].detach() * weights[:, None, None, None]).sum(0)
        plain[place] += to_window(channels, (8, 8, 8), place) * share[place]
    close(project(model, probe.image, "act", weights), plain)


def test_a_reused_layer_is_counted_and_keeps_its_last_call():
    """So that who replaces its values knows which call they are of."""
    net = seeded(Reused())
    x = a_probe().image[None]
    with torch.no_grad():
        last = net.conv(net.conv(x).tanh())
        tap = tapped(net, {"conv", "head"})
        with tap as taps:
            net(x)
    assert tap.calls == {"conv": 2, "head": 1}
    assert torch.equal(taps["conv"], last)


class Twins(nn.Module):
    """Two branches whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleDict({"conv": nn.Conv3d(1, 2, 1), "act": nn.ReLU()})
        self.right = nn.ModuleDict({"conv": nn.Conv3d(1, 2, 1), "other": nn.ReLU()})

    def forward(self, x):
        left = self.left["act"](self.left["conv"](x))
        return left + self.right["other"](self.right["conv"](x))


def test_a_name_that_fits_several_layers_lists_them():
    """Nothing is guessed: the whole path of one is asked for."""
    found = rehearsed(seeded(Twins()))
    with pytest.raises(
        ValueError,
        match=r'`layer="conv"` fits 2 layers of `Twins`: left\.conv, right\.conv\. Give the whole',
    ):
        resolve_layer(*found, "conv")
    with pytest.raises(
        ValueError, match=r'"left"` fits 2 layers of `Twins`: left\.conv, left\.act'
    ):
        resolve_layer(*found, "left")


def test_a_name_that_is_the_end_of_one_path_names_that():
    """It is not taken for it."""
    with pytest.raises(ValueError, match=r"no such layer in `Twins`\. .*close to it: left\.act\.$"):
        resolve_layer(*rehearsed(seeded(Twins())), "act")


@pytest.mark.parametrize("method", [GradCAM, HiResCAM, LayerActivation])
def test_a_method_with_a_wrong_layer_says_what_there_is(method):
    """Before anything is walked; the network has seen its rehearsal only."""
    net = Counting(layered())
    told = []
    explain(
        Predictor(net), a_probe(), {"t": ClassEvidence(1)}, {"m": method("net.body.9")},
        failed=lambda *what: told.append(what),
    )  # fmt: skip
    [(_, _, _, error)] = told
    assert "no such layer in `Counting`. Layers close to it: net.body" in str(error)
    assert net.counts["backward"] == 0


def test_activations_come_one_batch_at_a_time():
    """However many windows there are, they are not held together."""
    predictor = Predictor(layered(), (8, 8, 8), overlap=0.75, looks_per_pass=2)
    probe = a_probe((16, 12, 8))
    alive, most = [], 0
    for _, activation, padded in activations(predictor, probe.image, "act"):
        assert padded == (8, 8, 8)
        assert not activation.requires_grad
        alive.append(weakref.ref(activation))
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == len(predictor.windows(probe.shape).places) == 15
    assert most <= 4


@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 8, 7)])
def test_activations_are_the_layers(shape):
    """Window by window, also where the volume is thinner than one."""
    probe = a_probe(shape)
    net = layered()
    predictor = Predictor(net, (8, 8, 8))
    plain = pieces(net, probe.image, (8, 8, 8))
    found = list(activations(predictor, probe.image, "auto"))
    assert [place for place, *_ in found] == list(predictor.windows(probe.shape).places)
    for (_, activation, _), (*_, deep) in zip(found, plain, strict=True):
        close(activation, deep[0].detach())


def test_a_weighted_sum_of_channels():
    """One number for each."""
    channels = torch.arange(16.0).reshape(2, 2, 2, 2)
    found = weighted(channels, torch.tensor([1.0, -2.0]))
    assert torch.equal(found, channels[0] - 2 * channels[1])


def at(*sizes, start=3):
    return tuple(slice(start, start + size) for size in sizes)


SIZES = st.tuples(*[st.integers(1, 7)] * 3)


@settings(max_examples=150)
@given(SIZES, st.tuples(*[st.integers(1, 17)] * 3), st.tuples(*[st.integers(0, 16)] * 3))
def test_spreading_keeps_the_sum(size, padded, cut):
    """Whatever the grids, the padding and the crop; and no voxel's sign is turned."""
    place = at(*(max(1, edge - less) for edge, less in zip(padded, cut, strict=True)))
    values = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = spread(values, padded, place)
    assert found.shape == tuple(s.stop - s.start for s in place)
    assert float(found.sum()) == pytest.approx(float(values.sum()), abs=1e-12)
    positive = spread(values.abs(), padded, place)
    assert bool((positive >= 0).all())


@settings(max_examples=30)
@given(SIZES, st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(0, 8)] * 3))
def test_spreading_shares_out_each_voxel_by_its_trilinear_footprint(size, padded, cut):
    """A plain loop over the layer's voxels: the footprint of each is scaled to sum to one."""
    kept = tuple(max(1, edge - less) for edge, less in zip(padded, cut, strict=True))
    values = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.zeros(kept, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, size)).reshape(-1, 3).tolist():
        one = torch.zeros(size, dtype=torch.float64)
        one[tuple(index)] = 1
        footprint = to_window(one, padded, at(*padded, start=0))
        if float(footprint.sum()) < 1e-9:
            return  # a coarser grid skips it: it goes somewhere near, as the sum says
        footprint = footprint / footprint.sum() * values[tuple(index)]
        for axis, edge in enumerate(kept):
            inside = footprint.narrow(axis, 0, edge).clone()
            rest = footprint.narrow(axis, edge, footprint.shape[axis] - edge)
            inside.narrow(axis, edge - 1, 1).add_(rest.sum(dim=axis, keepdim=True))
            footprint = inside
        plain += footprint
    assert torch.allclose(spread(values, padded, at(*kept)), plain, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_spreading_to_a_multiple_is_interpolation_over_the_ratio_of_volumes(factor):
    """Away from the border, whose voxels have a smaller footprint to be shared out over."""
    values = torch.randn(6, 7, 5, dtype=torch.float64)
    padded = tuple(factor * size for size in values.shape)
    place = at(*padded)
    found, plain = spread(values, padded, place), to_window(values, padded, place) / factor**3
    # a voxel of the border reaches as far as one and a half voxels of the layer
    margin = slice(2 * factor, -2 * factor) if factor > 1 else slice(None)
    close(found[margin, margin, margin], plain[margin, margin, margin])
    if factor == 1:
        assert torch.equal(found, values)


def test_spreading_an_even_map_is_even_but_for_the_borders():
    """The border's voxels keep their share; nothing leaks."""
    found = spread(torch.ones(4, 1, 1, dtype=torch.float64), (8, 1, 1), at(8, 1, 1))[:, 0, 0]
    assert found[3:5].tolist() == [0.5, 0.5]
    assert float(found.sum()) == pytest.approx(4)


def test_what_a_layer_says_in_the_padding_goes_to_the_last_voxel():
    """Its copy is what the padding holds."""
    values = torch.tensor([1.0, 2, 3, 4]).double().reshape(4, 1, 1)
    assert spread(values, (4, 1, 1), at(2, 1, 1))[:, 0, 0].tolist() == [1, 9]


def test_a_voxel_that_a_coarse_grid_skips_goes_to_the_nearest():
    """Of nine voxels on three, six are between the grid's points."""
    for n in range(9):
        values = torch.zeros(9, 1, 1, dtype=torch.float64)
        values[n] = 1
        found = spread(values, (3, 1, 1), at(3, 1, 1))[:, 0, 0]
        assert found.tolist() == [float(m == n // 3) for m in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spreading_keeps_the_precision(dtype):
    """The shares are worked out in float64."""
    assert spread(torch.ones(2, 2, 2, dtype=dtype), (4, 4, 4), at(4, 4, 4)).dtype is dtype
