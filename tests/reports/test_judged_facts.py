"""Latents of the embedded world before a judge that knows which facts hold in its stories."""

import json
import random
import re
from bisect import bisect_right
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from kanllama_lightning.cli.evaluate_command import main
from kanllama_lightning.embedded import Story, story
from tests.judge_server import Body, JudgeServer, is_explain
from tests.test_configs import ROOT
from train import main as train

STORIES, SEED = 2000, 7
WORD = re.compile(r"\w+|[^\w\s]")
STRETCHES = 1500
"""Random stretches of text from which the judge knows how common something is."""
BAR = 0.9
"""Balanced accuracy an explanation must reach on windows it was not made from."""
NOTHING = "I cannot tell"


class Window(NamedTuple):
    """What the judge sees in a window, word by word."""

    said: list[set[str]]
    """What can be said of each word: the facts that hold on it, and which word it is."""
    marked: list[bool]

    def anywhere(self) -> set[str]:
        """What can be said of any word."""
        return set().union(*self.said)

    def where_marked(self) -> set[str]:
        """What can be said of a marked word."""
        return set().union(*(s for s, m in zip(self.said, self.marked, strict=True) if m))


def read(line: str) -> tuple[str, list[bool]]:
    """The text of a window as it was before it was quoted, and which letters are marked."""
    quoted = line[line.index('"') + 1 : -1]
    text, marks, inside = "", [], False
    for part in re.findall(r"<<|>>|\\.|[^\\]", quoted):
        if part in ("<<", ">>"):
            inside = part == "<<"
            continue
        letter = {"\\n": "\n"}.get(part, part[-1])
        text += letter
        marks.append(inside)
    return text, marks


class KnowsFacts:
    """Explains by one fact or word if the evidence for it holds up, else says it cannot tell.

    It takes what is found on marked words more often, over what is found anyway in a stretch of
    text of that length, than anything else. An explanation made from every other window is tried
    on the rest, and the other way round: if it would tell them from random stretches with a
    balanced accuracy below `bar`, the judge says that there is no pattern, and sees none in any
    window, which is chance. It does not learn whose latent it is asked about.

    Args:
        told: All stories that windows are of.
        bar: Balanced accuracy below which it does not explain; 0: it always does.
    """

    def __init__(self, told: list[Story], bar: float) -> None:
        self.told, self.bar = told, bar
        self.text = "\0".join(s.text for s in told)
        ends = [0]
        for s in told:
            ends.append(ends[-1] + len(s.text) + 1)
        self.begins = ends[:-1]
        self.lost = 0
        self.said = cache(self._said)
        self.common = cache(self._common)

    def _said(self, text: str) -> list[tuple[int, int, set[str]]]:
        """Begin, end, and what can be said, of each word."""
        at = self.text.find(text)
        self.lost += at < 0
        number = bisect_right(self.begins, at) - 1
        words = [(m.start(), m.end(), {f"word:{m[0].lower()}"}) for m in WORD.finditer(text)]
        for fact in self.told[number].facts:
            first, last = (self.begins[number] + end - at for end in (fact.start, fact.end))
            if last <= 0 or first >= len(text):
                continue
            for begin, end, found in words:
                if first < end and begin < last:
                    found.add(fact.name)
        return words

    def _common(self, length: int) -> dict[str, float]:
        """How often each thing can be said somewhere in a stretch of so many letters."""
        draw, found, n = random.Random(0), defaultdict[str, float](float), 0
        while n < STRETCHES:
            at = draw.randrange(len(self.text) - length)
            text = self.text[at : at + length]
            if "\0" in text:
                continue
            n += 1
            for name in self.window(text, [False] * length).anywhere():
                found[name] += 1 / STRETCHES
        return found

    def window(self, text: str, marks: list[bool]) -> Window:
        """A window as the judge sees it."""
        words = self.said(text)
        return Window([found for _, _, found in words], [any(marks[a:b]) for a, b, _ in words])

    def best(self, windows: list[Window], common: dict[str, float]) -> str:
        """What sets the marked words apart."""
        found = defaultdict[str, int](int)
        for window in windows:
            for name in window.where_marked():
                found[name] += 1

        def lift(name: str) -> float:
            return found[name] / len(windows) - common.get(name, 0.0)

        return max(sorted(found), key=lift, default=NOTHING)

    def explain(self, windows: list[Window], length: int) -> str:
        """One thing that can be said of words, or NOTHING."""
        common = self.common(max(5, 5 * round(length / 5)))
        halves = windows[::2], windows[1::2]
        reached = 0.0
        for seen, rest in (halves, halves[::-1]):
            name = self.best(seen, common)
            recall = sum(name in w.where_marked() for w in rest) / len(rest)
            reached += (recall + 1 - common.get(name, 0.0)) / 4
        return self.best(windows, common) if reached >= self.bar else NOTHING

    def __call__(self, body: Body) -> str:
        lines = body["messages"][1]["content"].splitlines()
        shown = [read(line) for line in lines if re.match(r"\d+\. ", line)]
        windows = [self.window(text, marks) for text, marks in shown]
        if is_explain(body):
            text = self.explain(windows, sum(len(t) for t, _ in shown) // len(shown))
            category, score = ("undiscernible", 1) if text == NOTHING else ("low_level", 5)
            return json.dumps({"category": category, "score": score, "explanation": text})
        name = read(lines[0])[0]
        return json.dumps({"labels": [int(name in w.anywhere()) for w in windows]})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head on the residual stream in the middle of a block, where no token is much the largest.

    Elsewhere (MLP outputs, the end of the third block) a few words have several times the norm of
    others, and with one threshold for all latents random directions fire on these: on words, too.
    """
    folder = tmp_path_factory.mktemp("facts") / "run"
    given = {
        "lm.hook_point": "blocks.2.hook_resid_mid", "model.head.d_sae": 1024,
        "model.head.target_l0": 2, "model.tokens": 600_000, "model.sae_batch_tokens": 1024,
        "model.buffer.capacity_tokens": 16384, "data.val_tokens": 8192, "seed_everything": 1,
        "trainer.val_check_interval": 5000, "trainer.accelerator": "cpu",
    }  # fmt: skip
    args = [f"--config={ROOT / 'configs' / n}.yaml" for n in ("batch_topk", "embedded")]
    args += [f"--{k}={v}" for k, v in given.items()]
    assert train(["fit", *args, f"--run={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_a_judge_that_knows_the_facts(run: Path, tmp_path: Path) -> None:
    """A trained head is far above random directions and exchanged explanations, both near chance.

    Without a bar random directions are not: something always fits a few words better than nothing.
    """
    told = [story(SEED, i) for i in range(STORIES)]
    text = tmp_path / "stories.jsonl"
    text.write_text("\n".join(json.dumps({"text": s.text}) for s in told))
    judge = KnowsFacts(told, BAR)
    given = {"latents": 150, "controls": 150, "width": 8, "max_cost": 1000}
    with JudgeServer(judge) as server:
        args = ["report", run, "--reports", "interpretability", "--text", text, "--wandb", "false"]
        args += ["--documents", STORIES, "--interpretability.base_url", server.url]
        args += [f"--interpretability.{k}={v}" for k, v in given.items()]
        assert main([str(a) for a in args]) == 0
    assert judge.lost == 0
    table = pd.read_csv(next((run / "eval").glob("*/interpretability.csv")))
    assert (table["status"] == "ok").all()
    found = json.loads(next((run / "eval").glob("*/summary.json")).read_text())
    figures = {k.removeprefix("interpretability/"): v for k, v in found.items()}
    chance = 0.5
    for control in ("random_directions", "shuffled_explanations"):
        assert abs(figures[f"{control}/detection"] - chance) < 0.04
        assert figures["detection_low"] > figures[f"{control}/detection_high"]
        assert figures[f"over_{control}/detection_low"] > 0.1
    assert figures["detection"] > 0.65
    of_head = table[table["subject"] == "head"]
    explained = of_head[of_head["category"] != "undiscernible"]
    assert len(explained) > 0.3 * len(of_head)
    assert explained["detection"].mean() > 0.9
    assert (of_head.drop(explained.index)["detection"] == chance).all()
