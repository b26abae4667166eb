"""How an LM goes on from a prompt, untouched and with its activations replaced (METHODS C).

Every run gets the same ids, [BOS] + prompt + answer but for its last token, and everything is read
from them: at the last position of the prompt how the LM goes on, at those after it how likely it
finds the rest of the answer. Later tokens change nothing at earlier positions.
"""

from typing import NamedTuple

import torch

from kanllama_lightning.functional.losses import kl_divergence
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.splice import ablated, put
from kanllama_lightning.prompts.prompt import Prompt
from kanllama_lightning.prompts.text_ids import bos, check_length, log_probs, seen_by, text_ids

RUNS = ("original", "sae", "zero", "mean")
"""Activations as they are, reconstructed, 0, and the mean of the head's start sample."""


class AskedPrompt(NamedTuple):
    """A prompt in the LM's tokens."""

    prompt: Prompt
    prompt_ids: list[int]
    """Without BOS."""
    answer_ids: list[int]
    alone: bool
    """Whether the answer was tokenised by itself, as it melts into the prompt's last token."""


class Reading(NamedTuple):
    """What one run makes of a question."""

    rank: int
    """Rank of the answer's first token: one more than there are tokens with a larger logit."""
    logit: float
    probability: float
    """Probability of the answer's first token."""
    log_prob: float
    """Log-probability of the whole answer, teacher-forced, nats."""
    kl: float
    """KL(original || run) at the last position of the prompt, nats."""
    agrees: bool
    """Whether the likeliest token is the original's."""
    top: list[tuple[int, float]]
    """Likeliest tokens with their probabilities."""


class Answers(NamedTuple):
    """What all runs make of a question."""

    readings: dict[str, Reading]
    n_ids: int
    """Tokens the LM was given."""
    replaced: int
    """At how many of them the activation was replaced."""
    kept: bool
    """Whether the last position of the prompt kept its own: a special token, or a sink."""
    l0: float
    """Latents per replaced token; NaN without any."""


def question(lm: FrozenLM, prompt: Prompt) -> AskedPrompt:
    """Tokenise a prompt with its answer.

    Raises:
        InputError: One of them has no tokens, or they are longer than the LM's context.
    """
    ids = text_ids(lm, prompt.prompt, "prompt")
    alone_ids = text_ids(lm, prompt.answer, "answer")
    joint = text_ids(lm, prompt.prompt + prompt.answer, "prompt")
    together = len(joint) > len(ids) and joint[: len(ids)] == ids
    answer = joint[len(ids) :] if together else alone_ids
    check_length(lm, prompt.prompt, len(ids) + len(answer), "prompt")
    return AskedPrompt(prompt, ids, answer, not together)


@torch.no_grad()
def ask(head: SAEHead, lm: FrozenLM, asked: AskedPrompt, top: int) -> Answers:
    """Put a question to all runs.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded LM.
        asked: The question.
        top: How many of the likeliest tokens to return.
    """
    ids = [bos(lm), *asked.prompt_ids, *asked.answer_ids[:-1]]
    last = len(asked.prompt_ids)
    seen = seen_by(head, lm, ids)
    acts = seen.prefix.acts
    rows = {"original": seen.x, "sae": seen.out.x_hat, **ablated(seen.x, head.x_mean)}
    answer = torch.tensor(asked.answer_ids, device=lm.device)
    readings: dict[str, Reading] = {}
    for run in RUNS:
        logits = lm.logits(lm.resume(seen.prefix, put(acts, seen.mask, rows[run]))[0, last:])
        log_p = log_probs(logits)
        if run == "original":
            original = log_p[:1]
        best = log_p[0].topk(min(top, lm.vocab_size))
        first = answer[0]
        readings[run] = Reading(
            rank=1 + int((logits[0] > logits[0, first]).sum()),
            logit=float(logits[0, first]),
            probability=float(log_p[0, first].exp()),
            log_prob=float(log_p.gather(1, answer[:, None]).sum()),
            kl=float(kl_divergence(original, log_p[:1])),
            agrees=bool(log_p[0].argmax() == original[0].argmax()),
            top=list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)),
        )
    return Answers(readings, len(ids), len(seen.x), not bool(seen.mask[0, last]), seen.l0())
