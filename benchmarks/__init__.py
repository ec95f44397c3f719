"""Measurements of lightning_nettrim beside its peers: ``python -m benchmarks.run``."""
