"""Imports point one way, and each third party has one door."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = "lightning_segxai"
ROOT = Path(__file__).parents[1] / PACKAGE
FILES = sorted(PurePosixPath(path.relative_to(ROOT).as_posix()) for path in ROOT.rglob("*.py"))

# Each line may import from the lines above it. Names side by side do not import each other;
# names in one group are one family, and may.
ORDER: tuple[tuple[frozenset[str], ...], ...] = tuple(
    tuple(frozenset(family.split()) for family in line.split("|"))
    for line in (
        "values",
        "vessels | windows | deformations",
        "targets",
        "structures | baselines | rules",
        "scored",
        "trajectories | taps",
        "passes",
        "methods",
        "guard",
        "focus",
        "faithfulness",
        "explain | cost",
        "examine",
        "assess",
        "folder | alerts",
        "render panels contact_sheet marks lettering colors | timeline",
        "sinks",
        "observe | failures",
        "defaults | trainer_run | checkpoints",
        "chronicle",
        "callback",
        "posthoc | demo | inspection | catalogue",
        "cli",
    )
)

# Beside the line: what each may import of ours, itself excepted.
BESIDE: dict[str, frozenset[str]] = {
    "nets": frozenset(),
    "losses": frozenset(),
    "consistency": frozenset({"values", "deformations", "losses"}),
    "data": frozenset({"values", "vessels", "windows", "deformations"}),
    "task": frozenset({"values", "vessels", "windows", "losses", "consistency"}),
    "compare": frozenset({"values", "focus", "folder", "render"}),
}
# ... and who may import them, themselves excepted.
USERS: dict[str, frozenset[str]] = {
    "nets": frozenset({"demo", "cli"}),
    "losses": frozenset({"consistency", "task", "cli"}),
    "consistency": frozenset({"task", "cli"}),
    "data": frozenset({"callback", "posthoc", "demo", "inspection", "cli"}),
    "task": frozenset({"posthoc", "demo", "cli"}),
    "compare": frozenset({"demo", "cli"}),
}

DOORS: dict[str, tuple[str, ...]] = {
    "torchio": ("data/*",),
    "wandb": ("sinks/wandb.py", "compare/*"),
    "captum": ("methods/perturbation/*", "faithfulness/*"),
    "pytorch_lightning": ("callback.py", "task.py", "data/module.py", "cli.py"),
    "lightning": ("callback.py", "task.py", "data/module.py", "cli.py"),
    "lightning_fabric": ("callback.py", "task.py", "data/module.py", "cli.py"),
    "tensorboard": ("sinks/tensorboard.py",),
    "plotly": ("compare/*",),
    "matplotlib": (),
    "monai": (),
    "sklearn": (),
    "torchvision": (),
    "pickle": (),
}

VAGUE = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc", "base_utils"}


def place(name: str) -> tuple[int, frozenset[str]] | None:
    """Line and family of a part of the package; None for what stands beside the line."""
    for line, families in enumerate(ORDER):
        for family in families:
            if name in family:
                return line, family
    return None


def part(file: PurePosixPath) -> str:
    """The name in the table: of a module, or of the folder it lies in."""
    return file.parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Dotted names of all that a module imports, anywhere in it, also by a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            first = node.args[0]
            if name in ("import_module", "__import__", "find_spec", "importorskip") and isinstance(
                first, ast.Constant
            ):
                found.add(str(first.value))
    return found


def ours(source: str) -> set[str]:
    """The parts of the package that a module imports."""
    found = set()
    for name in imports(source):
        first, _, rest = name.partition(".")
        if first == PACKAGE:
            found.add(rest.split(".")[0])
    return found


def wrong(file: PurePosixPath, source: str) -> list[str]:
    """What the module imports of ours and must not."""
    me = part(file)
    here = place(me)
    refused = []
    for other in sorted(ours(source) - {me}):
        there = place(other)
        if me in BESIDE:
            allowed = other in BESIDE[me]
        elif other in USERS:
            allowed = me in USERS[other]
        else:
            assert here is not None
            # the bare package, as the command line imports it for its names
            allowed = (other == "" and me == "cli") or (
                there is not None and (there[0] < here[0] or there[1] == here[1])
            )
        if not allowed:
            refused.append(f"{file} imports {other or PACKAGE}")
    return refused


def strangers(file: PurePosixPath, source: str) -> list[str]:
    """The third parties that the module imports elsewhere than by their door."""
    return [
        f"{file} imports {party}"
        for party in sorted({name.split(".")[0] for name in imports(source)} & set(DOORS))
        if not any(file.match(door) for door in DOORS[party])
    ]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_module_is_in_the_table(file):
    """A new module gets its place before it gets its contents."""
    assert part(file) == "__init__" or place(part(file)) is not None or part(file) in BESIDE, (
        f"{file} has no place in the order of the imports: give it one in {Path(__file__).name}"
    )


@pytest.mark.parametrize("file", [f for f in FILES if f.as_posix() != "__init__.py"], ids=str)
def test_imports_point_one_way(file):
    """Also lazy ones, and those for type checkers only."""
    assert not wrong(file, (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_each_third_party_has_one_door(file):
    """What changes there changes one file here."""
    assert not strangers(file, (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_names_say_what_a_module_is_for(file):
    """No drawer for everything."""
    assert not VAGUE & {name.removesuffix(".py") for name in file.parts}


def test_test_files_have_unique_names():
    """They are imported by their base names, without packages around them."""
    names = [
        path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"
    ]
    assert sorted(set(names)) == sorted(names)
    assert "__init__.py" not in names


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("scored.py", "from lightning_segxai.passes import walk", True),
        ("passes.py", "from lightning_segxai.scored import Predictor", False),
        ("vessels.py", "from lightning_segxai.windows import Windows", True),
        ("vessels.py", "from lightning_segxai import values", False),
        ("values.py", "def f():\n    from lightning_segxai.vessels import distance_mm", True),
        ("values.py", "import lightning_segxai.examine", True),
        ("values.py", "import_module('lightning_segxai.examine')", True),
        ("render.py", "from lightning_segxai.marks import INK", False),
        ("render.py", "from lightning_segxai.timeline import Timeline", True),
        ("timeline.py", "from lightning_segxai.panels import panel", True),
        ("methods/noise.py", "from lightning_segxai.methods.base import X", False),
        ("methods/noise.py", "from lightning_segxai.guard import undisturbed", True),
        ("data/module.py", "from lightning_segxai.targets import Target", True),
        ("data/module.py", "from lightning_segxai.windows import Windows", False),
        ("task.py", "from lightning_segxai.values import Probe", False),
        ("task.py", "from lightning_segxai.scored import Predictor", True),
        ("task.py", "from lightning_segxai.consistency import DeformationConsistency", False),
        ("consistency.py", "from lightning_segxai.losses import finest", False),
        ("consistency.py", "from lightning_segxai.task import SegmentationTask", True),
        ("deformations.py", "from lightning_segxai.windows import Windows", True),
        ("data/deformation.py", "from lightning_segxai.deformations import warp", False),
        ("data/deformation.py", "from lightning_segxai.consistency import X", True),
        ("examine.py", "from lightning_segxai.data.probes import read_probe", True),
        ("callback.py", "from lightning_segxai.data.probes import ProbeFile", False),
        ("examine.py", "from lightning_segxai import examine as e, measure", True),
        ("nets.py", "if TYPE_CHECKING:\n    from lightning_segxai.values import Probe", True),
    ],
)
def test_the_check_of_the_order_itself(file, source, refused):
    """It sees what it must see, and nothing else."""
    assert bool(wrong(PurePosixPath(file), source)) is refused


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("examine.py", "import torchio as tio", True),
        ("data/probes.py", "from torchio.data import Subject", False),
        ("sinks/files.py", "def f():\n    import wandb", True),
        ("sinks/wandb.py", "from wandb import Table", False),
        ("methods/paths.py", "from captum.attr import IntegratedGradients", True),
        ("methods/perturbation/occlusion.py", "from captum.attr import Occlusion", False),
        ("faithfulness/deletion.py", "import captum", False),
        ("data/probes.py", "import pytorch_lightning as pl", True),
        ("examine.py", "__import__('lightning.pytorch')", True),
        ("task.py", "import lightning.pytorch", False),
        ("render.py", "import matplotlib.pyplot as plt", True),
        ("timeline.py", "import pickle", True),
        ("values.py", "from lightning_segxai_plus import x", False),
    ],
)
def test_the_check_of_the_doors_itself(file, source, refused):
    """It sees lazy imports and imports by a string too."""
    assert bool(strangers(PurePosixPath(file), source)) is refused
