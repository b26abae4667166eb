"""Episodes of causes and effects: things fall, weather changes, bodies and moods answer."""

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.tale import CAUSES, Tale, episode

CULPRITS = (
    "{A} <bump> into the {surface}",
    "a mouse <run> over the {surface}",
    "somebody <kick> the {surface}",
    "{A} <turn> around too fast",
)


@episode(3.0)
def fall(t: Tale) -> None:
    """Something falls, and does what such things do."""
    fragile = t.maybe(0.6)
    item = t.new_thing(lex.FRAGILE if fragile else lex.STURDY)
    surface = t.choose(t.ledges)
    falls = lex.THINGS[item.noun].falls
    t.tell("There <be> {O.a} on the {surface}.", surface=surface)
    if t.maybe(0.4):
        t.adult()
        outlook = "will_break_next" if fragile else "will_not_break_next"
        t.tell(
            '{M} <say>, "Be careful! [conditional|[cause_clause|If {O} falls off the {surface}], '
            f'[effect_clause|[{outlook}|it will] {falls}]]."',
            speaker=t.speaker("M"),
            surface=surface,
        )
    t.tell(
        f"[cause_clause|{t.choose(CULPRITS)}], and "
        "[effect_clause|{O} <fall> off the {surface}].",
        surface=surface,
    )
    if fragile:
        break_apart(t, item.noun)
        return
    verb, _, rest = falls.partition(" ")
    told = t.choose((f"[effect_clause|It <{verb}>{rest and ' ' + rest}].", "It <-break>."))
    t.tell(told)
    if t.maybe(0.5):
        t.tell("{A} <pick> it up and <+put> it back.")


def break_apart(t: Tale, noun: str) -> None:
    """A fragile thing breaks, and the hero minds."""
    t.tell(
        "[effect_clause|[will_break_next|It] <break>]{how}.",
        how=t.choose((" into pieces", " with a crash")),
    )
    t.become("broken", noun)
    mood = t.choose(("sad", "sorry"))
    t.tell(f"{{A}} <be> {mood}.")
    t.feel(mood)
    if t.maybe(0.5):
        t.tell('"I am sorry about {O}," {A} <say>{how}.', speaker=t.speaker("A"))
        t.adult()
        t.tell(
            t.choose(
                (
                    '{M} <smile> and <+say>, "Nobody is hurt, so I am not angry."',
                    '"We can buy a new {O.noun}," {M} <say>{how}.',
                    "{M} <sweep> up the pieces.",
                )
            ),
            speaker=t.speaker("M"),
        )


@episode(2.0, lambda t: bool(t.state("broken")))
def mend(t: Tale) -> None:
    """What broke is mended, or is not."""
    if t.maybe(0.6):
        t.tell("{then} {A} <fix> {O} with glue.", then=t.then())
        t.cease("broken")
        t.tell(t.choose(("Now it <be> as good as new.", "Now {O} <-be> broken any more.")))
        t.feel("proud")
    else:
        t.tell("Nobody <fix> {O}, because it <have> too many pieces.")


@episode(1.5, lambda t: t.outside and t.state("weather") in ("rain", ""))
def rain(t: Tale) -> None:
    """Rain falls, and who has no umbrella gets wet."""
    if not t.state("weather"):
        t.tell("Dark clouds <come*>, and it <begin> to rain.")
        t.become("weather", "rain")
    told = t.choose(
        (
            "[cause_clause|{A} <have> no umbrella], so [effect_clause|{A.she} <get> wet].",
            "[effect_clause|{A} <get> wet], because [cause_clause|it <rain> hard].",
            "[cause_clause|{A} <have> an umbrella], so [effect_clause|{A.she} <stay> dry].",
        ),
        (0.3, 0.3, 0.4),
    )
    t.tell(told)
    if told.endswith("dry]."):
        t.become("body", "dry")
    else:
        t.become("body", "wet")
        if t.maybe(0.5):
            t.tell("{A.she} <shake> {A.her} wet hair and <+laugh>.")
    if t.maybe(0.3):
        t.tell("There <be> a puddle, and {A} <jump> right over it.")


@episode(1.2, lambda t: t.outside and t.state("weather") in ("rain", "storm", "fog"))
def clears(t: Tale) -> None:
    """Bad weather ends."""
    kind = t.state("weather")
    t.tell(f"{{then}} the {kind} <stop>, and the sun <come> out.", then=t.then())
    t.become("weather", "sun")
    if kind != "fog" and t.maybe(0.6):
        told = (
            "[cause_clause|The sun <shine> on the grass], so [effect_clause|it <dry> quickly].",
            '"Look, there is a rainbow!" {A} <say>{how}.',
        )
        t.tell(t.choose(told), speaker=t.speaker("A"))


@episode(1.5, lambda t: t.outside and t.state("weather") == "snow")
def snow(t: Tale) -> None:
    """Snow is built with, and melts."""
    t.friend()
    t.tell(
        "{A} and {B} <build*> a snowman with {n} for a nose.",
        n=t.choose(("a carrot", "a stone", "a stick")),
    )
    if t.maybe(0.5):
        t.tell("[cause_clause|The sun <come> out], so [effect_clause|the snowman <melt>].")
        t.become("weather", "sun")


@episode(1.5, lambda t: t.outside and t.state("weather") == "wind")
def wind(t: Tale) -> None:
    """Wind lifts a kite or takes a hat."""
    kite = t.choose(lex.COLOURS)
    t.tell(
        "[cause_clause|The wind <be> strong], so [effect_clause|{A.s} {c} kite <fly> high].", c=kite
    )
    if t.maybe(0.5):
        t.tell(
            "[cause_clause|The string <break>], and [effect_clause|the {c} kite <fly> away].",
            c=kite,
        )
        t.feel("sad")


@episode(1.5, lambda t: t.state("weather") == "storm")
def storm(t: Tale) -> None:
    """Thunder frightens, and a friend comforts."""
    t.friend()
    t.tell("[cause_clause|The thunder <be> loud], so [effect_clause|{A} <be> afraid].")
    t.feel("afraid")
    t.tell("{B} <hold> {A.her} hand, and {A} <be> calm again.")
    t.feel("calm")


@episode(1.5, lambda t: t.outside and t.state("weather") == "sun")
def heat(t: Tale) -> None:
    """The sun is hot."""
    answer = (
        "<drink> some cold water",
        "<sit> in the shade",
        "<swim> for a while",
        "<take> off {A.her} coat",
    )
    t.tell(f"[cause_clause|The sun <be> hot], so [effect_clause|{{A}} {t.choose(answer)}].")
    t.feel("hot")


@episode(1.2, lambda t: t.outside and t.state("weather") == "fog")
def fog(t: Tale) -> None:
    """Fog hides the way."""
    t.tell("[cause_clause|The fog <be> thick], so [effect_clause|{A} <-see> the way].")
    t.feel("worried")
    if t.maybe(0.5):
        t.tell("{A.she} <hear> a bell and <+follow> the sound.")
        t.feel("calm")


ANSWERS = {
    "happy": (
        "{A.she} <sing> a little song.",
        "{A.she} <smile> at everybody.",
        "{A.she} <dance> and <+clap> {A.her} hands.",
    ),
    "tired": (
        "{A.she} <yawn> and <+sit> down.",
        "{A.she} <close> {A.her} eyes.",
        "{A.she} <sleep> for an hour.",
    ),
    "bored": ("{A.she} <draw> a {c} {what}.", "{A.she} <look> for a game to play."),
    "hungry": ("{A.she} <eat> a bowl of {dish}.", "{A.she} <eat> some bread and cheese."),
    "thirsty": ("{A.she} <drink> a glass of {drink}.", "{A.she} <drink> from the tap."),
    "cold": ("{A.she} <put> on a {c} coat.", "{A.she} <make> some hot tea."),
    "lonely": ("{A.she} <call> {A.her} cousin.", "{A.she} <read> an old letter from a friend."),
    "worried": ("{A.she} <think> about it for a while.", "{A.she} <ask> for help."),
}


@episode(2.5)
def mood(t: Tale) -> None:
    """A feeling comes with its cause, and leads to what such feelings lead to."""
    feeling = t.choose(tuple(f for f in CAUSES if f != t.state("feeling")))
    cause = t.choose(CAUSES[feeling])
    because = t.choose(
        (
            f"[cause_clause|Because {cause}], [effect_clause|{{A}} <be> {feeling}].",
            f"[effect_clause|{{A}} <be> {feeling}], because [cause_clause|{cause}].",
        )
    )
    t.tell(because)
    t.feel(feeling)
    if t.maybe(0.7):
        told = t.choose(ANSWERS[feeling])
        dish = t.choose(lex.DISHES) if "{dish}" in told else ""
        drink = t.choose(lex.DRINKS) if "{drink}" in told else ""
        colour = t.choose(lex.COLOURS) if "{c}" in told else ""
        what = t.choose(("house", "boat", "star", "flower")) if "{what}" in told else ""
        t.tell(told, dish=dish, drink=drink, c=colour, what=what)


@episode(1.0)
def lost(t: Tale) -> None:
    """Something is lost and looked for, and not found yet."""
    t.new_thing(lex.LOST)
    t.tell("[cause_clause|{A} <lose> {A.her} {O.own}], so [effect_clause|{A.she} <be> sad].")
    t.become("lost", "yes")
    t.feel("sad")
    first, second = t.choose(tuple((a, b) for a in t.spots for b in t.spots if a != b))
    t.tell(
        "{A.she} <look> {first} and {second}, but {O} <-be> there.",
        "search",
        first=first,
        second=second,
    )


@episode(4.0, lambda t: bool(t.state("lost")))
def found(t: Tale) -> None:
    """What was lost is found."""
    spot = t.choose(t.spots)
    if t.maybe(0.5):
        t.friend()
        t.tell("{then} {B} <find> {O.full} {spot}.", then=t.then(), spot=spot)
        t.tell('"Here is your {O.noun}, {A.called}!" {B} <say>{how}.', speaker=t.speaker("B"))
    else:
        t.tell("At last {A} <find> {O.full} {spot}.", spot=spot)
    t.cease("lost")
    t.tell("{A} <be> happy to have it back.")
    t.feel("happy")
