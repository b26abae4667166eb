"""The folder of a run: what it holds, what state it is in, its checkpoints."""
