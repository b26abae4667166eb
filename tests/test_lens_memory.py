"""Slow: the logit lens at the size of Llama 3.2 1B with 16,384 latents, within a few GiB."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LATENTS, WIDTH, VOCAB = 16_384, 2048, 128_256
GIVEN_GIB = (WIDTH * VOCAB * 2 + LATENTS * WIDTH * 4) / 2**30
"""The unembedding in bf16 and the directions in fp32."""
PROGRAM = f"""
import json, resource, time, torch
from kanllama_lightning.functional.lens import largest_cosine, logit_lens

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

libraries = peak()
g = torch.Generator().manual_seed(0)
unembedding = torch.empty({VOCAB}, {WIDTH}, dtype=torch.bfloat16).normal_(generator=g).T
directions = torch.randn({LATENTS}, {WIDTH}, generator=g)
began = time.perf_counter()
found = logit_lens(directions, torch.ones({WIDTH}), unembedding)
lens_s = time.perf_counter() - began
cosines = largest_cosine(directions)
print(json.dumps({{
    "above": peak() - libraries,
    "lens_s": lens_s,
    "cosine_s": time.perf_counter() - began - lens_s,
    "kurtosis": found.kurtosis.mean().item(),
    "cosine": cosines.mean().item(),
}}))
"""


def test_llama_1b_in_blocks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sys.stdout.write(f"\nlens at 1B: {found}\n")
    assert found["above"] - GIVEN_GIB < 4, "GiB, beyond what was given"
    assert found["kurtosis"] == pytest.approx(3, abs=0.02)
    assert 0.07 < found["cosine"] < 0.12  # METHODS C: sqrt(2 ln m / d) is 0.10
