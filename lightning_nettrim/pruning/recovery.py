"""Recovery of a pruned network without labels: its kept weights are tuned to the dense network's output."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.network_output import NetworkOutput, find_output
from lightning_nettrim.calibration.sampling import CalibrationSet
from lightning_nettrim.layers import Layer, joined, masking
from lightning_nettrim.pruning.results import RecoveryReport
from lightning_nettrim.runtime.offload import StoredTensors
from lightning_nettrim.runtime.sharded import is_averaged, is_sharded, local, local_part, reshard

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
            relative to the mean square of the dense output; ``"kl+mse"``, their sum, as the divergence alone has small
            gradients where the dense network is sure; ``"auto"``, the sum if a softmax follows the output, else MSE.
        max_steps: number of steps.
        lr: learning rate at the beginning.
        holdout: fraction of the calibration batches that is held out.
        check_every: number of steps between two evaluations on the held-out batches.
        seed: of the order of the batches.
    """

    loss: Literal["auto", "kl", "mse", "kl+mse"] = "auto"
    max_steps: int = 300
    lr: float = 1e-3
    holdout: float = 0.1
    check_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.loss not in ("auto", *LOSSES):
            names = ", ".join(map(repr, LOSSES))
            raise ValueError(f"Distillation.loss: expected 'auto', {names}, got {self.loss!r}")
        for name in ("max_steps", "lr", "check_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Distillation.{name}: expected > 0, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"Distillation.holdout: expected a fraction in (0, 1), got {self.holdout}")

    def recover(self, session: CalibrationSession, masks: Mapping[str, Tensor]) -> RecoveryReport:
        """Tune the pruned model in place; it stays as it is if nothing improves."""
        start, model, progress = time.perf_counter(), session.model, session.run.progress
        progress.activity = "recovering the pruned network"
        parameters = tuned_parameters(model, session.plan.layers)
        pruned, masks = masking.clone(model, list(parameters)), masking.divided(model, masks)
        with evaluation_mode(model), masking.restored_on_error(model, pruned):
            with session.processes.raise_together():
                task = _make_task(session, self.loss)
            training = len(task.targets) - max(1, round(self.holdout * len(task.targets)))
            before = best = task.mean_loss(range(training, len(task.targets)))
            best_values, best_step = pruned, 0
            with _only_trainable(model, parameters):
                optimizer = torch.optim.Adam(_groups(parameters), lr=self.lr)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_steps)
                for step, index in enumerate(self._order(training), 1):
                    progress.report("recovering", step / self.max_steps)
                    with torch.enable_grad():
                        task.loss(index).backward()
                    for name, parameter in parameters.items():
                        _finish_gradient(session, parameter, masks.get(name))
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                    masking.apply(model, masks)
                    if step % self.check_every and step != self.max_steps:
                        continue
                    now = task.mean_loss(range(training, len(task.targets)))
                    if now < best:
                        best, best_step, best_values = now, step, masking.clone(model, list(parameters))
            masking.assign(model, best_values)
        return RecoveryReport(task.name, before, best, best_step, time.perf_counter() - start)

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


def kl_and_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The sum of `kl_divergence` and `relative_squared_error`."""
    return kl_divergence(output, target) + relative_squared_error(output, target)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_divergence,
    "mse": relative_squared_error,
    "kl+mse": kl_and_squared_error,
}
"""Losses by name."""


def tuned_parameters(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, nn.Parameter]:
    """The parameters of the pruned layers, and scale and shift of all norms, by name."""
    names = [name for layer in layers.values() for name in layer.parameter_names()]
    for path, module in model.named_modules():
        if isinstance(module, NORMS):
            names += [joined(path, key) for key, _ in module.named_parameters(recurse=False)]
    reshard(model)
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names if name in parameters}


class _Task(NamedTuple):
    """What a distillation minimizes: the distance of the output from the dense network's, batch by batch."""

    session: CalibrationSession
    calibration_set: CalibrationSet  # batches are loaded one at a time
    output: NetworkOutput
    name: str  # of the loss
    targets: list[StoredTensors]  # outputs of the dense network

    def loss(self, index: int) -> Tensor:
        """The loss on one batch."""
        output = self.output.of(self.session.model, self.calibration_set[index])
        (target,) = self.targets[index].load()
        return LOSSES[self.name](output, target.to(output.device))

    def mean_loss(self, indices: Sequence[int]) -> float:
        """The mean loss over batches and processes."""
        losses = [float(self.loss(index)) for index in indices]
        return self.session.processes.mean(sum(losses) / len(losses))


def _make_task(session: CalibrationSession, loss: str) -> _Task:
    """Divide the calibration set into enough batches, find the output and record that of the dense network."""
    calibration_set = session.activations.calibration_set.divided(MIN_BATCHES)
    if len(calibration_set) < 2:
        raise ValueError("recover: expected at least two calibration batches, got one that cannot be divided")
    output = find_output(session.model, calibration_set[0])
    name = ("kl+mse" if output.is_logits else "mse") if loss == "auto" else loss
    pruned = session.snapshot()
    session.restore()
    try:
        targets = [session.run.store.put([output.of(session.model, batch).detach()]) for batch in calibration_set]
    finally:
        session.restore(pruned)
    return _Task(session, calibration_set, output, name, targets)


def _groups(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters in groups of an optimizer: those that are divided among processes, and the others."""
    groups = [[p for p in parameters.values() if is_sharded(p) == sharded] for sharded in (False, True)]
    return [{"params": group} for group in groups if group]


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
    gradient = local(parameter.grad)
    if not is_averaged(parameter):
        gradient.copy_(session.processes.sum(gradient) / session.processes.count)
    if mask is not None:
        gradient.masked_fill_(~local_part(mask.to(parameter.device), parameter), 0)
