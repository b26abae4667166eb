"""What a latent writes: every head's directions against its own decoder."""

import pytest
import torch

from kanllama_lightning import heads
from kanllama_lightning.heads import PCA, DenseKANReLU, DenseOnlyKAN, KANReLUDense, SAEHead
from kanllama_lightning.heads.decoders import CurvedDecoder
from kanllama_lightning.measures.metrics import Activations
from tests.heads.test_heads import D, K, M, rows, started, trained

KINDS = [k for n in heads.__all__ if (k := getattr(heads, n)) not in (SAEHead, heads.LinearMap)]
DENSE = (DenseOnlyKAN, DenseKANReLU)
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind):
    """A head off its start, where it is trained; in evaluation mode."""
    if kind is PCA:
        head = PCA(D, D - 2)
        head.start_(rows(500, seed=99))
        return head.eval()
    return (started(kind) if kind in DENSE else trained(kind)).eval()


def operating_points(head, x):
    meter = Activations(head.d_sae)
    with torch.no_grad():
        meter.update(head(x).codes)
    return meter.quantile(0.5).float()


def curved(head):
    """Whether what a latent writes is no direction."""
    return type(head) in DENSE or isinstance(getattr(head, "decoder", None), CurvedDecoder)


@every_kind
def test_directions_are_what_the_decoder_adds(kind):
    head, x = made(kind), rows(200)
    at = operating_points(head, x)
    found = head.directions(at, x)
    assert found.shape == (head.d_sae, D)
    assert not found.requires_grad
    if kind is KANReLUDense:
        want = head.decoder.mean_jacobian(head.encode(x), torch.arange(M))[0]
        torch.testing.assert_close(found, want, equal_nan=True)
        return
    units = torch.ones(()) if kind is PCA else head.scale  # PCA's codes are raw
    with torch.no_grad():
        empty = head.decode(torch.zeros(1, head.d_sae))[0]
        for j in range(head.d_sae):
            if at[j].isnan():
                assert found[j].isnan().all() or not curved(head)
                continue
            code = torch.zeros(1, head.d_sae)
            code[0, j] = at[j]
            want = (head.decode(code)[0] - empty) * units
            torch.testing.assert_close(at[j] * found[j], want, atol=2e-4, rtol=1e-3)


@every_kind
def test_straight_where_nothing_bends(kind):
    head, x = made(kind), rows(200)
    at = operating_points(head, x)
    which = at.isfinite().nonzero().squeeze(1)
    found = head.straightness(which, at[which])
    assert found.shape == which.shape
    assert ((found > 0) & (found <= 1 + 1e-6)).all()
    if not curved(head):
        assert (found == 1).all()
    assert head.straightness(which[:0], at[:0]).shape == (0,)


@pytest.mark.parametrize("kind", DENSE)
def test_dense_kans_curve_against_the_decoder(kind):
    head = started(kind).eval()
    which, values = torch.arange(M), torch.linspace(0.2, 1.5, M)
    with torch.no_grad():
        want = head.decode(torch.diag(values)) - head.decode(torch.zeros(1, M))
        torch.testing.assert_close(
            head.alone(which, values), want * head.scale, atol=1e-5, rtol=1e-4
        )
        curve = SAEHead.alone(head, which[3].expand(32), 1.5 * torch.linspace(0, 1, 32))
    power = torch.linalg.svdvals(curve.double()).square()
    got = head.straightness(which[3:4], torch.tensor([1.5]))
    assert got.item() == pytest.approx(float(power[0] / power.sum()), rel=1e-5)


def test_a_latent_that_does_not_fire_has_no_secant():
    head = started(heads.OnlyKAN).eval()
    at = torch.full((M,), torch.nan)
    at[2] = 1.0
    found = head.directions(at, rows(20))
    assert found[2].isfinite().all()
    assert found[torch.arange(M) != 2].isnan().all()


def test_mixing_latents_without_rows_have_no_direction():
    head = trained(KANReLUDense).eval()
    found = head.directions(torch.ones(M), torch.zeros(0, D))
    assert found.isnan().all()


def test_a_new_kind_of_head_needs_no_directions_of_its_own():
    """The contract's own secant, for a linear decoder: its dictionary."""
    head, at = trained(heads.BatchTopK, target_l0=K).eval(), torch.full((M,), 2.0)
    with torch.no_grad():
        found = SAEHead.directions(head, at, rows(2))
    torch.testing.assert_close(found, head.decoder.W_dec.detach(), atol=1e-5, rtol=1e-4)
