"""KANReLUDense: a KAN layer, ReLU and a dense layer on either side of a sparse code."""

from typing import Any

import torch

from kanllama_lightning.heads.decoders import MixingKAN
from kanllama_lightning.heads.encoders import ReLUKANEncoder
from kanllama_lightning.heads.hidden_units import HI, LO, own_stream
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.heads.sae import SAE, FirstRows
from kanllama_lightning.heads.selections import Thresholded


class KANReLUDense(SAE):
    """p = ReLU(KAN(x~) + c) U + b_enc; z = BatchTopK of ReLU(p); x_hat = f(z) - f(0) + b_dec.

    f(z) = KAN(ReLU(z V + c') / R). The earlier design `kan_relu_dense` with what it lacked: a
    sparse code, b_dec, and a decoder grid that lies on its inputs: [0, 1] of their reach R in the
    start sample, with linear tails (METHODS B4, B5 iii). Latents mix in the decoder: what one
    writes depends on which others are on. AuxK leaves about half of the latents dead that are dead
    without it, since they also meet in the decoder's curves.

    Args:
        latent_hidden: Whether either side has as many hidden units as there are latents (the
            "latent" form) rather than as there are coordinates ("input").
        grid_size: Cells of either grid.
    """

    selection: Thresholded
    decoder: MixingKAN

    def __init__(self, latent_hidden: bool = False, grid_size: int = 5, **shared: Any) -> None:
        super().__init__(**shared)
        self.latent_hidden, self.grid_size = latent_hidden, grid_size
        d_model, hidden = self.d_model, self.d_sae if latent_hidden else self.d_model
        own = own_stream(self.seed)
        kan_in = KANLinear(
            d_model, hidden, grid_size, grid_range=(LO, HI), linear_tails=True, generator=own
        )
        kan_out = KANLinear(
            hidden, d_model, grid_size, grid_range=(0.0, 1.0), linear_tails=True, generator=own
        )
        rows = torch.randn(self.d_sae, hidden, generator=own) / hidden**0.5
        encoder, decoder = ReLUKANEncoder(rows, kan_in), MixingKAN(rows, kan_out)
        self.compose(encoder, Thresholded(self.target_l0), decoder)

    @torch.no_grad()
    def start_parts_(self, first: FirstRows) -> None:
        """The reach of the decoder's hidden units; encoder and decoder are no lines."""
        self.decoder.start_from_(*self.selection.kept(self.sums(first.read)))
