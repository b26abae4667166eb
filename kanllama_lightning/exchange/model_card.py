"""The card of a published head: what it is, how good it is, how it is loaded."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

NAME = "README.md"
TAGS = ("sparse-autoencoder", "mechanistic-interpretability", "kanllama-lightning")
ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""Names of models that are on the hub, and no folders."""
MOST_SHOWN = 300


class CardFacts(NamedTuple):
    """What a card is written from."""

    repository: str
    title: str
    kind: str
    """Class of the head."""
    facts: Sequence[tuple[str, str]]
    """What it is, by rows."""
    columns: Sequence[str]
    """Of the figures: `figure`, and the text that each is of."""
    figures: Sequence[Sequence[str]]
    notes: Sequence[str]
    commands: Sequence[str]
    """What made it and its figures."""
    lm: str | None
    hook_point: str | None
    saelens: str | None
    """The architecture that it has in SAELens' folder; None where there is none."""
    plug_in: bool
    """Whether SAELens needs our plug-in for it."""
    license: str | None
    transcoder: bool
    version: str
    commit: str | None


def plain(text: str) -> str:
    """Text of others, as code in one line of Markdown: it can open nothing."""
    flat = " ".join(str(text).replace("`", "'").replace("|", "/").split())
    return f"`{flat[:MOST_SHOWN]}`" if flat else ""


def card(facts: CardFacts) -> str:
    """The card as Markdown with the hub's metadata in front."""
    return (
        f"---\n{yaml.safe_dump(_metadata(facts), sort_keys=False)}---\n\n"
        + "\n\n".join(
            [
                f"# {facts.title}",
                _what(facts),
                _table(("", ""), [(name, value) for name, value in facts.facts]),
                "## How good it is",
                _figures(facts),
                "## How it is loaded",
                _loading(facts),
                "## How it was made",
                _made(facts),
                "## Limits",
                _limits(facts),
            ]
        )
        + "\n"
    )


def _metadata(facts: CardFacts) -> dict[str, Any]:
    tags = [*TAGS]
    if "KAN" in facts.kind or "Spline" in facts.kind or "Curved" in facts.kind:
        tags.append("kolmogorov-arnold-network")
    if facts.saelens is not None:
        tags.append("saelens")
    if facts.transcoder:
        tags.append("transcoder")
    found: dict[str, Any] = {"library_name": "kanllama-lightning", "tags": tags}
    if facts.lm is not None and ON_THE_HUB.fullmatch(facts.lm):
        found["base_model"] = facts.lm
    if facts.license is not None:
        found["license"] = facts.license
    return found


def _what(facts: CardFacts) -> str:
    what = "A transcoder" if facts.transcoder else "A sparse autoencoder"
    where = f" at {plain(facts.hook_point)}" if facts.hook_point else ""
    of = f" of {plain(facts.lm)}" if facts.lm else ""
    made = f"KAN-LLaMA Lightning {facts.version}"
    commit = f" (commit {plain(facts.commit)})" if facts.commit else ""
    return f"{what}{where}{of}, of the kind `{facts.kind}`, trained with {made}{commit}."


def _figures(facts: CardFacts) -> str:
    if not facts.figures:
        return "No record was made before it was published: nothing is known of its quality."
    said = _table(facts.columns, facts.figures)
    notes = "\n".join(f"- {note}" for note in facts.notes)
    more = "All figures, with what they are of: `record/` in this repository."
    return "\n\n".join(part for part in (said, notes, more) if part)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in line) + " |"
        for line in lines
    )


def _loading(facts: CardFacts) -> str:
    ours = (
        "With its LM, for texts, latents and steering:\n\n```python\n"
        "from kanllama_lightning import load\n\n"
        f'sae = load("hub://{facts.repository}")\n```\n\n'
        "or its record anew, on a text of yours:\n\n```\n"
        f"python evaluate.py report hub://{facts.repository} --text FILE\n```"
    )
    alone = (
        "The head alone, for activations that you have (torch and this package, no LM):\n\n"
        "```python\nfrom kanllama_lightning.heads import SAEHead\n\n"
        'head = SAEHead.load("FOLDER")  # where this repository was downloaded to\n```'
    )
    if facts.saelens is None:
        return f"{ours}\n\n{alone}"
    plug_in = "import kanllama_lightning.exchange.saelens_plugin\n" if facts.plug_in else ""
    theirs = (
        f"In SAELens (architecture `{facts.saelens}`"
        + (", which the plug-in of this package registers" if facts.plug_in else "")
        + f"):\n\n```python\n{plug_in}from sae_lens import SAE\n\n"
        f'sae = SAE.from_pretrained("{facts.repository}", "saelens")\n```'
    )
    return "\n\n".join([ours, theirs, alone])


def _made(facts: CardFacts) -> str:
    if not facts.commands:
        return "Nothing is known but what stands above: a head was published, not a run."
    return "```\n" + "\n".join(facts.commands) + "\n```"


def _limits(facts: CardFacts) -> str:
    lines = [
        "On other text, and for another LM or place in it, nothing is known of its quality.",
        "A latent is named by what it fires on; that is no proof of what the LM does with it.",
        "Text of the LM's training may be in what latents fire on; no text is in this repository.",
    ]
    if facts.license is None:
        lines.append("No licence was given; ask its author before you use it beyond reading.")
    return "\n".join(f"- {line}" for line in lines)
