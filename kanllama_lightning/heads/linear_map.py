"""LinearMap: what a transcoder's skip reaches without any latent."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.sae import best_linear_map
from kanllama_lightning.types import InputError, SAEOutput, StepContext


class LinearMap(SAEHead):
    """y_hat = mean(y) + (x - mean(x)) M, M the ridge regression on the start sample.

    A control for transcoders, not trained: it has one latent, which never fires.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: 1.
        seed: Unused: nothing is drawn.
        transcoder: True (linked to `lm.input_point`).
    """

    input_mean: Tensor
    map: Tensor

    def __init__(
        self, d_model: int, d_sae: int = 1, seed: int = 0, transcoder: bool = True
    ) -> None:
        super().__init__(d_model, d_sae, seed)
        if d_sae != 1 or not transcoder:
            raise InputError(
                f"head.d_sae={d_sae}, head.transcoder={transcoder}: LinearMap is a control of "
                "transcoders, with 1 latent"
            )
        self.transcoder = True
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("map", torch.zeros(d_model, d_model))

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_row"]) -> None:
        """The regression over all rows."""
        super().start_(x)
        read = x[:, : self.d_model].float()
        self.input_mean.copy_(read.mean(0))
        self.map.copy_(best_linear_map(read - self.input_mean, self.target(x) - self.x_mean))

    def encode(self, x: Float[Tensor, "tok _"]) -> Float[Tensor, "tok d_sae"]:
        """Zeros."""
        return x.new_zeros(len(x), self.d_sae, dtype=torch.float32)

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """The mean: latents write nothing."""
        return self.x_mean.expand(len(latents), -1)

    def forward(self, x: Float[Tensor, "tok _"]) -> SAEOutput:
        """What is linear, and no codes."""
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        codes = SparseCodes(x.new_zeros(0, dtype=torch.float32), none, none, len(x), self.d_sae)
        read = x[:, : self.d_model].float() - self.input_mean
        return SAEOutput(read @ self.map + self.x_mean, codes)

    def losses(
        self, x: Float[Tensor, "tok d_row"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """Refused: it is not trained."""
        raise InputError("model.head=LinearMap: a control that is not trained; choose another head")
