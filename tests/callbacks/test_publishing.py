"""Results in loggers and files: sibling runs of the dense and the pruned network, TensorBoard, plans of dry runs."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from trainers import (
    LAYERS,
    LIGHTNING_WARNINGS,
    Data,
    Net,
    Watch,
    copy_state,
    equal_states,
    half,
    load_state,
    make_trainer,
    read_events,
    train_data,
    val_data,
    validate,
)

from lightning_nettrim import ADMM, Magnitude, NetTrim

pytestmark = LIGHTNING_WARNINGS


# --- loggers


def test_tensorboard_overlays_dense_and_pruned(tmp_path):
    callback, logger = half(solver=ADMM()), TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, callback, logger=logger).fit(Net(), train_data(), val_data())
    main, dense, pruned = (read_events(Path(logger.log_dir, part)) for part in ("", "dense", "pruned"))
    for run, side in ((dense, "dense"), (pruned, "pruned")):
        assert run.Scalars("val_loss")[-1].value == pytest.approx(callback.metrics[side]["val_loss"], rel=1e-6)
    assert dense.Scalars("val_loss")[-1].step == pruned.Scalars("val_loss")[-1].step
    assert len(main.Scalars("val_loss")) == 2
    tags = main.Tags()
    for report in callback.result.reports:
        assert main.Scalars(f"nettrim/{report.name}/sparsity")[0].value == 0.5
        keys = ("local_error", "end_to_end_error", "duality_gap", "violation", "steps", "seconds")
        assert {f"nettrim/{report.name}/{key}" for key in keys} <= set(tags["scalars"])
        (event,) = main.Scalars(f"nettrim/{report.name}/local_error")
        assert event.value == pytest.approx(report.local_error)
    (event,) = main.Scalars("nettrim/total/end_to_end_error")
    assert event.value == pytest.approx(callback.result.end_to_end_error)
    assert "nettrim/total/sparsity" in tags["scalars"]
    assert "nettrim/table/text_summary" in tags["tensors"]
    assert dense.Tags()["histograms"] == pruned.Tags()["histograms"]
    assert dense.Tags()["histograms"] == [f"nettrim/{layer}/weight" for layer in LAYERS]
    assert (Path(logger.log_dir) / "nettrim/pruned.ckpt").exists()


def test_csv_logger_has_sibling_runs(tmp_path):
    callback, logger = half(), CSVLogger(tmp_path)
    make_trainer(tmp_path, callback, logger=logger).fit(Net(), train_data(), val_data())
    for side in ("dense", "pruned"):
        head, row = (Path(logger.log_dir) / side / "metrics.csv").read_text().splitlines()
        assert float(dict(zip(head.split(","), row.split(","), strict=True))["val_loss"]) == pytest.approx(
            callback.metrics[side]["val_loss"]
        )
    assert "nettrim/fc1/sparsity" in (Path(logger.log_dir) / "metrics.csv").read_text()


class ListLogger(Logger):
    """A logger without folders; ``experiment`` is what a module may use directly."""

    name, version = "list", 0

    def __init__(self, root):
        super().__init__()
        self.root, self.experiment, self.rows = str(root), [], []

    @property
    def save_dir(self):
        return self.root

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


class UsesExperiment(Net):
    """A module that uses its logger's experiment directly."""

    def on_validation_epoch_end(self):
        self.logger.experiment.append("image")


def test_other_loggers_have_prefixed_metrics(tmp_path):
    callback, logger = half(), ListLogger(tmp_path)
    trainer = make_trainer(tmp_path, callback, logger=logger, num_sanity_val_steps=0)
    trainer.fit(UsesExperiment(), train_data(), val_data())
    logged = {key: value for row in logger.rows for key, value in row.items()}
    assert logged["dense/val_loss"] == callback.metrics["dense"]["val_loss"]
    assert logged["pruned/val_loss"] == callback.metrics["pruned"]["val_loss"]
    assert logged["nettrim/fc1/sparsity"] == 0.5
    assert sum("val_loss" in row for row in logger.rows) == 2
    assert logger.experiment == ["image", "image"]


# --- a dry run


def check_plan(path):
    plan = yaml.safe_load((path / "nettrim/plan.yaml").read_text())
    assert list(plan["layers"]) == ["fc1", "fc2"]
    assert plan["layers"]["fc1"] == {
        "sparsity": 0.5,
        "pattern": "unstructured",
        "refit": False,
        "shape": [16, 8],
        "followed_by": "ReLU",
    }
    assert plan["skipped"] == {"fc3": "ignored"}
    assert {file.name for file in (path / "nettrim").iterdir()} == {"plan.yaml"}


def test_dry_run_of_a_fit_changes_nothing_and_writes_the_plan(tmp_path):
    watch, callback, model = Watch(), half(dry_run=True, ignore=["fc3"]), Net()
    make_trainer(tmp_path, watch, callback).fit(model, train_data(), val_data())
    assert equal_states(copy_state(model), watch.trained)
    assert callback.result is None
    check_plan(tmp_path)


def test_dry_run_of_a_validate_changes_nothing_and_writes_the_plan(tmp_path, dense_checkpoint):
    callback, model = half(dry_run=True, ignore=["fc3"]), Net()
    metrics = make_trainer(tmp_path, callback).validate(
        model, datamodule=Data(), ckpt_path=dense_checkpoint, verbose=False
    )
    assert equal_states(copy_state(model), load_state(dense_checkpoint))
    assert metrics == validate(tmp_path, model)
    check_plan(tmp_path)


def test_a_plan_is_written_edited_and_read_back(tmp_path):
    model = Net()
    make_trainer(tmp_path, half(dry_run=True, allocate="global")).fit(model, train_data(), val_data())
    path = tmp_path / "nettrim/plan.yaml"
    plan = yaml.safe_load(path.read_text())
    plan["layers"]["fc2"]["sparsity"] = 0.25
    path.write_text(yaml.safe_dump(plan))
    callback = NetTrim(plan=str(path), solver=Magnitude(), refit=False)
    make_trainer(tmp_path, callback).validate(model, datamodule=Data(), verbose=False)
    expected = [plan["layers"][name]["sparsity"] for name in LAYERS]
    assert [report.sparsity for report in callback.result.reports] == pytest.approx(expected)
