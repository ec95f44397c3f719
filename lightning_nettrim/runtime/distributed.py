"""Process groups: processes that each have some of the rows of a problem, and the communication between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from lightning_nettrim.runtime.fingerprint import fingerprint

T = TypeVar("T")


class DistributedOutOfMemory(MemoryError):
    """At least one process ran out of memory; raised in all processes of the group."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's CPU allocator


@dataclass(frozen=True)
class ProcessGroup:
    """A group of a single process, in which no communication is needed; `TorchProcessGroup` has several processes.

    All quantities that depend on samples are reduced with `sum`, `norm` or `gather_rows`, so that they are bitwise
    identical in all processes, which therefore take the same decisions. All processes must call the same methods in
    the same order.

    Attributes:
        count: number of processes.
        rank: index of this process, from 0.
    """

    count: int = 1
    rank: int = 0

    def sum(self, part: Tensor) -> Tensor:
        """Sum of ``part`` over all processes; it has the same shape in all of them."""
        return part

    def norm(self, part: Tensor) -> Tensor:
        """Norms over the rows of all processes, from ``part``, the norms over the rows of this process."""
        return part

    def gather_rows(self, part: Tensor) -> Tensor:
        """``(*batch, P, C)``: the rows of all processes, in order of rank; their numbers of rows may differ."""
        return part

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(flag))

    def all(self, flag: bool) -> bool:
        """Whether the flag is set in every process."""
        return not self.any(not flag)

    def mean(self, value: float) -> float:
        """Mean of a value over all processes."""
        return sum(self.gather(value)) / self.count

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A `with` after which an error in one process is raised in all of them.

        Its body must not communicate with other processes, except in forward passes of a model that is divided among
        them. An error in such a pass is raised immediately, as the others may be waiting in it for this process.

        Raises:
            DistributedOutOfMemory: in all of several processes, if each process that failed ran out of memory.
            RuntimeError: in the processes that did not fail, with the message of the first process that did.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if _in_forward_of_shards(error):
                raise
            failure = error
        if self.any(failure is not None):
            own = None if failure is None else (f"{type(failure).__name__}: {failure}", is_out_of_memory(failure))
            failures = [(rank, *other) for rank, other in enumerate(self.gather(own)) if other is not None]
            rank, message, _ = failures[0]
            text = f"process {rank} of {self.count} failed, so this one stops as well: {message}"
            if self.count > 1 and all(out_of_memory for _, _, out_of_memory in failures):
                raise DistributedOutOfMemory(text) from failure
            raise RuntimeError(text) if failure is None else failure

    def check_agreement(self, seen: Mapping[str, str], advice: str) -> None:
        """Check that all processes have the same entries in the same order.

        Args:
            seen: ``{name: description}`` of what this process has encountered, such as layers and how they are used.
            advice: what to do, for the message.

        Raises:
            ValueError: naming the first entry that differs between two processes.
        """
        for rank, other in enumerate(gathered := self.gather(dict(seen))):
            first = gathered[0]
            if list(other.items()) == list(first.items()):
                continue
            names = [*first, *(name for name in other if name not in first)]
            differing = [name for name in names if first.get(name) != other.get(name)]
            name = differing[0] if differing else next(a for a, b in zip(first, other, strict=True) if a != b)
            found = [entries.get(name, "not used") for entries in (first, other)] if differing else ["earlier", "later"]
            raise ValueError(
                f"{name}: expected the same use in all {self.count} processes, got {found[0]!r} in process 0 and"
                f" {found[1]!r} in process {rank}: {advice}"
            )

    def check_identical(self, values: Mapping[str, Tensor]) -> None:
        """Check that the values are bitwise identical in all processes.

        Args:
            values: ``{name: tensor}``.

        Raises:
            RuntimeError: naming the first tensor that differs.
        """
        if self.count > 1:
            by_process = self.gather([fingerprint(value) for value in values.values()])
            for name, *fingerprints in zip(values, *by_process, strict=True):
                if len(set(fingerprints)) > 1:
                    raise RuntimeError(
                        f"{name}: expected the same values in all {self.count} processes, bit for bit, got different"
                        " ones: use the same trained network, arguments, type of machine and library versions in all"
                    )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of process 0 into the tensors of all processes, in place."""


def mark_in_forward_of_shards(error: BaseException) -> None:
    """Mark an error that has ended a forward pass of a model whose parameters are divided among processes."""
    error.__dict__["in_forward_of_shards"] = True


def _in_forward_of_shards(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is marked."""
    return error is not None and (
        "in_forward_of_shards" in error.__dict__ or _in_forward_of_shards(error.__cause__ or error.__context__)
    )


SINGLE_PROCESS = ProcessGroup()
"""The group of a single process that has all rows."""


@dataclass(frozen=True)
class TorchProcessGroup(ProcessGroup):
    """The processes of PyTorch's default process group.

    Every method raises a RuntimeError if another process has ended.

    Attributes:
        count: number of processes.
        rank: index of this process, from 0.
        device: device of the tensors that this process communicates.
    """

    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, model: nn.Module) -> ProcessGroup:
        """All processes of the default process group.

        Args:
            model: a copy of the network, one in each process; its device is used for communication.

        Raises:
            RuntimeError: if there is no default process group.
            ValueError: for a model that is wrapped in ``DistributedDataParallel``.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "distributed: expected a process group, got none: call torch.distributed.init_process_group first, or"
                " set distributed=False"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("distributed: expected the network itself, got DistributedDataParallel: pass model.module")
        count = distributed.get_world_size()
        return cls(count, distributed.get_rank(), next(model.parameters()).device) if count > 1 else SINGLE_PROCESS

    def sum(self, part: Tensor) -> Tensor:
        """Sum of ``part`` over all processes; it has the same shape in all of them."""
        return self._all_reduce(part, distributed.ReduceOp.SUM)

    def norm(self, part: Tensor) -> Tensor:
        """Norms over the rows of all processes, from ``part``, the norms over the rows of this process."""
        return self.sum(part.double().square()).sqrt().to(part)

    def gather_rows(self, part: Tensor) -> Tensor:
        """``(*batch, P, C)``: the rows of all processes, in order of rank; their numbers of rows may differ."""
        counts = self.gather(part.shape[-2])
        own = nn.functional.pad(part, (0, 0, 0, max(counts) - part.shape[-2])).to(self.device).contiguous()
        padded = [torch.empty_like(own) for _ in counts]
        with _explain_failure(self.count):
            distributed.all_gather(padded, own)
        parts = [rows[..., :count, :] for rows, count in zip(padded, counts, strict=True)]
        return torch.cat(parts, -2).to(part.device)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank."""
        values: list[T | None] = [None] * self.count
        with _explain_failure(self.count):
            distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self._all_reduce(torch.tensor(int(flag)), distributed.ReduceOp.MAX))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of process 0 into the tensors of all processes, in place."""
        for tensor in tensors:
            own = tensor.detach().to(self.device).contiguous()
            with _explain_failure(self.count):
                distributed.broadcast(own, 0)
            tensor.copy_(own)

    def _all_reduce(self, part: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        total = part.to(self.device, copy=True, memory_format=torch.contiguous_format)
        with _explain_failure(self.count):
            distributed.all_reduce(total, operation)
        return total.to(part.device)


@contextmanager
def _explain_failure(count: int) -> Iterator[None]:
    """A `with` in which a failed communication raises an error that names the most likely reason."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"expected {count} processes to continue together, got a failed communication between them: another process"
            " has ended or hangs; see its own output, or the system log if it was killed, and restart all processes"
            f" ({error})"
        ) from error
