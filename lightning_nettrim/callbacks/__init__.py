"""Lightning callbacks."""

from lightning_nettrim.callbacks.nettrim import NetTrim

__all__ = ["NetTrim"]
