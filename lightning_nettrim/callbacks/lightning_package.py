"""Compatibility of `lightning.pytorch` and `pytorch_lightning`: classes by name instead of identity."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import lightning.pytorch as pl


def is_a(thing: Any, *names: str) -> bool:
    """Whether the class of an object, or one of its bases, has one of these names."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def overridden(thing: Any, method: str) -> bool:
    """Whether a module or a data module overrides a method of Lightning."""
    function = getattr(thing, method, None)
    if function is None:
        return False
    where = str(getattr(inspect.unwrap(function), "__module__", ""))
    return not where.startswith(("lightning.pytorch.core", "pytorch_lightning.core"))


def of_package(trainer: pl.Trainer, module: str, name: str) -> Any:
    """An attribute of a module of the package that the Trainer belongs to."""
    package = "pytorch_lightning" if type(trainer).__module__.startswith("pytorch_lightning") else "lightning.pytorch"
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def dummy_logger(trainer: pl.Trainer) -> Any:
    """A logger that logs nothing."""
    return of_package(trainer, "loggers.logger", "DummyLogger")()


def fitting(trainer: pl.Trainer) -> bool:
    """Whether the Trainer is in a ``fit``."""
    return trainer.state.fn is not None and trainer.state.fn.value == "fit"
