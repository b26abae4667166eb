"""Who and what a story speaks of, and the forms in which it is mentioned."""

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.inflection import article, plural
from kanllama_lightning.embedded.narrator import Narrator


class Person:
    """A person; forms: name (none given), `s` (Anna's), and `she`, `her`, `him` as pronouns.

    Args:
        name: What the person is called in the text.
        female: Whether the pronouns are she and her.
        part: Part in the story: `protagonist`, `friend` or `adult`.
    """

    def __init__(self, name: str, *, female: bool, part: str) -> None:
        self.name = name
        self.part = part
        self.female = female
        self.pronouns = {
            "she": "she" if female else "he",
            "her": "her" if female else "his",
            "him": "her" if female else "him",
        }

    @property
    def label(self) -> str:
        """The name as facts have it."""
        return self.name.lower()

    def mention(self, narrator: Narrator, form: str, *, capital: bool, role: str) -> None:
        """Say the name or a pronoun."""
        if not form and capital and role and narrator.focus is self and self.part != "adult":
            form = narrator.choose(("", "she"))
        narrator.focus = self
        if form in self.pronouns:
            start = narrator.say(self.pronouns[form], capital=capital)
            if form == "her":
                narrator.fact("possessive", start)
        else:
            start = narrator.say(self.name, capital=capital)
            again = self.name in narrator.seen
            narrator.fact("second_mention" if again else "first_mention", start)
            narrator.seen.add(self.name)
            if form == "s":
                narrator.say("'s")
                narrator.fact("possessive", start)
            elif form == "called":
                narrator.fact("addressee", start)
        narrator.fact(f"refers_to:{self.part}", start)
        if role:
            narrator.fact(role, start)


class Item:
    """An animal or object; its adjective is drawn when first spoken.

    Forms: `a` (a red ball), `an` (a ball), the (the ball; none given), `full` (the red ball),
    `own` (red ball), `noun` (ball), `it`.

    Args:
        noun: What it is.
        part: Part in the story: `object`, `animal`.
        adjectives: Adjectives to draw from.
    """

    def __init__(self, noun: str, part: str, adjectives: tuple[str, ...]) -> None:
        self.noun = noun
        self.part = part
        self.adjectives = adjectives
        self.adjective = ""

    def mention(self, narrator: Narrator, form: str, *, capital: bool, role: str) -> None:
        """Say a noun phrase or "it"."""
        if form in ("a", "full", "own") and not self.adjective:
            self.adjective = narrator.choose(self.adjectives)
        text = {
            "a": lambda: article(f"{self.adjective} {self.noun}"),
            "an": lambda: article(self.noun),
            "": lambda: f"the {self.noun}",
            "full": lambda: f"the {self.adjective} {self.noun}",
            "own": lambda: f"{self.adjective} {self.noun}",
            "noun": lambda: self.noun,
            "it": lambda: "it",
        }[form]()
        start = narrator.say(text, capital=capital)
        if form != "it":
            again = self.noun in narrator.seen
            narrator.fact("second_mention" if again else "first_mention", start)
            narrator.seen.add(self.noun)
        if self.part == "object" and narrator.state("broken") == self.noun:
            narrator.fact("broken_thing", start)
        narrator.fact(f"refers_to:{self.part}", start)
        if role:
            narrator.fact(role, start)


class Some:
    """A count of things: "three apples"; forms: whole (none given), `noun`, `count`.

    Args:
        count: How many.
        noun: Of what, in the singular.
    """

    def __init__(self, count: int, noun: str) -> None:
        self.count = count
        self.noun = noun if count == 1 else plural(noun)

    def mention(self, narrator: Narrator, form: str, *, capital: bool, role: str) -> None:
        """Say the number, the noun, or both."""
        number = lex.NUMBERS[self.count]
        text = {"": f"{number} {self.noun}", "noun": self.noun, "count": number}[form]
        start = narrator.say(text, capital=capital)
        narrator.fact("counted", start)
        if role:
            narrator.fact(role, start)


class Manner:
    """How something is said, which is drawn each time and most often left out."""

    WAYS = ("", " quietly", " loudly", " softly", " at once", " with a smile", " slowly")
    WEIGHTS = (9, 1, 1, 1, 1, 1, 1)

    def mention(self, narrator: Narrator, form: str, *, capital: bool, role: str) -> None:
        """Say it, with the blank before it."""
        way = narrator.choose(self.WAYS, self.WEIGHTS)
        narrator.fact("manner", narrator.say(way))


def thing(noun: str) -> Item:
    """An object of the given kind."""
    material = lex.THINGS[noun].material
    return Item(
        noun, "object", lex.COLOURS + lex.SIZES + lex.AGES + ((material,) if material else ())
    )


ANIMAL_ADJECTIVES = ("brown", "black", "white", "gray", "big", "small", "old", "young", "friendly")


def animal(noun: str) -> Item:
    """An animal of the given kind."""
    return Item(noun, "animal", ANIMAL_ADJECTIVES)
