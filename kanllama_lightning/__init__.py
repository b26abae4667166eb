"""Sparse autoencoders with linear and KAN heads on a frozen Llama."""

__version__ = "0.1.0"
