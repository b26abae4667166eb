"""Lines of text under the LM: their ids, and what a head makes of them."""

from collections.abc import Sequence

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
def seen_by(head: SAEHead, lm: FrozenLM, rows: Sequence[list[int]]) -> ValidationBatch:
    """Texts, BOS first, as a head in evaluation mode sees them; special tokens do not count.

    Shorter ones end in BOS, which changes nothing before it and does not count either.
    """
    longest = max(len(ids) for ids in rows)
    ids = torch.tensor([[*row, *[bos(lm)] * (longest - len(row))] for row in rows])
    special = torch.tensor(sorted({*special_ids(lm.tokenizer), bos(lm)}))
    keep = ~torch.isin(ids, special)
    tokens = TokenBatch(ids, keep, torch.zeros_like(ids), torch.zeros(3, dtype=torch.int64))
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
