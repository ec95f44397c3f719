"""Replay: a batch of the calibration set that runs through a model as often as needed, always in the same way."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.structure import change, tensors_of, to_device

Forward = Callable[[nn.Module, Any], Any]
"""Runs a batch through a model."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class AmbiguousBatch(ValueError):
    """A batch of which it cannot be known what the model's arguments are."""


def call(model: nn.Module, batch: Any) -> Any:
    """``model(x)`` for a tensor, ``model(*args)`` for a tuple or a list, ``model(**dict)`` for a mapping.

    Of a mapping, those entries are passed that ``forward`` names; it is passed whole if ``forward`` names none of them.
    Of a tuple ``(input, target, …)`` as many elements are passed as ``forward`` requires.

    Raises:
        AmbiguousBatch: for a tuple of which ``forward`` could take more elements than it requires.
    """
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments by which `call` passes a batch.

    Raises:
        AmbiguousBatch: for a tuple of which ``forward`` could take more elements than it requires.
    """
    named = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    if isinstance(batch, list | tuple) and batch:
        count = _elements(model, named, batch)
        if count > 1:
            return tuple(batch[:count]), {}
        batch = batch[0]
    if isinstance(batch, Mapping):
        takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in named.values())
        if chosen := {str(key): value for key, value in batch.items() if takes_all or key in named}:
            return (), chosen
    return (batch,), {}


def _elements(model: nn.Module, named: Mapping[str, inspect.Parameter], batch: Any) -> int:
    """How many elements of a tuple are arguments of ``forward``."""
    if isinstance(batch[0], Mapping):
        return 1
    positional = [p for p in named.values() if p.kind in _POSITIONAL]
    required = sum(p.default is inspect.Parameter.empty for p in positional)
    most = len(positional)
    if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in named.values()):
        most = len(batch)
    least, most = max(required, 1), min(most, len(batch))
    whole = len(batch) > 1 and least == 1 and positional and positional[0].name == "batch"
    if least < most or whole:
        form = f"({', '.join(type(element).__name__ for element in batch)})"
        raise AmbiguousBatch(
            f"batches: expected inputs of {type(model).__name__}.forward({', '.join(map(str, named.values()))}), got"
            f" {form}, of which it could take one element or more: yield the input alone, or a dict by the names of"
            " the arguments, or pass forward=lambda model, batch: model(...)"
        )
    return least


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A `with` in which the model is in evaluation mode, on the paths that hooks see; every mode is put back.

    Compiled modules and functions run eagerly, as hooks do not fire through them otherwise. There are no gradients but
    those that a model asks for itself.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    compiler = "torch._dynamo" in sys.modules  # whose import takes seconds that nobody needs who does not compile
    eager = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    try:
        with eager, torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, eq=False)
class Replay:
    """One batch and how it runs.

    Random numbers are drawn from the same seed in each run, and the generators' states are put back, so that all
    recordings of a model with noise of its own see the same noise.

    Attributes:
        batch: the batch, on any device.
        forward: runs it through a model.
        seed: of random numbers.
    """

    batch: Any
    forward: Forward = call
    seed: int = 0

    def __call__(self, model: nn.Module) -> Any:
        """Run it, on the device of the model's parameters, with autocast off."""
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        batch = to_device(self.batch, device)
        with _seeded(self.seed, device), torch.autocast(device.type, enabled=False):
            return self.forward(model, batch)

    def part(self, rows: slice) -> Replay:
        """The same of some rows of all tensors."""
        return Replay(change(self.batch, lambda tensor: tensor[rows]), self.forward, self.seed)

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all its tensors."""
        return [tuple(tensor.shape) for tensor in tensors_of(self.batch)]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A `with` in which random numbers come from a seed; the generators are as before afterwards."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
            numpy.random.seed(seed)
        on_cuda = device.type == "cuda"
        stack.enter_context(torch.random.fork_rng([device] if on_cuda else []))
        torch.random.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


def independent(model: nn.Module, replay: Replay, rows: int) -> bool:
    """Whether the inputs of a batch run alone as they run together, so that a batch can be divided and joined.

    The first inputs of the batch run once with and once without the others: each module with parameters must get the
    same inputs. A batch whose first dimension is not that of its inputs (time first, lists of images, a graph) fails.

    Args:
        model: the model.
        replay: of the batch.
        rows: the common first dimension of its tensors.
    """
    if rows < 2:
        return False
    some = min(rows, 4)
    try:
        with evaluating(model):
            together, alone = (_inputs(model, replay.part(slice(count))) for count in (some, some // 2))
    except Exception:  # whatever a model raises on a batch that cannot be divided
        return False
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    rounding = max([1e-3, *(16 * torch.finfo(kind).eps for kind in kinds)])
    return len(together) == len(alone) and all(
        _same_part(whole, part, some / (some // 2), rounding) for whole, part in zip(together, alone, strict=True)
    )


def _inputs(model: nn.Module, replay: Replay) -> list[Tensor]:
    """Projections of what the modules with parameters are called with, in order."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        for x in args:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1:
                direction = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32).cos()
                found.append(x.detach().float() @ direction)

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(hook).remove)
        replay(model)
    return found


def _same_part(whole: Tensor, part: Tensor, ratio: float, rounding: float) -> bool:
    """Whether a tensor is the first part of another one along a dimension that is longer by the ratio there."""
    if whole.dim() != part.dim():
        return False
    tolerance = rounding * float(whole.abs().amax()) if whole.numel() else 0.0
    for dim, (size, fewer) in enumerate(zip(whole.shape, part.shape, strict=True)):
        first = whole.narrow(dim, 0, fewer) if size == ratio * fewer else whole
        if size != fewer and first.shape == part.shape and bool(((first - part).abs() <= tolerance).all()):
            return True
    return False
