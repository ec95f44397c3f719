"""One table of layer problems, and an independent solver's optimum for each."""

from __future__ import annotations

import cvxpy as cp
import torch

from lightning_nettrim import LayerProblem
from lightning_nettrim.core.activation import Rectifier


def layer(P=200, N=40, M=12, *, gain=0.1, relu=True, bias=False, scale=1.0, dtype=torch.float64, seed=0, **options):
    """A random trained layer's program; see `VARIANTS` for the options."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = scale * normal(P, N)
    if options.get("rank"):
        X = X[:, : options["rank"]] @ normal(options["rank"], N)
    if options.get("dead"):
        X[:, :3] = 0
    if options.get("duplicate"):
        X[:, 1] = X[:, 0]
    if options.get("positive"):
        X = X.abs()
    W = normal(N, M) * (torch.rand(N, M, generator=generator, dtype=torch.float64) < 0.5) / N**0.5 / scale
    penalty = None
    if bias:
        X, W = torch.cat([X, torch.ones(P, 1, dtype=X.dtype)], 1), torch.cat([W, 0.3 * normal(1, M)])
        penalty = torch.ones(N + 1, dtype=X.dtype)
        penalty[-1] = 0
    if options.get("never"):
        X, W[:, 0] = X.abs(), -W[:, 0].abs() - 0.1
    if options.get("always"):
        X, W[:, 0] = X.abs(), W[:, 0].abs() + 0.1
    B = 0.5 * normal(P, M) if options.get("residual") else torch.zeros(1, dtype=X.dtype)
    rectifier = Rectifier(*options.get("bounds", ()))
    U = X @ W + B
    Y = rectifier(U) if relu else U
    V = None
    if options.get("cascade"):
        X = X + 0.05 * scale * normal(*X.shape)
        if bias:
            X[:, -1] = 1
        U = X @ W + B
        V = torch.where(rectifier.high <= Y, U.clamp(max=rectifier.high), U.clamp(min=rectifier.low))
    Omega = rectifier.active(Y) if relu else None
    miss = X @ W + B - Y if Omega is None else torch.where(Omega, X @ W + B - Y, 0)
    if options.get("per_neuron"):
        epsilon = torch.maximum(gain * Y.norm(dim=0).clamp(min=1e-3), 1.1**0.5 * miss.norm(dim=0))
    else:
        epsilon = torch.maximum(gain * Y.norm().clamp(min=1e-3), 1.1**0.5 * miss.norm())
    offset = B if options.get("residual") else None
    tensors = {"X": X, "Y": Y, "W": W, "epsilon": epsilon, "V": V, "penalty": penalty, "offset": offset}
    cast = {key: tensor if tensor is None else tensor.to(dtype) for key, tensor in tensors.items()}
    return LayerProblem(**cast, Omega=Omega, rectifier=rectifier)


VARIANTS = {
    "plain": {},
    "small ball": {"gain": 0.02},
    "large ball": {"gain": 0.5},
    "linear": {"relu": False},
    "free bias": {"bias": True},
    "linear with a free bias": {"relu": False, "bias": True},
    "cascade": {"cascade": True},
    "cascade with a free bias": {"cascade": True, "bias": True},
    "balls per neuron": {"per_neuron": True},
    "balls per neuron, free bias": {"per_neuron": True, "bias": True},
    "fewer samples than inputs": {"P": 25},
    "rank deficient": {"rank": 15},
    "dead inputs": {"dead": True},
    "duplicate inputs": {"duplicate": True},
    "positive inputs": {"positive": True, "bias": True},
    "a neuron that never fires": {"never": True},
    "a neuron that always fires": {"always": True},
    "never fires, free bias": {"never": True, "bias": True},
    "residual sum": {"residual": True, "bias": True},
    "residual sum, linear": {"residual": True, "relu": False},
    "residual sum, cascade": {"residual": True, "cascade": True},
    "two bounds": {"bounds": (0.0, 0.7)},
    "two bounds, free bias": {"bounds": (-0.5, 0.5), "bias": True},
    "two bounds, residual sum, cascade": {"bounds": (0.0, 1.0), "residual": True, "cascade": True, "bias": True},
    "one input": {"N": 1},
    "one neuron": {"M": 1},
    "tiny inputs": {"scale": 1e-4},
    "huge inputs": {"scale": 1e4},
}


def optimum(problem: LayerProblem) -> float:
    """The optimal objective by Clarabel, an interior-point method."""
    X, Y = problem.X.double().numpy(), problem.Y.double()
    B = torch.zeros_like(Y) if problem.offset is None else problem.offset.double()
    W = cp.Variable(problem.W.shape)
    R = X @ W + (B - Y).numpy()
    constraints = []
    if problem.Omega is not None:
        Omega, bounds = problem.Omega.double().numpy(), problem.rectifier
        V = Y if problem.V is None else problem.V.double()
        side = torch.where(bounds.high <= Y, -1.0, 1.0).double().numpy()
        constraints.append(cp.multiply((1 - Omega) * side, X @ W + (B - V).numpy()) <= 0)
        R = cp.multiply(Omega, R)
    if problem.ball_dims == (-2,):
        constraints.append(cp.norm(R, 2, axis=0) <= problem.epsilon.double().numpy())
    else:
        constraints.append(cp.norm(cp.vec(R, order="F")) <= float(problem.epsilon))
    objective = cp.sum(cp.multiply(problem.lambdas.double().numpy(), cp.abs(W)))
    return cp.Problem(cp.Minimize(objective), constraints).solve(solver=cp.CLARABEL)


def distance(problem: LayerProblem, W: torch.Tensor) -> torch.Tensor:
    """dist(XW + B, K), entry by entry: to Y on Ω, beyond the limit elsewhere."""
    U = problem.X @ W + (0 if problem.offset is None else problem.offset)
    if problem.Omega is None:
        return (U - problem.Y).norm()
    V = problem.Y if problem.V is None else problem.V
    beyond = torch.where(problem.rectifier.high <= problem.Y, V - U, U - V).clamp(min=0)
    return torch.where(problem.Omega, U - problem.Y, beyond).norm()
