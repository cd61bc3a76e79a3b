"""Sliding windows: placement, shares, and the blend that a deployed network would give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from nets_for_tests import blended, close, layered, linear_net

from lightning_segxai.scored import Predictor
from lightning_segxai.values import as_shape
from lightning_segxai.windows import Windows

sizes = st.tuples(*[st.integers(1, 17)] * 3)
edges = st.tuples(*[st.integers(1, 9)] * 3)
overlaps = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9])


@settings(max_examples=60)
@given(sizes, edges, overlaps)
def test_shares_sum_to_one_at_every_voxel(shape, window, overlap):
    """The windows cover the volume, lie inside, and their shares are a partition of unity."""
    if math.prod(shape) / math.prod(window) / (1 - overlap) ** 3 > 3000:
        window = tuple(max(edge, 4) for edge in window)
    windows = Windows(shape, window, overlap)
    total = torch.zeros(shape, dtype=torch.float64)
    for place in windows.places[:4000]:
        share = windows.share(place, torch.float64)
        assert bool((share > 0).all())
        assert share.shape == total[place].shape
        assert all(
            s.stop - s.start == min(edge, size)
            for s, edge, size in zip(place, window, shape, strict=True)
        )
        total[place] += share
    assert len(set(map(str, windows.places))) == len(windows.places)
    if len(windows.places) <= 4000:
        assert torch.allclose(total, torch.ones_like(total), atol=1e-12)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((13, 16, 12), (8, 8, 8)),
        ((11, 9, 10), (8, 6, 4)),
        ((8, 8, 8), (8, 8, 8)),
        ((9, 4, 7), (4, 4, 4)),
    ],
)
def test_prediction_is_monais(shape, window, overlap):
    """Placement and weights are those of MONAI's Gaussian sliding window inference."""
    net = layered(channels=2, classes=3) if window[0] % 2 == 0 and window[2] % 2 == 0 else None
    assert net is not None
    x = torch.randn(2, *shape, dtype=torch.float64)
    ours = Predictor(net, window, overlap).predict(x)

    with torch.no_grad():
        theirs = sliding_window_inference(
            x[None], window, 4, net, overlap=overlap, mode="gaussian", padding_mode="replicate"
        )[0]
        close(ours, blended(net, x, window, overlap))
    close(ours, theirs, 1e-6)  # MONAI weighs in float32


def test_prediction_of_one_window_is_the_networks():
    """A volume as large as the window is one pass."""
    net = linear_net()
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(Predictor(net, (6, 7, 8)).predict(x), net(x[None])[0])
        assert torch.equal(Predictor(net).predict(x), net(x[None])[0])


def test_a_short_axis_is_padded_by_its_last_voxels():
    """A volume thinner than the window is repeated at its end, and cropped back."""
    net = layered()
    x = torch.randn(1, 13, 5, 3, dtype=torch.float64)
    predictor = Predictor(net, (8, 8, 8))
    with torch.no_grad():
        close(predictor.predict(x), blended(net, x, (8, 8, 8)))
    assert len(predictor.windows(x.shape[1:]).places) == 3
    [rehearsal] = predictor.rehearsals.values()
    assert rehearsal.padded == (8, 8, 8)


def test_the_last_window_is_moved_inside():
    """Where steps do not divide the axis, the last window ends with the volume."""
    places = Windows((10, 4, 4), (4, 4, 4), 0.25).places
    assert [p[0].start for p in places] == [0, 3, 6]
    assert [p[0].start for p in Windows((9, 4, 4), (4, 4, 4), 0.25).places] == [0, 3, 5]


def test_shares_have_the_dtype_that_is_asked_for():
    """float32 unless told otherwise."""
    windows = Windows((6, 4, 4), (4, 4, 4))
    assert windows.share(windows.places[0]).dtype is torch.float32
    assert windows.share(windows.places[0], torch.float64).dtype is torch.float64


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 1.5])
def test_overlap_lies_below_one(overlap):
    """An overlap of one would never advance."""
    with pytest.raises(ValueError, match="`overlap` must be at least 0 and below 1"):
        Windows((8, 8, 8), (4, 4, 4), overlap)


def test_sizes_are_one_or_three():
    """A number is a cube."""
    assert as_shape(4, "window") == (4, 4, 4)
    assert as_shape([2, 3, 4], "window") == (2, 3, 4)


@pytest.mark.parametrize("size", [0, -1, (1, 2), (1, 2, 3, 4), (1, 0, 2)])
def test_other_sizes_are_refused(size):
    """The error names the argument."""
    with pytest.raises(ValueError, match="`window` needs one or three positive whole numbers"):
        as_shape(size, "window")
