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
TopK                  16384 5/5    0/0    163/224     0.82/0.83     15.6/19.6
BatchTopK             16384 8/8    0/0    176/237     1.13/1.13     16.7/20.7
KANEncoder            16384 8/8    0/0    261/336     1.52/1.52     40.5/45.9
Gated                 16384 4/4    0/0    1421/1480   3.21/3.46     28.2/32.1
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
