"""Sparse autoencoders with linear and KAN heads on a frozen Llama."""
