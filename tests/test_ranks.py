"""Samples spread over processes: the same network as from one process, and an error in one ends all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import ranked
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_nettrim import Cardinality, NetTrim, path, refit, trim
from lightning_nettrim.ranks import ALONE, Ranks

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


def together(folder: Path, part: str) -> list[subprocess.CompletedProcess[str]]:
    """Two processes of a part, until both have ended."""
    command = [sys.executable, str(HERE / "ranked.py"), str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", part], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes have found."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in together(folder, "cases"):
        assert process.returncode == 0, process.stdout
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ranked.CASES)
def test_two_processes_prune_as_one_does(found, case):
    torch.set_num_threads(1)
    (first, totals), (second, others) = (of_rank[case] for of_rank in found)
    model, expected = ranked.trimmed(case)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
    assert totals == others
    assert totals == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_two_processes_solve_one_problem(found):
    problem = ranked.linear_problem()
    expected = {
        "path": torch.stack([solution.W for solution in path(problem, [4.0, 2.0])]),
        "refit": refit(problem, problem.W * (problem.W.abs() > 0.5)),
        "cardinality": Cardinality().solve(problem).W,
    }
    for name, W in expected.items():
        first, second = (torch.stack(of[name]) if name == "path" else of[name] for of in found)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("nan", "ValueError: 0: expected finite", "ValueError: 0: expected finite"),
        ("empty", "RuntimeError: process 1 of 2 has failed, .*: ValueError: expected batches", "ValueError: expected"),
        ("weights", "RuntimeError: 2.weight: expected the same", "RuntimeError: 2.weight: expected the same"),
    ],
)
def test_an_error_in_one_process_is_one_in_all(found, name, first, second):
    assert re.match(first, found[0][name]), found[0][name]
    assert re.match(second, found[1][name]), found[1][name]


def test_a_process_that_dies_ends_the_others(tmp_path):
    survivor, dead = together(tmp_path, "die")
    assert dead.returncode == 7
    assert survivor.returncode == 1
    assert "RuntimeError: expected 2 processes to go on together" in survivor.stdout
    assert "another process has ended" in survivor.stdout
    assert "while solving 2: all of 0, 2, 4 have their trained weights again" in survivor.stdout
