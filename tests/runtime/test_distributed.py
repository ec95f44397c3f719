"""Process groups: reductions, gathered rows, and errors that all processes raise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from process_group_worker import ROWS, run_two_processes
from torch import nn

from lightning_nettrim.runtime.distributed import (
    SINGLE_PROCESS,
    DistributedOutOfMemory,
    ProcessGroup,
    TorchProcessGroup,
    is_out_of_memory,
)

ADVICE = "ignore this layer"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the methods of a group return in two processes."""
    return run_two_processes(tmp_path_factory.mktemp("group"), "group")


@pytest.mark.slow
def test_two_processes_reduce_and_gather(found):
    for of in found:
        torch.testing.assert_close(of["sum"], ROWS.sum(0))
        torch.testing.assert_close(of["norm"], ROWS.norm(dim=0))
        assert torch.equal(of["gather_rows"], ROWS)
        assert of["gather"] == [("rank", 0), ("rank", 1)]
        assert of["any"] == [True, False]
        assert of["all"] == [False, True]
        assert of["mean"] == 1.5
        assert [tensor.tolist() for tensor in of["broadcast"]] == [[0, 0], [0, 0, 0]]
        assert of["broadcast"][1].dtype == torch.int64
    for name in ("sum", "norm"):
        assert torch.equal(found[0][name], found[1][name])


OTHER = "process {} of 2 failed, so this one stops as well: "
OUT_OF_MEMORY = f"DistributedOutOfMemory: {OTHER.format(1)}MemoryError: full"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("no error", "", ""),
        ("one error", f"RuntimeError: {OTHER.format(1)}ValueError: broken", "ValueError: broken"),
        ("two errors", "RuntimeError: first", "ValueError: second"),
        ("out of memory", OUT_OF_MEMORY, OUT_OF_MEMORY),
        ("one out of memory", "ValueError: broken", "MemoryError: full"),
        ("identical", "", ""),
    ],
)
def test_an_error_in_one_process_is_raised_in_all(found, name, first, second):
    assert [of[name] for of in found] == [first, second]


@pytest.mark.slow
def test_a_model_that_is_wrapped_or_differs_is_refused_in_all_processes(found):
    for of in found:
        assert "pass model.module" in of["wrapped"]
        assert of["not identical"].startswith("RuntimeError: fc.weight: expected the same values in all 2 processes")


def test_a_single_process_needs_no_communication():
    group, X = SINGLE_PROCESS, torch.randn(5, 2)
    assert (group.count, group.rank) == (1, 0)
    assert group.sum(X) is group.norm(X) is group.gather_rows(X) is X
    assert (group.gather(3), group.any(False), group.all(True), group.mean(2.0)) == ([3], False, True, 2.0)
    group.check_identical({"a": X})
    group.check_agreement({"a": "ReLU"}, ADVICE)
    group.broadcast([X])
    with pytest.raises(MemoryError, match="^full$"), group.raise_together():
        raise MemoryError("full")


@dataclass(frozen=True)
class WithOther(ProcessGroup):
    """This process and a second one, in which every gathered value is the given one."""

    count: int = 2
    other: object = None

    def gather(self, value):
        return [value, value if self.other is None else self.other]


def test_processes_with_different_values_are_refused():
    weight = torch.ones(2, 3)
    WithOther().check_identical({"fc.weight": weight})
    with pytest.raises(RuntimeError, match="fc.weight: expected the same values in all 2 processes"):
        WithOther(other=["0"]).check_identical({"fc.weight": weight})


def test_processes_that_use_a_layer_differently_are_refused():
    seen = {"0": "ReLU", "2": "linear"}
    WithOther().check_agreement(seen, ADVICE)
    with pytest.raises(
        ValueError, match="2: expected the same use .*, got 'linear' .* 0 and 'not used' .* 1: ignore this layer"
    ):
        WithOther(other={"0": "ReLU"}).check_agreement(seen, ADVICE)
    with pytest.raises(ValueError, match="0: expected the same use .*, got 'earlier' .* and 'later'"):
        WithOther(other={"2": "linear", "0": "ReLU"}).check_agreement(seen, ADVICE)


def test_a_default_process_group_is_required():
    with pytest.raises(RuntimeError, match="expected a process group, got none: call torch.distributed.init"):
        TorchProcessGroup.of(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (DistributedOutOfMemory(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not agree"), False),
        (ValueError(math.inf), False),
    ],
    ids=repr,
)
def test_errors_that_report_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) == expected
