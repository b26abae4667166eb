"""Damaged files of every kind end in a result or in one InputError: no traceback, hang or NaN.

The same cases each time; the slow suite has 5,000 of them, the default one a share.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.areas import every
from tests.fuzz.damage import Edit, edits
from tests.fuzz.harness import Area, run

FOREIGN = ("saelens-JumpReLU", "saelens-KANEncoder", "sparsify-TopK", "dictionary_learning-Gated")
"""Folders of other projects, of which the slow suite damages 1,008."""
FAST: dict[str, int] = {
    **{f"head.json of {name}": 12 for name in ("BatchTopK", "KANEncoder", "JumpReLU")},
    **{f"weights of {name}": 12 for name in ("BatchTopK", "KANEncoder", "JumpReLU")},
    **{f"config of {name}": 7 for name in FOREIGN},
    **{f"weights of {name}": 7 for name in FOREIGN},
    **{"neighbour of a run": 15, "seal, summary, config": 20, "tables of a run": 15},
    **{"checkpoint": 10, "run as evaluated": 15, "summary of a record": 8, "documents.csv": 8},
    **{"tables of a record": 15, "done files": 10, "cache manifest": 20, "judge replies": 25},
    **{"text: .jsonl": 10, "text: .txt": 8, "text: .json": 8, "text: .parquet": 12},
    **{"prompts": 12, "configs through plan": 0},
    **{"config.json of an LM": 6, "tokenizer of an LM": 6},
}
"""Cases in the default suite; in the slow one `SLOW` times as many."""
SLOW = 18
PLANS = 15
"""Cases in the slow suite of what takes longest, a whole `plan`."""


@pytest.fixture(scope="module")
def areas(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> dict[str, Area]:
    return every(tmp_path_factory.mktemp("fuzz"), tiny_lm_dir)


def try_(area: Area, cases: int) -> None:
    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(edits)
    def one(changes: list[Edit]) -> None:
        word, more = run(area, changes)
        assert word in ("accepted", "refused"), f"{area.name}: {word}: {more}"

    one()


def test_what_is_whole_is_read(areas: dict[str, Area]) -> None:
    """Else a case that is refused says nothing."""
    assert set(areas) == set(FAST)
    for area in areas.values():
        if FAST[area.name]:
            area.read()


@pytest.mark.parametrize("name", [name for name, cases in FAST.items() if cases])
def test_some_damage(name: str, areas: dict[str, Area]) -> None:
    try_(areas[name], FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_much_damage(name: str, areas: dict[str, Area]) -> None:
    try_(areas[name], FAST[name] * SLOW or PLANS)
