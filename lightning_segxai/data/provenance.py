"""What a kept volume was made by, beside its settings: code, and files that settings name."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType, MethodType

import torchio as tio

from lightning_segxai.data.settings import code_digest

_VERSIONED = ("torchio", "torch", "numpy", "builtins", "pathlib", "functools")


def provenance(settings: object, content: Callable[[Path], str]) -> list[str]:
    """What must be the same for equal settings to give equal volumes.

    The versions of TorchIO and of this package's own code; the source files of all other code
    that the settings run, a user's transform say, or its bytecode where it has no file; and the
    contents of files that the settings name, such as a reference to resample to.

    Args:
        settings: Transforms and samplings.
        content: Digest of a file.
    """
    found = {tio.__version__, _own_code()}
    for part in _parts(settings, set()):
        if isinstance(part, Path | str):
            file = Path(part)
            if _is_file(file):
                found.add(f"{file.name} {content(file)}")
            continue
        made_by = part if isinstance(part, FunctionType) else type(part)
        name = made_by.__module__
        if name.split(".")[0] in _VERSIONED or name.startswith("lightning_segxai.data."):
            continue
        source = getattr(sys.modules.get(name), "__file__", None)
        if source is not None and _is_file(Path(source)):
            found.add(f"{name} {content(Path(source))}")
        else:
            found.add(f"{made_by.__qualname__} {_bytecode(made_by)}")
    return sorted(found)


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Digest of the code of this folder, and of what it computes centerlines with."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in [*sorted(here.glob("*.py")), here.parent / "vessels.py"]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _parts(value: object, seen: set[int]) -> Iterator[object]:
    """All objects, functions and paths that settings hold."""
    if id(value) in seen or value is None or isinstance(value, bool | int | float | complex):
        return
    seen.add(id(value))
    if isinstance(value, str | Path):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _parts(one, seen)
    elif isinstance(value, list | tuple | AbstractSet):
        for one in value:
            yield from _parts(one, seen)
    elif isinstance(value, FunctionType):
        yield value
        for cell in value.__closure__ or ():
            yield from _parts(cell.cell_contents, seen)
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__, seen)
        yield from _parts(value.__self__, seen)
    elif isinstance(value, partial):
        yield from _parts([value.func, value.args, value.keywords], seen)
    else:
        yield value
        yield from _parts(getattr(value, "__dict__", {}), seen)
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        yield from _parts([getattr(value, name, None) for name in slots], seen)


def _bytecode(made_by: FunctionType | type) -> str:
    """Digests of a function or of the methods of a class, typed into a notebook say."""
    functions = [made_by] if isinstance(made_by, FunctionType) else vars(made_by).values()
    return " ".join(code_digest(f) for f in functions if isinstance(f, FunctionType))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long to be one, or with a null character
        return False
