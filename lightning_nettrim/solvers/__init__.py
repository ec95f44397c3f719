"""Solvers: each turns a `LayerProblem` into a `Solution`."""

from lightning_nettrim.solvers.admm import ADMM
from lightning_nettrim.solvers.base import IterativeSolver, Solution, Solver, Status, solve
from lightning_nettrim.solvers.baselines import Magnitude
from lightning_nettrim.solvers.path import path
from lightning_nettrim.solvers.refit import refit

__all__ = ["ADMM", "IterativeSolver", "Magnitude", "Solution", "Solver", "Status", "path", "refit", "solve"]
