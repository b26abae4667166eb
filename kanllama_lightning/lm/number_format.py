"""Which number format the LM runs in fastest on this machine."""

import time
from typing import NamedTuple

import torch

AUTO = "auto"
WIDTH = 768
ROWS = 512
REPEATS = 5
WORTH = 1.2
"""So many times as fast bfloat16 has to be: what is nearly as fast is not worth its rounding."""


class Format(NamedTuple):
    """A number format, and why."""

    dtype: str
    why: str


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fastest() -> Format:
    """bfloat16 on a GPU, and on a CPU where its products are found to be faster; else float32.

    The products take some milliseconds, and only where the CPU has instructions for them.
    """
    if torch.cuda.is_available():
        return Format("bfloat16", "a GPU is there")
    if not cpu_has_bf16():
        return Format("float32", "this CPU has no instructions for bfloat16")
    times = speedup()
    dtype = "bfloat16" if times >= WORTH else "float32"
    return Format(dtype, f"products in bfloat16 are {times:.1f} times as fast here")


@torch.no_grad()
def speedup() -> float:
    """Seconds of a product in float32 over those of it in bfloat16, on the CPU."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(ROWS, WIDTH, dtype=dtype)
        weight = torch.ones(4 * WIDTH, WIDTH, dtype=dtype)
        torch.nn.functional.linear(x, weight)
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds.append(time.perf_counter() - began)
        best[dtype] = min(seconds)
    return best[torch.float32] / best[torch.bfloat16]
