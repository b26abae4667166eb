"""The embedded world: small stories, what is true in each stretch of them, and their probability.

The grammar is unambiguous (one derivation for each text) and draws nothing that the text does
not show, so the log-probability of the derivation is that of the text. Its mean per token is the
lowest cross-entropy a language model of these stories can reach.
"""

import random
from operator import itemgetter
from typing import NamedTuple

from kanllama_lightning.embedded import counting, events, meetings, outings  # noqa: F401  (episodes)
from kanllama_lightning.embedded import lexicon as lex
from kanllama_lightning.embedded.frame import close, interlude, open_
from kanllama_lightning.embedded.inflection import MARKS, TENSES, WORD_FACTS
from kanllama_lightning.embedded.lessons import tell_lessons
from kanllama_lightning.embedded.narrator import Fact
from kanllama_lightning.embedded.tale import EPISODES, Tale

SHARE_OF_LESSONS = 0.12
EPISODES_TOLD = {2: 0.2, 3: 0.35, 4: 0.3, 5: 0.15}


class Story(NamedTuple):
    """One document of the world."""

    text: str
    facts: list[Fact]
    """Which facts hold where, by start."""
    log_prob: float
    """Natural logarithm of the probability of this text, in nats."""


def story(seed: int, index: int) -> Story:
    """Story number `index` of the world's stream `seed`; the same on every machine."""
    return recite(Tale(random.Random(f"{seed}:{index}")))


def recite(tale: Tale) -> Story:
    """Tell one whole story with the given narrator."""
    if tale.maybe(SHARE_OF_LESSONS):
        tell_lessons(tale)
        text = tale.finish(["genre:lessons"])
    else:
        tell_tale(tale)
        text = tale.finish(["genre:tale", f"tense:{tale.tense}"])
    return Story(text, sorted(tale.facts, key=itemgetter(0)), tale.log_prob)


def tell_tale(tale: Tale) -> None:
    """Opening, a few episodes, none of them twice, and a closing."""
    open_(tale)
    left = list(EPISODES)
    for _ in range(tale.choose(tuple(EPISODES_TOLD), tuple(EPISODES_TOLD.values()))):
        possible = [e for e in left if e.when(tale)]
        episode = tale.choose(possible, [e.weight for e in possible])
        left.remove(episode)
        if tale.maybe(0.4):
            interlude(tale)
        episode.tell(tale)
    close(tale)


def _facts() -> tuple[str, ...]:
    names = {name for facts in WORD_FACTS.values() for name in facts} | set(MARKS.values())
    names |= {f"now:place:{p}" for p in lex.PLACES} | {"now:where:indoors", "now:where:outdoors"}
    names |= {f"now:weather:{w}" for w in lex.WEATHER} | {f"now:season:{s}" for s in lex.SEASONS}
    names |= {f"now:feeling:{f}" for f in lex.FEELINGS} | {f"now:broken:{n}" for n in lex.FRAGILE}
    names |= {f"now:daytime:{d}" for d in lex.DAYTIMES} | {f"now:day:{d.lower()}" for d in lex.DAYS}
    names |= {"now:body:wet", "now:body:dry", "now:lost:yes", "now:pet:named"}
    names |= {f"speaker:{s.lower()}" for s in lex.GIRLS + lex.BOYS + lex.WOMEN + lex.MEN}
    names.add("speaker:doctor")
    names |= {f"{kind}:{tense}" for kind in ("tense", "narrated_verb") for tense in TENSES}
    names |= {f"refers_to:{p}" for p in ("protagonist", "friend", "adult", "animal", "object")}
    return tuple(sorted(names | STRUCTURE))


STRUCTURE = {
    "genre:tale", "genre:lessons", "in_quote", "quote_open", "quote_close", "question",
    "exclamation", "addressee", "subject", "object", "possessive", "first_mention",
    "second_mention", "negated", "counted", "counting", "sum", "list", "gift", "search",
    "comparison_clause", "conditional", "cause_clause", "effect_clause", "will_break_next",
    "will_not_break_next", "broken_thing", "manner", "in_passing",
}  # fmt: skip
FACTS = _facts()
"""The names of all facts of the world, sorted."""
