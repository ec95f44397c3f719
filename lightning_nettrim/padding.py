"""Padding: which positions of a batch of sequences are padded, by the masks that modules are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn

KEPT = ("attention_mask",)
"""Arguments of modules that are nonzero at tokens, ``(batch, tokens)``, as Hugging Face's models have them."""

PADDED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")
"""Arguments of modules that are nonzero at padding, ``(batch, tokens)``, as torch's transformers have them."""


class PaddingMasks:
    """The masks of the modules that are running; the innermost one that fits a tensor says what is padded in it.

    What a decoder attends to, its ``encoder_hidden_states``, has a mask of its own, ``encoder_attention_mask``.
    """

    def __init__(self) -> None:
        self._masks: list[Tensor | None] = []
        self._attended: dict[int, Tensor | None] = {}  # masks of what decoders attend to, by its place in memory

    def kept(self, shape: Sequence[int], x: Tensor | None = None) -> Tensor | None:
        """``(n,)`` positions of a layer's tensors that are no padding; ``None`` is all.

        Args:
            shape: their leading dimensions, ``(batch, tokens)`` or the other way round.
            x: what the layer is called with.
        """
        if len(shape) != 2:
            return None
        place = -1 if x is None else x.data_ptr()
        masks = [self._attended[place]] if place in self._attended else self._masks
        for mask in reversed(masks):
            if mask is None:
                return None
            for candidate in (mask, mask.mT):
                if candidate.shape == tuple(shape):
                    return candidate.flatten().nonzero().squeeze(1).cpu()
        return None

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[PaddingMasks]:
        """A `with` in which masks that modules of a model are called with are known while those run."""

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
        """A module is called with these arguments."""
        attended, theirs = (arguments.get(f"encoder_{name}") for name in ("hidden_states", "attention_mask"))
        if isinstance(attended, Tensor):
            if _fits(theirs):
                self._attended[attended.data_ptr()] = theirs != 0
            elif theirs is None:
                self._attended.setdefault(attended.data_ptr(), None)
        unmasked = attended is not None and arguments.get("attention_mask") is None
        inherited = self._masks[-1] if self._masks and not unmasked else None  # an encoder's mask is not a decoder's
        mask = _mask(arguments)
        self._masks.append(inherited if mask is None else mask)

    def forget(self) -> None:
        """After a forward pass, which may have been ended halfway."""
        self._masks.clear()
        self._attended.clear()


def _mask(arguments: dict[str, Any]) -> Tensor | None:
    """``(batch, tokens)`` bool, True at tokens, if there is such an argument."""
    for name in (*KEPT, *PADDED):
        mask = arguments.get(name)
        if _fits(mask):
            return mask != 0 if name in KEPT else mask == 0
    return None


def _fits(mask: Any) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 2
