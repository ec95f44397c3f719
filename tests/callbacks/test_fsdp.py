"""Networks that FSDP2 divides among processes: pruned as on a single device, with checkpoints that hold the zeros."""

from __future__ import annotations

from pathlib import Path

import fsdp_worker
import pytest
import torch
from processes import Finished, run_processes, run_ranks

from lightning_nettrim import Cardinality

PARTS = ("fsdp", "file", "world")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 fails on the CPU ('Stream' has no 'record_event')"
    ),
]


def fit(folder: Path, part: str) -> list[Finished]:
    """The processes of a Trainer, when they have ended."""
    folder.mkdir(exist_ok=True)
    return run_ranks(fsdp_worker.fit, (folder, part), 1 if part == "single" else 2, folder)


def trim(folder: Path, part: str) -> list[Finished]:
    """Two processes of ``trim``, when they have ended."""
    return run_processes(fsdp_worker.trim_in, [(rank, folder, part) for rank in range(2)], folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function that returns the results of a part in each process; a part runs once."""
    root, found = tmp_path_factory.mktemp("fsdp"), {}

    def of(part: str) -> list[dict]:
        if part not in found:
            processes = fit(root / part, part)
            for finished in processes:
                assert finished.returncode == 0, finished.printed
            files = [root / part / f"{rank}.pt" for rank in range(len(processes))]
            found[part] = [torch.load(file, weights_only=False) for file in files]
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
    for finished in run_ranks(fsdp_worker.fine_tune, (tmp_path,), 2, tmp_path):
        assert finished.returncode == 0, finished.printed
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
    message = "network.head.bias: expected parameters that only FSDP2 (fully_shard) divides, got tensor parallelism"
    for finished in fit(tmp_path, "tensor"):
        assert finished.returncode != 0
        assert message in finished.printed
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_processes_with_different_numbers_of_batches_prune_to_the_network_of_one_process(tmp_path):
    for finished in trim(tmp_path, "uneven"):
        assert finished.returncode == 0, finished.printed
    reference = fsdp_worker.Network()
    batches = [batch for rank in range(2) for batch in fsdp_worker.uneven_batches(rank)]
    fsdp_worker.trim(
        reference, batches, sparsity=0.5, allocate="uniform", solver=Cardinality(max_steps=fsdp_worker.STEPS),
        num_samples=fsdp_worker.SAMPLES,
    )  # fmt: skip
    for rank in range(2):
        state, solved_while_divided = torch.load(tmp_path / f"{rank}.pt")
        assert_equal(state, reference.state_dict())
        assert solved_while_divided == 11


def test_an_error_in_one_process_ends_both(tmp_path):
    for finished in trim(tmp_path, "loader"):
        assert finished.returncode == 0, finished.printed
    ((first, unchanged),), ((second, other_unchanged),) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == "RuntimeError: process 1 of 2 failed, so this one stops as well: OSError: the disk is gone"
    assert second == "OSError: the disk is gone"
    assert unchanged
    assert other_unchanged


def test_an_error_in_a_forward_pass_is_raised_before_the_process_waits_for_others(tmp_path):
    trim(tmp_path, "forward")
    ((message, _),) = torch.load(tmp_path / "1.pt")
    assert "a value is out of range" in message


def test_options_that_a_divided_network_does_not_allow_are_refused(tmp_path):
    for finished in trim(tmp_path, "refused"):
        assert finished.returncode == 0, finished.printed
    expected = (
        "distributed: expected True for a model whose parameters are divided among processes, got False",
        "recover: expected scope='network' for parameters that are divided among processes, got 'block'",
    )
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [(f"ValueError: {message}", True) for message in expected]
