"""Spliced losses against plain logits, PyTorch's cross entropy and SciPy's KL."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from kanllama_lightning.functional.losses import next_token_targets
from kanllama_lightning.lm import splice
from kanllama_lightning.lm.splice import put, spliced_losses

HOOKS = ["blocks.1.hook_resid_pre", "model.layers.0.self_attn", "model.layers.1.mlp"]
HOOKS += ["blocks.0.hook_resid_mid", "model.layers.2"]
every_hook = pytest.mark.parametrize("hook", HOOKS)


@cache
def plain(folder):
    """The model as anybody else would load it; not to be changed."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def plain_logits(folder, ids, hook=None, replace=None):
    """A plain forward, in which a torch hook replaces what comes out of the module there."""
    if replace is None:
        return plain(folder)(ids).logits

    def forward_hook(_, __, out):
        return (replace(out[0]), *out[1:]) if isinstance(out, tuple) else replace(out)

    handle = plain(folder).get_submodule(hook).register_forward_hook(forward_hook)
    logits = plain(folder)(ids).logits
    handle.remove()
    return logits


def noisy(acts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return acts + torch.randn(acts.shape, generator=generator)


@every_hook
def test_splicing_the_activations_themselves_changes_nothing(make_lm, tokens, hook):
    lm = make_lm(hook)
    prefix = lm.prefix(tokens.ids)
    same = put(prefix.acts, tokens.keep, prefix.acts[tokens.keep].float())
    losses = spliced_losses(lm, prefix, tokens, {"same": same})
    assert torch.equal(losses.ce["same"], losses.ce["clean"])
    assert losses.kl["same"].abs().max() < 1e-6
    assert set(losses.kl) == {"same"}


def test_logits_are_made_in_blocks_sized_for_the_device():
    """A GPU reads the unembedding of a large vocabulary once for a thousand positions."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert splice.positions_at_once(cpu, 128_256) == (1 << 24) // 128_256
    assert 1024 <= splice.positions_at_once(cuda, 128_256) <= 2048
    assert splice.positions_at_once(cpu, 1 << 30) == splice.positions_at_once(cuda, 1 << 30) == 1


@every_hook
def test_cross_entropy_is_that_of_the_plain_model(make_lm, tiny_lm_dir, tokens, hook):
    lm = make_lm(hook)
    losses = spliced_losses(lm, lm.prefix(tokens.ids), tokens, {})
    targets, counts = next_token_targets(tokens.ids, tokens.keep, tokens.doc)
    assert counts.sum() > 20
    logits = plain_logits(tiny_lm_dir, tokens.ids)
    want = F.cross_entropy(logits[counts], targets[counts], reduction="none")
    torch.testing.assert_close(losses.ce["clean"], want, atol=1e-5, rtol=1e-5)
    assert losses.ce["clean"].dtype == torch.float32
    assert torch.equal(torch.stack(losses.where, 1), counts.nonzero())


def test_what_is_predicted_is_the_next_token_of_the_same_document(make_lm, tiny_lm_dir, tokens):
    """Position by position, in plain Python."""
    log_p = plain_logits(tiny_lm_dir, tokens.ids).log_softmax(-1)
    want = [
        -log_p[row, pos, tokens.ids[row, pos + 1]].item()
        for row in range(len(tokens.ids))
        for pos in range(tokens.ids.shape[1] - 1)
        if tokens.keep[row, pos + 1] and tokens.doc[row, pos + 1] == tokens.doc[row, pos]
    ]
    lm = make_lm()
    losses = spliced_losses(lm, lm.prefix(tokens.ids), tokens, {})
    assert losses.ce["clean"].tolist() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("hook", ["model.layers.0.self_attn", "model.layers.1.mlp"])
def test_zero_ablation_is_a_plain_forward_with_a_hook(make_lm, tiny_lm_dir, tokens, hook):
    """At kept positions only: BOS and padding keep their own activations."""
    lm = make_lm(hook)
    prefix = lm.prefix(tokens.ids)
    zeros = torch.zeros(int(tokens.keep.sum()), lm.d_model)
    runs = {"zero": put(prefix.acts, tokens.keep, zeros)}
    losses = spliced_losses(lm, prefix, tokens, runs)
    targets, counts = next_token_targets(tokens.ids, tokens.keep, tokens.doc)

    def ablate(acts):
        return acts.masked_fill(tokens.keep[..., None], 0)

    clean = plain_logits(tiny_lm_dir, tokens.ids)[counts]
    zero = plain_logits(tiny_lm_dir, tokens.ids, hook, ablate)[counts]
    assert (clean - zero).abs().max() > 0.1
    want = F.cross_entropy(zero, targets[counts], reduction="none")
    torch.testing.assert_close(losses.ce["zero"], want, atol=1e-5, rtol=1e-5)
    p, q = (t.double().softmax(-1).numpy() for t in (clean, zero))
    np.testing.assert_allclose(losses.kl["zero"], entropy(p, q, axis=1), rtol=1e-3, atol=1e-6)


@every_hook
def test_kl_is_scipys(make_lm, tokens, hook):
    lm = make_lm(hook)
    prefix = lm.prefix(tokens.ids)
    runs = {"a": noisy(prefix.acts, 1), "b": noisy(prefix.acts, 2)}
    losses = spliced_losses(lm, prefix, tokens, runs)
    where = losses.where
    p = lm.logits(lm.resume(prefix, prefix.acts))[where].double().softmax(-1).numpy()
    for name, acts in runs.items():
        q = lm.logits(lm.resume(prefix, acts))[where].double().softmax(-1).numpy()
        want = entropy(p, q, axis=1)
        assert want.mean() > 0.01
        np.testing.assert_allclose(losses.kl[name].numpy(), want, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(losses.kl["a"], losses.kl["b"])


@pytest.mark.parametrize("numbers", [1, 64, 5 * 64 + 3, 10_000])
def test_chunks_of_logits_change_nothing(make_lm, tokens, numbers, monkeypatch):
    lm = make_lm()
    prefix = lm.prefix(tokens.ids)
    runs = {"noisy": noisy(prefix.acts)}
    want = spliced_losses(lm, prefix, tokens, runs)
    monkeypatch.setattr(splice, "LOGIT_NUMBERS", numbers)
    at_once = []
    logits = lm.logits
    monkeypatch.setattr(lm, "logits", lambda h: at_once.append(len(h)) or logits(h))
    got = spliced_losses(lm, prefix, tokens, runs)
    assert max(at_once) <= max(1, numbers // 64)
    assert sum(at_once) == 2 * len(got.ce["clean"])
    for a, b in ((got.ce, want.ce), (got.kl, want.kl)):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


@every_hook
def test_reconstruction_plus_its_error_is_the_original(make_lm, tiny_lm_dir, tokens, hook):
    lm = make_lm(hook)
    prefix = lm.prefix(tokens.ids)
    x = prefix.acts[tokens.keep]
    x_hat = noisy(x)
    spliced = put(prefix.acts, tokens.keep, x_hat + (x - x_hat))
    logits = lm.logits(lm.resume(prefix, spliced))
    gap = (logits - plain_logits(tiny_lm_dir, tokens.ids)).abs().max()
    assert gap < 1e-3
    alone = lm.logits(lm.resume(prefix, put(prefix.acts, tokens.keep, x_hat)))
    assert (alone - logits).abs().max() > 0.1


def test_put_replaces_masked_positions_in_order_and_copies(make_lm, tokens):
    acts = make_lm(dtype="bfloat16").acts(tokens.ids)
    before, n = acts.clone(), int(tokens.keep.sum())
    rows = torch.arange(n * 16).view(n, 16).float() / 8
    out = put(acts, tokens.keep, rows)
    assert out.dtype == torch.bfloat16
    assert torch.equal(acts, before)
    assert torch.equal(out[~tokens.keep], acts[~tokens.keep])
    assert torch.equal(out[tokens.keep], rows.bfloat16())
    with pytest.raises((RuntimeError, IndexError)):
        put(acts, tokens.keep, rows[:-1])


def test_a_batch_in_which_nothing_counts(make_lm, tokens):
    lm = make_lm()
    prefix = lm.prefix(tokens.ids)
    nothing = tokens._replace(keep=torch.zeros_like(tokens.keep))
    losses = spliced_losses(lm, prefix, nothing, {"noisy": noisy(prefix.acts)})
    assert {name: len(v) for name, v in losses.ce.items()} == {"clean": 0, "noisy": 0}
    assert len(losses.kl["noisy"]) == 0
    assert losses.kl["noisy"].dtype == torch.float32
