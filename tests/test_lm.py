"""Stopping at the hook point and going on from it, against the plain transformers forward."""

import copy
import shutil
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.large_products import LargeLinear, multiply_faster_
from kanllama_lightning.lm.number_format import fastest, speedup
from kanllama_lightning.types import InputError
from tests.shapes import unchecked

SPELLINGS = [  # one place per line
    ("resid_pre", ["blocks.{}.hook_resid_pre"]),
    ("attn_out", ["model.layers.{}.self_attn", "blocks.{}.hook_attn_out"]),
    ("resid_mid", ["blocks.{}.hook_resid_mid"]),
    ("mlp_out", ["model.layers.{}.mlp", "blocks.{}.hook_mlp_out"]),
    ("resid_post", ["model.layers.{}", "blocks.{}.hook_resid_post"]),
]
PLACES = [
    pytest.param(spelling.format(layer), kind, layer, id=spelling.format(layer))
    for kind, spellings in SPELLINGS
    for spelling in spellings
    for layer in (0, 1, 2)
]
every_place = pytest.mark.parametrize(("name", "kind", "layer"), PLACES)
every_kind = pytest.mark.parametrize("name", [s[-1].format(1) for _, s in SPELLINGS])


@cache
def plain(folder, dtype=torch.float32):
    """The model as anybody else would load it; not to be changed."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def captured(model, ids, kind, layer):
    """Logits of a plain forward, and what a torch hook sees there."""
    block, seen = model.model.layers[layer], []

    def see(value):
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = {
        "resid_pre": lambda: block.register_forward_pre_hook(
            lambda _, args, kwargs: see(args or kwargs["hidden_states"]), with_kwargs=True
        ),
        "attn_out": lambda: block.self_attn.register_forward_hook(lambda *a: see(a[-1])),
        "resid_mid": lambda: block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: see(args)
        ),
        "mlp_out": lambda: block.mlp.register_forward_hook(lambda *a: see(a[-1])),
        "resid_post": lambda: block.register_forward_hook(lambda *a: see(a[-1])),
    }[kind]()
    logits = model(ids).logits
    handle.remove()
    (acts,) = seen
    return logits, acts


# ------------------------------------------------------------------ same numbers


@every_place
def test_is_the_plain_forward_cut_in_two(make_lm, tiny_lm_dir, tokens, name, kind, layer):
    lm = make_lm(name)
    assert (lm.hook.layer, lm.hook.kind) == (layer, kind)
    assert lm.hook.name == f"blocks.{layer}.hook_{kind}"
    logits, acts = captured(plain(tiny_lm_dir), tokens.ids, kind, layer)
    prefix = lm.prefix(tokens.ids)
    torch.testing.assert_close(prefix.acts, acts, atol=1e-6, rtol=1e-6)
    assert torch.equal(lm.acts(tokens.ids), prefix.acts)
    resumed = lm.logits(lm.resume(prefix, prefix.acts))
    torch.testing.assert_close(resumed, logits, atol=1e-5, rtol=1e-5)


@every_kind
def test_bfloat16(make_lm, tiny_lm_dir, tokens, name):
    lm = make_lm(name, dtype="bfloat16")
    model = plain(tiny_lm_dir, torch.bfloat16)
    logits, acts = captured(model, tokens.ids, lm.hook.kind, 1)
    prefix = lm.prefix(tokens.ids)
    assert prefix.acts.dtype == torch.bfloat16
    assert torch.equal(prefix.acts, acts)
    resumed = lm.logits(lm.resume(prefix, prefix.acts))
    assert resumed.dtype == torch.float32
    torch.testing.assert_close(resumed, logits.float(), atol=0.1, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [10, 64, 1 << 14])
def test_logits_are_not_rounded(make_lm, tokens, monkeypatch, dtype, at_once):
    """They are those of fp64, from the hidden states and weights as they are."""
    monkeypatch.setattr("kanllama_lightning.lm.frozen.UNEMBEDDED_AT_ONCE", at_once)
    lm = make_lm(dtype=str(dtype).removeprefix("torch."))
    prefix = lm.prefix(tokens.ids)
    hidden = lm.resume(prefix, prefix.acts)
    assert hidden.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        logits = lm.logits(hidden)
    want = hidden.double() @ lm.model.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), want, atol=1e-5, rtol=1e-5)
    rounded = lm.model.lm_head(hidden).double()
    assert (rounded - want).abs().max() > 10 * (logits - want).abs().max()


@every_kind
def test_autocast_changes_nothing(make_lm, tokens, name):
    lm = make_lm(name)
    want = lm.prefix(tokens.ids)
    hidden = lm.resume(want, want.acts)
    logits = lm.logits(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        got = lm.prefix(tokens.ids)
        assert torch.equal(got.acts, want.acts)
        assert torch.equal(lm.resume(got, got.acts), hidden)
        assert torch.equal(lm.logits(hidden), logits)


@every_kind
def test_other_activations_go_on_as_if_a_hook_had_put_them_there(
    make_lm, tiny_lm_dir, tokens, name
):
    """Zeros, where the residual stream is the activation and where it is added to."""
    lm = make_lm(name)
    prefix = lm.prefix(tokens.ids)
    got = lm.logits(lm.resume(prefix, torch.zeros_like(prefix.acts)))
    model = copy.deepcopy(plain(tiny_lm_dir))
    block = model.model.layers[1]
    if lm.hook.kind == "attn_out":
        block.self_attn.o_proj.weight.data.zero_()
    elif lm.hook.kind == "mlp_out":
        block.mlp.down_proj.weight.data.zero_()
    elif lm.hook.kind == "resid_pre":
        block.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    elif lm.hook.kind == "resid_mid":  # zeros into the MLP give zeros
        block.register_forward_hook(lambda *a: torch.zeros_like(a[-1]))
    else:
        block.register_forward_hook(lambda *a: torch.zeros_like(a[-1]))
    with torch.no_grad():
        want = model(tokens.ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - lm.logits(lm.resume(prefix, prefix.acts))).abs().max() > 0.01


def test_resuming_leaves_the_prefix_as_it_was(make_lm, tokens):
    lm = make_lm()
    prefix = lm.prefix(tokens.ids)
    copies = prefix.acts.clone(), prefix.residual.clone()
    lm.resume(prefix, torch.randn_like(prefix.acts))
    assert torch.equal(prefix.acts, copies[0])
    assert torch.equal(prefix.residual, copies[1])


def test_later_tokens_change_nothing_before_them(make_lm, tokens):
    """So padding at the end is harmless."""
    lm = make_lm("model.layers.2")
    other = tokens.ids.clone()
    other[:, 7:] = 5
    a, b = lm.acts(tokens.ids), lm.acts(other)
    torch.testing.assert_close(a[:, :7], b[:, :7], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)


# --------------------------------------------------------------------- same work


def calls(lm, work):
    """How often each submodule without children runs."""
    counts, handles = Counter(), []
    for name, module in lm.model.named_modules():
        if not list(module.children()) and "rotary" not in name:
            handles.append(
                module.register_forward_hook(lambda *_, name=name: counts.update([name]))
            )
    work()
    for handle in handles:
        handle.remove()
    return counts


@every_place
def test_no_module_runs_twice_and_none_in_vain(make_lm, tokens, name, kind, layer):
    lm = make_lm(name)
    prefix = lm.prefix(tokens.ids)
    with torch.no_grad():
        whole = calls(lm, lambda: lm.model.model(tokens.ids))
    first = calls(lm, lambda: lm.acts(tokens.ids))
    second = calls(lm, lambda: lm.resume(prefix, prefix.acts))
    assert set(whole.values()) == {1}
    assert first + second == whole  # each once, on one side of the hook point
    assert "lm_head" not in first + second
    assert not {n for n in first if n.startswith("model.norm")}
    for i in range(3):
        on = {n for n in first if n.startswith(f"model.layers.{i}.")}
        if i != layer:
            assert bool(on) == (i < layer)
    parts = {n.split(".")[3] for n in first if n.startswith(f"model.layers.{layer}.")}
    attention = {"input_layernorm", "self_attn"}
    everything = attention | {"post_attention_layernorm", "mlp"}
    assert (
        parts
        == {
            "resid_pre": set(),
            "attn_out": attention,
            "resid_mid": attention,
            "mlp_out": everything,
            "resid_post": everything,
        }[kind]
    )


# --------------------------------------------------------------------- contracts


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a[:, :-1],
        lambda a: a[:1],
        lambda a: a[..., :-1],
        lambda a: a[:1, :1],  # would broadcast
        lambda a: a.flatten(0, 1),
        lambda a: a.double(),
        lambda a: a.bfloat16(),
        lambda a: a.to("meta"),
    ],
)
@every_kind
def test_splicing_anything_else_raises(make_lm, tokens, name, spoil):
    lm = make_lm(name)
    prefix = lm.prefix(tokens.ids)
    wrong = spoil(prefix.acts)
    with (
        unchecked(),
        pytest.raises(ValueError, match=r"spliced activations are .*; the hook point gives"),
    ):
        lm.resume(prefix, wrong)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("model.layers.0.mpl", "model.layers.0.mlp"),
        ("model.layers.1.self_attention", "model.layers.1.self_attn"),
        ("blocks.2.hook_resid_pots", "blocks.2.hook_resid_post"),
        ("layers.1.mlp", "model.layers.1.mlp"),
    ],
)
def test_unknown_hook_points_name_the_nearest_and_list_all(tiny_lm_dir, name, near):
    with pytest.raises(InputError) as error:
        FrozenLM(str(tiny_lm_dir), name)
    message = str(error.value)
    hint = message.split("Did you mean ")[1].split("?")[0]
    assert near in hint.split(" or ")
    for _, spellings in SPELLINGS:
        for spelling in spellings:
            assert spelling.format("N") in message


def test_a_hook_point_like_nothing(tiny_lm_dir):
    with pytest.raises(InputError, match="no such place. Allowed, with N from 0 to 2"):
        FrozenLM(str(tiny_lm_dir), "zzz")


@pytest.mark.parametrize("name", ["model.layers.3.mlp", "blocks.3.hook_resid_pre"])
def test_a_layer_too_far(tiny_lm_dir, name):
    with pytest.raises(InputError, match=r"has 3 blocks, 0 to 2"):
        FrozenLM(str(tiny_lm_dir), name)


@pytest.mark.parametrize("name", ["model.layers.-1.mlp", "model.layers.1.mlp.down_proj", "", "1"])
def test_other_unknown_hook_points(tiny_lm_dir, name):
    with pytest.raises(InputError, match="no such place"):
        FrozenLM(str(tiny_lm_dir), name)


# ----------------------------------------------------------------------- loading


@pytest.fixture
def folder(tiny_lm_dir, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_lm_dir, tmp_path / "lm")


def test_building_reads_no_weights(folder):
    (folder / "model.safetensors").unlink()
    lm = FrozenLM(str(folder), "model.layers.0.mlp")
    assert (lm.d_model, lm.vocab_size) == (16, 64)
    assert lm.tokenizer.bos_token_id == 0
    with pytest.raises(RuntimeError, match="load_ was not called"):
        _ = lm.model
    with pytest.raises(InputError, match="no usable model"):
        lm.load_()


def test_loads_once(make_lm):
    lm = make_lm()
    model = lm.model
    assert lm.load_() is lm
    assert lm.model is model


def test_is_frozen_and_no_module(make_lm, tokens):
    lm = make_lm()
    assert not isinstance(lm, nn.Module)
    holder = nn.Module()
    holder.lm = lm
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not any(m.training for m in lm.model.modules())
    prefix = lm.prefix(tokens.ids)
    assert not prefix.acts.requires_grad
    acts = prefix.acts.clone().requires_grad_()
    assert not lm.resume(prefix, acts).requires_grad
    assert lm.device == torch.device("cpu")


def test_the_unembedding(make_lm):
    lm = make_lm()
    hidden = torch.randn(5, 16)
    torch.testing.assert_close(lm.logits(hidden), hidden @ lm.unembed())


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nowhere", "a/b/c", "~/model"])
def test_no_such_folder(name):
    with pytest.raises(InputError, match=r"lm\.name=.*no such folder; .*`embedded`"):
        FrozenLM(name, "model.layers.0.mlp")


@pytest.mark.parametrize(
    "removed", [["config.json"], ["config.json", "tokenizer.json", "tokenizer_config.json"]]
)
def test_a_folder_without_a_model(folder, removed):
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"lm\.name=.*the folder holds no usable model"):
        FrozenLM(str(folder), "model.layers.0.mlp")


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"lm\.name=.*the folder holds no usable model"):
        FrozenLM(str(folder), "model.layers.0.mlp")


def test_a_folder_with_a_broken_configuration(folder):
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match=r"lm\.name=.*the folder holds no usable model"):
        FrozenLM(str(folder), "model.layers.0.mlp")


def test_a_model_of_another_kind(folder):
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    config.save_pretrained(folder)
    with pytest.raises(InputError, match=r"Llama kind: its configuration has no intermediate_size"):
        FrozenLM(str(folder), "model.layers.0.mlp")


def test_a_model_whose_blocks_are_of_another_kind(folder):
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    (folder / "model.safetensors").unlink()
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    lm = FrozenLM(str(folder), "model.layers.0.mlp")
    with pytest.raises(InputError, match=r"its blocks have no input_layernorm.*Llama, Mistral"):
        lm.load_()


def test_a_hub_model_without_a_network():
    with pytest.raises(InputError) as error:
        FrozenLM("someone/some-model", "model.layers.0.mlp", revision="abc")
    message = str(error.value)
    assert "lm.name='someone/some-model' (revision 'abc'): the model cannot be had" in message
    assert "--lm.name FOLDER" in message
    assert "configs/embedded.yaml" in message


@pytest.mark.parametrize("able", [True, False])
def test_slow_number_formats_are_named(make_lm, monkeypatch, caplog, able):
    monkeypatch.setattr("kanllama_lightning.lm.frozen.cpu_has_bf16", lambda: able)
    make_lm(dtype="float32")
    assert not caplog.text
    make_lm(dtype="bfloat16")
    assert ("--lm.dtype float32 is faster" in caplog.text) is not able


@pytest.mark.parametrize(
    ("able", "times", "dtype"),
    [(False, 9.0, "float32"), (True, 1.1, "float32"), (True, 3.0, "bfloat16")],
)
def test_the_fastest_number_format_is_found(make_lm, monkeypatch, able, times, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("kanllama_lightning.lm.number_format.cpu_has_bf16", lambda: able)
    monkeypatch.setattr("kanllama_lightning.lm.number_format.speedup", lambda: times)
    assert fastest().dtype == dtype
    assert make_lm(dtype="auto").dtype == getattr(torch, dtype)


def test_number_formats_are_timed():
    assert 0.001 < speedup() < 100


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_single_places_at_once_equal_one_run_each(make_lm, kind: str) -> None:
    """Several in one row, one at its first and one at its last token, none in another row."""
    lm = make_lm(hook_point=f"blocks.0.hook_{kind}")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, lm.vocab_size, (3, 9), generator=generator)
    prefix = lm.prefix(ids)
    row, pos = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([4, 0, 8, 4, 3])
    acts = torch.randn(5, lm.d_model, generator=generator)
    clean, changed = lm.resume_at(prefix, row, pos, acts)
    whole = lm.resume(prefix, prefix.acts)
    torch.testing.assert_close(clean, whole[row, pos])
    for i, (r, p) in enumerate(zip(row.tolist(), pos.tolist(), strict=True)):
        new = prefix.acts.clone()
        new[r, p] = acts[i]
        torch.testing.assert_close(changed[i], lm.resume(prefix, new)[r, p])
        assert not torch.allclose(changed[i], clean[i])


@pytest.mark.parametrize("shape", [(), (7,), (1, 1), (2, 3), (3, 1, 5), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_large_products_equal_plain_ones(shape, bias):
    torch.manual_seed(0)
    wide = nn.Linear(512, 600, bias=bias)
    small, plain = nn.Linear(512, 64), copy.deepcopy(wide)
    together = nn.ModuleList([wide, small])
    multiply_faster_(together)
    assert type(wide) is LargeLinear
    assert type(small) is nn.Linear
    x = torch.randn(*shape, 512)
    for given in (x, torch.randn(512, *shape).movedim(0, -1)):  # rows apart in memory too
        for asked in (torch.no_grad, torch.inference_mode):
            with asked():
                torch.testing.assert_close(wide(given), plain(given), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    assert torch.equal(wide(x), plain(x))
    assert wide(x).requires_grad
    assert torch.equal(wide.double()(x.double()), plain.double()(x.double()))


def test_an_lm_with_large_weights_is_the_plain_one(tiny_lm_dir, tmp_path, tokens):
    config = AutoConfig.from_pretrained(tiny_lm_dir)
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 520, 64
    config.num_attention_heads, config.num_key_value_heads = 8, 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    shutil.copytree(tiny_lm_dir, tmp_path / "wide")
    model.save_pretrained(tmp_path / "wide")
    lm = FrozenLM(str(tmp_path / "wide"), "model.layers.1", untrained=True).load_()
    assert LargeLinear in [type(part) for part in lm.model.modules()]
    prefix = lm.prefix(tokens.ids)
    ours = lm.logits(lm.resume(prefix, prefix.acts))
    with torch.no_grad():
        exact = model.double()(tokens.ids).logits
    assert (ours - exact).norm() <= 1e-4 * exact.norm()
