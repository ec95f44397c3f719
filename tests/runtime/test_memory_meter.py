"""Peak memory usage, and retries after running out of memory."""

from __future__ import annotations

import pytest
import torch
from processes import run_processes

from lightning_nettrim.runtime.distributed import DistributedOutOfMemory, ProcessGroup
from lightning_nettrim.runtime.memory import MemoryMeter, available_memory, retry_with_less

MIB = 2**20


def measure():
    """Print the peaks before, with and after a block of 64 MiB, and the largest one."""
    meter = MemoryMeter(torch.device("cpu"))
    before = meter.read_peak()
    block = torch.ones(64 * MIB // 4)
    del block
    print(before, meter.read_peak(), meter.read_peak(), meter.peak)


@pytest.mark.slow
def test_the_peak_includes_memory_that_was_freed_again(tmp_path):
    """In a process of its own, where no other memory is freed at the same time."""
    (done,) = run_processes(measure, [()], tmp_path)
    before, used, after, peak = (int(word) / MIB for word in done.printed.split())
    assert before < 8
    assert 60 < used < 80
    assert after < 16
    assert peak == used
    assert available_memory(torch.device("cpu")) > 100 * MIB


def test_the_peak_of_a_meter_is_the_largest_reading():
    meter = MemoryMeter(torch.device("cpu"))
    assert meter.peak == 0
    readings = [meter.read_peak() for _ in range(3)]
    assert meter.peak == max(readings)


class Attempt:
    """Fails for states above a limit."""

    def __init__(self, limit, error):
        self.limit, self.error, self.states = limit, error, []

    def __call__(self, state):
        self.states.append(state)
        if state > self.limit:
            raise self.error
        return -state


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_state_is_reduced_until_the_memory_suffices(error):
    attempt = Attempt(3, error)
    assert retry_with_less(attempt, 16, lambda state: state // 2) == (-2, 2)
    assert attempt.states == [16, 8, 4, 2]


def test_a_call_is_repeated_at_most_three_times():
    attempt = Attempt(0, MemoryError("full"))
    with pytest.raises(MemoryError, match="full"):
        retry_with_less(attempt, 16, lambda state: state // 2)
    assert attempt.states == [16, 8, 4, 2]


def test_other_errors_are_not_retried():
    attempt = Attempt(0, RuntimeError("shapes do not agree"))
    with pytest.raises(RuntimeError, match="shapes"):
        retry_with_less(attempt, 16, lambda state: state // 2)
    assert attempt.states == [16]


@pytest.mark.parametrize(("error", "states"), [(DistributedOutOfMemory("full"), [4, 2]), (MemoryError("full"), [4])])
def test_of_several_processes_only_a_failure_that_all_know_is_retried(error, states):
    attempt, group = Attempt(2, error), ProcessGroup(count=2)
    if len(states) > 1:
        assert retry_with_less(attempt, 4, lambda state: state // 2, group) == (-2, 2)
    else:
        with pytest.raises(MemoryError):
            retry_with_less(attempt, 4, lambda state: state // 2, group)
    assert attempt.states == states
