"""All questions about a head together, to a judge that knows where each latent fires."""

import asyncio
import json
import random
import re
from pathlib import Path

import pytest

from kanllama_lightning.judge.budget import Prices
from kanllama_lightning.judge.client import Judge, JudgeSettings
from kanllama_lightning.judge.endpoint import Endpoint, discreet
from kanllama_lightning.judge.panel import HEAD, RANDOM, SHUFFLED, Verdict, estimate, hear
from kanllama_lightning.judge.protocol import Case
from tests.judge_server import Body, JudgeServer, is_explain

PRICES = Prices(2.5, 10.0)


def case(latent: int, n: int = 12) -> Case:
    """Fires on its own word; the silent windows have other words."""
    truth = [i < n for i in range(2 * n)]
    random.Random(latent).shuffle(truth)
    detect = [f'"x{i} word{latent if fires else 99}."' for i, fires in enumerate(truth)]
    explain = [f'strength 9/10: "a{i} <<word{latent}>>"' for i in range(10)]
    return Case(latent, 0.1, explain, detect, truth)


def knows(body: Body) -> str:
    lines = body["messages"][1]["content"].splitlines()
    if is_explain(body):
        (word,) = {re.findall("<<(.*?)>>", line)[0] for line in lines[1:]}
        return json.dumps({"category": "low_level", "score": 5, "explanation": word})
    word = re.findall('"(.*)"', lines[0])[0]
    return json.dumps({"labels": [int(f"{word}." in line) for line in lines[2:]]})


def run(url: str, folder: Path, cases: dict[str, list[Case]], n: int) -> tuple[list[Verdict], int]:
    async def go() -> tuple[list[Verdict], int]:
        manner = JudgeSettings("m", 100, 0, 5, 5.0, 2)
        async with Judge(Endpoint(url, "base_url"), manner, folder, PRICES, 10.0) as judge:
            left = estimate(judge, PRICES, 100, dict(cases), n)
            return await hear(judge, dict(cases), n, left.calls), left.calls

    with discreet():
        return asyncio.run(go())


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_who_knows_is_always_right_and_by_anothers_explanation_never(tmp_path: Path) -> None:
    cases = {HEAD: [case(i) for i in range(6)], RANDOM: [case(i + 50) for i in range(2)]}
    with JudgeServer(knows) as server:
        verdicts, calls = run(server.url, tmp_path, cases, 4)
        assert calls == len(server.requests) == 8 * (1 + 3) + 4 * 3
        again, left = run(server.url, tmp_path, cases, 4)
        assert again == verdicts
        assert left == 0
        assert len(server.requests) == calls
    assert [v.subject for v in verdicts] == [HEAD] * 6 + [RANDOM] * 2 + [SHUFFLED] * 4
    for v in verdicts:
        assert v.status == "ok"
        assert v.detection == (0.5 if v.subject == SHUFFLED else 1.0)
        assert v.score == (None if v.subject == SHUFFLED else 5)
        assert (v.explanation == f"word{v.latent}") == (v.subject != SHUFFLED)
        assert (v.n_explain, v.n_detect) == (10, 24)


def test_who_always_says_yes_or_no_is_at_chance(tmp_path: Path) -> None:
    for label in (0, 1):

        def same(body: Body, label: int = label) -> str:
            lines = body["messages"][1]["content"].splitlines()
            return (
                knows(body)
                if is_explain(body)
                else json.dumps({"labels": [label] * len(lines[2:])})
            )

        with JudgeServer(same) as server:
            verdicts, _ = run(server.url, tmp_path / str(label), {HEAD: [case(1), case(2)]}, 0)
        assert [v.detection for v in verdicts] == [0.5, 0.5]


def test_one_latent_has_nobody_to_exchange_with(tmp_path: Path) -> None:
    with JudgeServer(knows) as server:
        verdicts, calls = run(server.url, tmp_path, {HEAD: [case(1)]}, 1)
        assert len(server.requests) == calls == 4
    assert [v.subject for v in verdicts] == [HEAD]
