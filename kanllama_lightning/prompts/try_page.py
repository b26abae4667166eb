"""A trial as a page of HTML."""

from collections.abc import Mapping

from kanllama_lightning.lm.token_text import quoted, visible
from kanllama_lightning.pages import PAGES
from kanllama_lightning.prompts.try_text import NAMES, Trial, label, shared, steering


def trial_page(trial: Trial, title: str, labels: Mapping[int, str] | None = None) -> str:
    """The trial as a page of HTML, complete in itself: nothing is fetched, no script runs.

    Args:
        trial: What `try_text` returned.
        title: Heading.
        labels: What is known about latents, shown beside their numbers.
    """
    strongest = [max((abs(v) for _, v in t.latents), default=0.0) for t in trial.tokens]
    most = max(strongest, default=0.0)
    return PAGES.get_template("trial.html.j2").render(
        title=visible(title),
        trial=trial,
        labels=labels or {},
        names=NAMES,
        most=most,
        shaded=list(zip(trial.tokens, [v / (most or 1) for v in strongest], strict=True)),
        visible=visible,
        lines=_lines,
        named=lambda token: visible(quoted(token)),
        label=label,
        shared=shared,
        steering=steering,
    )


def _lines(text: str) -> str:
    """Visible, but line breaks stay: a text is shown as it was written."""
    return "\n".join(visible(line) for line in text.replace("\r\n", "\n").split("\n"))
