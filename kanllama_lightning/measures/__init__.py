"""What is measured of a head: metrics, directions, contexts, matches with known concepts."""
