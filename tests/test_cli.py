"""The command line: recipes run and are combined, configurations are printed, and wrong options are refused."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from trainers import CLI_WARNINGS

from lightning_nettrim.cli import main

pytestmark = [*CLI_WARNINGS, pytest.mark.filterwarnings("ignore:The dirpath has changed from")]

ROOT = Path(__file__).parents[1]
SUBCOMMANDS = ("fit", "validate", "test", "predict")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    """Run as in a shell at the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["nettrim"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(tmp_path, *configs, command="fit"):
    """A short fit of the digits recipe with further configurations; returns the folder of the run."""
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 20,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger.init_args.save_dir": tmp_path,
    }
    recipes = [part for config in ("recipes/digits.yaml", *configs) for part in ("--config", str(config))]
    main([command, *recipes, *(f"--trainer.{key}={value}" for key, value in options.items())])
    return tmp_path / "digits/version_0"


def delta(tmp_path, **arguments):
    """A configuration of some arguments of the callback; the others are those of the recipe."""
    callback = {"class_path": "lightning_nettrim.NetTrim", "init_args": arguments}
    path = tmp_path / "delta.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return path


def test_the_dense_delta_removes_the_callback(tmp_path):
    folder = run(tmp_path, "recipes/dense.yaml")
    assert (folder / "checkpoints").exists()
    assert not (folder / "nettrim").exists()


def test_the_recovery_delta_keeps_the_options_of_the_recipe(tmp_path):
    folder = run(tmp_path, "recipes/recover.yaml")
    report = json.loads((folder / "nettrim/report.json").read_text())
    assert report["arguments"]["epsilon"] == 0.1
    assert report["arguments"]["recover"]["class_path"] == "lightning_nettrim.pruning.recovery.Distillation"
    assert report["recovery"]["loss_after"] <= report["recovery"]["loss_before"]


def test_the_magnitude_delta_prunes_the_digits_recipe(tmp_path):
    folder = run(tmp_path, "recipes/magnitude.yaml")
    report = json.loads((folder / "nettrim/report.json").read_text())
    assert report["arguments"]["solver"]["class_path"].endswith("Magnitude")
    assert [layer["sparsity"] for layer in report["layers"]] == [0.75] * 3
    weights = torch.load(folder / "nettrim/pruned.ckpt", weights_only=True)["state_dict"]
    assert float((weights["fc1.weight"] == 0).float().mean()) == 0.75


def test_the_tolerance_delta_prunes_the_digits_recipe(tmp_path):
    folder = run(tmp_path, "recipes/tolerance.yaml", delta(tmp_path, allocate="uniform"))
    report = json.loads((folder / "nettrim/report.json").read_text())
    dense, pruned = (report["metrics"][side]["val_acc"] for side in ("dense", "pruned"))
    assert pruned >= dense - 0.002
    assert len(report["trials"]) > 2


def test_the_digits_recipe_runs(tmp_path):
    folder = run(tmp_path)
    report = json.loads((folder / "nettrim/report.json").read_text())
    assert report["arguments"]["epsilon"] == 0.1
    assert report["total"]["sparsity"] > 0.05
    assert set(report["metrics"]["pruned"]) == {"val_acc", "val_loss"}


def test_per_layer_options_in_yaml(tmp_path):
    magnitude = {"class_path": "lightning_nettrim.Magnitude"}
    own = {"fc1": {"sparsity": 0.25, "refit": True}, "re:fc[23]": {"sparsity": 0}}
    folder = run(tmp_path, delta(tmp_path, epsilon=None, sparsity=0.5, solver=magnitude, refit=False, per_layer=own))
    report = json.loads((folder / "nettrim/report.json").read_text())
    assert [layer["sparsity"] for layer in report["layers"]] == [0.25, 0, 0]
    assert report["arguments"]["per_layer"] == own
    assert report["arguments"]["per_layer"]["fc1"]["refit"] is True


def printed(capsys, *configs):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *(part for config in configs for part in ("--config", str(config))), "--print_config"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_is_read_back_as_the_same(tmp_path, capsys):
    solver = {"class_path": "lightning_nettrim.ADMM", "init_args": {"max_steps": 50, "rtol": 0.01}}
    text = printed(capsys, "recipes/digits.yaml", delta(tmp_path, epsilon=0.2, solver=solver))
    (callback,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert callback["init_args"]["epsilon"] == 0.2
    assert callback["init_args"]["solver"]["init_args"]["max_steps"] == 50
    assert callback["init_args"]["solver"]["init_args"]["relaxation"] == 1.8
    again = tmp_path / "printed.yaml"
    again.write_text(text)
    assert yaml.safe_load(printed(capsys, again)) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("arguments", "misspelled"),
    [
        ({"epsilom": 0.1}, "epsilom"),
        ({"epsilon": 0.1, "solver": {"class_path": "lightning_nettrim.ADMM", "init_args": {"steps": 5}}}, "steps"),
        ({"epsilon": 0.1, "scheme": "serial"}, "serial"),
        ({"epsilon": "much"}, "much"),
    ],
    ids=["argument", "solver", "choice", "type"],
)
def test_misspelled_arguments_are_refused(tmp_path, capsys, arguments, misspelled):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, delta(tmp_path, **arguments))
    assert ended.value.code != 0
    assert misspelled in capsys.readouterr().err


def test_validate_prunes_a_checkpoint(tmp_path):
    dense = run(tmp_path, "recipes/dense.yaml")
    (checkpoint,) = (dense / "checkpoints").iterdir()
    config = tmp_path / "checkpoint.yaml"
    config.write_text(yaml.safe_dump({"ckpt_path": str(checkpoint), "trainer": {"limit_val_batches": 1}}))
    run(tmp_path, delta(tmp_path, per_layer={"fc3": {"sparsity": 0.75}}), config, command="validate")
    report = json.loads((tmp_path / "digits/version_1/nettrim/report.json").read_text())
    assert report["layers"][2]["sparsity"] == 0.75
    assert report["metrics"]["dense"] != report["metrics"]["pruned"]


def test_help_names_the_subcommands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SUBCOMMANDS)


def test_the_module_can_be_run(monkeypatch, capsys):
    """As by ``python -m lightning_nettrim --help``."""
    monkeypatch.setattr(sys, "argv", ["lightning_nettrim", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lightning_nettrim", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SUBCOMMANDS)
