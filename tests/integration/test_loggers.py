"""Experiment trackers: each run has its own folder, and MLflow stores its files."""

import json

import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from trainers import LIGHTNING_WARNINGS, Net, half, make_trainer, train_data, val_data

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),  # sqlalchemy's, of MLflow
]

FILES = ["pruned.ckpt", "report.json"]


def fit(path, logger, sparsity):
    """Train and prune; the callback and the module."""
    callback, module = half(sparsity=sparsity), Net()
    trainer = make_trainer(path, callback, logger=logger, max_epochs=1, enable_checkpointing=True)
    trainer.fit(module, train_data(), val_data())
    return callback, module


def assert_own_files(found):
    """Check that the folder of each run contains its network and its report, also after later runs."""
    folders = [callback.folder for callback, _ in found]
    assert len(set(folders)) == len(folders)
    for callback, module in found:
        assert sorted(path.name for path in callback.folder.iterdir()) == FILES
        report = json.loads((callback.folder / "report.json").read_text())
        assert report["total"]["sparsity"] == callback.result.sparsity
        stored = torch.load(callback.folder / "pruned.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("store", [pytest.param("sqlite", marks=pytest.mark.slow), "file"])
def test_mlflow_stores_the_files_of_each_run_and_has_no_broken_experiment(tmp_path, monkeypatch, store):
    client_of = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = f"sqlite:///{tmp_path / 'runs.db'}" if store == "sqlite" else f"file:{tmp_path / 'mlruns'}"
    found, runs = [], []
    for sparsity in (0.25, 0.5):
        logger = MLFlowLogger("prune", tracking_uri=tracking, artifact_location=str(tmp_path / "artifacts"))
        found.append(fit(tmp_path, logger, sparsity))
        runs.append(logger.run_id)
    assert_own_files(found)

    client = client_of(tracking)
    assert sorted(experiment.name for experiment in client.search_experiments()) == ["Default", "prune"]
    (experiment,) = (each for each in client.search_experiments() if each.name == "prune")
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == set(runs)
    for run_id, (callback, _) in zip(runs, found, strict=True):
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["nettrim/total/sparsity"] == pytest.approx(callback.result.sparsity)
        assert run.data.metrics["pruned/val_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
        names = [each.path for each in client.list_artifacts(run_id, "nettrim")]
        assert sorted(names) == [f"nettrim/{name}" for name in FILES]
        path = client.download_artifacts(run_id, "nettrim/report.json", str(tmp_path))
        with open(path) as file:
            assert json.load(file)["total"]["sparsity"] == callback.result.sparsity


def test_nothing_is_written_into_the_folder_of_mlflow_experiments(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("prune", save_dir=str(tmp_path / "mlruns"))
    callback, _ = fit(tmp_path, logger, 0.5)
    folders = {path.name for path in (tmp_path / "mlruns").iterdir() if path.is_dir()}
    assert folders <= {"0", ".trash", "models", logger.experiment_id}
    assert callback.folder.is_relative_to(tmp_path)


def test_wandb_runs_of_one_folder_have_their_own_files(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_files"))
    (tmp_path / "wandb_files").mkdir()
    monkeypatch.setenv("WANDB_SILENT", "true")
    found, versions = [], []
    for sparsity in (0.25, 0.5):
        logger = WandbLogger(project="prune", save_dir=tmp_path, mode="offline", log_model=False)
        found.append(fit(tmp_path, logger, sparsity))
        summary = dict(logger.experiment.summary)
        assert summary["nettrim/total/sparsity"] == pytest.approx(found[-1][0].result.sparsity)
        assert summary["pruned/val_loss"] == pytest.approx(found[-1][0].metrics["pruned"]["val_loss"])
        versions.append(logger.version)
        wandb.finish()
    assert len(set(versions)) == 2
    assert_own_files(found)
    for version, (callback, _) in zip(versions, found, strict=True):
        assert version in str(callback.folder)
