"""Episodes that belong to a place or a time: games, boats, rides, visits, drinks, wishes."""

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.tale import Tale, episode


@episode(2.0, lambda t: t.outside)
def catch(t: Tale) -> None:
    """A ball is thrown, and caught or not."""
    t.friend()
    t.tell("{A} <throw> a {c} ball to {B}.", c=t.choose(lex.COLOURS))
    end = t.choose(
        (
            "{B} <catch> it and <+throw> it back.",
            "{B} <-catch> it, and it <roll> down the hill.",
            "[cause_clause|{B} <miss> it], so [effect_clause|the ball <land> in a bush].",
        )
    )
    t.tell(end)


@episode(3.0, lambda t: t.place in ("river", "lake", "beach"))
def boat(t: Tale) -> None:
    """Wood floats, and stones sink."""
    what = t.choose(("leaf", "stick", "feather", "stone", "coin", "brick"))
    t.tell("{A} <drop> a {c} {what} into the water.", c=t.choose(lex.COLOURS), what=what)
    if what in ("leaf", "stick", "feather"):
        t.tell("[cause_clause|It <be> light], so [effect_clause|it <float>].")
    else:
        t.tell("[cause_clause|It <be> heavy], so [effect_clause|it <sink>].")
    if t.maybe(0.5):
        t.tell(
            t.choose(
                (
                    "{A} <sail> a paper boat.",
                    "{A} <splash> in the water and <+laugh>.",
                    "{A} <see> a silver fish under the water.",
                )
            )
        )


@episode(3.0, lambda t: t.place in ("farm", "barn", "field"))
def ride(t: Tale) -> None:
    """Farm animals give things, and some carry a rider."""
    what = t.choose(("milk", "eggs", "wool", "ride"))
    if what == "ride":
        t.tell(
            "{A} <ride> a {c} horse around the {where}.",
            where=t.place,
            c=t.choose(("brown", "black", "white", "gray")),
        )
        if t.maybe(0.5):
            t.tell("{A.she} <hold> on with both hands and <+laugh>.")
    else:
        giver = {"milk": "cow", "eggs": "hens", "wool": "sheep"}[what]
        t.tell(
            "{A} <get> {some} from the {giver}.",
            giver=giver,
            some={"milk": "fresh milk", "eggs": "fresh eggs", "wool": "soft wool"}[what],
        )
        if t.maybe(0.5):
            made = {"milk": "butter", "eggs": "a cake", "wool": "a scarf"}[what]
            t.tell(
                "The farmer <make> {made} from it."
                if what != "eggs"
                else "The farmer <make> {made} with them.",
                made=made,
            )


@episode(1.2, lambda t: not t.outside)
def visitor(t: Tale) -> None:
    """Somebody knocks."""
    t.tell("Somebody <knock> on the door.")
    t.tell('"Who is there?" {A} <ask>{how}.', speaker=t.speaker("A"))
    who = t.choose(("neighbour", "postman", "wind", *lex.WORKERS))
    if who == "wind":
        t.tell("Nobody <answer>, because it <be> only the wind.")
    else:
        t.tell("It <be> the {who}, and {A} <open> the door.", who=who)
        if t.maybe(0.6):
            t.tell(
                "The {who} <bring> {what} for {A}.",
                who=who,
                what=t.choose(("a letter", "a basket of plums", "good news", "a parcel")),
            )


@episode(1.2)
def pour(t: Tale) -> None:
    """A full cup is spilled or emptied."""
    drink = t.choose(lex.DRINKS)
    t.tell("{A} <pour> some {drink} into a {c} cup.", drink=drink, c=t.choose(lex.COLOURS))
    if t.maybe(0.5):
        t.tell(
            "[cause_clause|The cup <be> too full], so "
            "[effect_clause|the {drink} <spill> on the floor].",
            drink=drink,
        )
        if t.maybe(0.5):
            t.tell("{A.she} <clean> it up with a towel.")
    else:
        t.tell("{A.she} <drink> it, and now the cup <be> empty.")


@episode(1.0)
def wish(t: Tale) -> None:
    """A wish, or a promise."""
    what = f"a {t.choose(lex.COLOURS)} {t.choose(WISHES)}"
    t.tell("{A} <wish> for {what}.", what=what)
    if t.maybe(0.5):
        t.adult()
        t.tell(
            '"You will get {what} if you are good," {M} <promise>{how}.',
            what=what,
            speaker=t.speaker("M"),
        )


WISHES = ("puppy", "bicycle", "drum", "boat", "bag", "coat", "kite", "train")


@episode(1.2)
def whisper(t: Tale) -> None:
    """Friends whisper."""
    t.friend()
    t.tell("{A} <whisper> something to {B}.")
    end = t.choose(
        (
            "{B} <laugh> and <+shake> {B.her} head.",
            '"I will not tell anybody," {B} <promise>{how}.',
            "But it <be> too loud here, and {B} <-hear> it.",
        )
    )
    t.tell(end, speaker=t.speaker("B"))


@episode(1.0, lambda t: t.state("feeling") != "ill")
def ill(t: Tale) -> None:
    """Somebody falls ill and gets help."""
    aches = t.choose(("head", "tooth", "foot", "ear", "arm"))
    t.tell(
        "[cause_clause|{A.s} {part} <hurt>], so [effect_clause|{A.she} <visit> the doctor].",
        part=aches,
    )
    t.feel("ill")
    if t.maybe(0.6):
        t.tell(
            '"{cure}," the doctor <say>.',
            speaker="doctor",
            cure=t.choose(
                (
                    "Stay in bed for two days",
                    "Drink some hot tea",
                    "It is not bad",
                    "Take this medicine",
                )
            ),
        )
        t.feel("calm")


CHORES = (
    "carry the wood",
    "wash the plates",
    "sweep the floor",
    "close the gate",
    "open the window",
    "feed the hens",
    "water the flowers",
    "clean the table",
)


@episode(1.0)
def promise(t: Tale) -> None:
    """A chore is done or put off."""
    t.adult()
    chore = t.choose(CHORES)
    t.tell('"Please {chore}," {M} <say>{how} to {A}.', chore=chore, speaker=t.speaker("M"))
    verb, rest = chore.split(" ", 1)
    if t.maybe(0.6):
        t.tell(f"{{A}} <{verb}> {rest} at once.")
    else:
        t.tell(f"{{A}} <-{verb}> {rest}, and {{M}} <be> angry.")
        t.feel("sorry")
