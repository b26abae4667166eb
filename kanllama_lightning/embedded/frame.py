"""How a tale begins and ends."""

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.cast import animal
from kanllama_lightning.embedded.inflection import TENSES, article
from kanllama_lightning.embedded.tale import Tale

WHEN = {
    "past": ("One day", "Yesterday", "Last week", "A long time ago"),
    "present": ("Today", "Right now", "This week"),
    "future": ("Tomorrow", "Next week", "One day soon"),
}
SKY = {
    "rain": "it <rain>",
    "snow": "it <snow>",
    "sun": "the sun <shine>",
    "wind": "a strong wind <blow>",
    "fog": "there <be> fog everywhere",
    "storm": "there <be> a storm",
}


def open_(t: Tale) -> None:
    """Say who, where and when; the tense is drawn here, and the first verb shows it."""
    t.tense = t.choose(TENSES, (0.6, 0.22, 0.18))
    if t.tense == "future":
        t.choose((by_time, by_weather, by_day))(t)
    else:
        t.choose((by_time, by_weather, by_day, by_child, by_pet))(t)


def hero(t: Tale) -> None:
    """Draw the hero, who must be named at once."""
    female = t.maybe(0.5)
    t.hero = t.person(lex.GIRLS if female else lex.BOYS, female=female, part="protagonist")
    t.cast["A"] = t.hero


def by_time(t: Tale) -> None:
    """One day, somebody goes somewhere."""
    when = t.choose(WHEN[t.tense])
    hero(t)
    place = t.choose(tuple(lex.PLACES))
    t.tell(
        "{when}, {A} <{verb}> {to}.".replace("{verb}", t.choose(("go", "walk", "come"))),
        when=when,
        to=lex.PLACES[place].to,
    )
    t.go(place)


def by_weather(t: Tale) -> None:
    """The season, the sky, and somebody under it."""
    season = t.choose(tuple(lex.SEASONS))
    sky = t.choose(lex.SEASONS[season])
    daytime = t.choose(lex.DAYTIMES)
    t.tell(
        f"It <be> {{a}} {{daytime}} in {{season}}, and {SKY[sky]}.",
        a=article(t.choose(("cool", "quiet", "lovely", "long", "busy"))),
        daytime=daytime,
        season=season,
    )
    t.become("weather", sky)
    t.become("season", season)
    t.become("daytime", daytime)
    hero(t)
    place = t.choose(lex.OUTDOORS + lex.INDOORS, (2,) * len(lex.OUTDOORS) + (1,) * len(lex.INDOORS))
    t.tell(
        t.choose(("{A} <be> {at}.", "{A} <play> {at}.", "{A} <wait> {at}.")),
        at=lex.PLACES[place].at,
    )
    t.go(place)


def by_child(t: Tale) -> None:
    """What the hero is like and with whom the hero lives."""
    hero(t)
    t.tell(
        "{A} <be> {a} {child}.",
        a=article(t.choose(lex.CHARACTERS)),
        child="girl" if t.hero.female else "boy",
    )
    t.new_adult()
    t.tell(
        "{A.she} <live> near {home} with {M}.",
        home=t.choose(("a river", "a lake", "a forest", "the market", "a farm", "the sea")),
    )
    place = t.choose(tuple(lex.PLACES))
    adjective = t.choose(tuple(lex.WEATHER.values()))
    t.tell("On {a} day they <go*> {to} together.", a=article(adjective), to=lex.PLACES[place].to)
    t.become("weather", {a: w for w, a in lex.WEATHER.items()}[adjective])
    t.go(place)


def by_day(t: Tale) -> None:
    """A day of the week, and a visit."""
    day = t.choose(lex.DAYS)
    hero(t)
    t.new_adult()
    place = t.choose(tuple(lex.PLACES))
    t.tell(
        "On {day}, {A} and {M} <visit*> {friends} {at}.",
        day=day,
        friends=t.choose(("some friends", "an old friend", "two cousins", "a teacher")),
        at=lex.PLACES[place].at,
    )
    t.become("day", day.lower())
    t.go(place)


def by_pet(t: Tale) -> None:
    """The hero's pet."""
    hero(t)
    t.cast["N"] = animal(t.choose(lex.PETS))
    t.tell("{A} <have> {N.a} named {name}.", name=t.choose(lex.PET_NAMES))
    t.become("pet", "named")
    daytime = t.choose(lex.DAYTIMES)
    place = t.choose(tuple(lex.PLACES))
    t.tell("Every {daytime}, {A} and {N} <go*> {to}.", daytime=daytime, to=lex.PLACES[place].to)
    t.become("daytime", daytime)
    t.go(place)


STILL = {
    "rain": ("The rain <-stop>.", "Rain <fall> on the roofs."),
    "snow": ("Snow <fall> on the trees.", "Everything <be> white."),
    "sun": ("The sun <be> warm.", "There <-be> a cloud in the sky."),
    "wind": ("The wind <shake> the trees.", "The wind <blow> and <+blow>."),
    "fog": ("Nobody <see> far in the fog.", "The fog <stay>."),
    "storm": ("The storm <-stop>.", "The storm <shake> the windows."),
}


def interlude(t: Tale) -> None:
    """A sentence in passing, most often about what still holds."""
    templates = [
        "A {colour} {flier} <fly> by.",
        "Far away, {A} <hear> a {far}.",
        "The clock <show> {hour}.",
        "It <be> very quiet.",
        "{A} <look> at the {colour} flowers.",
    ]
    if t.state("weather"):
        templates += STILL[t.state("weather")]
    if t.state("feeling"):
        templates += [
            "{A} <be> as {feeling} as before.",
            "Everybody <see> that {A} <be> {feeling}.",
        ]
    if t.state("body") == "wet":
        templates.append("{A.s} shoes <be*> wet, too.")
    if t.state("broken"):
        templates.append("{O} <be> in many pieces.")
    if t.state("lost"):
        templates.append("{A} <think> about {O}.")
    if "N" in t.cast:
        templates += ["{N} <look> at {A}.", "{N} <follow> {A}."]
    if "B" in t.cast:
        templates += ["{A} and {B} <laugh*>.", "{B} <take> {A.s} hand."]
    template = t.choose([x for x in templates if x not in t.passed])
    t.passed.add(template)
    t.tell(
        template,
        "in_passing",
        colour=t.choose(lex.COLOURS) if "{colour}" in template else "",
        flier=t.choose(("bird", "butterfly", "bee", "crow")) if "{flier}" in template else "",
        far=t.choose(("bell", "dog", "train", "song")) if "{far}" in template else "",
        hour=t.choose(lex.NUMBERS[1:]) if "{hour}" in template else "",
        feeling=t.state("feeling"),
    )


def close(t: Tale) -> None:
    """An ending that fits the hero's mood."""
    feeling = t.state("feeling")
    if feeling in lex.BAD and t.maybe(0.5):
        t.tell(t.choose(BAD_ENDS), feeling=feeling)
    elif feeling in lex.GOOD and t.maybe(0.5):
        t.tell(t.choose(GOOD_ENDS), feeling=feeling)
    else:
        t.tell(t.choose(ENDS))


BAD_ENDS = (
    "In the end, {A} <-be> {feeling} any more.",
    "{A} <go> home, still a little {feeling}.",
    "That night, {A} <have> a bad dream.",
)
GOOD_ENDS = (
    "In the end, {A} <go> home, {feeling} and tired.",
    "{A} <smile> all the way home.",
    "That night, {A} <have> a good dream.",
)
ENDS = (
    "At night the stars <shine*>, and {A} <sleep> well.",
    "The moon <rise>, and {A} <go> to bed.",
    "It <be> a day to remember.",
    "That <be> the end of the day.",
    "At last {A} <go> home for supper.",
)
