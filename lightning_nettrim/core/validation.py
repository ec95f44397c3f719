"""Checks of a layer's problem before it is solved."""

from __future__ import annotations

import math

import torch

from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.reductions import all_finite


def validate(problem: LayerProblem) -> LayerProblem:
    """Return the problem after checking its shapes, dtypes, devices and values.

    Raises:
        ValueError: naming the tensor, what was expected and what was found.
    """
    with problem.processes.raise_together():
        _check_tensors(problem)
        _check_numbers(problem)
    return problem


def _check_tensors(problem: LayerProblem) -> None:
    batch, (P, N), M = problem.batch, problem.X.shape[-2:], problem.Y.shape[-1]
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        "X": ((*batch, P, N),),
        "Y": ((*batch, P, M),),
        "W": ((*batch, N, M),),
        "epsilon": (tuple(batch), (*batch, M)),
        "Omega": ((*batch, P, M),),
        "V": ((*batch, P, M),),
        "offset": ((*batch, P, M),),
        "penalty": ((N,),),
    }
    for name, shapes in expected.items():
        tensor = getattr(problem, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"{name}: expected shape {' or '.join(map(str, shapes))} to fit X {tuple(problem.X.shape)}"
                f" and Y {tuple(problem.Y.shape)}, got {tuple(tensor.shape)}"
            )
        dtype = torch.bool if name == "Omega" else problem.X.dtype
        streamed = name == "X" and tensor.device.type == "cpu"
        if tensor.dtype != dtype or (tensor.device != problem.Y.device and not streamed):
            raise ValueError(
                f"{name}: expected {dtype} on {problem.Y.device}, got {tensor.dtype} on {tensor.device}: convert it"
            )
        if name != "Omega" and not bool(all_finite(tensor)):
            raise ValueError(f"{name}: expected finite values, got NaN or Inf: check the inputs of this layer")


def _check_numbers(problem: LayerProblem) -> None:
    if problem.X.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"X: expected float32 or float64, got {problem.X.dtype}: convert the problem first")
    if problem.X.shape[-2] == 0:
        raise ValueError("X: expected at least one sample, got none: pass more batches")
    if math.prod(problem.batch) % problem.groups:
        raise ValueError(f"groups: expected a divisor of the batch {tuple(problem.batch)}, got {problem.groups}")
    if problem.epsilon is None and problem.sparsity is None:
        raise ValueError("epsilon, sparsity: expected one of them, got neither: set one")
    if problem.epsilon is not None and not bool((problem.epsilon > 0).all()):
        raise ValueError(f"epsilon: expected > 0, got {problem.epsilon.min():g}: set a positive radius")
    if problem.sparsity is not None and not 0 <= problem.sparsity < 1:
        raise ValueError(f"sparsity: expected a fraction in [0, 1), got {problem.sparsity}")
    if problem.penalty is not None and not bool((problem.penalty >= 0).all()):
        raise ValueError(f"penalty: expected weights >= 0, got {problem.penalty.min():g}")
