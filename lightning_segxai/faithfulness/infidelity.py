"""By how much a map misses what perturbations of the volume do to the score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.faithfulness.base import FaithfulnessMetric, together, veiled, volume
from lightning_segxai.faithfulness.parts import random_parts, said_and_done
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import check_counts
from lightning_segxai.scored import Passes, ScoredModel, in_pieces
from lightning_segxai.values import Attribution, Map, Shape

Perturbation = Literal["parts", "noise"]
"""Random parts are hidden, for maps that share out the score; or noise is taken away, for
gradients."""


@dataclass(frozen=True)
class Infidelity(FaithfulnessMetric):
    r"""Share of the score's changes under random perturbations that the map does not tell.

    $$\min_{\beta \ge 0} \frac{\mathbb E_I \big[(\beta\, I^\top a - \Delta_I)^2\big]}
    {\mathbb E_I [\Delta_I^2]}, \quad \Delta_I = S(x) - S(x - I)$$

    With ``perturbation="parts"`` a share of the cubes of the volume is hidden behind the baseline,
    and ``I^T a`` is the map's sum over them: right for maps that share out the score. With
    ``"noise"``, ``I`` is normal noise, the same in all channels: right for signed gradients, such
    as ``Saliency(absolute=False)``. ``beta`` takes the map's scale out, as in Captum's
    ``normalize=True``, but not its sign; the denominator takes out the score's. 0 for the exact
    effects, 1 for a map that tells nothing. None where the score or the map's sums are 0 under all
    perturbations. Costs ``samples + 1`` forward passes.

    Args:
        samples: Number of perturbations.
        perturbation: ``parts`` or ``noise``.
        share: Share of the cubes that are hidden at once, in (0, 1); at least one is.
        block: Edge of a cube in voxels; at the far faces of the volume they may be cut.
        baseline: What hides, as for `IntegratedGradients`.
        noise: Standard deviation of the noise, as a fraction of the volume's intensity range.
        seed: Which of several draws, of those that the model's own seed gives.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than two samples, another perturbation, a share outside (0, 1), less
            than one voxel, noise that is not positive, an unknown baseline.

    References:
        Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019,
        arXiv:1901.09392.
    """

    samples: int = 64
    perturbation: Perturbation = "parts"
    share: float = 0.05
    block: int = 4
    baseline: Blank = "blurred"
    noise: float = 0.003
    seed: int = 0
    sigma_mm: float = 5.0

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = False
    reading = "0: the map tells all that random changes do to the score; 1: nothing of it."

    def __post_init__(self) -> None:
        check_counts(self, block=self.block)
        needed = (
            ("samples", self.samples >= 2, "be at least 2"),
            ("share", 0 < self.share < 1, "lie between 0 and 1"),
            ("noise", self.noise > 0, "be positive"),
            (
                "perturbation",
                self.perturbation in get_args(Perturbation),
                f"be one of {', '.join(get_args(Perturbation))}",
            ),
        )
        for name, fits, need in needed:
            if not fits:
                raise ValueError(f"`Infidelity({name}={getattr(self, name)!r})` must {need}.")
        Baseline(self.baseline, self.sigma_mm)

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        values = attribution.values.detach().double()
        if self.perturbation == "parts":
            generator = torch.Generator().manual_seed(model.seed + self.seed)
            i, j, k = model.probe.shape
            parts = random_parts((i, j, k), self.samples, self.share, self.block, generator)
            veil = veiled(model, self.baseline, self.sigma_mm)
            said, done, whole = said_and_done(veil, values, parts)
        else:
            said, done, whole = self._noisy(model, values)
        rounding = torch.finfo(model.probe.image.dtype).eps * max(1.0, abs(whole))
        if float(done.abs().max()) <= rounding or not bool(said.any()):
            return None
        both = float(said @ done)
        told = both * both / (float(said @ said) * float(done @ done)) if both > 0 else 0.0
        return min(1.0, max(0.0, 1.0 - told))

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The perturbations, and the volume itself."""
        return Passes((self.samples + 1) * windows)

    def perturbations(self, model: ScoredModel) -> Iterator[Map]:
        """The noise that is taken away from the volume, one draw after the other."""
        generator = torch.Generator().manual_seed(model.seed + self.seed)
        x = model.probe.image
        sigma = self.noise * float(x.amax() - x.amin())
        for _ in range(self.samples):
            yield sigma * torch.randn(x.shape[1:], generator=generator, dtype=torch.float64)

    def _noisy(
        self, model: ScoredModel, values: Map
    ) -> tuple[Float[Tensor, " samples"], Float[Tensor, " samples"], float]:
        x = volume(model)

        @torch.no_grad()
        def look(drawn: list[Map]) -> Tensor:
            return model(x - torch.stack(drawn)[:, None].to(x)).double().cpu()

        whole = look([torch.zeros(values.shape, dtype=torch.float64)])[0]
        sums: list[Tensor] = []
        effects: list[Tensor] = []
        for drawn, scores in in_pieces(self.perturbations(model), together(model), look):
            sums += [(noise * values).sum() for noise in drawn]
            effects += list(whole - scores)
        return torch.stack(sums), torch.stack(effects), float(whole)
