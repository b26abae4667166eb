"""A line of text under the LM: its ids, and what a head makes of it."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.data.vocabulary import special_ids
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import visible
from kanllama_lightning.measures.head_batch import run_head
from kanllama_lightning.types import InputError, TokenBatch, ValidationBatch


def text_ids(lm: FrozenLM, text: str, argument: str) -> list[int]:
    """Token ids of a text, without BOS.

    Args:
        lm: Its tokenizer and vocabulary count.
        text: Anything.
        argument: What to call the text in an error.

    Raises:
        InputError: There is nothing in it, or something the model cannot be given.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{argument}={visible(text)!r}: is no valid Unicode ({e.reason})") from e
    made: list[int] = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not made:
        raise InputError(f"{argument}={visible(text)!r}: has no tokens; give some text")
    if max(made) >= lm.vocab_size:
        raise InputError(
            f"{argument}={visible(text)!r}: token id {max(made)}, but model {lm.name!r} knows "
            f"{lm.vocab_size} ids; use the tokenizer the model was trained with"
        )
    return made


def bos(lm: FrozenLM) -> int:
    """The id every text starts with.

    Raises:
        InputError: The tokenizer has none.
    """
    if lm.tokenizer.bos_token_id is None:
        raise InputError(
            f"lm.name={lm.name!r}: its tokenizer has no BOS token (bos_token), with which every "
            "text must start; set it in its tokenizer_config.json"
        )
    return int(lm.tokenizer.bos_token_id)


def check_length(lm: FrozenLM, text: str, n_ids: int, argument: str) -> None:
    """Refuse what does not fit.

    Raises:
        InputError: `n_ids`, BOS included, is more than the model's context.
    """
    start = visible(text[:40]) + ("..." if len(text) > 40 else "")
    lm.check_length(n_ids, f"{argument}={start!r}", "give a shorter text")


@torch.no_grad()
def seen_by(head: SAEHead, lm: FrozenLM, ids: list[int]) -> ValidationBatch:
    """One text, BOS first, as a head in evaluation mode sees it; special tokens do not count."""
    row = torch.tensor([ids], dtype=torch.int64)
    keep = ~torch.isin(row, torch.tensor(special_ids(lm.tokenizer)))
    tokens = TokenBatch(row, keep, torch.zeros_like(row), torch.zeros(3, dtype=torch.int64))
    tokens = tokens.to(lm.device)
    return run_head(lm.prefix(tokens.ids), tokens, "prompt", head)


def log_probs(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n vocab"]:
    """Log-probabilities in fp64.

    Raises:
        InputError: They are not finite: a head that has diverged.
    """
    if not logits.isfinite().all():
        raise InputError(
            "head: with its reconstruction spliced in the LM's logits are not finite; the head "
            "has diverged or is damaged, evaluate an earlier checkpoint"
        )
    return logits.double().log_softmax(-1)
