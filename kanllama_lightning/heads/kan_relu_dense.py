"""KANReLUDense: a KAN layer, ReLU and a dense layer on either side of a sparse code."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional.losses import geometric_median
from kanllama_lightning.functional.sparse import Pattern, sparse_decode
from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.heads.dictionary import MEDIAN_ROWS, Branch
from kanllama_lightning.heads.hidden import own_stream
from kanllama_lightning.heads.kan_decoder import KANDecoder
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.types import Curves

LO, HI = -3.0, 3.0
"""The encoder's grid, in deviations of a coordinate over the start sample."""
STEP = 1e-5
"""Step of the central difference, in fp64, as a share of the reach."""
ROWS = 1 << 24
"""Elements of the planes of the rows whose tangents are made at once."""


class KANReLUDense(KANDecoder):
    """p = ReLU(KAN(x~) + c) U + b_enc; z = BatchTopK of ReLU(p); x_hat = f(z) - f(0) + b_dec.

    f(z) = KAN(ReLU(z V + c') / R). The earlier design `kan_relu_dense` with what it lacked: a
    sparse code, b_dec, and a decoder grid that lies on its inputs: [0, 1] of their reach R in the
    start sample, with linear tails (METHODS B4, B5 iii). Latents mix in the decoder: what one
    writes depends on which others are on.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        latent_hidden: Whether either side has as many hidden units as there are latents (the
            "latent" form) rather than as there are coordinates ("input").
        grid_size: Cells of either grid.
        alpha_aux: Weight of AuxK; 0 leaves it out. It leaves about half of the latents dead that
            are dead without it, since they also meet in the decoder's curves.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    reach: Tensor

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        latent_hidden: bool = False,
        grid_size: int = 5,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        del self.W_enc
        self.latent_hidden, self.grid_size = latent_hidden, grid_size
        hidden = d_sae if latent_hidden else d_model
        own = own_stream(seed)
        self.kan_in = KANLinear(
            d_model, hidden, grid_size, grid_range=(LO, HI), linear_tails=True, generator=own
        )
        self.kan_out = KANLinear(
            hidden, d_model, grid_size, grid_range=(0.0, 1.0), linear_tails=True, generator=own
        )
        self.c_in = nn.Parameter(torch.zeros(hidden))
        self.c_out = nn.Parameter(torch.zeros(hidden))
        rows = torch.randn(d_sae, hidden, generator=own) / hidden**0.5
        self.U = nn.Parameter(rows.clone().T)
        self.V = nn.Parameter(rows)
        self.register_buffer("reach", torch.ones(hidden))

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Scale, b_dec, and the reach of the decoder's hidden units."""
        SAEHead.start_(self, x)
        sample = x[:MEDIAN_ROWS]
        self.b_dec.copy_(geometric_median(sample.float() * self.scale))
        values, pattern = self.kept(sample)
        widest = torch.relu(sparse_decode(values, pattern, self.V) + self.c_out).amax(0)
        known = widest > 0
        middle = widest[known].median() if known.any() else widest.new_ones(())
        self.reach.copy_(torch.where(known, widest, middle))

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """The hidden units with their weights."""
        return [(torch.relu(self.kan_in(self.standardised(x)) + self.c_in), self.U)]

    def decode_kept(
        self, values: Float[Tensor, " nnz"], pattern: Pattern
    ) -> Float[Tensor, "tok d_model"]:
        """f(z) - f(0)."""
        summed = sparse_decode(values, pattern, self.V)
        hidden = torch.relu(torch.cat([summed, summed.new_zeros(1, summed.shape[1])]) + self.c_out)
        made: Tensor = self.kan_out(hidden / self.reach)
        return made[:-1] - made[-1]

    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """Through the hidden units that are on: what else fires decides which those are."""
        n_planes = self.kan_out.weight[0].numel()
        weights = self.kan_out.weight.flatten(1).T
        made = []
        for rows in latents.split(max(1, ROWS // n_planes)):
            hidden = rows @ self.V + self.c_out
            u = (hidden.relu() / self.reach).double()
            ahead, behind = (self.kan_out.features(u + step) for step in (STEP, -STEP))
            slopes = (ahead - behind) / (2 * STEP)
            moved = (hidden > 0) * self.V[which] / self.reach
            made.append((slopes * moved.unsqueeze(1)).flatten(1).to(weights.dtype) @ weights)
        return torch.cat(made)

    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """The mean Jacobian over x, as latents mix; NaN for one that does not fire there."""
        return self.mean_jacobian(x, torch.arange(self.d_sae, device=x.device))[0]

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Edges, hidden units and inputs of the encoder; and the decoder's edges.

        The encoder's are times the length of U's rows, as in KANEncoder.
        """
        found = self.kan_in.curves(
            self.standardised(x),
            top,
            ends=("input", "hidden"),
            axes=(
                "input, in deviations of the start sample",
                "edge times |U|, in units of pre-activations",
            ),
            gain=self.U.norm(dim=1),
            pools=("hidden", "input"),
        )
        values, pattern = self.kept(x)
        hidden = torch.relu(sparse_decode(values, pattern, self.V) + self.c_out)
        return found + self.kan_out.curves(
            hidden / self.reach,
            top,
            ends=("hidden", "output"),
            axes=("hidden unit over its reach", "added to the reconstruction, head's units"),
            kind="decoder edge",
        )

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the encoder's inputs beyond its grid."""
        return {"out_of_grid": self.kan_in.out_of_grid(self.standardised(x))}
