"""Steps of fixed sizes, as a GPU takes them, beside those that count: a CPU can run both."""

import copy

import pytest
import torch

from kanllama_lightning.functional import sparse
from kanllama_lightning.heads import (
    BatchTopK,
    BentDictionary,
    CurvedDictionary,
    GainLatent,
    Gated,
    JumpReLU,
    KANDirect,
    KANEncoder,
    KANReLUDense,
    Matryoshka,
    SplineLatent,
    Standard,
    TopK,
)
from kanllama_lightning.heads.reach import first_reach
from kanllama_lightning.training.head_trainer import DEAD_REFRESH_STEPS, HeadTrainer
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.types import StepContext

D, M, K, TOK = 8, 24, 3, 40
SPARSE = [
    BatchTopK,
    BentDictionary,
    GainLatent,
    CurvedDictionary,
    KANDirect,
    KANEncoder,
    KANReLUDense,
    Matryoshka,
    SplineLatent,
    TopK,
]
HEADS = [*SPARSE, Gated, JumpReLU, Standard]


def rows(n, seed=0):
    """Raw activations, off the origin, of unlike spread per coordinate."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.5, 2, D) * 3 + 1


@pytest.fixture
def fixed(monkeypatch):
    """Lets what follows take the steps of a GPU."""

    def now():
        monkeypatch.setattr(sparse, "COUNTED_ON", ())

    return now


def started(kind, few):
    """A head off its start; with `few`, one whose activations are positive on too few places."""
    head = kind(d_model=D, d_sae=M, target_l0=K, alpha_aux=2.0)
    head.start_(rows(500, seed=99))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
        if few:
            head.encoder.b_enc -= head.pre_acts(rows(TOK)).reshape(-1).quantile(0.97)
        head.project_()
    return head


def all_of(head, x, dead):
    """Losses, gradients, codes and statistics of a step."""
    head = copy.deepcopy(head)
    context = StepContext(dead, 0.05, 0.1)
    out = head(x)
    losses = head.losses(x, out, context)
    torch.stack(list(losses.values())).sum().backward()
    head.observe_(out, context)
    found = {f"loss {name}": loss.detach() for name, loss in losses.items()}
    found |= {f"grad {name}": p.grad for name, p in head.named_parameters()}
    found |= {f"buffer {name}": b for name, b in head.named_buffers()}
    codes = out.codes
    found |= {"codes": codes.dense().detach(), "l0": codes.l0(), "fired": codes.fired()}
    return found | {"x_hat": out.x_hat.detach()}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("few", [False, True])
def test_a_step_of_fixed_sizes_is_the_step_that_counts(kind, few, fixed):
    head, x = started(kind, few), rows(TOK)
    dead = torch.tensor([1, 2, 3, 5, 8, 13, 21])
    want = all_of(head, x, dead)
    if kind in SPARSE:
        assert (int(want["l0"].sum()) < K * TOK) == few
    fixed()
    got = all_of(head, x, dead)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        size = value.double().abs().nan_to_num(posinf=0.0).max().item()
        torch.testing.assert_close(
            got[name],
            value,
            rtol=1e-5,
            atol=1e-5 * size,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("kind", SPARSE)
def test_a_step_of_fixed_sizes_has_them(kind, fixed):
    """However few activations are positive: the control of the test above."""
    head, x = started(kind, few=True), rows(TOK)
    assert len(head(x).codes.values) < K * TOK
    fixed()
    codes = head(x).codes
    assert len(codes.values) == K * TOK
    assert (codes.values >= 0).all()
    flat = codes.rows * M + codes.latents
    assert (flat.diff() > 0).all()  # ascending, and none twice


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_inference_keeps_only_what_is_positive(kind, fixed):
    head = started(kind, few=True).eval()
    fixed()
    assert (head(rows(TOK)).codes.values > 0).all()


@pytest.mark.parametrize("kind", [CurvedDictionary, SplineLatent, Matryoshka])
def test_a_start_of_fixed_sizes_is_the_one_that_counts(kind, fixed):
    want = started(kind, few=False).state_dict()
    fixed()
    got = started(kind, few=False).state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_fills_up_is_no_firing():
    """Of the first latent: it would be taken for one whose reach is known."""
    values = torch.tensor([3.0, 0.0, 0.0, 0.0, 5.0])
    latents = torch.tensor([1, 0, 0, 0, 1])
    assert first_reach(values, latents, 2).tolist() == [5.0, 5.0]


def test_a_gpu_lists_the_dead_latents_of_the_look_before(fixed):
    fixed()
    trainee = HeadTrainer("", started(TopK, few=False), Schedule.of(10_000_000, TOK), 5.0)
    seen = []
    for step in range(3 * DEAD_REFRESH_STEPS):
        if step in (DEAD_REFRESH_STEPS - 1, 2 * DEAD_REFRESH_STEPS - 1):
            trainee.silent_tokens.zero_()
            trainee.silent_tokens[step:] = trainee.dead_after_tokens
            trainee.head.encoder.b_enc.data[step:] = -1e6
        trainee.step(rows(TOK, seed=step), step, 0.0)
        assert trainee._dead is not None
        assert torch.equal(trainee.dead_mask.nonzero().squeeze(1), trainee._dead)
        seen.append(trainee._dead.tolist())
    n = DEAD_REFRESH_STEPS
    assert seen[: 2 * n] == [[]] * (2 * n)
    assert seen[2 * n :] == [list(range(n - 1, M))] * n
