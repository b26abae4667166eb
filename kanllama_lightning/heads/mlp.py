"""MLPEncoder: is it the KAN, or just an encoder that is not linear?"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.heads.hidden import Hidden, as_large_as_kan, own_stream


class MLPEncoder(Hidden):
    """p = (x - b_dec) W_enc + ReLU(x~ V + c) U + b_enc; BatchTopK of ReLU(p); linear W_dec.

    The control of the KAN heads: the same dictionary, selection and start, hidden units without
    splines. V is Gaussian with columns of norm about 1, U = 0 and c = 0 at the start: step 0 equals
    the linear `BatchTopK` head of the same seed bit for bit.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        d_hidden: Hidden units; left out, as many as give the head the number of parameters of
            KANEncoder with its default layer.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`); V draws from a stream of
            its own.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        d_hidden: int | None = None,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        hidden = as_large_as_kan(d_model, d_sae, 1) if d_hidden is None else d_hidden
        super().__init__(d_model, d_sae, target_l0, hidden, alpha_aux, seed)
        self.d_hidden = d_hidden
        V = torch.randn(d_model, hidden, generator=own_stream(seed)) / d_model**0.5
        self.V = nn.Parameter(V)
        self.c = nn.Parameter(torch.zeros(hidden))

    def hidden(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """ReLU(x~ V + c)."""
        return torch.relu(x @ self.V + self.c)
