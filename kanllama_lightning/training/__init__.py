"""One training step, and everything that lasts as long as a run."""
