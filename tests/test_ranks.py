"""Samples spread over processes: the same network as from one process, and an error in one ends all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranked
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from ranked_ddp import Net
from safetensors.torch import load_file

from lightning_nettrim import NetTrim, trim

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


def raise_together(folder: Path, part: str) -> list[subprocess.CompletedProcess[str]]:
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
    for process in raise_together(folder, "cases"):
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


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("nan", "RuntimeError: process 1 of 2 has failed.*ValueError: 0: expected finite", "ValueError: 0: expected"),
        ("empty", "RuntimeError: process 1 of 2 has failed, .*: ValueError: expected batches", "ValueError: expected"),
        ("forward", "RuntimeError: process 1 of 2 has failed, .*: RuntimeError: broken", "RuntimeError: broken"),
        ("full", "Exhausted: process 1 of 2 has failed, .*: MemoryError: full", "Exhausted: process 1 of 2 has failed"),
        ("wrapped", "ValueError: distributed: .* pass model.module", "ValueError: distributed: expected"),
        ("differ", "ValueError: first: .* 'ReLU' in process 0 and 'linear'", "ValueError: first: expected"),
        ("weights", "RuntimeError: 2.weight: expected the same", "RuntimeError: 2.weight: expected the same"),
    ],
)
def test_an_error_in_one_process_is_one_in_all(found, name, first, second):
    assert re.match(first, found[0][name]), found[0][name]
    assert re.match(second, found[1][name]), found[1][name]


def test_too_little_memory_for_a_recording_in_one_process_is_less_in_all(found):
    (notes, first), (others, second) = (of["short"] for of in found)
    assert notes == others
    assert notes[0].endswith("half the inputs at a time")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert int((first["first.weight"] == 0).sum() + (first["second.weight"] == 0).sum()) == (24 * 8 + 8 * 4) // 2


def test_a_process_that_dies_ends_the_others(tmp_path):
    survivor, dead = raise_together(tmp_path, "die")
    assert dead.returncode == 7
    assert survivor.returncode == 1
    assert "RuntimeError: expected 2 processes to continue together" in survivor.stdout
    assert "another process has ended" in survivor.stdout
    assert "while solving 2: all of 0, 2, 4 have their trained weights again" in survivor.stdout


def fit(folder: Path, devices: int, part: str) -> subprocess.CompletedProcess[str]:
    """A fit under Lightning, which starts the second process itself, until it has ended."""
    folder.mkdir()
    command = [sys.executable, str(HERE / "ranked_ddp.py"), str(folder), str(devices), part]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)


def test_a_fit_under_ddp_prunes_as_one_on_a_single_device_does(tmp_path):
    for devices in (1, 2):
        done = fit(tmp_path / str(devices), devices, "prune")
        assert done.returncode == 0, done.stderr
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
    Net().load_state_dict(saved)
    assert len(list(tmp_path.glob("2/**/report.json"))) == 1
    plans = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("*/planned/**/plan.yaml")]
    assert len(plans) == 2
    assert plans[0] == plans[1]


def test_a_process_that_dies_ends_a_fit_and_leaves_no_half_written_file(tmp_path):
    done = fit(tmp_path / "2", 2, "die")
    assert done.returncode != 0
    assert "RuntimeError: expected 2 processes to continue together" in done.stderr
    for file in (file for file in tmp_path.glob("2/**/nettrim/**/*") if file.is_file()):
        if file.name not in ("dense.ckpt", "running"):
            assert file.parent.name == "layers"
            load_file(file)
    assert not list(tmp_path.glob("2/*.pt"))


def test_distributed_needs_a_group():
    with pytest.raises(RuntimeError, match="expected a process group, got none: call torch.distributed.init"):
        trim(ranked.network("mlp"), ranked.batches("mlp", 0, 1), sparsity=0.5, distributed=True)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_split_the_network_are_refused_by_name(strategy):
    trainer = SimpleNamespace(strategy=strategy(), callbacks=[])
    match = f"expected a single device or DDP.*, got {strategy.__name__}: .*validate.*allow_untested_strategy"
    with pytest.raises(MisconfigurationException, match=match):
        NetTrim(sparsity=0.5).setup(trainer, Net(), "fit")
    NetTrim(sparsity=0.5, allow_untested_strategy=True).setup(trainer, Net(), "fit")


def test_ddp_and_a_single_device_are_not_refused():
    for strategy in (DDPStrategy(), SingleDeviceStrategy()):
        NetTrim(sparsity=0.5).setup(SimpleNamespace(strategy=strategy, callbacks=[]), Net(), "fit")
