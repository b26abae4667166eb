"""Dashboards made up for tests of the page."""

from collections.abc import Iterator, Sequence

import numpy as np

from kanllama_lightning.dashboard.contents import (
    Ablation,
    Band,
    Column,
    Concept,
    Curve,
    Dashboard,
    Latent,
    Related,
    Scores,
    Window,
)

_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this "
    "have an had they you were their one all we can her has there been if more when will "
    "would who so no river mountain bread window garden letter music winter council member "
    "sentence market doctor engine planet history silver island teacher bridge farmer "
    "captain bottle village thunder forest student kitchen paper station colour theory "
    "number travel morning painter harbour castle lantern whisper"
)
WORDS = _WORDS.split()
HOSTILE = [
    "<script>window.ran=1</script>",
    '"><img src=x onerror="window.ran=1">',
    "</script><script>window.ran=1</script>",
    "<!--<script>",
    "]]>&lt;b&gt;&amp;",
    "'\"`${window.ran=1}",
    "javascript:window.ran=1",
    "a\u202eb\u2066c\u200fd",
    "\\xf0",
    "\x00\x1b[31m\x7f\x9f\ufeff",
    "{script}{blocks}",
    "__proto__",
    "",
    "\ud83d",
    "👩\u200d👩\u200d👧 é\u0301 漢字 مرحبا \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "x" * 10_000,
    "<b>" * 3_334,
    "\u202e" * 10_000,
    "\n\r\n\t\u2028\u2029\u00a0",
]


def texts_of(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    made = dict.fromkeys([" " + w for w in WORDS] + [",", ".", "\n", "", " 漢", "é", "👩"])
    while len(made) < n:
        letters = rng.integers(97, 123, size=(n, 6))
        lengths = rng.integers(2, 7, size=n)
        blank = rng.random(n) < 0.6
        made |= dict.fromkeys(
            " " * int(b) + bytes(row[:k].astype(np.uint8)).decode()
            for row, k, b in zip(letters, lengths, blank, strict=True)
        )
    return list(made)[:n]


def made_up(
    n: int = 300,
    seed: int = 0,
    n_texts: int = 5_000,
    pool: int = 60_000,
    shown: tuple[int, int] = (10, 10),
    width: int = 32,
    texts: Sequence[str] | None = None,
    words: Sequence[str] = (),
) -> Dashboard:
    """A dashboard like a real one.

    Args:
        n: Latents; the last ones are dead, the first two dense.
        seed: Of everything random.
        n_texts: Pieces of text.
        pool: Tokens.
        shown: Windows of a latent: strongest, sampled.
        width: Tokens of a window.
        texts: Pieces of text, instead of random ones.
        words: What titles and explanations are made of, instead of plain words.
    """
    rng = np.random.default_rng(seed)
    texts = list(texts) if texts is not None else texts_of(n_texts, seed)
    rank = 1 / (np.arange(len(texts)) + 5.0)
    tokens = rng.choice(len(texts), size=pool, p=rank / rank.sum()).astype(np.int32)
    n_dead = n // 20
    kinds = ["dense"] * 2 + ["alive"] * (n - 2 - n_dead) + ["dead"] * n_dead
    alive = [k != "dead" for k in kinds]
    frequency = np.sort(10 ** rng.uniform(-6, -1.2, n))[::-1]
    largest = np.exp(rng.normal(1, 0.6, n))
    edges = (2.0 ** (np.arange(33) / 2 - 10)).tolist()
    said = list(words) or [
        f"{a} and {b} in stories" for a, b in zip(WORDS, WORDS[9:], strict=False)
    ]

    def floats(values: np.ndarray) -> list[float | int | str | None]:
        return [float(v) if a else None for v, a in zip(values, alive, strict=True)]

    def of_words(step: int) -> list[float | int | str | None]:
        return [said[j % len(said)] if a and j % step == 0 else None for j, a in enumerate(alive)]

    columns = [
        Column("kind", "kind", list(kinds), "dead: never fired; dense: over a tenth", "text"),
        Column("frequency", "frequency", floats(frequency), "share of tokens it is on", "percent"),
        Column("max", "max", floats(largest), "largest activation, head's units", "number"),
        Column("median", "median", floats(largest / 3), "median activation", "number"),
        Column("kurtosis", "kurtosis", floats(rng.gamma(2, 3, n) + 3), "of its logits", "number"),
        Column("skewness", "skewness", floats(rng.normal(0, 1, n)), "of its logits", "number"),
        Column("cosine", "max cosine", floats(rng.uniform(0.1, 0.9, n)), "largest", "number"),
        Column("explanation", "explanation", of_words(1), "by a language model", "text"),
        Column("score", "score", [j % 5 + 1 if a else None for j, a in enumerate(alive)],
               "1 to 5", "integer"),
        Column("concept", "concept", of_words(7), "known fact", "text"),
    ]  # fmt: skip
    if words:
        columns = [
            c._replace(title=words[i % len(words)], help=words[-i % len(words)])
            for i, c in enumerate(columns)
        ]
    on = rng.choice(len(texts), size=(n, 3), p=rank / rank.sum()).tolist()
    labels = [[texts[t] for t in ids] if a else [] for a, ids in zip(alive, on, strict=True)]
    bins = rng.poisson(np.exp(4 - 0.25 * (np.arange(32) - 18) ** 2 / 9), (n, 32))
    bins[~np.array(alive)] = 0

    def some_tokens(sign: float) -> list[tuple[str, float]]:
        values = sign * np.sort(rng.gamma(2, 0.1, 10))[::-1]
        ids = rng.integers(0, len(texts), 10)
        return [(texts[int(i)], float(v)) for i, v in zip(ids, values, strict=True)]

    def windows(j: int, count: int, top: bool) -> list[Window]:
        made = []
        starts = rng.integers(0, pool - width + 1, count).tolist()
        places = rng.integers(0, width, (count, 3)).tolist()
        parts = rng.uniform(0.1, 0.9, (count, 2)).tolist()
        for i, (start, (peak, *others), part) in enumerate(zip(starts, places, parts, strict=True)):
            most = float(largest[j]) * (1 - 0.05 * i if top else 0.9 * (count - i) / (count + 1))
            fires = dict(zip(others, (most * p for p in part), strict=True)) | {peak: most}
            made.append(Window(start, width, peak, sorted(fires.items())))
        return made

    def latents() -> Iterator[Latent]:
        for j in range(n):
            if not alive[j]:
                yield Latent([], [0] * 32, some_tokens(1), some_tokens(-1), None, [], None, [],
                             None, None, None, [])  # fmt: skip
                continue
            x = np.linspace(-3, 3, 60)
            density = np.exp(-(x**2))
            word = said[j % len(said)]
            yield Latent(
                [
                    Band("strongest" if not words else word, windows(j, shown[0], True)),
                    Band("random firings, strong to weak", windows(j, shown[1], False)),
                ],
                bins[j].tolist(),
                some_tokens(1),
                some_tokens(-1),
                (-0.8, 1.4, rng.poisson(8000 * np.exp(-((np.arange(60) - 22) ** 2) / 60)).tolist()),
                [(int(i), float(v), abs(float(v)) / 9) for i, v in
                 zip(rng.integers(0, 2048, 10), rng.normal(0, 0.2, 10), strict=True)],
                float(rng.uniform(0, 1)),
                [Related(int(o), float(rng.uniform(0, 0.6)), int(rng.integers(50, 9000)),
                         float(rng.uniform(0, 1)) if i else None)
                 for i, o in enumerate(rng.integers(0, n, 5))],
                Ablation(8, 0.0312, 0.0841, some_tokens(1)[:5], some_tokens(-1)[:5])
                if j % 4 == 0 else None,
                Curve(word if words else "hidden unit 12: 31% of its variance bent",
                      "pre-activation", "phi(x)", x.tolist(), (np.tanh(x) + 0.2 * x**2).tolist(),
                      (density / density.sum()).tolist()) if j % 3 == 0 else None,
                Scores(word, word if words else "semantic", j % 5 + 1, 0.81, "judge-8b"),
                [Concept(word, 0.71, 0.8, 0.64)] if j % 7 == 0 else [],
            )  # fmt: skip

    title, about = "Latents: KAN encoder at model.layers.8.mlp", [
        f"Over 4,194,304 tokens of stories: {sum(alive):,} of {n:,} latents fired. Activations are "
        "in units of the head: LM units times its scale (1.23).",
        "The bands hold random firings from the strongest fifth to the weakest.",
    ]  # fmt: skip
    if words:
        title, about = "".join(w for w in words if len(w) < 100), list(words)
    sparks = bins.reshape(n, 16, 2).sum(2).tolist()
    return Dashboard(title, about, columns, labels, sparks, edges, texts, tokens, latents())
