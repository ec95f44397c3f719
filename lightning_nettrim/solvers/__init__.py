"""Solvers: each turns a `LayerProblem` into a `Solution`."""

from lightning_nettrim.solvers.admm import ADMM
from lightning_nettrim.solvers.base import IterativeSolver, Solution, Solver, Status, solve
from lightning_nettrim.solvers.baselines import Magnitude, SparseGPT, Wanda
from lightning_nettrim.solvers.cardinality import Cardinality
from lightning_nettrim.solvers.epsilon_search import sparsest_within
from lightning_nettrim.solvers.path import solve_path
from lightning_nettrim.solvers.refitting import refit

__all__ = [
    "ADMM",
    "Cardinality",
    "IterativeSolver",
    "Magnitude",
    "Solution",
    "Solver",
    "SparseGPT",
    "Status",
    "Wanda",
    "sparsest_within",
    "solve_path",
    "refit",
    "solve",
]
