"""What cannot work is said when it is given, or before anything is computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException
from tiny_training import (
    a_probe,
    plain_task,
    still_pairs,
    tiny_data,
    tiny_monitor,
    tiny_task,
    tiny_trainer,
)
from torch.utils.data import DataLoader

from lightning_segxai import AttributionMonitor, ClassEvidence, GradCAM, Saliency
from lightning_segxai.callback import AttributionMonitor as Monitor


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "../x"}, r"monitor name '\.\./x'"),
        ({"targets": {"../x": ClassEvidence(1)}}, r"name '\.\./x'"),
        ({"methods": {"a/b": Saliency()}}, "name 'a/b'"),
        ({"methods": {"": Saliency()}}, "name ''"),
        ({"every_n_validations": 0}, r"every_n_validations=0.*at least 1"),
        ({"window": 0}, "window"),
        ({"window": (8, 8, -1)}, "window"),
        ({"overlap": 1.0}, "overlap"),
        ({"threshold": 1.0}, "threshold"),
        ({"looks_per_pass": 0}, "looks_per_pass"),
        ({"keep": 0}, "keep"),
    ],
)
def test_a_wrong_argument_is_refused_where_it_is_given(given, said):
    """Names, numbers and words that cannot be are a ValueError of the constructor."""
    with pytest.raises(ValueError, match=said):
        AttributionMonitor(**given)


def test_a_wrong_word_is_refused_without_type_checks_too():
    """A user has no type checks at run time: the constructor's own ones must say it."""
    unchecked = getattr(Monitor.__init__, "__wrapped__", Monitor.__init__)
    with pytest.raises(ValueError, match=r"on_error='x'.*warn, disable or raise"):
        unchecked(object.__new__(Monitor), on_error="x")


def test_probes_of_one_name_are_refused(tmp_path):
    """Two probes of one name would share files and rows."""
    monitor = tiny_monitor(probes=[a_probe("p"), a_probe("p")])
    with pytest.raises(ValueError, match=r"different names.*'p', 'p'"):
        tiny_trainer(tmp_path, monitor).fit(tiny_task(), datamodule=tiny_data())


def test_more_than_one_process_is_refused():
    """In `setup`, before anything is computed."""
    with pytest.raises(MisconfigurationException, match=r"single process.*2.*devices=1"):
        tiny_monitor().setup(SimpleNamespace(world_size=2, callbacks=[]), None, "fit")


@pytest.mark.parametrize("without", ["loader", "limit"])
def test_a_run_without_validations_is_refused(without, tmp_path):
    """The monitor would silently do nothing."""
    pairs = DataLoader(still_pairs(), batch_size=2)
    trainer = tiny_trainer(
        tmp_path, tiny_monitor(), limit_val_batches=0 if without == "limit" else 1
    )
    with pytest.raises(MisconfigurationException, match=r"works at validations.*has none"):
        trainer.fit(plain_task(), pairs, None if without == "loader" else pairs)


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_wrong_layer_ends_the_run_before_training(sanity, tmp_path):
    """The error names the layers close to it; no step was trained."""
    task = tiny_task()
    monitor = tiny_monitor(methods={"cam": GradCAM(layer="net.encoder.9")})
    trainer = tiny_trainer(tmp_path, monitor, num_sanity_val_steps=sanity)

    with pytest.raises(ValueError, match=r"net\.encoder\.9.*[Cc]lose.*net\.encoder\.1"):
        trainer.fit(task, datamodule=tiny_data())

    assert trainer.global_step == 0
    assert list(tmp_path.rglob("records.csv")) == []
