"""TopK: exactly target_l0 latents per token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.heads.selecting import Selecting


class TopK(Selecting):
    """z keeps the target_l0 largest of ReLU((x - b_dec) W_enc + b_enc) of each token.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093). The same in
    training and at inference; L0 <= target_l0, as zeros do not count.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token, the paper's k.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """The target_l0 largest positive pre-activations of a token; equal ones: any of them."""
        top = pre_acts.topk(self.target_l0, dim=1, sorted=False)
        latents, order = top.indices.sort(dim=1)
        first = torch.arange(len(pre_acts), device=pre_acts.device) * self.d_sae
        return (latents + first[:, None])[top.values.gather(1, order) > 0]
