"""Draws `latents.svg`: latents of a run on the embedded world that mean something, on a story.

    python docs/draw_latents.py RUN

For each fact that the world knows, the latent and threshold that tell it best are found (F1 on one
half of the stories; the F1 shown is that of the other half), and the clearest few of different
kinds are drawn.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from kanllama_lightning.embedded import FACTS
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.heads.head import read_card
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.concept_matching import Stories, codes_of, read_stories, recover

STORIES = 600
CANDIDATES, ROWS, COLUMNS = 30, 6, 104
PUNCTUATION = {"period", "comma", "quote_open", "quote_close", "question", "exclamation"}
EM, LINE = 7.2, 19
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7a5195", "#444444")


def choose(read: Stories, head: SAEHead) -> list[tuple[int, int, float]]:
    """(fact, latent, F1 on the second half) of the clearest facts, one per kind."""
    first, second = read.halves()
    codes = [codes_of(head, half.x) for half in (first, second)]
    found = recover(codes[0], first.facts, codes[1], second.facts)
    common = first.facts.float().mean(0)[found.fact] > 0.004
    chosen: list[tuple[int, int, float]] = []
    kinds: set[str] = set()
    for i in (found.chosen_f1 * common).argsort(descending=True).tolist():
        fact, latent = int(found.fact[i]), int(found.latent[i])
        kind = FACTS[fact].split(":")[0]
        if kind in kinds | PUNCTUATION or latent in [c[1] for c in chosen]:
            continue
        kinds.add(kind)
        chosen.append((fact, latent, float(found.f1[i])))
    return chosen[:CANDIDATES]


def draw(
    shown: Stories, latents: Tensor, chosen: Sequence[tuple[int, int, float]], title: str
) -> str:
    """The story once per latent, tokens shaded by activation."""
    body: list[str] = []
    text_of_story = shown.told[int(shown.story[0])].text
    y = 34.0
    for (fact, latent, score), colour in zip(chosen, COLOURS, strict=False):
        label = f"latent {latent}: {FACTS[fact]} (F1 {score:.2f})"
        body.append(f'<text x="12" y="{y}" class="l" fill="{colour}">{escape(label)}</text>')
        y += LINE
        column = 0
        top = float(latents[:, latent].max().clamp_min(1e-6))
        for t, (start, end) in enumerate(shown.spans.tolist()):
            text = text_of_story[start:end]
            if column + len(text) > COLUMNS:
                column, y = 0, y + LINE
                text = text.lstrip()
            x, width = 12 + column * EM, len(text) * EM
            alpha = 0.75 * float(latents[t, latent]) / top
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
    read = read_stories(lm, STORIES)
    chosen = choose(read, head)

    def seen(one: int) -> list[tuple[int, int, float]]:
        """The candidates whose fact holds somewhere in the story."""
        held = read.facts[read.story == one].any(0)
        return [c for c in chosen if held[c[0]]][:ROWS]

    short = [i for i, told in enumerate(read.told) if len(told.text) < 3.5 * COLUMNS]
    one = max(short or range(STORIES), key=lambda i: sum(score for _, _, score in seen(i)))
    shown = read.only(read.story == one)
    latents = codes_of(head, shown.x).dense()
    name = card["head"].rsplit(".", 1)[-1]
    title = f"{name}, {head.d_sae} latents at {card['provenance']['hook_point']}: one story"
    args.out.write_text(draw(shown, latents, seen(one), title))


if __name__ == "__main__":
    main()
