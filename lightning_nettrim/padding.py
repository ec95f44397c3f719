"""Padding: which positions of a batch of sequences are padded, by the masks that modules are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

KEPT = ("attention_mask",)
"""Arguments of modules that are nonzero at tokens, ``(batch, tokens)``, as Hugging Face's models have them."""

PADDED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")
"""Arguments of modules that are nonzero at padding, ``(batch, tokens)``, as torch's transformers have them."""


class PaddingMasks:
    """The masks of the modules that are running; the innermost one that fits a tensor says what is padded in it."""

    def __init__(self) -> None:
        self._masks: list[Tensor | None] = []

    def kept(self, shape: Sequence[int]) -> Tensor | None:
        """``(n,)`` positions of a tensor with leading dimensions ``shape`` that are no padding; ``None`` is all."""
        if len(shape) != 2:
            return None
        for mask in reversed(self._masks):
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
                given = dict(zip(names, args, strict=False)) | kwargs
                decodes = given.get("encoder_hidden_states") is not None and given.get("attention_mask") is None
                inherited = self._masks[-1] if self._masks and not decodes else None  # an encoder's mask is not its own
                mask = _mask(given)
                self._masks.append(inherited if mask is None else mask)

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

    def forget(self) -> None:
        """After a forward pass that was ended halfway."""
        self._masks.clear()


def _mask(arguments: dict[str, Any]) -> Tensor | None:
    """``(batch, tokens)`` bool, True at tokens, if there is such an argument."""
    for name in (*KEPT, *PADDED):
        mask = arguments.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask != 0 if name in KEPT else mask == 0
    return None
