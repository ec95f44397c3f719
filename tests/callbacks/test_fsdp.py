"""Networks that FSDP2 divides among processes: pruned as on a single device, with checkpoints that hold the zeros."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsdp_worker
import pytest
import torch

WORKER = Path(fsdp_worker.__file__)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
PARTS = ("fsdp", "file", "world")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 fails on the CPU ('Stream' has no 'record_event')"
    ),
]


def run(folder: Path, part: str) -> subprocess.CompletedProcess[str]:
    """A part of the worker, which starts the second process itself, when it has ended."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(WORKER), str(folder), part]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function that returns the results of a part in each process; a part runs once."""
    root, found = tmp_path_factory.mktemp("fsdp"), {}

    def of(part: str) -> list[dict]:
        if part not in found:
            finished = run(root / part, part)
            assert finished.returncode == 0, finished.stderr
            ranks = range(1 if part == "single" else 2)
            found[part] = [torch.load(root / part / f"{rank}.pt", weights_only=False) for rank in ranks]
        return found[part]

    return of


def assert_equal(state, reference):
    for name, value in reference.items():
        if not name.endswith("num_batches_tracked"):  # of twice as many batches in one process
            assert torch.allclose(state[name], value, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("part", PARTS)
def test_a_fit_prunes_to_the_network_of_a_single_device(results, part):
    (single,) = results("single")
    for result in results(part):
        assert_equal(result["uniform"], single["uniform"])
        for name, mask in single["masks"].items():
            assert torch.equal(result["masks"][name], mask), name
            assert not result["uniform"][name][~mask].any()
        for side in ("dense", "pruned"):
            assert result["metrics"][side] == pytest.approx(single["metrics"][side], rel=1e-5)


@pytest.mark.parametrize("part", ["fsdp", "file"])
def test_global_allocation_and_recovery_give_the_network_of_ddp(results, part):
    ddp = results("ddp")[0]
    for result in results(part):
        assert_equal(result["recovered"], ddp["recovered"])
        assert result["recovery"] == ddp["recovery"] > 0


@pytest.mark.parametrize("part", PARTS)
def test_the_checkpoint_of_a_divided_network_holds_its_zeros(results, part):
    for result in results(part):
        assert result["is_folder"] == (part != "file")
        assert all(torch.equal(result["loaded"][name], value) for name, value in result["uniform"].items())
        assert result["read"]["val_loss"] == pytest.approx(result["metrics"]["pruned"]["val_loss"], rel=1e-6)
        assert not result["pruned_again"]


def test_a_divided_network_is_fine_tuned_and_resumed(tmp_path):
    finished = run(tmp_path, "finetune")
    assert finished.returncode == 0, finished.stderr
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    reference = found[0][0]
    assert reference["metrics"]["finetuned"]["val_loss"] < reference["metrics"]["pruned"]["val_loss"]
    for result in (each for both in found for each in both):
        for name, mask in reference["masks"].items():
            assert torch.equal(result["masks"][name], mask), name
            assert torch.equal(result["state"][name] != 0, mask), name
        assert all(torch.equal(result["state"][name], value) for name, value in reference["state"].items())
        assert result["metrics"] == reference["metrics"]
        assert (result["steps"], result["limit"]) == (reference["steps"], 1)
        assert Path(result["file"]).is_dir()


def test_tensor_parallelism_is_refused_by_name_before_training(tmp_path):
    finished = run(tmp_path, "tensor")
    assert finished.returncode != 0
    message = "network.head.bias: expected parameters that only FSDP2 (fully_shard) divides, got tensor parallelism"
    assert message in finished.stderr
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_processes_with_different_numbers_of_batches_prune_to_the_network_of_one_process(tmp_path):
    finished = run(tmp_path, "uneven")
    assert finished.returncode == 0, finished.stderr
    reference = fsdp_worker.Network()
    batches = [batch for rank in range(2) for batch in fsdp_worker.uneven_batches(rank)]
    fsdp_worker.trim(reference, batches, sparsity=0.5, allocate="uniform", num_samples=fsdp_worker.SAMPLES)
    for rank in range(2):
        state, solved_while_divided = torch.load(tmp_path / f"{rank}.pt")
        assert_equal(state, reference.state_dict())
        assert solved_while_divided == 11


def test_an_error_in_one_process_ends_both(tmp_path):
    finished = run(tmp_path, "loader")
    assert finished.returncode == 0, finished.stderr
    ((first, unchanged),), ((second, other_unchanged),) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == "RuntimeError: process 1 of 2 failed, so this one stops as well: OSError: the disk is gone"
    assert second == "OSError: the disk is gone"
    assert unchanged
    assert other_unchanged


def test_an_error_in_a_forward_pass_is_raised_before_the_process_waits_for_others(tmp_path):
    run(tmp_path, "forward")
    ((message, _),) = torch.load(tmp_path / "1.pt")
    assert "a value is out of range" in message


def test_options_that_a_divided_network_does_not_allow_are_refused(tmp_path):
    finished = run(tmp_path, "refused")
    assert finished.returncode == 0, finished.stderr
    expected = (
        "distributed: expected True for a model whose parameters are divided among processes, got False",
        "recover: expected scope='network' for parameters that are divided among processes, got 'block'",
    )
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [(f"ValueError: {message}", True) for message in expected]
