"""What the dashboard is made of, each part against a direct computation."""

import numpy as np
import pytest
import torch

from kanllama_lightning.dashboard.ablation import AblatedPlace, ablate
from kanllama_lightning.dashboard.latent_curves import latent_curves
from kanllama_lightning.dashboard.pool import Pool
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads import BatchTopK, CurvedDictionary, KANEncoder, SplineLatent
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.contexts import Contexts
from kanllama_lightning.types import Prefix, SAEOutput, TokenBatch, ValidationBatch
from tests.reports.test_capability import by_hook, started_head


@pytest.mark.parametrize("batch_seqs", [2, 16])
def test_ablation_equals_a_hook_in_plain_transformers(make_lm, tiny_lm_dir, batch_seqs):
    lm = make_lm()
    head = started_head(lm)
    rows = torch.randint(3, lm.vocab_size, (6, 9), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0
    with torch.no_grad():
        latent = int(head.encode(lm.acts(rows)[:, 5]).sum(0).argmax())
    # rows of several lengths, one without a token that follows; another latent among them
    places = [AblatedPlace(latent, row[: 4 + i % 3], int(row[8])) for i, row in enumerate(rows)]
    places[2] = places[2]._replace(follows=None)
    places.insert(3, AblatedPlace((latent + 1) % 32, rows[0], 5))  # in one row with another
    found = ablate(head, lm, places, batch_seqs)
    assert set(found) == {latent, (latent + 1) % 32}

    changes, kls, rises = [], [], []
    for place in places:
        if place.latent != latent:
            continue

        def without(x):
            # the linear dictionary says what the latent writes at the last token
            z = head.encode(x)[-1, latent]
            new = x.clone()
            new[-1] -= z * head.decoder.W_dec[latent] / head.scale
            return new

        with torch.no_grad():
            was = by_hook(tiny_lm_dir, place.ids.tolist())[-1].double().log_softmax(-1)
            now = by_hook(tiny_lm_dir, place.ids.tolist(), without)[-1].double().log_softmax(-1)
        changes.append(now - was)
        kls.append(float((was.exp() * (was - now)).sum()))
        if place.follows is not None:
            rises.append(float(was[place.follows] - now[place.follows]))
    mean = torch.stack(changes).mean(0)
    got = found[latent]
    assert got.n == 6
    assert len(rises) == 5
    assert got.kl == pytest.approx(np.mean(kls), rel=1e-3, abs=1e-9)
    assert got.kl > 0
    assert got.delta_ce == pytest.approx(np.mean(rises), rel=1e-3, abs=1e-7)
    for listed, best in ((got.raised, mean.topk(5)), (got.lowered, mean.topk(5, largest=False))):
        assert [v for _, v in listed] == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-7)
        assert listed[0][0] == lm.tokenizer.decode([int(best.indices[0])])


def contexts_of(ids, keep, doc, z, width=8):
    made = Contexts(z.shape[2], width, top=50, sampled=0, silent=1)
    kept = z[keep]
    rows, latents = kept.nonzero(as_tuple=True)
    codes = SparseCodes(kept[rows, latents], rows, latents, len(kept), z.shape[2])
    batch = TokenBatch(ids, keep, doc, torch.zeros(3, dtype=torch.int64))
    out = SAEOutput(kept, codes)
    made.update(ValidationBatch("main", batch, Prefix(z, None), keep, kept, out))
    return made


def test_the_pool_has_the_text_of_every_window_once():
    tokenizer = FrozenLM("embedded", "model.layers.1.mlp").tokenizer
    text = "Lily had a naïve 😀 cat, and 日本 too. Once upon a time it ran away."
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *own]] * 3)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = False
    doc = torch.arange(3)[:, None].expand_as(ids)
    z = torch.zeros(*ids.shape, 2)
    z[0, 20:40:6, 0] = 1
    z[1, 5, 0] = 2
    z[2, -1, 1] = 3
    contexts = contexts_of(ids, keep, doc, z)
    windows = [contexts.windows(j)[0] for j in (0, 1)]
    rows, starts, lengths = (torch.cat([w[i] for w in windows]).numpy() for i in range(3))
    # windows of a latent are one per document: more of them, overlapping, from a second look
    rows = np.append(rows, [0, 0, 1])
    starts, lengths = np.append(starts, [18, 22, 1]), np.append(lengths, [8, 8, 8])
    pool = Pool(tokenizer, contexts, rows, starts, lengths)
    whole = [pool.texts[i] for i in pool.tokens]
    covered = {(r, p) for r, s, n in zip(rows, starts, lengths, strict=True)
               for p in range(s, s + n)}  # fmt: skip
    assert len(whole) == len(covered)
    assert len(set(pool.texts)) == len(pool.texts)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for row, start, length in zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True):
        at = pool.at(row, start)
        shown = "".join(whole[at : at + length])
        # by offsets; a window that begins inside a character still shows it where it ends
        first = spans[start - 1][0]
        if start > 1 and spans[start - 2][0] == first:
            assert shown.startswith(text[first])
        end = spans[start + length - 2][1]
        if start + length - 1 < len(spans) and spans[start + length - 1][0] < end:
            end -= 1  # the character is not complete yet
        assert shown == text[first:end]
    assert "😀" in "".join(whole)


def started(head, n=4000):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, head.d_model, generator=g) @ torch.randn(16, 16, generator=g)
    with torch.no_grad():
        head.start_(x)
        head.calibrate_(x)
    return head.eval(), x


@pytest.mark.parametrize("kind", [SplineLatent, CurvedDictionary])
def test_latents_have_their_own_curves(kind):
    head, x = started(kind(d_model=16, d_sae=24, target_l0=4))
    curves, bends = latent_curves(head, x)
    fired = head(x).codes.sparse().fired() > 0
    listed = {int(name.split()[1]): (c, i) for c in head.curves(x, 24)
              for i, name in enumerate(c.names)}  # fmt: skip
    assert [c is not None for c in curves] == [j in listed for j in range(24)]
    assert {j for j in range(24) if curves[j]} <= set(fired.nonzero().squeeze(1).tolist())
    for j, (found, i) in listed.items():
        assert bends[j] == pytest.approx(float(found.bend[i]))
        assert curves[j].x == pytest.approx(found.points[i, ::2].tolist(), rel=1e-3, abs=1e-6)
        assert curves[j].y == pytest.approx(found.values[i, ::2].tolist(), rel=1e-3, abs=1e-6)
        assert sum(curves[j].density) == pytest.approx(1, abs=0.01)


def test_latents_that_read_hidden_units_show_the_one_that_matters_most():
    head, x = started(KANEncoder(d_model=16, d_sae=24, target_l0=4, d_hidden=6))
    with torch.no_grad():
        head.encoder.U.copy_(torch.randn(6, 24, generator=torch.Generator().manual_seed(5)))
        head.encoder.U[:, 7] = 0
        head.encoder.U[:, 9] = 0
        head.encoder.U[2, 9] = -0.5
        bent = head.encoder.units.kan.weight
        bent.add_(0.3 * torch.randn(bent.shape, generator=torch.Generator().manual_seed(6)))
    curves, bends = latent_curves(head, x)
    assert (curves[7], bends[7]) == (None, None)
    units = {c.kind: c for c in head.curves(x, 100)}["hidden unit"]
    at = [i for i, name in enumerate(units.names) if name.startswith("hidden 2 ")][0]
    assert curves[9].title.startswith("hidden 2 ")
    assert "100% of what its units add" in curves[9].title
    assert bends[9] == pytest.approx(float(units.bend[at]), rel=1e-4)
    U = head.encoder.U.detach()
    factor = -0.5 / float(U[2].norm())
    want = (units.values[at, ::2] * factor).tolist()
    assert curves[9].y == pytest.approx(want, rel=1e-3, abs=1e-6)
    sizes = {int(n.split()[1]): float(s) for n, s in zip(units.names, units.size, strict=True)}
    for j in (0, 5, 11):
        weight = [abs(float(U[h, j] / U[h].norm())) * sizes[h] for h in range(6)]
        assert curves[j].title.startswith(f"hidden {int(np.argmax(weight))} ")


def test_linear_heads_have_no_curves():
    head, x = started(BatchTopK(d_model=16, d_sae=24, target_l0=4))
    assert latent_curves(head, x) == ([None] * 24, [None] * 24)
