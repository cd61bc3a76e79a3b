"""Faithfulness in a training: when it is assessed, what it costs, and that it disturbs nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import pytest
import torch
import wandb
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from tiny_training import (
    cell,
    moments,
    quick_pictures,
    records,
    tiny_data,
    tiny_monitor,
    tiny_task,
    tiny_trainer,
)
from wandb_log import read_runs

from lightning_segxai import (
    Alert,
    Deletion,
    Infidelity,
    MassInside,
    RandomBaseline,
    Randomization,
    Saliency,
    SensitivityMax,
    WandbSink,
    assess,
    examine,
)
from lightning_segxai.faithfulness import FaithfulnessMetric
from lightning_segxai.scored import Passes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*costs ", "ignore:.*does not have many workers", "ignore:.*LeafSpec"
)

HELD = {"deletion": Deletion(2), "deletion_random": RandomBaseline(Deletion(2)),
        "randomization": Randomization(2)}  # fmt: skip


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """None of these tests looks at a picture."""
    quick_pictures(monkeypatch)


def fitted(root, monitor, epochs, **changes):
    trainer = tiny_trainer(root, monitor, max_epochs=epochs, **changes)
    task = tiny_task()
    trainer.fit(task, datamodule=tiny_data())
    return task


def assessed(monitor):
    """Global steps at which there is an assessment."""
    return sorted({r.step for r in records(monitor) if r.metric == "deletion"})


@pytest.mark.parametrize(
    ("every", "seldom", "expected"),
    [(1, 1, [0, 4, 8, 12, 16]), (1, 2, [0, 8, 16]), (2, 3, [0, 16]), (2, 1, [0, 8, 16]),
     (1, 5, [0])],
)  # fmt: skip
def test_it_is_assessed_with_the_first_observation_that_is_due(tmp_path, every, seldom, expected):
    """And on the untrained network; four validations, of four steps each."""
    monitor = tiny_monitor(
        faithfulness={"deletion": Deletion(1)},
        every_n_validations=every,
        faithfulness_every_n_validations=seldom,
    )
    fitted(tmp_path, monitor, 4)
    assert assessed(monitor) == expected
    assert [step for _, step in moments(monitor)] == list(range(0, 17, 4 * every))


def test_the_records_are_those_of_assess(tmp_path):
    """Of the network at the end; each cell once."""
    monitor = tiny_monitor(faithfulness=HELD, faithfulness_every_n_validations=1)
    task = fitted(tmp_path, monitor, 1)
    found = [r for r in records(monitor) if r.step == 4 and r.metric in HELD]
    methods = monitor.questions.methods
    targets = monitor.questions.targets
    maps = examine(task, monitor.probes, targets, methods)
    expected = assess(task, maps, targets, HELD, methods=methods)
    assert [(r.probe, r.method, r.metric) for r in found] == [
        (r.probe, r.method, r.metric) for r in expected
    ]
    assert [r.value for r in found] == pytest.approx([r.value for r in expected], abs=1e-6)
    assert {r.status for r in found} == {"ok"}
    cells = [cell(r) for r in records(monitor)]
    assert len(set(cells)) == len(cells)


def test_training_is_the_same_to_the_bit(tmp_path):
    """With all that explains on random weights."""
    torch.manual_seed(1)
    with_it = fitted(
        tmp_path / "a",
        tiny_monitor(
            faithfulness=HELD | {"steady": SensitivityMax(2), "infidelity": Infidelity(4)},
            faithfulness_every_n_validations=1,
        ),
        2,
    )
    torch.manual_seed(1)
    trainer = tiny_trainer(tmp_path / "b", max_epochs=2)
    without = tiny_task()
    trainer.fit(without, datamodule=tiny_data())
    theirs = without.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in with_it.state_dict().items())


def test_what_it_costs_is_said(tmp_path, capsys):
    """In passes: a prediction of each of two probes, and three points of the curve for each map."""
    monitor = tiny_monitor(faithfulness={"deletion": Deletion(2)})
    fitted(tmp_path, monitor, 1)
    said = capsys.readouterr().out
    assert (
        "takes 2 forward and 2 backward passes, and 14 forward and 0 backward passes more to "
        "assess faithfulness every 5 validations; in an epoch, " in said
    )


@dataclass(frozen=True)
class Fails(FaithfulnessMetric):
    """Raises, after counting its calls."""

    calls: list

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = None
    reading = "nothing"

    def assess(self, model, attribution, method=None):
        self.calls.append(1)
        raise LookupError("no")

    def passes(self, shape, windows, method=None):
        return Passes()


def test_a_metric_that_fails_is_recorded_and_can_be_disabled(tmp_path):
    """The training goes on; with ``disable`` it is not tried again."""
    for on_error, tries in (("warn", 1 + 3 * 2), ("disable", 1)):
        metric = Fails([])
        monitor = tiny_monitor(
            methods={"saliency": Saliency()},
            faithfulness={"fails": metric},
            on_error=on_error,
            faithfulness_every_n_validations=1,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(tmp_path / on_error, monitor, 2)
        assert any("fails of target" in str(w.message) for w in caught)
        assert len(metric.calls) == tries
        found = [r for r in records(monitor) if r.metric == "fails"]
        assert len(found) == (6 if on_error == "warn" else 0)
        assert all(r.status == "failed" for r in found)


def test_a_resumed_run_goes_on_with_its_cadence(tmp_path):
    """As one that never stopped."""

    def monitor():
        return tiny_monitor(
            faithfulness={"deletion": Deletion(1)}, faithfulness_every_n_validations=2
        )

    kept = ModelCheckpoint(tmp_path / "kept", save_top_k=-1)
    trainer = tiny_trainer(tmp_path, monitor(), kept, max_epochs=1, enable_checkpointing=True)
    trainer.fit(tiny_task(), datamodule=tiny_data())
    resumed = monitor()
    trainer = tiny_trainer(tmp_path, resumed, max_epochs=4)
    trainer.fit(tiny_task(), datamodule=tiny_data(), ckpt_path=kept.best_model_path)
    assert assessed(resumed) == [0, 8, 16]


def test_its_numbers_reach_wandb_and_alerts(tmp_path, offline):
    """Curves, the table's columns, and an alert on one of them."""
    monitor = tiny_monitor(
        faithfulness={"deletion": Deletion(1)},
        faithfulness_every_n_validations=1,
        alerts={"any": Alert("deletion", above=-1e9, for_epochs=1, method="saliency")},
        sinks=[WandbSink()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = WandbLogger(project="vessels", save_dir=str(offline), offline=True)
        fitted(tmp_path, monitor, 1, logger=logger)
    wandb.finish()
    [run] = read_runs(offline)
    keys = {key for row in run.history for key in row}
    assert "segxai/metric/deletion/vessel/saliency" in keys
    assert "segxai/metric/alert/any/vessel/saliency" in keys
    settings = json.loads((monitor.run.folder.root / "run.json").read_text())["settings"]
    assert settings["monitor"]["faithfulness"] == {"deletion": repr(Deletion(1))}
    assert settings["monitor"]["faithfulness_every_n_validations"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faithfulness_every_n_validations": 0}, r"validations=0\)` must be at least 1"),
        ({"faithfulness": {"a/b": Deletion()}}, "faithfulness metric name 'a/b'"),
        ({"faithfulness": {"mass_inside": Deletion()}}, "'mass_inside' stands for another number"),
        ({"metrics": {"dice": MassInside()}}, "'dice' stands for another number"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    """When the monitor is written down."""
    with pytest.raises(ValueError, match=message):
        tiny_monitor(**changes)
