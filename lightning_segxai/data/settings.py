"""Settings in words that are the same on every machine: for fingerprints and for the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torchio as tio
from torch import Tensor


def told(value: object) -> str:
    """A setting in words; never an address, and of a path only the file's name.

    An object is told by its class and what it holds, a function by its name, and a lambda, or a
    function inside another, by its code as well: many have the same name.

    >>> told({"a": [1, 2.5, None], "b": Path("data/landmarks.npy")})
    'a=[1, 2.5, None], b=landmarks.npy'
    """
    return _items(value, ()) if isinstance(value, Mapping) else _told(value, ())


def _told(value: object, around: tuple[int, ...]) -> str:
    """A value inside of others, whose ids are given so that a circle ends."""
    if id(value) in around:
        return "..."
    plain = _plain(value)
    if plain is not None:
        return plain
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return "{" + _items(value, around) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_told(v, around) for v in value) + "]"
    if isinstance(value, AbstractSet):
        return "{" + ", ".join(sorted(_told(v, around) for v in value)) + "}"
    if isinstance(value, FunctionType):
        name = value.__qualname__
        return f"{name} {code_digest(value, around)}" if "<" in name else name
    if isinstance(value, MethodType):
        return f"{_told(value.__self__, around)}.{value.__func__.__name__}"
    own = _items(_own(value), around)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name}({own})" if own or isinstance(value, tio.Transform) else name


def _items(values: Mapping[Any, object], around: tuple[int, ...]) -> str:
    return ", ".join(f"{key}={_told(value, around)}" for key, value in values.items())


def _plain(value: object) -> str | None:
    """What holds nothing else; None for any other."""
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
        return Path(value).name
    if isinstance(value, Enum | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type | ModuleType):
        return value.__name__
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value)
        return f"array {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, str | bytes | int | float | complex | range | slice | None):
        return repr(value)
    return None


def _own(value: object) -> dict[str, object]:
    """The attributes that make an object what it is."""
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, **value.keywords}
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    left_out = ("copy", "args_names") if isinstance(value, tio.Transform) else ()
    own = getattr(value, "__dict__", {})
    return {key: own[key] for key in sorted(own) if key not in left_out}


def code_digest(function: FunctionType, around: tuple[int, ...] = ()) -> str:
    """Digest of what a function does, without the names of its file and its variables.

    Args:
        function: The function.
        around: Ids of what it lies in, so that a circle ends.
    """

    def parts(code: CodeType) -> list[object]:
        constants = [parts(c) if isinstance(c, CodeType) else c for c in code.co_consts]
        return [code.co_code, code.co_names, constants]

    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    known = [parts(function.__code__), function.__defaults__, function.__kwdefaults__, cells]
    return hashlib.sha256(_told(known, around).encode()).hexdigest()[:16]
