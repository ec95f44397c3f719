"""Extensions that are written outside the package work through YAML."""

import sys
from pathlib import Path

import extensions
import pytest
import torch
import yaml
from trainers import CLI_WARNINGS

from lightning_nettrim import register_layer, trim
from lightning_nettrim.cli import main
from lightning_nettrim.testing import SolverContract

pytestmark = CLI_WARNINGS

SOLVER = {"class_path": "extensions.EnergySolver", "init_args": {"power": 1.5}}
ALLOCATION = {"class_path": "extensions.DenseFirst"}
PATTERN = {"class_path": "extensions.WholeInputs", "init_args": {"count": 2}}


class TestEnergySolver(SolverContract):
    solver = extensions.EnergySolver()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs ``nettrim fit`` on a configuration of the callback and returns the pruned weights and the report."""

    def run(**arguments):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["nettrim"])
        callback = {"class_path": "lightning_nettrim.NetTrim", "init_args": arguments}
        trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "callbacks": [callback]}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        model, data = ({"class_path": f"extensions.{name}"} for name in ("ScaledNet", "RandomData"))
        config = {"trainer": trainer | quiet, "model": model, "data": data}
        Path("recipe.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", "recipe.yaml"])
        report = yaml.safe_load((folder / "nettrim/report.json").read_text())
        state = torch.load(folder / "nettrim/pruned.ckpt", weights_only=True)["state_dict"]
        return [state[f"layers.{i}.kernel"] for i in (0, 2, 4)], report

    return run


def test_a_layer_type_is_pruned(run):
    weights, report = run(sparsity=0.5, allocate="uniform")
    assert [layer["type"] for layer in report["layers"]] == ["Scaled"] * 3
    assert [float((W == 0).float().mean()) for W in weights] == [0.5] * 3
    assert report["total"]["end_to_end_bound"] >= report["total"]["end_to_end_error"]


def test_a_solver_is_used(run):
    weights, report = run(sparsity=0.5, allocate="uniform", refit=False, solver=SOLVER)
    assert report["arguments"]["solver"] == SOLVER
    assert all(layer["steps"] == 0 and layer["status"] is None for layer in report["layers"])
    assert [float((W == 0).float().mean()) for W in weights] == [0.5] * 3


def test_a_pattern_is_used_for_all_layers_and_for_one(run):
    weights, report = run(sparsity=0.5, allocate="uniform", pattern=PATTERN)
    assert report["layers"][0]["pattern"] == "inputs_by_2"
    for W in weights:
        pairs = (W == 0).all(1).reshape(-1, 2)
        assert torch.equal(pairs[:, 0], pairs[:, 1])
        assert pairs.float().mean() == 0.5
    weights, report = run(sparsity=0.5, allocate="uniform", per_layer={"layers.2": {"pattern": PATTERN}})
    assert [layer["pattern"] for layer in report["layers"]] == ["unstructured", "inputs_by_2", "unstructured"]


def test_an_allocation_is_used(run):
    weights, report = run(sparsity=0.3, allocate=ALLOCATION)
    assert report["layers"][0]["sparsity"] == 0
    assert report["total"]["sparsity"] == pytest.approx(0.3, abs=0.002)


def test_a_pattern_survives_a_plan_file(tmp_path):
    model = extensions.ScaledNet()
    batches = torch.randn(96, 8).split(32)
    pattern = extensions.WholeInputs(2)
    result = trim(model, batches, sparsity=0.5, pattern=pattern, allocate="uniform", dry_run=True)
    path = tmp_path / "plan.yaml"
    path.write_text(result.plan)
    result = trim(model, batches, plan=path)
    assert [report.pattern for report in result.reports] == ["inputs_by_2"] * 3


def test_a_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nettrim"])
    model, data = ({"class_path": f"extensions.{name}"} for name in ("ScaledNet", "RandomData"))
    config = {"model": model, "data": data, "digits": 2, "trainer": {"accelerator": "cpu", "logger": False}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["count", "--config", "config.yaml"], [extensions.Count])
    assert "356.00 parameters, RandomData" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "layer", "message"),
    [(extensions.Scaled(2, 2), extensions.ScaledLayer, "module_type"), (extensions.Scaled, dict, "layer_type")],
)
def test_a_registration_is_checked(module, layer, message):
    with pytest.raises(TypeError, match=message):
        register_layer(module, layer)


def test_a_wrong_class_path_of_a_pattern_is_refused():
    for path in ("extensions.Nothing", "extensions.DenseFirst", "no_such_module.Pattern", "Such"):
        with pytest.raises(ValueError, match="pattern: expected the class path of a Pattern"):
            trim(extensions.ScaledNet(), [], sparsity=0.5, per_layer={"x": {"pattern": {"class_path": path}}})
