"""Products with large weights on a CPU: the same to rounding, and with gradients the plain ones."""

import pytest
import torch
from torch import Tensor

from kanllama_lightning.functional.onednn import LARGE, by_onednn, linear
from kanllama_lightning.functional.sparse import product
from kanllama_lightning.heads.kan_linear import KANLinear

WIDTH = 520
pytestmark = pytest.mark.skipif(
    not by_onednn(torch.ones(1, WIDTH), torch.ones(WIDTH, WIDTH)), reason="no CPU of the x86 kind"
)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [0, 1, 3, 700])
def test_equals_the_exact_product(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    exact = x.double() @ weight.double().T
    assert linear(x, weight).shape == exact.shape
    if rows:
        assert off(linear(x, weight), exact) < 1e-6
        assert off(linear(x, weight, bias), exact + bias) < 1e-6
        with torch.no_grad():
            assert off(product(x, weight.t()), exact) < 1e-6


def test_is_left_alone_where_it_does_not_pay_or_has_no_gradient() -> None:
    x, large = torch.ones(2, WIDTH), torch.ones(WIDTH, WIDTH)
    small = large[: LARGE // WIDTH]
    assert not by_onednn(x, small)
    assert not by_onednn(x.double(), large.double())
    assert not by_onednn(x.bfloat16(), large)
    assert not by_onednn(x.requires_grad_(), large)
    with torch.no_grad():
        assert by_onednn(x, large)
    left, right = torch.randn(2, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH).t()
    product(left, right).sum().backward()
    assert left.grad is not None


def test_a_large_kan_layer_is_the_exact_one() -> None:
    torch.manual_seed(0)
    layer = KANLinear(192, 256)
    assert layer.weight.numel() >= LARGE
    x = torch.randn(300, 192)
    assert off(layer(x).detach(), layer.double()(x.double()).detach()) < 1e-5
