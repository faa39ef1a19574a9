"""Triton kernels, each with its plain reference; imports torch and triton only."""
