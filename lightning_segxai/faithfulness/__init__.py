"""Whether a map is faithful: what the network does when voxels go that the map calls important."""

from __future__ import annotations

from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.faithfulness.correlation import FaithfulnessCorrelation
from lightning_segxai.faithfulness.deletion import Deletion, Insertion
from lightning_segxai.faithfulness.random_map import RandomBaseline

__all__ = [
    "Deletion",
    "FaithfulnessCorrelation",
    "FaithfulnessMetric",
    "Insertion",
    "RandomBaseline",
]
