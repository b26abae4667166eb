"""Activations written to disk once, and read by any number of runs in the place of the LM."""
