"""The two earlier KAN designs as they were: dense signed codes, for the record."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.curves import straightness
from kanllama_lightning.heads.decoders import STRAIGHT_POINTS
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.hidden_units import own_stream
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.heads.sae import unexplained
from kanllama_lightning.types import DenseCodes, SAEOutput, StepContext


class DenseKAN(SAEHead, shipped=False):
    """Nothing makes the code sparse: the loss is the reconstruction's alone (METHODS B4).

    A reproduction of earlier behaviour, on activations of the right scale. L0 is close to d_sae,
    so its figures stand beside no sparse head's.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents (default: 8 times the width).
        target_l0: Has no effect: there is nothing to reach it with.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(self, d_model: int, d_sae: int | None, target_l0: int, seed: int = 0) -> None:
        super().__init__(d_model, d_sae, seed)
        self.target_l0 = target_l0

    @abstractmethod
    def encoder(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Latents of normalised activations."""

    @abstractmethod
    def decoder(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Normalised reconstruction."""

    def encode(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Dense signed latents."""
        return self.encoder(x.float() * self.scale).float()

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units."""
        return self.decoder(latents).float() / self.scale

    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction and codes of raw activations."""
        latents = self.encode(x)
        return SAEOutput(self.decode(latents), DenseCodes(latents))

    @torch.no_grad()
    def straightness(
        self, latents: Int[Tensor, " n"], upto: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Straightness of the curves a -> f(a e_j) - f(0), a from 0 to `upto`; codes are signed.

        Args:
            latents: Which.
            upto: End of each curve: the 0.99 quantile of the sizes of its latent.
        """
        steps = torch.linspace(0, 1, STRAIGHT_POINTS, device=upto.device)
        found = [
            straightness(self.alone(j.expand(STRAIGHT_POINTS), end * steps))
            for j, end in zip(latents, upto, strict=True)
        ]
        return torch.stack(found) if found else upto

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction`: FVU of the start sample."""
        x_n, x_hat_n = x.float() * self.scale, out.x_hat * self.scale
        return {"reconstruction": unexplained(x_n, x_hat_n, self.x_variance)}


class DenseOnlyKAN(DenseKAN):
    """z = KAN(x), x_hat = KAN(z): the earlier `only_kan`, with grids of [-1, 1].

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents (default: 8 times the width).
        target_l0: Has no effect: there is nothing to reach it with.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(self, d_model: int, d_sae: int | None, target_l0: int, seed: int = 0) -> None:
        super().__init__(d_model, d_sae, target_l0, seed)
        own = own_stream(seed)
        self.kan_in = KANLinear(d_model, self.d_sae, generator=own)
        self.kan_out = KANLinear(self.d_sae, d_model, generator=own)

    def encoder(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """KAN(x)."""
        latents: Tensor = self.kan_in(x)
        return latents

    @torch.no_grad()
    def alone(
        self, latents: Int[Tensor, " n"], values: Float[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """Through the edges of these latents only: the decoder is additive."""
        at_zero = self.kan_out.features(values.new_zeros(1, 1))
        planes = (self.kan_out.features(values.unsqueeze(1)) - at_zero).squeeze(2)
        return torch.einsum("np,opn->no", planes, self.kan_out.weight[:, :, latents])

    def decoder(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """KAN(z)."""
        x_hat: Tensor = self.kan_out(latents)
        return x_hat


class DenseKANReLU(DenseKAN):
    """z = ReLU(KAN(x)) U + b, x_hat = KAN(ReLU(z V + c)): the earlier `kan_relu_dense`.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents (default: 8 times the width).
        target_l0: Has no effect: there is nothing to reach it with.
        latent_hidden: Whether either side has as many hidden units as there are latents (the
            "latent" form) rather than as there are coordinates ("input").
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int | None,
        target_l0: int,
        latent_hidden: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, seed)
        self.latent_hidden = latent_hidden
        hidden, own = self.d_sae if latent_hidden else d_model, own_stream(seed)
        self.kan_in = KANLinear(d_model, hidden, generator=own)
        self.kan_out = KANLinear(hidden, d_model, generator=own)
        rows = torch.rand(2, self.d_sae, hidden, generator=own) * 2 - 1
        self.U = nn.Parameter((rows[0] / hidden**0.5).T)
        self.b = nn.Parameter(torch.zeros(self.d_sae))
        self.V = nn.Parameter(rows[1] / self.d_sae**0.5)
        self.c = nn.Parameter(torch.zeros(hidden))

    def encoder(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """ReLU(KAN(x)) U + b."""
        return torch.relu(self.kan_in(x)) @ self.U + self.b

    def decoder(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """KAN(ReLU(z V + c))."""
        x_hat: Tensor = self.kan_out(torch.relu(latents @ self.V + self.c))
        return x_hat
