"""Padded positions of a batch of sequences, found by the masks with which modules are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn

KEPT = ("attention_mask",)
"""Names of arguments, ``(batch, tokens)``, that are nonzero at tokens, as in Hugging Face's models."""

PADDED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")
"""Names of arguments, ``(batch, tokens)``, that are nonzero at padding, as in torch's transformers."""


class PaddingMasks:
    """The padding masks of the running modules; the innermost one that matches the shape of a tensor applies to it.

    The ``encoder_hidden_states`` that a decoder attends to have a mask of their own, ``encoder_attention_mask``.
    """

    def __init__(self) -> None:
        self._masks: list[Tensor | None] = []  # of the running modules, from the outermost to the innermost
        self._encoder_masks: dict[int, Tensor | None] = {}  # masks of encoder outputs, by the address of these

    def kept(self, shape: Sequence[int], x: Tensor | None = None) -> Tensor | None:
        """``(n,)`` positions of a layer's tensors that are not padding; ``None`` is all.

        Args:
            shape: leading dimensions of the tensors, ``(batch, tokens)`` or ``(tokens, batch)``.
            x: the input of the layer.
        """
        if len(shape) != 2:
            return None
        address = -1 if x is None else x.data_ptr()
        masks = [self._encoder_masks[address]] if address in self._encoder_masks else self._masks
        for mask in reversed(masks):
            if mask is None:
                return None
            for candidate in (mask, mask.mT):
                if candidate.shape == tuple(shape):
                    return candidate.flatten().nonzero().squeeze(1).cpu()
        return None

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[PaddingMasks]:
        """A `with` in which hooks record the masks with which the modules of a model are called."""

        def enter(names: list[str]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._enter(dict(zip(names, args, strict=False)) | kwargs)

            return hook

        def leave(*_: Any) -> None:
            self._masks.pop()

        with ExitStack() as stack:
            for module in model.modules():
                names = [*inspect.signature(module.forward).parameters]
                if {*KEPT, *PADDED} & {*names}:
                    stack.callback(module.register_forward_pre_hook(enter(names), with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield self

    def _enter(self, arguments: dict[str, Any]) -> None:
        """Record the masks among the arguments of a module that is called."""
        encoded, encoder_mask = (arguments.get(f"encoder_{name}") for name in ("hidden_states", "attention_mask"))
        if isinstance(encoded, Tensor):
            if _is_mask(encoder_mask):
                self._encoder_masks[encoded.data_ptr()] = encoder_mask != 0
            elif encoder_mask is None:
                self._encoder_masks.setdefault(encoded.data_ptr(), None)
        unmasked = encoded is not None and arguments.get("attention_mask") is None
        # a decoder without a mask of its own does not inherit the encoder's
        inherited = self._masks[-1] if self._masks and not unmasked else None
        mask = _mask(arguments)
        self._masks.append(inherited if mask is None else mask)

    def forget(self) -> None:
        """Discard all masks after a forward pass, which may have been interrupted."""
        self._masks.clear()
        self._encoder_masks.clear()


def _mask(arguments: dict[str, Any]) -> Tensor | None:
    """``(batch, tokens)`` bool, True at tokens; ``None`` if no argument is a mask."""
    for name in (*KEPT, *PADDED):
        mask = arguments.get(name)
        if _is_mask(mask):
            return mask != 0 if name in KEPT else mask == 0
    return None


def _is_mask(mask: Any) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 2
