"""Make quantus.json: what the metrics of Quantus 0.6.0 give for small 3D maps and a 3D network.

Versions: Python 3.11, torch 2.13.0 (CPU), numpy 2.4.6, scipy 1.17.1, scikit-image 0.26.0,
scikit-learn 1.9.1, quantus 0.6.0. Set up and run, from the repository's root (a CPU build of torch
and OpenCV without windows are enough; torchvision and Captum are not needed):

    python3 -m venv /tmp/quantus-venv
    /tmp/quantus-venv/bin/pip install -c constraints.txt torch numpy scipy scikit-image \
        scikit-learn pandas matplotlib tqdm cachetools opencv-python-headless
    /tmp/quantus-venv/bin/pip install --no-deps quantus==0.6.0
    /tmp/quantus-venv/bin/python tests/oracles/make_quantus.py

Nothing here imports quantus before ``main`` runs, so the project's tests, which have no quantus,
can import this file for ``network`` and ``volumes``.

Everything is float64. Quantus gives a network its input as float32: the input's values are
multiples of 1/64, which float32 holds exactly, and ``Scored`` widens them again. Its metrics write
into the maps that they are given, so each one gets a copy. Maps have few decimals, to be short.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SEED = 11
SHAPE = (4, 5, 6)
LARGE = (7, 8, 9)
CLASS = 1
LAYERS = ("0", "2", "4")
ORDERS = ("top_down", "bottom_up", "independent")
COMMAND = "/tmp/quantus-venv/bin/python tests/oracles/make_quantus.py"
FILE = Path(__file__).with_name("quantus.json")

FORMULAS = {
    "notation": "a: a map, G: the label, n: voxels, S: the sum of the logits of class 1 over G; "
    "ln is the natural logarithm. 'absolute' is with abs=True: every a is |a|; 'signed' with "
    "abs=False, which is the default of all but MPRT. normalise=False unless said otherwise.",
    "mass": "RelevanceMassAccuracy: sum_G a / sum a",
    "rank": "RelevanceRankAccuracy: share of G in the |G| largest a; ties as numpy sorts them",
    "pointing": "PointingGame: 1 where any of the voxels with the largest a is in G, else 0",
    "top_k": "TopKIntersection(k): share of G in the k largest a; ties as numpy sorts them",
    "attribution": "AttributionLocalisation: sum_G a / (sum a + 1e-9)",
    "sparseness": "Sparseness: Gini of |a| + 1e-7, which is Gini(|a|) sum|a| / (sum|a| + n 1e-7)",
    "complexity": "Complexity: -sum p ln(p + 1e-12), p = |a| / sum|a|",
    "spearman": "similarity_func.correlation_spearman of the flattened maps",
    "ssim": "similarity_func.ssim(win_size) of the 3D maps after normalise_by_max; data_range is "
    "the range of the values of both, windows uniform, sample covariances",
    "pixel_flipping": "PixelFlipping(features_in_step, normalise=True, softmax=False): S after "
    "each step, the highest a first and replaced; the last value is S of the blank volume, the "
    "first that of one step: S of the untouched volume, the field 'untouched', is not in it",
    "faithfulness_correlation": "FaithfulnessCorrelation(nr_runs, subset_size, softmax=False): "
    "Pearson of sum_R a and S(x) - S(x without R) over the runs; 'subsets' are the flat indices "
    "(last axis fastest) that numpy drew for R",
    "blank": "perturb_baseline: 'black' is the volume's smallest value, a number is that number",
    "mprt": "MPRT(seed, abs=True, normalise=True): Spearman of |a| / max|a| and |b| / max|b|, b "
    "the map of the network with randomized layers. Before each layer torch.manual_seed(seed + 1), "
    "then its reset_parameters(), so a layer is given the same values in every order. top_down: "
    "from the last layer to the first, and what was randomized stays so; bottom_up: from the "
    "first, likewise; independent: one layer at a time",
    "efficient_mprt": "EfficientMPRT(seed, abs, complexity_func_kwargs={'n_bins': n_bins}), "
    "normalise=False and bottom_up as by default: (H(b) - H(a)) / H(a), b the map with all layers "
    "randomized; H = -sum_i q_i ln q_i over the bins that are not empty, q_i the share of the "
    "voxels in bin i of n_bins equal bins from the smallest to the largest value of that map "
    "itself, each bin closed on the left, the last one on both sides. 100 bins are the default",
    "max_sensitivity": "MaxSensitivity(nr_samples, lower_bound=0.2, abs, normalise=False): the "
    "largest over the samples of ||a(x) - a(x')|| / ||a(x)||, Frobenius (the root of the sum of "
    "squares over all voxels) above and below, x' = x + u, u uniform in [-0.2, 0.2] for each "
    "voxel. AvgSensitivity is the mean of the same ratios. With abs=True a is |a| on both sides",
}


def network() -> nn.Sequential:
    """Three convolutions, of weights of three decimals; float64, eval."""
    net = nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, 3, 3, padding=1), nn.ReLU(),
        nn.Conv3d(3, 2, 1),
    )  # fmt: skip
    random = np.random.default_rng(SEED)
    with torch.no_grad():
        for parameter in net.double().eval().parameters():
            spread = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.from_numpy(random.normal(0, spread, parameter.shape).round(3)))
    return net


def volumes() -> dict[str, np.ndarray]:
    """The input, the label, and maps of four decimals."""
    random = np.random.default_rng(SEED + 1)
    label = np.zeros(SHAPE, dtype=np.int64)
    label[1:3, 1:4, 2:5] = 1
    # different values, and no zero: input times gradient has no ties either
    found = {"input": random.permutation(np.arange(-119, 120, 2) / 64).reshape(SHAPE)}
    found["label"] = label
    assert np.array_equal(found["input"], found["input"].astype(np.float32))
    for name in ("random", "other"):
        found[name] = random.normal(0, 1, SHAPE).round(4)
        assert len(np.unique(np.abs(found[name]))) == found[name].size  # no ties
    found["related"] = (found["random"] + 0.5 * random.normal(0, 1, SHAPE)).round(4)
    found["ties"] = random.integers(-4, 5, SHAPE).astype(np.float64)
    found["few"] = random.integers(-1, 2, SHAPE).astype(np.float64)
    found["one_inside"], found["one_outside"] = np.zeros(SHAPE), np.zeros(SHAPE)
    found["one_inside"][1, 2, 3], found["one_outside"][3, 0, 0] = -2.5, 2.5
    found["on_label"] = np.where(label, random.uniform(0.5, 1, SHAPE).round(4), 0.0)
    found["large"] = random.normal(0, 1, LARGE).round(4)
    found["large_related"] = (found["large"] + 0.5 * random.normal(0, 1, LARGE)).round(4)
    return found


class Scored(nn.Module):
    """For each class the sum of its logits over the label."""

    def __init__(self, net: nn.Module, label: np.ndarray) -> None:
        super().__init__()
        self.net, self.mask = net, torch.from_numpy(label).double()

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x.double()) * self.mask).sum((2, 3, 4))


def gradient(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
    """The signed gradient of the class's score."""
    x = torch.from_numpy(inputs).double().requires_grad_()
    score = model(x)[range(len(x)), targets].sum()
    return torch.autograd.grad(score, x)[0].numpy()


def batch(values: np.ndarray) -> np.ndarray:
    """A copy with an axis for the batch and one for the channel."""
    return values[None, None].copy()


def of_maps(quantus: Any, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics of one map, and of a map and its label."""
    found: dict[str, Any] = {}
    for name in ("random", "ties", "one_inside", "one_outside", "on_label"):

        def value(kind: str, absolute: bool, name: str = name, **settings: Any) -> float:
            metric = getattr(quantus, kind)(abs=absolute, normalise=False, **settings)
            data = {"x_batch": "input", "a_batch": name, "s_batch": "label"}
            data = {key: batch(given[of]) for key, of in data.items()}
            [score] = metric(model=None, y_batch=None, channel_first=True, **data)
            return float(score)

        found[name] = {
            way: {
                "mass": value("RelevanceMassAccuracy", absolute),
                "rank": value("RelevanceRankAccuracy", absolute),
                "pointing": value("PointingGame", absolute),
                "top_k": {k: value("TopKIntersection", absolute, k=k) for k in (5, 18, 40)},
            }
            for way, absolute in (("absolute", True), ("signed", False))
        }
        found[name]["absolute"] |= {
            "attribution": value("AttributionLocalisation", True),
            "sparseness": value("Sparseness", True),
            "complexity": value("Complexity", True),
        }
    return found


def of_pairs(quantus: Any, given: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """How alike two maps are."""
    spearman, ssim = quantus.similarity_func.correlation_spearman, quantus.similarity_func.ssim
    scaled = quantus.normalise_func.normalise_by_max
    pairs = [("random", "other"), ("random", "related"), ("random", "ties"), ("ties", "few")]
    found = []
    for one, other in [*pairs, ("large", "large_related")]:
        a, b = given[one], given[other]
        sizes = (3, 7) if one == "large" else (3,)
        found.append(
            {
                "one": one,
                "other": other,
                "spearman_absolute": float(spearman(np.abs(a).ravel(), np.abs(b).ravel())),
                "spearman_signed": float(spearman(a.ravel(), b.ravel())),
                "ssim": {n: float(ssim(scaled(a), scaled(b), win_size=n)) for n in sizes},
            }
        )
    return found


def of_scores(quantus: Any, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics that perturb the input and look at the score."""
    model, x = Scored(network(), given["label"]).eval(), batch(given["input"])
    common = {"model": model, "x_batch": x, "y_batch": np.array([CLASS]), "softmax": False}
    common |= {"channel_first": True}
    with torch.no_grad():
        untouched = float(model(torch.from_numpy(x))[0, CLASS])
    flipped, correlated = [], []
    real = np.random.choice
    product = gradient(model, x, common["y_batch"])[0, 0] * x[0, 0]
    for name, a in (("random", given["random"]), ("input_x_gradient", product)):
        for blank in ("black", 0.0, 0.75):
            for step in (1, 5):
                flip = quantus.PixelFlipping(features_in_step=step, perturb_baseline=blank)
                [curve] = flip(a_batch=batch(a), **common)
                flipped.append({"map": name, "blank": blank, "features_in_step": step,
                                "curve": [float(v) for v in curve]})  # fmt: skip
            subsets: list[list[int]] = []

            def recorded(*args: Any, subsets: list[list[int]] = subsets, **more: Any) -> Any:
                subsets.append(real(*args, **more).tolist())
                return np.array(subsets[-1])

            metric = quantus.FaithfulnessCorrelation(
                nr_runs=12, subset_size=20, perturb_baseline=blank, return_aggregate=False
            )
            np.random.seed(SEED)
            np.random.choice = recorded
            [r] = metric(a_batch=batch(a), **common)
            np.random.choice = real
            correlated.append({"map": name, "blank": blank, "subsets": subsets, "value": float(r)})
    return {
        "input_x_gradient": product.tolist(),
        "untouched": untouched,
        "pixel_flipping": flipped,
        "faithfulness_correlation": correlated,
    }


def of_layers(quantus: Any, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics that randomize the network."""
    model, x = Scored(network(), given["label"]).eval(), batch(given["input"])
    common = {"model": model, "x_batch": x, "y_batch": np.array([CLASS]), "channel_first": True}
    maps: dict[str, np.ndarray] = {"": gradient(model, x, common["y_batch"])}
    weights: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    for order in ORDERS:
        seen: list[str] = []

        def explain(
            model: nn.Module,
            inputs: np.ndarray,
            targets: np.ndarray,
            seen: list[str] = seen,
            **_: Any,
        ) -> np.ndarray:
            own = network()
            changed = [n for n in LAYERS if not model.net[int(n)].weight.equal(own[int(n)].weight)]
            drawn = gradient(model, inputs, targets)
            for n in changed:
                state = {k: v.tolist() for k, v in model.net[int(n)].state_dict().items()}
                assert weights.setdefault(n, state) == state
            key = ",".join(changed)
            assert np.array_equal(maps.setdefault(key, drawn), drawn)
            seen.append(key)
            return drawn

        metric = quantus.MPRT(seed=SEED, layer_order=order)
        found = metric(explain_func=explain, a_batch=maps[""].copy(), **common)
        stages = [key for key in seen if key]
        names = [name.removeprefix("net.") for name in found if name != "original"]
        scores[order] = [
            {"layer": name, "map": key, "score": float(found["net." + name][0])}
            for name, key in zip(names, stages, strict=True)
        ]
    efficient = []
    for absolute in (False, True):
        for n_bins in (100, 10):
            metric = quantus.EfficientMPRT(
                seed=SEED, abs=absolute, complexity_func_kwargs={"n_bins": n_bins}
            )
            [value] = metric(explain_func=gradient, **common)
            before, after = (float(v[0]) for v in metric.explanation_scores_by_layer.values())
            efficient.append({"abs": absolute, "n_bins": n_bins, "map": "", "randomized_map":
                              ",".join(LAYERS), "complexity": before, "randomized_complexity":
                              after, "value": float(value)})  # fmt: skip
    return {
        "mprt": {
            "seed": SEED,
            "weights": weights,
            "maps": {key: value[0, 0].tolist() for key, value in maps.items()},
            "scores": scores,
        },
        "efficient_mprt": efficient,
    }


def of_noise(quantus: Any, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics of a map's change under noise."""
    model, x = Scored(network(), given["label"]).eval(), batch(given["input"])
    perturbed, maps = [], []

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        perturbed.append(inputs[0, 0].tolist())
        made = gradient(model, inputs, targets)
        maps.append(made[0, 0].tolist())
        return made

    values, drawn = {}, []
    for kind in ("MaxSensitivity", "AvgSensitivity"):
        for way, absolute in (("signed", False), ("absolute", True)):
            perturbed.clear()
            maps.clear()
            np.random.seed(SEED)
            a = gradient(model, x, np.array([CLASS]))
            metric = getattr(quantus, kind)(nr_samples=5, lower_bound=0.2, abs=absolute)
            [value] = metric(model=model, x_batch=x, y_batch=np.array([CLASS]), a_batch=a,
                             explain_func=explain, channel_first=True)  # fmt: skip
            values[f"{kind}_{way}"] = float(value)
            drawn.append(list(perturbed))
    assert all(one == perturbed for one in drawn)
    assert np.abs(np.array(perturbed) - given["input"]).max() <= 0.2
    return {"perturbed": perturbed, "maps": maps, "values": values}


def main() -> None:
    """Write the file."""
    import quantus

    given = volumes()
    packages = ("quantus", "torch", "numpy", "scipy", "scikit-image", "scikit-learn")
    state = {key: value.tolist() for key, value in network().state_dict().items()}
    head = {
        "about": "Metrics of Quantus, see make_quantus.py. Volumes are indexed i, j, k.",
        "command": COMMAND,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "seed": SEED,
        "dtype": "float64",
        "class": CLASS,
        "formulas": FORMULAS,
        "network": "Sequential: 0 Conv3d(1,3,3,padding=1), 1 Tanh, 2 Conv3d(3,3,3,padding=1), "
        "3 ReLU, 4 Conv3d(3,2,1)",
        "state": state,
        "volumes": {name: values.tolist() for name, values in given.items()},
        "of_maps": of_maps(quantus, given),
        "of_pairs": of_pairs(quantus, given),
        **of_scores(quantus, given),
        **of_layers(quantus, given),
        "max_sensitivity": of_noise(quantus, given),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
