"""The checks before the first step: pass what is right, name what is wrong."""

import logging

import pytest
import torch
from torch import nn

from kanllama_lightning.functional.losses import next_token_targets
from kanllama_lightning.heads import BatchTopK
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import check_room, free_memory, preflight
from kanllama_lightning.types import InputError

HOOKS = ["blocks.1.hook_resid_pre", "model.layers.1.self_attn", "blocks.1.hook_resid_mid"]
HOOKS += ["model.layers.1.mlp", "model.layers.1"]
every_hook = pytest.mark.parametrize("hook", HOOKS)


@pytest.fixture
def declared_trained(tiny_lm_dir):
    """The tiny LM, said to be trained."""
    return FrozenLM(str(tiny_lm_dir), "model.layers.1.mlp").load_()


@pytest.fixture
def likely(declared_trained, tokens):
    """Text the tiny LM finds likely: at each position its own best guess."""
    ids = tokens.ids[:2].clone()
    for pos in range(1, ids.shape[1]):
        logits = declared_trained.model(ids[:, :pos]).logits[:, -1]
        logits[:, :3] = -torch.inf
        ids[:, pos] = logits.argmax(-1)
    keep = torch.ones_like(ids).bool()
    keep[:, 0] = False
    return tokens._replace(ids=ids, keep=keep, doc=torch.zeros_like(ids))


@every_hook
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_untrained_model_that_says_so_passes(make_lm, tokens, hook, dtype, caplog):
    with caplog.at_level(logging.INFO):
        preflight(make_lm(hook, dtype=dtype), tokens)
    assert "pre-flight: loss" in caplog.text
    assert "uniform guess 4.16" in caplog.text


@every_hook
def test_zero_ablation_is_that_of_validation(make_lm, tokens, hook, caplog):
    """BOS, and a sink, keep their activation; by hand, with a plain forward and a hook."""
    lm = make_lm(hook)
    tokens = tokens._replace(ids=tokens.ids[:4], keep=tokens.keep[:4], doc=tokens.doc[:4])
    acts = lm.acts(tokens.ids)
    sizes = acts.norm(dim=-1)
    limit = 0.9 * sizes[tokens.keep].max()
    mask = tokens.keep & (sizes <= limit)
    assert 0 < int(mask.sum()) < int(tokens.keep.sum())
    x = acts[mask]
    want = {}
    for name, value in {"zero": torch.zeros_like(x), "mean": x.mean(0).expand_as(x)}.items():
        prefix = lm.prefix(tokens.ids)
        spliced = prefix.acts.clone()
        spliced[mask] = value
        logits = lm.logits(lm.resume(prefix, spliced))
        targets, counts = next_token_targets(tokens.ids, tokens.keep, tokens.doc)
        want[name] = float(nn.functional.cross_entropy(logits[counts], targets[counts]))
    with caplog.at_level(logging.INFO):
        preflight(lm, tokens, norm_limit=limit)
    assert f"mean-ablated {want['mean']:.3f}, zero-ablated {want['zero']:.3f}" in caplog.text


def test_leaves_no_hooks_behind(make_lm, tokens):
    lm = make_lm()
    preflight(lm, tokens)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_passes_under_autocast(make_lm, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        preflight(make_lm(), tokens)


def test_a_model_that_does_not_know_its_text(declared_trained, tokens):
    with pytest.raises(InputError, match=r"close to a uniform guess \(4\.16\).*--lm\.untrained"):
        preflight(declared_trained, tokens)


def test_a_model_that_knows_its_text_passes(declared_trained, likely):
    preflight(declared_trained, likely)


def test_a_hook_point_that_does_not_matter(declared_trained, likely):
    declared_trained.model.model.layers[1].mlp.down_proj.weight.data.neg_()  # worse than nothing
    with pytest.raises(InputError, match=r"zeros does not raise the loss.*--lm\.untrained"):
        preflight(declared_trained, likely)
    declared_trained.untrained = True
    preflight(declared_trained, likely)


def test_an_id_beyond_the_vocabulary(make_lm, tokens):
    tokens.ids[2, 5] = 64
    with pytest.raises(InputError, match=r"token id 64 is beyond the vocabulary.*\(64\)"):
        preflight(make_lm(), tokens)
    tokens.ids[2, 5] = 63
    preflight(make_lm(), tokens)


def test_text_without_two_neighbouring_tokens(make_lm, tokens):
    alone = torch.zeros_like(tokens.keep)
    alone[:, 0] = True
    with pytest.raises(InputError, match="no two neighbouring real tokens"):
        preflight(make_lm(), tokens._replace(keep=alone))


def shifted(module):
    """A forward that adds a little."""
    forward = module.forward
    return lambda *args, **kwargs: forward(*args, **kwargs) + 0.5


@every_hook
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_block_that_computes_something_else(make_lm, tokens, hook, layer, monkeypatch):
    """Before the hook point it is seen in the activations, from there on in the output."""
    lm = make_lm(hook)
    block = lm.model.model.layers[layer]
    monkeypatch.setattr(block, "forward", shifted(block))
    at_hook = layer == 1 and hook == "model.layers.1"
    what = "activations" if layer < 1 or at_hook else "output"
    with pytest.raises(InputError, match=rf"{what} differ from the model's own forward pass"):
        preflight(lm, tokens)


@every_hook
def test_a_hook_point_met_twice(make_lm, tokens, hook):
    lm = make_lm(hook)
    lm.model.model.layers[2] = lm.model.model.layers[1]
    with pytest.raises(InputError, match="met 2 times in one forward pass"):
        preflight(lm, tokens)


def test_a_hook_point_never_met(make_lm, tokens, monkeypatch):
    lm = make_lm("model.layers.1.mlp")
    block = lm.model.model.layers[1]
    monkeypatch.setattr(block, "forward", lambda h, **_: h)
    with pytest.raises(InputError, match="met 0 times"):
        preflight(lm, tokens)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda h: h[:, :-1]])
def test_activations_of_another_shape_or_type(make_lm, tokens, change, monkeypatch):
    lm = make_lm("model.layers.2")
    block = lm.model.model.layers[2]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *a, **k: change(forward(*a, **k)))
    with pytest.raises(InputError, match="when stopped there; not a Llama-like block"):
        preflight(lm, tokens)


# --------------------------------------------------------------------- check_room


def test_a_small_run_fits(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        check_room(BatchTopK(d_model=8, d_sae=16, target_l0=2), 1 << 20, 1 << 20, tmp_path)
    assert "iB of memory" in caplog.text


def test_refuses_what_the_disk_cannot_hold(tmp_path):
    with pytest.raises(InputError, match=r"run folder .*needs .* GiB.*--runs_dir"):
        check_room(BatchTopK(d_model=8, d_sae=16, target_l0=2), 1 << 60, 0, tmp_path)


def test_refuses_what_memory_cannot_hold(tmp_path):
    with pytest.raises(InputError, match=r"memory: .*capacity_tokens.*d_sae.*bfloat16"):
        check_room(BatchTopK(d_model=8, d_sae=16, target_l0=2), 0, 1 << 60, tmp_path)


def test_what_comes_and_goes_counts(tmp_path):
    """A step, or the start statistics: as large as what stays."""
    head = BatchTopK(d_model=8, d_sae=16, target_l0=2)
    free = free_memory()
    check_room(head, 0, 0, tmp_path, free // 2)
    with pytest.raises(InputError, match=r"memory: .*needs about"):
        check_room(head, 0, 0, tmp_path, 4 * free)


def test_a_head_too_large(tmp_path):
    """Weights on this device have a size and take no memory."""
    with pytest.raises(InputError, match="needs"):
        check_room(nn.Linear(1 << 24, 1 << 24, device="meta"), 0, 0, tmp_path)
