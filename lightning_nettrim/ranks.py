"""Ranks: processes that each hold some rows of one problem, and all that they tell each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from lightning_nettrim.digest import digest

T = TypeVar("T")


class Exhausted(MemoryError):
    """Memory did not suffice in some process, and all of them know."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was not enough memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the allocator of the CPU


@dataclass(frozen=True)
class Ranks:
    """A process that is alone with its rows, for which all sums are its own; `Group` is several.

    Whatever follows from samples goes through `sum`, `norm` or `rows`, so that all processes have the same numbers, to
    the bit, and take the same decisions. All of them call the same methods in the same order.

    Attributes:
        count: number of processes.
        rank: number of this one, from 0.
    """

    count: int = 1
    rank: int = 0

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape."""
        return part

    def norm(self, part: Tensor) -> Tensor:
        """The norms of what is spread over all processes, from the norms of each one's part."""
        return part

    def rows(self, part: Tensor) -> Tensor:
        """``(*batch, P, C)``: the rows of all processes, each with any number of its own."""
        return part

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gather(flag))

    def all(self, flag: bool) -> bool:
        """Whether it is so in every process."""
        return not self.any(not flag)

    def mean(self, value: float) -> float:
        """The mean over all processes."""
        return sum(self.gather(value)) / self.count

    @contextmanager
    def together(self) -> Iterator[None]:
        """A `with` in which nothing is exchanged and after which an error in one process is one in all.

        Raises:
            Exhausted: with the message of a process that was out of memory, in all, if it was nothing else.
            RuntimeError: with the message of a process that has failed, in those that have not.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        if self.any(failed is not None):
            own = None if failed is None else (f"{type(failed).__name__}: {failed}", is_out_of_memory(failed))
            failures = [(rank, *theirs) for rank, theirs in enumerate(self.gather(own)) if theirs is not None]
            rank, message, _ = failures[0]
            text = f"process {rank} of {self.count} has failed, and this one with it: {message}"
            if self.count > 1 and all(short for _, _, short in failures):
                raise Exhausted(text) from failed
            raise RuntimeError(text) if failed is None else failed

    def agree(self, seen: Mapping[str, str]) -> None:
        """Make sure that all processes have seen the same things, in the same order.

        Raises:
            ValueError: naming the first thing about which they differ.
        """
        for rank, theirs in enumerate(views := self.gather(dict(seen))):
            first = views[0]
            if list(theirs.items()) == list(first.items()):
                continue
            names = [*first, *(name for name in theirs if name not in first)]
            differ = [name for name in names if first.get(name) != theirs.get(name)]
            name = differ[0] if differ else next(a for a, b in zip(first, theirs, strict=True) if a != b)
            what = [view.get(name, "not met") for view in (first, theirs)] if differ else ["earlier", "later"]
            raise ValueError(
                f"{name}: expected it to be used alike in all {self.count} processes, got {what[0]!r} in process 0 and"
                f" {what[1]!r} in process {rank}: the network decides by its signals; ignore it, or mix the batches"
            )

    def check_same(self, values: Mapping[str, Tensor]) -> None:
        """Make sure that all processes have the same values, to the bit.

        Raises:
            RuntimeError: naming the first that differ.
        """
        if self.count > 1:
            digests = self.gather([digest(value) for value in values.values()])
            for name, *theirs in zip(values, *digests, strict=True):
                if len(set(theirs)) > 1:
                    raise RuntimeError(
                        f"{name}: expected the same values in all {self.count} processes, to the bit, got different"
                        " ones: give all of them the same trained network, arguments, kind of machine and libraries"
                    )

    def share(self, tensors: Iterable[Tensor]) -> None:
        """In place, the values of process 0 for all."""


ALONE = Ranks()
"""A process that has all rows of its problems."""


@dataclass(frozen=True)
class Group(Ranks):
    """The processes of torch's default group.

    Attributes:
        count: number of processes.
        rank: number of this one, from 0.
        device: where this one's part of an exchange lies.

    Raises:
        RuntimeError: from every method, once another process has ended.
    """

    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """All processes of the default group, each with a copy of the model.

        Raises:
            RuntimeError: if there is no such group.
            ValueError: for a model that talks to the other processes itself.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "distributed: expected a process group, got none: call torch.distributed.init_process_group first, or"
                " set distributed=False"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("distributed: expected the network itself, got DistributedDataParallel: pass model.module")
        count = distributed.get_world_size()
        return cls(count, distributed.get_rank(), next(model.parameters()).device) if count > 1 else ALONE

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape."""
        return self._reduce(part, distributed.ReduceOp.SUM)

    def norm(self, part: Tensor) -> Tensor:
        """The norms of what is spread over all processes, from the norms of each one's part."""
        return self.sum(part.double().square()).sqrt().to(part)

    def rows(self, part: Tensor) -> Tensor:
        """``(*batch, P, C)``: the rows of all processes, each with any number of its own."""
        counts = self.gather(part.shape[-2])
        own = nn.functional.pad(part, (0, 0, 0, max(counts) - part.shape[-2])).to(self.device).contiguous()
        padded = [torch.empty_like(own) for _ in counts]
        with _exchange(self.count):
            distributed.all_gather(padded, own)
        parts = [rows[..., :count, :] for rows, count in zip(padded, counts, strict=True)]
        return torch.cat(parts, -2).to(part.device)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        values: list[T | None] = [None] * self.count
        with _exchange(self.count):
            distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self._reduce(torch.tensor(int(flag)), distributed.ReduceOp.MAX))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """In place, the values of process 0 for all."""
        for tensor in tensors:
            own = tensor.detach().to(self.device).contiguous()
            with _exchange(self.count):
                distributed.broadcast(own, 0)
            tensor.copy_(own)

    def _reduce(self, part: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
        whole = part.to(self.device, copy=True, memory_format=torch.contiguous_format)
        with _exchange(self.count):
            distributed.all_reduce(whole, how)
        return whole.to(part.device)


@contextmanager
def _exchange(count: int) -> Iterator[None]:
    """A `with` in which a failure is put down to what mostly is its reason."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"expected {count} processes to go on together, got a failed exchange between them: another process has"
            " ended or hangs; its own output, or the system's log if it was killed, says why: start all of them again"
            f" ({error})"
        ) from error
