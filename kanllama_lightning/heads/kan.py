"""KANEncoder: a KAN layer helps the linear encoder; the dictionary stays linear."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.heads.hidden import Hidden
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.named import checked_args, name_of, named_class, shipped
from kanllama_lightning.types import Curves, InputError


class KANEncoder(Hidden):
    """p = (x - b_dec) W_enc + ReLU(KAN(x~) + c) U + b_enc; BatchTopK of ReLU(p); linear W_dec.

    x~ is the normalised activation standardised per coordinate with the mean and deviation of
    the start sample, so that a fixed grid of [-3, 3] holds nearly all of it. U = 0 and c = 0 at
    the start: step 0 equals the linear `BatchTopK` head of the same seed bit for bit. The
    dictionary is linear with unit-norm rows, so logit lens and dashboards stay exact.
    The KAN layer is that of Liu et al. 2024 (arXiv 2404.19756) as B-spline features times a
    matrix (Blealtan, efficient-kan).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        d_hidden: Outputs of the KAN layer; left out, d_model.
        kan_class: The KAN layer: our own, or the import path of another one: built as
            `kan_class(d_model, d_hidden, **kan_args)`, maps [tok d_model] to [tok d_hidden].
            `efficient_kan.KANLinear` works where that package is installed.
        kan_args: Further arguments of the KAN layer; left out, a cubic spline on 5 intervals of
            [-3, 3] (with linear tails beyond, for our own layer).
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`); the KAN layer draws from
            a stream of its own.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        d_hidden: int | None = None,
        kan_class: str = "KANLinear",
        kan_args: dict[str, Any] | None = None,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        hidden = d_model if d_hidden is None else d_hidden
        super().__init__(d_model, d_sae, target_l0, hidden, alpha_aux, seed)
        layer = named_class(kan_class, nn.Module)
        self.d_hidden, self.kan_args = d_hidden, kan_args
        self.kan_class = name_of(layer) if shipped(kan_class) else kan_class
        args = kan_args
        if args is None:
            args = {"grid_size": 5, "spline_order": 3, "grid_range": [-3.0, 3.0]}
            if layer is KANLinear:
                args["linear_tails"] = True
        if layer is KANLinear:
            ends = {"in_features": d_model, "out_features": hidden}
            checked_args(layer, ends | args, "head.kan_args")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            try:
                self.kan = layer(d_model, hidden, **args)
            except TypeError as e:
                raise InputError(
                    f"head.kan_args={args}: {kan_class} does not take them ({e})"
                ) from e
        self.kan_bias = nn.Parameter(torch.zeros(hidden))

    def hidden(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """ReLU(KAN(x~) + c)."""
        return torch.relu(self.kan(x) + self.kan_bias)

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Edges of our own KAN layer, hidden units and inputs; times the length of U's rows."""
        if not isinstance(self.kan, KANLinear):
            return []
        return self.kan.curves(
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

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the KAN layer's inputs beyond its grid."""
        if not hasattr(self.kan, "out_of_grid"):
            return {}
        return {"out_of_grid": self.kan.out_of_grid(self.standardised(x))}
