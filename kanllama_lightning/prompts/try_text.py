"""One text under a head: what fires on it, and how the LM goes on with the reconstruction."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kanllama_lightning.functional.losses import kl_divergence
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.splice import put
from kanllama_lightning.lm.token_text import quoted, token_text, visible
from kanllama_lightning.prompts.text_ids import bos, check_length, log_probs, seen_by, text_ids
from kanllama_lightning.types import InputError, ValidationBatch

RUNS = ("original", "sae")
"""What every text is run with; with latents steered there is the run STEERED too."""
STEERED = "steered"


class TokenTrial(NamedTuple):
    """One token of the text."""

    text: str
    """The characters that it completes or adds; "" inside a character of several tokens."""
    token: str
    """What it is by itself; part of a character goes by its bytes, such as `<0xF0>`."""
    replaced: bool
    """False for special tokens and attention sinks, which keep their activation."""
    l0: int
    """Latents that fire; 0 where nothing was replaced."""
    cosine: float
    """Cosine of the activation and its reconstruction; NaN where nothing was replaced."""
    latents: list[tuple[int, float]]
    """Those that fire most, with their activations."""


class Continuation(NamedTuple):
    """What the LM writes, always taking its likeliest token."""

    ids: list[int]
    pieces: list[str]
    """The text that each token adds; together the continuation."""
    stopped: str
    """Why there is no more: "length", "end of text", or "context" (the LM takes no more)."""


class Trial(NamedTuple):
    """A text under a head; plain data."""

    about: str
    """The head, its hook point and LM, in one line."""
    text: str
    tokens: list[TokenTrial]
    predictions: dict[str, list[tuple[str, float]]]
    """Likeliest next tokens and their probabilities, of `original`, `sae`, and `steered`."""
    kl: float
    """KL(original || sae) of the prediction, nats."""
    continuations: dict[str, Continuation]
    """Continuations of the same runs."""
    steer: dict[int, float]
    """Activations that latents were set to in the run `steered`; empty if there is none."""


@torch.no_grad()
def try_text(
    head: SAEHead,
    lm: FrozenLM,
    text: str,
    n_new: int = 20,
    top: int = 5,
    latents: int = 5,
    steer: Mapping[int, float] | None = None,
) -> Trial:
    """Run a text through LM and head; at every step the whole text, without a cache.

    Steered, activations x become x + f(z') - f(z), z' being z with some latents set: the error of
    the reconstruction stays in place, so that what changes is due to the latents alone.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded LM.
        text: Any that fits into the LM's context.
        n_new: Tokens to write on from it, at most.
        top: Likeliest next tokens to return.
        latents: Latents to return per token, at most.
        steer: Activation, head's units, that a latent is set to on every token that counts; 0
            ablates it. Left out, there is no such run.

    Raises:
        InputError: The text is empty or too long, or a number is out of range.
    """
    for name, value, least in (("n_new", n_new, 0), ("top", top, 1), ("latents", latents, 1)):
        if value < least:
            raise InputError(f"{name}={value}: whole numbers from {least} up")
    set_to = dict(steer or {})
    check_steering(head, set_to)
    ids = given_ids(lm, text)
    seen = seen_by(head, lm, [ids])
    runs = (*RUNS, STEERED) if set_to else RUNS
    log_p = {run: log_probs(_logits(head, lm, seen, run, set_to)) for run in runs}
    predictions = {}
    for run in runs:
        best = log_p[run].topk(min(top, lm.vocab_size))
        names = [token_text(lm.tokenizer, i) for i in best.indices.tolist()]
        predictions[run] = list(zip(names, best.values.exp().tolist(), strict=True))
    return Trial(
        about=f"{head.title}, {head.d_sae} latents at {lm.hook.name} of {lm.name}",
        text=text,
        tokens=_tokens(lm, text, ids, seen, latents),
        predictions=predictions,
        kl=float(kl_divergence(log_p["original"], log_p["sae"])),
        continuations={run: continuation(head, lm, ids, run, n_new, set_to) for run in runs},
        steer=set_to,
    )


def given_ids(lm: FrozenLM, text: str) -> list[int]:
    """What the LM is given of a text: BOS and its tokens.

    Raises:
        InputError: The text is empty, or longer than the LM's context.
    """
    ids = [bos(lm), *text_ids(lm, text, "text")]
    check_length(lm, text, len(ids), "text")
    return ids


def check_steering(head: SAEHead, steer: Mapping[int, float]) -> None:
    """Refuse latents that there are not, and activations that are no finite numbers.

    Raises:
        InputError: There is one.
    """
    for latent, value in steer.items():
        if not (type(latent) is int and 0 <= latent < head.d_sae):
            raise InputError(f"steer={latent!r}: there are latents 0 to {head.d_sae - 1}")
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise InputError(f"steer={latent}: {value!r} is no activation; give a finite number")


def _logits(
    head: SAEHead, lm: FrozenLM, seen: ValidationBatch, run: str, steer: Mapping[int, float]
) -> Float[Tensor, " vocab"]:
    """Logits after the last token, with what the run splices in."""
    acts = seen.prefix.acts
    if run == "sae":
        acts = put(acts, seen.mask, seen.out.x_hat)
    elif run == STEERED:
        acts = put(acts, seen.mask, steered(head, seen.rows, steer))
    return lm.logits(lm.resume(seen.prefix, acts)[0, -1])


def steered(
    head: SAEHead, rows: Float[Tensor, "tok d_row"], steer: Mapping[int, float]
) -> Float[Tensor, "tok d_model"]:
    """y + f(z') - f(z), z' the latents with some of them set to given activations.

    Args:
        head: f is its decoder.
        rows: What it is given; y is what it is to write of it (`SAEHead.target`).
        steer: Activations, by latent.
    """
    latents = head.encode(rows)
    changed = latents.clone()
    for latent, value in steer.items():
        changed[:, latent] = value
    return head.target(rows) + head.decode(changed) - head.decode(latents)


def continuation(
    head: SAEHead,
    lm: FrozenLM,
    ids: list[int],
    run: str,
    n_new: int,
    steer: Mapping[int, float],
) -> Continuation:
    """What the LM writes on from ids, BOS first, in one of the runs.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded LM.
        ids: From `given_ids`.
        run: Of RUNS, or STEERED.
        n_new: Tokens to write, at most.
        steer: What the run STEERED sets latents to.
    """
    new: list[int] = []
    ends = _ends(lm)
    stopped = "length"
    while len(new) < n_new:
        if lm.positions is not None and len(ids) + len(new) > lm.positions:
            stopped = "context"
            break
        logits = _logits(head, lm, seen_by(head, lm, [ids + new]), run, steer)
        token = int(log_probs(logits).argmax())
        if token in ends:
            stopped = "end of text"
            break
        new.append(token)
    return Continuation(new, _pieces(lm, ids[1:], new), stopped)


def _ends(lm: FrozenLM) -> set[int]:
    """Tokens after which there is no text; a model may have several."""
    given = [lm.tokenizer.eos_token_id, getattr(lm.config, "eos_token_id", None)]
    each = [i for ids in given for i in (ids if isinstance(ids, list) else [ids])]
    return {int(i) for i in each if i is not None}


def _pieces(lm: FrozenLM, before: list[int], new: list[int]) -> list[str]:
    """What each new token adds to the text; a cut character belongs to its last token."""

    def decoded(ids: list[int]) -> str:
        known = [i for i in ids if i < len(lm.tokenizer)]
        made: str = lm.tokenizer.decode(known, clean_up_tokenization_spaces=False)
        return made

    pieces = []
    done = len(decoded(before).rstrip("�"))
    for n in range(1, len(new) + 1):
        whole = decoded(before + new[:n])
        end = len(whole) if n == len(new) else len(whole.rstrip("�"))
        pieces.append(whole[done:end])
        done = max(done, end)
    return pieces


def _tokens(
    lm: FrozenLM, text: str, ids: list[int], seen: ValidationBatch, latents: int
) -> list[TokenTrial]:
    codes = seen.out.codes.sparse()
    cosine = torch.nn.functional.cosine_similarity(seen.x, seen.out.x_hat, dim=1).tolist()
    l0 = seen.out.codes.l0().tolist()
    # row in x of every position; -1 where nothing is replaced
    row_of = torch.where(seen.mask[0], seen.mask[0].cumsum(0) - 1, -1).tolist()[1:]
    made = []
    for token, part, row in zip(ids[1:], _parts(lm, text, ids[1:]), row_of, strict=True):
        name = token_text(lm.tokenizer, token)
        if row < 0:
            made.append(TokenTrial(part, name, False, 0, float("nan"), []))
            continue
        top = strongest(codes, row, latents)
        made.append(TokenTrial(part, name, True, l0[row], cosine[row], top))
    return made


def strongest(codes: SparseCodes, row: int, n: int) -> list[tuple[int, float]]:
    """Latents that fire most on one token, with their activations.

    Args:
        codes: Of some tokens.
        row: Which of them.
        n: How many latents at most.
    """
    own = (codes.rows == row) & (codes.values != 0)
    values, which = codes.values[own], codes.latents[own]
    best = values.abs().topk(min(n, len(values))).indices
    return list(zip(which[best].tolist(), values[best].tolist(), strict=True))


def _parts(lm: FrozenLM, text: str, ids: list[int]) -> list[str]:
    """The text, cut by tokens; a character of several tokens goes to the first of them."""
    if not getattr(lm.tokenizer, "is_fast", False):
        return [token_text(lm.tokenizer, i) for i in ids]
    spans = lm.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    parts, done = [], 0
    for _, end in spans:
        parts.append(text[done : max(done, end)])
        done = max(done, end)
    parts[-1] += text[done:]
    return parts


def show(trial: Trial, labels: Mapping[int, str] | None = None) -> RenderableType:
    """The trial for a terminal; no markup, no control characters of the text get through.

    Args:
        trial: What `try_text` returned.
        labels: What is known about latents, shown beside their numbers.
    """
    set_to = [Text(f"steered: {steering(trial, labels or {})}")] if trial.steer else []
    return Group(
        Text(visible(trial.about), style="bold"),
        Text(f"text: {quoted(trial.text)}"),
        *set_to,
        Text(""),
        _table_of_predictions(trial),
        Text(f"KL(original || reconstruction) of this prediction: {trial.kl:.4f} nats"),
        Text(""),
        *(_continuation(trial, run) for run in trial.continuations),
        Text(""),
        _table_of_tokens(trial, labels or {}),
    )


NAMES = {"original": "original", "sae": "reconstruction", STEERED: "steered"}


def _table_of_predictions(trial: Trial) -> Table:
    table = Table(title="Next token", title_justify="left")
    for run in trial.predictions:
        table.add_column(NAMES[run], overflow="fold")
        table.add_column("probability", justify="right")
    for guesses in zip(*trial.predictions.values(), strict=True):
        cells = [cell for token, p in guesses for cell in (Text(quoted(token)), Text(f"{p:.4f}"))]
        table.add_row(*cells)
    return table


def _continuation(trial: Trial, run: str) -> Text:
    """The continuation; what differs from the original's is underlined and bold."""
    own = trial.continuations[run]
    same = shared(trial, run)
    line = Text(f"{NAMES[run]:<15}", style="dim")
    line.append(f"...{visible(''.join(own.pieces[:same]))}", style="none")
    line.append(visible("".join(own.pieces[same:])), style="bold underline")
    if own.stopped != "length":
        line.append(f" [{own.stopped}]", style="dim")
    return line


def shared(trial: Trial, run: str) -> int:
    """Number of tokens with which a continuation begins as the original's; of the original's own,
    as all the others' do."""
    if run == RUNS[0]:
        return min(shared(trial, other) for other in trial.continuations if other != run)
    one, two = (trial.continuations[name].ids for name in (RUNS[0], run))
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def steering(trial: Trial, labels: Mapping[int, str]) -> str:
    """What was set to what, in words."""
    return ", ".join(
        f"latent {latent}{visible(label(latent, labels))} to {value:g} on every token"
        for latent, value in trial.steer.items()
    )


def _table_of_tokens(trial: Trial, labels: Mapping[int, str]) -> Table:
    table = Table(title="Tokens of the text", title_justify="left")
    table.add_column("token", overflow="fold")
    table.add_column("L0", justify="right")
    table.add_column("cos", justify="right")
    table.add_column("latents that fire most (activation)", overflow="fold", ratio=1)
    for token in trial.tokens:
        if not token.replaced:
            table.add_row(Text(quoted(token.token)), "", "", Text("not replaced", style="dim"))
            continue
        listed = Text("  ").join(
            Text.assemble((f"{latent}", "cyan"), visible(label(latent, labels)), f" {value:.2f}")
            for latent, value in token.latents
        )
        table.add_row(
            Text(quoted(token.token)), Text(f"{token.l0}"), Text(f"{token.cosine:.3f}"), listed
        )
    return table


def label(latent: int, labels: Mapping[int, str]) -> str:
    """What is known about a latent, to stand behind its number."""
    return f" ({labels[latent]})" if latent in labels else ""
