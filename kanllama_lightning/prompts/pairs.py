"""Pairs of stories that differ in one subject: in one it is extreme, in the other the opposite."""

import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from kanllama_lightning.embedded import story
from kanllama_lightning.storage.small_files import Like, Wrong, check, from_json, read_bytes
from kanllama_lightning.types import InputError

ENGLISH: Path = Path(__file__).parent / "pairs.jsonl"
"""The shipped pairs for language models of text at large, written for this project."""
TAG = re.compile(r"</?subject>")
"""What the earlier published sets mark words with."""
OPPOSITES = {
    "rain and sun": ("now:weather:rain", "now:weather:sun"),
    "indoors and outdoors": ("now:where:indoors", "now:where:outdoors"),
    "past and future": ("tense:past", "tense:future"),
    "tales and lessons": ("genre:tale", "genre:lessons"),
    "wet and dry": ("now:body:wet", "now:body:dry"),
    "happy and sad": ("now:feeling:happy", "now:feeling:sad"),
    "morning and evening": ("now:daytime:morning", "now:daytime:evening"),
    "summer and winter": ("now:season:summer", "now:season:winter"),
}
"""Facts of the story world that exclude each other, by what they are about."""
STREAM, STORIES, PAIRS = 9001, 2000, 3
"""Stream of the world that pairs are taken from, its stories looked at, and pairs of a subject."""

Text = Annotated[str, Like(r"(?s).*\S.*", "a text")]


class Pair(NamedTuple):
    """Two stories and what they differ in."""

    subject: str
    story1: str
    story2: str


def load_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a jsonl file: objects with `story1`, `story2` and `subject`.

    `subject_title` stands for `subject` where that is missing, as in `contrastive-stories-v4`;
    other keys are left alone, and words that are tagged `<subject>` lose the tags.

    Raises:
        InputError: It cannot be read, a line holds no such object, or all are of one subject.
    """
    path = Path(path).expanduser()
    try:
        lines = read_bytes(path, "give a jsonl file, or leave it out").split(b"\n")
    except InputError as e:
        raise InputError(f"ce_bench.pairs={e}") from e
    found = [_line(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if len({pair.subject for pair in found}) < 2:
        raise InputError(
            f"ce_bench.pairs={str(path)!r}: holds {len(found)} pairs of fewer than two subjects; "
            'independence needs two: {"subject": ..., "story1": ..., "story2": ...} on every line'
        )
    return found


def _line(path: Path, n: int, line: bytes) -> Pair:
    try:
        values = check(from_json(line.decode()), dict[str, Any])
        values.setdefault("subject", values.get("subject_title"))
        missing = [key for key in Pair._fields if values.get(key) is None]
        if missing:
            raise Wrong(f"lacks {', '.join(missing)}")
        texts = check({key: values[key] for key in Pair._fields}, dict[str, Text])
    except (UnicodeDecodeError, Wrong) as e:
        said = f"no text in UTF-8 (byte {e.start})" if isinstance(e, UnicodeDecodeError) else e
        raise InputError(
            f"ce_bench.pairs={str(path)!r}, line {n}: {said}; a line is one JSON object with the "
            "strings subject, story1 and story2"
        ) from e
    return Pair(**{key: TAG.sub("", text) for key, text in texts.items()})


def world_pairs() -> list[Pair]:
    """Pairs of stories of the embedded world, drawn from its grammar; the same on every machine.

    In one story the first fact of a subject holds somewhere and the second nowhere, in the other
    it is the other way round.
    """
    told = [story(STREAM, i) for i in range(STORIES)]
    left = {s.text: {fact.name for fact in s.facts} for s in told}
    pairs = []
    for subject, (one, other) in OPPOSITES.items():
        first = [text for text, facts in left.items() if one in facts and other not in facts]
        second = [text for text, facts in left.items() if other in facts and one not in facts]
        for two in zip(first[:PAIRS], second[:PAIRS], strict=True):
            pairs.append(Pair(subject, *two))
            for text in two:
                del left[text]
    return pairs
