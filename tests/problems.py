"""One table of layer problems, and an independent solver's optimum for each."""

from __future__ import annotations

import cvxpy as cp
import torch

from lightning_nettrim import LayerProblem


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
    XW = X @ W
    Y = XW.relu() if relu else XW
    V = None
    if options.get("cascade"):
        X = X + 0.05 * scale * normal(*X.shape)
        if bias:
            X[:, -1] = 1
        V = (X @ W).clamp(min=0)
    Omega = Y > 0 if relu else None
    miss = X @ W - Y if Omega is None else torch.where(Omega, X @ W - Y, 0)
    if options.get("per_neuron"):
        epsilon = torch.maximum(gain * Y.norm(dim=0).clamp(min=1e-3), 1.1**0.5 * miss.norm(dim=0))
    else:
        epsilon = torch.maximum(gain * Y.norm().clamp(min=1e-3), 1.1**0.5 * miss.norm())
    tensors = {"X": X, "Y": Y, "W": W, "epsilon": epsilon, "V": V, "penalty": penalty}
    return LayerProblem(**{k: t if t is None else t.to(dtype) for k, t in tensors.items()}, Omega=Omega)


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
    "one input": {"N": 1},
    "one neuron": {"M": 1},
    "tiny inputs": {"scale": 1e-4},
    "huge inputs": {"scale": 1e4},
}


def optimum(problem: LayerProblem) -> float:
    """The optimal objective by Clarabel, an interior-point method."""
    X, Y = problem.X.double().numpy(), problem.Y.double().numpy()
    W = cp.Variable(problem.W.shape)
    R = X @ W - Y
    constraints = []
    if problem.Omega is not None:
        Omega = problem.Omega.double().numpy()
        V = 0 if problem.V is None else problem.V.double().numpy()
        constraints.append(cp.multiply(1 - Omega, X @ W - V) <= 0)
        R = cp.multiply(Omega, R)
    if problem.balls == (-2,):
        constraints.append(cp.norm(R, 2, axis=0) <= problem.epsilon.double().numpy())
    else:
        constraints.append(cp.norm(cp.vec(R, order="F")) <= float(problem.epsilon))
    objective = cp.sum(cp.multiply(problem.weights.double().numpy(), cp.abs(W)))
    return cp.Problem(cp.Minimize(objective), constraints).solve(solver=cp.CLARABEL)
