"""Memory that is given back and asked for again is not made anew by the system."""

import subprocess
import sys

import pytest

WORK = """
import resource
from kanllama_lightning.console.allocator import keep_freed_memory
if KEEP:
    print(keep_freed_memory())
import torch
torch.set_num_threads(1)
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(8):  # both larger than what the C library ever keeps by itself
        a, b = torch.ones(16 << 20), torch.ones(12 << 20)
        del a, b
work()
before = pages()
work()
print(pages() - before)
"""


def test_freed_memory_is_kept():
    def faults(keep: bool) -> list[str]:
        work = f"KEEP = {keep}\n{WORK}"
        return subprocess.check_output([sys.executable, "-c", work], text=True).split()

    alone = int(faults(False)[-1])
    kept, with_it = faults(True)
    if kept != "True":
        pytest.skip("this C library keeps no more than it does by itself")
    assert int(with_it) < alone / 10
