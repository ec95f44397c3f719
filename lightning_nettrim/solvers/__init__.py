"""Solvers: each turns a `LayerProblem` into a `Solution`."""

from lightning_nettrim.solvers.admm import ADMM
from lightning_nettrim.solvers.base import IterativeSolver, Solution, Solver, Status, solve
from lightning_nettrim.solvers.baselines import Magnitude, SparseGPT, Wanda
from lightning_nettrim.solvers.cardinality import Cardinality
from lightning_nettrim.solvers.fewest import fewest
from lightning_nettrim.solvers.path import path
from lightning_nettrim.solvers.refit import refit

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
    "fewest",
    "path",
    "refit",
    "solve",
]
