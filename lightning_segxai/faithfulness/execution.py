"""The layers of a network in the order in which they are executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_segxai.faithfulness.base import volume
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import UnsupportedError


def parameters_in_order(model: ScoredModel) -> list[list[str]]:
    """Names of the parameters that each module holds itself, modules in execution order.

    A module that is called again counts where it is called last. What belongs to modules that are
    never called, but may be used by others, comes first. Shared parameters have one name.

    Raises:
        UnsupportedError: for a network without parameters, and for a scripted one, whose calls
            cannot be seen.
    """
    module = model.predictor.module
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise UnsupportedError(
            f"`{type(module).__name__}` is scripted: other weights cannot be put in its place. "
            "Explain the network that it was made of."
        )
    if next(module.parameters(), None) is None:
        raise UnsupportedError(f"`{type(module).__name__}` has no parameters that could be others.")
    known = {name for name, _ in module.named_parameters()}
    owners = {
        owner: names
        for owner, part in module.named_modules()
        if (names := [n for n in _own(owner, part) if n in known])
    }
    called: dict[str, None] = {}

    def note(owner: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            called.pop(owner, None)
            called[owner] = None

        return hook

    handles = [module.get_submodule(o).register_forward_pre_hook(note(o)) for o in owners]
    try:
        x = volume(model)
        place = model.windows.places[0]
        with torch.no_grad():
            model.predictor.window_logits(x[(slice(None), *place)][None])
    finally:
        for handle in handles:
            handle.remove()
    uncalled = [owner for owner in owners if owner not in called]
    return [owners[owner] for owner in (*uncalled, *called)]


def _own(owner: str, part: nn.Module) -> list[str]:
    """Full names of the parameters that a module holds itself."""
    prefix = f"{owner}." if owner else ""
    return [prefix + name for name, _ in part.named_parameters(recurse=False)]
