"""Restores metrics and attributes that the steps of a module change."""

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
"""Containers with more items are copied shallowly."""


@contextmanager
def preserved(module: nn.Module, reset: bool = False) -> Iterator[None]:
    """A `with` after which metrics and all plain attributes of a module and its submodules are as before.

    Parameters and buffers are not restored. Lists and dicts keep their identity and get their former items.

    Args:
        module: the module.
        reset: reset metrics at the beginning, so that they are computed over this pass only.
    """
    restore = [_saved_attributes(part) for part in module.modules()]
    try:
        if reset:
            for part in module.modules():
                if is_a(part, "Metric"):
                    part.reset()  # type: ignore[operator]
        yield
    finally:
        for restore_attributes in restore:
            restore_attributes()


def _saved_attributes(module: nn.Module) -> Restore:
    """A function that restores the attributes of one module."""
    metric = is_a(module, "Metric")
    values = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    if metric:  # the states of a metric are tensors that change in place; its methods are attributes too
        values = {key: value for key, value in values.items() if not callable(value)}
    saved = {key: _saved(value, metric) for key, value in values.items()}
    buffers = copy.deepcopy(module._buffers) if metric else None

    def restore() -> None:
        now = vars(module)
        for key in [key for key in now if key not in saved and key not in _OF_EVERY_MODULE and not callable(now[key])]:
            del now[key]
        now.update({key: value() for key, value in saved.items()})
        if buffers is not None:
            module._buffers.update(buffers)

    return restore


def _saved(value: Any, clone: bool, depth: int = 3) -> Restore:
    """A function that returns a value with its former contents."""
    if isinstance(value, nn.Module):
        if not is_a(value, "Metric"):
            return lambda: value
        attributes = _saved_attributes(value)
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
        items = {key: _saved(item, clone, depth - 1) for key, item in value.items()}
        return lambda: _filled(value, {key: item() for key, item in items.items()})
    parts = [_saved(item, clone, depth - 1) for item in value]
    return lambda: _filled(value, [part() for part in parts])


def _filled(container: Any, contents: Any) -> Any:
    """The same container object with other contents."""
    container.clear()
    if isinstance(container, list | deque):
        container.extend(contents)
    else:
        container.update(contents)
    return container
