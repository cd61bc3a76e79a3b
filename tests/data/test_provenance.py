"""What makes a kept volume stale: any code or file that made it, wherever it lies."""

import hashlib
import importlib
import subprocess
import sys
import types

import pytest
import torchio as tio

from lightning_segxai.data.intensity import ForegroundNormalization
from lightning_segxai.data.provenance import provenance
from lightning_segxai.data.sampling import BalancedSampling


def content(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def made_by(value):
    return provenance(value, content)


MODULE = """
import torchio as tio

FACTOR = {factor}

def scaled(x):
    return x * FACTOR

class Scaled(tio.Transform):
    __slots__ = ()
    def apply_transform(self, subject):
        return subject
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module, written anew with another factor whenever it is called."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(factor):
        (tmp_path / "mine_for_tests.py").write_text(MODULE.format(factor=factor))
        sys.modules.pop("mine_for_tests", None)
        importlib.invalidate_caches()
        return importlib.import_module("mine_for_tests")

    yield write
    sys.modules.pop("mine_for_tests", None)


@pytest.mark.parametrize(
    "setting",
    [
        lambda mine: tio.Lambda(mine.scaled),
        lambda mine: mine.Scaled(),
        lambda mine: tio.Compose([tio.ToCanonical(), mine.Scaled()]),
        lambda mine: tio.ZNormalization(masking_method=mine.scaled),
        lambda mine: {"a": [(mine.scaled,)]},
    ],
)
def test_a_users_code_counts(mine, setting):
    """An edited function, class or constant of a user's module makes another provenance."""
    first = made_by(setting(mine(1)))

    assert made_by(setting(mine(1))) == first
    assert made_by(setting(mine(9))) != first


def test_code_without_a_file_counts():
    """A function typed into a notebook is told by what it does."""
    notebook = types.ModuleType("a_notebook")
    sys.modules["a_notebook"] = notebook

    def typed(text):
        exec(text, notebook.__dict__)
        return made_by(tio.Lambda(notebook.__dict__["f"]))

    try:
        twice = typed("def f(x):\n    return x * 2")
        assert typed("def f(x):\n    return x * 2") == twice
        assert typed("def f(x):\n    return x * 3") != twice
    finally:
        del sys.modules["a_notebook"]


def test_files_that_settings_name_count(tmp_path):
    """A reference to resample to is told by its content, wherever it lies."""
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reference.nii").write_text(text)
    told = [made_by({"target": tmp_path / name / "reference.nii"}) for name in "abc"]

    assert told[0] != told[1]
    assert told[0] == told[2]
    assert made_by({"target": str(tmp_path / "b" / "reference.nii")}) == told[1]
    assert made_by({"target": "no/such/file.nii"}) == made_by({})


def test_it_is_the_same_in_another_process():
    """Nothing in it depends on the process, the order of sets, or addresses."""
    code = (
        "import torchio as tio\n"
        "from lightning_segxai.data.intensity import ForegroundNormalization\n"
        "from lightning_segxai.data.provenance import provenance\n"
        "print(provenance([tio.ZNormalization(), ForegroundNormalization()], str))"
    )
    told = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1


def test_own_settings_are_told_by_the_own_code():
    """TorchIO's version and this package's code decide, and nothing else."""
    plain = made_by([])
    assert made_by([ForegroundNormalization(), BalancedSampling(), tio.ZNormalization()]) == plain
    assert tio.__version__ in plain
