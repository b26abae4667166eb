"""The narrator: draws choices, speaks templates, and notes which facts hold where.

A template is plain English with slots:

- `{A}` somebody or something of the cast, `{A.her}` in another form (see `cast.py`);
- `<go>` a verb in the story's tense; `<go*>` plural, `<-go>` negated, `<+go>` after an "and";
- `[cause_clause|because ...]` a stretch of text of which a fact holds;
- `"..."` quoted speech.

Sentences are capitalised, and questions and exclamations marked, by themselves.
"""

import math
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from kanllama_lightning.embedded.inflection import annotate, conjugate

T = TypeVar("T")
_new = tuple.__new__
"""Makes a `Fact` in half the time of its constructor; stories have hundreds."""


class Fact(NamedTuple):
    """One fact about a stretch of a story's text, `text[start:end]`."""

    start: int
    end: int
    name: str


@runtime_checkable
class Mentioned(Protocol):
    """What can fill a slot."""

    def mention(self, narrator: "Narrator", form: str, *, capital: bool, role: str) -> None:
        """Say it in the given form."""


class Speech:
    """What has to be remembered while one template is spoken.

    Args:
        cast: What slots mean here, before the story's cast is asked.
        speaker: Name or role of whoever is quoted, or "".
        begin: Where the template begins, in characters.
    """

    def __init__(self, cast: dict[str, Mentioned | str], speaker: str, begin: int) -> None:
        self.cast = cast
        self.speaker = speaker
        self.sentence = begin
        self.quote = begin
        self.opened: list[tuple[str, int]] = []


@runtime_checkable
class Step(Protocol):
    """One step of a template."""

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Do it."""


class Words(NamedTuple):
    """Words said as they are."""

    text: str

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Say them."""
        narrator.say(self.text)


class Slot(NamedTuple):
    """A member of the cast, or plain words given with the template."""

    name: str
    form: str
    capital: bool
    role: str
    """`subject` before a verb, `object` right after one, otherwise ""."""

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Mention it."""
        filler = speech.cast.get(self.name) or narrator.cast[self.name]
        if isinstance(filler, str):
            narrator.say(filler, capital=self.capital)
        else:
            filler.mention(narrator, self.form, capital=self.capital, role=self.role)


class Verb(NamedTuple):
    """A verb of the narration."""

    verb: str
    capital: bool
    many: bool
    negated: bool
    joined: bool

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Say it in the story's tense."""
        text = conjugate(
            self.verb, narrator.tense, many=self.many, negated=self.negated, joined=self.joined
        )
        start = narrator.say(text, capital=self.capital)
        narrator.fact(f"narrated_verb:{narrator.tense}", start)
        if self.negated:
            narrator.fact("negated", start)


class SentenceStart(NamedTuple):
    """The start of a sentence."""

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Remember it."""
        speech.sentence = narrator.length


class SentenceKind(NamedTuple):
    """The end of a question or an exclamation."""

    name: str

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Note the fact for the whole sentence."""
        narrator.fact(self.name, speech.sentence)


class Open(NamedTuple):
    """The start of a stretch of which a fact holds."""

    name: str

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Remember it."""
        speech.opened.append((self.name, narrator.length))


class Close(NamedTuple):
    """The end of the stretch opened last."""

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Note its fact."""
        narrator.fact(*speech.opened.pop())


class Quote(NamedTuple):
    """The mark before quoted speech."""

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Say it."""
        narrator.fact("quote_open", narrator.say('"'))
        speech.quote = speech.sentence = narrator.length


class Unquote(NamedTuple):
    """The mark after quoted speech."""

    def speak(self, narrator: "Narrator", speech: Speech) -> None:
        """Say it, and note who spoke."""
        narrator.fact("in_quote", speech.quote)
        if speech.speaker:
            narrator.fact(f"speaker:{speech.speaker}", speech.quote)
        narrator.fact("quote_close", narrator.say('"'))


_PARTS = re.compile(
    r"\{(?P<slot>\w+)(?:\.(?P<form>\w+))?\}"
    r"|<(?P<how>[+-]*)(?P<verb>\w+)(?P<many>\*?)>"
    r"|\[(?P<open>\w+)\||(?P<close>\])|(?P<quote>\")|(?P<text>[^{}<>\[\]\"]+)"
)
_SENTENCE = re.compile(r"[^.?!]+[.?!]?|[.?!]")
_KINDS = {"?": SentenceKind("question"), "!": SentenceKind("exclamation")}


@cache
def steps(template: str) -> tuple[Step, ...]:
    """The steps that speak a template."""
    out: list[Step] = [SentenceStart()]
    capital, quoted = True, False
    for part in _PARTS.finditer(template):
        if part["slot"]:
            follows = template[part.end() :].lstrip()
            after_verb = out[-1] == Words(" ") and isinstance(out[-2], Verb)
            role = "subject" if follows.startswith("<") else "object" if after_verb else ""
            out.append(Slot(part["slot"], part["form"] or "", capital, role))
            capital = False
        elif part["verb"]:
            negated, joined = "-" in part["how"], "+" in part["how"]
            out.append(Verb(part["verb"], capital, bool(part["many"]), negated, joined))
            capital = False
        elif part["open"]:
            out.append(Open(part["open"]))
        elif part["close"]:
            out.append(Close())
        elif part["quote"]:
            quoted = capital = not quoted
            out += [Quote(), SentenceStart()] if quoted else [Unquote()]
        else:
            for piece in _SENTENCE.findall(part["text"]):
                bare = piece.lstrip()
                starts = capital and bool(bare)
                blank = piece[: len(piece) - len(bare)]
                out.append(Words(blank + bare[0].upper() + bare[1:] if starts else piece))
                capital = piece[-1] in ".?!" or (capital and not starts)
                out += [_KINDS[piece[-1]]] if piece[-1] in _KINDS else []
                out += [SentenceStart()] if piece[-1] in ".?!" else []
    return tuple(out)


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
            template: See the top of this file.
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
