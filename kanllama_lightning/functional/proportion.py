"""How sure a share of a few cases is."""

import math

QUANTILE = 1.959963984540054
"""Of the normal distribution, for 95 %."""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of hits / n; NaN of no cases.

    Unlike a resampled one it has a width where all or none of a few cases are hits.

    Args:
        hits: From 0 to n.
        n: Cases.
    """
    if n == 0:
        return math.nan, math.nan
    share, z = hits / n, QUANTILE**2 / n
    centre = share + z / 2
    half = QUANTILE * math.sqrt((share * (1 - share) + z / 4) / n)
    low, high = (centre - half) / (1 + z), (centre + half) / (1 + z)
    return (low if hits else 0.0), (high if hits < n else 1.0)
