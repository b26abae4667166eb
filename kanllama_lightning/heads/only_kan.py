"""OnlyKAN: a KAN layer on either side of a sparse code."""

from kanllama_lightning.heads.curved_dictionary import CurvedDictionary
from kanllama_lightning.heads.kan_read import KANRead


class OnlyKAN(KANRead, CurvedDictionary):
    """p = KAN(x~) + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    The earlier design `only_kan` with what it lacked: a sparse code, b_dec, and a decoder grid that
    lies on the activations (METHODS B4, B5 iii). The decoder is that of `CurvedDictionary`. All
    curves are lines at the start, of the linear `BatchTopK` head of the same seed.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells of either grid.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        grid_size: int = 5,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, grid_size, alpha_aux, seed)
        self.read_by_kan_(grid_size)
