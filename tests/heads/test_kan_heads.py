"""What the KAN heads and their controls do beyond what every head does."""

import pytest
import torch

from kanllama_lightning.functional.planes import lifted_planes
from kanllama_lightning.functional.sparse import Pattern
from kanllama_lightning.functional.splines import spline_bases
from kanllama_lightning.heads import (
    BatchTopK,
    DenseKANReLU,
    DenseOnlyKAN,
    KANDirect,
    KANEncoder,
    KANReLUDense,
    Matryoshka,
    MLPEncoder,
    OnlyKAN,
    SAEHead,
    SplineHidden,
    SplineInput,
    SplineLatent,
    WideBatchTopK,
)
from kanllama_lightning.heads.reach import first_reach, follow_reach_
from kanllama_lightning.types import DenseCodes, InputError, StepContext
from tests.heads.test_heads import NOTHING_DEAD, D, K, M, rows, started, train_, trained

LATE = NOTHING_DEAD._replace(progress=0.5)

# ----------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("d", "m"), [(64, 512), (128, 1024), (2048, 16384)])
def test_the_controls_have_the_parameters_of_the_kan_encoder(d, m):
    with torch.device("meta"):
        kan = KANEncoder(d_model=d, d_sae=m, target_l0=8).n_parameters()
        rivals = [
            MLPEncoder(d_model=d, d_sae=m, target_l0=8),
            SplineHidden(d_model=d, d_sae=m, target_l0=8),
            WideBatchTopK(d_model=d, d_sae=m, target_l0=8),
        ]
    for rival in rivals:
        assert rival.n_parameters() == pytest.approx(kan, rel=0.01), type(rival)


def test_the_wide_control_comes_back_as_wide_as_it_was(tmp_path):
    head = WideBatchTopK(d_model=D, d_sae=M, target_l0=K)
    assert head.d_sae > M
    head.save(tmp_path)
    loaded = SAEHead.load(tmp_path)
    assert loaded.d_sae == head.d_sae
    assert loaded.init_args()["d_sae"] == M


# ------------------------------------------------------------------ Matryoshka


def test_matryoshka_groups_are_those_of_the_paper():
    with torch.device("meta"):
        assert Matryoshka(d_model=2048, d_sae=16384, target_l0=64).selection.ends == [
            512,
            1536,
            3584,
            7680,
            16384,
        ]


@pytest.mark.parametrize("groups", [[M + 1], [3, 3, M], [5, 2, M], [0, M], [4]])
def test_refused_groups(groups):
    with pytest.raises(InputError, match=r"head\.groups="):
        Matryoshka(d_model=D, d_sae=M, target_l0=K, groups=groups)


def test_one_group_is_batch_topk():
    a, b = started(Matryoshka, groups=[M]), started(BatchTopK)
    x = rows()
    assert a.losses(x, a(x), NOTHING_DEAD) == b.losses(x, b(x), NOTHING_DEAD)


def test_the_first_latents_do_better_alone_than_batch_topks():
    errors = {}
    for kind, args in ((Matryoshka, {"groups": [6, M]}), (BatchTopK, {})):
        head, x = started(kind, **args), rows(256)
        train_(head, x, 200)
        z = head(x).codes.dense().clone()
        z[:, 6:] = 0
        errors[kind] = (head.decode(z) - x).square().sum().item()
    assert errors[Matryoshka] < errors[BatchTopK]


# ---------------------------------------------------------------- SplineHidden


def test_hidden_units_see_a_deviation_of_one_and_start_as_a_rounded_relu():
    head = started(SplineHidden, d_hidden=5)
    x = head.encoder.standardised(rows(500, seed=99) * head.scale)
    seen = x @ head.encoder.units.V
    torch.testing.assert_close(seen.std(0), torch.ones(5), rtol=1e-3, atol=0)
    far = torch.tensor([[-30.0], [30.0]]).repeat(1, D) @ head.encoder.units.V
    hidden = head.encoder.units(torch.tensor([[-30.0], [30.0]]).repeat(1, D))
    assert (hidden.detach() - far.relu()).abs().max() < 0.05 * far.abs().max()
    assert (head.encoder.units(x) - seen.relu()).abs().max() < 0.4


# ----------------------------------------------------------------- SplineInput


def test_an_input_spline_bends_its_own_coordinate_only():
    head = started(SplineInput)
    [(before, _)] = head.sums(rows() * head.scale).branches
    with torch.no_grad():
        head.encoder.spline[:, 2] += torch.linspace(-1, 1, 8).square()
    [(after, _)] = head.sums(rows() * head.scale).branches
    assert (after - before).any(0).tolist() == [i == 2 for i in range(D)]


# ---------------------------------------------------------------- SplineLatent


def test_curves_rise_from_a_hard_zero():
    head = started(SplineLatent)
    with torch.no_grad():
        head.selection.spline.add_(
            torch.randn(head.selection.spline.shape, generator=torch.Generator().manual_seed(1))
        )
    p = torch.linspace(0, 4, 200).repeat(M)
    latents = torch.arange(M).repeat_interleave(200)
    z = head.selection.curve(p, latents).view(M, 200)
    torch.testing.assert_close(z[:, 0], torch.zeros(M), atol=1e-5, rtol=0)
    assert (z.diff(dim=1) > 0).all()
    head.eval()
    head.selection.threshold.zero_()
    x = rows(20)
    assert torch.equal(head.encode(x) > 0, head.pre_acts(x) > 0)


def test_free_curves_are_never_negative():
    head = started(SplineLatent, monotone=False)
    with torch.no_grad():
        head.selection.spline.mul_(-1)
    assert not head.selection.curve(torch.linspace(0, 4, 50), torch.zeros(50).long()).any()


def test_splines_rest_at_first_and_their_reach_rests_then():
    head, x = started(SplineLatent), rows(256)
    spline, reach = head.selection.spline.detach().clone(), head.selection.reach.clone()
    train_(head, x, 3, NOTHING_DEAD._replace(progress=0.05))
    assert torch.equal(head.selection.spline, spline)
    assert not torch.equal(head.selection.reach, reach)
    reach = head.selection.reach.clone()
    train_(head, x, 3, LATE)
    assert not torch.equal(head.selection.spline, spline)
    assert torch.equal(head.selection.reach, reach)


def test_a_new_reach_changes_nothing_while_the_curves_are_lines():
    head = started(SplineLatent)
    before = head(rows()).x_hat
    head.selection.reach.mul_(3)
    torch.testing.assert_close(head(rows()).x_hat, before, rtol=1e-4, atol=1e-4)


def test_smoothness_is_zero_for_lines_only():
    head, x = started(SplineLatent, smoothness=0.5), rows()
    assert head.losses(x, head(x), LATE)["smooth"] < 1e-10
    with torch.no_grad():
        head.selection.spline[3] += 1
    step = torch.nn.functional.softplus(
        head.selection.spline.detach()[3, 0]
    ) - head.selection.spline.new_tensor(1 / 5)
    want = 0.5 * 2 * step.square()  # one increment differs: two second differences
    torch.testing.assert_close(head.losses(x, head(x), LATE)["smooth"].detach(), want)


def test_gradients_of_curves_are_those_of_finite_differences():
    head, x = trained(SplineLatent, target_l0=M), rows(40)  # no selection to flip
    head.zero_grad()

    def loss():
        return head.losses(x, head(x), LATE)["reconstruction"]

    loss().backward()
    with torch.no_grad():
        for parameter in (head.selection.spline, head.encoder.b_enc, head.decoder.W_dec):
            index = int(parameter.grad.abs().argmax())
            flat, found = parameter.view(-1), []
            for step in (1e-3, -2e-3):
                flat[index] += step
                found.append(loss().item())
            flat[index] += 1e-3
            slope = (found[0] - found[1]) / 2e-3
            assert slope == pytest.approx(parameter.grad.view(-1)[index].item(), rel=0.02)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"grid_size": 0}, r"head\.grid_size=0"),
        ({"frozen_share": 1.0}, r"head\.frozen_share=1"),
        ({"smoothness": -1.0}, r"head\.smoothness=-1"),
    ],
)
def test_refused_spline_arguments(args, message):
    with pytest.raises(InputError, match=message):
        SplineLatent(d_model=D, d_sae=M, target_l0=K, **args)


def test_reach_by_hand():
    values = torch.tensor([3.0, 1.0, 2.0, 5.0])
    latents = torch.tensor([0, 0, 0, 2])
    # latent 0 fired three times: known; 2 once and 1 never: they get the median of the known
    assert first_reach(values, latents, 3).tolist() == [3, 3, 3]
    reach = torch.tensor([4.0, 4.0, 4.0])
    follow_reach_(reach, values, latents, 0.1)
    assert reach.tolist() == pytest.approx([3.6, 4.0, 5.0])


# ------------------------------------------------------------- a KAN as decoder


@pytest.mark.parametrize("kind", [OnlyKAN, KANReLUDense])
def test_silent_latents_contribute_exactly_nothing(kind):
    head = trained(kind).eval()
    none = Pattern(torch.zeros(0, dtype=torch.int64), 3, M)
    assert not head.decoder.kept(torch.zeros(0), none).any()
    nothing = head.decode(torch.zeros(3, M))
    torch.testing.assert_close(nothing, (head.b_dec / head.scale).expand(3, -1))


def test_only_kan_is_the_sum_of_its_curves():
    head = trained(OnlyKAN).eval()
    z = head.encode(rows(5)).detach()
    summed = torch.stack([head.decoder.curve(j, z[:, j]) for j in range(M)]).sum(0)
    torch.testing.assert_close((summed + head.b_dec) / head.scale, head.decode(z))


def test_curves_of_only_kan_by_the_bases():
    head = trained(OnlyKAN)
    z = torch.tensor([0.0, 0.3, 2.0])
    reach = head.decoder.reach[4]
    u = z / reach
    silu = (u * u.sigmoid())[:, None] * head.decoder.psi[4, 0]
    bases = spline_bases(u[:, None], 0, 1, 5, linear_tails=True).squeeze(2)
    spline = (bases - bases[:1]) @ head.decoder.psi[4, 1:]
    torch.testing.assert_close(head.decoder.curve(4, z), reach * (silu + spline).detach())


def test_latents_mix_in_kan_relu_dense():
    head = trained(KANReLUDense).eval()
    z = torch.zeros(1, M)
    z[0, :4] = 3
    apart = sum(head.decoder.curve(j, torch.tensor([3.0])) for j in range(4))
    together = head.decoder.dense(z)
    assert (together - apart).norm() > 0.01 * together.norm()


def test_lifted_planes_vanish_at_zero_and_have_the_right_gradient():
    assert not lifted_planes(torch.zeros(2), 5).any()
    u = torch.linspace(-0.5, 1.5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: lifted_planes(v, 5), u)


def test_the_latent_form_has_as_many_hidden_units_as_latents():
    assert KANReLUDense(d_model=D, d_sae=M, target_l0=K, latent_hidden=True).encoder.U.shape == (
        M,
        M,
    )
    assert KANReLUDense(d_model=D, d_sae=M, target_l0=K).encoder.U.shape == (D, M)


# ----------------------------------------------------------------- earlier, dense


@pytest.mark.parametrize("kind", [DenseOnlyKAN, DenseKANReLU])
def test_the_earlier_designs_are_dense(kind, tmp_path):
    head, x = kind(d_model=D, d_sae=M, target_l0=K), rows(64)
    head.start_(rows(500, seed=99))
    out = head(x)
    assert isinstance(out.codes, DenseCodes)
    assert out.codes.l0().float().mean() > 0.9 * M
    assert torch.equal(out.x_hat, head.decode(head.encode(x)))
    losses = head.losses(x, out, StepContext(torch.arange(3), 0.0, 0.1))
    assert list(losses) == ["reconstruction"]
    losses["reconstruction"].backward()
    assert all(p.grad.any() for p in head.parameters())
    head.save(tmp_path)
    assert torch.equal(SAEHead.load(tmp_path)(x).x_hat, head.eval()(x).x_hat)


def test_kan_direct_needs_no_other_encoder():
    head = started(KANDirect)
    assert not hasattr(head.encoder, "W_enc")
    assert not head.encoder.kan.weight[:, 0].any()  # the base has no part at the start
