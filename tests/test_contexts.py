"""Windows around firings, against a search of everything; whatever the batches."""

import pytest
import torch

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.measures import contexts
from kanllama_lightning.measures.contexts import Contexts
from kanllama_lightning.types import DenseCodes, Prefix, SAEOutput, TokenBatch, ValidationBatch

ROWS, POS, D_SAE, WIDTH = 24, 40, 20, 12


@pytest.fixture(scope="module")
def text():
    """Token ids, which are text, documents, and dense latents with a few ties."""
    g = torch.Generator().manual_seed(0)
    doc = torch.randint(0, 50, (ROWS * POS,), generator=g).sort().values.view(ROWS, POS)
    keep = torch.rand(ROWS, POS, generator=g) > 0.04
    keep[:, 0] = False
    ids = torch.randint(0, 99, (ROWS, POS), generator=g)
    z = torch.randint(1, 30, (ROWS, POS, D_SAE), generator=g) / 7
    z = z * (torch.rand(z.shape, generator=g) < torch.linspace(0, 0.3, D_SAE))
    return ids, keep, doc, z


def fed(text, seqs, mask=None, dense=False, **args):
    ids, keep, doc, z = text
    made = Contexts(D_SAE, WIDTH, **({"top": 6, "sampled": 9, "silent": 15} | args))
    for some in torch.arange(ROWS).split(seqs):
        here = keep[some] if mask is None else keep[some] & mask[some]
        kept = z[some][here]
        rows, latents = kept.nonzero(as_tuple=True)
        codes = SparseCodes(kept[rows, latents], rows, latents, len(kept), D_SAE)
        tokens = TokenBatch(ids[some], keep[some], doc[some], torch.zeros(3, dtype=torch.int64))
        out = SAEOutput(kept, DenseCodes(kept) if dense else codes)
        made.update(ValidationBatch("main", tokens, Prefix(z[some], None), here, kept, out))
    return made


def peaks(windows):
    return [
        (float(v[p]), int(r), int(s + p))
        for v, p, r, s in zip(windows.values, windows.peak, windows.row, windows.start, strict=True)
    ]


def firings(text, latent):
    """(activation, row, position) of every firing that counts, by document."""
    _, keep, doc, z = text
    found = {}
    for row, at in (keep & (z[..., latent] > 0)).nonzero().tolist():
        found.setdefault(int(doc[row, at]), []).append((float(z[row, at, latent]), row, at))
    return found


@pytest.mark.parametrize("latent", range(D_SAE))
def test_the_strongest_firing_of_each_document(text, latent):
    top, _ = fed(text, 5).windows(latent)
    by_document = firings(text, latent).values()
    best = [min(some, key=lambda f: (-f[0], *f[1:])) for some in by_document]
    assert peaks(top) == sorted(best, key=lambda f: (-f[0], *f[1:]))[:6]
    assert latent == 0 or len(top)


@pytest.mark.parametrize("latent", [3, 19])
def test_windows_hold_the_activations_of_one_documents_text(text, latent):
    ids, keep, doc, z = text
    made = fed(text, 5)
    for windows in made.windows(latent):
        listed = made.ids(windows)
        for i, (row, start, n) in enumerate(
            zip(windows.row, windows.start, windows.length, strict=True)
        ):
            part = slice(int(start), int(start + n))
            assert 0 < n <= WIDTH
            assert keep[row, part].all()
            assert (doc[row, part] == windows.doc[i]).all()
            torch.testing.assert_close(
                windows.values[i, :n], z[row, part, latent], rtol=1e-3, atol=0
            )
            assert (windows.values[i, n:] == 0).all()
            assert listed[i] == ids[row, part].tolist()
            # as wide as the text allows
            wider = [
                p
                for p in (int(start) - 1, int(start + n))
                if 0 <= p < POS and keep[row, p] and doc[row, p] == windows.doc[i]
            ]
            assert n == WIDTH or not wider


@pytest.mark.parametrize("seqs", [1, 7, ROWS])
def test_batches_do_not_matter(monkeypatch, text, seqs):
    monkeypatch.setattr(contexts, "CELLS", 500)  # and how much is worked on at once
    for one, other in zip(*(_everything(fed(text, s)) for s in (5, seqs)), strict=True):
        assert torch.equal(one, other)


def _everything(made):
    for latent in range(D_SAE):
        for windows in (*made.windows(latent), made.silent(latent)):
            yield from windows


def test_the_sample_is_random_firings_of_different_documents(text):
    seen = torch.zeros(ROWS * POS)
    for seed in range(20):
        _, sampled = fed(text, 8, seed=seed).windows(10)
        assert len(sampled.doc.unique()) == len(sampled) == 9
        seen[[r * POS + p for _, r, p in peaks(sampled)]] += 1
        assert all(firing in sum(firings(text, 10).values(), []) for firing in peaks(sampled))
    # every document gets its turn, and not only the strongest firings
    drawn = text[2].flatten()[seen > 0].unique()
    assert len(drawn) > 0.9 * len(firings(text, 10))
    assert (
        fed(text, 8, seed=1).windows(10)[1].row.tolist() != fed(text, 8).windows(10)[1].row.tolist()
    )


def test_silent_windows_have_no_firing(text):
    _, keep, _, z = text
    made = fed(text, 5)
    kept = {}
    for latent in range(D_SAE):
        windows = made.silent(latent)
        kept[latent] = len(windows)
        for row, start, n in zip(windows.row, windows.start, windows.length, strict=True):
            part = slice(int(start), int(start + n))
            assert not z[row, part, latent].any()
    assert kept[0] == 15  # the one that never fires is silent in all
    assert 0 < kept[10] < 15
    dense = fed(text, 5, dense=True)
    assert {latent: len(dense.silent(latent)) for latent in kept} == kept


def test_what_does_not_count_is_silent(text):
    """Attention sinks: text that is not measured."""
    mask = torch.rand(ROWS, POS, generator=torch.Generator().manual_seed(3)) > 0.3
    made = fed(text, 5, mask=mask)
    for windows in made.windows(15):
        for i, (row, start, n) in enumerate(
            zip(windows.row, windows.start, windows.length, strict=True)
        ):
            part = slice(int(start), int(start + n))
            want = text[3][row, part, 15] * mask[row, part]
            torch.testing.assert_close(windows.values[i, :n], want, rtol=1e-3, atol=0)
            assert mask[row, start + windows.peak[i]]


def test_rows_and_what_follows(text):
    made = fed(text, 5)
    assert made.row_ids(3, 7).tolist() == text[0][3, :7].tolist()
    _, keep, doc, _ = text
    for at in range(POS - 1):
        on = bool(keep[4, at] == keep[4, at + 1] and doc[4, at] == doc[4, at + 1])
        assert made.goes_on(4, at) == on
    assert not made.goes_on(4, POS - 1)
