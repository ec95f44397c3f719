"""Benchmarks of lightning_nettrim and of other methods: ``python -m benchmarks.run``."""
