"""Steps: calibration batches run through a LightningModule's own step, of which nothing remains."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_nettrim.callbacks.package import dummy_logger, is_a, of_package, overridden
from lightning_nettrim.callbacks.preserve import preserved
from lightning_nettrim.layers import Layer
from lightning_nettrim.replay import Replay, evaluating

log = logging.getLogger(__name__)

STEPS = ("calibration_step", "validation_step", "training_step", "predict_step")
"""In the order in which they are tried."""

_STAGES = {"training_step": "TRAINING", "predict_step": "PREDICTING"}


class Loaded(NamedTuple):
    """A batch and the number of the loader that it comes from."""

    batch: Any
    dataloader_idx: int = 0


class StepForward:
    """Runs a batch through a step of a module, without a trace.

    `self.log` and loggers are mute, optimizers and schedulers do nothing, and metrics and attributes are put back.

    Args:
        trainer: of the module.
        step: name of the step.
    """

    def __init__(self, trainer: pl.Trainer, step: str) -> None:
        self._trainer, self.step = trainer, step

    def __call__(self, model: nn.Module, loaded: Loaded) -> Any:
        """What the step returns."""
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
            muted(self._trainer, model, _STAGES.get(self.step, "VALIDATING")),
            precision.forward_context() if own_dtype else nullcontext(),
        ):
            return function(*arguments)


@contextmanager
def muted(trainer: pl.Trainer, module: nn.Module, stage: str) -> Iterator[None]:
    """A `with` in which a module logs nothing, trains nothing and exchanges nothing with other processes."""
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
def _replaced(thing: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """A `with` in which an object has other attributes."""
    own = vars(thing)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def _inert_methods(module: Any) -> dict[str, Any]:
    """In place of the methods of a module by which a step has effects."""
    real_optimizers, real_schedulers = module.optimizers, module.lr_schedulers

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def optimizers(*args: Any, **kwargs: Any) -> Any:
        return _inert(real_optimizers(*args, **kwargs))

    def lr_schedulers() -> Any:
        return _inert(real_schedulers())

    def all_gather(data: Any, *args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, data)

    quiet = ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    return dict.fromkeys(quiet, nothing) | {
        "optimizers": optimizers, "lr_schedulers": lr_schedulers, "all_gather": all_gather,
        "toggled_optimizer": lambda *args, **kwargs: nullcontext(),
    }  # fmt: skip


def _inert(real: Any) -> Any:
    return [_Inert(each) for each in real] if isinstance(real, list) else real and _Inert(real)


class _Inert:
    """An optimizer or a scheduler that can be read but does nothing; a closure is run, as a step would run it."""

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
    trainer: pl.Trainer, module: pl.LightningModule, layers: Mapping[str, Layer], loaded: Loaded, wanted: str | None
) -> str:
    """The step that calibration batches run through: the one asked for, or the first one that can.

    A step can if it takes the batch, calls a layer that is to be pruned, and changes no parameter and no buffer.

    Raises:
        ValueError: if there is none, with the reason for each.
    """
    candidates = [step for step in STEPS if overridden(module, step)] if wanted is None else [wanted]
    reasons: dict[str, str] = {}
    for step in candidates:
        reason = _tried(trainer, module, layers, loaded, step) if overridden(module, step) else "there is no such step"
        if not reason:
            if reasons:
                tried = "; ".join(f"{name}: {why}" for name, why in reasons.items())
                log.info("NetTrim: calibration batches run through %s (%s)", step, tried)
            return step
        reasons[step] = reason
    tried = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "it has none"
    raise ValueError(
        f"calibration_step: expected a step of {type(module).__name__} that takes a calibration batch, got none"
        f" ({tried}): define calibration_step(self, batch), which runs what is to be recorded, or name another step"
    )


def _tried(
    trainer: pl.Trainer, module: pl.LightningModule, layers: Mapping[str, Layer], loaded: Loaded, step: str
) -> str:
    """Why a step cannot be used; empty if it can."""
    before, called = {**dict(module.named_parameters()), **dict(module.named_buffers())}, []
    copies = {name: tensor.detach().clone() for name, tensor in before.items()}
    with evaluating(module), ExitStack() as stack:
        for layer in layers.values():
            hook = layer.module.register_forward_hook(lambda *_: called.append(True))
            stack.callback(hook.remove)
        try:
            Replay(loaded, StepForward(trainer, step))(module)
            failed = "" if called else "it calls no layer that is to be pruned"
        except Exception as error:  # whatever a step raises on a batch that is none of its own
            failed = f"it raised {type(error).__name__}: {error}"
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, copies[name])]
    with torch.no_grad():
        for name in changed:
            before[name].copy_(copies[name])
    return failed or (f"it changes {changed[0]}" if changed else "")
