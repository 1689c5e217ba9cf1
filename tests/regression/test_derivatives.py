"""Networks whose derivatives autograd does not give as they are: right, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntkgp


def central_differences(net: nn.Module, x: Tensor, step: float = 1e-6) -> Tensor:
    """Dense (N·C, P) by changing one weight at a time."""
    columns = []
    with torch.no_grad():
        for parameter in net.parameters():
            flat = parameter.view(-1)
            for i in range(len(flat)):
                kept = flat[i].clone()
                flat[i] = kept + step
                above = net(x).flatten()
                flat[i] = kept - step
                columns.append((above - net(x).flatten()) / (2 * step))
                flat[i] = kept
    return torch.stack(columns, -1)


class Checkpointed(nn.Module):
    """Two checkpointed layers; the first has an input that requires no gradients."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=self.reentrant)
        h = checkpoint(lambda z: torch.tanh(self.b(z)), h, use_reentrant=self.reentrant)
        return self.c(h)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpoints_are_refused() -> None:
    """They gave zero derivatives for the weights inside (44 % error in J)."""
    with pytest.raises(ValueError, match="expected use_reentrant=False"):
        ntkgp.LinearizedNetwork(Checkpointed(True).double(), torch.randn(3, 2, dtype=torch.float64))


def test_other_checkpoints_have_all_derivatives() -> None:
    net, x = Checkpointed(False).double(), torch.randn(4, 2, dtype=torch.float64)
    found = ntkgp.LinearizedNetwork(net, x).jacobian(x).flatten(0, 1)
    torch.testing.assert_close(found, central_differences(net, x), rtol=1e-6, atol=1e-8)


def double_gradient(module: nn.Module, gradient: tuple[Tensor, ...], _: object) -> tuple[Tensor, ...]:
    return tuple(2 * g for g in gradient)


def test_hooks_on_gradients_do_not_change_the_jacobian() -> None:
    """A hook for training (clipping, scaling) doubled a layer's Jacobian; the user's module keeps it."""
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    net[1].register_full_backward_hook(double_gradient)
    net[3].register_full_backward_pre_hook(lambda module, gradient: (3 * gradient[0],))
    net[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    x = torch.randn(4, 2, dtype=torch.float64)
    found = ntkgp.LinearizedNetwork(net, x).jacobian(x).flatten(0, 1)
    torch.testing.assert_close(found, central_differences(net, x), rtol=1e-6, atol=1e-8)
    assert len(net[1]._backward_hooks) == len(net[3]._backward_pre_hooks) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 3), torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), nn.Linear(3, 1))
    with pytest.raises(TypeError, match="net: holds a TorchScript module"):
        ntkgp.LinearizedNetwork(net, torch.randn(3, 2))
