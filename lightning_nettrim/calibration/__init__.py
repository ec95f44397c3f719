"""Calibration: sampling of inputs, recording of activations, tracing of what follows each layer."""
