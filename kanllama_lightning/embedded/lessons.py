"""Texts of another kind: short statements of what is true in this world."""

from collections.abc import Callable

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.cast import Some
from kanllama_lightning.embedded.inflection import article, plural
from kanllama_lightning.embedded.narrator import Narrator

CONDITIONS = (
    ("it rains", "the grass will get wet"),
    ("it snows", "the hill will turn white"),
    ("the sun shines on snow", "the snow will melt"),
    ("the wind blows", "the kite will fly"),
    ("you water a seed", "a flower will grow"),
    ("you do not eat", "you will be hungry"),
    ("you do not drink", "you will be thirsty"),
    ("you do not sleep", "you will be tired"),
    ("you share your toys", "your friends will be glad"),
    ("you lose your ball", "you will be sad"),
    ("you win a race", "you will be proud"),
    ("you have no umbrella in the rain", "you will get wet"),
)


def falling(t: Narrator) -> None:
    """What happens to a thing that falls."""
    fragile = t.maybe(0.6)
    noun = t.choose(lex.FRAGILE if fragile else lex.STURDY)
    falls = lex.THINGS[noun].falls
    outlook = "will_break_next" if fragile else "will_not_break_next"
    t.tell(
        "[conditional|[cause_clause|If the {noun} falls off the {surface}], "
        f"[effect_clause|[{outlook}|it will] {falls}]].",
        noun=noun,
        surface=t.choose(lex.SURFACES),
    )


def condition(t: Narrator) -> None:
    """What follows from what."""
    cause, effect = t.choose(CONDITIONS)
    t.tell(f"[conditional|[cause_clause|If {cause}], [effect_clause|{effect}]].")


def addition(t: Narrator) -> None:
    """A sum."""
    food = t.choose(lex.FOODS)
    a, b = t.choose((1, 2, 3, 4, 5)), t.choose((2, 3, 4, 5))
    t.tell(
        "{a} and {b} make {sum}.", "sum", a=Some(a, food), b=Some(b, food), sum=Some(a + b, food)
    )


def more(t: Narrator) -> None:
    """Which number is more."""
    a = t.choose(tuple(range(1, 10)))
    b = t.choose(tuple(n for n in range(1, 10) if n != a))
    word = "more" if a > b else "less"
    t.tell(f"{{a}} is {word} than {{b}}.", "comparison_clause", a=lex.NUMBERS[a], b=lex.NUMBERS[b])


def size(t: Narrator) -> None:
    """Which animal is bigger."""
    a = t.choose(lex.SIZED)
    b = t.choose(tuple(k for k in lex.SIZED if k != a))
    word = "bigger" if lex.ANIMALS[a].size > lex.ANIMALS[b].size else "smaller"
    t.tell(f"{{a}} is {word} than {{b}}.", "comparison_clause", a=article(a), b=article(b))


def ability(t: Narrator) -> None:
    """What an animal can and cannot do."""
    kind = t.choose(tuple(lex.ANIMALS))
    about = lex.ANIMALS[kind]
    t.tell(
        "{a} can {can}, but it [negated|cannot {cannot}].",
        a=article(kind),
        can=about.can,
        cannot=about.cannot,
    )


def food(t: Narrator) -> None:
    """What animals eat."""
    kind = t.choose(tuple(lex.ANIMALS))
    t.tell("{kinds} eat {food}.", kinds=plural(kind), food=lex.ANIMALS[kind].food)


def call(t: Narrator) -> None:
    """What an animal says."""
    kind = t.choose(lex.SIZED)
    t.tell("What does {a} say? It says {says}.", a=article(kind), says=lex.ANIMALS[kind].says)


def mixing(t: Narrator) -> None:
    """What colours make together."""
    pair = t.choose(tuple(lex.MIXES))
    t.tell("[cause_clause|{pair}] make [effect_clause|{mix}].", pair=pair, mix=lex.MIXES[pair])


def week(t: Narrator) -> None:
    """The order of the days."""
    at = t.choose(tuple(range(7)))
    t.tell("After {day} comes {then}.", day=lex.DAYS[at], then=lex.DAYS[(at + 1) % 7])


def made_of(t: Narrator) -> None:
    """What a thing is and is not."""
    noun = t.choose(tuple(lex.THINGS))
    kind = "easy to break" if lex.THINGS[noun].falls == "break" else "hard to break"
    t.tell("{a} is {kind}.", a=article(noun), kind=kind)


def season(t: Narrator) -> None:
    """What a season brings."""
    when = t.choose(tuple(lex.SEASONS))
    brings = {
        "spring": "the flowers grow",
        "summer": "the days are long",
        "autumn": "the leaves fall",
        "winter": "the nights are long",
    }
    t.tell("In {when} {brings}.", when=when, brings=brings[when])


LESSONS: tuple[Callable[[Narrator], None], ...] = (
    falling,
    condition,
    addition,
    more,
    size,
    ability,
    food,
    call,
    mixing,
    week,
    made_of,
    season,
)
WEIGHTS = (4, 2, 2, 1, 1.5, 1, 1, 1, 1, 0.7, 0.8, 0.7)


def tell_lessons(t: Narrator) -> None:
    """Between six and twelve statements."""
    t.tense = "present"
    for n in range(12):
        if n >= 6 and t.maybe(0.2):
            return
        t.choose(LESSONS, WEIGHTS)(t)
