"""What processes that train a head together send each other in a step, either way of dealing."""

from typing import NamedTuple

from kanllama_lightning.functional.common_cutoff import LOWER, UPPER
from kanllama_lightning.heads.dealt import dealt_tensors
from kanllama_lightning.heads.encoders import HiddenEncoder, LinearEncoder, UncentredEncoder
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.penalties import Gate, Penalised
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Nested, Thresholded, TokenTopK

FLOAT, COUNT = 4, 8
"""Bytes of a float32 and of a count (int64)."""


class Collective(NamedTuple):
    """One call in which all processes take part."""

    what: str
    gathers: bool
    """Whether it gathers what each process gives; otherwise it adds up, or takes the smallest."""
    bytes: int
    """Of its result, which every process has afterwards."""


def received(calls: list[Collective], world: int) -> float:
    """Bytes that reach each process where all of them form a ring."""
    part = (world - 1) / world
    return sum(part * call.bytes * (1 if call.gathers else 2) for call in calls)


def of_gradients(head: SAEHead) -> list[Collective]:
    """A step in which every process holds all of the head (DDP), without counts and cut-offs."""
    return [Collective("gradients of all parameters", False, FLOAT * head.n_parameters())]


def of_latents(
    head: SAEHead, world: int, batch: int, row_bytes: int, dead_of: tuple[int, ...] = ()
) -> list[Collective]:
    """A step in which its latents are dealt out.

    Args:
        head: The whole of it.
        world: Number of processes.
        batch: Rows of a step, of all processes.
        row_bytes: Bytes of a number of a row, as it is sent.
        dead_of: Number of dead latents of every process; empty where none are.

    Raises:
        InputError: It cannot be dealt out.
    """
    dealt = dealt_tensors(head, world)
    assert isinstance(head, SAE)
    encoder, selection = head.encoder, head.selection
    written = FLOAT * batch * head.d_model
    calls = [Collective("rows", True, batch * head.d_row * row_bytes)]
    if isinstance(encoder, HiddenEncoder):
        hidden = FLOAT * batch * encoder.units.n_units
        calls += [Collective("hidden units", True, hidden)]
        calls += [Collective("gradient of hidden units", False, hidden)]
    if isinstance(selection, TokenTopK):
        best = min(selection.k, head.d_sae // world)
        calls += [Collective("candidates", True, FLOAT * batch * best * world)]
    if isinstance(selection, Thresholded):
        calls += [
            Collective("lowest cut-off", False, FLOAT),
            Collective("upper halves", False, FLOAT << UPPER),
            Collective("lower halves", False, FLOAT << LOWER),
            Collective("ties", False, COUNT * world),
            Collective("smallest kept", False, FLOAT),
        ]
    calls += [Collective("reconstruction", False, written)]
    if isinstance(selection, Nested):
        calls += [Collective("inner group", False, written)] * (len(selection.ends) - 1)
    if isinstance(selection, Penalised):
        calls += [Collective("penalty", False, FLOAT), Collective("L0", False, COUNT)]
    if isinstance(selection, Gate):
        calls += [Collective("reconstruction by gates", False, written)]
    if head.alpha_aux and dead_of:
        best = min(head.d_model // 2, sum(dead_of), max(dead_of))
        calls += [Collective("dead candidates", True, FLOAT * batch * best * world)]
        calls += [Collective("reconstruction by dead latents", False, written)]
    if isinstance(encoder, LinearEncoder) and not (
        isinstance(encoder, UncentredEncoder) or head.transcoder
    ):
        calls += [Collective("gradient of b_dec by encoders", False, FLOAT * head.d_model)]
    own = sum(p.numel() for n, p in head.named_parameters() if n in dealt and p.requires_grad)
    calls += [
        Collective("length of the gradient", False, FLOAT),
        Collective(
            "gradients of what is not dealt out", False, FLOAT * (head.n_parameters() - own)
        ),
    ]
    return calls
