"""What the LM's next-token losses become when its activations are replaced."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kanllama_lightning.functional.losses import kl_divergence, next_token_targets
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.types import Prefix, TokenBatch, ValidationBatch

K = TypeVar("K")

LOGIT_NUMBERS = 1 << 24
"""Logits that exist at once per run on a CPU (64 MiB in fp32)."""
LOGIT_NUMBERS_OFF_CPU = 1 << 27
"""On any other device (512 MiB in fp32): of a vocabulary of 128,256 those of 1,046 positions, for
which the unembedding is read once, where the 130 of a CPU's block would wait for it."""
CACHED_NUMBERS = 1 << 20
"""Logits that a CPU turns into losses at once: what its cache holds."""


class SplicedLosses(NamedTuple):
    """Losses of every counted position of a batch, per run."""

    ce: dict[str, Float[Tensor, " n"]]
    """-log P(next token), nats."""
    kl: dict[str, Float[Tensor, " n"]]
    """KL(P_clean || P_run), nats; no entry for `clean` itself."""
    where: tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
    """Row and position of each."""


def put(
    acts: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"],
    rows: Float[Tensor, "tok d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """`acts` with `rows` in the masked positions; BOS and the like keep the original."""
    out = acts.clone()
    out[mask] = rows.to(acts.dtype)
    return out


def ablated(
    x: Float[Tensor, "tok d_model"], mean: Float[Tensor, " d_model"]
) -> dict[str, Float[Tensor, "tok d_model"]]:
    """What `put` splices in for the ablations: `zero`, and `mean`, at every position that counts.

    The one definition of either: positions that are BOS, EOS, PAD or sinks keep their activation.

    Args:
        x: Activations of the positions that count.
        mean: What mean ablation puts in their place.
    """
    return {"zero": torch.zeros_like(x), "mean": mean.to(x.dtype).expand_as(x)}


@torch.no_grad()
def spliced_losses(
    lm: FrozenLM,
    prefix: Prefix,
    tokens: TokenBatch,
    runs: Mapping[str, Float[Tensor, "batch pos d_model"]],
) -> SplicedLosses:
    """Continue the LM from the hook once untouched (`clean`) and once per entry of `runs`.

    The same token tensor and positions for every run. Logits exist for a few positions at a time.

    Args:
        lm: Loaded LM.
        prefix: Its run up to the hook point on `tokens`.
        tokens: The batch, on the LM's device.
        runs: Activations to splice in, by name.
    """
    targets, counts = next_token_targets(tokens.ids, tokens.keep, tokens.doc)
    row, pos = counts.nonzero(as_tuple=True)
    hidden = {"clean": lm.resume(prefix, prefix.acts)[row, pos]}
    for name, acts in runs.items():
        hidden[name] = lm.resume(prefix, acts)[row, pos]
    target = targets[row, pos]
    ce: dict[str, list[Tensor]] = {name: [] for name in hidden}
    kl: dict[str, list[Tensor]] = {name: [] for name in runs}
    step = positions_at_once(target.device, lm.vocab_size)
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        at, clean = target[part, None], lm.logits(hidden["clean"][part])
        for some in clean.split(_at_once(clean)):
            some.copy_(some.log_softmax(-1))
        ce["clean"].append(-clean.gather(1, at).squeeze(1))
        for name in runs:
            logits = lm.logits(hidden[name][part])
            n = _at_once(logits)
            for log_p, some, own in zip(clean.split(n), logits.split(n), at.split(n), strict=True):
                log_q = some.log_softmax(-1)
                ce[name].append(-log_q.gather(1, own).squeeze(1))
                kl[name].append(kl_divergence(log_p, log_q))
    empty = [hidden["clean"].new_zeros(0, dtype=torch.float32)]
    return SplicedLosses(
        ce={name: torch.cat(parts or empty) for name, parts in ce.items()},
        kl={name: torch.cat(parts or empty) for name, parts in kl.items()},
        where=(row, pos),
    )


def positions_at_once(device: torch.device, vocab: int) -> int:
    """Positions whose logits exist at once, per run.

    Args:
        device: Where they are made.
        vocab: Logits of a position.
    """
    return max(1, (LOGIT_NUMBERS if device.type == "cpu" else LOGIT_NUMBERS_OFF_CPU) // vocab)


def _at_once(logits: Float[Tensor, "n vocab"]) -> int:
    """Rows of logits that are turned into losses at once."""
    n, vocab = logits.shape
    return max(1, CACHED_NUMBERS // vocab if logits.device.type == "cpu" else n)


def losses_by_head(
    lm: FrozenLM,
    batch: ValidationBatch,
    x_hats: Mapping[K, Float[Tensor, "tok d_model"]],
    ablations: Mapping[str, Float[Tensor, "tok d_model"]],
) -> dict[K, SplicedLosses]:
    """Losses of every head: its reconstruction as `recon`, beside `clean` and the ablations.

    Args:
        lm: Loaded LM.
        batch: As any of the heads sees it.
        x_hats: Reconstruction of `batch.x` by each head.
        ablations: From `ablated`; run once for all heads.
    """
    names = {key: f"recon {i}" for i, key in enumerate(x_hats)}
    rows = {**ablations, **{names[key]: x_hat for key, x_hat in x_hats.items()}}
    runs = {name: put(batch.prefix.acts, batch.mask, value) for name, value in rows.items()}
    every = spliced_losses(lm, batch.prefix, batch.tokens, runs)

    def own(losses: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        shared = {k: v for k, v in losses.items() if k not in names.values()}
        return shared | {"recon": losses[name]}

    return {
        key: SplicedLosses(own(every.ce, name), own(every.kl, name), every.where)
        for key, name in names.items()
    }
