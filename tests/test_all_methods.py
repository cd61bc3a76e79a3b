"""No method is forgotten: in the experiment that runs them all, and in the matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

import lightning_segxai
from lightning_segxai.methods.base import AttributionMethod, JointMethod, LookMethod

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS / "benchmarks"))

EXPORTED = {
    name
    for name in lightning_segxai.__all__
    if isinstance(value := getattr(lightning_segxai, name), type)
    and issubclass(value, AttributionMethod)
    and value not in (AttributionMethod, JointMethod, LookMethod)
}


def test_the_experiment_runs_every_method():
    """`experiments/all_methods.yaml` names each of them once."""
    config = yaml.safe_load((EXPERIMENTS / "all_methods.yaml").read_text(encoding="utf-8"))
    named = [
        method if isinstance(method, str) else method["class_path"]
        for method in config["segxai"]["methods"].values()
    ]
    assert len(named) == len(set(named))
    assert set(named) == EXPORTED


def test_the_matrix_has_every_method():
    """`experiments/benchmarks/matrix.py` checks each of them on every network."""
    import matrix

    assert set(matrix.METHODS) == EXPORTED
    assert all(type(method).__name__ == name for name, method in matrix.METHODS.items())


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_a_method_says_what_it_costs_and_where_it_is_from(name):
    """Its docstring has a formula, the cost, and the paper."""
    text = " ".join((getattr(lightning_segxai, name).__doc__ or "").split())
    assert "$$" in text
    assert "cost" in text.lower()
    assert "References:" in text
