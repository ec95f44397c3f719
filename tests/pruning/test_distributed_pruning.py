"""Samples distributed over processes: the network is that of one process, and an error in one ends all."""

from __future__ import annotations

import re
from pathlib import Path

import distributed_worker
import pytest
import torch
from processes import Finished, run_processes

from lightning_nettrim import trim


def run_two_processes(folder: Path, part: str) -> list[Finished]:
    """Two processes of a part, when both have ended."""
    return run_processes(distributed_worker.main, [(folder, rank, 2, part) for rank in range(2)], folder)


def results_of(folder: Path, part: str) -> list[dict]:
    """The results of a part in both processes."""
    for process in run_two_processes(folder, part):
        assert process.returncode == 0, process.printed
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The pruned networks in both processes."""
    return results_of(tmp_path_factory.mktemp("cases"), "cases")


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The errors in both processes."""
    return results_of(tmp_path_factory.mktemp("errors"), "errors")


@pytest.mark.slow
@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes_prune_to_the_network_of_one(networks, case):
    torch.set_num_threads(1)
    (first, numbers), (second, others) = (of_process[case] for of_process in networks)
    model, expected = distributed_worker.prune_case(case)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
    assert numbers == others
    assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", distributed_worker.RECOVERED)
def test_two_processes_recover_to_one_network(networks, case):
    (first, numbers), (second, others) = (of_process[case] for of_process in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert numbers == others
    assert numbers["end_to_end_error"] < numbers["before recovery"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("nan", "RuntimeError: process 1 of 2 failed, .*: ValueError: 0: expected finite", "ValueError: 0: expected"),
        ("no batches", "RuntimeError: process 1 of 2 failed, .*: ValueError: expected batches", "ValueError: expected"),
        ("forward", "RuntimeError: process 1 of 2 failed, .*: RuntimeError: broken", "RuntimeError: broken"),
        (
            "out of memory",
            "DistributedOutOfMemory: process 1 of 2 failed, .*: MemoryError: full",
            "DistributedOutOfMemory: process 1 of 2 failed",
        ),
        ("wrapped", "ValueError: distributed: .* pass model.module", "ValueError: distributed: expected"),
        ("different paths", "ValueError: first: .* 'ReLU' in process 0 and 'linear'", "ValueError: first: expected"),
        (
            "different weights",
            "RuntimeError: 2.weight: expected the same",
            "RuntimeError: 2.weight: expected the same",
        ),
    ],
)
def test_an_error_in_one_process_ends_all(errors, name, first, second):
    assert re.match(first, errors[0][name]), errors[0][name]
    assert re.match(second, errors[1][name]), errors[1][name]


@pytest.mark.slow
def test_if_memory_runs_out_in_one_process_all_use_smaller_batches(errors):
    (notes, first), (others, second) = (of_process["out of memory once"] for of_process in errors)
    assert notes == others
    assert notes[0].endswith("half the inputs at a time")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert int((first["first.weight"] == 0).sum() + (first["second.weight"] == 0).sum()) == (24 * 8 + 8 * 4) // 2


@pytest.mark.slow
def test_a_process_that_exits_ends_the_others(tmp_path):
    survivor, exited = run_two_processes(tmp_path, "exit")
    assert exited.returncode == 7
    assert survivor.returncode == 1
    assert "RuntimeError: expected 2 processes to continue together" in survivor.printed
    assert "another process has ended" in survivor.printed
    assert "while solving 2: all of 0, 2, 4 have their trained weights again" in survivor.printed


def test_a_process_group_is_required():
    data = distributed_worker.batches("mlp", 0, 1)
    with pytest.raises(RuntimeError, match="expected a process group, got none: call torch.distributed.init"):
        trim(distributed_worker.network("mlp"), data, sparsity=0.5, distributed=True)
