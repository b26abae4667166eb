"""Draws `latents.svg`: latents of a run on the embedded world that mean something, on a story.

    python docs/draw_latents.py RUN

The embedded world knows, for every token, which facts hold there. For each fact the latent that
fires on it most exclusively is found (F1 on one half of the stories; the F1 shown is that of the
other half), and the clearest few of different kinds are drawn.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kanllama_lightning.embedded import FACTS, Story, story
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.heads.base import read_card
from kanllama_lightning.lm import FrozenLM

STORIES, SEED = 600, 7
CANDIDATES, ROWS, COLUMNS = 30, 6, 104
PUNCTUATION = {"period", "comma", "quote_open", "quote_close", "question", "exclamation"}
EM, LINE = 7.2, 19
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7a5195", "#444444")


class Read(NamedTuple):
    """A story as the head sees it."""

    story: Story
    offsets: list[tuple[int, int]]
    latents: Tensor
    """[tok d_sae]"""
    facts: Tensor
    """[tok fact], True where a fact holds."""


def read(lm: FrozenLM, head: SAEHead, index: int) -> Read:
    """Run one story through the LM and the head; BOS is left out."""
    told = story(SEED, index)
    tokens = lm.tokenizer(told.text, return_offsets_mapping=True, add_special_tokens=False)
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *tokens["input_ids"]]])
    offsets = [(start, end) for start, end in tokens["offset_mapping"]]
    names = {name: i for i, name in enumerate(FACTS)}
    facts = torch.zeros(len(offsets), len(FACTS), dtype=torch.bool)
    for fact in told.facts:
        for t, (start, end) in enumerate(offsets):
            if start < fact.end and fact.start < end:
                facts[t, names[fact.name]] = True
    return Read(told, offsets, head.encode(lm.acts(ids)[0, 1:]), facts)


def f1(fired: Tensor, facts: Tensor) -> Tensor:
    """F1 of every (fact, latent) pair."""
    both = facts.float().T @ fired.float()
    return 2 * both / (facts.sum(0)[:, None] + fired.sum(0)[None]).clamp_min(1)


def choose(reads: Sequence[Read]) -> list[tuple[int, int, float]]:
    """(fact, latent, F1 on the second half) of the clearest facts, one per kind."""
    half = len(reads) // 2
    parts = [
        (torch.cat([r.latents for r in part]) > 0, torch.cat([r.facts for r in part]))
        for part in (reads[:half], reads[half:])
    ]
    first, second = (f1(*part) for part in parts)
    common = parts[0][1].float().mean(0) > 0.004
    best = first.max(1)
    order = (best.values * common).argsort(descending=True)
    chosen: list[tuple[int, int, float]] = []
    kinds: set[str] = set()
    for fact in order.tolist():
        latent, kind = int(best.indices[fact]), FACTS[fact].split(":")[0]
        if kind in kinds | PUNCTUATION or latent in [c[1] for c in chosen]:
            continue
        kinds.add(kind)
        chosen.append((fact, latent, float(second[fact, latent])))
        if len(chosen) == CANDIDATES:
            break
    return chosen


def draw(shown: Read, chosen: Sequence[tuple[int, int, float]], title: str) -> str:
    """The story once per latent, tokens shaded by activation."""
    body: list[str] = []
    y = 34.0
    for (fact, latent, score), colour in zip(chosen, COLOURS, strict=False):
        label = f"latent {latent}: {FACTS[fact]} (F1 {score:.2f})"
        body.append(f'<text x="12" y="{y}" class="l" fill="{colour}">{escape(label)}</text>')
        y += LINE
        column = 0
        top = float(shown.latents[:, latent].max().clamp_min(1e-6))
        for t, (start, end) in enumerate(shown.offsets):
            text = shown.story.text[start:end]
            if column + len(text) > COLUMNS:
                column, y = 0, y + LINE
                text = text.lstrip()
            x, width = 12 + column * EM, len(text) * EM
            alpha = 0.75 * float(shown.latents[t, latent]) / top
            if alpha > 0:
                body.append(
                    f'<rect x="{x:.1f}" y="{y - 13:.1f}" width="{width:.1f}" height="17" '
                    f'fill="{colour}" fill-opacity="{alpha:.2f}"/>'
                )
            body.append(
                f'<text x="{x:.1f}" y="{y:.1f}" textLength="{width:.1f}" '
                f'xml:space="preserve">{escape(text)}</text>'
            )
            column += len(text)
        y += LINE + 12
    width, height = 24 + COLUMNS * EM, y
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12" fill="#1d2733">'
        "<style>.l,.h{font-family:Helvetica,Arial,sans-serif;font-size:13px;font-weight:bold}"
        f'</style><rect width="100%" height="100%" fill="#fff"/><text x="12" y="16" class="h">'
        f"{escape(title)}</text>{''.join(body)}</svg>\n"
    )


def main() -> None:
    """Read the run, choose, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run on the embedded model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "latents.svg")
    args = parser.parse_args()
    card = read_card(args.run / "head")
    head = SAEHead.load(args.run / "head")
    lm = FrozenLM(card["provenance"]["lm"], card["provenance"]["hook_point"]).load_()
    with torch.no_grad():
        reads = [read(lm, head, i) for i in range(STORIES)]
    chosen = choose(reads)
    short = [r for r in reads if len(r.story.text) < 3.5 * COLUMNS] or reads

    def seen(r: Read) -> list[tuple[int, int, float]]:
        """The candidates whose fact holds somewhere in the story."""
        return [c for c in chosen if r.facts[:, c[0]].any()][:ROWS]

    shown = max(short, key=lambda r: sum(score for _, _, score in seen(r)))
    name = card["class_path"].rsplit(".", 1)[-1]
    title = f"{name}, {head.d_sae} latents at {card['provenance']['hook_point']}: one story"
    args.out.write_text(draw(shown, seen(shown), title))


if __name__ == "__main__":
    main()
