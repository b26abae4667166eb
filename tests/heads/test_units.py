"""One unit for the whole loss: no coefficient depends on d_model or on the units of x (METHODS A3).

Widths are compared on the same geometry. Every coordinate is repeated r times, which makes all
distances sqrt(r) times as long, and every parameter is what it must be for the reconstructions of
the repeated coordinates to be those of the single ones. Then a ratio of gradients may not change.
"""

import copy

import pytest
import torch

from kanllama_lightning.heads import (
    BatchTopK,
    BentDictionary,
    CurvedDictionary,
    DenseKANReLU,
    DenseOnlyKAN,
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
    SoftlyFrozenDecoder,
    SplineHidden,
    SplineInput,
    SplineLatent,
    Standard,
    TopK,
)
from kanllama_lightning.heads.encoders import KANReader
from kanllama_lightning.heads.sae import SAE, flat_name
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.types import StepContext

D, M, K, N_DEAD = 64, 96, 6, 16
HIDDEN = 20
DEAD = torch.arange(N_DEAD)
SELECTING = [TopK, BatchTopK, Matryoshka, FrozenDecoder, KANEncoder, KANDirect, MLPEncoder]
SELECTING += [
    FrozenEncoder,
    SoftlyFrozenDecoder,
    SplineHidden,
    SplineInput,
    SplineLatent,
    GainLatent,
    BentDictionary,
    CurvedDictionary,
    OnlyKAN,
    KANReLUDense,
]
PENALISED = [Standard, Gated, JumpReLU]
HEADS = [*SELECTING, *PENALISED]

# powers of sqrt(r) by which a number grows; those of a d_model axis are repeated besides
OF_CODES = {"b_enc": 1, "b_mag": 1, "theta": 1, "threshold": 1, "threshold_ema": 1, "reach": 1}
POWERS = OF_CODES | {"W_enc": -1, "W_dec": -1, "U": 1, "psi": -1, "x_variance": 2}
OWN = {
    KANEncoder: {"kan.weight": -2},
    MLPEncoder: {"V": -2},
    SplineHidden: {"V": -2},
    KANDirect: {"kan.weight": -1},
    OnlyKAN: {"kan.weight": -1},
    GainLatent: {"gain": 0, "offset": 1},
    BentDictionary: {"W_bend": -1, "bend": 0},
    KANReLUDense: {"kan_in.weight": -2, "V": -1, "reach": 0},
}


def rows(n=256, seed=0):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.5, 2, D) * 3 + 1


def made(kind, d_model):
    more = {"d_hidden": HIDDEN} if kind in (KANEncoder, MLPEncoder, SplineHidden) else {}
    if kind is JumpReLU:
        more = {"pre_act_coefficient": 1e-3}
    return kind(d_model=d_model, d_sae=M, target_l0=K, **more)


def trained(kind, x):
    """A head off its start, some of whose latents never fire."""
    head = made(kind, D)
    head.start_(x)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            size = parameter.std() if parameter.dim() > 1 else 0.1
            parameter += 0.1 * size * torch.randn(parameter.shape, generator=noise)
        head.project_()
        pre = head.pre_acts(x)
        # of selecting heads a little is left above 0, of the others nothing above -1
        if kind in PENALISED:
            head.encoder.b_enc[:N_DEAD] -= pre[:, :N_DEAD].max(0).values + 1
            head.selection.controller.coefficient.fill_(head.selection.controller.initial)
        else:
            head.encoder.b_enc[:N_DEAD] -= pre[:, :N_DEAD].max(0).values - 1e-3
    return head


def repeated(head, r):
    """The same head where every coordinate is there r times."""
    kind, wide = type(head), made(type(head), D * r)
    u, powers = r**0.5, POWERS | OWN.get(type(head), {})
    state = {}
    hidden = {"U"} if kind is KANReLUDense else set()  # as many hidden units as coordinates
    for full, value in head.state_dict().items():
        name = flat_name(full)
        if name.startswith("controller.") or name in ("scale", "norm_limit"):
            state[full] = value
            continue
        axes = [i for i, size in enumerate(value.shape) if size == D]
        if kind is KANReLUDense and name in ("kan_in.weight", "kan_out.weight", "c_in", "c_out"):
            axes = {"kan_in.weight": [2], "kan_out.weight": [0]}.get(name, [])
        if name in hidden or (kind is KANReLUDense and name in ("V", "reach")):
            axes = []
        for axis in axes:
            value = value.repeat_interleave(r, axis)
        state[full] = value * u ** powers.get(name, 0)
    if kind is KANReLUDense:  # its hidden layer has D units at every width here
        wide = resized(wide, state)
    wide.load_state_dict(state)
    return wide


def resized(head, state):
    """A head whose parameters have the shapes of a state."""
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        module = head.get_submodule(owner)
        if isinstance(getattr(module, leaf), torch.nn.Parameter):
            setattr(module, leaf, torch.nn.Parameter(torch.empty_like(value)))
        else:
            module.register_buffer(leaf, torch.empty_like(value))
    return head


def gradient_ratios(head, x):
    """Of every term after the first, per parameter: |its gradient| / |the reconstruction's|."""
    out = head(x)
    dead = DEAD if isinstance(head, SAE) else DEAD[:0]
    losses = head.losses(x, out, StepContext(dead, 0.5, 0.1))
    first, *others = losses
    assert first == "reconstruction"
    parameters = dict(head.named_parameters())

    def sizes(term):
        grads = torch.autograd.grad(
            losses[term], list(parameters.values()), retain_graph=True, allow_unused=True
        )
        return {n: None if g is None else g.norm() for n, g in zip(parameters, grads, strict=True)}

    base = sizes(first)
    return {
        (term, name): (size / base[name]).item()
        for term in others
        for name, size in sizes(term).items()
        # none where the reconstruction moves a parameter by rounding alone (the gates of Gated)
        if size is not None and base[name] is not None and base[name] > 1e-5 * size
    } | {("value", term): (losses[term] / losses[first]).item() for term in others}


@pytest.mark.parametrize("kind", HEADS)
def test_no_term_depends_on_the_width(kind):
    x = rows()
    head = trained(kind, x)
    want = gradient_ratios(head, x)
    assert "auxk" in {term for term, _ in want}
    for r in (8, 32):
        wide = repeated(head, r)
        y = x.repeat_interleave(r, 1)
        torch.testing.assert_close(
            wide(y).x_hat, head(x).x_hat.repeat_interleave(r, 1), rtol=1e-3, atol=1e-3
        )
        assert gradient_ratios(wide, y) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("kind", [*HEADS, DenseOnlyKAN, DenseKANReLU])
def test_no_term_depends_on_the_units_of_the_activations(kind):
    x = rows()
    one, ten = made(kind, D), made(kind, D)
    one.start_(x)
    ten.start_(10 * x)
    assert torch.allclose(10 * ten.scale, one.scale)
    loss, other = (
        head.losses(y, head(y), StepContext(DEAD[:0], 0.5, 0.1))["reconstruction"].item()
        for head, y in ((one, x), (ten, 10 * x))
    )
    assert loss == pytest.approx(other, rel=1e-3)
    assert gradient_ratios(one, x) == pytest.approx(gradient_ratios(ten, 10 * x), rel=0.01)


# ------------------------------------------------------------------------- revival

# one of each way of reading, selecting and writing, two of them in a wide model; a frozen encoder
# cannot revive, and of kan_relu_dense AuxK leaves half of the dead (its docstring)
REVIVED = [TopK, KANEncoder, SplineLatent, CurvedDictionary, BentDictionary, OnlyKAN, Gated]
REVIVED += [JumpReLU]
LATENTS, SILENT, BATCH = 512, 128, 512
SCHEDULE = Schedule.of(1_000_000, BATCH)  # dead after 100,000 tokens


def sparse_rows(d, n, seed):
    """Four of a thousand directions, some of them often, most of them seldom."""
    truth = torch.randn(1024, d, generator=torch.Generator().manual_seed(7))
    truth = truth / truth.norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(seed)
    often = 1 / torch.arange(10, 1034).float()
    which = torch.multinomial(often.expand(n, -1), 4, generator=g)
    sizes = torch.rand(n, 4, generator=g) + 0.5
    return 3 * (truth[which] * sizes[..., None]).sum(1)


def steps_(trainee, pool, n, began):
    """Steps of the run's own kind: its counters, its clipping, its order."""
    head, g = trainee.head, torch.Generator().manual_seed(began)
    # curves of single edges: at 3e-3 live latents of theirs go on dying, with AuxK and without
    lr = 1e-3 if isinstance(head.encoder, KANReader) else 3e-3
    optimizer = Adam(head.parameters(), lr=lr)
    for step in range(began, began + n):
        x = pool[torch.randint(len(pool), (BATCH,), generator=g)]
        optimizer.zero_grad()
        losses, _ = trainee.step(x, step, 0.3)
        torch.stack(list(losses.values())).sum().backward()
        head.project_grad_()
        trainee.clip_(None, "norm")
        optimizer.step()
        head.project_()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "d"),
    [(k, 64) for k in REVIVED] + [(k, 512) for k in (BatchTopK, Standard)],
)
def test_auxk_revives_with_the_weight_that_ships(kind, d):
    """Of 128 latents silenced in a trained head: dead after 600 steps, with AuxK and without."""
    head = kind(d_model=d, d_sae=LATENTS, target_l0=4)
    assert head.alpha_aux == 1 / 32
    pool = sparse_rows(d, 32_768, 1)
    head.start_(pool[:4096])
    trainee = HeadTrainer("", head, SCHEDULE, 5.0)
    steps_(trainee, pool, 200, 0)
    with torch.no_grad():
        if kind in PENALISED:
            head.encoder.b_enc[:SILENT] -= head.pre_acts(pool)[:, :SILENT].max(0).values + 1
            assert (head.pre_acts(pool)[:, :SILENT] <= -0.999).all()
        else:
            for full, reads in head.named_parameters():
                name = flat_name(full)
                if name in ("W_enc", "U"):
                    reads[:, :SILENT] *= 1e-2
                elif name == "kan.weight" and len(reads) == head.d_sae:
                    reads[:SILENT] *= 1e-2
            head.encoder.b_enc[:SILENT] = 0
    trainee.silent_tokens[:SILENT] = SCHEDULE.dead_after_tokens
    dead = {}
    for alpha in (1 / 32, 0.0):
        again = copy.deepcopy(trainee)
        again.head.alpha_aux = alpha
        steps_(again, pool, 600, 1000)
        dead[alpha] = int((again.silent_tokens[:SILENT] >= SCHEDULE.dead_after_tokens).sum())
    assert dead[0.0] > SILENT / 2  # else there was nothing to revive
    assert dead[1 / 32] <= dead[0.0] / 4, dead
