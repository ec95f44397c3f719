"""Prune a trained network without retraining it: Net-Trim for PyTorch Lightning."""

from lightning_nettrim.callbacks import NetTrim
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.solvers import ADMM, Magnitude, Solution, Solver, Status, path, refit, solve
from lightning_nettrim.trim import trim

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "LayerProblem",
    "LayerReport",
    "Magnitude",
    "NetTrim",
    "Solution",
    "Solver",
    "Status",
    "TrimResult",
    "path",
    "refit",
    "solve",
    "trim",
]
