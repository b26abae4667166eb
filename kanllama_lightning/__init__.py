"""Sparse autoencoders with linear and KAN heads on a frozen Llama.

`from kanllama_lightning import load; sae = load("last")` is a trained head with its LM.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]  # noqa: F822 (made by __getattr__)


def __getattr__(name: str) -> Any:
    """`load`, whose libraries are only imported when it is asked for."""
    if name == "load":
        return importlib.import_module(f"{__name__}.interactive.loaded_sae").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
