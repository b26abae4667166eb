"""Which of a KAN head's learned curves has to do with a latent."""

import math
import re

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.dashboard.contents import Curve
from kanllama_lightning.heads.encoders import HiddenEncoder
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.types import Curves

OWN = ("latent", "decoder latent")
"""Kinds of curves that belong to one latent each."""
HIDDEN = "hidden unit"


def latent_curves(
    head: SAEHead, x: Float[Tensor, "tok d_model"]
) -> tuple[list[Curve | None], list[float | None]]:
    """For every latent the curve that says most about it, and how bent its curves are.

    A latent that has a curve of its own gets that one, with its bend. One that reads hidden units
    gets the unit that matters most to it: the largest |U_hj| times the size of the unit's curve;
    its bend is that of all units, weighted by the square of that. None for a latent that has no
    curve, or whose curves nothing in the sample reaches.

    Args:
        head: In evaluation mode.
        x: Raw activations over which curves are judged; a few thousand rows.
    """
    curves: list[Curve | None] = [None] * head.d_sae
    bends: list[float | None] = [None] * head.d_sae
    encoder = head.encoder if isinstance(head, SAE) else None
    for kind in head.curves(x, top=max(head.d_sae, head.d_model)):
        if kind.kind in OWN:
            _own(kind, curves, bends)
        elif kind.kind == HIDDEN and isinstance(encoder, HiddenEncoder):
            _through(kind, encoder.U.detach(), curves, bends)
    return curves, bends


def _own(found: Curves, curves: list[Curve | None], bends: list[float | None]) -> None:
    numbers = [_number(name) for name in found.names]
    for i, (latent, bend) in enumerate(zip(numbers, found.bend.tolist(), strict=True)):
        if curves[latent] is None:  # of an encoder's and a decoder's, the encoder's comes first
            curves[latent] = _drawn(found, i, f"{found.kind}: {bend:.1%} of its variance bent")
            bends[latent] = bend


def _through(
    found: Curves,
    U: Float[Tensor, "hidden d_sae"],
    curves: list[Curve | None],
    bends: list[float | None],
) -> None:
    units = torch.tensor([_number(name) for name in found.names], device=U.device)
    gain = U[units].norm(dim=1)
    # sizes are for the whole row of U: what part of it is this latent's
    share = U[units] / gain.clamp_min(1e-12).unsqueeze(1)
    weight = (share * found.size.to(U.device).unsqueeze(1)).square().double()
    total = weight.sum(0)
    bend = (weight * found.bend.to(U.device).double().unsqueeze(1)).sum(0) / total
    best = weight.argmax(0)
    parts = share.gather(0, best.unsqueeze(0)).squeeze(0).tolist()
    for j, (i, part, all_of_it) in enumerate(
        zip(best.tolist(), parts, total.tolist(), strict=True)
    ):
        if all_of_it > 0 and math.isfinite(all_of_it):
            share_of = float(weight[i, j]) / all_of_it
            title = (
                f"{found.names[i]}: the unit that matters most to this latent, with {share_of:.0%} "
                "of what its units add"
            )
            curve = _drawn(found, i, title, part)
            # what is drawn is one unit's, times this latent's weight of it
            curves[j] = curve._replace(y_axis=curve.y_axis.split(",")[0].replace("|U|", "weight"))
            bends[j] = float(bend[j])


def _number(name: str) -> int:
    """The number in "latent 12 (by input 3)"."""
    found = re.search(r"\d+", name)
    assert found is not None, name
    return int(found[0])


def _drawn(found: Curves, i: int, title: str, factor: float = 1.0) -> Curve:
    x, y, density = (t[i].double().cpu() for t in (found.points, found.values, found.density))
    # every other point is enough for a small figure
    pairs = torch.cat([density, density.new_zeros(len(density) % 2)]).view(-1, 2)
    x, y, density = x[::2], y[::2], pairs.sum(1)
    x_axis, y_axis = found.axes
    return Curve(title, x_axis, y_axis, _short(x), _short(y * factor), _short(density))


def _short(values: Float[Tensor, " points"]) -> list[float]:
    return [float(f"{v:.4g}") for v in values.tolist()]
