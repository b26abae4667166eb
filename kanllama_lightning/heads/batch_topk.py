"""BatchTopK: the linear baseline."""

from kanllama_lightning.heads.thresholded import Thresholded


class BatchTopK(Thresholded):
    """z keeps the target_l0 * tokens largest of ReLU((x - b_dec) W_enc + b_enc) over a batch.

    Bussmann, Leask, Nanda 2024 (arXiv 2412.06410). At inference a global threshold takes the
    batch's place, so that a token's latents do not depend on its neighbours.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average, the paper's k.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """
