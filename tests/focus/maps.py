"""Maps for the tests of metrics."""

from __future__ import annotations

import torch

from lightning_segxai.values import Attribution, Probe


def attribution_of(values, label=None, spacing=(1.0, 1.0, 1.0), region=None, regions=None):
    """A map of these values, on a probe with this label."""
    values = torch.as_tensor(values)
    if not values.is_floating_point():
        values = values.double()
    return Attribution(
        probe=Probe(
            "p",
            torch.zeros(1, *values.shape),
            label=None if label is None else torch.as_tensor(label).long(),
            spacing_mm=spacing,
            regions=regions or {},
        ),
        target="vessel",
        method="m",
        layer="",
        values=values,
        unit="a.u.",
        region=torch.ones(values.shape, dtype=torch.bool) if region is None else region,
        prediction=torch.zeros(values.shape, dtype=torch.int64),
        score=1.0,
    )
