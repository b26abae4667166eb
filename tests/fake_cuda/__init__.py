"""A CUDA device that computes nothing: what a training step asks of a GPU, counted on a CPU."""
