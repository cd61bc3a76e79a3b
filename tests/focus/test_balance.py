"""How much attribution there is and on which side: known answers and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps import attribution_of

from lightning_segxai.focus.balance import SignBalance, TotalMass

coarse_maps = hnp.arrays(np.int8, (3, 4, 5), elements=st.integers(-4, 4))


def measured(values):
    attribution = attribution_of(values)
    return [TotalMass().measure(attribution), SignBalance().measure(attribution)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[[3.0, -1.0, 0.0]]], [4.0, 0.5]),
        ([[[-3.0, -1.0, 0.0]]], [4.0, -1.0]),
        ([[[2.0, -2.0, 0.0]]], [4.0, 0.0]),
    ],
)
def test_by_hand(values, expected):
    """Paper and pencil."""
    assert measured(torch.tensor(values)) == expected


@given(values=coarse_maps, scale=st.sampled_from([1e-3, 0.37, 1e4]))
def test_scale_and_sign(values, scale):
    """The total scales with the map; the balance does not, and turns with its sign."""
    assume(values.any())
    total, balance = measured(values)

    assert -1.0 <= balance <= 1.0
    assert measured(values * scale) == pytest.approx([total * scale, balance])
    assert measured(-values) == pytest.approx([total, -balance])
