"""The passes through the network, made once and shared by all methods that ask for the same ones.

Most attribution methods are functions of the same few forward and backward passes. A *trajectory*
says at which inputs the network is looked at, a *rule* how some functions run backward there; a
`Look` is what one pass of one window showed: the score, its gradient with respect to the input
and, for tapped layers, activation and gradient. Looks are folded one by one and forgotten, so
memory grows neither with the steps of a path nor with the number of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_segxai.rules.interception import Interception, Rule, refuse_unseen
from lightning_segxai.rules.lean import Lean
from lightning_segxai.scored import Predictor, ScoredModel, in_pieces
from lightning_segxai.taps import resolve_layer, tapped, widened
from lightning_segxai.trajectories import Point, Trajectory
from lightning_segxai.values import Logits, Probe, Shape, UnsupportedError, Volume
from lightning_segxai.windows import Place


@dataclass(frozen=True, eq=False)
class LayerLook:
    """What one look showed of a layer; of its baseline too, under a rule that compares the two."""

    activation: Float[Tensor, "c i j k"]
    gradient: Float[Tensor, "c i j k"]
    baseline: Float[Tensor, "c i j k"] | None = None


@dataclass(frozen=True, eq=False)
class Look:
    """What one pass of one window showed, for one target.

    Args:
        point: Where the network was looked at.
        place: Where the window lies in the volume.
        score: The window's share of the score: over windows, scores add up to the volume's.
        gradient: Gradient of the score with respect to this window of the input, by the rule if
            there is one. The window's share in the blended prediction is in it: over windows,
            gradients add up. Zeros where the point is only looked at forward.
        layers: Activation and gradient of each layer, under the name it was asked for.
        complete: Whether this was the last look of the point's group.
        padded: The shape that the window was padded to for the network.
        partner_score: The score of the baseline, under a rule that compares the two.
    """

    point: Point
    place: Place
    score: float
    gradient: Float[Tensor, "c i j k"]
    layers: Mapping[str, LayerLook]
    complete: bool
    padded: Shape
    partner_score: float = 0.0

    @property
    def at(self) -> tuple[slice, slice, slice, slice]:
        """Index of the window in a volume with channels."""
        return (slice(None), *self.place)

    @property
    def whole(self) -> bool:
        """Whether the window is the whole volume."""
        return self.gradient.shape == self.point.origin.shape


class Fold(Protocol):
    """One map in the making: the target it is of, and what it does with a look."""

    @property
    def model(self) -> ScoredModel:
        """The network seen through the target."""
        ...

    def see(self, look: Look) -> None:
        """Fold one look in."""
        ...


Aim = Callable[[Logits], Sequence[Fold]]
"""Gives the folds of one walk, from the logits of the first window of its first point."""


@dataclass(frozen=True, eq=False)
class _Sight:
    """One look to be had."""

    point: Point
    place: Place
    complete: bool

    @property
    def forward_only(self) -> bool:
        return self.point.weight == 0


def walk(
    predictor: Predictor,
    probe: Probe,
    x: Volume,
    trajectory: Trajectory,
    rule: Rule | None,
    layers: tuple[str, ...],
    aim: Aim,
    generator: torch.Generator,
) -> None:
    """Walk a trajectory once, window by window, and let every fold see every look.

    One forward for each window of each point, and one backward for each target that is asked for;
    twice as many under a rule that compares the volume with its baseline.

    Args:
        predictor: The network.
        probe: Whose geometry baselines need.
        x: The volume to explain.
        trajectory: Where to look.
        rule: How some functions run backward; None for the gradient.
        layers: Layers to tap, as users name them.
        aim: Gives the folds.
        generator: Seeded; for noise.

    Raises:
        UnsupportedError: if the rule cannot see the network's functions, or met none to change.
    """
    if rule is not None:
        rule.check(predictor.module)
    windows = predictor.windows(x.shape[1:])
    rehearsal = predictor.rehearse(x[(slice(None), *windows.places[0])])
    resolved = {layer: resolve_layer(predictor, rehearsal, layer) for layer in layers}
    eye = _Eye(predictor, rule, resolved, rehearsal.convolutions)
    folds: Sequence[Fold] | None = None
    models: list[ScoredModel] = []

    def look(batch: list[_Sight]) -> list[_Seen]:
        nonlocal folds, models
        view = eye.look(batch)
        try:
            if folds is None:
                folds = aim(view.logits[0].detach())
                models = list({id(fold.model): fold.model for fold in folds}.values())
            return [
                view.of(
                    torch.stack([model.window_weights(windows, sight.place) for sight in batch]),
                    keep=model is not models[-1],
                )
                for model in models
            ]
        finally:
            view.mode.close()

    sights = _sights(trajectory, x, probe, generator, windows.places)
    for batch, seen in in_pieces(
        sights, predictor.batch(windows.places[0]), look, alike=lambda s: s.forward_only
    ):
        if not folds:
            return
        if not batch[0].forward_only:
            predictor.passes.backward += len(batch) * len(models) * eye.rows
        for n, sight in enumerate(batch):
            for model, shown in zip(models, seen, strict=True):
                one = shown.one(n, sight, rehearsal.padded)
                for fold in folds:
                    if fold.model is model:
                        fold.see(one)


def _sights(
    trajectory: Trajectory,
    x: Volume,
    probe: Probe,
    generator: torch.Generator,
    places: Sequence[Place],
) -> Iterator[_Sight]:
    for group in trajectory.groups(x, probe, generator):
        for place in places:
            for point in group:
                yield _Sight(point, place, place is places[-1] and point is group[-1])


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a batch of looks showed, for one target."""

    scores: list[float]
    partner_scores: list[float]
    gradient: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def one(self, n: int, sight: _Sight, padded: Shape) -> Look:
        size = len(self.scores)
        layers = {
            name: LayerLook(
                activation[n],
                self.gradients[name][n],
                activation[size + n] if len(activation) > size else None,
            )
            for name, activation in self.activations.items()
        }
        return Look(
            sight.point,
            sight.place,
            self.scores[n],
            self.gradient[n],
            layers,
            sight.complete,
            padded,
            self.partner_scores[n],
        )


@dataclass(eq=False)
class _Eye:
    """Makes the passes of one walk."""

    predictor: Predictor
    rule: Rule | None
    resolved: Mapping[str, str]
    convolutions: int
    checked: bool = False

    @property
    def rows(self) -> int:
        """Rows of a batch that one look takes."""
        return 1 if self.rule is None or self.rule.partner is None else 2

    def look(self, batch: Sequence[_Sight]) -> _View:
        """The forward pass of a batch."""
        rows = [sight.point.crop(sight.place) for sight in batch]
        if self.rule is not None and self.rule.partner == "baseline":
            for sight in batch:
                assert sight.point.baseline is not None  # rules that compare walk with baselines
                rows.append(sight.point.baseline[(slice(None), *sight.place)])
        elif self.rule is not None and self.rule.partner == "origin":
            rows += [sight.point.origin[(slice(None), *sight.place)] for sight in batch]
        inputs = torch.stack(rows)
        forward_only = batch[0].forward_only
        origins = [sight.point.origin for sight in batch]
        mode = self.rule.interception(origins, self.convolutions) if self.rule else Lean()
        inputs = inputs.detach().requires_grad_(not forward_only)
        try:
            with (
                torch.set_grad_enabled(not forward_only),
                constant(self.predictor.module),
                tapped(self.predictor.module, set(self.resolved.values())) as taps,
            ):
                logits = self.predictor.window_logits(inputs, mode)
            if self.rule is not None and not forward_only and not self.checked:
                refuse_unseen(logits, self.predictor.module, mode)
                self.checked = True
        except Exception:  # above all where memory ran out
            mode.close()
            raise
        activations = {asked: taps[name] for asked, name in self.resolved.items()}
        return _View(self.rule, mode, len(batch), inputs, logits, activations)


@dataclass(frozen=True, eq=False)
class _View:
    """A forward pass with its graph; without one where the points are only looked at forward."""

    rule: Rule | None
    mode: Interception
    size: int
    inputs: Tensor
    logits: Tensor
    activations: dict[str, Tensor]

    def of(self, weights: Tensor, keep: bool) -> _Seen:
        """What it shows of each window's score, with respect to its input and its layers."""
        logits = self.logits[: self.size]
        partners = self.logits[self.size :].detach()
        scores = (weights * logits.detach()).flatten(1).double().sum(dim=1).tolist()
        partner_scores = (
            (weights * partners).flatten(1).double().sum(dim=1).tolist()
            if len(partners)
            else [0.0] * self.size
        )
        wanted = [self.inputs, *self.activations.values()]
        if self.inputs.requires_grad:
            found = self._gradients(weights, logits, wanted, keep)
        else:
            found = [torch.zeros((), dtype=t.dtype, device=t.device).expand_as(t) for t in wanted]
        gradient, *by_layer = found
        kept = {name: widened(a.detach()) for name, a in self.activations.items()}
        names = dict(zip(self.activations, map(widened, by_layer), strict=True))
        return _Seen(scores, partner_scores, gradient, kept, names)

    def _gradients(
        self, weights: Tensor, logits: Tensor, wanted: list[Tensor], keep: bool
    ) -> list[Tensor]:
        if not logits.requires_grad:
            raise RuntimeError(
                "the network's output has no gradient with respect to its input: it detaches, "
                "rounds, or runs under no_grad"
            )
        seed = weights if self.rule is None else self.rule.seed(weights, logits.detach())
        able = [t for t in wanted if t.requires_grad]  # a detached branch's layer does not
        try:
            with self.mode.resumed():
                found = iter(
                    torch.autograd.grad(
                        (seed * logits).sum(), able, retain_graph=keep, allow_unused=True
                    )
                )
        except RuntimeError as error:
            # torch 2.13's words, and those before
            if not any(w in str(error) for w in ("checkpoint is incompatible", "Checkpointing is")):
                raise
            raise UnsupportedError(
                "Reentrant checkpointing gives no gradients with respect to an input or a layer. "
                "Use `checkpoint(..., use_reentrant=False)` in the network."
            ) from error
        filled = []
        for tensor in wanted:
            gradient = next(found) if tensor.requires_grad else None
            filled.append(torch.zeros_like(tensor) if gradient is None else gradient)
        return filled


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients, so that what has one depends on the input."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
