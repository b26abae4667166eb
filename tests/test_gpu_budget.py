"""What a training step asks of a GPU, counted on a fake one: waits, launches, memory, traffic."""

import pytest

from tests.fake_cuda import device
from tests.fake_cuda.budgets import DEAD, WIDTHS, budgets, counted, exceeded

pytestmark = pytest.mark.skipif(device.unavailable() is not None, reason=f"{device.unavailable()}")

FIRST = ["BatchTopK", "Gated", "KANEncoder", "TopK"]
"""Heads that are counted."""
SAID = {
    "wait": "syncs",
    "copy": "copies",
    "launches": "launches",
    "memory": "peak_gib",
    "mismatch": "RuntimeError",
}
"""Faults of `planted`, and what is then over the budget."""


@pytest.mark.parametrize(
    ("names", "d_sae"),
    [
        pytest.param(FIRST, WIDTHS[0], id="first"),
    ],
)
def test_steps_keep_to_their_budgets(names: list[str], d_sae: int):
    """One process for all of them: importing takes longer than counting a head."""
    cases = [(name, d_sae, n_dead) for name in names for n_dead in DEAD]
    over = {
        case: exceeded(found, budgets()[case])
        for case, found in zip(cases, counted(*cases), strict=True)
    }
    assert {case: said for case, said in over.items() if said} == {}


def test_a_planted_fault_is_over_the_budget():
    budget = budgets()["TopK", WIDTHS[0], 0]
    found = counted(*((f"TopK+{fault}", WIDTHS[0], 0) for fault in SAID))
    for (fault, said), one in zip(SAID.items(), found, strict=True):
        over = exceeded(one, budget)
        assert any(line.startswith(said) for line in over), (fault, over)
