"""PCA: what the best linear map of the same number of coordinates reaches."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.types import InputError, SAEOutput, StepContext


class PCA(SAEHead):
    """x_hat = mean + (x - mean) V V^T, V the leading principal directions of the start sample.

    A control, not trained: its codes are dense and signed, L0 is the number of components.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of components, at most d_model.
        seed: Unused: PCA draws nothing.
    """

    components: Tensor

    def __init__(self, d_model: int, d_sae: int, seed: int = 0) -> None:
        super().__init__(d_model, d_sae, seed)
        if d_sae > d_model:
            raise InputError(f"head.d_sae={d_sae}: PCA has at most d_model={d_model} components")
        self.register_buffer("components", torch.zeros(d_sae, d_model))

    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Principal directions by the eigenvectors of the fp64 covariance."""
        super().start_(x)
        centred = x.double() - x.double().mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        self.components.copy_(vectors.flip(1)[:, : self.d_sae].T)

    def encode(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Coordinates along the components, raw units."""
        return (x.float() - self.x_mean) @ self.components.T

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Back to the LM's space."""
        return latents @ self.components + self.x_mean

    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """The components; raw units on both sides."""
        return self.components

    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction, and all coordinates as codes."""
        latents = self.encode(x)
        rows, columns = torch.ones_like(latents, dtype=torch.bool).nonzero(as_tuple=True)
        codes = SparseCodes(latents.reshape(-1), rows, columns, len(x), self.d_sae)
        return SAEOutput(self.decode(latents), codes)

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """Refused: nothing in PCA is trained."""
        raise InputError("model.head=PCA: a control that is not trained; choose another head")
