"""Inference networks, energies and output spaces: single-device code."""
