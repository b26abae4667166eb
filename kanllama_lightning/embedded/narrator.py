"""The narrator: draws choices, speaks templates, and notes which facts hold where."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from kanllama_lightning.embedded.inflection import annotate
from kanllama_lightning.embedded.template import Mentioned, Speech, steps

T = TypeVar("T")
_new = tuple.__new__
"""Makes a `Fact` in half the time of its constructor; stories have hundreds."""


class Fact(NamedTuple):
    """One fact about a stretch of a story's text, `text[start:end]`."""

    start: int
    end: int
    name: str


class Narrator:
    """Tells one story: keeps its text, its facts, its cast and its probability."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pieces: list[str] = []
        self.length = 0
        self.facts: list[Fact] = []
        self.log_prob = 0.0
        self.tense = ""
        self.cast: dict[str, Mentioned] = {}
        self.now: dict[str, tuple[str, int]] = {}
        self.seen: set[str] = set()
        self.trace: list[tuple[str, int]] = []
        self.focus: Mentioned | None = None

    def choose(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the options, drawn; with `maybe` the only chance, so `log_prob` is exact.

        Args:
            options: Options that differ in the text they lead to.
            weights: Their unnormalised probabilities; alike if not given.
        """
        if weights is None:
            self.log_prob -= math.log(len(options))
            return options[int(self._rng.random() * len(options))]
        total = sum(weights)
        mark = self._rng.random() * total
        for option, weight in zip(options, weights, strict=True):
            mark -= weight
            if mark < 0:
                self.log_prob += math.log(weight / total)
                return option
        self.log_prob += math.log(weights[-1] / total)
        return options[-1]

    def maybe(self, probability: float) -> bool:
        """Whether something is told that could as well be left out."""
        told = self._rng.random() < probability
        self.log_prob += math.log(probability if told else 1 - probability)
        return told

    def fact(self, name: str, start: int, end: int | None = None) -> None:
        """Note that a fact holds from `start` to `end`, or to here."""
        end = self.length if end is None else end
        if end > start:
            self.facts.append(_new(Fact, (start, end, name)))

    def say(self, text: str, *, capital: bool = False) -> int:
        """Add a few words as they are, with their lexical facts; where they start."""
        start = self.length
        self.facts += [_new(Fact, (start + s, start + e, name)) for s, e, name in annotate(text)]
        self._pieces.append(text[0].upper() + text[1:] if capital else text)
        self.length = start + len(text)
        return start

    def tell(self, template: str, *facts: str, speaker: str = "", **cast: Mentioned | str) -> None:
        """Speak a template.

        Args:
            template: See `template.py`.
            *facts: Names of facts that hold of all of it.
            speaker: Name or role of whoever is quoted in it.
            **cast: What its slots mean, beyond the story's cast; plain words are said as they are.
        """
        if self._pieces:
            self._pieces.append(" ")
            self.length += 1
        begin = self.length
        speech = Speech(cast, speaker, begin)
        for step in steps(template):
            step.speak(self, speech)
        for name in facts:
            self.fact(name, begin)
        self.trace.append((template, begin))

    def become(self, category: str, value: str) -> None:
        """From here on `now:<category>:<value>` holds, and no other value of the category."""
        self.cease(category)
        self.now[category] = (value, self.length)

    def cease(self, category: str) -> None:
        """From here on nothing of the category holds."""
        if category in self.now:
            value, since = self.now.pop(category)
            self.fact(f"now:{category}:{value}", since)

    def state(self, category: str) -> str:
        """The value of a category that holds here, or "" for none."""
        return self.now[category][0] if category in self.now else ""

    def finish(self, whole: Iterable[str]) -> str:
        """End the story, with the facts that hold of the whole of it; its text."""
        for category in tuple(self.now):
            self.cease(category)
        for name in whole:
            self.fact(name, 0)
        return "".join(self._pieces)
