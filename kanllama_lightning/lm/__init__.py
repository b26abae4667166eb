"""The frozen language model: its files, its hook points, its run with something put in."""
