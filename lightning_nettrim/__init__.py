"""Prune a trained network without retraining it: Net-Trim for PyTorch Lightning."""

from lightning_nettrim.callbacks import CoresetPruning, NetTrim
from lightning_nettrim.compaction import CompactionReport, CompactResult, compact, load_compact
from lightning_nettrim.core.pattern import (
    Blocks,
    Neuron,
    NOfM,
    Pattern,
    PerNeuron,
    Units,
    Unstructured,
    parse_pattern,
)
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.layers import Layer, LayerCall, register_layer
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.epsilon import EpsilonAllocation
from lightning_nettrim.pruning.allocation.magnitude import MagnitudeAllocation
from lightning_nettrim.pruning.allocation.network_error import GlobalAllocation
from lightning_nettrim.pruning.allocation.uniform import UniformAllocation
from lightning_nettrim.pruning.api import prune_model, trim
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.recovery import Distillation, Recovery
from lightning_nettrim.pruning.results import LayerReport, PruningResult, SkippedLayer, Trial
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.session_setup import CalibrationSource
from lightning_nettrim.pruning.units.base import KeptUnits, MeasuredUnits, UnitSelection
from lightning_nettrim.pruning.units.coreset import Coreset
from lightning_nettrim.pruning.units.elimination import Elimination
from lightning_nettrim.solvers import (
    ADMM,
    Cardinality,
    Magnitude,
    Solution,
    Solver,
    SparseGPT,
    Status,
    Wanda,
    refit,
    solve,
    solve_path,
)

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "Allocation",
    "Blocks",
    "Budget",
    "CalibrationSession",
    "CalibrationSource",
    "Cardinality",
    "CompactResult",
    "CompactionReport",
    "Coreset",
    "CoresetPruning",
    "Distillation",
    "Elimination",
    "EpsilonAllocation",
    "GlobalAllocation",
    "KeptUnits",
    "Layer",
    "LayerCall",
    "LayerProblem",
    "LayerReport",
    "Magnitude",
    "MagnitudeAllocation",
    "MeasuredUnits",
    "NOfM",
    "NetTrim",
    "Neuron",
    "Pattern",
    "PerNeuron",
    "PruningConfig",
    "PruningResult",
    "Recovery",
    "SkippedLayer",
    "Solution",
    "Solver",
    "SparseGPT",
    "Status",
    "Trial",
    "UniformAllocation",
    "UnitSelection",
    "Units",
    "Unstructured",
    "Wanda",
    "compact",
    "load_compact",
    "parse_pattern",
    "prune_model",
    "refit",
    "register_layer",
    "solve",
    "solve_path",
    "trim",
]
