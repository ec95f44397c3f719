"""The benchmark on tiny instances: the judge, each peer, the cost of a step, and the whole command."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import convex, lenet, run
from benchmarks.objective import cast, score
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
from benchmarks.race import Reference, bisect, first, passed, reference
from benchmarks.steps import step_cost
from tests.problems import layer, optimum

FAKE = """
import numpy as np


def net_trim_solver(X, Y, V, epsilon, rho, max_iteration=10000):
    print("chatter")
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
def clone(tmp_path):
    path = tmp_path / "clone" / authors.FILE
    path.parent.mkdir(parents=True)
    path.write_text(FAKE, encoding="utf-8")
    return tmp_path / "clone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_score_is_the_problems_own(dtype):
    problem = layer(bias=True, dtype=dtype)
    W = torch.where(problem.W.abs() > 0.1, 0.9 * problem.W, 0)
    exact, judged = cast(problem, dtype=torch.float64), score(problem, W, 2.0, optimum=10.0)
    W = W.double()
    assert judged.objective == pytest.approx(float(exact.objective(W)))
    assert judged.gap == pytest.approx(judged.objective / 10 - 1)
    assert judged.violation == pytest.approx(float(exact.violation(W)))
    assert judged.relative_error == pytest.approx(float(exact.local_error(W)))
    assert judged.sparsity == float((W[:-1] == 0).double().mean())
    assert judged.seconds == 2
    assert judged.error == max(abs(judged.gap), judged.violation)


def test_the_score_refuses_another_shape():
    problem = layer()
    with pytest.raises(ValueError, match="W: expected shape"):
        score(problem, problem.W.T, 0.0)


@pytest.mark.parametrize("variant", [{}, {"relu": False}], ids=["relu", "linear"])
def test_the_reference_and_every_peer_agree(variant):
    problem = layer(60, 12, 5, **variant)
    known = reference(problem)
    assert known.optimum == pytest.approx(optimum(problem), rel=2e-5)
    for peer in (ours, cvxpy_clarabel, cvxpy_scs):
        race = first(known.judge(problem, peer.solve(problem)))
        assert passed(race[-1]), peer.NAME
        assert race[-1][0].seconds > 0
        assert race[-1][0].steps > 0


def test_a_cone_solver_that_is_late_has_timed_out():
    for peer in (cvxpy_clarabel, cvxpy_scs):
        with pytest.raises(TimedOut, match="no answer in 1e-06 minutes"):
            next(peer.solve(layer(60, 12, 5), minutes=1e-6))


def test_the_trace_costs_the_solver_nothing():
    problem = layer()
    trials = list(ours.solve(problem))
    solution, _ = ours.timed(problem, ours.ADMM())
    assert torch.equal(trials[-1].W, solution.W)
    assert trials[-1].steps == int(solution.steps)
    assert [t.seconds for t in trials] == sorted(t.seconds for t in trials)


def test_what_is_absent_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for trials in (authors.solve(layer(), tmp_path, 10, (1,)), ours.solve(layer(), "cuda")):
        with pytest.raises(Unavailable, match="clone github.com/DNNToolBox/Net-Trim|no CUDA device"):
            next(trials)
    with pytest.raises(Unavailable, match="no CUDA device"):
        step_cost(8, 4, 2, "cuda")


def test_the_authors_get_samples_in_columns(clone, capsys):
    problem = layer(dtype=torch.float32)
    few, many = authors.solve(problem, clone, 10, (2, 10**9))
    assert capsys.readouterr().out == ""
    assert few.W.shape == many.W.shape == problem.W.shape
    assert (few.steps, many.steps) == (2, 10**9)
    torch.testing.assert_close(few.W, many.W / 2)


def test_bisection_finds_the_first_count_that_passes():
    problem = layer()
    W = ours.timed(problem, ours.ADMM(rtol=1e-5, atol=1e-5))[0].W
    known = Reference(float(problem.objective(W)), 0.0, 0.0)

    def again(count):
        return next(known.judge(problem, [Trial(W if count >= 260 else 0 * W, 1.0, count)]))

    race = first(map(again, (100, 200, 400, 800)))
    assert [trial.steps for trial, _ in race] == [100, 200, 400]
    assert [trial.steps for trial, _ in bisect(race, again)] == [100, 200, 250, 300, 400]
    assert bisect(race[:2], again) == race[:2]
    assert len(first(map(again, (100, 200, 400, 800)), seconds=1.5)) == 2


def test_a_step_costs_something():
    cost = step_cost(64, 16, 8)
    assert min(cost.step, cost.products, cost.gflops) > 0
    assert cost.ratio == cost.step / cost.products
    assert step_cost(64, 16, 8, tf32=True).step > 0


def test_the_command_writes_a_table_and_a_picture(clone, tmp_path, monkeypatch, capsys):
    def tiny(number, gain, samples, root, cache, neurons=None):
        problem = layer(60, 12, 5, dtype=torch.float32, seed=number)
        return replace(problem, epsilon=gain * problem.Y.norm())

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


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["convex", "--sections", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


# --- pruning without retraining


PEERS = {
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
        print("chatter")
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
        self.asked = self.layer.asked = (sparsity, prunen, prunem)
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
    for name, source in PEERS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path


def test_the_authors_code_runs_on_the_device_at_hand_and_says_nothing(peers, capsys):
    layer, X, synchronize = torch.nn.Linear(8, 6), torch.randn(20, 8), torch.cuda.synchronize
    installed = sys.modules.get("transformers")
    alps.method(peers)(layer, X, 0.75, None)
    assert int((layer.weight != 0).sum()) == 12
    sparsegpt.method(peers)(layer, X, 0.5, (2, 4))
    assert layer.asked == (0.5, 2, 4)
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
def test_a_clone_that_is_not_there_is_named(peer, tmp_path):
    for clone in (None, tmp_path):
        with pytest.raises(Unavailable, match="clone github.com/"):
            peer.method(clone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_the_one_shot_command_prints_a_table_and_writes_its_files(tmp_path, peers, capsys, data):
    settings = [
        "--out",
        str(tmp_path / "out"),
        "--alps",
        str(peers),
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--samples",
        "500",
    ]
    run.main(["oneshot", *settings, "--budgets", "0.9", "2:4"])
    printed = capsys.readouterr().out
    assert "SparseGPT (authors) skipped" in printed
    with (tmp_path / "out/oneshot.csv").open() as file:
        rows = {(row["budget"], row["method"]): row for row in csv.DictReader(file)}
    for method in ("ours", "ours, allocated", "magnitude + refit", "ALPS (authors)"):
        assert method in printed
        assert float(rows["0.9", method]["zeros"]) == pytest.approx(0.9, abs=2e-3)
    assert float(rows["0", "dense"]["accuracy"]) > 90
    assert float(rows["2:4", "ours"]["zeros"]) == pytest.approx(0.498, abs=1e-3)
    assert float(rows["0.9", "ours"]["error1"]) < float(rows["0.9", "magnitude + refit"]["error1"])
    assert (tmp_path / "out/oneshot.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_is_measured_in_processes_of_their_own(tmp_path, capsys):
    sizes = ["--samples", "200", "--inputs", "20", "--outputs", "8"]
    run.main(["ranks", "--out", str(tmp_path), *sizes])
    images = ["--images", "8", "--batch", "4", "--size", "32", "--samples", "256"]
    run.main(["memory", "--out", str(tmp_path), "--network", "squeezenet1_1", "--limits", "1", *images])
    with (tmp_path / "ranks.csv").open() as file:
        rows = [(r["solver"], r["share"], int(r["processes"]), int(r["rows"])) for r in csv.DictReader(file)]
    counts = [("in all", 1, 200), ("each", 1, 200), ("in all", 2, 200), ("each", 2, 400)]
    assert rows == [(solver, *count) for count in counts for solver in ("ADMM", "Cardinality")]
    with (tmp_path / "memory.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["peak"]) == pytest.approx(float(row["ratio"]) * float(row["limit"]))
    assert "most at" in capsys.readouterr().out
