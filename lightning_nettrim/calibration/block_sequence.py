"""A model as a sequence of blocks, each of which is run on its own, on the outputs of the block before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from lightning_nettrim.calibration.batch import CalibrationBatch, Forward, StopForward
from lightning_nettrim.calibration.nested import common_length
from lightning_nettrim.calibration.output_cache import replaced_forward
from lightning_nettrim.calibration.stored_batch import StoredBatch
from lightning_nettrim.layers import joined
from lightning_nettrim.runtime.offload import TensorStore


@dataclass(frozen=True, eq=False)
class BlockSequence:
    """The blocks of a model, of which each reads the output of the one before.

    Attributes:
        name: name of the module that contains them.
        names: name of each block.
        blocks: the blocks.
    """

    name: str
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    @classmethod
    def find(cls, model: nn.Module, name: str | None = None) -> BlockSequence:
        """Find the blocks of a model.

        Args:
            model: the model.
            name: name of an ``nn.ModuleList`` or ``nn.Sequential`` in it; ``None`` is the one with the most weights
                whose elements are of one class, and which is not part of another one.

        Raises:
            ValueError: if there is none.
        """
        modules = dict(model.named_modules())
        candidates = {key: module for key, module in modules.items() if _is_sequence(module)}
        if name is None:
            uniform = [key for key, module in candidates.items() if len({*map(type, module.children())}) == 1]
            outer = [key for key in uniform if not any(_is_within(key, other) for other in uniform)]
            if not outer:
                raise ValueError(
                    f"blocks: expected an nn.ModuleList or nn.Sequential of blocks of one class in"
                    f" {type(model).__name__}, got none: give the name of a sequence of blocks"
                )
            name = max(outer, key=lambda key: sum(parameter.numel() for parameter in modules[key].parameters()))
        if name not in candidates:
            names = ", ".join(map(repr, candidates)) or "none"
            raise ValueError(f"blocks: expected the name of a sequence of modules ({names}), got {name!r}")
        children = dict(modules[name].named_children())
        return cls(name, tuple(joined(name, key) for key in children), tuple(children.values()))

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def index(self, name: str) -> int | None:
        """Index of the block that a module or parameter belongs to; ``None`` for those outside of all blocks."""
        return next((i for i, block in enumerate(self.names) if name == block or _is_within(name, block)), None)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1


def _is_within(name: str, other: str) -> bool:
    """Whether a module is part of another one, by name; the name of the model itself is empty."""
    return name != other and (not other or name.startswith(f"{other}."))


@dataclass(frozen=True, eq=False)
class SegmentForward:
    """Runs one segment of a model: what precedes the first block and that block, one block, or what follows the last.

    The model's own forward pass is run, in which the blocks before return what the last of them has returned for the
    batch, so that a block is called with the arguments that the model gives it (masks, position embeddings). It ends
    with the output of the block.

    Attributes:
        sequence: the blocks.
        segment: index of the block; ``len(sequence)`` is what follows the last one.
        forward: function that runs a batch through the model.
    """

    sequence: BlockSequence
    segment: int
    forward: Forward

    def __call__(self, model: nn.Module, pair: tuple[Any, Any]) -> Any:
        """The output of the segment for ``(batch, output of the segment before)``.

        Raises:
            ValueError: if the forward pass does not call the block.
        """
        batch, previous = pair
        outputs: list[Any] = []

        def end(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise StopForward

        with ExitStack() as stack:
            for block in self.sequence.blocks[: self.segment]:
                stack.enter_context(replaced_forward(block, lambda *args, **kwargs: previous))
            if self.segment == len(self.sequence):
                return self.forward(model, batch)
            stack.callback(self.sequence.blocks[self.segment].register_forward_hook(end).remove)
            try:
                self.forward(model, batch)
            except StopForward:
                if outputs:
                    return outputs[0]
                raise  # of another hook
        name = self.sequence.names[self.segment]
        raise ValueError(f"blocks: expected a forward pass that calls {name}, got none: give the name of other blocks")

    def first(self, model: nn.Module, batch: Any) -> Any:
        """The output of the first segment for a batch."""
        return self(model, (batch, None))


class SegmentOutputs:
    """The outputs of a segment for the batches of a calibration set.

    Args:
        store: where they are kept.

    Attributes:
        values: one for each batch that has been run, in order.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self.values: list[StoredBatch] = []

    def kept(self, batches: Iterable[CalibrationBatch]) -> Iterator[CalibrationBatch]:
        """The same batches; when one of them is run to its end, its output is kept."""
        for batch in batches:
            yield replace(batch, forward=partial(self._run, batch.forward))

    def _run(self, forward: Forward, model: nn.Module, pair: tuple[Any, Any]) -> Any:
        output = forward(model, pair)
        length = common_length(output)
        divisible = length is not None and length == common_length(pair[0])
        self.values.append(StoredBatch.of(output, self._store, divisible))
        return output
