"""The ways in which a penalised head computes: all give what plain autograd gives."""

import pytest
import torch

from kanllama_lightning.functional import row_blocks
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.gated import Gated
from kanllama_lightning.heads.jump_relu import JumpReLU
from kanllama_lightning.heads.penalties import SHARPNESS
from kanllama_lightning.heads.standard import Standard
from kanllama_lightning.types import LazyCodes, StepContext

D, M, N, K = 8, 48, 100, 2
CONTEXT = StepContext(torch.zeros(0, dtype=torch.int64), 0.5, 0.1)
ALWAYS, NEVER = 1.0, -1.0

HEADS = [Standard, Gated, JumpReLU]
every_head = pytest.mark.parametrize("kind", HEADS)


def started(kind):
    """A head off its start, that fires on few latents of its 100 rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g) * torch.linspace(0.5, 2, D) * 3 + 1
    head = kind(d_model=D, d_sae=M, target_l0=K)
    head.start_(x)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
        head.project_()
        head.selection.controller.coefficient.fill_(0.7)
        above = head.pre_acts(x) - (head.selection.theta if kind is JumpReLU else 0.0)
        head.encoder.b_enc -= above.reshape(-1).topk(K * N).values.min()
        if kind is Gated:  # open gates without a magnitude, too
            head.selection.b_mag -= 0.3
    return head, x


def plainly(head, x):
    """x_hat, codes and losses as their formulas stand, of whole matrices."""
    pre, target = head.pre_acts(x), x * head.scale
    norms = head.decoder.W_dec.norm(dim=1)
    vectors = head.selection.vectors(head.decoder, head.encoder.b_enc)
    z = head.selection.latents(pre, vectors, head.x_variance)
    x_hat = z @ head.decoder.W_dec + head.b_dec
    unit = head.x_variance.sqrt()
    losses = {"reconstruction": (target - x_hat).square().sum(1).mean() / unit**2}
    weight = head.selection.controller.coefficient.clone()
    if isinstance(head, Gated):
        opened = pre.relu()
        magnitude = (pre - head.encoder.b_enc) * head.selection.r_mag.exp() + head.selection.b_mag
        z = magnitude.relu() * (pre > 0)
        by_gate = opened @ head.decoder.W_dec.detach() + head.b_dec.detach()
        losses["l1"] = weight * opened.sum(1).mean() / unit
        losses["gate_aux"] = (target - by_gate).square().sum(1).mean() / unit**2
        return x_hat / head.scale, z, losses
    reported = z * norms
    if isinstance(head, JumpReLU):
        losses["tanh"] = weight * (SHARPNESS * reported / unit).tanh().sum(1).mean()
    else:
        losses["l1"] = weight * reported.sum(1).mean() / unit
    return x_hat / head.scale, reported, losses


def gradients(head, losses):
    head.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}


def take(path, head, x, monkeypatch):
    """What a head returns on one of its paths, in blocks of 7 rows."""
    monkeypatch.setattr(row_blocks, "BLOCK", 1)
    monkeypatch.setattr(row_blocks, "LEAST_ROWS", 7)
    share = {"few": ALWAYS, "blocks": NEVER}.get(path)
    if share is None:  # more in the window than that, fewer above the threshold
        first, last = (
            (head.pre_acts(x) > level).float().mean()
            for level in head.selection.levels(head.x_variance)
        )
        assert first > 1.3 * last
        share = float(first + last) / 2
        # whole rows, as a sample of 7 may be off
        monkeypatch.setattr(row_blocks, "SAMPLE_ROWS", 1)
    monkeypatch.setattr(row_blocks, "SPARSE", share)
    return head(x)


PATHS = [(kind, path) for kind in HEADS for path in ("few", "blocks")] + [(JumpReLU, "fired")]
every_path = pytest.mark.parametrize(("kind", "path"), PATHS)


@every_path
def test_every_path_gives_what_plain_autograd_gives(kind, path, monkeypatch):
    head, x = started(kind)
    x_hat, z, losses = plainly(head, x)
    want = gradients(head, losses)
    out = take(path, head, x, monkeypatch)
    assert isinstance(out.codes, SparseCodes if path == "few" else LazyCodes)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.codes.dense(), z, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.codes.l0(), (z != 0).sum(1))
    assert torch.equal(out.codes.fired(), (z != 0).sum(0))
    assert torch.equal(out.codes.sparse().dense(), out.codes.dense())
    if path == "few":
        assert (out.codes.values > 0).all()
    got = head.losses(x, out, CONTEXT)
    assert list(got) == list(losses)
    for name, value in losses.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=0, msg=name)
    found = gradients(head, got)
    assert list(found) == list(want)
    for name, gradient in want.items():
        assert gradient.any(), name
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=1e-5, atol=2e-6)


@every_path
@pytest.mark.parametrize("term", [0, 1])
def test_every_term_alone_gives_its_gradient(kind, path, term, monkeypatch):
    head, x = started(kind)
    losses = plainly(head, x)[2]
    name = list(losses)[term]
    want = gradients(head, {name: losses[name]})
    got = head.losses(x, take(path, head, x, monkeypatch), CONTEXT)[name]
    found = gradients(head, {name: got})
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        other = found.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=float(2e-6 * largest))


@pytest.mark.parametrize(("kind", "path"), [p for p in PATHS if p != (JumpReLU, "few")])
def test_codes_pass_a_gradient_on(kind, path, monkeypatch):
    """But for those of JumpReLU that do not fire, which sparse codes do not hold."""
    head, x = started(kind)
    weights = torch.randn(N, M, generator=torch.Generator().manual_seed(1))
    want = gradients(head, {"": (plainly(head, x)[1] * weights).sum()})
    out = take(path, head, x, monkeypatch)
    found = gradients(head, {"": (out.codes.dense() * weights).sum()})
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@every_path
def test_activations_that_want_a_gradient_get_it(kind, path, monkeypatch):
    head, x = started(kind)
    x.requires_grad_()
    (want,) = torch.autograd.grad(plainly(head, x)[0].square().sum(), x)
    out = take(path, head, x, monkeypatch)
    (found,) = torch.autograd.grad(out.x_hat.square().sum(), x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)


@every_path
def test_only_products_are_in_bf16_under_autocast(kind, path, monkeypatch):
    head, x = started(kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = take(path, head, x, monkeypatch)
        losses = head.losses(x, out, CONTEXT)
        want_hat, z, want_losses = plainly(head, x)
    assert out.x_hat.dtype == out.codes.dense().dtype == torch.float32
    torch.testing.assert_close(out.codes.dense(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.x_hat, want_hat.float(), rtol=0.02, atol=0.1)
    for name, value in want_losses.items():
        torch.testing.assert_close(losses[name], value, rtol=0.01, atol=0, msg=name)
    found, want = gradients(head, losses), gradients(head, want_losses)
    for name, gradient in want.items():
        assert found[name].dtype == torch.float32
        off = (found[name] - gradient).norm() / gradient.norm()
        assert off < 0.02, (name, off)


@every_path
def test_of_all_latents_only_pre_activations_are_saved(kind, path, monkeypatch):
    head, x = started(kind)
    held = {}

    def pack(tensor):
        if tensor.numel() >= N * M:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = take(path, head, x, monkeypatch)
        head.losses(x, out, CONTEXT)
    assert len(held) == (0 if path == "few" else 1)


@every_head
def test_codes_do_not_change_with_the_weights(kind, monkeypatch):
    head, x = started(kind)
    out = take("blocks", head, x, monkeypatch)
    before = out.codes.dense().clone()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2)
    assert torch.equal(out.codes.dense(), before)


@every_head
def test_no_rows_are_no_error(kind):
    head, x = started(kind)
    out = head(x[:0])
    assert out.x_hat.shape == (0, D)
    assert out.codes.dense().shape == (0, M)
    assert out.codes.l0().shape == (0,)
    assert not out.codes.fired().any()


@every_head
def test_which_path_is_taken_follows_from_how_many_fire(kind):
    head, x = started(kind)
    with torch.no_grad():
        head.encoder.b_enc -= 100
        assert isinstance(head(x).codes, SparseCodes)
        head.encoder.b_enc += 200
        assert isinstance(head(x).codes, LazyCodes)


def test_few_above_finds_them_or_says_that_they_are_many(monkeypatch):
    pre = torch.zeros(64, 32)
    pre[3, 5] = pre[63, 31] = 2.0
    pre[7, 0] = 1.0
    pattern = row_blocks.few_above(pre, 1.0)
    assert pattern.flat.tolist() == [3 * 32 + 5, 63 * 32 + 31]
    level = torch.full((32,), 1.5)
    level[0], level[31] = 0.5, 2.5
    assert row_blocks.few_above(pre, level).flat.tolist() == [3 * 32 + 5, 7 * 32]
    n = int(row_blocks.SPARSE * pre.numel())
    some = torch.zeros(64 * 32)
    some[torch.randperm(64 * 32, generator=torch.Generator().manual_seed(0))[:n]] = 1.0
    monkeypatch.setattr(row_blocks, "SAMPLE_ROWS", 1)
    assert len(row_blocks.few_above(some.view(64, 32), 0.0).flat) == n
    some[(some == 0).nonzero()[0]] = 1.0
    assert row_blocks.few_above(some.view(64, 32), 0.0) is None
