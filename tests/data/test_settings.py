from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio

from lightning_segxai.data.sampling import BalancedSampling
from lightning_segxai.data.settings import told


class Kind(Enum):
    A = 1
    B = 2


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("x",)
    x: int


class Masker:
    """A callable with a setting, as MONAI's and users' transforms are."""

    def __init__(self, above):
        self.above = above

    def __call__(self, values):
        return values > self.above

    def masked(self, values):
        return self(values)


def above(level):
    return lambda values: values > level


LAMBDAS = [lambda x: x * 2, lambda x: x * 3, lambda x: x + 2, lambda x: abs(x), lambda x: -abs(x)]

DIFFERENT = {
    "numbers": [1, 1.0, 2, True, "1", b"1", None, 1j, np.float64(1.5)],
    "words": ["a", "b", "", ["a", "b"], ["a, b"], [["a"], "b"]],
    "nested": [{"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}, {"a": 1, "c": 2}],
    "sets": [{1, 2}, {1, 3}, set(), frozenset({1})],
    "names": [Kind.A, Kind.B, torch.float32, torch.float64, torch.device("cpu"), int, float],
    "ranges": [range(3), range(4), slice(1, 2), slice(2, 3)],
    "arrays": [np.arange(3.0), np.arange(4.0), torch.arange(3)],
    "lambdas": [*LAMBDAS, above(1), above(2)],
    "partials": [functools.partial(max, 1), functools.partial(max, 2), functools.partial(min, 1)],
    "partials by name": [functools.partial(max, default=1), functools.partial(max, default=2)],
    "objects": [Masker(1), Masker(2), Slotted(1), Slotted(2), Masker(1).masked, Masker(2).masked],
    "sampling": [BalancedSampling(), BalancedSampling(0.4)],
    "transforms": [
        tio.Resample(0.6),
        tio.Resample(0.7),
        tio.Resample((0.6, 0.6, 0.7)),
        tio.Compose([tio.Resample(0.6)]),
        tio.Clamp(0, 1),
        tio.Clamp(0, 2),
        tio.Lambda(LAMBDAS[0]),
        tio.Lambda(LAMBDAS[1]),
        tio.To(torch.float32),
        tio.To(torch.float64),
        tio.ZNormalization(),
        tio.ZNormalization(masking_method=tio.ZNormalization.mean),
        tio.ZNormalization(masking_method="brain"),
        tio.ZNormalization(masking_method=Masker(3)),
        tio.ZNormalization(masking_method=Masker(4)),
        tio.HistogramStandardization({"image": np.linspace(0, 100, 13)}),
        tio.HistogramStandardization({"image": np.linspace(0, 90, 13)}),
    ],
}


@pytest.mark.parametrize("group", DIFFERENT)
def test_different_settings_are_told_apart(group):
    """No two different settings have the same words: else the cache would give stale volumes."""
    words = [told(value) for value in DIFFERENT[group]]
    assert len(set(words)) == len(words), words


def test_monai_settings_are_told():
    """A MONAI transform inside TorchIO's adapter is told with its own settings."""
    monai = pytest.importorskip("monai.transforms")
    a, b = (tio.MonaiAdapter(monai.NormalizeIntensity(nonzero=n)) for n in (True, False))
    assert told(a) != told(b)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Path("/home/me/landmarks.npy"), "landmarks.npy"),
        ("/data/a/landmarks.npy", "landmarks.npy"),
        ({"a": Path("/x/y"), "b": [1, (2, None)]}, "a=y, b=[1, [2, None]]"),
        (BalancedSampling(0.25), "BalancedSampling(foreground=0.25)"),
        (np.float32(0.5), "0.5"),
        (max, "max"),
        (tio.ZNormalization.mean, "Transform.mean"),
        (functools.partial(max, 3), "partial(func=max, args=[3])"),
        (object(), "object"),
    ],
)
def test_words_are_known(value, words):
    """Folders, kinds of sequences and of numbers do not matter; names are told."""
    assert told(value) == words


def test_equal_settings_have_equal_words():
    """Settings made twice, in another order or with another `copy`, are told in equal words."""
    for make in (
        lambda: tio.Compose([tio.Resample(0.6), tio.Lambda(above(3))]),
        lambda: {"c", "a", "b"},
        lambda: Masker([np.zeros(3), {"x": 1}]),
    ):
        assert told(make()) == told(make())
    assert told(tio.Clamp(0, 1, copy=False)) == told(tio.Clamp(0, 1))


def test_no_address_is_told():
    """Objects, functions and generators are never told by where they are in memory."""
    values = [object(), above(1), Masker(object()), torch.Generator(), np.random.RandomState(0)]
    words = told([*values, *(tio.Lambda(v) for v in values if callable(v)), tio.RandomNoise()])
    assert " at 0x" not in words


def test_circles_end():
    """An object that holds itself is told, too."""
    one = Masker(0)
    one.above = [one, 3]
    assert told(one) == "Masker(above=[..., 3])"


def test_words_are_the_same_in_another_process():
    """Nothing depends on the process: not on hash seeds, nor on the file where code stands."""
    code = (
        "import torchio as tio\n"
        "from lightning_segxai.data.settings import told\n"
        "def inner():\n"
        "    return lambda v: v in {'a', 'b', 'c', 'd'} and [w for w in v if w]\n"
        "print(told([inner(), {'x', 'y', 'z'}, tio.Compose([tio.Lambda(inner())])]))\n"
    )
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(code, {})
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert there.stdout == here.getvalue() != ""
