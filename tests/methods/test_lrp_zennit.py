"""LRP against what zennit gave; how, and with which formulas, says `oracles/make_lrp.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from nets_for_tests import close
from torch import Tensor

from lightning_segxai.explain import explain
from lightning_segxai.methods.relevance import LRP
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import Target
from lightning_segxai.values import Probe

ORACLES = Path(__file__).parents[1] / "oracles"
sys.path.insert(0, str(ORACLES))
from make_lrp import network  # noqa: E402 - its folder is no package

THEIRS = json.loads((ORACLES / "lrp_zennit.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in THEIRS["cases"]}
RULES = {
    "epsilon": LRP("epsilon", "same"),
    "zplus": LRP("z+", "same"),
    "zplus_wsquare": LRP("z+", "w2"),
    "zplus_zbox": LRP("z+", "zb"),
}


@dataclass(frozen=True)
class Cube(Target):
    """The logits of the file's class in its cube."""

    def weights(self, probe: Probe, logits: Tensor) -> Tensor:
        weights = torch.zeros_like(logits)
        weights[(THEIRS["class"], *(slice(*ends) for ends in THEIRS["cube"]))] = 1
        return weights


def of_file(name):
    """The file's network and input."""
    net, _ = network(name)
    state = {
        k: torch.tensor(v, dtype=torch.float64)
        for k, v in THEIRS["networks"][name]["state"].items()
    }
    missing = net.load_state_dict(state, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    image = torch.tensor(THEIRS["networks"][name]["input"], dtype=torch.float64)[0]
    return net, Probe("p", image)


@pytest.mark.parametrize("name", THEIRS["networks"])
def test_the_networks_are_the_files(name):
    """The recipe gives the numbers that the file has."""
    net, probe = of_file(name)
    mine, x = network(name)
    close(x[0], probe.image, 1e-7)
    close(mine(x), net(x), 1e-6)
    with torch.no_grad():
        logits = net(probe.image[None])
    sums = THEIRS["networks"][name]["sums"]
    assert float(logits.sum()) == pytest.approx(sums["logits"], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_zennit(case):
    """Every rule, on networks without norms, with BatchNorm and with a skip connection."""
    name, rule = case.split("_", 1)
    net, probe = of_file(name)
    [found] = explain(Predictor(net), probe, {"t": Cube()}, {"m": RULES[rule]})
    assert found.status == "ok", found.reason
    theirs = torch.tensor(CASES[case]["relevance"], dtype=torch.float64)[0, 0]
    close(found.values * 8, theirs, 1e-9)
    assert float(found.values.sum()) == pytest.approx(CASES[case]["sum"] / 8, rel=1e-9)
    ratio = CASES[case]["sum_over_initial"]
    assert found.completeness_error == pytest.approx(abs(ratio - 1), rel=1e-6)
