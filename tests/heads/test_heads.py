"""What every trained head must do, and what the selecting ones must do on top of it."""

import copy
import json
import logging
import math
import os
import shutil
import stat
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kanllama_lightning.functional.losses import geometric_median
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.heads import (
    PCA,
    BatchTopK,
    BentDictionary,
    CurvedDictionary,
    FrozenDecoder,
    FrozenEncoder,
    GainLatent,
    Gated,
    JumpReLU,
    KANDirect,
    KANEncoder,
    KANReLUDense,
    Matryoshka,
    MLPEncoder,
    OnlyKAN,
    SAEHead,
    SoftlyFrozenDecoder,
    SplineHidden,
    SplineInput,
    SplineLatent,
    Standard,
    TopK,
    WideBatchTopK,
    decoders,
    selections,
)
from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import HiddenEncoder
from kanllama_lightning.heads.head import WEIGHTS
from kanllama_lightning.heads.sae import flat_name
from kanllama_lightning.reports.saved_head import read_subject
from kanllama_lightning.types import InputError, StepContext
from tests.conftest import rest_slow
from tests.shapes import unchecked

D, M, K = 8, 24, 3
HEADS = [
    Standard,
    Gated,
    JumpReLU,
    TopK,
    BatchTopK,
    Matryoshka,
    FrozenDecoder,
    FrozenEncoder,
    SoftlyFrozenDecoder,
    WideBatchTopK,
    KANEncoder,
    KANDirect,
    MLPEncoder,
    SplineHidden,
    SplineInput,
    SplineLatent,
    GainLatent,
    BentDictionary,
    CurvedDictionary,
    OnlyKAN,
    KANReLUDense,
]
PARTS = {kind: kind(d_model=D, d_sae=M, target_l0=K) for kind in HEADS}
SELECTING = [kind for kind in HEADS if isinstance(PARTS[kind].selection, selections.Selecting)]
THRESHOLDED = [kind for kind in HEADS if isinstance(PARTS[kind].selection, selections.Thresholded)]
FREE_NORMS = [Standard, JumpReLU]
"""Heads whose dictionary rows have any norm."""
DIRECTIONS = [kind for kind in HEADS if isinstance(PARTS[kind].decoder, UnitDirections)]
"""Heads with a linear dictionary."""
TWINS = [KANEncoder, MLPEncoder, SplineHidden, SplineInput, GainLatent, BentDictionary]
"""Heads that are BatchTopK at step 0, bit for bit."""
NEAR_TWINS = [KANDirect, SplineLatent, CurvedDictionary, OnlyKAN]
"""Heads that are BatchTopK at step 0, to rounding."""
FIRST = {Matryoshka: 1 / 5}
"""Share of the reconstruction that the first loss is, where it is not all of it."""
NOTHING_DEAD = StepContext(torch.zeros(0, dtype=torch.int64), 0.0, 0.1)

OF_EACH_KIND = [
    Gated,
    JumpReLU,
    TopK,
    Matryoshka,
    SoftlyFrozenDecoder,
    KANEncoder,
    SplineLatent,
    GainLatent,
    BentDictionary,
    OnlyKAN,
]
"""Every encoder, selection and decoder is in one of these; the others are for `make test-slow`."""
every_head = pytest.mark.parametrize("kind", rest_slow(HEADS, OF_EACH_KIND))
every_selecting_head = pytest.mark.parametrize("kind", rest_slow(SELECTING, OF_EACH_KIND))
every_trained_encoder = pytest.mark.parametrize(
    "kind", rest_slow([h for h in SELECTING if h is not FrozenEncoder], OF_EACH_KIND)
)
every_thresholded_head = pytest.mark.parametrize("kind", rest_slow(THRESHOLDED, OF_EACH_KIND))
every_dictionary = pytest.mark.parametrize("kind", rest_slow(DIRECTIONS, OF_EACH_KIND))


def rows(n=64, seed=0, d=D):
    """Raw activations, off the origin, of unlike spread per coordinate."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.5, 2, d) * 3 + 1


def started(kind, **args):
    head = kind(**({"d_model": D, "d_sae": M, "target_l0": K} | args))
    head.start_(rows(500, seed=99))
    return head


def train_(head, x, steps, context=NOTHING_DEAD, lr=1e-2):
    """Steps in the order of the module; leaves the last gradients in place."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        out = head(x)
        torch.stack(list(head.losses(x, out, context).values())).sum().backward()
        head.project_grad_()
        optimizer.step()
        head.project_()
        head.observe_(out, context)


def trained(kind, **args):
    """A head whose every parameter and statistic is off its start; in training mode."""
    head = started(kind, **args)
    train_(head, rows(), 4)
    return head


def same_outputs(a, b):
    return torch.equal(a.x_hat, b.x_hat) and all(
        torch.equal(torch.as_tensor(p), torch.as_tensor(q))
        for p, q in zip(a.codes.sparse(), b.codes.sparse(), strict=True)
    )


# ---------------------------------------------------------------------- every head


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_types(kind, dtype, training):
    head = trained(kind).train(training)
    x = rows(10).to(dtype)
    out = head(x)
    m = head.d_sae
    assert (out.x_hat.shape, out.x_hat.dtype) == ((10, D), torch.float32)
    codes = out.codes.sparse()
    assert codes.values.dtype == torch.float32
    assert (codes.values > 0).all()
    assert codes.rows.dtype == codes.latents.dtype == torch.int64
    flat = codes.rows * m + codes.latents
    assert (flat.diff() > 0).all()  # rows ascend, no latent twice
    assert flat.min() >= 0
    assert flat.max() < 10 * m
    assert (codes.n_rows, codes.d_sae) == (10, m)
    assert torch.equal(codes.dense(), out.codes.dense())
    assert torch.equal(codes.l0(), out.codes.l0())
    assert torch.equal(codes.fired(), out.codes.fired())
    assert (head.encode(x).shape, head.encode(x).dtype) == ((10, m), torch.float32)
    assert head.decode(head.encode(x)).shape == (10, D)
    assert all(loss.shape == () for loss in head.losses(x, out, NOTHING_DEAD).values())


@every_head
def test_autocast_changes_numbers_a_little_and_no_types(kind):
    head = trained(kind)
    x = rows(32)
    plain = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(x)
        losses = head.losses(x, out, StepContext(torch.arange(4), 0.0, 0.1))
    assert out.x_hat.dtype == out.codes.dense().dtype == torch.float32
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    error = (out.x_hat - plain.x_hat).norm() / plain.x_hat.norm()
    assert 0 < error < 0.1


@every_head
def test_forward_is_decode_of_encode(kind):
    head = trained(kind).eval()
    x = rows(10)
    out = head(x)
    assert torch.equal(out.codes.dense(), head.encode(x))
    torch.testing.assert_close(out.x_hat, head.decode(head.encode(x)))


@every_head
@pytest.mark.parametrize("training", [True, False])
def test_encode_is_inference_and_leaves_the_mode_alone(kind, training):
    head = trained(kind).train(training)
    latents = head.encode(rows(10))
    assert [m.training for m in head.modules()] == [training] * len(list(head.modules()))
    head.eval()
    assert torch.equal(latents, head(rows(10)).codes.dense())


@every_head
def test_encode_leaves_the_mode_alone_when_it_fails(kind):
    head = trained(kind).train()
    with unchecked(), pytest.raises(RuntimeError):
        head.encode(torch.zeros(2, D + 1))
    assert head.training


@every_head
def test_every_parameter_has_a_finite_gradient_by_the_third_step(kind):
    head = started(kind)
    train_(head, rows(), 3, NOTHING_DEAD._replace(progress=0.5))
    for name, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_selecting_head
def test_every_latent_can_be_reached_at_the_start(kind):
    """Each one is positive on some of the rows, so that a step or AuxK can move it."""
    head = started(kind)
    assert (head.pre_acts(rows(2000)) > 0).any(0).all()


def test_at_the_first_step_the_kan_layer_has_no_gradient_as_u_is_zero():
    head = started(KANEncoder)
    train_(head, rows(), 1)
    idle = {name for name, p in head.named_parameters() if not p.grad.any()}
    assert idle == {"encoder.units.kan.weight", "encoder.units.kan_bias"}


@every_head
def test_the_first_loss_is_the_share_of_variance_unexplained(kind):
    head = trained(kind)
    x = rows(16)
    out = head(x)
    error = (x - out.x_hat).double() * head.scale.double()
    losses = head.losses(x, out, NOTHING_DEAD)
    variance = (rows(500, seed=99).double() * head.scale).var(0).sum().item()
    want = FIRST.get(kind, 1) * error.square().sum(1).mean().item() / variance
    assert next(iter(losses)) == "reconstruction"
    assert losses["reconstruction"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", rest_slow(HEADS, [TopK, KANEncoder, JumpReLU, OnlyKAN]))
def test_training_lowers_the_loss(kind):
    head, x = started(kind), rows(256)
    before = head.losses(x, head(x), NOTHING_DEAD)["reconstruction"].item()
    train_(head, x, 150)
    least = 1.2 if kind is FrozenEncoder else 1.8
    assert head.losses(x, head(x), NOTHING_DEAD)["reconstruction"].item() < before / least


@every_head
def test_a_head_saved_before_it_had_parts_still_loads(kind, tmp_path):
    head = trained(kind).eval()
    head.calibrate_(rows(100))
    head.save(tmp_path)
    edit_card(tmp_path, format=2)
    state = {flat_name(name): value for name, value in head.state_dict().items()}
    if kind is CurvedDictionary:  # it had a standardisation that nothing read
        state |= {"input_mean": torch.zeros(D), "input_std": torch.ones(D)}
    assert not any("coder" in name for name in state)
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, tmp_path / WEIGHTS)
    loaded = SAEHead.load(tmp_path)
    assert same_outputs(loaded(rows(20)), head(rows(20)))
    save_file({**state, "more": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="more is nothing"):
        SAEHead.load(tmp_path)


@every_head
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    head = trained(kind, seed=5, alpha_aux=0.5).eval()
    head.norm_limit.fill_(12.5)
    head.calibrate_(rows(100))
    head.save(tmp_path / "made" / "head", {"model": "tiny"})
    shutil.move(tmp_path / "made", tmp_path / "moved")  # nothing but the folder is needed
    loaded = SAEHead.load(str(tmp_path / "moved" / "head"))
    assert type(loaded) is kind
    assert not loaded.training
    assert loaded.init_args() == head.init_args()
    state, saved = loaded.state_dict(), head.state_dict()
    assert state.keys() == saved.keys()
    for name, value in saved.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name].nan_to_num(-1), value.nan_to_num(-1)), name
    assert same_outputs(loaded(rows(20)), head(rows(20)))


@every_head
def test_the_card_can_be_read(kind, tmp_path):
    head = kind(d_model=D, d_sae=M, target_l0=K)
    head.save(tmp_path, {"model": "tiny", "tokens": 7})
    card = json.loads((tmp_path / "head.json").read_text())
    assert card["format"] == 3
    assert card["head"] == kind.__name__
    assert card["provenance"] == {"model": "tiny", "tokens": 7}
    assert (
        card["init_args"].items() >= {"d_model": D, "d_sae": M, "target_l0": K, "seed": 0}.items()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head.json", "head.safetensors"]


@every_head
def test_saving_twice_replaces_both_files(kind, tmp_path):
    kind(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    kind(d_model=D, d_sae=M, target_l0=K + 1, seed=1).save(tmp_path)
    loaded = SAEHead.load(tmp_path)
    assert loaded.target_l0 == K + 1
    for name, value in kind(d_model=D, d_sae=M, target_l0=K, seed=1).named_parameters():
        assert torch.equal(loaded.state_dict()[name], value), name


@every_head
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"target_l0": 10 * M}, rf"head\.target_l0={10 * M}: must be from 1 to d_sae="),
        ({"target_l0": 0}, r"head\.target_l0=0"),
        ({"d_sae": 0}, r"head\.d_sae=0"),
        ({"alpha_aux": -1.0}, r"head\.alpha_aux=-1"),
    ],
)
def test_refused_arguments(kind, args, message):
    with pytest.raises(InputError, match=message):
        kind(**({"d_model": D, "d_sae": M, "target_l0": K} | args))


@pytest.mark.parametrize("kind", [h for h in DIRECTIONS if h not in FREE_NORMS])
def test_dictionary_rows_stay_on_the_unit_sphere(kind):
    """Gradients are orthogonal to them, and norms are 1 after each step (METHODS A0)."""
    head = started(kind)
    if kind is FrozenDecoder:
        return  # nothing moves it
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2 / FIRST.get(kind, 1))
    for _ in range(3):
        optimizer.zero_grad()
        head.losses(rows(), head(rows()), NOTHING_DEAD)["reconstruction"].backward()
        raw = head.decoder.W_dec.grad.clone()
        assert (raw * head.decoder.W_dec).sum(1).abs().max() > 0.001
        head.project_grad_()
        along = (head.decoder.W_dec.grad * head.decoder.W_dec).sum(1)
        assert along.abs().max() < 1e-5 * raw.norm(dim=1).max()
        across = raw - (raw * head.decoder.W_dec).sum(1, keepdim=True) * head.decoder.W_dec
        torch.testing.assert_close(head.decoder.W_dec.grad, across.detach())
        optimizer.step()
        head.project_()
        norms = head.decoder.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(head.d_sae), atol=1e-6, rtol=0)


def test_projection_of_gradients_does_not_depend_on_its_blocks(monkeypatch):
    found = []
    for block in (1, 3 * D, M * D, 1 << 22):
        monkeypatch.setattr(decoders, "BLOCK", block)
        head = started(TopK)
        head.decoder.W_dec.grad = torch.randn(M, D, generator=torch.Generator().manual_seed(1))
        head.project_grad_()
        found.append(head.decoder.W_dec.grad)
    assert all(torch.equal(found[0], other) for other in found)
    assert (found[0] * started(TopK).decoder.W_dec).sum(1).abs().max() < 1e-5


@every_head
def test_projection_of_gradients_without_any(kind):
    kind(d_model=D, d_sae=M, target_l0=K).project_grad_()


@every_head
def test_units_of_the_lm_change_nothing(kind):
    """Powers of two are exact: the same codes, and the reconstruction in the new units."""
    a, b = kind(d_model=D, d_sae=M, target_l0=K), kind(d_model=D, d_sae=M, target_l0=K)
    a.start_(rows(500))
    b.start_(rows(500) * 64)
    assert torch.equal(b.scale, a.scale / 64)
    small, large = a(rows(20)), b(rows(20) * 64)
    assert torch.equal(small.codes.dense(), large.codes.dense())
    assert torch.equal(small.x_hat * 64, large.x_hat)
    losses = a.losses(rows(20), small, NOTHING_DEAD), b.losses(rows(20) * 64, large, NOTHING_DEAD)
    assert losses[0] == losses[1]


@every_dictionary
def test_folding_the_scale_away_changes_nothing(kind):
    """The same reconstruction, and latents in raw units (METHODS 0.1)."""
    head = trained(kind).eval()
    if head.encoder.standardised is not None:
        with pytest.raises(InputError, match="no form without its scale"):
            head.folded()
        return
    folded = head.folded()
    assert folded.scale == 1
    assert head.scale != 1
    x = rows(40)
    error = (folded(x).x_hat - head(x).x_hat).norm() / head(x).x_hat.norm()
    assert error < 1e-4
    torch.testing.assert_close(
        folded(x).codes.dense() * head.scale, head(x).codes.dense(), rtol=1e-4, atol=1e-4
    )


@every_head
def test_start_statistics(kind):
    x = rows(500)
    head = kind(d_model=D, d_sae=M, target_l0=K)
    head.start_(x)
    n = x.double().numpy()
    norm = np.linalg.norm(n, axis=1).mean()
    assert head.scale.item() == pytest.approx(D**0.5 / norm, rel=1e-6)
    np.testing.assert_allclose(head.x_mean.numpy(), n.mean(0), rtol=1e-5)
    middle = geometric_median(x * head.scale)
    torch.testing.assert_close(head.b_dec.detach(), torch.zeros(D) if kind is Standard else middle)
    if hasattr(head, "standardised"):
        z = head.encoder.standardised(x * head.scale).double()
        torch.testing.assert_close(z.mean(0), torch.zeros(D).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.std(0), torch.ones(D).double(), atol=1e-5, rtol=0)


@every_head
def test_the_seed_decides_the_weights_and_the_global_generator_does_not(kind):
    state = torch.get_rng_state()
    a = kind(d_model=D, d_sae=M, target_l0=K, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    b, c = (
        kind(d_model=D, d_sae=M, target_l0=K, seed=3),
        kind(d_model=D, d_sae=M, target_l0=K, seed=4),
    )
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert a.n_parameters() == sum(p.numel() for p in a.parameters())


@every_dictionary
def test_start_of_the_weights(kind):
    head = kind(d_model=D, d_sae=M, target_l0=K)
    if hasattr(head.encoder, "W_enc"):
        assert torch.equal(head.encoder.W_enc, head.decoder.W_dec.T)
    norm = 0.1 if kind in FREE_NORMS else 1.0
    torch.testing.assert_close(head.decoder.W_dec.norm(dim=1), torch.full((head.d_sae,), norm))
    assert not head.encoder.b_enc.any()
    assert (head.decoder.W_dec < 0).float().mean() > 0.3  # signed: no all-positive directions


@every_dictionary
def test_every_head_of_one_seed_has_the_same_dictionary(kind):
    a = kind(d_model=D, d_sae=M, target_l0=K, seed=7)
    b = BatchTopK(d_model=D, d_sae=a.d_sae, target_l0=K, seed=7)
    torch.testing.assert_close(
        a.decoder.W_dec / a.decoder.W_dec.norm(dim=1, keepdim=True), b.decoder.W_dec
    )


# -------------------------------------------------------------------- gradients


def dense_pre_acts(head, x_n):
    """Pre-activations as METHODS A3 and B5 write them: b_dec is taken off inside the product."""
    if isinstance(head, KANDirect):
        return (
            head.encoder.kan(
                (x_n - head.encoder.standardised.input_mean) / head.encoder.standardised.input_std
            )
            + head.encoder.b_enc
        )
    inputs = x_n
    if isinstance(head, SplineInput):
        inputs = x_n + head.encoder.standardised.input_std * spline_activation(
            (x_n - head.encoder.standardised.input_mean) / head.encoder.standardised.input_std,
            head.encoder.spline,
            -3,
            3,
            5,
            linear_tails=True,
        )
    pre = (inputs - head.b_dec) @ head.encoder.W_enc + head.encoder.b_enc
    if isinstance(head.encoder, HiddenEncoder):
        pre = (
            pre
            + head.encoder.units(
                (x_n - head.encoder.standardised.input_mean) / head.encoder.standardised.input_std
            )
            @ head.encoder.U
        )
    return pre


def naive_loss(head, x, flat, dead):
    """The loss as METHODS A3 and A6 write it: dense."""
    x_n = x * head.scale
    pre = dense_pre_acts(head, x_n)
    m = head.d_sae
    kept = torch.zeros(len(x) * m).index_fill(0, flat, 1.0).view(len(x), m)
    z = torch.relu(pre) * kept
    x_hat = z @ head.decoder.W_dec + head.b_dec
    loss = (x_n - x_hat).square().sum(1).mean()
    if isinstance(head, Matryoshka):
        ends = [1, 2, 5, 11, 24]  # 1/32, 3/32, 7/32, 15/32 of 24, rounded
        parts = [z[:, :end] @ head.decoder.W_dec[:end] + head.b_dec for end in ends]
        loss = sum((x_n - part).square().sum(1).mean() for part in parts) / 5
    loss = loss / head.x_variance
    if len(dead):
        target = (x_n - x_hat).detach()
        acts = torch.relu(pre[:, dead])
        best = acts.argsort(dim=1, descending=True).argsort(dim=1) < min(D // 2, len(dead))
        e_hat = (acts * best) @ head.decoder.W_dec[dead]
        variance = (target - target.mean(0)).square().sum(1).mean()
        loss = loss + head.alpha_aux * (target - e_hat).square().sum(1).mean() / variance
    return loss


BENDING = (SplineLatent, GainLatent)
SIMPLE = [h for h in SELECTING if h in DIRECTIONS and h not in (*BENDING, FrozenEncoder)]
"""z is the kept part of ReLU(p), x_hat = z W_dec + b_dec."""


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("n_dead", [0, 2, 11, M])
def test_all_gradients_are_those_of_the_formula(kind, n_dead):
    """Above all b_dec's, which goes round the encoder's product with the batch.

    The formula's AuxK has a detached target and no b_dec (METHODS A3).
    """
    head = trained(kind, alpha_aux=2.0)
    x = rows(40, seed=3)
    dead = torch.randperm(M, generator=torch.Generator().manual_seed(1))[:n_dead]
    head.zero_grad()
    out = head(x)
    losses = head.losses(x, out, StepContext(dead, 0.5, 0.1))
    assert ("auxk" in losses) == bool(n_dead)
    loss = sum(losses.values())
    got = torch.autograd.grad(loss, list(head.parameters()))
    want_loss = naive_loss(head, x, out.codes.rows * head.d_sae + out.codes.latents, dead)
    want = torch.autograd.grad(want_loss, list(head.parameters()))
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    for (name, _), a, b in zip(head.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@every_selecting_head
def test_nothing_of_tokens_by_latents_is_kept_for_backward(kind):
    tok, saved = 200, []
    head = kind(d_model=D, d_sae=2000, target_l0=K)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        out = head(rows(tok))
        loss = sum(head.losses(rows(tok), out, NOTHING_DEAD).values())
    loss.backward()
    assert max(saved) < tok * head.d_sae / 2


# ------------------------------------------------------------------------- AuxK


def silence_(head, n):
    """Make the first n latents too small to be selected, still positive on some rows."""
    with torch.no_grad():
        for name in ("W_enc", "U"):
            if hasattr(head.encoder, name):
                getattr(head.encoder, name)[:, :n] *= 1e-3
        if isinstance(head, KANDirect | OnlyKAN):
            head.encoder.kan.weight[:n] *= 1e-3
            head.encoder.b_enc[:n] *= 1e-3
        else:
            head.encoder.b_enc[:n] = 0


def reached(head, term):
    """Latents whose biases (and directions, where there are any) a loss term moves."""
    head.zero_grad()
    term.backward(retain_graph=True)
    moved = head.encoder.b_enc.grad != 0
    if isinstance(getattr(head.decoder, "W_dec", None), torch.nn.Parameter):
        assert torch.equal(head.decoder.W_dec.grad.any(1), moved)
    if isinstance(getattr(head.encoder, "W_enc", None), torch.nn.Parameter):
        assert torch.equal(head.encoder.W_enc.grad.any(0), moved)
    return moved.nonzero().flatten().tolist()


@every_trained_encoder
def test_auxk_reaches_dead_latents_and_no_others(kind):
    head, x, dead = trained(kind), rows(256), torch.arange(6)
    silence_(head, 6)
    out = head(x)
    assert not out.codes.fired()[:6].any()
    term = head.losses(x, out, StepContext(dead, 0.0, 0.1))["auxk"]
    assert reached(head, term) == dead.tolist()


@every_trained_encoder
def test_auxk_can_reach_every_latent(kind):
    head, x = trained(kind), rows(256)
    out = head(x)
    for latent in (head.pre_acts(x) > 0).any(0).nonzero().flatten().tolist():
        context = StepContext(torch.tensor([latent]), 0.0, 0.1)
        assert reached(head, head.losses(x, out, context)["auxk"]) == [latent]


@pytest.mark.parametrize(
    "kind",
    rest_slow(
        [h for h in SELECTING if h is not FrozenEncoder], [BatchTopK, KANEncoder, CurvedDictionary]
    ),
)
@pytest.mark.parametrize("alpha_aux", [0.0, 1.0])
def test_auxk_revives(kind, alpha_aux):
    head, x = started(kind, alpha_aux=alpha_aux), rows(256)
    silence_(head, 6)
    train_(head, x, 150, StepContext(torch.arange(6), 0.0, 0.1))
    revived = int((head(x).codes.fired()[:6] > 0).sum())
    assert revived > 0 if alpha_aux else revived == 0


@every_selecting_head
def test_auxk_can_be_left_out(kind):
    head, x = started(kind, alpha_aux=0.0), rows()
    assert "auxk" not in head.losses(x, head(x), StepContext(torch.arange(6), 0.0, 0.1))


# ------------------------------------------------------------------------ by hand


def by_hand(kind, k):
    """Two dimensions, three latents; pre-activations of `X` are listed beside it."""
    head = kind(d_model=2, d_sae=3, target_l0=k)
    with torch.no_grad():
        head.encoder.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]))
        head.decoder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        head.encoder.b_enc.copy_(torch.tensor([0.0, 0.0, 0.5]))
        head.b_dec.copy_(torch.tensor([1.0, 1.0]))
    return head


X = torch.tensor([[4.0, 3.0], [3.0, 1.0], [0.0, 0.0]])
# less b_dec: 3 2 | 2 0 | -1 -1; pre-activations: 3 2 1.5 | 2 0 2.5 | -1 -1 0.5


@pytest.mark.parametrize("training", [True, False])
def test_topk_by_hand(training):
    head = by_hand(TopK, 2).train(training)
    out = head(X)
    want = torch.tensor([[3.0, 2.0, 0.0], [2.0, 0.0, 2.5], [0.0, 0.0, 0.5]])
    assert torch.equal(out.codes.dense(), want)
    assert out.codes.l0().tolist() == [2, 2, 1]
    assert out.codes.fired().tolist() == [2, 1, 2]
    torch.testing.assert_close(out.x_hat, torch.tensor([[4.0, 3.0], [4.5, 3.0], [1.3, 1.4]]))
    # squared errors: 0, 1.5^2 + 2^2, 1.3^2 + 1.4^2
    assert head.losses(X, out, NOTHING_DEAD)["reconstruction"].item() == pytest.approx(9.9 / 3)


@pytest.mark.parametrize("kind", [BatchTopK, Matryoshka, FrozenDecoder, *TWINS])
def test_thresholded_by_hand(kind):
    """k = 1 keeps three of the batch: 3, 2.5 and, of two 2s, the first; U = 0 adds nothing."""
    head = by_hand(kind, 1)
    out = head(X)
    want = torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.0, 2.5], [0.0, 0.0, 0.0]])
    assert torch.equal(out.codes.dense(), want)
    torch.testing.assert_close(out.x_hat, torch.tensor([[4.0, 3.0], [2.5, 3.0], [1.0, 1.0]]))

    head.observe_(out, NOTHING_DEAD._replace(rate=0.25))
    assert head.selection.inference_threshold().item() == 2
    assert torch.equal(head.encode(X), torch.tensor([[3.0, 0, 0], [0, 0, 2.5], [0, 0, 0]]))

    head.selection.threshold.fill_(1.75)  # a calibrated one goes before the moving average
    want = torch.tensor([[3.0, 2.0, 0.0], [2.0, 0.0, 2.5], [0.0, 0.0, 0.0]])
    assert torch.equal(head.encode(X), want)

    head.calibrate_(X)
    assert 1.9999 < head.selection.inference_threshold().item() < 2


def test_scale_by_hand():
    """The same numbers, with activations half as large."""
    head = by_hand(TopK, 2)
    head.scale.fill_(2.0)
    out, plain = head(X / 2), by_hand(TopK, 2)(X)
    assert torch.equal(out.codes.dense(), plain.codes.dense())
    assert torch.equal(out.x_hat, plain.x_hat / 2)


def test_kan_encoder_by_hand():
    """One hidden unit, whose KAN layer is the SiLU of the first coordinate, feeds latent 2."""
    args = {"grid_size": 1, "spline_order": 1}
    head = KANEncoder(d_model=2, d_sae=3, target_l0=1, d_hidden=1, kan_args=args)
    head.load_state_dict(by_hand(BatchTopK, 1).state_dict(), strict=False)
    with torch.no_grad():
        head.encoder.units.kan.weight.zero_()
        head.encoder.units.kan.weight[0, 0, 0] = 1.0
        head.encoder.units.kan_bias.fill_(1.0)
        head.encoder.U.copy_(torch.tensor([[0.0, 0.0, 10.0]]))
        head.encoder.standardised.input_mean.copy_(torch.tensor([1.0, 0.0]))
        head.encoder.standardised.input_std.copy_(torch.tensor([2.0, 1.0]))
    silu = [z / (1 + np.exp(-z)) for z in (1.5, 1.0, -0.5)]  # (x - 1) / 2
    want = np.array([[3, 2, 1.5], [2, 0, 2.5], [-1, -1, 0.5]])
    want[:, 2] += 10 * (np.array(silu) + 1)
    np.testing.assert_allclose(head.pre_acts(X).detach(), want, rtol=1e-6)
    some = head.pre_acts(X, torch.tensor([2, 0])).detach()
    np.testing.assert_allclose(some, want[:, [2, 0]], rtol=1e-6)


# ----------------------------------------------------------------- TopK, BatchTopK


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, M), st.booleans())
def test_topk_keeps_the_k_largest_of_each_token(seed, k, training):
    head = started(TopK, target_l0=k).train(training)
    x = rows(20, seed)
    codes = head(x).codes
    pre = head.pre_acts(x).detach()
    assert (codes.l0() <= k).all()
    assert torch.equal(codes.l0(), (pre > 0).sum(1).clamp_max(k))
    kth = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    want = torch.where((pre >= kth) & (pre > 0), pre, 0.0)
    assert torch.equal(codes.dense(), want)


def test_topk_is_exactly_k_where_enough_are_positive():
    head = started(TopK)
    with torch.no_grad():
        head.encoder.b_enc.fill_(100.0)
    assert head(rows()).codes.l0().tolist() == [K] * 64


@every_thresholded_head
def test_training_keeps_k_times_tokens(kind):
    head = trained(kind)
    for n in (1, 7, 64):
        codes = head(rows(n)).codes
        assert len(codes.values) == K * n
        pre = head.pre_acts(rows(n)).detach().flatten()
        kept = pre[codes.rows * head.d_sae + codes.latents]
        assert kept.min() == pre.sort(descending=True).values[K * n - 1]
    assert len(set(head(rows()).codes.l0().tolist())) > 1  # not k of each token


@every_thresholded_head
def test_inference_does_not_depend_on_the_neighbours(kind):
    head = trained(kind).eval()
    x = rows(30)
    alone = torch.cat([head.encode(row[None]) for row in x])
    torch.testing.assert_close(alone, head.encode(x), atol=1e-5, rtol=1e-5)


@every_thresholded_head
def test_calibration_is_the_exact_quantile(kind):
    head, x = trained(kind), rows(1000)
    head.calibrate_(x)
    acts = np.sort(head.pre_acts(x).detach().numpy().ravel())[::-1]
    smallest_kept = acts[K * 1000 - 1]
    assert head.selection.threshold.item() == np.nextafter(smallest_kept, np.float32(0))
    largest_dropped = np.quantile(acts, 1 - K / head.d_sae, method="inverted_cdf")
    assert largest_dropped <= head.selection.threshold.item() < smallest_kept
    assert head.eval()(x).codes.l0().sum() == K * 1000


@every_thresholded_head
def test_inference_l0_is_near_k_after_training_and_calibration(kind):
    """On the rows it was calibrated on, and on others of the same distribution (METHODS A4)."""
    head = trained(kind)
    train_(head, rows(512), 30)
    head.calibrate_(rows(4000, seed=1))
    head.eval()
    assert abs(head(rows(4000, seed=1)).codes.l0().double().mean() / K - 1) < 1e-3
    assert abs(head(rows(4000, seed=2)).codes.l0().double().mean() / K - 1) < 0.05


@every_thresholded_head
def test_calibration_does_not_depend_on_its_chunks(kind, monkeypatch):
    head, x = trained(kind), rows(300)
    found = []
    for chunk in (1, 7, 64, 299, 300, 10_000):
        monkeypatch.setattr(selections, "CALIBRATION_ROWS", chunk)
        head.calibrate_(x)
        found.append(head.selection.threshold.item())
    assert found == pytest.approx([found[0]] * 6, rel=1e-6)


@every_thresholded_head
def test_calibration_with_too_few_positive_activations_keeps_all_of_them(kind):
    head = started(kind, target_l0=20)
    x = rows(50)
    with torch.no_grad():
        head.encoder.b_enc -= head.pre_acts(x).quantile(0.95)
    positive = int((head.pre_acts(x) > 0).sum())
    assert 0 < positive < 20 * 50
    head.calibrate_(x)
    assert head.selection.threshold == 0
    assert head.eval()(x).codes.l0().sum() == positive


@every_thresholded_head
def test_the_moving_average_is_bias_corrected(kind):
    head = kind(d_model=D, d_sae=M, target_l0=K)
    codes = head(rows(4)).codes
    seen = [5.0, 1.0, 3.0, 4.0]
    for smallest in seen:
        values = torch.tensor([smallest + 1, smallest, smallest + 2])
        latents = torch.arange(3)
        out = head(rows(4))._replace(
            codes=codes._replace(values=values, rows=latents, latents=latents)
        )
        if kind in BENDING:
            head.selection.smallest.fill_(smallest)
        head.observe_(out, NOTHING_DEAD._replace(progress=0.5))
        if smallest == seen[0]:
            assert head.selection.inference_threshold().item() == pytest.approx(5.0)
    weights = 0.9 ** np.arange(3, -1, -1)
    assert head.selection.inference_threshold().item() == pytest.approx(
        np.average(seen, weights=weights)
    )


@every_thresholded_head
def test_a_batch_without_codes_leaves_the_moving_average_alone(kind):
    head = kind(d_model=D, d_sae=M, target_l0=K)
    none = torch.zeros(0, dtype=torch.int64)
    out = head(rows(2))._replace(codes=SparseCodes(torch.zeros(0), none, none, 2, M))
    head.observe_(out, NOTHING_DEAD)
    assert head.selection.inference_threshold() is None


@every_thresholded_head
def test_a_head_without_a_threshold_warns(kind, caplog):
    head = started(kind).eval()
    with caplog.at_level(logging.WARNING):
        codes = head(rows(10)).codes
    assert "no threshold yet" in caplog.text
    assert len(codes.values) == K * 10
    caplog.clear()
    head.selection.threshold.fill_(1.0)
    with caplog.at_level(logging.WARNING):
        head(rows(10))
    assert not caplog.records


# --------------------------------------------------------------------- KANEncoder


@pytest.mark.parametrize("kind", TWINS)
def test_step_0_is_batch_topk_bit_for_bit(kind):
    """Extra weights count for nothing at the start (METHODS B5 0)."""
    kan, linear = started(kind, seed=7), started(BatchTopK, seed=7)
    for x in (rows(50), rows(1), rows(50) * 100):  # beyond the grid as well
        assert same_outputs(kan(x), linear(x))
    for head in (kan, linear):
        head.calibrate_(rows(200))
        head.eval()
    assert torch.equal(kan.selection.threshold, linear.selection.threshold)
    assert same_outputs(kan(rows(50)), linear(rows(50)))


@pytest.mark.parametrize("kind", NEAR_TWINS)
def test_step_0_is_batch_topk_to_rounding(kind):
    """Their curves are lines at the start, beyond the grid as well (METHODS B5, B3b)."""
    kan, linear = started(kind, seed=7), started(BatchTopK, seed=7)
    for head in (kan, linear):
        head.calibrate_(rows(200))
        head.eval()
    for x in (rows(50), rows(50) * 100):
        torch.testing.assert_close(kan.pre_acts(x), linear.pre_acts(x), rtol=1e-5, atol=1e-4)
        kan.selection.threshold.copy_(linear.selection.threshold)
        got, want = kan(x), linear(x)
        error = (got.x_hat - want.x_hat).norm() / want.x_hat.norm()
        assert error < 1e-5
        torch.testing.assert_close(got.codes.dense(), want.codes.dense(), rtol=1e-4, atol=1e-4)


def test_the_kan_layer_of_another_seed_is_another():
    a, b = (
        KANEncoder(d_model=D, d_sae=M, target_l0=K, seed=0),
        KANEncoder(d_model=D, d_sae=M, target_l0=K, seed=1),
    )
    assert not torch.equal(a.encoder.units.kan.weight, b.encoder.units.kan.weight)


def test_kan_layer_by_class_and_arguments(tmp_path):
    head = KANEncoder(
        d_model=D,
        d_sae=M,
        target_l0=K,
        d_hidden=5,
        kan_class="torch.nn.Linear",
        kan_args={"bias": False},
    )
    assert head.encoder.units.kan.weight.shape == (5, D)
    assert head.diagnostics(rows()) == {}
    head.save(tmp_path)
    assert head.modules_named() == ["torch.nn"]
    with pytest.raises(InputError, match=r"allow it: `--allow torch\.nn` .*allow=\['torch\.nn'\]"):
        SAEHead.load(tmp_path)
    loaded = SAEHead.load(tmp_path, allow=["torch.nn"])
    assert isinstance(loaded.encoder.units.kan, torch.nn.Linear)
    assert torch.equal(loaded.encoder.units.kan.weight, head.encoder.units.kan.weight)


def test_share_out_of_the_grid():
    head = started(KANEncoder)
    x = rows(200)
    z = head.encoder.standardised(x * head.scale)
    assert head.diagnostics(x)["out_of_grid"] == (z.abs() > 3).double().mean().float()
    far = head.x_mean + 100 * head.encoder.standardised.input_std / head.scale
    assert head.diagnostics(far.expand(4, -1))["out_of_grid"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"d_hidden": 0}, r"head\.d_hidden=0"),
        ({"kan_class": "no_such_package.KAN"}, r"class_path 'no_such_package\.KAN'.*imported"),
        ({"kan_class": "torch.nn.NoSuchLayer"}, r"'torch\.nn\.NoSuchLayer'.*imported"),
        ({"kan_class": "KAN"}, r"class_path 'KAN'"),
        ({"kan_class": "torch.relu"}, r"'torch\.relu': is no Module"),
        ({"kan_args": {"colour": 3}}, r"head\.kan_args\.colour: KANLinear has no such argument"),
        ({"kan_args": {"grid_size": "5"}}, r"head\.kan_args\.grid_size='5' must be a whole number"),
        ({"kan_args": {"grid_range": [1]}}, r"grid_range=\[1\]: must be two numbers"),
        ({"kan_args": {"grid_size": 0}}, r"grid_size=0"),
    ],
)
def test_refused_kan_layers(args, message):
    with pytest.raises(InputError, match=message):
        KANEncoder(d_model=D, d_sae=M, target_l0=K, **args)


# ------------------------------------------------------------------- saved heads


def edit_card(folder, **changes):
    card = json.loads((folder / "head.json").read_text()) | changes
    (folder / "head.json").write_text(json.dumps(card))


DENSE_CARD = {"d_model": D, "d_sae": M, "target_l0": K}
CARD = {"d_model": D, "d_sae": M, "target_l0": K}


def test_a_folder_without_a_head(tmp_path):
    with pytest.raises(InputError, match=r"head folder .*nowhere.*head\.json"):
        SAEHead.load(tmp_path / "nowhere")
    TopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no head\.json with head\.safetensors"):
        SAEHead.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 4}, "format=4; this version reads 1 to 3"),
        ({"head": "kanllama_lightning.heads.nothing.Nothing"}, "no such class in kanllama"),
        ({"head": "torch.nn.Linear"}, r"'torch\.nn\.Linear'.*if you trust the module torch\.nn"),
        ({"head": "json.dumps"}, r"if you trust the module json"),
        ({"head": "Nothing"}, "'Nothing': there is no such class in kanllama_lightning"),
        ({"head": "KANLinear"}, "'KANLinear': is no SAEHead"),
        ({"head": "SAEHead"}, "'SAEHead': there is no such class"),
        ({"head": "DenseKAN", "init_args": DENSE_CARD}, "'DenseKAN': there is no such class"),
        ({"head": "SAE"}, "'SAE': there is no such class"),
        ({"head": ""}, "'': there is no such class"),
        ({"head": ".."}, r"'\.\.': there is no such class"),
        ({"head": 3}, "head=3 must be a text"),
        ({"head": "KANEncoder"}, r"has the shape|is missing"),
        ({"format": True}, "format=True must be a whole number"),
        ({"init_args": [1]}, r"init_args=\[1\] must be an object"),
        ({"init_args": {}}, r"init_args\.d_model: is missing; TopK needs it"),
        ({"init_args": CARD | {"k": 3}}, r"init_args\.k: TopK has no such argument"),
        ({"init_args": CARD | {"d_sae": "32"}}, r"init_args\.d_sae='32' must be a whole number"),
        ({"init_args": CARD | {"d_sae": True}}, r"init_args\.d_sae=True must be a whole number"),
        (
            {"init_args": CARD | {"d_sae": 10**12}},
            rf"has the shape \[{M}.*instead of \[1000000000000",
        ),
        ({"init_args": CARD | {"d_sae": 10**18, "d_model": 10**18}}, "head.json: "),
        ({"init_args": CARD | {"d_sae": 0}}, r"head\.json: head\.d_sae=0: a dictionary needs"),
        ({"init_args": CARD | {"seed": 2**70}}, r"init_args\.seed=1180591620717411303424 must be"),
        ({"init_args": CARD | {"alpha_aux": None}}, r"init_args\.alpha_aux=None must be a finite"),
        ({"provenance": {"lm": 3}}, r"provenance\.lm=3 must be a text"),
        ({"provenance": "x"}, r"provenance='x' must be an object"),
    ],
)
def test_a_card_that_cannot_be_used(tmp_path, changes, message):
    TopK(**CARD).save(tmp_path)
    edit_card(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        SAEHead.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@every_head
def test_heads_saved_before_still_load(kind, tmp_path):
    head = kind(d_model=D, d_sae=M, target_l0=K, seed=3)
    head.save(tmp_path)
    card = json.loads((tmp_path / "head.json").read_text())
    del card["head"]
    card |= {"format": 1, "class_path": f"{kind.__module__}.{kind.__name__}"}
    if "kan_class" in card["init_args"]:
        assert card["init_args"]["kan_class"] == "KANLinear"
        card["init_args"]["kan_class"] = "kanllama_lightning.heads.kan_linear.KANLinear"
    (tmp_path / "head.json").write_text(json.dumps(card))
    loaded = SAEHead.load(tmp_path)
    assert type(loaded) is kind
    assert loaded.init_args() == head.init_args()
    edit_card(tmp_path, class_path=f"kanllama_lightning.heads.where_it_was.{kind.__name__}")
    assert type(SAEHead.load(tmp_path)) is kind


@pytest.mark.parametrize("where", ["head", "class_path", "kan_class"])
def test_loading_imports_nothing_that_a_file_names(tmp_path, monkeypatch, where):
    """A module beside the head says so when it is imported."""
    evil, mark = tmp_path / "evil_beside.py", tmp_path / "was_imported"
    evil.write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from kanllama_lightning.heads import KANEncoder\n"
        "from kanllama_lightning.heads.kan_linear import KANLinear\n"
        "class Head(KANEncoder): ...\n"
        "class Layer(KANLinear): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "head"
    KANEncoder(d_model=D, d_sae=M, target_l0=K).save(folder)
    if where == "kan_class":
        args = json.loads((folder / "head.json").read_text())["init_args"]
        edit_card(folder, init_args=args | {"kan_class": "evil_beside.Layer"})
    else:
        card = json.loads((folder / "head.json").read_text())
        del card["head"]
        (folder / "head.json").write_text(json.dumps(card | {where: "evil_beside.Head"}))
    with pytest.raises(InputError, match="if you trust the module evil_beside, allow it"):
        SAEHead.load(folder)
    with pytest.raises(InputError, match="if you trust the module evil_beside, allow it"):
        SAEHead.load(folder, allow=["evil", "evil_beside.Head", "head"])
    assert not mark.exists()
    assert isinstance(SAEHead.load(folder, allow=["evil_beside"]), KANEncoder)
    assert mark.exists()
    sys.modules.pop("evil_beside")


def test_an_allowed_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_beside.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    TopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    for name in ("broken_beside.Head", "not_there.Head"):
        edit_card(tmp_path, head=name)
        with pytest.raises(InputError, match=r"head\.json: class_path .*cannot be imported"):
            SAEHead.load(tmp_path, allow=["broken_beside", "not_there"])


def test_a_head_of_ones_own_is_saved_by_its_path(tmp_path):
    OwnHead(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    assert json.loads((tmp_path / "head.json").read_text())["head"] == f"{__name__}.OwnHead"
    with pytest.raises(InputError, match="if you trust the module"):
        SAEHead.load(tmp_path)
    assert isinstance(SAEHead.load(tmp_path, allow=[__name__]), OwnHead)


class OwnHead(TopK):
    """A head that is not shipped."""


def edit_weights(folder, **changes):
    """Replace tensors; None takes one away."""
    state = load_file(folder / "head.safetensors") | changes
    state = {name: value.contiguous() for name, value in state.items() if value is not None}
    save_file(state, folder / "head.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder.W_dec": torch.full((M, D), math.nan)},
            rf"W_dec holds {M * D} values that are no finite",
        ),
        (
            {"encoder.b_enc": torch.full((M,), -math.inf)},
            f"b_enc holds {M} values that are no finite",
        ),
        (
            {"encoder.b_enc": torch.full((M,), 1e300, dtype=torch.float64)},
            "b_enc holds .* no finite",
        ),
        (
            {"encoder.W_enc": torch.ones(D, M, dtype=torch.int8)},
            "W_enc holds I8, not numbers of F32",
        ),
        ({"encoder.W_enc": torch.ones(D, M, dtype=torch.bool)}, "W_enc holds BOOL"),
        ({"encoder.W_enc": torch.ones(D, M, dtype=torch.complex64)}, "W_enc holds C64"),
        ({"encoder.W_enc": torch.ones(D, M).to(torch.float8_e4m3fn)}, "W_enc holds F8_E4M3"),
        ({"scale": torch.tensor(0.0)}, "scale=0 must be larger than 0"),
        ({"scale": torch.tensor(-1.0)}, "scale=-1 must be larger than 0"),
        ({"scale": torch.tensor(math.nan)}, "scale holds 1 values that are no finite"),
        ({"scale": torch.tensor(math.inf)}, "scale holds 1 values that are no finite"),
        ({"scale": torch.ones(1)}, r"scale has the shape \[1\] instead of \[\]"),
        ({"norm_limit": torch.tensor(math.nan)}, "norm_limit holds 1 values that are no finite"),
        ({"norm_limit": torch.tensor(-math.inf)}, "norm_limit=-inf must be larger than 0"),
        ({"norm_limit": torch.tensor(0.0)}, "norm_limit=0 must be larger than 0"),
        (
            {"selection.threshold": torch.tensor(math.inf)},
            "threshold holds 1 values that are no finite",
        ),
        (
            {"selection.threshold": torch.tensor(-math.inf)},
            "threshold holds 1 values that are no finite",
        ),
        ({"selection.threshold": torch.tensor(-0.5)}, "threshold holds -0.5; 0 is the least; copy"),
        (
            {"selection.threshold_ema": torch.tensor(-0.5)},
            "threshold_ema holds -0.5; 0 is the least",
        ),
        (
            {"selection.threshold_ema": torch.tensor(math.nan)},
            "threshold_ema holds 1 values that are no fin",
        ),
        (
            {"selection.threshold_ema_weight": torch.tensor(-1.0)},
            "threshold_ema_weight holds -1; 0 is the",
        ),
        (
            {"selection.threshold_ema_weight": torch.tensor(math.inf)},
            "threshold_ema_weight holds 1 values",
        ),
        ({"x_mean": torch.zeros(D + 1)}, rf"x_mean has the shape \[{D + 1}\] instead of \[{D}\]"),
        ({"b_dec": None}, "b_dec is missing"),
        ({"more": torch.ones(1)}, "more is nothing that a BatchTopK has"),
    ],
)
def test_weights_that_are_no_head_are_refused(tmp_path, changes, message):
    BatchTopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    edit_weights(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        SAEHead.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "head.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("head", "name", "value"),
    [
        (JumpReLU(d_model=D, d_sae=M, target_l0=K), "selection.theta", -1e-3),
        (KANEncoder(d_model=D, d_sae=M, target_l0=K), "selection.threshold", -1.0),
        (KANEncoder(d_model=D, d_sae=M, target_l0=K), "encoder.standardised.input_std", 0.0),
        (KANEncoder(d_model=D, d_sae=M, target_l0=K), "encoder.standardised.input_std", -1.0),
    ],
)
def test_other_numbers_below_their_least_are_refused(tmp_path, head, name, value):
    head.save(tmp_path)
    spoilt = head.state_dict()[name].clone()
    spoilt.view(-1)[0] = value
    edit_weights(tmp_path, **{name: spoilt})
    with pytest.raises(InputError, match=rf"{name} holds {value:.3g}; .* is the least"):
        SAEHead.load(tmp_path)


@pytest.mark.parametrize("seen", [False, True])
def test_a_head_that_was_never_calibrated_is_read_and_reports_say_so(tmp_path, caplog, seen):
    head = BatchTopK(d_model=D, d_sae=M, target_l0=K)
    if seen:
        head.selection.threshold_ema.fill_(0.5)
        head.selection.threshold_ema_weight.fill_(0.5)
    head.save(tmp_path)
    loaded = read_subject(tmp_path).head
    (said,) = [r.message for r in caplog.records]
    assert "never calibrated" in said
    assert ("moving average of training" in said) is seen
    caplog.clear()
    for _ in range(3):
        loaded(rows(10))
    assert len(caplog.records) == (not seen), "once, however many batches"


def test_a_threshold_of_zero_keeps_all_that_is_positive(tmp_path, caplog):
    """What calibration finds where there are too few positive activations."""
    head = started(BatchTopK).eval()
    head.encoder.b_enc.data.fill_(-1e3)
    head.encoder.b_enc.data[:2] = 1e3
    head.calibrate_(rows(100))
    assert head.selection.threshold == 0
    head.save(tmp_path)
    assert read_subject(tmp_path).head(rows(10)).codes.latents.unique().tolist() == [0, 1]
    assert not caplog.records


def test_weights_in_another_number_format_are_read(tmp_path):
    head = trained(BatchTopK).eval()
    head.calibrate_(rows(100))
    head.save(tmp_path)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        state = {k: v.to(kind) for k, v in head.state_dict().items()}
        edit_weights(tmp_path, **state)
        loaded = SAEHead.load(tmp_path)
        assert loaded.encoder.W_enc.dtype == torch.float32
        assert torch.equal(loaded.encoder.W_enc, state["encoder.W_enc"].float())


def test_a_pipe_in_the_place_of_weights_is_refused_and_not_waited_for(tmp_path):
    TopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="head.safetensors: is no ordinary file"):
        SAEHead.load(tmp_path)


@pytest.mark.parametrize("left", [0, 7, 8, 40, 400, -1])
def test_weights_cut_short_are_refused(tmp_path, left):
    TopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    path = tmp_path / "head.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"head\.safetensors: is damaged or cannot be read"):
        SAEHead.load(tmp_path)


def test_a_pickle_in_place_of_weights_is_refused(tmp_path):
    TopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path)
    torch.save({"W_dec": torch.ones(2)}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match=r"head\.safetensors: is damaged or cannot be read"):
        SAEHead.load(tmp_path)


def test_saved_files_have_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        TopK(d_model=D, d_sae=M, target_l0=K).save(tmp_path / "head")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "head").iterdir()}
    assert modes == {"head.json": 0o644, "head.safetensors": 0o644}


# --------------------------------------------------------------------- it learns


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TopK, KANEncoder])
def test_recovers_a_planted_dictionary(kind):
    """48 atoms in 32 dimensions, three of them per token, strengths from 0.5 to 1.5."""
    d, atoms, active = 32, 48, 3
    generator = torch.Generator().manual_seed(1234)  # not the head's: its start is random too
    planted = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)

    def sample(n):
        which = torch.rand(n, atoms, generator=generator).topk(active, dim=1).indices
        strength = 0.5 + torch.rand(n, active, generator=generator)
        return torch.zeros(n, atoms).scatter(1, which, strength) @ planted

    head = kind(d_model=d, d_sae=64, target_l0=active)
    head.start_(sample(8192))
    before = (planted @ head.decoder.W_dec.detach().T).max(1).values.mean()
    steps = 1500
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, 5 * (1 - s / steps)))
    silent = torch.zeros(64)
    for _ in range(steps):
        optimizer.zero_grad()
        x = sample(256)
        out = head(x)
        dead = (silent > 20_000).nonzero().flatten()
        sum(head.losses(x, out, StepContext(dead, 0.0, 0.1)).values()).backward()
        head.project_grad_()
        optimizer.step()
        head.project_()
        rate.step()
        silent = (silent + 256).masked_fill(out.codes.fired() > 0, 0)
    found = (planted @ head.decoder.W_dec.detach().T).max(1).values.mean()
    assert before < 0.6, before
    assert found > 0.9, found


def test_heads_can_be_copied():
    """The untrained head is kept by a deep copy."""
    head = trained(KANEncoder).eval()
    assert same_outputs(copy.deepcopy(head)(rows(5)), head(rows(5)))


def test_pca_is_no_trained_head():
    head = PCA(D, 2)
    out = head(rows())
    with pytest.raises(InputError, match="not trained"):
        head.losses(rows(), out, NOTHING_DEAD)


@pytest.mark.parametrize("kind", [TopK, BatchTopK, KANEncoder])
def test_start_gives_the_encoder_its_best_size(kind):
    """No other multiple of W_enc reconstructs the start sample better at step 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 3
    head = kind(d_model=8, d_sae=64, target_l0=6)
    head.start_(x)
    best = (head(x).x_hat - x).square().sum()
    for factor in (0.9, 1.1):
        with torch.no_grad():
            head.encoder.W_enc.mul_(factor)
            assert (head(x).x_hat - x).square().sum() > best
            head.encoder.W_enc.div_(factor)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_from_before_the_loss_had_one_unit_is_read(kind, tmp_path):
    head = trained(kind).eval()
    head.save(tmp_path)
    state = load_file(tmp_path / "head.safetensors")
    want = head(rows())
    del state["x_variance"]
    save_file(state, tmp_path / "head.safetensors")
    old = SAEHead.load(tmp_path)
    assert same_outputs(old(rows()), want)
    assert torch.equal(old.encode(rows()), head.encode(rows()))
    assert old.losses(rows(), old(rows()), NOTHING_DEAD)["reconstruction"].isnan()
    save_file(state | {"x_variance": torch.tensor(-1.0)}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="x_variance=-1 must be larger than 0"):
        SAEHead.load(tmp_path)
    save_file(state | {"x_variance": torch.tensor(math.nan)}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="x_variance"):
        SAEHead.load(tmp_path)
