"""Preserve: the state that a module's steps leave behind, put back after they have run."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_nettrim.callbacks.lightning_package import is_a

Restore = Callable[[], Any]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LONG = 1000
"""Containers of more than so many items are copied as they are, their items untouched."""


@contextmanager
def preserved(module: nn.Module, reset: bool = False) -> Iterator[None]:
    """A `with` after which metrics and all plain attributes of a module and of its parts are as before.

    Parameters and buffers are left alone. Lists and dicts keep their identity and get their former items back.

    Args:
        module: whose attributes.
        reset: within, metrics start from nothing, so that what they compute is about this pass alone.
    """
    restore = [_kept_attributes(part) for part in module.modules()]
    try:
        if reset:
            for part in module.modules():
                if is_a(part, "Metric"):
                    part.reset()  # type: ignore[operator]
        yield
    finally:
        for put_back in restore:
            put_back()


def _kept_attributes(module: nn.Module) -> Restore:
    """What puts the attributes of one module back."""
    metric = is_a(module, "Metric")
    values = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    if metric:  # whose states are tensors that are changed in place; its methods are attributes too
        values = {key: value for key, value in values.items() if not callable(value)}
    kept = {key: _kept(value, metric) for key, value in values.items()}
    buffers = copy.deepcopy(module._buffers) if metric else None

    def restore() -> None:
        now = vars(module)
        for key in [key for key in now if key not in kept and key not in _OF_EVERY_MODULE and not callable(now[key])]:
            del now[key]
        now.update({key: value() for key, value in kept.items()})
        if buffers is not None:
            module._buffers.update(buffers)

    return restore


def _kept(value: Any, clone: bool, depth: int = 3) -> Restore:
    """What returns a value with its former contents."""
    if isinstance(value, nn.Module):
        if not is_a(value, "Metric"):
            return lambda: value
        attributes = _kept_attributes(value)
        return lambda: (attributes(), value)[1]
    if clone and isinstance(value, Tensor):
        copied = value.detach().clone()
        return lambda: copied
    if type(value) not in (list, dict, set, deque) or depth == 0:
        return lambda: value
    if len(value) > _LONG or isinstance(value, set):
        before = copy.copy(value)
        return lambda: _filled(value, before)
    if isinstance(value, dict):
        items = {key: _kept(item, clone, depth - 1) for key, item in value.items()}
        return lambda: _filled(value, {key: item() for key, item in items.items()})
    parts = [_kept(item, clone, depth - 1) for item in value]
    return lambda: _filled(value, [part() for part in parts])


def _filled(container: Any, contents: Any) -> Any:
    """The same container with other contents."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(contents)
    else:
        container.update(contents)
    return container
