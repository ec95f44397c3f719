"""Prune a trained network without retraining it: Net-Trim for PyTorch Lightning."""

from lightning_nettrim.callbacks import NetTrim
from lightning_nettrim.pattern import Pattern
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.solvers import (
    ADMM,
    Cardinality,
    Magnitude,
    Solution,
    Solver,
    SparseGPT,
    Status,
    Wanda,
    path,
    refit,
    solve,
)
from lightning_nettrim.trim import trim

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "Cardinality",
    "LayerProblem",
    "LayerReport",
    "Magnitude",
    "NetTrim",
    "Pattern",
    "Solution",
    "Solver",
    "SparseGPT",
    "Status",
    "TrimResult",
    "Wanda",
    "path",
    "refit",
    "solve",
    "trim",
]
