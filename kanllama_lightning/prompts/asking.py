"""How an LM goes on from a prompt, untouched and with its activations replaced (METHODS C).

Every run gets the same ids, [BOS] + prompt + answer but for its last token, and figures are read
from them: at the last position of the prompt how the LM goes on, at those after it how likely it
finds the rest of the answer. Later tokens change nothing at earlier positions. What a run says is
decoded greedily from the prompt alone, each token after those that the run itself has said.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.functional.losses import kl_divergence
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.splice import ablated, put
from kanllama_lightning.prompts.prompt import Prompt
from kanllama_lightning.prompts.text_ids import bos, check_length, log_probs, seen_by, text_ids
from kanllama_lightning.types import ValidationBatch

RUNS = ("original", "sae", "zero", "mean")
"""Activations as they are, reconstructed, 0, and the mean of the head's start sample."""
TOKENS_AT_ONCE = 512
"""Tokens, padding included, that the LM is given at once; at least one prompt."""


class AskedPrompt(NamedTuple):
    """A prompt in the LM's tokens."""

    prompt: Prompt
    prompt_ids: list[int]
    """Without BOS."""
    answer_ids: list[int]
    """Of the first answer."""
    alone: bool
    """Whether the answer was tokenised by itself, as it melts into the prompt's last token."""
    most: int
    """Tokens of the longest answer."""


class Reading(NamedTuple):
    """What one run makes of a question."""

    rank: int
    """Rank of the first answer's first token: one more than tokens with a larger logit."""
    logit: float
    probability: float
    """Probability of the first answer's first token."""
    log_prob: float
    """Log-probability of the whole first answer, teacher-forced, nats."""
    kl: float
    """KL(original || run) at the last position of the prompt, nats."""
    agrees: bool
    """Whether the likeliest token is the original's."""
    top: list[tuple[int, float]]
    """Likeliest tokens with their probabilities."""
    said: str
    """Greedy continuation, up to where it is an answer or can become none."""
    hit: bool
    """Whether that is a whole answer, blanks before it aside."""


class Answers(NamedTuple):
    """What all runs make of a question."""

    readings: dict[str, Reading]
    n_ids: int
    """Tokens the LM was given."""
    replaced: int
    """At how many of them the activation was replaced."""
    untouched: bool
    """Whether the last position of the prompt was not replaced: a special token, or a sink."""
    l0: float
    """Latents per replaced token; NaN without any."""


def question(lm: FrozenLM, prompt: Prompt) -> AskedPrompt:
    """Tokenise a prompt with its answers.

    Raises:
        InputError: One of them has no tokens, or they are longer than the LM's context.
    """
    ids = text_ids(lm, prompt.prompt, "prompt")
    found = [_answer_ids(lm, prompt.prompt, ids, answer) for answer in prompt.answers]
    most = max(len(answer) for answer, _ in found)
    check_length(lm, prompt.prompt, len(ids) + most, "prompt")
    answer, alone = found[0]
    return AskedPrompt(prompt, ids, answer, alone, most)


def _answer_ids(lm: FrozenLM, prompt: str, ids: list[int], answer: str) -> tuple[list[int], bool]:
    """Tokens of an answer after its prompt, and whether they are those of the answer alone."""
    alone_ids = text_ids(lm, answer, "answer")
    joint = text_ids(lm, prompt + answer, "prompt")
    together = len(joint) > len(ids) and joint[: len(ids)] == ids
    return (joint[len(ids) :] if together else alone_ids), not together


@torch.no_grad()
def ask(head: SAEHead, lm: FrozenLM, asked: Sequence[AskedPrompt], top: int) -> list[Answers]:
    """Put questions to all runs, several at once.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded LM.
        asked: The questions.
        top: How many of the likeliest tokens to return.
    """
    first = bos(lm)
    rows = [[first, *a.prompt_ids, *a.answer_ids[:-1]] for a in asked]
    found: dict[int, dict[str, Reading]] = {}
    about: dict[int, tuple[int, bool, float]] = {}
    for some in _batches(rows, "prompts"):
        seen = seen_by(head, lm, [rows[i] for i in some])
        hidden = {run: lm.resume(seen.prefix, acts) for run, acts in _spliced(head, seen).items()}
        l0 = torch.zeros(seen.mask.shape, dtype=torch.float64, device=lm.device)
        l0[seen.mask] = seen.out.codes.l0().double()
        for row, i in enumerate(some):
            last = len(asked[i].prompt_ids)
            logits = {run: lm.logits(h[row, last : len(rows[i])]) for run, h in hidden.items()}
            found[i] = _readings(logits, asked[i], min(top, lm.vocab_size))
            counted = int(seen.mask[row].sum())
            mean = float(l0[row].sum()) / counted if counted else float("nan")
            about[i] = (counted, not bool(seen.mask[row, last]), mean)
    said = _decode(head, lm, asked, found)
    return [
        Answers(
            {
                run: r._replace(said=said[i, run], hit=_right(said[i, run], asked[i].prompt))
                for run, r in found[i].items()
            },
            len(rows[i]),
            *about[i],
        )
        for i in range(len(asked))
    ]


def _readings(
    logits: dict[str, Float[Tensor, "answer vocab"]], asked: AskedPrompt, top: int
) -> dict[str, Reading]:
    """What each run makes of one question; not yet what it says."""
    log_p = {run: log_probs(values) for run, values in logits.items()}
    original, first = log_p["original"][:1], asked.answer_ids[0]
    made = {}
    for run, p in log_p.items():
        best = p[0].topk(top)
        answer = torch.tensor(asked.answer_ids, device=p.device)
        made[run] = Reading(
            rank=1 + int((logits[run][0] > logits[run][0, first]).sum()),
            logit=float(logits[run][0, first]),
            probability=float(p[0, first].exp()),
            log_prob=float(p.gather(1, answer[:, None]).sum()),
            kl=float(kl_divergence(original, p[:1])),
            agrees=bool(p[0].argmax() == original[0].argmax()),
            top=list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)),
            said="",
            hit=False,
        )
    return made


def _decode(
    head: SAEHead,
    lm: FrozenLM,
    asked: Sequence[AskedPrompt],
    found: dict[int, dict[str, Reading]],
) -> dict[tuple[int, str], str]:
    """What each run says to each question: as many tokens as an answer has, at most."""
    new = {(i, run): [r.top[0][0]] for i, runs in found.items() for run, r in runs.items()}
    said = {key: _text(lm, ids) for key, ids in new.items()}
    while True:
        open_ = [
            (i, run)
            for (i, run), ids in new.items()
            if len(ids) < asked[i].most and _may_become(said[i, run], asked[i].prompt)
        ]
        if not open_:
            return said
        rows = [[bos(lm), *asked[i].prompt_ids, *new[i, run]] for i, run in open_]
        for some in _batches(rows, "answers"):
            seen = seen_by(head, lm, [rows[n] for n in some])
            acts = seen.prefix.acts.clone()
            for run, spliced in _spliced(head, seen).items():
                own = [row for row, n in enumerate(some) if open_[n][1] == run]
                acts[own] = spliced[own]
            hidden = lm.resume(seen.prefix, acts)
            for row, n in enumerate(some):
                logits = lm.logits(hidden[row, len(rows[n]) - 1])
                new[open_[n]].append(int(log_probs(logits).argmax()))
        said |= {key: _text(lm, new[key]) for key in open_}


def _spliced(head: SAEHead, seen: ValidationBatch) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """Activations of every run."""
    acts = seen.prefix.acts
    rows = {"sae": seen.out.x_hat, **ablated(seen.x, head.x_mean)}
    return {"original": acts} | {run: put(acts, seen.mask, rows[run]) for run in RUNS[1:]}


def _batches(rows: Sequence[list[int]], what: str) -> Iterator[list[int]]:
    """Numbers of rows of like length, as many as go at once; a batch is done when the next is
    asked for."""
    every: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not every or (len(every[-1]) + 1) * len(rows[i]) > TOKENS_AT_ONCE:
            every.append([])
        every[-1].append(i)
    with Phase("asking", len(rows), what) as progress:
        for some in every:
            yield some
            progress.add(len(some))


def _text(lm: FrozenLM, ids: list[int]) -> str:
    known = [i for i in ids if i < len(lm.tokenizer)]
    made: str = lm.tokenizer.decode(known, clean_up_tokenization_spaces=False)
    return made


def _right(said: str, prompt: Prompt) -> bool:
    return said.lstrip() in {answer.lstrip() for answer in prompt.answers}


def _may_become(said: str, prompt: Prompt) -> bool:
    """Whether more tokens can make it an answer; half a character at its end may become one."""
    start = said.lstrip().rstrip("\ufffd")
    answers = [answer.lstrip() for answer in prompt.answers]
    return start not in answers and any(answer.startswith(start) for answer in answers)
