"""Whether a map is faithful: what the network does when voxels go that the map calls important."""

from __future__ import annotations

from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.faithfulness.correlation import FaithfulnessCorrelation
from lightning_segxai.faithfulness.deletion import Deletion, Insertion
from lightning_segxai.faithfulness.infidelity import Infidelity
from lightning_segxai.faithfulness.random_map import RandomBaseline
from lightning_segxai.faithfulness.randomization import EfficientRandomization, Randomization
from lightning_segxai.faithfulness.stability import SensitivityMax

__all__ = [
    "Deletion",
    "EfficientRandomization",
    "FaithfulnessCorrelation",
    "FaithfulnessMetric",
    "Infidelity",
    "Insertion",
    "RandomBaseline",
    "Randomization",
    "SensitivityMax",
]
