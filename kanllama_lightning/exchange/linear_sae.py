"""What all formats can say: a linear SAE in the LM's own units, made from a head and into one.

    p = x W_enc + b_enc, or (x - b_dec) W_enc + b_enc;  z by a rule of p;  x_hat = z W_dec + b_dec.

Of a transcoder x is what it reads, x_hat what it writes, to which a skip adds x W_skip.

A head's scale is moved into the weights, so that its latents keep their units, and norms of the
dictionary rows into the encoder where the head reports latents as z_j ||w_j|| (METHODS 0.1, A1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads import Gated, JumpReLU, SAEHead, Standard, TopK
from kanllama_lightning.heads.decoders import FreeDirections, UnitDirections
from kanllama_lightning.heads.encoders import FrozenLinearEncoder, LinearEncoder, UncentredEncoder
from kanllama_lightning.heads.penalties import L1, Gate, Jump
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Nested, Selection, Thresholded, TokenTopK
from kanllama_lightning.types import InputError

UNKNOWN_L0 = 32
"""target_l0 of an imported head whose folder says nothing of its L0; inference does not ask."""
SAME_NORM = 1e-5
"""Up to which dictionary rows count as of one norm."""


class Positive(NamedTuple):
    """z = ReLU(p)."""

    def times(self, by: Float[Tensor, " d_sae"]) -> "Positive":
        """The rule of latents that are so many times as large."""
        return self

    def shifted(self, by: Float[Tensor, " d_sae"]) -> "Positive":
        """The rule where b_enc has grown by so much, and x W_enc is less by it."""
        return self

    def head(self, d_model: int, d_sae: int, l0: int, **kind: bool) -> SAE:
        """A head with this rule."""
        return Standard(d_model=d_model, d_sae=d_sae, target_l0=l0, **kind)


class AboveThreshold(NamedTuple):
    """z_j = p_j 1[p_j > theta_j], theta >= 0."""

    theta: Float[Tensor, " d_sae"]

    def times(self, by: Float[Tensor, " d_sae"]) -> "AboveThreshold":
        """The rule of latents that are so many times as large."""
        return AboveThreshold(self.theta * by)

    def shifted(self, by: Float[Tensor, " d_sae"]) -> "AboveThreshold":
        """The rule where b_enc has grown by so much, and x W_enc is less by it."""
        return self

    def head(self, d_model: int, d_sae: int, l0: int, **kind: bool) -> SAE:
        """A head with this rule."""
        head = JumpReLU(d_model=d_model, d_sae=d_sae, target_l0=l0, **kind)
        head.selection.theta.copy_(self.theta)
        return head


class LargestOfToken(NamedTuple):
    """z keeps the k largest of ReLU(p) of each token."""

    k: int

    def times(self, by: Float[Tensor, " d_sae"]) -> "LargestOfToken":
        """The rule of latents that are so many times as large, if that leaves their order."""
        return self

    def shifted(self, by: Float[Tensor, " d_sae"]) -> "LargestOfToken":
        """The rule where b_enc has grown by so much, and x W_enc is less by it."""
        return self

    def head(self, d_model: int, d_sae: int, l0: int, **kind: bool) -> SAE:
        """A head with this rule."""
        return TopK(d_model=d_model, d_sae=d_sae, target_l0=self.k, **kind)


class BehindGate(NamedTuple):
    """z_j = 1[p_j > 0] ReLU((p_j - b_enc_j) exp(r_mag_j) + b_mag_j)."""

    r_mag: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]

    def times(self, by: Float[Tensor, " d_sae"]) -> "BehindGate":
        """The rule of latents that are so many times as large, p and b_enc too."""
        return BehindGate(self.r_mag, self.b_mag * by)

    def shifted(self, by: Float[Tensor, " d_sae"]) -> "BehindGate":
        """The rule where b_enc has grown by so much, and x W_enc is less by it."""
        return BehindGate(self.r_mag, self.b_mag + by * self.r_mag.exp())

    def head(self, d_model: int, d_sae: int, l0: int, **kind: bool) -> SAE:
        """A head with this rule."""
        head = Gated(d_model=d_model, d_sae=d_sae, target_l0=l0, **kind)
        assert isinstance(head.selection, Gate)
        head.selection.r_mag.copy_(self.r_mag)
        head.selection.b_mag.copy_(self.b_mag)
        return head


Rule = Positive | AboveThreshold | LargestOfToken | BehindGate


def _threshold(selection: Thresholded) -> Rule:
    theta = selection.inference_threshold()
    if theta is None:
        raise InputError(
            "its threshold was never calibrated, so it has none that could be written; train it to "
            "the end of its budget"
        )
    return AboveThreshold(theta.detach().reshape(1))


RULES: dict[type[Selection], Callable[[Any], Rule]] = {
    L1: lambda _: Positive(),
    Jump: lambda selection: AboveThreshold(selection.theta.detach()),
    TokenTopK: lambda selection: LargestOfToken(selection.k),
    Gate: lambda selection: BehindGate(selection.r_mag.detach(), selection.b_mag.detach()),
    Thresholded: _threshold,
    Nested: _threshold,
}
"""The rule of each selection; of one that is not here, a subclass too, nothing is known."""


class LinearSAE(NamedTuple):
    """A linear SAE in the LM's units."""

    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    rule: Rule
    centred: bool
    """Whether b_dec is taken off the input; not of a transcoder."""
    transcoder: bool = False
    """Whether x_hat is of another place than x."""
    W_skip: Float[Tensor, "d_model d_model"] | None = None

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    def reading(self, centred: bool) -> "LinearSAE":
        """The same map, with b_dec taken off the input or not."""
        if centred == self.centred:
            return self
        by = (self.b_dec.double() @ self.W_enc.double()) * (1 if centred else -1)
        return self._replace(
            b_enc=(self.b_enc.double() + by).float(),
            rule=self.rule.shifted(by.float()),
            centred=centred,
        )

    def with_unit_rows(self) -> "LinearSAE":
        """The same map, with norms moved from the dictionary into the encoder: latents z ||w||."""
        norms = self.W_dec.double().norm(dim=1)
        return self._replace(
            W_enc=(self.W_enc.double() * norms).float(),
            b_enc=(self.b_enc.double() * norms).float(),
            W_dec=(self.W_dec.double() / norms.clamp_min(1e-30).unsqueeze(1)).float(),
            rule=self.rule.times(norms.float()),
        )

    def reading_scaled(self, scale: Float[Tensor, ""]) -> "LinearSAE":
        """Of activations that have not been multiplied by a scale; latents stay as they are.

        What a transcoder reads has another scale: it stays as it is.
        """
        s = scale.double()
        return self._replace(
            W_enc=(self.W_enc.double() * (1 if self.transcoder else s)).float(),
            W_skip=None if self.W_skip is None else (self.W_skip.double() / s).float(),
            W_dec=(self.W_dec.double() / s).float(),
            b_dec=(self.b_dec.double() / s).float(),
        )

    @torch.no_grad()
    def head(self, l0: int | None = None) -> SAE:
        """A head that makes the same of activations, with latents in the units they are in here.

        Its scale is what gives dictionary rows the norm 1. Where they have several norms there is
        no such scale: it is 1, and latents are z_j ||w_j||, but for TopK, whose choice would be
        another one then.

        Args:
            l0: Its mean L0, if that is known.
        """
        made = self.reading(not (isinstance(self.rule, Positive) or self.transcoder))
        scale = 1 / self._norms().median().clamp_min(1e-30).float()
        if self._alike():
            made = made.reading_scaled(1 / scale)
        else:
            scale = torch.ones(())
            if not isinstance(self.rule, LargestOfToken):
                made = made.with_unit_rows()
        return made._held(scale, l0)

    @torch.no_grad()
    def head_at(self, scale: Float[Tensor, ""], l0: int | None = None) -> SAE:
        """The head that makes the same of activations at a given scale, as one that is trained on
        has it: its latents are as many times as large as that takes.

        Args:
            scale: Of the head.
            l0: Its mean L0, if that is known.

        Raises:
            InputError: Latents of another size would be chosen otherwise.
        """
        if isinstance(self.rule, LargestOfToken) and not self._alike():
            raise InputError(
                "a TopK whose dictionary rows have several norms chooses other latents when they "
                "have one; start from another kind of head"
            )
        made = self.reading(not (isinstance(self.rule, Positive) or self.transcoder))
        made = made.with_unit_rows()
        by = scale.expand(self.d_sae)
        made = made._replace(
            W_enc=made.W_enc * (scale if self.transcoder else 1),
            W_skip=None if made.W_skip is None else made.W_skip * scale,
            b_enc=made.b_enc * scale,
            b_dec=made.b_dec * scale,
            rule=made.rule.times(by),
        )
        return made._held(scale, l0)

    def _norms(self) -> Float[Tensor, " d_sae"]:
        return self.W_dec.double().norm(dim=1)

    def _alike(self) -> bool:
        """Whether all dictionary rows have one norm."""
        norms = self._norms()
        return bool((norms / norms.median().clamp_min(1e-30) - 1).abs().max() < SAME_NORM)

    def _held(self, scale: Float[Tensor, ""], l0: int | None) -> SAE:
        """A head of these numbers, which are in its units already."""
        l0 = min(self.d_sae, max(1, UNKNOWN_L0 if l0 is None else l0))
        kind = {"transcoder": self.transcoder, "skip": self.W_skip is not None}
        head = self.rule.head(self.d_model, self.d_sae, l0, **kind)
        assert isinstance(head.encoder, LinearEncoder)
        assert isinstance(head.decoder, UnitDirections)
        head.scale.copy_(scale)
        head.encoder.W_enc.copy_(self.W_enc)
        head.encoder.b_enc.copy_(self.b_enc)
        head.decoder.W_dec.copy_(self.W_dec)
        head.b_dec.copy_(self.b_dec)
        if head.W_skip is not None and self.W_skip is not None:
            head.W_skip.copy_(self.W_skip)
        return head.eval()


@torch.no_grad()
def linear_form(head: SAEHead) -> LinearSAE:
    """A head as a linear SAE whose latents are the head's own.

    Raises:
        InputError: It is none, or has no threshold yet.
    """
    why = _not_linear(head)
    if why is not None:
        raise InputError(
            f"{type(head).__name__}: {why}, so that no format of linear SAEs can hold it; `--to "
            "saelens` writes it for the plug-in kanllama_lightning.exchange.saelens_plugin, whole"
        )
    assert isinstance(head, SAE)
    encoder, decoder = head.encoder, head.decoder
    assert isinstance(encoder, LinearEncoder | FrozenLinearEncoder)
    assert isinstance(decoder, UnitDirections)
    b_enc, W_enc = encoder.b_enc.detach(), encoder.W_enc.detach()
    if isinstance(encoder, FrozenLinearEncoder) and not head.transcoder:
        # what it takes off its input is the b_dec of the start
        off = (head.b_dec.double() - encoder.centre.double()) @ W_enc.double()
        b_enc = (b_enc.double() + off).float()
    try:
        rule = RULES[type(head.selection)](head.selection)
    except InputError as e:
        raise InputError(f"{type(head).__name__}: {e}") from e
    if isinstance(rule, AboveThreshold):
        rule = AboveThreshold(rule.theta.expand(head.d_sae))
    centred = not isinstance(encoder, UncentredEncoder)
    found = LinearSAE(W_enc, b_enc, decoder.W_dec.detach(), head.b_dec.detach(), rule, centred)
    if head.transcoder:
        found = _with_input(found, head)
    if isinstance(decoder, FreeDirections):
        found = found.with_unit_rows()
    return found.reading_scaled(head.scale)


def _with_input(found: LinearSAE, head: SAE) -> LinearSAE:
    """A transcoder that takes what it reads as it is: centre and scale moved into the weights."""
    scale, centre = head.input_scale.double(), head.input_centre.double()
    W_enc, b_enc, b_dec = (t.double() for t in (found.W_enc, found.b_enc, found.b_dec))
    rule, W_skip = found.rule, None
    if found.centred:
        by = -(centre @ W_enc)
        b_enc, rule = b_enc + by, rule.shifted(by.float())
    if head.W_skip is not None:
        skip = head.W_skip.detach().double()
        b_dec, W_skip = b_dec - centre @ skip, (skip * scale).float()
    return found._replace(
        W_enc=(W_enc * scale).float(), b_enc=b_enc.float(), b_dec=b_dec.float(), rule=rule,
        centred=False, transcoder=True, W_skip=W_skip,
    )  # fmt: skip


def _not_linear(head: SAEHead) -> str | None:
    """Why a head is no linear SAE; None if it is one."""
    if not isinstance(head, SAE):
        return "is not put together from an encoder, a selection and a decoder"
    if type(head.encoder) not in (LinearEncoder, UncentredEncoder, FrozenLinearEncoder):
        return f"its encoder ({type(head.encoder).__name__}) is no linear map"
    if not isinstance(head.decoder, UnitDirections):
        return f"its decoder ({type(head.decoder).__name__}) writes curves"
    if type(head.selection) not in RULES:
        return f"its selection ({type(head.selection).__name__}) bends what it keeps"
    return None


def is_linear(head: SAEHead) -> bool:
    """Whether `linear_form` knows one of this head."""
    return _not_linear(head) is None
