"""Strategies that distribute a common sparsity over layers."""
