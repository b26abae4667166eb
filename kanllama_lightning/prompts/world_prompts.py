"""Prompts about the embedded world, in the words of `embedded/lessons.py`.

Only statements that can go on in one way: not "A cow is", since it may be bigger or smaller.
"""

from collections.abc import Iterator

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.cast import Some
from kanllama_lightning.embedded.inflection import article, plural
from kanllama_lightning.embedded.lessons import CONDITIONS
from kanllama_lightning.prompts.prompt import Prompt

SEASONS = {
    "spring": " flowers grow",
    "summer": " days are long",
    "autumn": " leaves fall",
    "winter": " nights are long",
}


def world_prompts() -> list[Prompt]:
    """All of them, in a fixed order; the first is about a vase."""
    return [
        Prompt(kind, prompt[0].upper() + prompt[1:], (answer,))
        for make in (_falls, _follows, _sums, _comparisons, _animals, _mixes, _week, _things)
        for kind, prompt, answer in make()
    ]


def _falls() -> Iterator[tuple[str, str, str]]:
    things = sorted(lex.THINGS, key=lambda noun: noun != "vase")
    for i, noun in enumerate(things):
        surface = lex.SURFACES[(i + 1) % len(lex.SURFACES)]
        yield (
            "falling things",
            f"if the {noun} falls off the {surface}, it will",
            f" {lex.THINGS[noun].falls}",
        )


def _follows() -> Iterator[tuple[str, str, str]]:
    for cause, effect in CONDITIONS:
        known, _, last = effect.rpartition(" ")
        yield "consequences", f"if {cause}, {known}", f" {last}"


def _sums() -> Iterator[tuple[str, str, str]]:
    for a in (1, 2, 3, 4, 5):
        for b in (2, 3, 4, 5):
            food = lex.FOODS[(a + 2 * b) % len(lex.FOODS)]
            one, two = (f"{lex.NUMBERS[n]} {Some(n, food).noun}" for n in (a, b))
            yield "sums", f"{one} and {two} make", f" {lex.NUMBERS[a + b]}"


def _comparisons() -> Iterator[tuple[str, str, str]]:
    """Opposites: the ends of the scales alone, as what is in between may be more or less."""
    sized = sorted(lex.SIZED, key=lambda kind: lex.ANIMALS[kind].size)
    yield "comparisons", f"{article(sized[0])} is", " smaller"
    yield "comparisons", f"{article(sized[-1])} is", " bigger"
    yield "comparisons", f"{article(sized[1])} is bigger than a", f" {sized[0]}"
    yield "comparisons", f"{article(sized[-2])} is smaller than a", f" {sized[-1]}"
    yield "comparisons", "one is", " less"
    yield "comparisons", "nine is", " more"
    yield "comparisons", "two is more than", " one"
    yield "comparisons", "eight is less than", " nine"


def _animals() -> Iterator[tuple[str, str, str]]:
    for kind in lex.SIZED:
        says = lex.ANIMALS[kind].says
        yield "animal calls", f"what does {article(kind)} say? It says", f" {says}"
    for kind, about in lex.ANIMALS.items():
        yield "food", f"{plural(kind)} eat", f" {about.food}"
    for kind, about in lex.ANIMALS.items():
        yield "abilities", f"{article(kind)} can", f" {about.can}"
        yield "abilities", f"{article(kind)} can {about.can}, but it cannot", f" {about.cannot}"


def _mixes() -> Iterator[tuple[str, str, str]]:
    for pair, mix in lex.MIXES.items():
        yield "mixed colours", f"{pair} make", f" {mix}"


def _week() -> Iterator[tuple[str, str, str]]:
    for day, then in zip(lex.DAYS, lex.DAYS[1:] + lex.DAYS[:1], strict=True):
        yield "calendar", f"after {day} comes", f" {then}"
    for season, brings in SEASONS.items():
        yield "calendar", f"in {season} the", brings


def _things() -> Iterator[tuple[str, str, str]]:
    for noun, thing in lex.THINGS.items():
        kind = "easy" if thing.falls == "break" else "hard"
        yield "things", f"{article(noun)} is", f" {kind} to break"
