"""Episodes with friends, family and animals: giving, asking, playing, talking."""

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.cast import animal
from kanllama_lightning.embedded.inflection import article
from kanllama_lightning.embedded.tale import Tale, episode


@episode(2.0)
def beast(t: Tale) -> None:
    """An animal appears, calls, and is fed."""
    t.new_animal()
    kind = lex.ANIMALS[t.creature.noun]
    t.tell("{A} <see> {N.a} {where}.", where=lex.PLACES[t.place].at)
    if t.maybe(0.5):
        t.tell(f"{{N}} <{kind.sound}> at {{A.him}}.")
    if t.maybe(0.6):
        t.tell(
            "[cause_clause|{N} <be> hungry], so [effect_clause|{A} <give> it some {food}].",
            food=kind.food,
        )
        if t.maybe(0.4):
            t.tell('"It likes {food}," {A} <say>{how}.', food=kind.food, speaker=t.speaker("A"))
    elif t.maybe(0.5):
        t.tell('"Can you {cannot}?" {A} <ask> {N}.', cannot=kind.cannot, speaker=t.speaker("A"))
        t.tell(f"But {{N}} only <{kind.sound}>.")


@episode(1.2, lambda t: "N" in t.cast)
def hunt(t: Tale) -> None:
    """Two animals run after each other; the larger is not always the faster."""
    first = t.creature.noun
    other = t.choose(tuple(a for a in lex.SIZED if a != first))
    t.tell("{then} {other} <chase> {N}.", then=t.then(), other=article(other))
    end = t.choose(("fast", "slow", "friend"))
    if end == "fast":
        t.tell("{N} <be> faster than the {other}, so it <get> away.", other=other)
    elif end == "slow":
        t.tell("The {other} <be> faster than {N}, but it <stop> and <+sniff>.", other=other)
    else:
        t.tell("In the end {N} and the {other} <become*> friends.", other=other)


@episode(1.2, lambda t: "N" in t.cast and "pet" not in t.now)
def named(t: Tale) -> None:
    """The animal is given a name."""
    name = t.choose(lex.PET_NAMES)
    t.tell('"I will call you {name}," {A} <say>{how} to {N}.', name=name, speaker=t.speaker("A"))
    t.become("pet", "named")
    if t.maybe(0.5):
        t.tell(f"{{name}} <{lex.ANIMALS[t.creature.noun].sound}> for joy.", name=name)


@episode(1.5)
def gift(t: Tale) -> None:
    """The hero gives a thing to a friend."""
    t.friend()
    if t.has_thing():
        t.tell("{A} <give> {O.full} to {B}.", "gift")
    else:
        t.new_thing(lex.TOYS)
        t.tell("{A} <give> {O.a} to {B}.", "gift")
    t.tell('"Thank you, {A.called}!" {B} <say>{how}.', speaker=t.speaker("B"))
    if t.maybe(0.5):
        t.tell("{B} <be> very glad to have {O}.")


@episode(1.5)
def quarrel(t: Tale) -> None:
    """Two children want one thing, and may share it."""
    t.friend()
    if not t.has_thing():
        t.new_thing(lex.TOYS)
    t.tell('"This {O.noun} is mine," {A} <say>{how}.', speaker=t.speaker("A"))
    t.tell('"No, it is not yours, it is mine!" {B} <answer>{how}.', speaker=t.speaker("B"))
    t.feel("angry")
    if t.maybe(0.7):
        t.tell(
            "But {then} they <share*> {O}.", then=t.choose(("soon", "after a while", "in the end"))
        )
        t.feel("glad")
    else:
        t.tell("{B} <take> {O} and <+run> away.")
        t.become("lost", "yes")


@episode(2.0, lambda t: t.has_thing())
def where(t: Tale) -> None:
    """Somebody asks where a thing is."""
    t.friend()
    spot = t.choose(t.spots)
    t.tell('"Where is {O.full}?" {B} <ask>{how}.', speaker=t.speaker("B"))
    t.tell('"It is {spot}," {A} <answer>{how}.', spot=spot, speaker=t.speaker("A"))
    if t.maybe(0.6):
        there = t.maybe(0.7)
        t.tell(
            "{B} <look> {spot}, and there it <be>."
            if there
            else "{B} <look> {spot}, but it <-be> there.",
            spot=spot,
        )


@episode(1.5)
def seek(t: Tale) -> None:
    """Hide and seek."""
    t.friend()
    t.tell("{A} and {B} <play*> hide and seek.")
    t.tell('{B} <count>, "One, two, three, four, five!"', "counting", speaker=t.speaker("B"))
    spot = t.choose(t.spots)
    t.tell("{A} <hide> {spot}.", spot=spot)
    if t.maybe(0.6):
        t.tell("{B} <look> {spot} and <+find> {A.him}.", spot=spot)
    else:
        t.tell("{B} <-find> {A.him}, so {A} <win>.")
        t.feel("proud")


@episode(1.5, lambda t: t.outside)
def race(t: Tale) -> None:
    """A race; the faster one wins."""
    t.friend()
    goal = t.choose(("tree", "gate", "bridge", "fence", "house"))
    t.tell("{A} and {B} <run*> a race to the {c} {goal}.", c=t.choose(lex.COLOURS), goal=goal)
    if t.maybe(0.5):
        t.tell("[cause_clause|{A} <be> faster than {B}], so [effect_clause|{A.she} <win>].")
        t.feel("proud")
    else:
        t.tell("[cause_clause|{B} <be> faster than {A}], so [effect_clause|{B.she} <win>].")
        feeling = t.choose(("sad", "glad"))
        t.tell("{A} <be> {feeling} about it.", feeling=feeling)
        t.feel(feeling)


@episode(1.5)
def permit(t: Tale) -> None:
    """A grown-up sets a condition, and the hero meets it or does not."""
    t.adult()
    task, done = t.choose(TASKS)
    treat = t.choose(TREATS)
    t.tell(
        '{M} <say>, "[conditional|[cause_clause|If you {task}], '
        '[effect_clause|you may have {treat}]]."',
        task=task,
        treat=treat,
        speaker=t.speaker("M"),
    )
    if t.maybe(0.7):
        t.tell(
            f"[cause_clause|{{A}} {done}], so [effect_clause|{{A.she}} <get> {{treat}}].",
            treat=treat,
        )
        t.feel("happy")
    else:
        t.tell("But {A} <be> too tired for that, so {A.she} <-get> {treat}.", treat=treat)
        t.feel("tired")


TREATS = ("an apple", "a cookie", "a story", "a piece of cake", "some juice", "two plums")
TASKS = (
    ("eat your soup", "<eat> {A.her} soup"),
    ("water the flowers", "<water> the flowers"),
    ("wash your hands", "<wash> {A.her} hands"),
    ("clean your room", "<clean> {A.her} room"),
    ("feed the hens", "<feed> the hens"),
    ("help me", "<help> {M}"),
)


@episode(1.5)
def plan(t: Tale) -> None:
    """A grown-up speaks of tomorrow."""
    t.adult()
    place = t.choose(tuple(p for p in lex.PLACES if p != t.place))
    t.tell(
        '"{when} we will go {there}," {M} <say>{how}.',
        when=t.choose(("Tomorrow", "Next week", "On Sunday")),
        there=lex.PLACES[place].to,
        speaker=t.speaker("M"),
    )
    if t.maybe(0.6):
        t.tell(
            t.choose(
                (
                    '"Can {B} come with us?" {A} <ask>{how}.'
                    if "B" in t.cast
                    else '"Must we go?" {A} <ask>{how}.',
                    '"I cannot wait!" {A} <say>{how}.',
                    '"I do not want to go," {A} <say>{how}.',
                )
            ),
            speaker=t.speaker("A"),
        )


@episode(1.2)
def riddle(t: Tale) -> None:
    """A riddle about an animal."""
    t.friend()
    kind = t.choose(lex.SIZED)
    t.tell(
        '"What animal says {says}?" {B} <ask>{how}.',
        says=lex.ANIMALS[kind].says,
        speaker=t.speaker("B"),
    )
    if t.maybe(0.75):
        t.tell('"A {kind}!" {A} <answer>{how}.', kind=kind, speaker=t.speaker("A"))
        t.tell('"That is right," {B} <say>{how}.', speaker=t.speaker("B"))
    else:
        wrong = t.choose(tuple(k for k in lex.SIZED if k != kind))
        t.tell('"A {kind}?" {A} <answer>{how}.', kind=wrong, speaker=t.speaker("A"))
        t.tell('"No, it is a {kind}," {B} <say>{how}.', kind=kind, speaker=t.speaker("B"))


@episode(1.2)
def tale_in_tale(t: Tale) -> None:
    """Somebody reads a story about an animal."""
    kind = t.choose(tuple(lex.ANIMALS))
    about = lex.ANIMALS[kind]
    t.tell(
        "{A} <read> a book about {N} that <want> to {cannot}.",
        N=animal_phrase(t, kind),
        cannot=about.cannot,
    )
    if t.maybe(0.6):
        t.tell(
            '"{N} that can {cannot}? That is funny!" {A} <say>{how}.',
            N=article(kind).capitalize(),
            cannot=about.cannot,
            speaker=t.speaker("A"),
        )


def animal_phrase(t: Tale, kind: str) -> str:
    """An animal with an adjective drawn now."""
    return article(f"{t.choose(animal(kind).adjectives)} {kind}")


@episode(1.0)
def secret(t: Tale) -> None:
    """A child tells another how it feels."""
    t.friend()
    feeling = t.choose(("happy", "sad", "bored", "afraid", "lonely", "proud"))
    t.tell('"How are you, {A.called}?" {B} <ask>{how}.', speaker=t.speaker("B"))
    t.tell('"I am {feeling} today," {A} <answer>{how}.', feeling=feeling, speaker=t.speaker("A"))
    t.feel(feeling)
    good = feeling in lex.GOOD
    t.tell("{B} <smile> at {A}." if good else "{B} <hug> {A.him}.")


@episode(2.5)
def move(t: Tale) -> None:
    """The story goes to another place."""
    place = t.choose(tuple(p for p in lex.PLACES if p != t.place))
    told = t.choose(("{then} {A} <go> {to}.", "{then} {A} <run> {to}.", "{then} {A} <walk> {to}."))
    t.tell(told, then=t.then(), to=lex.PLACES[place].to)
    t.go(place)
