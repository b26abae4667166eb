"""A narrative and its state: the hero, whoever else appears, where they are, and what holds."""

import random
from collections.abc import Callable

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.cast import Item, Manner, Person, animal, thing
from kanllama_lightning.embedded.narrator import Narrator

THEN = ("Then", "Soon", "After that,", "A little later,")

CAUSES = {  # feeling: how the narrator may explain it, in words that fit every hero
    "happy": ("it <be> a lovely day", "there <be> so much to do", "the holidays <be*> near"),
    "tired": ("it <be> late", "the day <be> long", "the bag <be> heavy"),
    "bored": ("there <be> nothing to do", "nobody <be> there to play with", "the day <be> slow"),
    "hungry": ("there <be> no breakfast", "lunch <be> late", "the basket <be> empty"),
    "thirsty": ("the soup <be> salty", "the bottle <be> empty", "the work <be> hard"),
    "cold": ("the air <be> icy", "{A.her} coat <be> too thin", "{A.her} socks <be*> wet"),
    "lonely": (
        "there <be> no friend to talk to",
        "all the others <be*> away",
        "the house <be> empty",
    ),
    "worried": ("the way home <be> long", "the test <be> hard", "the dog <be> ill"),
}


class Tale(Narrator):
    """A story about one child, the hero."""

    hero: Person
    place: str = ""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.passed: set[str] = set()
        self.cast["how"] = Manner()

    def person(self, names: tuple[str, ...], *, female: bool, part: str) -> Person:
        """A person whose name is drawn now."""
        return Person(self.choose(names), female=female, part=part)

    def friend(self) -> Person:
        """The hero's friend, whom this may have to introduce."""
        if "B" not in self.cast:
            female = not self.hero.female
            friend = self.person(lex.GIRLS if female else lex.BOYS, female=female, part="friend")
            self.cast["B"] = friend
            self.tell(
                self.choose(
                    (
                        "{A} <meet> {A.her} friend {B}.",
                        "A {child} named {B} <come> along.",
                        "{B}, a friend, <wait> for {A}.",
                    )
                ),
                child="girl" if female else "boy",
            )
        return self.cast["B"]  # type: ignore[return-value]

    def adult(self) -> Person:
        """A grown-up of the hero's family, whom this may have to introduce."""
        if "M" not in self.cast:
            self.new_adult()
            self.tell(
                self.choose(("{M} <be> there, too.", "{M} <come> to help.", "{M} <look> at {A}."))
            )
        return self.cast["M"]  # type: ignore[return-value]

    def new_adult(self) -> None:
        """Draw a grown-up, who must be mentioned at once."""
        role = self.choose(lex.WOMEN + lex.MEN)
        name = f"{self.hero.pronouns['her']} {role}"
        self.cast["M"] = Person(name, female=role in lex.WOMEN, part="adult")

    def speaker(self, who: str) -> str:
        """The name or role of one of the cast, as the facts have it."""
        person = self.cast[who]
        assert isinstance(person, Person)
        return person.name.split()[-1].lower()

    def new_thing(self, nouns: tuple[str, ...]) -> Item:
        """Draw an object of the story, other than the last, which must be mentioned at once."""
        last = self.cast.get("O")
        kept = tuple(n for n in nouns if not (isinstance(last, Item) and n == last.noun))
        item = thing(self.choose(kept))
        self.cast["O"] = item
        self.cease("broken")
        self.cease("lost")
        return item

    def has_thing(self) -> bool:
        """Whether the story has an object that is neither broken nor lost."""
        return "O" in self.cast and not self.state("broken") and not self.state("lost")

    def new_animal(self) -> Item:
        """Draw an animal that lives here, which must be mentioned at once."""
        last = self.cast.get("N")
        here = lex.PLACES[self.place].animals
        kept = tuple(n for n in here if not (isinstance(last, Item) and n == last.noun)) or here
        item = animal(self.choose(kept))
        self.cast["N"] = item
        return item

    @property
    def creature(self) -> Item:
        """The story's animal."""
        item = self.cast["N"]
        assert isinstance(item, Item)
        return item

    def feel(self, feeling: str) -> None:
        """The hero feels so from here on."""
        self.become("feeling", feeling)

    def go(self, place: str) -> None:
        """The story is at that place from here on."""
        self.place = place
        self.become("place", place)
        self.become("where", "outdoors" if lex.PLACES[place].outside else "indoors")

    @property
    def outside(self) -> bool:
        """Whether the story is outdoors."""
        return lex.PLACES[self.place].outside

    @property
    def ledges(self) -> tuple[str, ...]:
        """What things fall off here."""
        return lex.LEDGES if self.outside else lex.SURFACES

    @property
    def spots(self) -> tuple[str, ...]:
        """Where things are hidden here."""
        return lex.HAUNTS if self.outside else lex.SPOTS

    def then(self) -> str:
        """A word that goes on with the story."""
        return self.choose(THEN)


Tell = Callable[[Tale], None]


class Episode:
    """One thing that may happen in a story.

    Args:
        tell: Tells it.
        weight: How often it is told, relative to others.
        when: Whether it can happen in the story as it stands.
    """

    def __init__(self, tell: Tell, weight: float, when: Callable[[Tale], bool]) -> None:
        self.tell = tell
        self.weight = weight
        self.when = when


EPISODES: list[Episode] = []


def always(_: Tale) -> bool:
    """Nothing is asked of the story."""
    return True


def episode(weight: float = 1.0, when: Callable[[Tale], bool] = always) -> Callable[[Tell], Tell]:
    """Make a function an episode of the world."""

    def register(tell: Tell) -> Tell:
        EPISODES.append(Episode(tell, weight, when))
        return tell

    return register
