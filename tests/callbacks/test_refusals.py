"""Options, networks and folders that cannot be used are refused before training, and nothing is changed."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from trainers import (
    LIGHTNING_WARNINGS,
    NO_VALIDATION_DATA,
    Data,
    MetricsNet,
    Net,
    Watch,
    copy_state,
    equal_states,
    half,
    make_trainer,
    train_data,
    val_data,
)

from lightning_nettrim import NetTrim

pytestmark = LIGHTNING_WARNINGS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of sparsity, epsilon, max_drop, plan and an n:m pattern, or macs, parameters or latency"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "got sparsity=0.5 and epsilon=0.1"),
        ({"epsilon": 0.0}, "epsilon: .* got 0.0"),
        ({"epsilon": -1.0}, "epsilon: .* got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: .* got nan"),
        ({"sparsity": 1.0}, "sparsity: .* got 1.0"),
        ({"sparsity": -0.1}, "sparsity: .* got -0.1"),
        ({"epsilon": 0.1, "scheme": "serial"}, "scheme: .* got 'serial'"),
        ({"max_drop": 0.1}, "max_drop, monitor: expected both or none of them, got 0.1 and None"),
        ({"epsilon": 0.1, "monitor": "val_acc"}, "max_drop, monitor: expected both .*, got None and 'val_acc'"),
        ({"max_drop": 0.1, "monitor": "val_acc", "mode": "least"}, "mode: .* got 'least'"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "pattern: .* got '4:2'"),
        ({"epsilon": 0.1, "calibration": "test"}, "calibration: .* got 'test'"),
        ({"epsilon": 0.1, "num_samples": 3}, "num_samples: .* got 3"),
        ({"epsilon": 0.1, "per_layer": {"fc1": {"epsilon": -2.0}}}, "epsilon: .* got -2.0"),
        ({"epsilon": 0.1, "per_layer": {"fc1": {"amount": 0.5}}}, "per_layer: .* got .'amount'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_construction(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        NetTrim(**arguments)


@pytest.mark.parametrize("argument", ["targets", "ignore", "per_layer"])
def test_a_key_that_matches_no_layer_is_refused_before_training(tmp_path, argument):
    watch, model = Watch(), Net()
    keys = {"fcc1": {"sparsity": 0.1}} if argument == "per_layer" else ["fcc1"]
    before = copy_state(model)
    with pytest.raises(MisconfigurationException, match=f"{argument}: 'fcc1' matches no layer.*'fc1'"):
        make_trainer(tmp_path, watch, half(**{argument: keys})).fit(model, train_data(), val_data())
    assert equal_states(copy_state(model), before)
    with pytest.raises(MisconfigurationException, match=f"{argument}: 'fcc1' matches no layer.*'fc1'"):
        make_trainer(tmp_path, half(**{argument: keys})).validate(model, datamodule=Data())


@NO_VALIDATION_DATA
def test_calibration_on_validation_data_that_do_not_exist_is_refused_before_training(tmp_path):
    model = Net()
    before = copy_state(model)
    with pytest.raises(MisconfigurationException, match="calibration='val': expected validation data"):
        make_trainer(tmp_path, half(calibration="val")).fit(model, train_data())
    assert equal_states(copy_state(model), before)


def test_two_callbacks_in_a_trainer_are_refused(tmp_path):
    class Other(NetTrim):
        """Has another state key, so that Lightning itself does not refuse it."""

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `NetTrim`"):
        make_trainer(tmp_path, half(), half())
    with pytest.raises(MisconfigurationException, match="expected one in a Trainer, got several"):
        make_trainer(tmp_path, half(), Other(epsilon=0.1)).fit(Net(), train_data(), val_data())


def test_a_folder_that_cannot_be_created_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = MetricsNet()
    before = copy_state(model)
    with pytest.raises(MisconfigurationException, match="expected a folder to write into, got .*file"):
        make_trainer(tmp_path / "file", half()).fit(model)
    assert equal_states(copy_state(model), before)
