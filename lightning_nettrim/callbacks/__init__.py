"""Lightning callbacks."""

from lightning_nettrim.callbacks.coreset_pruning import CoresetPruning
from lightning_nettrim.callbacks.nettrim import NetTrim

__all__ = ["CoresetPruning", "NetTrim"]
