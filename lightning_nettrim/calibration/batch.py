"""A batch of the calibration set, which can be run through a model repeatedly and reproducibly."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.nested import count_inputs, map_tensors, tensors_of, to_device
from lightning_nettrim.runtime.distributed import mark_in_forward_of_shards
from lightning_nettrim.runtime.sharded import is_sharded, recover, reshard

Forward = Callable[[nn.Module, Any], Any]
"""A function ``(model, batch) → output`` that runs a batch through a model."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class AmbiguousBatch(ValueError):
    """A batch from which the arguments of the model cannot be determined."""


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model(x)`` for a tensor, ``model(*args)`` for a tuple or a list, ``model(**dict)`` for a mapping.

    For a mapping, the entries with the names of parameters of ``forward`` are passed, or the mapping itself if there
    are none. For a tuple ``(input, target, …)``, as many elements are passed as ``forward`` requires.

    Args:
        model: the model.
        batch: the batch, on the device of the model.

    Raises:
        AmbiguousBatch: for a tuple of which ``forward`` could take more elements than it requires.
    """
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments with which `call` passes a batch.

    Raises:
        AmbiguousBatch: for a tuple of which ``forward`` could take more elements than it requires.
    """
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    if isinstance(batch, list | tuple) and batch:
        count = _num_arguments(model, parameters, batch)
        if count > 1:
            return tuple(batch[:count]), {}
        batch = batch[0]
    if isinstance(batch, Mapping):
        takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if kwargs := {str(key): value for key, value in batch.items() if takes_all or key in parameters}:
            return (), kwargs
    return (batch,), {}


def _num_arguments(model: nn.Module, parameters: Mapping[str, inspect.Parameter], batch: Any) -> int:
    """Number of elements of a tuple that are arguments of ``forward``."""
    if isinstance(batch[0], Mapping):
        return 1
    positional = [p for p in parameters.values() if p.kind in _POSITIONAL]
    required = sum(p.default is inspect.Parameter.empty for p in positional)
    maximum = len(positional)
    if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        maximum = len(batch)
    minimum, maximum = max(required, 1), min(maximum, len(batch))
    takes_batch = len(batch) > 1 and minimum == 1 and positional and positional[0].name == "batch"
    if minimum < maximum or takes_batch:
        types = f"({', '.join(type(element).__name__ for element in batch)})"
        raise AmbiguousBatch(
            f"batches: expected inputs of {type(model).__name__}.forward({', '.join(map(str, parameters.values()))}),"
            f" got {types}, of which it could take one element or more: yield the input alone or a dict with the names"
            " of the arguments as keys, or pass forward=lambda model, batch: model(...)"
        )
    return minimum


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A `with` in which the model is in evaluation mode and all its hooks are called; every mode is restored.

    Compiled modules and functions run eagerly, and the fast path of ``nn.MultiheadAttention`` is disabled, as both skip
    hooks. Gradients are disabled, unless the model enables them itself.
    """
    modes = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    compiling = "torch._dynamo" in sys.modules  # its import takes seconds: avoided if nothing is compiled
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    try:
        with eager, torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter that has values; the CPU if there is none."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


class StopForward(BaseException):
    """Raised by a hook to end a forward pass early; see `CalibrationBatch.run_until_stopped`."""


@dataclass(frozen=True, eq=False)
class CalibrationBatch:
    """A batch and the function that runs it through a model.

    The random number generators are seeded alike in each run and their states are restored, so that all recordings of
    a model that draws random numbers are made with the same ones.

    Attributes:
        batch: the batch, on any device.
        forward: function that runs it through a model.
        seed: seed of the random number generators.
        reuse: returns a `with` in which the batch is run.
    """

    batch: Any
    forward: Forward = call
    seed: int = 0
    reuse: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, model: nn.Module) -> Any:
        """Run the batch on the device of the model's parameters, with autocast disabled."""
        device = device_of(model)
        batch = to_device(self.batch, device)
        autocast = torch.autocast(device.type, enabled=False)
        with _seeded(self.seed, device), autocast, _resharded(model), self.reuse():
            return self.forward(model, batch)

    def run_until_stopped(self, model: nn.Module) -> None:
        """Run the batch until a hook raises `StopForward`, or to the end."""
        with suppress(StopForward):
            self(model)

    @staticmethod
    def can_stop(model: nn.Module) -> bool:
        """Whether a hook may raise `StopForward`: not if parameters are divided among processes.

        All processes must then run a forward pass to its end, after which its parameters are divided again.
        """
        return not is_sharded(model)

    def part(self, rows: slice) -> CalibrationBatch:
        """The batch with some rows of all its tensors."""
        return CalibrationBatch(map_tensors(self.batch, lambda tensor: tensor[rows]), self.forward, self.seed)

    def repeated(self, count: int) -> CalibrationBatch:
        """The batch with so many rows of all its tensors, which are repeated or left out."""
        index = torch.arange(count) % count_inputs(self.batch)
        return CalibrationBatch(
            map_tensors(self.batch, lambda tensor: tensor[index.to(tensor.device)]), self.forward, self.seed
        )

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all tensors in the batch."""
        return [tuple(tensor.shape) for tensor in tensors_of(self.batch)]


@contextmanager
def _resharded(model: nn.Module) -> Iterator[None]:
    """A `with` for a forward pass, after which parameters are divided among processes as before.

    With gradients, the backward pass does this.
    """
    if not is_sharded(model):
        yield
        return
    try:
        yield
    except BaseException as error:
        mark_in_forward_of_shards(error)
        recover(model)
        raise
    if not torch.is_grad_enabled():
        reshard(model)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A `with` in which the random number generators are seeded; their states are restored afterwards."""
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


def inputs_are_independent(model: nn.Module, batch: CalibrationBatch, rows: int) -> bool:
    """Whether the model processes the inputs of a batch independently, so that batches can be split and concatenated.

    Up to four inputs of the batch run once together, and half of them once on their own: every module with parameters
    must receive the same inputs for these. This does not hold for a batch whose first dimension is not the batch
    dimension (time first, a list of images, a graph).

    Args:
        model: the model.
        batch: the batch.
        rows: the common first dimension of its tensors.
    """
    if rows < 2:
        return False
    size = min(rows, 4)
    try:
        with evaluation_mode(model):
            together, alone = (_module_inputs(model, batch.part(slice(count))) for count in (size, size // 2))
    except Exception:  # a model may raise anything on a batch that cannot be split
        return False
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    rtol = max([1e-3, *(16 * torch.finfo(dtype).eps for dtype in dtypes)])
    return len(together) == len(alone) and all(
        _is_leading_part(whole, part, size / (size // 2), rtol) for whole, part in zip(together, alone, strict=True)
    )


def _module_inputs(model: nn.Module, batch: CalibrationBatch) -> list[Tensor]:
    """Projections of the inputs of all modules with parameters on a fixed direction, in order of execution."""
    projections: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        for x in args:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1:
                direction = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32).cos()
                projections.append(x.detach().float() @ direction)

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(hook).remove)
        batch(model)
    return projections


def _is_leading_part(whole: Tensor, part: Tensor, ratio: float, rtol: float) -> bool:
    """Whether ``part`` is the beginning of ``whole`` along a dimension that is ``ratio`` times as long in ``whole``."""
    if whole.dim() != part.dim():
        return False
    atol = rtol * float(whole.abs().amax()) if whole.numel() else 0.0
    for dim, (size, part_size) in enumerate(zip(whole.shape, part.shape, strict=True)):
        leading = whole.narrow(dim, 0, part_size) if size == ratio * part_size else whole
        if size != part_size and leading.shape == part.shape and bool(((leading - part).abs() <= atol).all()):
            return True
    return False
