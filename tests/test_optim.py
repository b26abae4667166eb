"""Our Adam is torch's, without the copies."""

import pytest
import torch

from kanllama_lightning.training.optim import Adam


@pytest.mark.parametrize("fused", [True, False])
def test_same_numbers_as_torch(fused):
    torch.manual_seed(0)
    tensors = [torch.randn(7, 5), torch.randn(5, 7).T, torch.randn(6), torch.randn(2, 3, 4)]
    runs = []
    for kind in (Adam, torch.optim.Adam):
        parameters = [torch.nn.Parameter(t.clone()) for t in tensors]
        assert parameters[1].stride() == (1, 7)
        optimizer = kind(parameters, lr=0.1, betas=(0.8, 0.9), eps=1e-8, fused=fused)
        for step in range(3):
            for i, p in enumerate(parameters):
                p.grad = (p * (i + 1) + step).detach()
            optimizer.step()
        runs.append((parameters, optimizer.state_dict()["state"]))
    for ours, torchs in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(ours, torchs)
        assert ours.stride() == torchs.stride()
    for i in range(4):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(runs[0][1][i][name], runs[1][1][i][name])


def test_the_kernels_see_transposed_weights_as_they_are_stored():
    """What the class is for; fails if torch renames or reorders what it overrides."""
    weight = torch.nn.Parameter(torch.randn(5, 7).T)
    weight.grad = torch.ones(5, 7).T
    optimizer = Adam([weight], fused=True)
    lists = [[], [], [], [], [], []]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    for tensors in lists[:4]:
        assert [t.shape for t in tensors] == [(5, 7)]
        assert tensors[0].is_contiguous()
    assert lists[0][0].data_ptr() == weight.data_ptr()
    assert lists[2][0].data_ptr() == optimizer.state[weight]["exp_avg"].data_ptr()


def test_gradients_of_a_loss_without_a_unit_are_not_lost_in_eps():
    """A latent that rarely fires at d_model 2,048: its gradients are below torch's eps."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([weight], lr=0.1)
    weight.grad = torch.full((3,), 1e-10)
    optimizer.step()
    assert weight.detach() == pytest.approx(-0.1, rel=0.02)
