"""A linear unit-norm dictionary read by a sparse code: what every TopK-like head shares."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.losses import auxk, geometric_median, reconstruction
from kanllama_lightning.functional.sparse import sparse_decode
from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.types import InputError, SAEOutput, SparseCodes, StepContext

MEDIAN_ROWS = 8192
"""Rows of the start sample that the geometric median is taken of."""


class Dictionary(SAEHead):
    """x_hat = z W_dec + b_dec with unit-norm rows of W_dec, z the kept part of ReLU(pre_acts).

    A subclass says which activations are kept (`select`); a KAN head also says what the
    pre-activations are. L = ||e||^2 + alpha_aux * AuxK (Gao et al. 2024, arXiv 2406.04093).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        k: Kept latents per token (L0).
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self, d_model: int, d_sae: int, k: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, seed)
        if not 1 <= k <= d_sae:
            raise InputError(
                f"head.k={k}: must be from 1 to d_sae={d_sae}; lower k or widen the dictionary"
            )
        if alpha_aux < 0:
            raise InputError(f"head.alpha_aux={alpha_aux}: must be 0 or more (default 1/32)")
        self.k, self.alpha_aux = k, alpha_aux
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(d_sae, d_model, generator=generator)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    @abstractmethod
    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """Flat positions, ascending, of the activations to keep; no gradient flows through."""

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Scale from all rows; b_dec and the encoder's size from the first ones.

        b_dec is their geometric median. W_enc = c W_dec^T with the c that makes the first
        reconstruction best: k overlapping directions overshoot at c = 1, three-fold at d_model
        128 and k 16, and the first steps then drive all latents down instead of apart (LOG.md).
        """
        super().start_(x)
        x = x[:MEDIAN_ROWS]
        target = x.float() * self.scale
        self.b_dec.copy_(geometric_median(target))
        codes = self.codes(x)
        summed = sparse_decode(codes.values, codes.rows, codes.latents, self.W_dec, len(x))
        size = summed.square().sum()
        if size > 0:
            self.W_enc.mul_(((target - self.b_dec) * summed).sum() / size)

    def centred(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """Raw activations in the head's units, b_dec taken off (its gradient left out)."""
        return x.float() * self.scale - self.b_dec.detach()

    def pre_acts(
        self, x: Float[Tensor, "tok d_model"], latents: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "tok d_sae"]:
        """Pre-activations, fp32, of all latents or of some.

        The gradient of b_dec goes through a matrix-vector product of value zero: the same
        number as through `x - b_dec`, without a third matrix product of the batch's size.
        """
        W: Tensor = self.W_enc
        b: Tensor = self.b_enc
        if latents is not None:
            W, b = W[:, latents], b[latents]
        linear = self.centred(x) @ W
        return linear.float() + (b + (self.b_dec.detach() - self.b_dec) @ W.detach())

    def codes(self, x: Float[Tensor, "tok d_model"]) -> SparseCodes:
        """The kept activations of raw activations."""
        pre = self.pre_acts(x)
        flat = self.select(pre.detach())
        return SparseCodes(
            values=pre.reshape(-1)[flat],
            rows=flat.div(self.d_sae, rounding_mode="floor"),
            latents=flat % self.d_sae,
            n_rows=len(x),
            d_sae=self.d_sae,
        )

    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction and codes of raw activations."""
        codes = self.codes(x)
        with torch.autocast(x.device.type, enabled=False):
            summed = sparse_decode(codes.values, codes.rows, codes.latents, self.W_dec, len(x))
            return SAEOutput((summed + self.b_dec) / self.scale, codes)

    def encode(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Dense latents as at inference, whatever mode the head is in."""
        training = self.training
        try:
            return self.eval().codes(x).dense()
        finally:
            self.train(training)

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents."""
        return (latents @ self.W_dec + self.b_dec) / self.scale

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`mse` (sum over d_model, normalised units) and `auxk` while latents are dead."""
        x_n, x_hat_n = x.float() * self.scale, out.x_hat.float() * self.scale
        terms = {"mse": reconstruction(x_n, x_hat_n)}
        if self.alpha_aux and len(ctx.dead):
            error = (x_n - x_hat_n).detach()
            terms["auxk"] = self.alpha_aux * auxk(error, self._dead_reconstruction(x, ctx.dead))
        return terms

    def _dead_reconstruction(
        self, x: Float[Tensor, "tok d_model"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok d_model"]:
        """What the k_aux best dead latents make of x, without b_dec."""
        acts = self.pre_acts(x, dead).relu()
        k_aux = min(self.d_model // 2, len(dead))
        top = acts.topk(k_aux, dim=1)
        kept = torch.zeros_like(acts).scatter(1, top.indices, top.values)
        return (kept @ self.W_dec[dead]).float()

    @torch.no_grad()
    def project_grad_(self) -> None:
        """Take from each dictionary row's gradient its part along the row."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1.0)

    @torch.no_grad()
    def project_(self) -> None:
        """Renormalise the dictionary rows to 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
