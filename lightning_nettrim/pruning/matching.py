"""Matching: parameters are tuned until outputs are close to those of the dense network, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nettrim.layers import masking
from lightning_nettrim.runtime.distributed import ProcessGroup
from lightning_nettrim.runtime.offload import StoredTensors
from lightning_nettrim.runtime.sharded import is_averaged, is_sharded, local, local_part


class Matching(NamedTuple):
    """Outputs, those of the dense network, and their distance.

    Attributes:
        output: ``index of a batch → output``, with gradients if they are enabled.
        targets: outputs of the dense network for each batch.
        loss: name of the distance, a key of `LOSSES`.
        held_out: number of batches, the last ones, that are not used for tuning.
    """

    output: Callable[[int], Tensor]
    targets: Sequence[StoredTensors]
    loss: str
    held_out: int

    @property
    def training(self) -> int:
        """Number of batches, the first ones, that are used for tuning."""
        return len(self.targets) - self.held_out

    def error(self, index: int) -> Tensor:
        """The distance on one batch."""
        output = self.output(index)
        (target,) = self.targets[index].load()
        return LOSSES[self.loss](output, target.to(output.device))

    def held_out_error(self, processes: ProcessGroup) -> float:
        """The mean distance over the batches that are held out, of all processes."""
        errors = [float(self.error(index)) for index in range(self.training, len(self.targets))]
        return processes.mean(sum(errors) / len(errors))


class Schedule(NamedTuple):
    """The steps of `match`: Adam with a cosine schedule of the learning rate.

    Attributes:
        max_steps: number of steps.
        lr: learning rate at the beginning.
        check_every: number of steps between two evaluations on the held-out batches.
        seed: of the order of the batches.
    """

    max_steps: int
    lr: float
    check_every: int
    seed: int

    def order(self, batches: int) -> list[int]:
        """Indices of the batches for all steps, shuffled anew in each pass."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        while len(order) < self.max_steps:
            order += torch.randperm(batches, generator=generator).tolist()
        return order[: self.max_steps]


class Improvement(NamedTuple):
    """What `match` has changed.

    Attributes:
        before: error on the held-out batches.
        after: the same of the best iterate; equal to ``before`` if nothing has improved.
        steps: number of steps up to the best iterate.
    """

    before: float
    after: float
    steps: int


def match(
    model: nn.Module,
    matching: Matching,
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    schedule: Schedule,
    processes: ProcessGroup,
    report: Callable[[float], None],
) -> Improvement:
    """Tune parameters in place; the iterate with the lowest error on the held-out batches is kept, or the first one.

    Args:
        model: the model, in evaluation mode.
        matching: what is minimized.
        parameters: the parameters that are tuned, by name.
        masks: ``{parameter name: bool tensor}``, True where the weight is kept; others stay zero.
        schedule: the steps.
        processes: each with batches of its own; gradients and errors are means over all processes.
        report: called with the finished fraction.
    """
    masks = {name: mask for name, mask in masks.items() if name in parameters}
    best_values, best_step = masking.clone(model, list(parameters)), 0
    before = best = matching.held_out_error(processes)
    with _only_trainable(model, parameters):
        optimizer = torch.optim.Adam(_groups(parameters), lr=schedule.lr)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.max_steps)
        for step, index in enumerate(schedule.order(matching.training), 1):
            report(step / schedule.max_steps)
            with torch.enable_grad():
                matching.error(index).backward()
            for name, parameter in parameters.items():
                _finish_gradient(processes, parameter, masks.get(name))
            optimizer.step()
            cosine.step()
            optimizer.zero_grad(set_to_none=True)
            masking.apply(model, masks)
            if step % schedule.check_every and step != schedule.max_steps:
                continue
            now = matching.held_out_error(processes)
            if now < best:
                best, best_step, best_values = now, step, masking.clone(model, list(parameters))
    masking.assign(model, best_values)
    return Improvement(before, best, best_step)


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
"""Distances of outputs by name."""


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


def _groups(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters in groups of an optimizer: those that are divided among processes, and the others."""
    groups = [[p for p in parameters.values() if is_sharded(p) == sharded] for sharded in (False, True)]
    return [{"params": group} for group in groups if group]


def _finish_gradient(processes: ProcessGroup, parameter: nn.Parameter, mask: Tensor | None) -> None:
    """The gradient averaged over processes, zero where the mask does not keep the weight."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = local(parameter.grad)
    if not is_averaged(parameter):
        gradient.copy_(processes.sum(gradient) / processes.count)
    if mask is not None:
        gradient.masked_fill_(~local_part(mask.to(parameter.device), parameter), 0)
