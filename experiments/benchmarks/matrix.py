"""Network x method: every cell is ok, marked as doubtful, or refused with its reason.

    python experiments/benchmarks/matrix.py            # a table in Markdown
    python experiments/benchmarks/matrix.py --json     # one line of JSON for each cell

What "ok" means is tested in `tests/methods/test_matrix.py`: completeness where the axiom exists,
equality with a slow plain re-implementation elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import torch
from networks import NETWORKS, network
from volumes import probe

from lightning_segxai import (
    LRP,
    RISE,
    Attribution,
    AttributionMethod,
    ClassEvidence,
    ContrastiveExcitationBackprop,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    ExcitationBackprop,
    ExpectedGradients,
    FeatureAblation,
    FeaturePermutation,
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackprop,
    GuidedGradCAM,
    HiResCAM,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    KernelShap,
    LayerActivation,
    LayerCAM,
    LayerConductance,
    LayerDeepLift,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerGuidedBackprop,
    LayerIntegratedGradients,
    Lime,
    Occlusion,
    Saliency,
    ScoreCAM,
    ShapleyValueSampling,
    SmoothGrad,
    SquareGrad,
    VarGrad,
    examine,
)

METHODS: dict[str, AttributionMethod] = {
    "Saliency": Saliency(),
    "InputXGradient": InputXGradient(),
    "SmoothGrad": SmoothGrad(samples=3),
    "SquareGrad": SquareGrad(samples=3),
    "VarGrad": VarGrad(samples=3),
    "IntegratedGradients": IntegratedGradients(50),
    "ExpectedGradients": ExpectedGradients(32),
    "GuidedBackprop": GuidedBackprop(),
    "Deconvolution": Deconvolution(),
    "GuidedGradCAM": GuidedGradCAM(),
    "DeepLift": DeepLift(norm="exact"),
    "DeepLiftShap": DeepLiftShap(2, norm="exact"),
    "LRP": LRP(),
    "ExcitationBackprop": ExcitationBackprop(),
    "ContrastiveExcitationBackprop": ContrastiveExcitationBackprop(),
    "LayerGuidedBackprop": LayerGuidedBackprop(),
    "GradCAM": GradCAM(),
    "GradCAMPlusPlus": GradCAMPlusPlus(),
    "HiResCAM": HiResCAM(),
    "LayerCAM": LayerCAM(),
    "ScoreCAM": ScoreCAM(channels=4),
    "LayerActivation": LayerActivation(),
    "LayerGradientXActivation": LayerGradientXActivation(),
    "LayerConductance": LayerConductance(steps=50),
    "InternalInfluence": InternalInfluence(steps=50),
    "LayerIntegratedGradients": LayerIntegratedGradients(steps=16),
    "LayerDeepLift": LayerDeepLift(norm="exact"),
    "LayerGradientShap": LayerGradientShap(samples=32),
    "Occlusion": Occlusion(8, 8),
    "FeatureAblation": FeatureAblation(supervoxels=8),
    "FeaturePermutation": FeaturePermutation(supervoxels=8, samples=1),
    "ShapleyValueSampling": ShapleyValueSampling(supervoxels=8, samples=2),
    "KernelShap": KernelShap(supervoxels=8, samples=32),
    "Lime": Lime(supervoxels=8, samples=32),
    "RISE": RISE(samples=16),
}


def cells(name: str) -> list[Attribution]:
    """All methods on one network, on a z-scored volume; BasicUNet halves four times."""
    size = 32 if name == "MONAI BasicUNet" else 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return examine(network(name), [probe(size)], {"cube": ClassEvidence(1)}, METHODS)


def verdict(cell: Attribution) -> str:
    """What a cell came to."""
    if cell.status != "ok":
        return f"{'refused' if cell.status == 'unsupported' else cell.status}: {cell.reason}"
    if cell.completeness_error is None:
        return "ok"
    axiom = f"{cell.completeness_error:.1e}"
    return f"marked: {axiom}, cancels {cell.cancellation:.0f}" if cell.doubtful else f"ok {axiom}"


def main() -> None:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description="network x method")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each cell")
    as_json = parser.parse_args().json
    torch.set_num_threads(2)
    rows: dict[str, list[str]] = {method: [] for method in METHODS}
    for name in NETWORKS:
        print(name, file=sys.stderr)
        for cell in cells(name):
            rows[cell.method].append(verdict(cell))
            if as_json:
                found = {
                    "network": name,
                    "method": cell.method,
                    "status": cell.status,
                    "completeness_error": cell.completeness_error,
                    "cancellation": cell.cancellation,
                    "doubtful": cell.doubtful,
                    "reason": cell.reason,
                }
                print(json.dumps(found), flush=True)
    if not as_json:
        print("| method |", " | ".join(NETWORKS), "|")
        print("| --- |", " | ".join("---" for _ in NETWORKS), "|")
        for method, verdicts in rows.items():
            print(f"| {method} |", " | ".join(verdicts), "|")


if __name__ == "__main__":
    main()
