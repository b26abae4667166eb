"""Bits per token: against the formula written down once more, and against what they must obey."""

import math

import numpy as np
import pytest
import torch

from kanllama_lightning.heads import PCA, BatchTopK, BentDictionary
from kanllama_lightning.measures.bits import ALLOWED, Sample, bits_per_token, joined

D, M, K, N = 16, 48, 4, 600


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(n, 6, generator=generator) @ torch.randn(
        6, D, generator=torch.Generator().manual_seed(1)
    )
    return low + 0.1 * torch.randn(n, D, generator=generator) + 2


def made(kind=BatchTopK, **args):
    head = kind(d_model=D, d_sae=args.pop("d_sae", M), target_l0=K, seed=0, **args)
    head.start_(rows(2000))
    head.eval().calibrate_(rows(2000))
    return head


def sample(head, x):
    out = head(x)
    return Sample(out.codes.sparse(), x, out.x_hat.detach())


def by_hand(head, x, step):
    """Bits and FVU at a step, with dense numpy arrays and the head's own `decode`."""
    z = head.encode(x).detach().double().numpy()
    p = (z != 0).mean(0)
    which = sum(-q * math.log2(q) - (1 - q) * math.log2(1 - q) for q in p if 0 < q < 1)
    fires = (z != 0).sum(0)
    size = np.sqrt((z**2).sum(0) / np.maximum(fires, 1))
    steps = np.round(z / np.maximum(step * size, 1e-30))
    _, counts = np.unique(steps[z != 0], return_counts=True)
    q = counts / counts.sum()
    values = -(q * np.log2(q)).sum() * fires.sum() / len(z)
    x_hat = head.decode(torch.from_numpy(steps * step * size).float()).detach().numpy()
    a = x.numpy().astype(float)
    return which, values, ((a - x_hat) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()


@pytest.mark.parametrize("kind", [BatchTopK, BentDictionary])
def test_bits_are_the_formula(kind):
    head, x = made(kind), rows(N)
    found = bits_per_token(head.decode, sample(head, x))
    which, values, fvu = by_hand(head, x, found.step)
    assert found.which == pytest.approx(which)
    assert found.values == pytest.approx(values)
    assert found.fvu == pytest.approx(fvu, rel=1e-5)
    assert found.total == found.which + found.values


def test_the_step_is_the_coarsest_that_is_allowed():
    head, x = made(), rows(N)
    found = bits_per_token(head.decode, sample(head, x))
    assert found.fvu_exact < found.fvu <= found.fvu_exact * (1 + ALLOWED)
    assert by_hand(head, x, found.step * 1.05)[2] > found.fvu_exact * (1 + ALLOWED)
    finer = bits_per_token(head.decode, sample(head, x), allowed=ALLOWED / 100)
    assert finer.step < found.step
    assert finer.values > found.values + 1
    assert finer.which == found.which


def test_batches_do_not_matter_and_neither_does_the_unit():
    head, x = made(), rows(N)
    whole = bits_per_token(head.decode, sample(head, x))
    parts = joined([sample(head, part) for part in x.split(170)])
    assert bits_per_token(head.decode, parts) == pytest.approx(whole, rel=1e-6)
    out = head(x)
    codes = out.codes.sparse()

    def decode(latents):  # of the same head in units a thousand times as small
        return head.decode(latents / 1000)

    louder = Sample(codes._replace(values=codes.values * 1000), x, out.x_hat.detach())
    assert bits_per_token(decode, louder) == pytest.approx(whole, rel=1e-4)


def test_more_latents_to_choose_from_take_more_bits():
    """Twice the latents at the same L0: one bit more for each that fires, and no more."""
    narrow, x = made(), rows(4000)
    wide = made(d_sae=2 * M)
    n, w = (bits_per_token(head.decode, sample(head, x)) for head in (narrow, wide))
    l0 = float(narrow(x).codes.l0().float().mean())
    assert n.which < w.which < n.which + 1.3 * l0


def test_of_a_code_that_always_fires_only_the_values_count():
    head = PCA(d_model=D, d_sae=3)
    head.start_(rows(2000))
    found = bits_per_token(head.decode, sample(head.eval(), rows(N)))
    assert found.which == 0
    assert 3 < found.values < 3 * 12


def test_no_latent_takes_no_bits_and_what_does_not_vary_has_no_fvu():
    head = made()
    head.selection.threshold.fill_(1e9)
    x = rows(20)
    found = bits_per_token(head.decode, sample(head, x))
    assert (found.which, found.values) == (0, 0)
    head, same = made(), rows(1).expand(20, D)
    assert math.isnan(bits_per_token(head.decode, sample(head, same)).fvu)
