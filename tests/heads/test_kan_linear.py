"""The KAN layer: its start, its grid, and the way to and from efficient-kan."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kanllama_lightning.functional.splines import kan_linear
from kanllama_lightning.heads.kan_linear import KANLinear


def layer(**args):
    return KANLinear(6, 4, generator=torch.Generator().manual_seed(0), **args)


def foreign(n_in=6, n_out=4, grid_size=5, order=3, lo=-1.0, hi=1.0):
    """A state dict as efficient-kan writes it."""
    g = torch.Generator().manual_seed(1)
    h = (hi - lo) / grid_size
    return {
        "base_weight": torch.randn(n_out, n_in, generator=g),
        "spline_weight": torch.randn(n_out, n_in, grid_size + order, generator=g),
        "spline_scaler": torch.randn(n_out, n_in, generator=g),
        "grid": (torch.arange(-order, grid_size + order + 1) * h + lo).repeat(n_in, 1),
    }


def test_shape_type_and_start():
    kan = KANLinear(400, 100, grid_size=4, spline_order=2, grid_range=[-3.0, 3.0])
    assert [(n, p.shape, p.dtype) for n, p in kan.named_parameters()] == [
        ("weight", (100, 7, 400), torch.float32)
    ]
    base, spline = kan.weight[:, 0], kan.weight[:, 1:]
    assert 0.99 / 20 < base.abs().max() <= 1 / 20
    assert 0.99 * 0.1 / 20 / 6 < spline.abs().max() <= 0.1 / 20 / 6
    assert kan(torch.randn(5, 400)).shape == (5, 100)
    assert "grid_range=(-3, 3)" in repr(kan)


def test_all_draws_come_from_the_generator():
    state = torch.get_rng_state()
    first, second = layer(), layer()
    KANLinear.from_efficient_kan(foreign())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)


def test_by_hand():
    """Two cells on [0, 2], order 1: tents at 0, 1 and 2; W_o0i = 0, so only the spline speaks."""
    kan = KANLinear(1, 1, grid_size=2, spline_order=1, grid_range=(0, 2), linear_tails=True)
    with torch.no_grad():
        kan.weight.copy_(torch.tensor([[[0.0], [1.0], [3.0], [2.0]]]))
    y = kan(torch.tensor([[-1.0], [0.0], [0.5], [1.0], [2.0], [4.0]]))
    assert y.flatten().tolist() == [-1.0, 1.0, 2.0, 3.0, 2.0, 0.0]
    kan.linear_tails = False
    y = kan(torch.tensor([[-1.0], [-0.5], [0.5], [2.5], [3.0]]))
    assert y.flatten().tolist() == [0.0, 0.5, 2.0, 1.0, 0.0]


def test_every_weight_learns():
    kan = layer(linear_tails=True)
    x = torch.linspace(-2, 2, 40)[:, None].repeat(1, 6).requires_grad_()
    kan(x).square().sum().backward()
    assert kan.weight.grad.isfinite().all()
    assert (kan.weight.grad != 0).all()
    assert x.grad.isfinite().all()


def test_out_of_grid():
    kan = layer(grid_range=(-3.0, 3.0))
    x = torch.zeros(2, 6)
    assert kan.out_of_grid(x) == 0
    x[0, :2], x[1, 5], x[0, 3] = 3.5, -4, 3.0
    assert kan.out_of_grid(x) == 3 / 12
    assert kan.out_of_grid(x[:0]) == 0


def test_save_and_load():
    kan, other = layer(), KANLinear(6, 4)
    other.load_state_dict(kan.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(kan(x), other(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"grid_size": 0}, "grid_size=0: must be at least 1"),
        ({"spline_order": 0}, "spline_order=0: must be at least 1"),
        ({"grid_range": (1.0, 1.0)}, r"grid_range=\(1.0, 1.0\): must be two numbers"),
        ({"grid_range": (1.0,)}, "grid_range"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        KANLinear(6, 4, **args)


@pytest.mark.parametrize("order", [1, 3])
def test_import_then_export(order):
    state = foreign(order=order)
    kan = KANLinear.from_efficient_kan(state)
    assert (kan.in_features, kan.out_features, kan.grid_size, kan.spline_order) == (6, 4, 5, order)
    assert (kan.lo, kan.hi, kan.linear_tails) == (-1, 1, False)
    back = kan.to_efficient_kan()
    assert set(back) == set(state)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    torch.testing.assert_close(back["base_weight"], state["base_weight"], rtol=0, atol=0)
    product = state["spline_weight"] * state["spline_scaler"][..., None]
    torch.testing.assert_close(back["spline_weight"], product, rtol=0, atol=0)
    assert (back["spline_scaler"] == 1).all()
    torch.testing.assert_close(back["grid"], state["grid"])
    again = KANLinear.from_efficient_kan(back)
    assert torch.equal(again.weight, kan.weight)


def test_import_without_scaler():
    state = foreign(lo=0.0, hi=7.0, grid_size=3)
    del state["spline_scaler"]
    kan = KANLinear.from_efficient_kan(state)
    assert torch.equal(kan.weight[:, 1:], state["spline_weight"].transpose(1, 2))
    assert (kan.lo, kan.hi) == (0, pytest.approx(7))


def test_export_of_tails_warns(caplog):
    with caplog.at_level(logging.WARNING):
        layer(linear_tails=True).to_efficient_kan()
    assert "no linear tails" in caplog.text


def test_only_a_uniform_grid_can_be_imported():
    state = foreign()
    state["grid"][2, 5] += 0.01
    with pytest.raises(ValueError, match="off a uniform grid"):
        KANLinear.from_efficient_kan(state)
    state = foreign()
    state["grid"][3] *= 1.5  # uniform, but not that of the others
    with pytest.raises(ValueError, match="the same for every input"):
        KANLinear.from_efficient_kan(state)
    state["grid"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="off a uniform grid"):
        KANLinear.from_efficient_kan(state)


def test_something_else_is_refused_by_name():
    with pytest.raises(ValueError, match="source has no base_weight, grid, spline_weight"):
        KANLinear.from_efficient_kan({"layers.0.grid": torch.zeros(1)})
    stranger = nn.Module()
    stranger.base_activation = nn.GELU()
    with pytest.raises(ValueError, match="only SiLU"):
        KANLinear.from_efficient_kan(stranger)


def test_agrees_with_efficient_kan():
    efficient_kan = pytest.importorskip("efficient_kan")
    torch.manual_seed(0)
    theirs = efficient_kan.KANLinear(32, 16)
    x = (1.2 * torch.randn(200, 32)).requires_grad_()
    grad = torch.randn(200, 16)
    parameters = [theirs.base_weight, theirs.spline_weight, theirs.spline_scaler]
    right = theirs(x)
    right = [right, *torch.autograd.grad(right, [x, *parameters], grad)]

    torch.testing.assert_close(KANLinear.from_efficient_kan(theirs)(x), right[0])
    exported = efficient_kan.KANLinear(32, 16)
    exported.load_state_dict(KANLinear.from_efficient_kan(theirs).to_efficient_kan())
    torch.testing.assert_close(exported(x), right[0])

    base, spline, scaler = parameters
    folded = torch.cat([base[:, None], (spline * scaler[..., None]).transpose(1, 2)], 1)
    y = kan_linear(x, folded, -1, 1, 5)
    for a, b in zip([y, *torch.autograd.grad(y, [x, *parameters], grad)], right, strict=True):
        assert F.mse_loss(a, b).sqrt() <= 1e-5 * b.square().mean().sqrt()
