"""What a training step asks of a GPU, counted on a fake one: waits, launches, memory, traffic."""

import pytest

from kanllama_lightning import heads
from tests.fake_cuda import device
from tests.fake_cuda.budgets import DEAD, WIDTHS, budgets, counted, exceeded

pytestmark = pytest.mark.skipif(device.unavailable() is not None, reason=f"{device.unavailable()}")

NOT_TRAINED = {"SAEHead", "PCA", "LinearMap"}
ALL = sorted(set(heads.__all__) - NOT_TRAINED)
FIRST = ["BatchTopK", "Gated", "KANEncoder", "TopK"]
"""Heads that are counted whenever tests run, at the smaller width; the others take minutes."""
OTHERS = [name for name in ALL if name not in FIRST]
SAID = {
    "wait": "syncs",
    "copy": "copies",
    "launches": "launches",
    "memory": "peak_gib",
    "mismatch": "FakeTensorDeviceMismatchError",
}
"""Faults of `planted`, and what is then over the budget."""


@pytest.mark.parametrize(
    ("names", "d_sae"),
    [
        pytest.param(FIRST, WIDTHS[0], id="first"),
        pytest.param(FIRST, WIDTHS[1], id="wide", marks=pytest.mark.slow),
        pytest.param(OTHERS, WIDTHS[0], id="others", marks=pytest.mark.slow),
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


def test_every_head_has_a_budget():
    cases = [(head, WIDTHS[0]) for head in ALL] + [(head, WIDTHS[1]) for head in FIRST]
    assert set(budgets()) == {(*case, n_dead) for case in cases for n_dead in DEAD}


def test_between_steps_that_log_nothing_is_waited_for():
    assert {(b.syncs, b.copies) for b in budgets().values()} == {(0, 0)}


def test_a_planted_fault_is_over_the_budget():
    budget = budgets()["TopK", WIDTHS[0], 0]
    found = counted(*((f"TopK+{fault}", WIDTHS[0], 0) for fault in SAID))
    for (fault, said), one in zip(SAID.items(), found, strict=True):
        over = exceeded(one, budget)
        assert any(line.startswith(said) for line in over), (fault, over)
