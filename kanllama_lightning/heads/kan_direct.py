"""KANDirect: a KAN layer straight from the activation to the latents."""

from kanllama_lightning.heads.kan_read import KANRead


class KANDirect(KANRead):
    """p = KAN(x~) + b_enc; BatchTopK of ReLU(p); linear unit-norm W_dec.

    Every latent reads every coordinate through a curve of its own: grid_size + 4 times the
    parameters of a linear encoder. On a fixed grid of [-3, 3] deviations with linear tails. At the
    start every curve is a line (base weights 0): step 0 equals the linear `BatchTopK` head of
    the same seed to 1e-5 (METHODS B5 ii). The layer's features exist once for a batch
    ((grid_size + 4) * d_model numbers per token); its gradient touches kept latents only.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells between the ends of the grid.
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
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        self.grid_size = grid_size
        self.read_by_kan_(grid_size)
