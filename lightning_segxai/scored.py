"""A network seen through a target: a predictor of logits, whole or by windows, and its score.

`Predictor` knows how to run somebody's network: what it accepts, which part of its output is the
logits, how windows are blended. `ScoredModel` adds the weights of a target and is what every
attribution method is given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lightning_segxai.rules.interception import Interception, counted
from lightning_segxai.targets import Target, voxels
from lightning_segxai.values import Logits, Probe, Shape, Volume
from lightning_segxai.windows import Place, Windows

Outputs = Literal["softmax", "sigmoid"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Passes:
    """How many windows have gone through the network, forward and backward."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Rehearsal:
    """What the first pass of a window shape showed.

    Args:
        padded: The shape that the network accepts.
        layers: Output shape of every module that gives one tensor, in execution order; a module
            that is called again keeps its last call.
        convolutions: How often it calls a convolution or a linear function.
    """

    padded: Shape
    layers: Mapping[str, torch.Size]
    convolutions: int = 0


@dataclass(frozen=True, eq=False)
class Predictor:
    """Runs a network on volumes and gives logits of full resolution.

    Args:
        module: The network.
        window: Voxels of a sliding window; None takes volumes whole.
        overlap: Share of a window that the next one covers again, in [0, 1).
        outputs: Whether classes exclude each other (``softmax``: a channel for each class,
            background first) or not (``sigmoid``: a channel for each class but the background).
            None: one channel is sigmoid, more are softmax.
        threshold: Probability from which a class counts as predicted, with sigmoid or two classes.
        logits: From the network's output to logits ``b classes i j k``. None understands a tensor,
            a tuple, list or dict that holds one of the input's size, and stacked deep supervision
            ``b heads classes i j k``.
        looks_per_pass: Windows that go through the network at once; ``auto`` depends on their
            shape only, so that results repeat.
        forward_context: Entered around the network's own forward, for the precision of a trainer.
        parameters: Values for some of the network's parameters, instead of its own.
    """

    module: nn.Module
    window: Shape | None = None
    overlap: float = 0.5
    outputs: Outputs | None = None
    threshold: float = 0.5
    logits: Callable[[Any], Tensor] | None = None
    looks_per_pass: int | Literal["auto"] = "auto"
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)
    rehearsals: dict[tuple[int, ...], Rehearsal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"`threshold` must lie between 0 and 1, but got {self.threshold}.")
        if self.outputs not in (None, "softmax", "sigmoid"):
            raise ValueError(f"`outputs` must be softmax or sigmoid, but got {self.outputs!r}.")
        Windows((1, 1, 1), (1, 1, 1), self.overlap)  # refuses a wrong overlap
        if self.looks_per_pass != "auto" and self.looks_per_pass < 1:
            raise ValueError(f"`looks_per_pass` must be at least 1, but got {self.looks_per_pass}.")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def windows(self, shape: torch.Size | Shape) -> Windows:
        """The windows of a volume of this shape."""
        i, j, k = shape
        return Windows((i, j, k), self.window or (i, j, k), self.overlap)

    def batch(self, place: Place) -> int:
        """How many windows of this size go through the network at once."""
        if self.looks_per_pass != "auto":
            return self.looks_per_pass
        return max(1, min(8, 64**3 // math.prod(s.stop - s.start for s in place)))

    def window_logits(
        self, x: Float[Tensor, "b c i j k"], mode: Interception | None = None
    ) -> Float[Tensor, "b classes i j k"]:
        """Logits of a batch of windows, in the dtype of ``x``, with a channel for each class.

        A sigmoid network gets a background of zeros, so that the argmax is its decision at 0.5.

        Args:
            x: The windows.
            mode: What intercepts the network's functions.
        """
        rehearsal = self.rehearse(x[0])
        raw = self._run(_pad(x, rehearsal.padded), mode)
        self.passes.forward += len(x)
        raw = raw[..., : x.shape[2], : x.shape[3], : x.shape[4]].to(x.dtype)
        if self.kind(raw.shape[1]) == "softmax":
            return raw
        return torch.cat([torch.zeros_like(raw[:, :1]), raw], dim=1)

    def kind(self, channels: int) -> Outputs:
        """Softmax or sigmoid, for a network of so many output channels."""
        if self.outputs == "softmax" and channels == 1:
            raise ValueError(
                '`outputs="softmax"` needs a network of two channels or more, but '
                f'`{type(self.module).__name__}` has one. Use "sigmoid".'
            )
        return self.outputs or ("sigmoid" if channels == 1 else "softmax")

    def decisive(self, logits: Logits) -> Logits:
        """The same logits, shifted so that their argmax is the decision at the threshold."""
        odds = math.log(self.threshold / (1 - self.threshold))
        if odds == 0.0 or (self.outputs != "sigmoid" and len(logits) > 2):
            return logits
        return torch.cat([logits[:1], logits[1:] - odds])

    def predict(self, x: Volume) -> Logits:
        """Blended logits of a whole volume."""
        return self.predict_each(x[None])[0]

    @torch.no_grad()
    def predict_each(self, x: Float[Tensor, "b c i j k"]) -> Float[Tensor, "b classes i j k"]:
        """Blended logits of each volume of a batch."""
        windows = self.windows(x.shape[2:])
        work = [(n, place) for n in range(len(x)) for place in windows.places]
        blended: Tensor | None = None

        def look(batch: list[tuple[int, Place]]) -> Tensor:
            return self.window_logits(torch.stack([x[(n, slice(None), *p)] for n, p in batch]))

        for batch, logits in in_pieces(work, self.batch(windows.places[0]), look):
            if blended is None:
                blended = logits.new_zeros((len(x), logits.shape[1], *x.shape[2:]))
            for (n, place), part in zip(batch, logits, strict=True):
                share = windows.share(place, x.dtype).to(x.device)
                blended[(n, slice(None), *place)] += part * share
        assert blended is not None  # a volume has at least one window
        return blended

    def rehearse(self, x: Volume) -> Rehearsal:
        """Find out, once for each shape, what the network accepts and what its layers give.

        Raises:
            ValueError: if no padding to a multiple of 1 to 64 makes the network give logits of the
                size of its input.
        """
        key = tuple(x.shape)
        if key not in self.rehearsals:
            self.rehearsals[key] = self._rehearse(x)
        return self.rehearsals[key]

    @torch.no_grad()
    def _rehearse(self, x: Volume) -> Rehearsal:
        refusals: list[str] = []
        tried: set[Shape] = set()
        least = [max(pair) for pair in zip(x.shape[1:], self.window or (1, 1, 1), strict=True)]
        for multiple in _MULTIPLES:
            i, j, k = (math.ceil(size / multiple) * multiple for size in least)
            if (i, j, k) in tried:
                continue
            tried.add((i, j, k))
            try:
                with _traced(self.module) as layers, counted() as calls:
                    raw = self._run(_pad(x[None], (i, j, k)))
            except (RuntimeError, ValueError, AssertionError) as error:
                if out_of_memory(error):
                    raise
                refusals.append(f"{(i, j, k)}: {error}")
                continue
            self.passes.forward += 1
            self.kind(raw.shape[1])
            _warn_of_probabilities(raw, self.module)
            return Rehearsal((i, j, k), layers, calls.convolutions)
        name = type(self.module).__name__
        raise ValueError(
            f"`{name}` gave no full-resolution logits for a volume of {tuple(x.shape)} "
            f"(c i j k). First answer: {refusals[0].splitlines()[0][:300]}"
        )

    def _run(
        self, x: Float[Tensor, "b c i j k"], mode: Interception | None = None
    ) -> Float[Tensor, "b channels i j k"]:
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype)
        # A copy: a network may write into its input, which may be the probe's own, or a leaf.
        given = x.to(dtype, copy=True)
        with self.forward_context(), mode.watching(given) if mode else nullcontext():
            output = (
                functional_call(self.module, dict(self.parameters), (given,))
                if self.parameters
                else self.module(given)
            )
        raw = self.logits(output) if self.logits else _find_logits(output, x.shape[2:])
        if not isinstance(raw, Tensor) or raw.ndim != 5 or raw.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the output is {describe(raw)}, but logits (b, classes, i, j, k) of the input's "
                f"size {tuple(x.shape[2:])} are needed; `logits=` can pick or make them"
            )
        return raw


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """A network seen through a target: one number for a volume, and all that a method needs.

    Args:
        predictor: The network and how to run it.
        probe: The volume that is explained.
        weights: The target's weight for every logit.
        seed: Seed of all noise, so that it is the same at every epoch.
    """

    predictor: Predictor
    probe: Probe
    weights: Float[Tensor, "classes i j k"]
    seed: int = 0

    @classmethod
    def aim(
        cls, predictor: Predictor, probe: Probe, target: Target, logits: Logits, seed: int = 0
    ) -> ScoredModel:
        """The network seen through ``target``, fixed on the probe's unperturbed ``logits``.

        Raises:
            ValueError: if the target weighs only the background of a sigmoid network, or the
                probe's label has classes that the network lacks.
        """
        highest = -1 if probe.label is None else int(probe.label.max())
        if highest >= len(logits):
            raise ValueError(
                f'The label of probe "{probe.name}" has a class {highest}, but the classes of '
                f"`{type(predictor.module).__name__}` are 0 to {len(logits) - 1}. Map the label's "
                "values to these."
            )
        weights = target.weights(probe, predictor.decisive(logits))
        silent = not bool(logits[0].any())
        if silent and bool(weights[0].any()) and not bool(weights[1:].any()):
            raise ValueError(
                f"`{target}` asks for the background of a sigmoid network, which has no logit of "
                "its own. Use `ClassMargin(label=0, versus=1)`."
            )
        return cls(predictor, probe, weights, seed)

    @cached_property
    def windows(self) -> Windows:
        """The probe's windows; methods that perturb call the model thousands of times."""
        return self.predictor.windows(self.probe.shape)

    @cached_property
    def voxels(self) -> int:
        """Number of voxels in the target's region."""
        return int(voxels(self.weights).sum())

    def score(self, logits: Logits) -> float:
        """The score of blended logits, summed in float64."""
        return float((self.weights.double() * logits.double()).sum())

    def __call__(self, x: Float[Tensor, "b c i j k"]) -> Float[Tensor, " b"]:
        """The score of each volume of a batch, by windows; differentiable where ``x`` is."""
        windows = self.windows
        work = [(n, place) for n in range(len(x)) for place in windows.places]
        scores: list[list[Tensor]] = [[] for _ in x]

        def look(batch: list[tuple[int, Place]]) -> Tensor:
            inputs = torch.stack([x[(n, slice(None), *place)] for n, place in batch])
            return self.predictor.window_logits(inputs)

        for batch, logits in in_pieces(work, self.predictor.batch(windows.places[0]), look):
            for (n, place), part in zip(batch, logits, strict=True):
                scores[n].append((self.window_weights(windows, place) * part).sum())
        return torch.stack([torch.stack(parts).sum() for parts in scores])

    def window_weights(self, windows: Windows, place: Place) -> Float[Tensor, "classes i j k"]:
        """The weights of one window's own logits: the target's, times the window's share."""
        share = windows.share(place, self.weights.dtype).to(self.weights.device)
        return self.weights[(slice(None), *place)] * share

    def generator(self) -> torch.Generator:
        """A fresh CPU generator of the model's seed."""
        return torch.Generator().manual_seed(self.seed)


def in_pieces(
    work: Iterable[Item],
    size: int,
    look: Callable[[list[Item]], Result],
    alike: Callable[[Item], Hashable] = lambda _: None,
) -> Iterator[tuple[list[Item], Result]]:
    """Consecutive pieces of the work, each with what ``look`` says of it.

    The items of a piece are ``alike``. On an out-of-memory error the size is halved, down to one.
    What is done with a result is done outside, so an error there never makes a piece come twice.
    """
    items, waiting = iter(work), list[Item]()
    while True:
        waiting += islice(items, max(0, size - len(waiting)))
        piece = next((list(group) for _, group in groupby(waiting[:size], alike)), [])
        if not piece:
            return
        try:
            result = look(piece)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if len(piece) == 1 or not out_of_memory(error):
                raise
        else:
            del waiting[: len(piece)]
            yield piece, result
            del result  # before the next look needs memory
            continue
        size = len(piece) // 2  # outside the except: its frames hold the graph
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )


def describe(output: object) -> str:
    """What an output is, in a few words for an error."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a dict of {', '.join(f'{k}: {describe(v)}' for k, v in output.items())}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(describe(v) for v in output)}"
    return f"a {type(output).__name__}"


def _find_logits(output: Any, size: torch.Size) -> Any:
    """The first tensor of full resolution in any kind of output; the output itself if none is."""
    if isinstance(output, Tensor):
        return output[:, 0] if output.ndim == 6 else output  # stacked deep supervision
    candidates = output.values() if isinstance(output, Mapping) else output
    if isinstance(candidates, str) or not hasattr(candidates, "__iter__"):
        return output
    found = (_find_logits(candidate, size) for candidate in candidates)
    return next(
        (t for t in found if isinstance(t, Tensor) and t.ndim == 5 and t.shape[2:] == size), output
    )


def _pad(x: Float[Tensor, "b c i j k"], shape: Shape) -> Float[Tensor, "b c _ _ _"]:
    """Repeat the last voxel of each axis up to ``shape``; the gradient goes back to that voxel."""
    missing = [want - have for want, have in zip(shape, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [0, missing[2], 0, missing[1], 0, missing[0]], mode="replicate")


class _traced:  # noqa: N801 - a context manager reads like a verb
    """Collects the output shapes of all modules during one forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shapes: dict[str, torch.Size] = {}

    def __enter__(self) -> dict[str, torch.Size]:
        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    self.shapes.pop(name, None)  # the last call counts, at its own place
                    self.shapes[name] = output.shape

            return hook

        self.handles = [
            module.register_forward_hook(note(name))
            for name, module in self.module.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)  # which forbids it
        ]
        return self.shapes

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _warn_of_probabilities(raw: Tensor, module: nn.Module) -> None:
    values = raw.detach().float()
    low, high = (float(v) for v in values.aminmax())
    # logits of an untrained network may lie in [0, 1] too, but close together and of any sum
    total = values.sum(dim=1)
    exclusive = raw.shape[1] > 1 and torch.allclose(total, torch.ones_like(total), atol=1e-3)
    if low >= 0 and high <= 1 and (high - low > 0.5 or (exclusive and high > low)):
        warnings.warn(
            f"All outputs of `{type(module).__name__}` lie in [0, 1]: they look like "
            "probabilities. Explanations need logits; use `logits=` to say where they are.",
            stacklevel=2,
        )
