"""Solvers whose rows are distributed over two processes find the solution of one process with all rows."""

from __future__ import annotations

import pytest
import torch
from process_group_worker import run_two_processes, solutions


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The solutions of two processes."""
    return run_two_processes(tmp_path_factory.mktemp("solvers"), "solvers")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["path", "refit", "cardinality"])
def test_two_processes_solve_one_problem(found, method):
    first, second = (of[method] for of in found)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, solutions()[method], rtol=1e-5, atol=1e-5)
