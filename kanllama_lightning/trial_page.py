"""A trial as a page of HTML."""

from collections.abc import Iterable, Mapping
from html import escape

from kanllama_lightning.prompts.reading import quoted, visible
from kanllama_lightning.trial import NAMES, TokenTrial, Trial, label, shared, steering

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; --soft: #666;
  --card: #f4f6f8; --shade: 0, 114, 178; --mark: #ffe3c9; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --paper: #16181b; --line: #444;
  --soft: #a0a0a0; --card: #22262b; --shade: 86, 180, 233; --mark: #6b3b14; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto 9rem;
  padding: 0 1rem; color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
p.note, .stop {{ color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }}
.text {{ font-size: 1.15rem; line-height: 2.1; white-space: pre-wrap; overflow-wrap: anywhere; }}
.t {{ background: rgba(var(--shade), var(--a)); border-radius: 3px; padding: 2px 0; cursor: help;
  box-shadow: inset 0 -1px rgba(var(--shade), .5); margin-right: 1px; }}
.t:hover, .t:focus {{ outline: 2px solid rgb(var(--shade)); outline-offset: 1px; }}
.t.off {{ box-shadow: inset 0 -1px var(--line); }}
.c {{ color: var(--soft); font-size: .7em; }}
.pop {{ display: none; position: fixed; left: 50%; transform: translateX(-50%); bottom: 1rem;
  width: min(58rem, 94vw); max-height: 45vh; overflow: auto; box-sizing: border-box; z-index: 1;
  padding: .6rem 1rem; font-size: .95rem; line-height: 1.5; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; white-space: normal; }}
.t:hover > .pop, .t:focus > .pop {{ display: block; }}
.t:hover > .pop {{ z-index: 2; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }}
td.token {{ min-width: 5em; }}
th {{ font-weight: 600; white-space: nowrap; }} .n {{ text-align: right; white-space: nowrap; }}
code {{ font-family: ui-monospace, monospace; white-space: pre-wrap; }}
mark {{ background: var(--mark); color: inherit; border-radius: 3px; }}
.l {{ display: inline-block; margin-right: 1rem; }} .l b {{ color: rgb(var(--shade)); }}
.bar {{ display: inline-block; height: .7em; background: rgb(var(--shade)); border-radius: 2px; }}
.weights {{ width: 25%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{about}</p>
<h2>Text</h2>
<p class="text">{text}</p>
<p class="note">The shade says how strong the token's strongest latent is (at most {most}).
Point at a token, or click it, for its latents. Underlined in grey: not replaced, a special token or
attention sink. A small dot is a further token of the same character.</p>
<h2>Next token</h2>
{predictions}
<p class="note">KL of the prediction with the reconstruction from the original's: {kl} nats.</p>
<h2>Continuation</h2>
{continuations}
<p class="note">Always the likeliest token; marked where the two part. With the reconstruction it is
spliced in at every token but special ones and attention sinks, new tokens too.{steered}</p>
<h2>Tokens</h2>
<table><thead><tr><th>token</th><th class="n">L0</th><th class="n">cosine</th>
<th>latents that fire most, with activations</th></tr></thead>
<tbody>
{rows}
</tbody></table>
<p class="note">L0: latents that fire on the token. Cosine: of the activation and its
reconstruction.</p>
</body>
</html>
"""


def trial_page(trial: Trial, title: str, labels: Mapping[int, str] | None = None) -> str:
    """The trial as a page of HTML, complete in itself: nothing is fetched, no script runs.

    Args:
        trial: What `try_text` returned.
        title: Heading.
        labels: What is known about latents, shown beside their numbers.
    """
    known = labels or {}
    strongest = [max((abs(v) for _, v in t.latents), default=0.0) for t in trial.tokens]
    most = max(strongest, default=0.0)
    shaded = zip(trial.tokens, strongest, strict=True)
    return PAGE.format(
        title=_html(title),
        about=_html(trial.about),
        text="".join(_span(token, value / most if most else 0, known) for token, value in shaded),
        most=f"{most:.2f}",
        predictions=_predictions_html(trial),
        kl=f"{trial.kl:.4f}",
        continuations=_continuations_html(trial),
        steered=_html(
            f" Steered: {steering(trial, known)}; the error of the reconstruction stays in place."
        )
        if trial.steer
        else "",
        rows="\n".join(_row(token, known) for token in trial.tokens),
    )


def _html(text: str) -> str:
    return escape(visible(text))


def _lines(text: str) -> str:
    """Escaped, but line breaks stay: a text is shown as it was written."""
    return "\n".join(_html(line) for line in text.replace("\r\n", "\n").split("\n"))


def _span(token: TokenTrial, strength: float, labels: Mapping[int, str]) -> str:
    shown = _lines(token.text) if token.text else '<span class="c">·</span>'
    kind = "t" if token.replaced else "t off"
    pop = (
        f'<span class="pop"><code>{_html(quoted(token.token))}</code> '
        + (f"L0 {token.l0}, cosine {token.cosine:.3f}<br>{_latents(token, labels)}"
           if token.replaced else "not replaced")
        + "</span>"
    )  # fmt: skip
    return (
        f'<span class="{kind}" tabindex="0" style="--a:{0.75 * strength:.3f}">{shown}{pop}</span>'
    )


def _latents(token: TokenTrial, labels: Mapping[int, str]) -> str:
    return " ".join(
        f'<span class="l"><b>{latent}</b>{_html(label(latent, labels))} {value:.2f}</span>'
        for latent, value in token.latents
    )


def _row(token: TokenTrial, labels: Mapping[int, str]) -> str:
    name = f"<td><code>{_html(quoted(token.token))}</code></td>"
    if not token.replaced:
        return f'<tr>{name}<td></td><td></td><td class="stop">not replaced</td></tr>'
    return (
        f'<tr>{name}<td class="n">{token.l0}</td><td class="n">{token.cosine:.3f}</td>'
        f"<td>{_latents(token, labels)}</td></tr>"
    )


def _predictions_html(trial: Trial) -> str:
    def cells(guess: tuple[str, float]) -> str:
        token, p = guess
        bar = f'<td class="weights"><span class="bar" style="width:{100 * p:.1f}%"></span></td>'
        name = f'<td class="token"><code>{_html(quoted(token))}</code></td>'
        return f'{name}<td class="n">{p:.4f}</td>{bar}'

    names = "".join(f'<th colspan="3">{NAMES[run]}</th>' for run in trial.predictions)
    return _table(
        names,
        ("".join(map(cells, guesses)) for guesses in zip(*trial.predictions.values(), strict=True)),
    )


def _continuations_html(trial: Trial) -> str:
    def row(run: str) -> str:
        same = shared(trial, run)
        own = trial.continuations[run]
        alike, differs = ("".join(part) for part in (own.pieces[:same], own.pieces[same:]))
        marked = f"<mark>{_lines(differs)}</mark>" if differs else ""
        stop = f' <span class="stop">[{own.stopped}]</span>' if own.stopped != "length" else ""
        return f"<th>{NAMES[run]}</th><td><code>{_lines(alike)}{marked}</code>{stop}</td>"

    return _table("", map(row, trial.continuations))


def _table(head: str, rows: Iterable[str]) -> str:
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>{top}<tbody>\n{body}\n</tbody></table>"
