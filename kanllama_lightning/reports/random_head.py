"""A head that learned nothing: the control of reports that judge what latents are of."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads import BatchTopK, SAEHead

CONTROL_SEED = 1_000_003
"""Its seed, and that of the stories of a world that it is started on."""


@torch.no_grad()
def random_directions(head: SAEHead, target_l0: int, rows: Float[Tensor, "tok d_row"]) -> BatchTopK:
    """A BatchTopK head of a head's size and kind, never trained, started on some activations.

    Args:
        head: What it is a control of.
        target_l0: Latents per token.
        rows: What heads are given; on the device where it is to be.
    """
    size = {"d_model": head.d_model, "d_sae": head.d_sae, "transcoder": head.transcoder}
    made = BatchTopK(**size, target_l0=target_l0, seed=CONTROL_SEED)
    made.to(rows.device).start_(rows)
    return made
