"""Calibration batches run through a step of a LightningModule, without side effects."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.callbacks.lightning_package import dummy_logger, is_a, of_package, overridden
from lightning_nettrim.callbacks.preserve import preserved
from lightning_nettrim.layers import Layer, masking
from lightning_nettrim.runtime.sharded import local

log = logging.getLogger(__name__)

STEPS = ("calibration_step", "validation_step", "training_step", "predict_step")
"""Steps in the order in which they are tried."""

_STAGES = {"training_step": "TRAINING", "predict_step": "PREDICTING"}


class LoadedBatch(NamedTuple):
    """A batch and the index of the loader that it comes from."""

    batch: Any
    dataloader_idx: int = 0


class StepForward:
    """Runs a batch through a step of a module, without side effects.

    `self.log` and loggers log nothing, optimizers and schedulers do nothing, and metrics and attributes are restored,
    as are the parameters and buffers that the step changes itself (momentum encoders, queues, counters).

    Args:
        trainer: of the module.
        step: name of the step.
        changed: names of those parameters and buffers.
    """

    def __init__(self, trainer: pl.Trainer, step: str, changed: Sequence[str] = ()) -> None:
        self._trainer, self.step, self._changed = trainer, step, list(changed)

    def __call__(self, model: nn.Module, loaded: LoadedBatch) -> Any:
        """Run the step and return its result."""
        function = getattr(model, self.step)
        names = [*inspect.signature(function).parameters]
        arguments: list[Any] = [loaded.batch]
        if len(names) > 1:
            arguments.append(0)
        if "dataloader_idx" in names[2:3]:
            arguments.append(loaded.dataloader_idx)
        precision = self._trainer.precision_plugin
        own_dtype = "true" in str(precision.precision)
        with (
            preserved(model),
            _restored(model, self._changed) if self._changed else nullcontext(),
            muted(self._trainer, model, _STAGES.get(self.step, "VALIDATING")),
            precision.forward_context() if own_dtype else nullcontext(),
        ):
            return function(*arguments)


@contextmanager
def muted(trainer: pl.Trainer, module: nn.Module, stage: str) -> Iterator[None]:
    """A `with` in which a module logs nothing, trains nothing and does not communicate with other processes."""
    state, loggers = trainer.state.stage, trainer.loggers
    with ExitStack() as stack:
        stack.callback(setattr, trainer, "loggers", loggers)
        stack.callback(setattr, trainer.state, "stage", state)
        trainer.loggers = [dummy_logger(trainer)] if loggers else []
        trainer.state.stage = getattr(of_package(trainer, "trainer.states", "RunningStage"), stage)
        for part in module.modules():
            if is_a(part, "LightningModule"):
                stack.enter_context(_replaced(part, _inert_methods(part)))
            elif is_a(part, "Metric"):
                stack.enter_context(_replaced(part, {"sync_on_compute": False, "dist_sync_on_step": False}))
        yield


@contextmanager
def _restored(module: nn.Module, names: list[str]) -> Iterator[None]:
    """A `with` after which some parameters and buffers have their former values."""
    before = masking.clone(module, names)
    try:
        yield
    finally:
        masking.assign(module, before)


@contextmanager
def _replaced(instance: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """A `with` in which an object has other attributes."""
    own = vars(instance)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def _inert_methods(module: Any) -> dict[str, Any]:
    """Replacements for the methods of a module by which a step has side effects."""
    real_optimizers, real_schedulers = module.optimizers, module.lr_schedulers

    def no_op(*args: Any, **kwargs: Any) -> None:
        return None

    def optimizers(*args: Any, **kwargs: Any) -> Any:
        return _inert(real_optimizers(*args, **kwargs))

    def lr_schedulers() -> Any:
        return _inert(real_schedulers())

    def all_gather(data: Any, *args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, data)

    silenced = ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    return dict.fromkeys(silenced, no_op) | {
        "optimizers": optimizers, "lr_schedulers": lr_schedulers, "all_gather": all_gather,
        "toggled_optimizer": lambda *args, **kwargs: nullcontext(),
    }  # fmt: skip


def _inert(real: Any) -> Any:
    return [_Inert(each) for each in real] if isinstance(real, list) else real and _Inert(real)


class _Inert:
    """An optimizer or a scheduler that can be read but does nothing, except that it runs a closure."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        return None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def choose_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    layers: Mapping[str, Layer],
    loaded: LoadedBatch,
    requested: str | None,
) -> StepForward:
    """The step that calibration batches run through: the requested one, or the first one that can be used.

    A step can be used if it accepts the batch and calls a layer that is to be pruned.

    Raises:
        ValueError: if there is none, with the reason for each.
    """
    reasons: dict[str, str] = {}
    for step in (step for step in STEPS if overridden(module, step)) if requested is None else [requested]:
        if not overridden(module, step):
            reasons[step] = "there is no such step"
            continue
        reason, changed = _try_step(trainer, module, layers, loaded, step)
        if not reason:
            if reasons:
                log.info("NetTrim: calibration batches run through %s (%s)", step, _list(reasons))
            return StepForward(trainer, step, changed)
        reasons[step] = reason
    raise ValueError(
        f"calibration_step: expected a step of {type(module).__name__} that accepts a calibration batch, got none"
        f" ({_list(reasons) or 'it has none'}): define calibration_step(self, batch), which runs the network on"
        " a batch, or name another step"
    )


def _list(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{step}: {reason}" for step, reason in reasons.items())


def _try_step(
    trainer: pl.Trainer, module: pl.LightningModule, layers: Mapping[str, Layer], loaded: LoadedBatch, step: str
) -> tuple[str, list[str]]:
    """Why a step cannot be used, empty if it can, and which tensors it changes; their values are restored."""
    own, called = masking.tensors(module), []
    before = masking.clone(module, list(own))
    with evaluation_mode(module), ExitStack() as stack:
        for layer in layers.values():
            hook = layer.module.register_forward_hook(lambda *_: called.append(True))
            stack.callback(hook.remove)
        try:
            CalibrationBatch(loaded, StepForward(trainer, step))(module)
            reason = "" if called else "it calls no layer that is to be pruned"
        except Exception as error:  # of any kind, on a batch of another form
            reason = f"it raised {type(error).__name__}: {error}"
    changed = [name for name, tensor in own.items() if not torch.equal(local(tensor), local(before[name]))]
    masking.assign(module, {name: before[name] for name in changed})
    return reason, changed
