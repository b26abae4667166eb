"""Episodes of counting, sums, shopping, lists, sizes, colours and work."""

from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.cast import Some
from kanllama_lightning.embedded.inflection import article, plural
from kanllama_lightning.embedded.tale import Tale, episode


@episode(2.0)
def addition(t: Tale) -> None:
    """What one has, and is given, makes a sum."""
    food = t.choose(lex.FOODS)
    a, b = t.choose((2, 3, 4, 5)), t.choose((1, 2, 3, 4, 5))
    t.tell("{A} <have> {a}.", a=Some(a, food))
    giver = t.friend() if t.maybe(0.5) else t.adult()
    t.tell("{giver} <give> {A.him} {b}.", giver=giver, b=Some(b, food))
    t.tell("Now {A} <have> {sum}.", "sum", sum=Some(a + b, food))


@episode(1.5)
def subtraction(t: Tale) -> None:
    """What one eats is gone."""
    food = t.choose(lex.FOODS)
    a = t.choose((5, 6, 7, 8))
    b = t.choose((1, 2, 3, 4))
    t.tell("There <be*> {a} in the {box}.", a=Some(a, food), box=t.choose(("basket", "bag", "box")))
    t.tell(
        "{A} <eat> {b} of them, so {left} <be{many}> left.".replace(
            "{many}", "" if a - b == 1 else "*"
        ),
        "sum",
        b=lex.NUMBERS[b],
        left=lex.NUMBERS[a - b],
    )


@episode(1.5)
def counting(t: Tale) -> None:
    """Animals are counted aloud, and some come or go."""
    kind = t.choose(lex.PLACES[t.place].animals)
    n = t.choose((3, 4, 5))
    t.tell(
        "{A} <count> the {kind}: {count}.",
        "counting",
        kind=plural(kind),
        count=", ".join(lex.NUMBERS[1 : n + 1]),
    )
    if t.maybe(0.6):
        more = t.choose((2, 3))
        if t.maybe(0.6):
            t.tell(
                "{more} more <come*>, so there <be*> {sum}.",
                "sum",
                more=lex.NUMBERS[more],
                sum=Some(n + more, kind),
            )
        else:
            t.tell("One of them <leave>, so there <be*> {sum}.", "sum", sum=Some(n - 1, kind))


@episode(1.0)
def lesson(t: Tale) -> None:
    """Somebody asks for a sum."""
    t.adult()
    a, b = t.choose((1, 2, 3, 4, 5)), t.choose((1, 2, 3, 4, 5))
    t.tell(
        '"What is {a} and {b}?" {M} <ask>{how}.',
        a=lex.NUMBERS[a],
        b=lex.NUMBERS[b],
        speaker=t.speaker("M"),
    )
    t.tell('"{sum}!" {A} <answer>{how}.', "sum", sum=lex.NUMBERS[a + b], speaker=t.speaker("A"))
    if t.maybe(0.5):
        t.tell('"Very good, {A.called}," {M} <say>{how}.', speaker=t.speaker("M"))
        t.feel("proud")


@episode(3.0, lambda t: t.place in ("market", "shop"))
def shopping(t: Tale) -> None:
    """Food is bought for coins."""
    food = t.choose(lex.FOODS)
    n, price = t.choose((2, 3, 4, 5)), t.choose((1, 2))
    t.tell("{A} <want> to buy some {food}.", food=plural(food))
    cost = "One costs one coin" if price == 1 else "One costs two coins"
    t.tell(f'"{cost}," the {{who}} <say>.', who=t.choose(("baker", "farmer")))
    t.tell(
        "{A} <buy> {n} and <+pay> {coins}.", "sum", n=lex.NUMBERS[n], coins=Some(n * price, "coin")
    )


@episode(1.2)
def packing(t: Tale) -> None:
    """A list of things."""
    nouns = tuple(n for n in lex.THINGS if lex.THINGS[n].falls != "break")
    first = t.choose(nouns)
    second = t.choose(tuple(n for n in nouns if n != first))
    food = Some(t.choose((2, 3, 4)), t.choose(lex.FOODS))
    t.tell(
        "{A} <put> {first}, {second} and {food} into a {c} bag.",
        "list",
        first=article(first),
        second=article(second),
        food=food,
        c=t.choose(lex.COLOURS),
    )
    if t.maybe(0.5):
        t.tell(
            '"Do not forget the {what}!" somebody <call>.',
            what=t.choose((first, second, food.noun)),
        )


@episode(1.2)
def sizes(t: Tale) -> None:
    """Two animals are compared."""
    a = t.choose(lex.SIZED)
    b = t.choose(tuple(k for k in lex.SIZED if k != a))
    t.tell(
        '"Is {a} bigger than {b}?" {A} <ask>{how}.',
        a=article(a),
        b=article(b),
        speaker=t.speaker("A"),
    )
    t.adult()
    bigger = lex.ANIMALS[a].size > lex.ANIMALS[b].size
    t.tell(
        (
            '"Yes, {a} is bigger than {b}," {M} <say>{how}.'
            if bigger
            else '"No, {a} is smaller than {b}," {M} <say>{how}.'
        ),
        "comparison_clause",
        a=article(a),
        b=article(b),
        speaker=t.speaker("M"),
    )


@episode(1.2)
def paint(t: Tale) -> None:
    """Colours are mixed, and something is painted."""
    if t.maybe(0.6):
        pair = t.choose(tuple(lex.MIXES))
        t.tell(
            "[cause_clause|{A} <mix> {pair}] and [effect_clause|<+get> {mix}].",
            pair=pair,
            mix=lex.MIXES[pair],
        )
        colour = lex.MIXES[pair]
    else:
        colour = t.choose(lex.COLOURS)
        t.tell("{A} <open> a jar of {colour} paint.", colour=colour)
    what = t.choose(
        ("cat", "house", "flower", "boat", "bird", "tree", "horse", "kite", "star", "train")
    )
    t.tell(
        "{A.she} <paint> a {size} {colour} {what}.",
        size=t.choose(lex.SIZES),
        colour=colour,
        what=what,
    )


@episode(1.2, lambda t: t.place in ("garden", "farm", "field", "park", "hill"))
def planting(t: Tale) -> None:
    """A seed grows if it gets water."""
    colour = t.choose(lex.COLOURS)
    t.tell("{A} <plant> a seed and <+water> it.")
    t.tell(
        "[cause_clause|The seed <get> enough water], so [effect_clause|a {c} flower <grow>].",
        c=colour,
    )
    if t.maybe(0.4):
        t.friend()
        t.tell("{A} <pick> the {c} flower for {B}.", "gift", c=colour)


@episode(3.0, lambda t: t.place == "kitchen")
def cooking(t: Tale) -> None:
    """Something is cooked."""
    t.adult()
    dish = t.choose(lex.DISHES)
    t.tell("{M} and {A} <cook*> {dish}.", dish=dish)
    if t.maybe(0.3):
        t.tell(
            "[cause_clause|The stove <be> too hot], so [effect_clause|the {dish} <burn>].",
            dish=dish,
        )
    else:
        t.tell(
            "The {dish} <smell> good, and {A} <eat> {n}.",
            dish=dish,
            n=t.choose(("one bowl", "two bowls", "three bowls")),
        )


@episode(1.0)
def work(t: Tale) -> None:
    """The hero meets somebody at work."""
    who, does, wish = t.choose(WORK)
    t.tell("{A} <watch> the {who}, who " + does + ".", who=who)
    t.tell(
        '"When I am older, I will {wish}, too," {A} <say>{how}.', wish=wish, speaker=t.speaker("A")
    )


WORK = (
    ("teacher", "<teach> the children", "teach children"),
    ("farmer", "<feed> the animals", "feed animals"),
    ("baker", "<bake> bread", "bake bread"),
    ("doctor", "<help> an ill child", "help ill children"),
    ("gardener", "<plant> flowers", "plant flowers"),
)


@episode(1.0)
def music(t: Tale) -> None:
    """Music is made, well or too loudly."""
    tool = t.choose(("drum", "violin", "piano", "flute", "trumpet"))
    t.tell("{A} <play> the {c} {tool}.", c=t.choose(lex.COLOURS), tool=tool)
    end = t.choose(
        (
            "[cause_clause|The {tool} <be> too loud], so [effect_clause|the baby <wake> up].",
            "Everybody <clap> and <+ask> for one more song.",
            "It <-be> easy, but {A} <practise> every day.",
        )
    )
    t.tell(end, tool=tool)
