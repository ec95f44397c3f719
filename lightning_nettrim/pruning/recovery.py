"""Recovery of a pruned network without labels: its kept weights are tuned to the dense network's output."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.layers import Layer, joined, masking
from lightning_nettrim.pruning.results import RecoveryReport
from lightning_nettrim.runtime.offload import StoredTensors

if TYPE_CHECKING:
    from lightning_nettrim.pruning.session import CalibrationSession

MIN_BATCHES = 10
"""The calibration set is divided into at least so many batches, so that some can be held out."""

NORMS = (
    nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm,
)  # fmt: skip
"""Modules whose scale and shift are tuned."""


@dataclass(frozen=True)
class Recovery(ABC):
    """A method that tunes a pruned network in place. A frozen dataclass of numbers, so that YAML can define it."""

    @abstractmethod
    def recover(self, session: CalibrationSession, masks: Mapping[str, Tensor]) -> RecoveryReport:
        """Tune the pruned model of a session in place; weights that a mask does not keep stay zero.

        Args:
            session: the trained model with its calibration data; the model holds the pruned weights.
            masks: ``{parameter name: bool tensor}``, True where the weight is kept.
        """


@dataclass(frozen=True)
class Distillation(Recovery):
    """Tune kept weights, biases and the scales of norms so that the output reproduces the dense network's.

    The output is that of the layer that is executed last. Adam with a cosine schedule runs over the calibration set; a
    part of it is held out, and the iterate with the lowest loss there is kept, or the pruned network itself. Masks and
    the running statistics of BatchNorms are fixed. No labels are used.

    Args:
        loss: ``"kl"``, the Kullback-Leibler divergence of the softmax of both outputs; ``"mse"``, the squared error
            relative to the mean square of the dense output; ``"auto"``, KL if a softmax follows the output, else MSE.
        max_steps: number of steps.
        lr: learning rate at the beginning.
        holdout: fraction of the calibration batches that is held out.
        check_every: number of steps between two evaluations on the held-out batches.
        seed: of the order of the batches.
    """

    loss: Literal["auto", "kl", "mse"] = "auto"
    max_steps: int = 300
    lr: float = 1e-3
    holdout: float = 0.1
    check_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.loss not in ("auto", "kl", "mse"):
            raise ValueError(f"Distillation.loss: expected 'auto', 'kl' or 'mse', got {self.loss!r}")
        for name in ("max_steps", "lr", "check_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Distillation.{name}: expected > 0, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"Distillation.holdout: expected a fraction in (0, 1), got {self.holdout}")

    def recover(self, session: CalibrationSession, masks: Mapping[str, Tensor]) -> RecoveryReport:
        """Tune the pruned model in place; it stays as it is if nothing improves."""
        start, model, progress = time.perf_counter(), session.model, session.run.progress
        progress.activity = "recovering the pruned network"
        batches = _divided(session)
        count = max(1, round(self.holdout * len(batches)))
        training, held_out = batches[:-count], batches[-count:]
        parameters = tuned_parameters(model, session.plan.layers)
        pruned = masking.clone(model, list(parameters))
        with evaluation_mode(model), masking.restored_on_error(model, pruned):
            output = find_output(model, batches[0])
            name = ("kl" if output.softmax else "mse") if self.loss == "auto" else self.loss
            distance = LOSSES[name]
            targets = _dense_outputs(session, output.module, batches)

            def evaluate() -> float:
                return _mean_loss(session, output.module, held_out, targets[-count:], distance)

            before = best = evaluate()
            best_values, best_step = pruned, 0
            with _only_trainable(model, parameters):
                optimizer = torch.optim.Adam(parameters.values(), lr=self.lr)
                order = self._order(len(training))
                for step, index in enumerate(order, 1):
                    progress.report("recovering", step / self.max_steps)
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.max_steps))
                    with torch.enable_grad():
                        result = output_of(model, output.module, training[index])
                        distance(result, _load(targets[index], result)).backward()
                    for key, parameter in parameters.items():
                        _finish_gradient(session, parameter, masks.get(key))
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    masking.apply(model, masks)
                    if step % self.check_every == 0 or step == self.max_steps:
                        now = evaluate()
                        if now < best:
                            best, best_step, best_values = now, step, masking.clone(model, list(parameters))
            masking.assign(model, best_values)
        return RecoveryReport(name, before, best, best_step, time.perf_counter() - start)

    def _order(self, batches: int) -> list[int]:
        """Indices of the training batches for all steps, shuffled anew in each pass."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        while len(order) < self.max_steps:
            order += torch.randperm(batches, generator=generator).tolist()
        return order[: self.max_steps]


def kl_divergence(output: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(target) ‖ softmax(output))."""
    log_p, log_q = (F.log_softmax(t.float().flatten(0, -2), -1) for t in (target, output))
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def relative_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output − target‖²/‖target‖²."""
    return (output - target).square().sum() / target.square().sum().clamp(min=1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl_divergence, "mse": relative_squared_error}
"""Losses by name."""

SOFTMAX = {"_log_softmax", "_softmax", "log_softmax", "softmax", "cross_entropy_loss"}
"""Operations by which an output is recognized as logits."""


class Output(NamedTuple):
    """The output of a network."""

    module: nn.Module  # whose output it is: the one with parameters that is executed last
    softmax: bool  # whether a softmax over its last dimension follows


class _Reached(BaseException):
    """Raised to end a forward pass once the output is there."""


class _SoftmaxAfter(TorchDispatchMode):
    """A `with` in which it is recorded whether a softmax is computed after the latest output of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.module: nn.Module | None = None
        self.size = 0
        self.softmax = False

    def output(self, module: nn.Module, result: object) -> None:
        """Record the output of a module."""
        if isinstance(result, Tensor) and result.dim() > 1:
            self.module, self.size, self.softmax = module, result.shape[-1], False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        name = func._schema.name.removeprefix("aten::")
        if name in SOFTMAX and isinstance(args[0], Tensor) and args[0].shape[-1] == self.size:
            self.softmax = True
        return func(*args, **(kwargs or {}))


def find_output(model: nn.Module, batch: CalibrationBatch) -> Output:
    """The module with parameters that is executed last, and whether a softmax follows its output.

    Raises:
        ValueError: if no module with parameters returns a tensor.
    """
    last = _SoftmaxAfter()
    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                handle = module.register_forward_hook(lambda module, args, result: last.output(module, result))
                stack.callback(handle.remove)
        with last:
            batch(model)
    if last.module is None:
        raise ValueError("recover: expected a module with parameters that returns a tensor, got none")
    return Output(last.module, last.softmax)


def output_of(model: nn.Module, module: nn.Module, batch: CalibrationBatch) -> Tensor:
    """The output of a module in a forward pass, which ends there."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: object, result: Tensor) -> None:
        found.append(result)
        raise _Reached

    handle = module.register_forward_hook(hook)
    try:
        batch(model)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def tuned_parameters(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, nn.Parameter]:
    """The parameters of the pruned layers, and scale and shift of all norms, by name."""
    names = [name for layer in layers.values() for name in layer.parameter_names()]
    for path, module in model.named_modules():
        if isinstance(module, NORMS):
            names += [joined(path, key) for key, _ in module.named_parameters(recurse=False)]
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names if name in parameters}


def _divided(session: CalibrationSession) -> list[CalibrationBatch]:
    """The batches of the calibration set, divided until there are enough to hold some out."""
    calibration_set = session.activations.calibration_set
    while len(calibration_set) < MIN_BATCHES:
        smaller = calibration_set.with_smaller_batches()
        if len(smaller) == len(calibration_set):
            break
        calibration_set = smaller
    if len(calibration_set) < 2:
        raise ValueError("recover: expected at least two calibration batches, got one that cannot be divided")
    return list(calibration_set)


def _dense_outputs(
    session: CalibrationSession, module: nn.Module, batches: Sequence[CalibrationBatch]
) -> list[StoredTensors]:
    """The outputs of the dense network; the pruned weights are in the model again afterwards."""
    pruned = session.snapshot()
    session.restore()
    try:
        return [session.run.store.put([output_of(session.model, module, batch).detach()]) for batch in batches]
    finally:
        session.restore(pruned)


@contextmanager
def _only_trainable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """A `with` in which only these parameters have gradients."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _finish_gradient(session: CalibrationSession, parameter: nn.Parameter, mask: Tensor | None) -> None:
    """The gradient averaged over processes, zero where the mask does not keep the weight."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad = session.processes.sum(parameter.grad) / session.processes.count
    if mask is not None:
        parameter.grad.masked_fill_(~mask.to(parameter.device), 0)


def _mean_loss(
    session: CalibrationSession,
    module: nn.Module,
    batches: Sequence[CalibrationBatch],
    targets: Sequence[StoredTensors],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The mean loss over batches and processes."""
    losses = []
    for batch, target in zip(batches, targets, strict=True):
        output = output_of(session.model, module, batch)
        losses.append(float(distance(output, _load(target, output))))
    return session.processes.mean(sum(losses) / len(losses))


def _load(stored: StoredTensors, like: Tensor) -> Tensor:
    (target,) = stored.load()
    return target.to(like.device)
