"""How the world's words inflect, and the lexical facts that every form carries."""

import re
from functools import cache
from typing import NamedTuple

from kanllama_lightning.embedded import lexicon as lex

TENSES = ("past", "present", "future")

_IRREGULAR = """
be was is, become became becomes, begin began begins, blow blew blows, break broke breaks,
bring brought brings, build built builds, buy bought buys, catch caught catches, come came comes,
do did does, draw drew draws, drink drank drinks, eat ate eats, fall fell falls, feed fed feeds,
find found finds, float floated floats, fly flew flies, get got gets, give gave gives,
go went goes, grow grew grows, have had has, hear heard hears, hide hid hides, hold held holds,
hurt hurt hurts, leave left leaves, lose lost loses, make made makes, meet met meets,
pay paid pays, put put puts, read read reads, ride rode rides, rise rose rises, run ran runs,
say said says, see saw sees, shake shook shakes, shine shone shines, sing sang sings,
sink sank sinks, sit sat sits, sleep slept sleeps, sweep swept sweeps, swim swam swims,
take took takes, teach taught teaches, tell told tells, think thought thinks, throw threw throws,
wake woke wakes, win won wins
"""
_REGULAR = """
answer ask bake bark bleat bounce bump burn call carry chase clap clean climb clink close cluck
cook count croak dance drop dry fix follow grunt help howl hug jump kick knock land laugh like
live look melt meow miss mix moo neigh open paint pick plant play pour practise promise quack rain
roll sail share show smell smile sniff snow spill splash squawk squeak stay stop thank turn visit
wait walk want wash watch water whisper wish yawn
"""
_PLURALS = {"sheep": "sheep", "mouse": "mice", "leaf": "leaves", "scarf": "scarves"}


class Forms(NamedTuple):
    """One verb in the three tenses of a story, as its singular subject wants it."""

    past: str
    present: str
    future: str


def _regular(verb: str) -> Forms:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return Forms(verb[:-1] + "ied", verb[:-1] + "ies", verb)
    third = verb + ("es" if verb.endswith(("s", "sh", "ch", "x")) else "s")
    if verb in ("clap", "drop", "hop", "hug", "stop"):
        return Forms(verb + verb[-1] + "ed", third, verb)
    return Forms(verb + ("d" if verb.endswith("e") else "ed"), third, verb)


VERBS = {v: _regular(v) for v in _REGULAR.split()}
VERBS |= {v: Forms(p, s, v) for v, p, s in (e.split() for e in _IRREGULAR.split(","))}


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch", "tomato")) else "s")


def article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@cache
def conjugate(verb: str, tense: str, *, many: bool, negated: bool, joined: bool) -> str:
    """A verb as the story's tense and its subject's number want it.

    Args:
        verb: Base form.
        tense: One of `TENSES`.
        many: Whether the subject is plural.
        negated: Whether "not" goes with it.
        joined: Whether it follows another verb by "and", so that the future needs no second "will".
    """
    if tense == "future":
        return ("" if joined else "will ") + ("not " if negated else "") + verb
    if verb == "be":
        is_ = {("past", False): "was", ("past", True): "were", ("present", False): "is"}
        return is_.get((tense, many), "are") + (" not" if negated else "")
    if negated:
        do = "did" if tense == "past" else "do" if many else "does"
        return f"{do} not {verb}"
    return VERBS[verb].past if tense == "past" else verb if many else VERBS[verb].present


def _lexical() -> dict[str, tuple[str, ...]]:
    """Word form, in lower case, to the facts that hold of it wherever it stands."""
    facts: dict[str, tuple[str, ...]] = {}

    def add(word: str, *names: str) -> None:
        facts[word.lower()] = facts.get(word.lower(), ()) + tuple(
            n for n in names if n not in facts.get(word.lower(), ())
        )

    def noun(word: str, *names: str) -> None:
        add(word, "noun", "number:singular", *names)
        if plural(word) != word:
            add(plural(word), "noun", "number:plural", *names)

    for names, gender in ((lex.GIRLS, "female"), (lex.BOYS, "male")):
        for name in names:
            add(name, "person", "name", f"name:{name.lower()}", f"gender:{gender}")
    for roles, gender in ((lex.WOMEN, "female"), (lex.MEN, "male")):
        for role in roles:
            add(role, "noun", "person", "family", f"role:{role}", f"gender:{gender}")
    for role in lex.WORKERS:
        add(role, "noun", "person", "worker", f"role:{role}")
    for word, gender in (("girl", "female"), ("boy", "male")):
        noun(word, "person", f"gender:{gender}")
    for word in ("friend", "child"):
        add(word, "noun", "person")
    for name in lex.PET_NAMES:
        add(name, "name", "pet_name")
    for kind, animal in lex.ANIMALS.items():
        noun(kind, "animal", f"animal:{kind}")
        add(animal.says, "animal_sound")
        for form in VERBS[animal.sound]:
            add(form, "animal_sound")
    for kind, thing in lex.THINGS.items():
        noun(kind, "object", f"object:{kind}", f"falls:{thing.falls.split()[0]}")
        if thing.falls == "break":
            noun(kind, "fragile")
    for word in sorted({*lex.SURFACES, *lex.LEDGES, *lex.FURNITURE}):
        noun(word, "furniture")
    for word in lex.FOODS:
        noun(word, "food", f"food:{word}")
    for word in lex.FODDER:
        add(word, "noun", "food")
    for word in lex.DRINKS:
        add(word, "noun", "food", "drink")
    for word in lex.DISHES:
        add(word, "noun", "food", "dish")
    for place, about in lex.PLACES.items():
        add(place, "noun", "place", f"place:{place}", "outdoors" if about.outside else "indoors")
    qualities: dict[str, tuple[str, ...]] = {
        "colour": (*lex.COLOURS, *lex.MIXES.values()),
        "size": lex.SIZES,
        "age": lex.AGES,
        "material": lex.MATERIALS,
    }
    for kind, words in qualities.items():
        for word in words:
            add(word, "adjective", kind, f"{kind}:{word}")
    for word in lex.CHARACTERS:
        add(word, "adjective", "character")
    for word in lex.FEELINGS:
        mood = "good" if word in lex.GOOD else "bad"
        add(word, "adjective", "feeling", f"feeling:{word}", f"feeling_{mood}")
    for kind, adjective in lex.WEATHER.items():
        for form in (kind, adjective):
            add(form, "weather", f"weather:{kind}")
    for form in ("rained", "raining", "umbrella", "puddle"):
        add(form, "weather", "weather:rain")
    for form in ("snowing", "snowman"):
        add(form, "weather", "weather:snow")
    for season in lex.SEASONS:
        add(season, "time", "season", f"season:{season}")
    for word in (*lex.DAYTIMES, "night"):
        add(word, "time", "daytime", f"daytime:{word}")
    for day in lex.DAYS:
        add(day, "time", "weekday")
    for word in ("yesterday", "once", "ago"):
        add(word, "time", "time_word:past")
    for word in ("today", "now"):
        add(word, "time", "time_word:present")
    for word in ("tomorrow", "later", "soon", "next"):
        add(word, "time", "time_word:future")
    for value, word in enumerate(lex.NUMBERS[1:], start=1):
        add(word, "number", f"number_word:{value}")
    for word in ("bigger", "smaller", "faster", "taller", "louder", "older", "than", "more"):
        add(word, "comparison")
    for word in ("she", "her"):
        add(word, "pronoun", "gender:female")
    for word in ("he", "him", "his"):
        add(word, "pronoun", "gender:male")
    for word in ("i", "you", "we", "they", "it", "me", "us", "them", "my", "your", "our", "their"):
        add(word, "pronoun")
    for word in ("his", "my", "your", "our", "their"):
        add(word, "possessive")
    for word in ("i", "me", "my", "we", "us", "our"):
        add(word, "first_person")
    for word in ("you", "your"):
        add(word, "second_person")
    for word in ("not", "no", "nobody", "nothing", "never"):
        add(word, "negation")
    for word in ("because", "so"):
        add(word, "causal_word")
    for word in ("where", "what", "who", "how", "why"):
        add(word, "question_word")
    for word in ("in", "on", "under", "behind", "by", "at", "to", "from", "with", "off", "near"):
        add(word, "preposition")
    for word in ("and", "but", "or", "if", "then", "when"):
        add(word, "connective")
    for word in ("a", "an", "the"):
        add(word, "article")
    for word in ("will", "can", "may", "must"):
        add(word, "modal")
    for verb, forms in VERBS.items():
        for form, how in ((forms.past, "past"), (forms.present, "third"), (verb, "base")):
            add(form, "verb", f"verb:{verb}", f"verb_form:{how}")
    for form in ("are", "were"):
        add(form, "verb", "verb:be")
    return facts


WORD_FACTS = _lexical()
MARKS = {",": "comma", ".": "period", "?": "question_mark", "!": "exclamation_mark"}
_WORD = re.compile(r"[A-Za-z]+|[,.?!]")


@cache
def annotate(text: str) -> tuple[tuple[int, int, str], ...]:
    """The lexical facts of a piece of text: start, end (in characters) and name."""
    return tuple(
        (m.start(), m.end(), name)
        for m in _WORD.finditer(text)
        for name in ((MARKS[m[0]],) if m[0] in MARKS else WORD_FACTS.get(m[0].lower(), ()))
    )
