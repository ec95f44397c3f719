"""The output of a network, wherever its forward pass or its step returns it, with gradients if they are enabled."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nettrim.calibration.batch import CalibrationBatch, StopForward

SOFTMAX = {"_log_softmax", "_softmax", "log_softmax", "softmax", "cross_entropy_loss"}
"""Operations by which an output is recognized as logits."""


class NetworkOutput(NamedTuple):
    """Where the output of a network is.

    Attributes:
        module: the module with parameters that is executed last.
        is_logits: whether a softmax over the last dimension of its output follows.
    """

    module: nn.Module
    is_logits: bool

    def of(self, model: nn.Module, batch: CalibrationBatch) -> Tensor:
        """The output for a batch; the forward pass ends there, at the first call of the module, if it may."""
        found: list[Tensor] = []
        stop = batch.can_stop(model)

        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found.append(output)
            if stop:
                raise StopForward

        handle = self.module.register_forward_hook(hook)
        try:
            batch.run_until_stopped(model)
        finally:
            handle.remove()
        return found[0]


def find_output(model: nn.Module, batch: CalibrationBatch) -> NetworkOutput:
    """Find the output of a network in a forward pass.

    Args:
        model: the model, in evaluation mode.
        batch: a batch of the calibration set.

    Raises:
        ValueError: if no module with parameters returns a tensor of two or more dimensions.
    """
    trace = _LastOutput()
    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(trace.hook).remove)
        with trace:
            batch(model)
    if trace.module is None:
        raise ValueError("expected a module with parameters that returns a tensor, got none: the network has no output")
    return NetworkOutput(trace.module, trace.is_logits)


class _LastOutput(TorchDispatchMode):
    """A `with` that records the module that was executed last, and whether a softmax is computed after it."""

    def __init__(self) -> None:
        super().__init__()
        self.module: nn.Module | None = None
        self.is_logits = False
        self._size = 0

    def hook(self, module: nn.Module, args: object, output: object) -> None:
        """Record the output of a module."""
        if isinstance(output, Tensor) and output.dim() > 1:
            self.module, self.is_logits, self._size = module, False, output.shape[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record a softmax."""
        name = func._schema.name.removeprefix("aten::")
        if name in SOFTMAX and isinstance(args[0], Tensor) and args[0].shape[-1] == self._size:
            self.is_logits = True
        return func(*args, **(kwargs or {}))
