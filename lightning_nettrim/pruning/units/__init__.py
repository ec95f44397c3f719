"""Pruning of whole units: which belong together, how many and which are kept."""
