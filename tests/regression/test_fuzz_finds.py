"""What random networks have found."""

from __future__ import annotations

import warnings

import gpytorch
import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp import baselines
from ntkgp.evaluation.training import seeded

DOUBLE = torch.float64


class Words(nn.Module):
    """Tokens with padding through normalised layers, whose table is also read backwards if `tied`."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4)
        self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.norm(self.table(ids)))).mean(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("example", [[[5, 1, 2], [3, 4, 2]], [[0, 1, 2], [3, 0, 2]]])
def test_padding_has_no_derivative_in_forward_mode(tied: bool, example: list[list[int]]) -> None:
    """torch's forward mode gives a padding row one: jvp was no product with the Jacobian, by 3 to 600 %."""
    with seeded(0):
        net, v = Words(tied).double(), torch.randn(3, sum(p.numel() for p in Words(tied).parameters()), dtype=DOUBLE)
    x = torch.tensor([[0, 1, 2], [3, 0, 2], [4, 5, 0], [1, 2, 3]])
    lin = ntkgp.LinearizedNetwork(net, torch.tensor(example))
    assert lin.frozen.forward_mode
    jacobian = torch.stack(
        [torch.cat([g.flatten() for g in gradients(net, x, n, c)]) for n in range(4) for c in range(7)]
    )
    assert bool(jacobian[:, :4].any()) == tied
    expected = (v @ jacobian.T).view(3, 4, 7)
    torch.testing.assert_close(lin.jvp(x, v), expected, rtol=1e-12, atol=1e-12)


def gradients(net: nn.Module, x: Tensor, row: int, output: int) -> tuple[Tensor, ...]:
    return torch.autograd.grad(net(x)[row, output], list(net.parameters()))


def test_products_through_glu_have_derivatives() -> None:
    with seeded(1):
        layers = [nn.Linear(3, 8), nn.GLU(), nn.LayerNorm(4), nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)]
        net, x = nn.Sequential(*layers).double(), torch.randn(3, 3, dtype=DOUBLE)
    lin = ntkgp.LinearizedNetwork(net, x)
    v = torch.randn(lin.num_parameters, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    leaf = x.clone().requires_grad_()
    lin.jvp(leaf, v).sum().backward()
    assert leaf.grad is not None
    for column in range(3):
        step = torch.zeros_like(x)
        step[:, column] = 1e-6
        difference = (lin.jvp(x + step, v).sum(-1) - lin.jvp(x - step, v).sum(-1)) / 2e-6
        torch.testing.assert_close(leaf.grad[:, column], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_comparators_take_covariances_without_full_rank(dtype: torch.dtype) -> None:
    """Four outputs, one trainable number: each 4 × 4 block has rank one."""
    with seeded(2):
        layers = [nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4)]
        net = nn.Sequential(*layers).to(dtype)
        x, y = torch.randn(6, 1, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    for p in list(net.parameters())[1:]:
        p.requires_grad_(False)
    found = baselines.PriorOnly(net, precision=2.0, noise=0.1).fit((x, y)).predict(x)
    rows = torch.stack([gradients_of(net, x, n) for n in range(6)]).double()  # shape: (N, C, P)
    expected = rows @ rows.mT / 2.0
    assert bool((torch.linalg.cholesky_ex(expected).info > 0).all())
    torch.testing.assert_close(found.latent.covariance_matrix, expected, rtol=1e-5, atol=1e-6)


def gradients_of(net: nn.Module, x: Tensor, row: int) -> Tensor:
    weights = [p for p in net.parameters() if p.requires_grad]
    out = net(x)[row]
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(o, weights, retain_graph=True)]) for o in out]
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_small_variances_are_as_they_are(outputs: int) -> None:
    """GPyTorch raises variances to 1e-10, with a warning, whatever the units."""
    with seeded(3):
        layers = [nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)]
        net, x = nn.Sequential(*layers).double(), torch.randn(7, 2, dtype=DOUBLE)
    found = []
    for unit in (1.0, 1e-7):
        y = unit * torch.sin(x.sum(-1, keepdim=True)).expand(-1, outputs)
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-20))
        likelihood = likelihood.double()
        likelihood.noise = 0.01 * unit**2
        model = ntkgp.ExactNTKGP(x, y.squeeze(-1), likelihood, ntkgp.LinearizedNetwork(net, x)).eval()
        model.kernel.precision = torch.full((len(model.lin.groups),), unit**-2, dtype=DOUBLE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latent = model(x[:3] + 1)
            found.append(latent.variance / unit**2)
            observed = model.likelihood(latent).variance / unit**2
        torch.testing.assert_close(latent.covariance_matrix.diagonal().view_as(latent.variance), latent.variance)
        torch.testing.assert_close(observed, found[-1] + 0.01)
        torch.testing.assert_close(
            latent[:2].variance if outputs == 1 else latent.variance[:2], unit**2 * found[-1][:2]
        )
    torch.testing.assert_close(*found)
    assert found[0].shape == ((3,) if outputs == 1 else (3, 3))


def test_a_served_model_does_not_remember_every_number_of_inputs() -> None:
    with seeded(4):
        layers = [nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)]
        net, x = nn.Sequential(*layers).double(), torch.randn(90, 2, dtype=DOUBLE)
    lin = ntkgp.LinearizedNetwork(net, x[:4])
    dense = lin.jacobian(x).flatten(0, 1)
    for rows in range(1, 91):
        gram = lin.grams(x[:rows])
    assert len(lin.engine._chosen) <= 64
    assert len(lin.engine.plan._checked) <= 64
    index = lin.groups.index
    for g in range(len(gram)):
        torch.testing.assert_close(gram[g], dense[:, index == g] @ dense[:, index == g].T)


def test_a_second_input_that_is_cheaper_than_the_first() -> None:
    """Layers take other ways for two inputs: from their memory followed a negative number of inputs at a time."""
    from tests.fuzzing import run

    outcome = run(2553, "laplace")
    assert outcome.kind == "equal", outcome


def test_landmarks_are_counted_before_their_memory_is() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    lin = ntkgp.LinearizedNetwork(net, torch.randn(2, 2))
    with pytest.raises(ValueError, match="num_landmarks: expected an integer >= 1, got 'two'"):
        ntkgp.evidence.one_pass(
            lin, (torch.randn(4, 2), torch.randn(4)), gpytorch.likelihoods.GaussianLikelihood(), num_landmarks="two"
        )
