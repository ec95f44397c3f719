"""Several processes under Lightning: DDP prunes to the network of a single device; other strategies are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ddp_worker
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from processes import run_ranks
from safetensors.torch import load_file

from lightning_nettrim import NetTrim

WORKER = Path(ddp_worker.__file__)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}


@pytest.mark.slow
def test_a_fit_under_ddp_prunes_to_the_network_of_a_single_device(tmp_path):
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        for finished in run_ranks(ddp_worker.main, (folder, devices, "prune"), devices, folder):
            assert finished.returncode == 0, finished.printed
    (one, metrics), (first, averages), (second, others) = (
        torch.load(tmp_path / devices / f"{rank}.pt") for devices, rank in (("1", 0), ("2", 0), ("2", 1))
    )
    for name, value in one.items():
        if name.endswith("num_batches_tracked"):  # of twice as many batches in one process
            continue
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
    assert averages == others
    for side in ("dense", "pruned"):
        assert averages[side] == pytest.approx(metrics[side], rel=1e-5)
    assert averages["dense"] != averages["pruned"]
    (written,) = tmp_path.glob("2/**/pruned.ckpt")
    saved = torch.load(written)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in first.items())
    ddp_worker.Net().load_state_dict(saved)
    assert len(list(tmp_path.glob("2/**/report.json"))) == 1
    plans = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("*/planned/**/plan.yaml")]
    assert len(plans) == 2
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_the_pruned_network_is_fine_tuned_by_both_processes(tmp_path):
    (tmp_path / "2").mkdir()
    for finished in run_ranks(ddp_worker.main, (tmp_path / "2", 2, "finetune"), 2, tmp_path / "2"):
        assert finished.returncode == 0, finished.printed
    (first, metrics), (second, others) = (torch.load(tmp_path / f"2/{rank}.pt") for rank in range(2))
    (masks, steps), (other_masks, other_steps) = (torch.load(tmp_path / f"2/masks_{rank}.pt") for rank in range(2))
    assert steps == other_steps == 3 * 2  # 2 batches in each process
    for name in ddp_worker.Net().state_dict():
        if "running" not in name:  # each process has its own statistics of a BatchNorm
            assert torch.equal(first[name], second[name]), name
    for name, mask in masks.items():
        assert torch.equal(mask, other_masks[name])
        assert torch.equal(first[name] != 0, mask)
    assert metrics == others
    assert metrics["finetuned"]["val_loss"] < metrics["pruned"]["val_loss"]
    (written,) = tmp_path.glob("2/**/pruned.ckpt")
    assert all(torch.equal(value, first[name]) for name, value in torch.load(written)["state_dict"].items())


@pytest.mark.slow
def test_a_process_that_exits_ends_a_fit_and_leaves_no_incomplete_file(tmp_path):
    """Lightning starts the second process itself."""
    command = [sys.executable, str(WORKER), str(tmp_path), "2", "exit"]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert finished.returncode != 0
    assert "RuntimeError: expected 2 processes to continue together" in finished.stderr
    for file in (file for file in tmp_path.glob("**/nettrim/**/*") if file.is_file()):
        if file.name not in ("dense.ckpt", "running"):
            assert file.parent.name == "layers"
            load_file(file)
    assert not list(tmp_path.glob("*.pt"))


class DeepSpeedStrategy(DDPStrategy):
    """Has the name of Lightning's strategy, which needs a further package."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_split_the_network_in_other_ways_are_refused_by_name(strategy):
    trainer = SimpleNamespace(strategy=strategy(), callbacks=[])
    match = (
        rf"expected a single device, DDP or ModelParallelStrategy \(FSDP2\), got {strategy.__name__}: .*validate.*"
        "allow_untested_strategy"
    )
    with pytest.raises(MisconfigurationException, match=match):
        NetTrim(sparsity=0.5).setup(trainer, ddp_worker.Net(), "fit")
    NetTrim(sparsity=0.5, allow_untested_strategy=True).setup(trainer, ddp_worker.Net(), "fit")


def test_ddp_fsdp2_and_a_single_device_are_not_refused():
    for strategy in (DDPStrategy(), ModelParallelStrategy(), SingleDeviceStrategy()):
        trainer = SimpleNamespace(strategy=strategy, callbacks=[])
        NetTrim(sparsity=0.5).setup(trainer, ddp_worker.Net(), "fit")
