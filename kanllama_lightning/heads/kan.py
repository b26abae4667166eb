"""KANEncoder: a KAN layer helps the linear encoder; the dictionary stays linear."""

from typing import Any

from torch import nn

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import HiddenEncoder
from kanllama_lightning.heads.kan_linear import KANUnits
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded
from kanllama_lightning.storage.named import name_of, named_class, shipped


class KANEncoder(SAE):
    """p = (x - b_dec) W_enc + ReLU(KAN(x~) + c) U + b_enc; BatchTopK of ReLU(p); linear W_dec.

    x~ is the normalised activation standardised per coordinate with the mean and deviation of
    the start sample, so that a fixed grid of [-3, 3] holds nearly all of it. U = 0 and c = 0 at
    the start: step 0 equals the linear `BatchTopK` head of the same seed bit for bit. The
    dictionary is linear with unit-norm rows, so logit lens and dashboards stay exact.
    The KAN layer is that of Liu et al. 2024 (arXiv 2404.19756) as B-spline features times a
    matrix (Blealtan, efficient-kan).

    Args:
        d_hidden: Outputs of the KAN layer (default: d_model).
        kan_class: The KAN layer: our own, or the import path of another one: built as
            `kan_class(d_model, d_hidden, **kan_args)`, maps [tok d_model] to [tok d_hidden].
            `efficient_kan.KANLinear` works where that package is installed.
        kan_args: Further arguments of the KAN layer (default: a cubic spline on 5 intervals of
            [-3, 3], with linear tails beyond for our own layer).
    """

    def __init__(
        self,
        d_hidden: int | None = None,
        kan_class: str = "KANLinear",
        kan_args: dict[str, Any] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.d_hidden, self.kan_args = d_hidden, kan_args
        hidden = self.d_model if d_hidden is None else d_hidden
        units = KANUnits(self.d_model, hidden, kan_class, kan_args, self.seed)
        layer = named_class(kan_class, nn.Module)
        self.kan_class = name_of(layer) if shipped(kan_class) else kan_class
        W = self.drawn()
        self.compose(HiddenEncoder(W, units), Thresholded(self.target_l0), UnitDirections(W))
