"""The benchmarks on tiny instances: scores, each peer, the cost of a step, and the commands."""

from __future__ import annotations

import csv
import multiprocessing
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import convex, latency, layer_cost, lenet, oneshot, run
from benchmarks.peers import (
    TimedOut,
    Trial,
    Unavailable,
    alps,
    authors,
    cvxpy_clarabel,
    cvxpy_scs,
    ours,
    sparsegpt,
    wanda,
)
from benchmarks.scoring import cast, score
from benchmarks.steps import step_cost
from benchmarks.time_to_tolerance import (
    Reference,
    bisect_steps,
    is_within_tolerance,
    reference,
    run_until_tolerance,
)
from lightning_nettrim import ADMM, Cardinality
from lightning_nettrim.core.certificate import violation
from recipes.models import MLP, ResNet
from tests.problems import layer, optimum
from tests.processes import CONTEXT

FAKE_AUTHORS_SOLVER = """
import numpy as np


def net_trim_solver(X, Y, V, epsilon, rho, max_iteration=10000):
    print("output that must not be shown")
    assert X.dtype == Y.dtype == np.float64 and X.flags.c_contiguous
    assert X.shape[1] == Y.shape[1] and V.shape == Y.shape and not V.any()
    return np.linalg.lstsq(X.T, Y.T, rcond=None)[0] * (1 - 1 / max_iteration)
"""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked(monkeypatch):
    """The processes of the benchmarks are forked from one that has imported torch."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: CONTEXT)


@pytest.fixture
def clone(tmp_path):
    path = tmp_path / "clone" / authors.FILE
    path.parent.mkdir(parents=True)
    path.write_text(FAKE_AUTHORS_SOLVER, encoding="utf-8")
    return tmp_path / "clone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_agree_with_the_formulas_of_the_problem(dtype):
    problem = layer(bias=True, dtype=dtype)
    W = torch.where(problem.W.abs() > 0.1, 0.9 * problem.W, 0)
    exact, scores = cast(problem, dtype=torch.float64), score(problem, W, 2.0, optimum=10.0)
    W = W.double()
    assert scores.objective == pytest.approx(float(exact.objective(W)))
    assert scores.gap == pytest.approx(scores.objective / 10 - 1)
    assert scores.violation == pytest.approx(float(violation(exact, W)))
    assert scores.local_error == pytest.approx(float(exact.local_error(W)))
    assert scores.sparsity == float((W[:-1] == 0).double().mean())
    assert scores.seconds == 2
    assert scores.optimality_error == max(abs(scores.gap), scores.violation)


def test_score_rejects_weights_of_another_shape():
    problem = layer()
    with pytest.raises(ValueError, match="W: expected shape"):
        score(problem, problem.W.T, 0.0)


@pytest.mark.parametrize("variant", [{}, {"relu": False}], ids=["relu", "linear"])
def test_reference_and_all_solvers_agree(variant):
    problem = layer(60, 12, 5, **variant)
    known = reference(problem)
    assert known.optimum == pytest.approx(optimum(problem), rel=2e-5)
    for peer in (ours, cvxpy_clarabel, cvxpy_scs):
        trials = run_until_tolerance(known.score_trials(problem, peer.solve(problem)))
        assert is_within_tolerance(trials[-1]), peer.NAME
        assert trials[-1][0].seconds > 0
        assert trials[-1][0].steps > 0


def test_cone_solver_beyond_its_time_limit_raises_timed_out():
    for peer in (cvxpy_clarabel, cvxpy_scs):
        with pytest.raises(TimedOut, match="no solution in 1e-06 minutes"):
            next(peer.solve(layer(60, 12, 5), minutes=1e-6))


def test_recording_trials_does_not_change_the_solution():
    problem = layer()
    trials = list(ours.solve(problem))
    solution, _ = ours.solve_timed(problem, ADMM())
    assert torch.equal(trials[-1].W, solution.W)
    assert trials[-1].steps == int(solution.steps)
    assert [t.seconds for t in trials] == sorted(t.seconds for t in trials)


def test_missing_clones_and_devices_raise_unavailable(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for trials in (authors.solve(layer(), tmp_path, 10, (1,)), ours.solve(layer(), "cuda")):
        with pytest.raises(Unavailable, match="clone github.com/DNNToolBox/Net-Trim|no CUDA device"):
            next(trials)
    with pytest.raises(Unavailable, match="no CUDA device"):
        step_cost(8, 4, 2, "cuda")


def test_authors_solver_gets_samples_in_columns(clone, capsys):
    problem = layer(dtype=torch.float32)
    short, long = authors.solve(problem, clone, 10, (2, 10**9))
    assert capsys.readouterr().out == ""
    assert short.W.shape == long.W.shape == problem.W.shape
    assert (short.steps, long.steps) == (2, 10**9)
    torch.testing.assert_close(short.W, long.W / 2)


def test_bisection_finds_the_first_number_of_steps_within_tolerance():
    problem = layer()
    W = ours.solve_timed(problem, ADMM(rtol=1e-5, atol=1e-5))[0].W
    known = Reference(float(problem.objective(W)), 0.0, 0.0)

    def run_steps(count):
        return next(known.score_trials(problem, [Trial(W if count >= 260 else 0 * W, 1.0, count)]))

    trials = run_until_tolerance(map(run_steps, (100, 200, 400, 800)))
    assert [trial.steps for trial, _ in trials] == [100, 200, 400]
    assert [trial.steps for trial, _ in bisect_steps(trials, run_steps)] == [100, 200, 250, 300, 400]
    assert bisect_steps(trials[:2], run_steps) == trials[:2]
    assert len(run_until_tolerance(map(run_steps, (100, 200, 400, 800)), max_seconds=1.5)) == 2


def test_step_cost_is_positive():
    cost = step_cost(64, 16, 8)
    assert min(cost.step, cost.products, cost.gflops) > 0
    assert cost.ratio == cost.step / cost.products
    assert step_cost(64, 16, 8, tf32=True).step > 0


def test_convex_command_writes_a_table_and_a_plot(clone, tmp_path, monkeypatch, capsys):
    def tiny(number, relative_epsilon, samples, root, cache, neurons=None):
        problem = layer(60, 12, 5, dtype=torch.float32, seed=number)
        return replace(problem, epsilon=relative_epsilon * problem.Y.norm())

    monkeypatch.setattr(lenet, "problem", tiny)
    out = tmp_path / "out"
    run.main(["convex", "--out", str(out), "--authors", str(clone), "--small"])
    printed = capsys.readouterr().out
    with (out / "convex.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["section"] for row in rows} == {*convex.SECTIONS, "trace"}
    assert {row["solver"] for row in rows} >= {"ours, cpu", "authors, ρ=10", "Clarabel", "SCS", "path"}
    assert (out / "convex.png").read_bytes().startswith(b"\x89PNG")
    assert "benchmarks.run" in printed
    assert "CONVERGED" in printed
    assert str(tmp_path) not in (out / "convex.csv").read_text(encoding="utf-8")


def test_unknown_section_is_rejected(capsys):
    with pytest.raises(SystemExit):
        run.main(["convex", "--sections", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


# --- one-shot pruning


FAKE_PEERS = {
    "alps.py": """
import transformers
import torch

dev = 'cuda:0'


class ALPS_prune:
    def __init__(self, layer, nsamples, seqlen):
        assert not isinstance(layer, transformers.Conv1D)
        self.layer = layer

    def add_batch(self, inp, out):
        assert inp.shape[0] == out.shape[0]
        self.inp = inp.to(dev)

    def ALPS_admm(self, sp, nm_n=0, nm_m=0):
        print("output that must not be shown")
        torch.cuda.synchronize()
        kept = round((1 - sp) * self.layer.weight.numel())
        threshold = self.layer.weight.abs().flatten().sort(descending=True).values[kept]
        self.layer.weight.data *= self.layer.weight.abs() > threshold
""",
    "sparsegpt.py": """
import transformers
from quant import *


class SparseGPT:
    def __init__(self, layer):
        self.layer = layer

    def add_batch(self, inp, out):
        pass

    def fasterprune(self, sparsity, prunen=0, prunem=0):
        self.layer.arguments = (sparsity, prunen, prunem)
""",
    "lib/layerwrapper.py": """
import torch


class WrappedGPT:
    def __init__(self, layer):
        self.scaler_row = torch.zeros(layer.weight.shape[1])

    def add_batch(self, inp, out):
        self.scaler_row += inp.square().sum(0)
""",
}


@pytest.fixture
def peers(tmp_path):
    for name, source in FAKE_PEERS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path


def test_code_of_peers_runs_on_the_cpu_without_output(peers, capsys):
    layer, X, synchronize = torch.nn.Linear(8, 6), torch.randn(20, 8), torch.cuda.synchronize
    installed = sys.modules.get("transformers")
    alps.method(peers)(layer, X, 0.75, None)
    assert int((layer.weight != 0).sum()) == 12
    sparsegpt.method(peers)(layer, X, 0.5, (2, 4))
    assert layer.arguments == (0.5, 2, 4)
    layer = torch.nn.Linear(8, 6)
    score = layer.weight.detach().abs() * X.norm(dim=0)
    wanda.method(peers)(layer, X, 0.75, None)
    assert bool(((layer.weight != 0).sum(1) == 2).all())
    for row, kept in zip(score, layer.weight != 0, strict=True):
        assert row[kept].min() >= row[~kept].max()
    wanda.method(peers)(layer, X, 0.5, (1, 4))
    assert bool(((layer.weight.reshape(-1, 4) != 0).sum(1) <= 1).all())
    assert capsys.readouterr().out == ""
    assert torch.cuda.synchronize is synchronize
    assert sys.modules.get("transformers") is installed


@pytest.mark.parametrize("peer", [alps, sparsegpt, wanda])
def test_missing_clone_raises_unavailable(peer, tmp_path):
    for clone in (None, tmp_path):
        with pytest.raises(Unavailable, match="clone github.com/"):
            peer.method(clone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_oneshot_command_prints_a_table_and_writes_its_files(tmp_path, peers, monkeypatch, capsys, data):
    monkeypatch.setattr(lenet, "MLP", lambda sizes: MLP([784, 100, 40, 10]))
    monkeypatch.setattr(oneshot, "Cardinality", partial(Cardinality, max_steps=30))
    monkeypatch.setattr(oneshot, "THOROUGH", Cardinality(max_steps=30, row_parts=2))
    settings = ["--out", str(tmp_path / "out"), "--alps", str(peers)]
    settings += ["--seeds", "1", "--epochs", "1", "--samples", "500"]
    run.main(["oneshot", *settings, "--budgets", "0.9", "2:4"])
    printed = capsys.readouterr().out
    assert "SparseGPT (authors) skipped" in printed
    with (tmp_path / "out/oneshot.csv").open() as file:
        rows = {(row["budget"], row["method"]): row for row in csv.DictReader(file)}
    for method in ("ours", "ours, allocated", "magnitude + refit", "ALPS (authors)"):
        assert method in printed
        assert float(rows["0.9", method]["sparsity"]) == pytest.approx(0.9, abs=2e-3)
    assert float(rows["0", "dense"]["accuracy"]) > 90
    assert float(rows["2:4", "ours"]["sparsity"]) == pytest.approx(0.5 * (1 - 400 / 82800))
    assert float(rows["0.9", "ours"]["end_to_end_error_1"]) < float(
        rows["0.9", "magnitude + refit"]["end_to_end_error_1"]
    )
    assert (tmp_path / "out/oneshot.png").stat().st_size > 1000


@pytest.mark.slow
def test_processes_and_memory_commands_print_tables_and_write_their_files(forked, tmp_path, capsys):
    sizes = ["--samples", "200", "--inputs", "20", "--outputs", "8"]
    run.main(["processes", "--out", str(tmp_path), *sizes])
    targets = ["--targets", "features.3.*"]
    images = ["--images", "8", "--batch", "4", "--size", "32", "--samples", "256"]
    run.main(["memory", "--out", str(tmp_path), "--network", "squeezenet1_1", "--limits", "1", *images, *targets])
    with (tmp_path / "processes.csv").open() as file:
        rows = [(r["solver"], r["scaling"], int(r["processes"]), int(r["rows"])) for r in csv.DictReader(file)]
    counts = [("strong", 1, 200), ("weak", 1, 200), ("strong", 2, 200), ("weak", 2, 400)]
    assert rows == [(solver, *count) for count in counts for solver in ("ADMM", "Cardinality")]
    with (tmp_path / "memory.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["peak"]) == pytest.approx(float(row["ratio"]) * float(row["limit"]))
    assert "peak layer" in capsys.readouterr().out


def test_the_memory_command_prunes_a_llama_from_its_files(forked, tmp_path, capsys):
    run.main(["memory", "--larger-than-memory", "--dim", "64", "--depth", "2", "--out", str(tmp_path)])
    with (tmp_path / "memory.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["limit"]) == 1
    assert row["peak_layer"].startswith("blocks.")
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 211 + 2 * 64)
    assert float(row["weights"]) == pytest.approx(4 * (blocks + 2 * 128 * 64 + 64) / 2**30)
    assert "weights (GiB)" in capsys.readouterr().out


def test_the_layer_cost_command_fits_exponents(forked, tmp_path, capsys):
    options = ["--sections", "inputs", "--methods", "magnitude + refit", "--largest", "140000"]
    run.main(["layer_cost", "--out", str(tmp_path), *options])
    with (tmp_path / "layer_cost.csv").open() as file:
        sizes = [(row["section"], int(row["inputs"]), int(row["outputs"])) for row in csv.DictReader(file)]
    assert sizes == [("inputs", 32, 64), ("inputs", 128, 64)]
    assert layer_cost.exponents([1, 10, 100], [2, 200, 20000]) == pytest.approx((2, 2))
    assert layer_cost.exponents([1, 2, 4], [1, 1, 2])[1] == pytest.approx(1)
    assert "exponent of" in capsys.readouterr().out


def test_the_coreset_command_prints_exponents_and_plots(tmp_path, capsys):
    run.main(["coreset", "--out", str(tmp_path), "--neurons", "400", "--sizes", "16", "64", "--seeds", "8"])
    with (tmp_path / "coreset.csv").open() as file:
        errors = {(row["method"], int(row["size"])): float(row["error"]) for row in csv.DictReader(file)}
    assert len(errors) == 10
    assert errors["largest sensitivities, refit", 64] < errors["largest sensitivities", 64]
    assert errors["importance, fixed size", 64] < errors["uniform, fixed size", 64]
    assert (tmp_path / "coreset.png").stat().st_size > 0
    assert "exponent of the error" in capsys.readouterr().out


@pytest.mark.slow
def test_the_units_command_compares_with_torch_pruning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lenet, "network", lambda data, cache, epochs: MLP([784, 40, 20, 10]).eval())
    methods = [
        "ours",
        "coreset, no data",
        "group magnitude, uniform",
        "Taylor, global",
        "Hessian, global",
        "random, uniform",
    ]
    options = ["--networks", "lenet300", "--budgets", "0.5", "--samples", "512", "--finetune", "0"]
    run.main(["units", "--out", str(tmp_path), *options, "--methods", *methods])
    with (tmp_path / "units.csv").open() as file:
        dense, *rows = csv.DictReader(file)
    assert dense["method"] == "dense"
    assert [row["method"] for row in rows] == methods
    assert all(0.3 < float(row["macs"]) <= 0.5 for row in rows)
    assert "group magnitude, uniform" in capsys.readouterr().out


@pytest.mark.slow
def test_the_compaction_command_runs_a_network_of_torchvision(tmp_path, capsys):
    run.main(["compaction", "--out", str(tmp_path), "--networks", "squeezenet1_1", "--onnx"])
    with (tmp_path / "compaction.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert not row["failure"]
    assert row["reloaded"] == "True"
    assert float(row["macs"]) < 0.4
    for column in ("error", "exported", "onnx"):
        assert float(row[column]) <= 1e-5
    assert "1 of 1 networks" in capsys.readouterr().out


def test_half_of_the_operations_are_left_for_the_latency():
    model = ResNet().eval()
    report = latency.without_units(model, torch.randn(2, 28, 28), 0.5).report
    assert 0.35 < report.after.macs / report.before.macs <= 0.5
    assert all(count % latency.ROUND_TO == 0 for count, _ in report.units.values())
    assert len(latency.median_times((model, model), torch.randn(2, 28, 28), 0.0)) == 2
