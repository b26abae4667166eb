"""What a judge is asked about a latent: what it stands for, and by that alone where it fires.

METHODS D. The windows of a latent are split by document. Of one half, marked, the judge makes an
explanation, a category and a score; with the explanation alone it then says of windows of the other
half, unmarked and mixed with windows in which the latent is silent, in which of them it fires. The
share it gets right, the mean of both kinds (balanced accuracy), is the detection score.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kanllama_lightning.judge.client import JudgeQuestion
from kanllama_lightning.lm.token_text import quoted, visible
from kanllama_lightning.measures.contexts import Contexts, Windows
from kanllama_lightning.storage.small_files import from_json

T = TypeVar("T")

TOP, SPREAD = 10, 20
"""Windows to explain: the strongest, and such of all strengths."""
DETECT, PER_CALL = 25, 10
"""Windows of each kind to tell apart, and how many of both are shown at once."""
LEAST = 5
"""Windows to explain, and of each kind to tell apart, without which a latent cannot be judged."""
FLOOR = 0.01
"""A window counts if its peak is at least this share of the latent's maximum."""
MARKED = 0.3
"""A token is marked if it reaches this share of its window's peak."""
CATEGORIES = ("low_level", "high_level", "undiscernible")
SCORES = (1, 2, 3, 4, 5)
PLACEHOLDER = "(the explanation goes here, at most twenty words of text that say what it fires on)"


class Explanation(NamedTuple):
    """What the judge says of a latent."""

    category: str
    score: int
    text: str


class Case(NamedTuple):
    """A latent and the windows it is judged by, as the judge sees them."""

    latent: int
    frequency: float
    explain: list[str]
    """Marked, strongest first."""
    detect: list[str]
    """Shuffled, unmarked."""
    truth: list[bool]
    """Whether it fires there."""


class Choice(NamedTuple):
    """The windows of a latent."""

    explain: Windows
    active: Windows
    silent: Windows


def choose(contexts: Contexts, latent: int, windows: int, seed: int) -> Choice | None:
    """The windows a latent is judged by; None if there are too few.

    Args:
        contexts: What was collected.
        latent: Which.
        windows: Documents it has to fire in.
        seed: Seed of the split and the draws.
    """
    largest = float(contexts.meter.largest[latent])
    top, sampled = (_strong(w, FLOOR * largest) for w in contexts.windows(latent))
    docs = torch.cat([top.doc, sampled.doc]).unique()
    if len(docs) < max(windows, 1):
        return None
    draw = random.Random(f"{seed}:{latent}")
    top = top.pick(_first_half(top.doc, seed)).pick(slice(TOP))
    first = _first_half(sampled.doc, seed)
    rest = sampled.pick(first & ~torch.isin(sampled.doc, top.doc))
    explain = Windows(*(torch.cat(pair) for pair in zip(top, _slices(rest, SPREAD, draw),
                                                        strict=True)))  # fmt: skip
    held_out = sampled.pick(~first)
    quiet = contexts.silent(latent)
    quiet = quiet.pick(~_first_half(quiet.doc, seed))
    n = min(DETECT, len(held_out), len(quiet))
    active = _slices(held_out, n, draw)
    quiet = quiet.pick(~torch.isin(quiet.doc, active.doc))
    n = min(n, len(quiet))
    if n < LEAST or len(explain) < LEAST:
        return None
    quiet = quiet.pick(torch.tensor(draw.sample(range(len(quiet)), n)))
    return Choice(explain, _slices(active, n, draw), quiet)


def shown(
    contexts: Contexts,
    latent: int,
    choice: Choice,
    pieces: Callable[[Sequence[int]], list[str]],
    seed: int,
) -> Case:
    """The windows as text.

    Args:
        contexts: What was collected.
        latent: Which.
        choice: Its windows.
        pieces: The text that each token of a window adds.
        seed: Seed of the order of those to tell apart.
    """
    largest = float(contexts.meter.largest[latent])
    lines = []
    for ids, values in zip(contexts.ids(choice.explain), choice.explain.values, strict=True):
        peak = float(values.max())
        marks = (values[: len(ids)] >= MARKED * peak).tolist()
        strength = min(10, max(1, -int(-10 * peak // max(largest, 1e-30))))
        lines.append(f"strength {strength}/10: {marked(pieces(ids), marks)}")
    texts = [
        (marked(pieces(ids), [False] * len(ids)), fires)
        for some, fires in ((choice.active, True), (choice.silent, False))
        for ids in contexts.ids(some)
    ]
    random.Random(f"{seed}:{latent}:order").shuffle(texts)
    frequency = float(contexts.meter.frequency()[latent])
    return Case(latent, frequency, lines, [t for t, _ in texts], [f for _, f in texts])


def marked(pieces: Sequence[str], marks: Sequence[bool]) -> str:
    r"""A window on one line, in quotation marks, with `<<` and `>>` around what is marked.

    Neighbours share one mark, blanks before it stay outside, and angle brackets of the text itself
    are written as `\<` and `\>`. A mark on part of a character goes to the rest of it.
    """
    out, inside, pending = "", False, False
    for piece, mark in zip(pieces, marks, strict=True):
        mark = mark or pending
        pending = mark and not piece
        if not piece:
            continue
        if inside and not mark:
            out, inside = f"{out}>>", False
        text = visible(piece).replace('"', '\\"').replace("<", "\\<").replace(">", "\\>")
        if mark and not inside:
            blanks = text[: len(text) - len(text.lstrip(" "))] if text.strip(" ") else ""
            out, text, inside = f"{out}{blanks}<<", text[len(blanks) :], True
        out += text
    return f'"{out}>>"' if inside else f'"{out}"'


def explain_question(case: Case) -> JudgeQuestion:
    """Ask for category, score and explanation."""
    properties = {
        "category": {"type": "string", "enum": list(CATEGORIES)},
        "score": {"type": "integer", "enum": list(SCORES)},
        "explanation": {"type": "string"},
    }
    lines = [f"{i}. {line}" for i, line in enumerate(case.explain, 1)]
    text = f"{len(lines)} windows:\n" + "\n".join(lines)
    return _question("explanation", properties, _prompt("explain"), text)


def detect_questions(case: Case, explanation: str) -> list[JudgeQuestion]:
    """Ask in which windows it fires, a few at a time."""
    found = []
    for first in range(0, len(case.detect), PER_CALL):
        some = case.detect[first : first + PER_CALL]
        labels = {
            "type": "array",
            "items": {"type": "integer", "enum": [0, 1]},
            "minItems": len(some),
            "maxItems": len(some),
        }
        lines = "\n".join(f"{i}. {line}" for i, line in enumerate(some, 1))
        text = f"Description: {quoted(explanation)}\n{len(some)} windows:\n{lines}"
        found.append(_question("labels", {"labels": labels}, _prompt("detect"), text))
    return found


def parse_explanation(content: str) -> Explanation:
    """What the judge answers to `explain_question`; ValueError, in a few words, if it does not."""
    found = _object(content, ("category", "score", "explanation"))
    category, score, text = found["category"], found["score"], found["explanation"]
    if not isinstance(category, str) or category not in CATEGORIES:
        raise ValueError("wrong schema")
    if isinstance(score, bool) or not isinstance(score, int) or score not in SCORES:
        raise ValueError("wrong schema")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("wrong schema")
    return Explanation(category, score, visible(" ".join(text.split())))


def parse_labels(n: int) -> Callable[[str], list[bool]]:
    """Reads what the judge answers about `n` windows; ValueError if it does not."""

    def parse(content: str) -> list[bool]:
        labels = _object(content, ("labels",))["labels"]
        if not isinstance(labels, list):
            raise ValueError("wrong schema")
        if any(isinstance(v, bool) or not isinstance(v, int) or v not in (0, 1) for v in labels):
            raise ValueError("wrong schema")
        if len(labels) != n:
            raise ValueError("wrong number of labels")
        return [v == 1 for v in labels]

    return parse


def balanced_accuracy(said: Sequence[bool], truth: Sequence[bool]) -> float:
    """Mean of the share right where it fires and the share right where it is silent."""
    rates = []
    for kind in (True, False):
        of_kind = [s == t for s, t in zip(said, truth, strict=True) if t == kind]
        rates.append(sum(of_kind) / len(of_kind))
    return sum(rates) / 2


def spread(n: int, wanted: int, draw: random.Random) -> list[int]:
    """`wanted` of the places 0 to n-1: one from each of as many slices of equal size."""
    if wanted >= n:
        return list(range(n))
    if wanted <= 0:
        return []
    borders = [i * n // wanted for i in range(wanted + 1)]
    return [draw.randrange(a, b) for a, b in zip(borders, borders[1:], strict=False)]


def _slices(windows: Windows, wanted: int, draw: random.Random) -> Windows:
    """Windows of all strengths: every tenth of the activations has its share."""
    return windows.pick(torch.tensor(spread(len(windows), wanted, draw), dtype=torch.int64))


def _strong(windows: Windows, floor: float) -> Windows:
    peaks = windows.values.gather(1, windows.peak[:, None]).squeeze(1)
    return windows.pick((peaks > 0) & (peaks >= floor))


def _first_half(docs: Int[Tensor, " n"], seed: int) -> Bool[Tensor, " n"]:
    """Whether windows of these documents serve to explain."""
    return torch.tensor([_is_first(int(d), seed) for d in docs], dtype=torch.bool)


@cache
def _is_first(doc: int, seed: int) -> bool:
    return hashlib.sha256(f"{seed}:{doc}".encode()).digest()[0] < 128


@cache
def _prompt(name: str) -> str:
    return (files("kanllama_lightning.judge") / f"{name}.txt").read_text(encoding="utf-8")


def _question(name: str, properties: dict[str, Any], system: str, text: str) -> JudgeQuestion:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return JudgeQuestion(messages, name, schema)


def _object(content: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with exactly these keys; a fence of Markdown around it does no harm."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", content, re.DOTALL)
    try:
        found = from_json(fenced[1] if fenced else content)
    except ValueError:
        raise ValueError("malformed JSON") from None
    if not isinstance(found, dict) or set(found) != set(keys):
        raise ValueError("wrong schema")
    return found
