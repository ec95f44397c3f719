"""Pruning a model with PyTorch alone: options, plan, calibration session, one layer, all layers, results."""
