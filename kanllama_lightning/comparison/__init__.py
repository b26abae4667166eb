"""What finished evaluations say about each other: like for like, with intervals.

Reads `eval/summary.json` and `eval/documents.csv` of each run and computes nothing anew. L0, FVU,
losses and their intervals come from the sums per document, so that they belong together.
"""

from kanllama_lightning.comparison.alike import conflicts
from kanllama_lightning.comparison.charts import figures
from kanllama_lightning.comparison.comparison_page import render, write
from kanllama_lightning.comparison.loading import Evaluated, labelled, load
from kanllama_lightning.comparison.tables import (
    MATCHED,
    PAIR,
    Seeds,
    differences,
    seed_table,
    seeds,
    table,
)

__all__ = [
    "MATCHED",
    "PAIR",
    "Evaluated",
    "Seeds",
    "conflicts",
    "differences",
    "figures",
    "labelled",
    "load",
    "render",
    "seed_table",
    "seeds",
    "table",
    "write",
]
