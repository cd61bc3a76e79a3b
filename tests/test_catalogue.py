"""The list of metrics: complete, in words that hold, and printed for any reader."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch

import lightning_segxai
from lightning_segxai import cli
from lightning_segxai.catalogue import ALWAYS, KINDS, Entry, catalogue, example
from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.focus.base import FocusMetric, ShiftMetric
from lightning_segxai.focus.location import MassInside
from lightning_segxai.folder import RunFolder
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.observe import Questions, observe
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.timeline import Timeline
from lightning_segxai.values import Probe

EXPORTED = [getattr(lightning_segxai, name) for name in lightning_segxai.__all__]
ABSTRACT = (FocusMetric, ShiftMetric, FaithfulnessMetric)
METRICS = [
    thing
    for thing in EXPORTED
    if isinstance(thing, type) and issubclass(thing, ABSTRACT) and thing not in ABSTRACT
]


@dataclass(frozen=True)
class Odd(FocusMetric):
    """A metric with settings of every kind."""

    needed: int
    name: str = 'a "b"'
    inner: MassInside = field(default=MassInside("target"))
    many: tuple[float, ...] = field(default_factory=lambda: tuple(float(n) for n in range(50)))

    unit = "mm"
    range = (-math.inf, 0.0)
    higher_is_better = False
    reading = "None."

    def measure(self, attribution):
        return None


def entry(**changed) -> Entry:
    return replace(Entry("kind", "Name", (), "1", (0.0, 1.0), None, "Reading."), **changed)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_every_metric_has_an_entry_with_all_fields(metric):
    """It says what the class says, under the class's kind."""
    [found] = [e for e in catalogue(EXPORTED) if e.name == metric.__name__]

    assert issubclass(metric, {kind: base for base, kind in KINDS}[found.kind])
    one = example(metric)
    assert (found.unit, found.range, found.reading) == (one.unit, one.range, one.reading)
    assert found.higher_is_better is one.higher_is_better
    assert found.unit
    assert re.fullmatch(r"any|-?[\d.]+ (to -?[\d.]+|or more|or less)", found.range_text)
    assert found.better in ("higher", "lower", "-")
    assert found.reading.endswith(".")


def test_nothing_but_metrics_is_listed():
    """Each once, kind by kind, and neither the abstract ones nor what is no metric."""
    entries = catalogue(EXPORTED)
    names = [e.name for e in entries if e.kind != ALWAYS]
    kinds = [kind for _, kind in KINDS] + [ALWAYS]

    assert sorted(names) == sorted(metric.__name__ for metric in METRICS)
    assert list(dict.fromkeys(e.kind for e in entries)) == kinds
    assert sorted(entries, key=lambda e: kinds.index(e.kind)) == entries


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ((0.0, 1.0), "0 to 1"),
        ((-1.0, 1.0), "-1 to 1"),
        ((0.0, math.inf), "0 or more"),
        ((1.0, math.inf), "1 or more"),
        ((-math.inf, 0.0), "0 or less"),
        ((-math.inf, math.inf), "any"),
        ((0.0, 0.5), "0 to 0.5"),
    ],
)
def test_a_range_in_words(limits, text):
    """Without infinities and needless decimals."""
    assert entry(range=limits).range_text == text


@pytest.mark.parametrize(("higher", "text"), [(True, "higher"), (False, "lower"), (None, "-")])
def test_the_better_direction_in_words(higher, text):
    """No direction is a dash."""
    assert entry(higher_is_better=higher).better == text


def test_settings_are_told_with_their_defaults():
    """As one would write them; long ones are cut, and a needed one has none."""
    odd, plain = catalogue([Odd, 3, "Odd", FocusMetric, MassInside])[:2]

    assert plain.call(80) == 'MassInside(region="label")'
    assert odd.settings == (
        "needed",
        'name="a \\"b\\""',
        "inner=MassInside(region='ta...",
        "many=(0.0, 1.0, 2.0, 3.0, ...",
    )
    assert odd.call(28).splitlines()[:2] == ["Odd(", '  needed, name="a \\"b\\"",']
    assert max(map(len, odd.call(40).splitlines())) <= 40
    assert entry().call(1) == "Name"


def test_what_is_always_recorded_is_listed(tmp_path):
    """Exactly the names, units and ranges of a run that asks for no metric."""
    net = torch.nn.Conv3d(1, 2, 3, padding=1)
    label = torch.zeros(8, 8, 8, dtype=torch.long)
    label[2:5, 2:5, 2:5] = 1
    probe = Probe(name="p", image=torch.rand(1, 8, 8, 8), spacing_mm=(1.0, 1.0, 1.0), label=label)
    methods = {"a": Saliency(), "b": InputXGradient(), "c": IntegratedGradients()}
    questions = Questions({"vessel": ClassEvidence(1)}, methods, {}, {})
    timeline = Timeline(RunFolder(tmp_path))
    listed = {e.name: e for e in catalogue([])}
    found = {}
    for step in range(2):
        seen = observe(
            Predictor(net),
            [probe],
            questions,
            epoch=step,
            step=step,
            logging_step=step,
            run="r",
            timeline=timeline,
            seed=0,
            failed=None,
        )
        for attribution in seen.attributions:
            timeline.folder.write_map(attribution)
        timeline.advance(seen.attributions, 0.5)
        for record in seen.records:
            name = re.sub("/(first|previous|best)$", "/<reference>", record.metric)
            low, high = listed[name].range
            assert low <= record.value <= high
            found[name] = record.unit

    assert found == {name: e.unit for name, e in listed.items()}


@pytest.mark.parametrize("width", [80, 140])
def test_the_command_fits_the_width(capsys, monkeypatch, width):
    """Each metric, each word of its reading help and each group is there, without colors."""
    monkeypatch.setenv("COLUMNS", str(width))

    cli.main(["metrics"])
    text = capsys.readouterr().out

    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    names = re.findall(r"^[\w/<>]+", text, flags=re.MULTILINE)
    words = set(text.split())
    for e in catalogue(EXPORTED):
        assert e.name in names
        assert set(e.reading.split()) <= words
        assert e.kind in text


def test_a_reader_who_leaves_is_no_error():
    """As `head` does: no traceback, no word, status 0."""
    code = "import sys; from lightning_segxai.cli import main; sys.exit(main(['metrics']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
        )
    finally:
        os.close(writer)

    assert done.stderr == ""
    assert done.returncode == 0


def test_a_poor_terminal_is_no_error():
    """Narrow, and of ASCII alone."""
    code = "from lightning_segxai.cli import main; main(['metrics'])"
    poor = os.environ | {"COLUMNS": "60", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=poor
    )

    assert done.stderr == ""
    assert "AveragePrecision" in done.stdout


def test_help_imports_nothing_heavy():
    """It is there at once, and tells of the command."""
    code = (
        "import sys\n"
        "from lightning_segxai.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print('heavy:', *{'torch', 'rich', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert "metrics" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "heavy:"
