"""The KAN layer: its start, its grid, and the way to and from efficient-kan."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kanllama_lightning.functional.splines import kan_linear, spline_bases
from kanllama_lightning.heads.kan_linear import BASE_ACTIVATIONS, KANLinear
from tests.shapes import unchecked

SIZES = [(order, size) for order in (1, 2, 3, 5) for size in (1, 2, 5, 8)]
SOME_SIZES = [(1, 1), (1, 5), (2, 3), (3, 5), (5, 1), (5, 8)]
MODULES = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


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


@pytest.mark.parametrize("name", BASE_ACTIVATIONS)
def test_base_activation(name):
    kan = layer(base_activation=name).double()
    x = torch.linspace(-2, 2, 42).double().reshape(7, 6).requires_grad_()
    base = getattr(F, name, {"identity": lambda a: a, "zero": lambda a: 0 * a}.get(name))
    splines = torch.einsum("tci,oci->to", spline_bases(x, -1, 1, 5), kan.weight[:, 1:])
    torch.testing.assert_close(kan(x), base(x) @ kan.weight[:, 0].T + splines)
    assert torch.autograd.gradcheck(kan, (x,))
    assert kan.features(x)[:, 0].equal(base(x))
    assert f"base_activation={name}" in repr(kan)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize(("order", "size"), SIZES)
def test_linear_start(order, size, tails):
    kan = KANLinear(7, 5, size, order, (-2.0, 3.0), tails)
    W = torch.randn(7, 5)
    assert kan.set_linear_(W) is kan
    assert (kan.weight[:, 0] == 0).all()
    assert kan.smoothness() <= 1e-11
    x = 20 * torch.rand(50, 7) - 10 if tails else 5 * torch.rand(50, 7) - 2
    assert (kan(x) - x @ W).norm() <= 2e-6 * (x @ W).norm()
    if not tails:
        assert (kan(torch.full((1, 7), 3.01 + 5 * order / size)) == 0).all()


def test_smoothness():
    """By hand: the edge 0, 1, 4, 4 has second differences 2 and -3; the edge of a line has none."""
    kan = KANLinear(2, 1, grid_size=1, grid_range=(-5, 1)).double()
    with torch.no_grad():
        kan.weight.copy_(torch.tensor([[9.0, 0, 1, 4, 4], [-9.0, 1, 2, 3, 4]]).T)
    assert kan.smoothness() == (2**2 + 3**2) / 2
    with torch.autocast("cpu", torch.bfloat16):
        kan.smoothness().backward()
    assert kan.weight.grad[0].T.tolist() == [[0, 2, -7, 8, -3], [0] * 5]
    short = KANLinear(2, 1, grid_size=1, spline_order=1)  # two bases: always a line
    assert short.smoothness() == 0


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize(("order", "size"), SOME_SIZES)
def test_edge_curves_sum_to_the_layer(order, size, tails):
    kan = layer(grid_size=size, spline_order=order, grid_range=(-2.0, 3.0), linear_tails=tails)
    kan.double()
    x = torch.linspace(-6, 7, 14).double()
    every = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    curves = kan.edge_curves(every[:, 0], every[:, 1], x).reshape(4, 6, 14)
    torch.testing.assert_close(curves.sum(1).T, kan(x[:, None].repeat(1, 6)))
    one = torch.zeros(14, 6).double()
    one[:, 5] = x
    torch.testing.assert_close(curves[2, 5], (kan(one) - kan(0 * one))[:, 2] + curves[2, 5, 6])
    assert torch.autograd.gradcheck(
        lambda p: kan.edge_curves(every[[5, 9], 0], every[[5, 9], 1], p),
        (x + 0.01).requires_grad_(),
    )


def test_edge_curves_are_exact_under_autocast():
    kan, points = layer(), torch.linspace(-2, 2, 9)
    right = kan.edge_curves(torch.tensor([3]), torch.tensor([0]), points)
    with torch.autocast("cpu", torch.bfloat16):
        curves = kan.edge_curves(torch.tensor([3]), torch.tensor([0]), points)
    assert curves.dtype == torch.float32
    assert curves.equal(right)


def test_bad_edges_and_matrices():
    kan, points, one = layer(), torch.zeros(2), torch.tensor([1])
    with pytest.raises(ValueError, match=r"out_index=\[4\]: must be numbers from 0 to 3"):
        kan.edge_curves(torch.tensor([4]), one, points)
    with pytest.raises(ValueError, match=r"in_index=\[-1\]: must be numbers from 0 to 5"):
        kan.edge_curves(one, torch.tensor([-1]), points)
    message = r"in_index=\[1, 1\].* there are 1 in out_index"
    with unchecked(), pytest.raises(ValueError, match=message):
        kan.edge_curves(one, one.repeat(2), points)
    with unchecked(), pytest.raises(ValueError, match=r"W: is \[4, 6\], must be .* \[6, 4\]"):
        kan.set_linear_(torch.zeros(4, 6))


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
        ({"base_activation": "SiLU"}, "base_activation='SiLU': must be one of silu, relu, gelu"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        KANLinear(6, 4, **args)


@pytest.mark.parametrize(("order", "size"), SIZES)
def test_import_then_export(order, size):
    state = foreign(order=order, grid_size=size, hi=4.0)
    kan = KANLinear.from_efficient_kan(state)
    assert (kan.in_features, kan.out_features) == (6, 4)
    assert (kan.grid_size, kan.spline_order) == (size, order)
    assert (kan.lo, kan.hi) == (pytest.approx(-1, abs=1e-6), pytest.approx(4))
    assert (kan.linear_tails, kan.base_activation) == (False, "silu")
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


class Module(nn.Module):
    """What an efficient-kan layer holds."""

    def __init__(self, activation):
        super().__init__()
        self.base_activation = activation
        for name, tensor in foreign().items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize("name", MODULES)
def test_import_of_base_activations(name):
    theirs = Module(MODULES[name]())
    assert KANLinear.from_efficient_kan(theirs).base_activation == name
    state = theirs.state_dict()
    assert KANLinear.from_efficient_kan(state, base_activation=name).base_activation == name


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.SiLU(inplace=True), nn.ELU(), None])
def test_an_unknown_base_activation_is_refused(activation):
    theirs = Module(activation)
    with pytest.raises(ValueError, match=r"only SiLU\(\), .* give that name as base_activation"):
        KANLinear.from_efficient_kan(theirs)
    assert KANLinear.from_efficient_kan(theirs, "gelu").base_activation == "gelu"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("order", "size"), [(1, 4), (2, 8), (3, 5), (4, 1), (5, 3)])
def test_agrees_with_efficient_kan(order, size, name):
    efficient_kan = pytest.importorskip("efficient_kan")
    torch.manual_seed(0)
    theirs = efficient_kan.KANLinear(32, 16, size, order, grid_range=[-1.5, 2.0])
    theirs.base_activation = MODULES[name]()  # one argument more in efficient-kan itself
    x = (1.2 * torch.randn(200, 32)).requires_grad_()
    grad = torch.randn(200, 16)
    parameters = [theirs.base_weight, theirs.spline_weight, theirs.spline_scaler]
    right = theirs(x)
    right = [right, *torch.autograd.grad(right, [x, *parameters], grad)]

    ours = KANLinear.from_efficient_kan(theirs)
    torch.testing.assert_close(ours(x), right[0])
    exported = efficient_kan.KANLinear(32, 16, size, order)  # its grid comes with the state
    exported.base_activation = MODULES[name]()
    exported.load_state_dict(ours.to_efficient_kan())
    torch.testing.assert_close(exported(x), right[0])

    base, spline, scaler = parameters
    folded = torch.cat([base[:, None], (spline * scaler[..., None]).transpose(1, 2)], 1)
    y = kan_linear(x, folded, -1.5, 2, size, order, BASE_ACTIVATIONS[name])
    for a, b in zip([y, *torch.autograd.grad(y, [x, *parameters], grad)], right, strict=True):
        assert F.mse_loss(a, b).sqrt() <= 1e-5 * b.square().mean().sqrt()
