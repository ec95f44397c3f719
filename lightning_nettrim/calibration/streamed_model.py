"""A model on the meta device whose weights are read from files, part by part, when they are due."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.calibration.block_sequence import BlockSequence
from lightning_nettrim.calibration.nested import tensors_of
from lightning_nettrim.layers import joined
from lightning_nettrim.runtime.tensor_file import TensorFiles

OUTSIDE = None
"""The part of a model that is in no block."""


class _Slot(NamedTuple):
    """Where a module keeps a parameter or buffer."""

    name: str
    module: nn.Module
    key: str
    value: Tensor  # as it is while its part is not loaded

    @property
    def values(self) -> dict[str, Any]:
        """The parameters or the buffers of the module."""
        return self.module._parameters if isinstance(self.value, nn.Parameter) else self.module._buffers


class StreamedModel:
    """A model whose parameters are on the meta device, with the files that have their values.

    A part of the model is a block or everything outside of the blocks. A part that is not loaded has no values.

    Args:
        model: the model.
        files: of its weights. Parameters that modules share may be in them under any of their names.
        sequence: the blocks.

    Raises:
        ValueError: for a parameter that is not on the meta device, is not in the files, or has another shape there.
    """

    def __init__(self, model: nn.Module, files: TensorFiles, sequence: BlockSequence) -> None:
        self.model, self.files, self.sequence = model, files, sequence
        self._slots: dict[int | None, list[_Slot]] = {part: [] for part in (OUTSIDE, *range(len(sequence)))}
        self._names: dict[int, list[str]] = {}
        self._loaded: dict[int, Tensor] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            persistent = {key for key in module._buffers if key not in module._non_persistent_buffers_set}
            for key, value in (module._parameters | module._buffers).items():
                name = joined(path, key)
                if value is not None and (isinstance(value, nn.Parameter) or value.is_meta or key in persistent):
                    self._names.setdefault(id(value), []).append(name)
                    self._slots[sequence.index(name)].append(_Slot(name, module, key, value))
        for slot in (slot for slots in self._slots.values() for slot in slots):
            self._check(slot)

    def size(self, part: int | None) -> int:
        """Number of bytes of a part."""
        return sum({id(s.value): s.value.numel() * s.value.element_size() for s in self._slots[part]}.values())

    def names_in_files(self, name: str) -> list[str]:
        """The names under which a parameter or buffer of the model is in the files."""
        slots = (slot for slots in self._slots.values() for slot in slots if slot.name == name)
        return [alias for slot in slots for alias in self._names[id(slot.value)] if alias in self.files]

    def loaded(self, part: int | None) -> AbstractContextManager[None]:
        """A `with` in which a part has its values; there is nothing in a part beyond the last block."""
        return self._with_values(self._slots.get(part, []))

    def loaded_parameters(self, names: Collection[str]) -> AbstractContextManager[None]:
        """A `with` in which some parameters and buffers have their values."""
        return self._with_values([slot for slots in self._slots.values() for slot in slots if slot.name in names])

    @contextmanager
    def _with_values(self, slots: Sequence[_Slot]) -> Iterator[None]:
        own = {id(slot.value) for slot in slots} - {*self._loaded}
        before = [slot.values[slot.key] for slot in slots]
        try:
            for slot in slots:
                if id(slot.value) not in self._loaded:
                    self._loaded[id(slot.value)] = self._read(slot)
                slot.values[slot.key] = self._loaded[id(slot.value)]
            yield
        finally:
            for slot, value in zip(slots, before, strict=True):
                slot.values[slot.key] = value
            for key in own:
                self._loaded.pop(key, None)

    def check_sequence(self, batch: CalibrationBatch, output: Any) -> None:
        """Run a batch through the whole model, with one block loaded at a time, and compare its output.

        Args:
            batch: a batch.
            output: of the last segment, when the segments are run one after the other.

        Raises:
            ValueError: if it is another one, so that a block reads more than the output of the block before it.
        """
        called: list[int] = []
        with ExitStack() as stack:
            for index, block in enumerate(self.sequence.blocks):
                part = ExitStack()

                def enter(module: nn.Module, args: Any, part: ExitStack = part, index: int = index) -> None:
                    called.append(index)
                    part.enter_context(self.loaded(index))

                stack.callback(part.close)
                stack.callback(block.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(block.register_forward_hook(_closing(part)).remove)
            whole = tensors_of(batch(self.model))
        pairs = [*zip(whole, tensors_of(output), strict=False)]
        same = all(a.shape == b.shape and bool((a - b).norm() <= 1e-3 * a.norm()) for a, b in pairs if _is_float(a))
        if called != [*range(len(self.sequence))] or not same:
            order = "each of them once, in order" if same else "each of them with the output of the one before only"
            raise ValueError(
                f"blocks: expected a forward pass that calls {order}, which that of {type(self.model).__name__} does"
                f" not for {self.sequence.name or 'the model'}: give the name of other blocks, or prune it in memory"
            )

    def _check(self, slot: _Slot) -> None:
        """Check that a parameter or buffer can be loaded."""
        if isinstance(slot.value, nn.Parameter) and not slot.value.is_meta:
            raise ValueError(
                f"{slot.name}: expected parameters on the meta device, with values in {self.files.path}, got one in"
                " memory: create the model within torch.device('meta'), or prune it without weights="
            )
        name = self._name(slot)
        if name is None and isinstance(slot.value, nn.Parameter):
            raise ValueError(f"weights: expected a tensor {slot.name} in {self.files.path}, got none: save it with it")
        if name is not None and self.files.shape(name) != tuple(slot.value.shape):
            raise ValueError(
                f"weights: expected {slot.name} of shape {tuple(slot.value.shape)}, got {self.files.shape(name)} in"
                f" {self.files.path}: create the model that the weights belong to"
            )

    def _name(self, slot: _Slot) -> str | None:
        return next((name for name in self._names[id(slot.value)] if name in self.files), None)

    def _read(self, slot: _Slot) -> Tensor:
        """The value of a parameter or buffer."""
        name = self._name(slot)
        if name is None:
            return _computed_buffer(self.model, slot) if slot.value.is_meta else slot.value
        value = self.files.read(name).to(slot.value.dtype)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{slot.name}: expected finite weights, got NaN or Inf in {self.files.path}")
        return nn.Parameter(value, slot.value.requires_grad) if isinstance(slot.value, nn.Parameter) else value


def _closing(part: ExitStack) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, args, output: part.close()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _computed_buffer(model: nn.Module, slot: _Slot) -> Tensor:
    """A buffer that is in no file, such as the frequencies of a position embedding, from a new instance of its module.

    Raises:
        ValueError: if the module cannot be created from a ``config``, its own or that of a module which contains it, as
            those of Hugging Face's models can.
    """
    try:
        path = slot.name.split(".")[:-1]
        parents = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1))
        config = next(module.config for module in parents if hasattr(module, "config"))
        with torch.device("cpu"):
            return type(slot.module)(config).get_buffer(slot.key)
    except Exception as error:  # a module may raise anything
        raise ValueError(
            f"{slot.name}: expected a buffer with values, got one on the meta device that is not among the weights:"
            " assign it a tensor before the call"
        ) from error
