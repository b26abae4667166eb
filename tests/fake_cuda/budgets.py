"""What a training step may ask of a GPU: the one table, and whether a step keeps to it.

Width 2,048, batch 4,096, L0 64, bf16-mixed, one process. Numbers before a stroke are without dead
latents, those behind it with 2,048. They are what was counted, rounded up: lower them with every
reduction (`python -m tests.fake_cuda.budgets` counts anew and prints the rows).
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DEAD = (0, 2048)
WIDTHS = (16_384, 65_536)

TABLE = """
BatchTopK             16384 0/0    0/0    141/198     0.41/0.48     15.9/18.2
BentDictionary        16384 0/0    0/0    247/374     0.53/0.57     25.5/28.6
CurvedDictionary      16384 0/0    0/0    231/340     1.42/3.57     74.7/85.2
DenseKANReLU          16384 0/0    0/0    255/255     1.59/1.59     46.0/46.0
DenseOnlyKAN          16384 0/0    0/0    587/587     4.0/4.0       237.3/237.3
FrozenDecoder         16384 0/0    0/0    133/187     0.41/0.47     11.5/13.6
FrozenEncoder         16384 0/0    0/0    130/174     0.41/0.45     10.5/12.2
GainLatent            16384 0/0    0/0    164/221     0.41/0.49     16.0/18.2
Gated                 16384 0/0    0/0    336/391     1.69/1.72     29.0/31.0
JumpReLU              16384 0/0    0/0    368/426     1.38/1.41     26.2/28.4
KANDirect             16384 0/0    0/0    175/231     1.71/1.85     50.2/53.9
KANEncoder            16384 0/0    0/0    234/303     0.97/0.97     38.7/41.6
KANReLUDense          16384 0/0    0/0    442/570     1.36/1.67     60.3/65.6
MLPEncoder            16384 0/0    0/0    163/232     0.82/0.82     28.8/32.0
Matryoshka            16384 0/0    0/0    187/244     0.63/0.74     27.0/29.2
OnlyKAN               16384 0/0    0/0    265/373     2.81/3.8      108.9/121.0
SoftlyFrozenDecoder   16384 0/0    0/0    156/213     0.52/0.52     19.7/21.9
SplineHidden          16384 0/0    0/0    161/230     0.85/0.85     28.5/31.7
SplineInput           16384 0/0    0/0    150/210     0.44/0.52     18.6/21.0
SplineLatent          16384 0/0    0/0    274/331     0.41/0.49     16.2/18.4
Standard              16384 0/0    0/0    241/299     1.19/1.22     17.8/20.0
TopK                  16384 0/0    0/0    120/177     0.41/0.48     15.1/17.3
WideBatchTopK         16384 0/0    0/0    147/204     0.74/0.74     21.8/24.0
BatchTopK             65536 0/0    0/0    150/207     1.35/1.35     32.4/34.7
Gated                 65536 0/0    0/0    767/822     3.57/3.6      141.5/143.6
KANEncoder            65536 0/0    0/0    243/312     2.41/2.41     62.1/65.0
TopK                  65536 0/0    0/0    129/186     1.35/1.35     29.2/31.4
"""
# head, latents, host waits and blocking copies in a step that does not log, launches (the LM's
# apart), GiB held at the peak beyond weights, moments, buffer and LM (gradients are in it), GB of
# operands read and written


class Budget(NamedTuple):
    """The most of a step."""

    syncs: int
    copies: int
    launches: int
    peak_gib: float
    traffic_gb: float


def budgets() -> dict[tuple[str, int, int], Budget]:
    """By head, number of latents and number of dead ones."""
    found = {}
    for line in TABLE.strip().splitlines():
        head, d_sae, *columns = line.split()
        for i, n_dead in enumerate(DEAD):
            cells = [float(column.split("/")[i]) for column in columns]
            whole = [int(cell) for cell in cells[:3]]
            found[head, int(d_sae), n_dead] = Budget(*whole, *cells[3:])
    return found


def counted(*cases: tuple[str, int, int]) -> list[dict[str, Any]]:
    """What steps ask of the fake device, in a process of its own.

    Args:
        cases: Head (`HEAD+FAULT` with one of `planted.FAULTS`), number of latents, of dead ones.
    """
    args = [str(part) for case in cases for part in case]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.step", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(cases):
        raise RuntimeError(f"{done.returncode}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in lines]


def exceeded(found: dict[str, Any], budget: Budget) -> list[str]:
    """What is over a budget, in words; nothing if all is within."""
    if "error" in found:
        return [f"{found['error']}\n{found['trace']}"]
    over = []
    for name, most in budget._asdict().items():
        if not found[name] <= most:
            where = "at_peak" if name == "peak_gib" else f"where_{name.removesuffix('_gb')}"
            places = [step.get(where) for step in found["steps"]]
            over.append(f"{name} {found[name]} and not {most}: {places}")
    return over


def rows(found: list[dict[str, Any]]) -> str:
    """Rows of the table that what was counted would just keep to."""
    made = []
    for without, dead in zip(found[::2], found[1::2], strict=True):
        if "error" in without or "error" in dead:
            made.append(f"{without['head']} {without['d_sae']} FAILED {without} {dead}")
            continue
        cells = [f"{without[name]}/{dead[name]}" for name in ("syncs", "copies", "launches")]
        for name, digits in (("peak_gib", 100), ("traffic_gb", 10)):
            both = [math.ceil(one[name] * digits) / digits for one in (without, dead)]
            cells.append(f"{both[0]}/{both[1]}")
        made.append(
            f"{without['head']:20} {without['d_sae']:6} {cells[0]:6} {cells[1]:6} {cells[2]:11} "
            f"{cells[3]:13} {cells[4]}".rstrip()
        )
    return "\n".join(made)


def main(names: list[str]) -> None:
    """Print the rows of these heads, or of all that are in the table."""
    known = names or list(dict.fromkeys(head for head, _, _ in budgets()))
    for d_sae in WIDTHS:
        cases = [(name, d_sae, n_dead) for name in known for n_dead in DEAD]
        print(rows(counted(*cases)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
