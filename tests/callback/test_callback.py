"""What the monitor does in a run: when it looks, what it writes, logs and prints."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from monai.data import MetaTensor
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from tiny_training import (
    Diary,
    a_probe,
    cell,
    metrics_rows,
    moments,
    plain_task,
    quick_pictures,
    records,
    still_pairs,
    tiny_data,
    tiny_monitor,
    tiny_task,
    tiny_trainer,
)
from torch.utils.data import DataLoader, default_collate

from lightning_segxai import (
    AttributionMethod,
    AttributionMonitor,
    FileSink,
    ProbeFile,
    Saliency,
    ScoredModel,
    Sink,
)
from lightning_segxai.folder import RunFolder

MASS = "segxai/metric/mass_inside/vessel/saliency"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*costs ", "ignore:.*does not have many workers", "ignore:.*LeafSpec"
)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """None of these tests looks at a picture."""
    quick_pictures(monkeypatch)


def fitted(root: Any, monitor: Any, *callbacks: Any, task: Any = None, **changes: Any) -> Any:
    """The trainer, after a fit with the monitor."""
    trainer = tiny_trainer(root, monitor, *callbacks, **changes)
    trainer.fit(tiny_task() if task is None else task, datamodule=tiny_data())
    return trainer


@dataclass(frozen=True)
class Raises(AttributionMethod):
    """Fails always, or on one probe only."""

    error: str = "no"
    on: str = ""

    def attribute(self, model: ScoredModel, x: Any) -> Any:
        if self.on in ("", model.probe.name):
            raise RuntimeError(self.error)
        return x.sum(dim=0)


# When it looks


def test_the_untrained_network_and_every_validation_are_observed(tmp_path):
    """One observation at step 0, one per validation, each row once, by epoch and step."""
    monitor = tiny_monitor()
    fitted(tmp_path, monitor, max_epochs=2)

    assert moments(monitor) == [(0, 0), (0, 4), (1, 8)]
    cells = [cell(r) for r in records(monitor)]
    assert len(set(cells)) == len(cells)
    assert {(r.target, r.method) for r in records(monitor) if r.metric == "mass_inside"} == {
        ("vessel", "saliency"),
        ("vessel", "grad_cam"),
    }
    assert {r.metric for r in records(monitor) if r.step == 4} >= {
        "dice",
        "region_voxels",
        "rank_correlation/first",
        "rank_correlation/previous",
        "rank_correlation/best",
    }


def test_the_bare_monitor_measures_all_it_promises(tmp_path):
    """With all defaults no cell fails."""
    monitor = AttributionMonitor(sinks=[])
    fitted(tmp_path, monitor)

    assert [r for r in records(monitor) if r.status == "failed"] == []
    assert {r.method for r in records(monitor)} - {""} == {
        "saliency",
        "integrated_gradients",
        "grad_cam",
    }


@dataclass(frozen=True)
class Edges(AttributionMethod):
    """Looks at the image alone, never at the network."""

    def attribute(self, model: ScoredModel, x: Any) -> Any:
        return x.sum(dim=0).diff(dim=0, append=x.sum(dim=0)[-1:]).abs()


def test_a_method_that_does_not_see_the_weights_is_found_out(tmp_path):
    """Its map stays that of the untrained network; a gradient's does not."""
    monitor = tiny_monitor(methods={"edges": Edges(), "saliency": Saliency()})
    fitted(tmp_path, monitor, max_epochs=2)

    rows = records(monitor)
    alike = {(r.step, r.method): r.value for r in rows if r.metric == "untrained_similarity"}
    assert {step for step, _ in alike} == {4, 8}
    assert alike[8, "edges"] == 1.0
    assert alike[8, "saliency"] < 0.95
    unmoved = {r.method: r.value for r in rows if r.metric == "unmoved" and r.step == 8}
    assert unmoved == {"edges": 1.0, "saliency": 0.0}


def test_only_every_nth_validation_is_observed(tmp_path):
    """The third, the sixth, and so on; and the untrained network."""
    monitor = tiny_monitor(every_n_validations=3)
    fitted(tmp_path, monitor, max_epochs=4)

    assert moments(monitor) == [(0, 0), (2, 12)]


def test_validations_within_an_epoch_are_told_apart(tmp_path):
    """By the step."""
    monitor = tiny_monitor()
    fitted(tmp_path, monitor, val_check_interval=2)

    assert moments(monitor) == [(0, 0), (0, 2), (0, 4)]


def test_two_validations_at_one_step_are_not_mixed_up(tmp_path):
    """Gradients accumulated over several validations: no cell is recorded twice."""
    monitor = tiny_monitor()
    fitted(tmp_path, monitor, val_check_interval=1, accumulate_grad_batches=4)

    cells = [cell(r) for r in records(monitor)]
    assert len(set(cells)) == len(cells)


def test_the_sanity_check_leaves_nothing(tmp_path):
    """It is a rehearsal: no row, no file, no logged number."""

    class Stop(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            raise KeyboardInterrupt

    monitor = tiny_monitor()
    with pytest.raises(SystemExit):
        fitted(tmp_path, monitor, Stop())

    assert list(tmp_path.rglob("*")) == []


def test_validate_and_test_are_none_of_its_business(tmp_path):
    """Outside of fit the monitor does nothing."""
    monitor = tiny_monitor()
    trainer = fitted(tmp_path, monitor)
    before = repr(records(monitor)), monitor.state_dict()

    trainer.validate(trainer.lightning_module, datamodule=tiny_data(), verbose=False)
    trainer.test(trainer.lightning_module, datamodule=tiny_data(), verbose=False)

    assert (repr(records(monitor)), monitor.state_dict()) == before
    assert not any(key.startswith("segxai") for key in trainer.callback_metrics)


def test_a_signal_stops_between_probes(tmp_path):
    """A run that is told to end finishes the probe, looks at no further one, and writes it."""
    found: list[Any] = []

    @dataclass(frozen=True)
    class Told(AttributionMethod):
        """Gets the signal while the first probe of the first validation is explained."""

        def attribute(self, model: ScoredModel, x: Any) -> Any:
            if found and found[0].global_step > 0:
                found[0]._signal_connector.received_sigterm = True
            return x.sum(dim=0)

    class Find(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            found.append(trainer)

    monitor = tiny_monitor(methods={"told": Told()})
    trainer = tiny_trainer(tmp_path, Find(), monitor, val_check_interval=2)
    with pytest.raises(SIGTERMException):
        trainer.fit(tiny_task(), datamodule=tiny_data())

    seen = [[r.probe for r in records(monitor) if r.step == step] for step in (0, 2)]
    assert set(seen[0]) == {p.name for p in monitor.probes}
    assert set(seen[1]) == {monitor.probes[0].name}
    assert moments(monitor) == [(0, 0), (0, 2)]


def test_a_second_fit_is_a_run_of_its_own(tmp_path):
    """The same monitor in another Trainer begins from nothing."""
    monitor = tiny_monitor()
    fitted(tmp_path, monitor)
    first = monitor.run
    fitted(tmp_path, monitor)

    assert monitor.run.folder.root != first.folder.root
    assert moments(monitor) == [(0, 0), (0, 4)]


# What it writes and logs


def test_metrics_hold_all_that_the_validation_logged(tmp_path):
    """Also what the module logs after the monitor has looked; not the monitor's own."""
    pairs = DataLoader(still_pairs(), batch_size=2)
    monitor = tiny_monitor()
    tiny_trainer(tmp_path, monitor, max_epochs=2).fit(plain_task(), pairs, pairs)

    by_name: dict[str, list[Any]] = {}
    for epoch, step, name, value in metrics_rows(monitor):
        by_name.setdefault(name, []).append((epoch, step, value))
    assert by_name["val_late"] == [(0, 2, 0.25), (1, 4, 0.25)]
    assert [row[:2] for row in by_name["val_loss"]] == [(0, 2), (1, 4)]
    assert not any(name.startswith("segxai") for name in by_name)


def test_nothing_is_logged_to_the_loggers_behind_the_sinks(tmp_path):
    """Its scalars are for callbacks; loggers get them from a sink, once."""
    diary = Diary(tmp_path)
    trainer = fitted(tmp_path, tiny_monitor(), logger=diary)

    assert MASS in trainer.callback_metrics
    assert MASS not in trainer.logged_metrics
    assert not any(key.startswith("segxai") for _, line in diary.lines for key in line)


def test_its_scalars_can_be_monitored(tmp_path):
    """ModelCheckpoint keeps the best by one, and EarlyStopping sees each."""
    best = ModelCheckpoint(tmp_path / "best", monitor=MASS, mode="max")
    stop = EarlyStopping(MASS, mode="max", patience=0, min_delta=10.0)
    monitor = tiny_monitor()
    trainer = fitted(tmp_path, monitor, best, stop, max_epochs=5, enable_checkpointing=True)

    logged = [r.value for r in records(monitor) if r.metric == "mass_inside" and r.step == 4]
    assert stop.stopped_epoch == 1
    assert trainer.current_epoch == 2
    assert len(logged) == 4
    assert float(best.best_model_score) == pytest.approx(
        max(
            sum(r.value for r in of) / len(of)
            for step in (4, 8)
            for of in [
                [
                    r
                    for r in records(monitor)
                    if (r.step, r.metric, r.method) == (step, "mass_inside", "saliency")
                ]
            ]
        ),
        rel=1e-6,
    )


@pytest.mark.parametrize("kind", ["csv", "diary"])
def test_the_folder_is_where_checkpoints_of_the_logger_are(kind, tmp_path):
    """Beside ModelCheckpoint's own folder."""
    logger = CSVLogger(tmp_path, name="vessels") if kind == "csv" else Diary(tmp_path)
    kept = ModelCheckpoint(save_last=True)
    monitor = tiny_monitor()
    fitted(tmp_path, monitor, kept, logger=logger, enable_checkpointing=True)

    assert monitor.run.folder.root.parent == type(tmp_path)(kept.dirpath).parent
    assert monitor.run.folder.root.name == "segxai"
    assert monitor.run.id == "version_0"
    assert {r.run for r in records(monitor)} == {"version_0"}


def test_without_a_logger_the_folder_is_under_the_root(tmp_path):
    """``<default_root_dir>/<monitor>/<run id>``."""
    monitor = tiny_monitor(name="mine")
    fitted(tmp_path, monitor)

    assert monitor.run.folder.root == tmp_path / "mine" / monitor.run.id


def test_a_fast_dev_run_explains_and_writes_nothing(tmp_path):
    """It touches the code, as all of a fast_dev_run does."""
    monitor = tiny_monitor()
    trainer = tiny_trainer(tmp_path, monitor, fast_dev_run=1)
    trainer.fit(tiny_task(), datamodule=tiny_data())

    assert trainer.global_step == 1
    assert monitor.probes
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_only_the_maps_that_are_needed_stay(tmp_path):
    """``keep="last"``: the first, the previous and the best one of each cell."""
    monitor = tiny_monitor(keep="last")
    fitted(tmp_path, monitor, max_epochs=4)

    folder = monitor.run.folder.root
    dices = {}
    for r in records(monitor):
        if r.metric == "dice":
            dices.setdefault((r.epoch, r.step), []).append(r.value)
    best = max(dices, key=lambda when: sum(dices[when]))  # of equal ones the earliest
    expected = {f"e{e:04d}-s{s:06d}.nii.gz" for e, s in ((0, 0), (3, 16), best)}
    for method in ("saliency", "grad_cam"):
        for place in folder.glob(f"maps/*/vessel/{method}"):
            assert {p.name for p in place.iterdir()} == expected


def test_two_monitors_keep_to_themselves(tmp_path):
    """Each has its folder, its scalars and its state; neither's scalars are metrics of the run."""
    one, two = tiny_monitor(name="one"), tiny_monitor(name="two", seed=1)
    trainer = fitted(tmp_path, one, two)

    assert one.state_key != two.state_key
    assert one.run.folder.root != two.run.folder.root
    assert "one/metric/dice" in trainer.callback_metrics
    assert "two/metric/dice" in trainer.callback_metrics
    assert moments(one) == moments(two) == [(0, 0), (0, 4)]
    for monitor in (one, two):
        assert not any(name.startswith(("one/", "two/")) for *_, name, _ in metrics_rows(monitor))


# Where the probes come from


def dictionaries(batch: list[Any]) -> dict[str, Any]:
    """MONAI's batches: a dictionary, the image with its affine."""
    image, label = default_collate(batch)
    affine = torch.diag(torch.tensor([0.5, 0.5, 2.0, 1.0])).double()
    return {"image": MetaTensor(image, affine=affine), "label": label[:, None][:, :, 0]}


@pytest.mark.parametrize("lightning", [pl, lp], ids=["pytorch_lightning", "lightning"])
@pytest.mark.parametrize("collate", [default_collate, dictionaries])
def test_probes_come_from_the_first_validation_batch(collate, lightning, tmp_path):
    """Where nobody gives any; in the Trainers of both namespaces."""
    pairs = DataLoader(still_pairs(), batch_size=3, collate_fn=collate)
    monitor = tiny_monitor()
    tiny_trainer(tmp_path, monitor, lightning=lightning).fit(plain_task(lightning), pairs, pairs)

    assert [p.name for p in monitor.probes] == ["batch-1", "batch-2", "batch-3"]
    expected = [image for image, _ in still_pairs()]
    assert all(torch.equal(p.image, x) for p, x in zip(monitor.probes, expected, strict=False))
    spacing = (0.5, 0.5, 2.0) if collate is dictionaries else (1.0, 1.0, 1.0)
    assert {p.spacing_mm for p in monitor.probes} == {spacing}
    assert moments(monitor) == [(0, 0), (0, 2)]


def test_probes_come_from_torchio_batches(tmp_path):
    """Without a data module, the batch brings name and geometry."""
    data, monitor = tiny_data(), tiny_monitor()
    tiny_trainer(tmp_path, monitor).fit(tiny_task(), data.train_dataloader(), data.val_dataloader())

    assert len(monitor.probes) == 2
    assert {p.spacing_mm for p in monitor.probes} == {data.probes()[0].spacing_mm}


def test_the_first_validation_brings_probes_without_a_sanity_check(tmp_path):
    """They cannot be had earlier: the untrained network is missing, the rest is there."""
    pairs = DataLoader(still_pairs(), batch_size=2)
    monitor = tiny_monitor()
    trainer = tiny_trainer(tmp_path, monitor, num_sanity_val_steps=0, max_epochs=2)
    trainer.fit(plain_task(), pairs, pairs)

    assert moments(monitor) == [(0, 2), (1, 4)]


def test_probes_come_from_the_data_module(tmp_path):
    """By default, its own."""
    monitor = tiny_monitor()
    fitted(tmp_path, monitor)

    expected = tiny_data().probes()
    assert [p.name for p in monitor.probes] == [p.name for p in expected]
    assert [p.fingerprint for p in monitor.probes] == [p.fingerprint for p in expected]
    kept = [monitor.run.folder.load_probe(p.name) for p in expected]
    assert [p.fingerprint for p in kept] == [p.fingerprint for p in expected]


def test_given_probes_come_first(tmp_path):
    """Probe objects as they are, files through the data module's preprocessing."""
    folder = RunFolder(tmp_path / "files")
    folder.save_probe(a_probe("file"))
    paths = {part: str(path) for part, path in folder.probe_paths("file").items()}
    given = [a_probe("given"), ProbeFile(**paths, name="read")]
    monitor = tiny_monitor(probes=given)
    fitted(tmp_path, monitor)

    assert [p.name for p in monitor.probes] == ["given", "read"]
    assert torch.equal(monitor.probes[0].image, a_probe().image)
    image = a_probe().image
    level = 0.1374  # the data module scales by what is brighter than a quarter of its own median
    head = image[image > level]
    assert head.median().item() / 4 == pytest.approx(level, abs=1e-4)
    expected = (image - head.mean()) / head.std()
    torch.testing.assert_close(monitor.probes[1].image, expected, atol=1e-4, rtol=1e-4)


# What it costs


def test_the_printed_cost_is_what_an_observation_takes(tmp_path, capsys):
    """Counted in volumes that go through the network, forward and backward."""
    monitor = AttributionMonitor(sinks=[], shifts={})
    task = tiny_task()
    counted = {"forward": 0, "backward": 0}

    def forward(_module: Any, args: Any, output: Any) -> None:
        counted["forward"] += len(args[0])

    def backward(_module: Any, grad_input: Any, grad_output: Any) -> None:
        counted["backward"] += len(grad_output[0])

    class Count(pl.Callback):
        """Stands around the monitor's hook: counts what happens in between."""

        def __init__(self, begin: bool) -> None:
            self.begin = begin

        @property
        def state_key(self) -> str:
            return f"Count{self.begin}"

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.sanity_checking:
                return
            if self.begin:
                pl_module.counting = [
                    pl_module.net.register_forward_hook(forward),
                    pl_module.net.register_full_backward_hook(backward),
                ]
            else:
                for handle in pl_module.counting:
                    handle.remove()

    fitted(tmp_path, Count(begin=True), monitor, Count(begin=False), task=task)

    said = re.search(r"takes (\d+) forward and (\d+) backward", capsys.readouterr().out)
    assert said is not None
    assert (int(said[1]), int(said[2])) == (counted["forward"], counted["backward"])


def test_the_share_of_an_epoch_is_told_above_five_percent(tmp_path, capsys):
    """Eight patches forward and backward are an epoch; two probes, once each, are a quarter."""
    with pytest.warns(UserWarning, match=r"costs 25%.*every_n_validations"):
        fitted(tmp_path, tiny_monitor(methods={"saliency": Saliency()}))

    said = capsys.readouterr().out
    assert "2 forward and 2 backward passes" in said
    assert "25.0%" in said


def test_a_small_share_is_not_warned_of(tmp_path):
    """One small probe against four big patches."""
    pairs = DataLoader([(x[0], x[1]) for x in still_pairs(48)], batch_size=12)
    monitor = tiny_monitor(probes=[a_probe(edge=8)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tiny_trainer(tmp_path, monitor).fit(plain_task(), pairs, pairs)

    assert [str(w.message) for w in told if "of an epoch" in str(w.message)] == []


# What fails


def test_a_failing_method_is_told_once_and_recorded_each_time(tmp_path):
    """``warn``: the others go on, and so does the training."""
    monitor = tiny_monitor(methods={"bad": Raises("broken"), "saliency": Saliency()})
    with pytest.warns(UserWarning, match='bad of target "vessel" failed.*broken') as told:
        fitted(tmp_path, monitor, max_epochs=2)

    rows = records(monitor)
    assert len([w for w in told if "broken" in str(w.message)]) == len(monitor.probes)
    assert {r.status for r in rows if r.method == "bad"} == {"failed"}
    assert all(math.isnan(r.value) for r in rows if r.method == "bad")
    assert {r.step for r in rows if r.method == "bad"} == {0, 4, 8}
    assert {r.status for r in rows if r.method == "saliency"} == {"ok"}


@dataclass(frozen=True)
class Breaks(AttributionMethod):
    """Leaves the network in train mode, frozen, with other statistics and a hook, and raises."""

    def attribute(self, model: ScoredModel, x: Any) -> Any:
        net = model.predictor.module
        net.train()
        net.requires_grad_(False)
        for buffer in net.buffers():
            buffer.add_(1)
        net.net.register_forward_hook(lambda _module, _args, output: output * 2)
        raise RuntimeError("broken")


@pytest.mark.filterwarnings("ignore:.*broken", "ignore:.*failed on probe")
def test_a_failing_method_does_not_change_what_the_others_see(tmp_path):
    """What it did to the network is undone before the next one looks, not after the last."""
    alone = tiny_monitor(methods={"saliency": Saliency()})
    beside = tiny_monitor(methods={"bad": Breaks(), "saliency": Saliency()})
    fitted(tmp_path / "alone", alone)
    fitted(tmp_path / "beside", beside)

    values = [
        {cell(r): (r.status, r.value) for r in records(m) if r.method in ("saliency", "")}
        for m in (alone, beside)
    ]
    assert values[0] == values[1]


@pytest.mark.filterwarnings("ignore:.*broken")
def test_a_failing_method_can_be_left_out_from_then_on(tmp_path):
    """``disable``: it is not asked again."""
    bad = Raises("broken", on="phantom-02-2")  # not the probe of the rehearsal
    monitor = tiny_monitor(methods={"bad": bad, "saliency": Saliency()}, on_error="disable")
    monitor_probes = [p.name for p in tiny_data().probes()]
    assert monitor_probes[1] == bad.on
    fitted(tmp_path, monitor, max_epochs=2)

    assert {r.step for r in records(monitor) if r.method == "bad"} == {0}
    assert {r.step for r in records(monitor) if r.method == "saliency"} == {0, 4, 8}


@pytest.mark.filterwarnings("ignore:.*broken")
def test_a_disabled_method_has_another_chance_in_another_run(tmp_path):
    """A second fit with the same monitor asks all its questions."""
    bad = Raises("broken", on="phantom-02-2")
    monitor = tiny_monitor(methods={"bad": bad, "saliency": Saliency()}, on_error="disable")
    fitted(tmp_path, monitor)
    fitted(tmp_path, monitor)

    assert "bad" in {r.method for r in records(monitor)}


def test_a_failing_method_can_end_the_run(tmp_path):
    """``raise``."""
    monitor = tiny_monitor(methods={"bad": Raises("broken", on="phantom-02-2")}, on_error="raise")
    with pytest.raises(RuntimeError, match="broken"):
        fitted(tmp_path, monitor)


@dataclass(frozen=True)
class FullDisk(Sink):
    """A sink without space."""

    def write(self, run: Any, observation: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    """A sink's failure is told once; the other sinks are written."""
    monitor = tiny_monitor(sinks=[FullDisk()])
    with pytest.warns(UserWarning, match="FullDisk failed: OSError.*No space left") as told:
        trainer = fitted(tmp_path, monitor, max_epochs=2)

    assert trainer.global_step == 8
    assert len([w for w in told if "No space" in str(w.message)]) == 1
    assert moments(monitor) == [(0, 0), (0, 4), (1, 8)]


@pytest.mark.filterwarnings("ignore:.*No space", "ignore:.*earlier map")
def test_a_full_disk_of_the_run_folder_does_not_end_the_training(tmp_path, monkeypatch):
    """Not even where nothing at all can be written."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_bytes", full)
    monkeypatch.setattr(RunFolder, "_append", full)
    trainer = fitted(tmp_path, tiny_monitor(), max_epochs=2)

    assert trainer.global_step == 8
    assert MASS in trainer.callback_metrics


def test_sinks_are_opened_before_and_closed_after(tmp_path):
    """Each once, also when the run ends by an exception."""
    calls: list[str] = []

    @dataclass(frozen=True)
    class Calls(Sink):
        def open(self, run: Any) -> None:
            calls.append("open")

        def write(self, run: Any, observation: Any) -> None:
            calls.append(f"write {observation.step}")

        def close(self, run: Any) -> None:
            calls.append("close")

    class Fail(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("from elsewhere")

    fitted(tmp_path, tiny_monitor(sinks=[Calls()]))
    with pytest.raises(RuntimeError, match="from elsewhere"):
        fitted(tmp_path, tiny_monitor(sinks=[Calls()]), Fail())

    assert calls == ["open", "write 0", "write 4", "close"] * 2


@pytest.mark.filterwarnings("ignore:.*from elsewhere")
def test_an_exception_outside_of_fit_closes_nothing_again(tmp_path):
    """A failing ``trainer.test`` after the fit is not the monitor's."""
    closed: list[int] = []

    @dataclass(frozen=True)
    class Closing(FileSink):
        def close(self, run: Any) -> None:
            closed.append(1)

    class Fail(pl.Callback):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("from elsewhere")

    trainer = fitted(tmp_path, tiny_monitor(sinks=[Closing()]), Fail())
    with pytest.raises(RuntimeError, match="from elsewhere"):
        trainer.test(trainer.lightning_module, datamodule=tiny_data(), verbose=False)

    assert len(closed) == 1


def test_a_place_behind_weight_averaging_is_warned_of(tmp_path):
    """There the monitor sees other weights than the validation; in front of it, it does not."""
    with pytest.warns(UserWarning, match="after `WeightAveraging`.*raw weights.*first"):
        tiny_trainer(tmp_path, WeightAveraging(), tiny_monitor()).fit(
            tiny_task(), datamodule=tiny_data()
        )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tiny_trainer(tmp_path, tiny_monitor(), WeightAveraging()).fit(
            tiny_task(), datamodule=tiny_data()
        )

    assert not any("raw weights" in str(w.message) for w in told)


def test_scalars_are_there_between_observations_too(tmp_path):
    """Else `EarlyStopping` would end a training whose first validation is not observed."""
    key = "segxai/metric/mass_inside/vessel/saliency"
    stopping = EarlyStopping(key, mode="max", patience=10)
    monitor = tiny_monitor(every_n_validations=2)
    trainer = tiny_trainer(tmp_path, monitor, stopping, max_epochs=3)
    trainer.fit(tiny_task(), datamodule=tiny_data())

    assert trainer.current_epoch == 3
    assert moments(monitor) == [(0, 0), (1, 8)]
    assert key in trainer.callback_metrics


def test_a_picture_that_cannot_be_drawn_takes_no_number_with_it(tmp_path, monkeypatch):
    """Maps and records are there, the picture is not, and it is told."""
    monkeypatch.setattr("lightning_segxai.observe.render", lambda *_, **__: 1 / 0)
    monitor = tiny_monitor()
    with pytest.warns(UserWarning, match="the picture .* ZeroDivisionError"):
        fitted(tmp_path, monitor)

    own = [r for r in records(monitor) if (r.metric, r.method) == ("mass_inside", "saliency")]
    assert own
    assert {r.status for r in own} == {"ok"}
    assert list((monitor.run.folder.root / "maps").rglob("*.nii.gz"))
    assert not list(monitor.run.folder.root.rglob("*.png"))
