"""A linear dictionary and its encoder: what nearly every trained head shares."""

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.losses import auxk, geometric_median
from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.types import InputError, SAEOutput, StepContext

MEDIAN_ROWS = 8192
"""Rows of the start sample that the geometric median is taken of."""
BLOCK = 1 << 22
"""Elements of the dictionary that are worked on at once."""

Branch = tuple[Float[Tensor, "tok _"], Float[Tensor, "_ d_sae"]]
"""Inputs and weights whose product is a part of the pre-activations."""


class Dictionary(SAEHead):
    """x_hat = z W_dec + b_dec, z made of pre-activations p = (x - b_dec) W_enc + b_enc.

    A subclass says how p becomes z; a KAN head also what else p is made of. The rows of W_dec
    are kept at norm 1. AuxK (Gao et al. 2024, arXiv 2406.04093) revives dead latents.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Latents per token.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    in_units: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers that are in units of normalised activations."""

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, seed)
        if not 1 <= target_l0 <= d_sae:
            raise InputError(
                f"head.target_l0={target_l0}: must be from 1 to d_sae={d_sae}; lower it or widen "
                "the dictionary"
            )
        if not alpha_aux >= 0:
            raise InputError(f"head.alpha_aux={alpha_aux}: must be 0 or more (default 1/32)")
        self.target_l0, self.alpha_aux = target_l0, alpha_aux
        self.W_dec = nn.Parameter(first_directions(d_sae, d_model, seed))
        # stored as [d_sae, d_model]: the layout its sparse gradient comes in
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    @torch.no_grad()
    def folded(self) -> SAEHead:
        """A copy in the LM's units: all that is added or compared, divided by the scale.

        Directions keep their norm; latents come out in the LM's units too (METHODS 0.1).
        """
        copied = copy.deepcopy(self)
        for name in self.in_units:
            getattr(copied, name).div_(self.scale)
        copied.x_variance.div_(self.scale.square())
        copied.scale.fill_(1.0)
        return copied

    @abstractmethod
    def reconstruct(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """What the dictionary makes of pre-activations in training, without b_dec."""

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Scale from all rows; b_dec and the encoder's size from the first ones.

        b_dec is their geometric median. W_enc = c W_dec^T with the c that makes the first
        reconstruction best: k overlapping directions overshoot at c = 1, three-fold at d_model
        128 and k 16, and the first steps then drive all latents down instead of apart (LOG.md).
        """
        super().start_(x)
        target = x[:MEDIAN_ROWS].float() * self.scale
        self.b_dec.copy_(geometric_median(target))
        target = target - self.b_dec
        summed = self.reconstruct(target @ self.W_dec.T)
        size = summed.square().sum()
        best = (target * summed).sum() / size if size > 0 else target.new_ones(())
        self.set_encoder_(best * self.W_dec.T)

    def set_encoder_(self, W: Float[Tensor, "d_model d_sae"]) -> None:
        """Make the encoder the linear map (x - b_dec) W, with no other part."""
        self.W_enc.copy_(W)

    def centred(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """Raw activations in the head's units, b_dec taken off (its gradient left out)."""
        return x.float() * self.scale - self.b_dec.detach()

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """What the pre-activations are the sum of, `bias` apart."""
        return [(self.centred(x), self.W_enc)]

    def bias(self) -> Float[Tensor, " d_sae"]:
        """What is added to the products of `branches`.

        The gradient of b_dec goes through a matrix-vector product of value zero: the same
        number as through `x - b_dec`, without a matrix product of the batch's size.
        """
        return self.b_enc + (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()

    def pre_acts(
        self, x: Float[Tensor, "tok d_model"], latents: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "tok some"]:
        """Pre-activations, fp32, of all latents or of some."""
        return products(self.branches(x), self.bias(), latents)

    def encode(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Dense latents as at inference, whatever mode the head is in."""
        training = self.training
        try:
            return self.eval()(x).codes.dense()
        finally:
            self.train(training)

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents."""
        return (latents @ self.W_dec + self.b_dec) / self.scale

    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """The dictionary, whatever the activations."""
        return self.W_dec.detach()

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction` (FVU of the start sample), and `auxk` while latents are dead."""
        x_n, x_hat_n = x.float() * self.scale, out.x_hat.float() * self.scale
        terms = {"reconstruction": self.unexplained(x_n, x_hat_n)}
        if self.alpha_aux and len(ctx.dead):
            error = (x_n - x_hat_n).detach()
            pre = self.pre_acts(x, ctx.dead) if out.pre_acts is None else out.pre_acts(ctx.dead)
            terms["auxk"] = self.alpha_aux * auxk(error, self._dead_reconstruction(pre, ctx.dead))
        return terms

    def _dead_reconstruction(
        self, pre_acts: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok d_model"]:
        """What the k_aux best dead latents make of x, without b_dec."""
        acts = self.dead_acts(pre_acts)
        k_aux = min(self.d_model // 2, len(dead))
        best = self.dead_sizes(acts, dead).topk(k_aux, dim=1).indices
        kept = torch.zeros_like(acts).scatter(1, best, acts.gather(1, best))
        return self.decode_dead(kept, dead)

    def decode_dead(
        self, latents: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok d_model"]:
        """What AuxK takes dead latents to write, without b_dec, in the head's units."""
        return self.decode_some(latents, dead)

    def dead_acts(self, pre_acts: Float[Tensor, "tok n_dead"]) -> Float[Tensor, "tok n_dead"]:
        """Activations that AuxK gives dead latents: ReLU(p), as they would have were they kept."""
        return pre_acts.relu()

    def dead_sizes(
        self, acts: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok n_dead"]:
        """By which AuxK takes the best dead latents of each token."""
        return acts

    def decode_some(
        self, latents: Float[Tensor, "tok some"], which: Int[Tensor, " some"]
    ) -> Float[Tensor, "tok d_model"]:
        """What some latents alone add up to, without b_dec, in the head's units."""
        return (latents @ self.W_dec[which]).float()

    @torch.no_grad()
    def project_grad_(self) -> None:
        """Take from each dictionary row's gradient its part along the row."""
        if self.W_dec.grad is None:
            return
        # in blocks of rows, so that their product stays in the cache
        size = max(1, BLOCK // self.d_model)
        for grad, rows in zip(self.W_dec.grad.split(size), self.W_dec.split(size), strict=True):
            grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1.0)

    @torch.no_grad()
    def project_(self) -> None:
        """Renormalise the dictionary rows to 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def first_directions(d_sae: int, d_model: int, seed: int) -> Float[Tensor, "d_sae d_model"]:
    """The dictionary every head of this shape and seed starts from: random, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_model, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def products(
    branches: list[Branch],
    bias: Float[Tensor, " d_sae"],
    latents: Int[Tensor, " some"] | None = None,
) -> Float[Tensor, "tok some"]:
    """Inputs @ weights, summed over the branches, plus the bias; fp32, of all latents or some."""
    total: Tensor | None = None
    for inputs, weights in branches:
        some = weights if latents is None else weights.T[latents].T
        if total is None:
            total = (inputs @ some).float()
        # in place: each sum would be one more tensor of the batch's size, and so would each product
        elif total.dtype == inputs.dtype == some.dtype and not mixed_precision(inputs):
            total.addmm_(inputs, some)
        else:
            total.add_(inputs @ some)
    assert total is not None, "a head without an encoder"
    return total.add_(bias if latents is None else bias[latents])


def mixed_precision(like: Tensor) -> bool:
    """Whether autocast is on where a tensor is; it leaves operations in place alone."""
    return torch.is_autocast_enabled(like.device.type)
