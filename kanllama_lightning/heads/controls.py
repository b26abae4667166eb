"""Controls: what more latents, or a dictionary or an encoder that is not trained, reach."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.batch_topk import BatchTopK
from kanllama_lightning.types import InputError

ROUNDING = 1e-6
"""By which a direction is held inside its bound, so that rounding keeps it there."""


class WideBatchTopK(BatchTopK):
    """BatchTopK with as many more latents as give it the parameters of KANEncoder.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents of the KANEncoder (with its default layer) that this head is to
            be as large as; its own number follows.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        if d_sae < 1:
            raise InputError(f"head.d_sae={d_sae}: a dictionary needs at least 1 latent")
        planes = 1 + 5 + 3  # base, and the bases of 5 cells at order 3
        more = d_model * (planes * d_model + d_sae + 1)
        wide = d_sae + round(more / (2 * d_model + 1))
        super().__init__(d_model, wide, target_l0, alpha_aux, seed)
        self.rival_d_sae = d_sae

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments this head was built with."""
        return super().init_args() | {"d_sae": self.rival_d_sae}


class FrozenDecoder(BatchTopK):
    """BatchTopK whose dictionary stays as it was drawn; encoder and biases are trained.

    What a trained encoder makes of directions that mean nothing: a head whose dictionary is
    worth something has to beat it (arXiv 2602.14111).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    control: ClassVar[str] = "frozen decoder"

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        frozen_(self, "W_dec")

    def project_grad_(self) -> None:
        """Nothing: the dictionary has no gradient."""

    def project_(self) -> None:
        """Nothing: the dictionary does not move."""


class RandomDictionary(FrozenDecoder):
    """FrozenDecoder under its former name, by which saved heads know it.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """


class SoftlyFrozenDecoder(BatchTopK):
    """BatchTopK whose directions keep a cosine of at least `min_cosine` to where they started.

    After each step a row of W_dec that has turned further is brought back to that angle, by the
    shortest way on the unit sphere. What can be had by turning random directions a little
    (arXiv 2602.14111).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        min_cosine: Least cosine of a direction to its start.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    control: ClassVar[str] = "softly frozen decoder"
    W_start: Tensor

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        min_cosine: float = 0.8,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        if not 0 <= min_cosine < 1:
            raise InputError(
                f"head.min_cosine={min_cosine}: must be from 0 to below 1 (default 0.8)"
            )
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        self.min_cosine = min_cosine
        # follows from the seed, so it is not saved
        self.register_buffer("W_start", self.W_dec.detach().clone(), persistent=False)

    @torch.no_grad()
    def project_(self) -> None:
        """Renormalise the dictionary rows to 1 and turn back those that turned too far."""
        super().project_()
        cosine = (self.W_dec * self.W_start).sum(1, keepdim=True)
        across = self.W_dec - cosine * self.W_start
        least = self.min_cosine + ROUNDING
        sine = (1 - least**2) ** 0.5
        length = across.norm(dim=1, keepdim=True)
        back = least * self.W_start + sine * across / length.clamp_min(ROUNDING)
        # one that points straight away from its start has no shortest way back
        back = torch.where(length > ROUNDING, back, self.W_start)
        self.W_dec.copy_(torch.where(cosine < least, back, self.W_dec))


class FrozenEncoder(BatchTopK):
    """BatchTopK whose encoder stays as it was at the start; the dictionary and b_dec are trained.

    p = (x - c) W_enc + b_enc with c, W_enc and b_enc those of the start: which latents fire on a
    token is decided by random directions for good (arXiv 2602.14111).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK; 0 leaves it out. Latents cannot be revived here, but the
            directions of dead ones can still move.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    control: ClassVar[str] = "frozen encoder"
    in_units: ClassVar[tuple[str, ...]] = (*BatchTopK.in_units, "centre")
    centre: Tensor

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        frozen_(self, "W_enc", "b_enc")
        self.register_buffer("centre", torch.zeros(d_model))

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """As any linear head; the first b_dec stays what the encoder takes off."""
        super().start_(x)
        self.centre.copy_(self.b_dec)

    def centred(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """Raw activations in the head's units, the first b_dec taken off."""
        return x.float() * self.scale - self.centre

    def bias(self) -> Float[Tensor, " d_sae"]:
        """b_enc alone: b_dec is no part of this encoder."""
        return self.b_enc


def frozen_(head: BatchTopK, *names: str) -> None:
    """Make parameters of a head buffers: saved with it, and out of the optimizer's reach."""
    for name in names:
        kept: Tensor = getattr(head, name).detach()
        delattr(head, name)
        head.register_buffer(name, kept)
