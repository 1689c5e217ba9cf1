"""K-FAC against Kronecker products formed one by one, and against the block-diagonal curvature where it is exact."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from ntkgp.baselines.laplace import Laplace
from tests import reference

DOUBLE = torch.float64
NOISE = torch.tensor([0.04, 0.09], dtype=DOUBLE)


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=DOUBLE), torch.as_tensor(b, dtype=DOUBLE), rtol=tolerance, atol=tolerance
    )


def precision_matrix(la: Laplace, curvature: Tensor) -> Tensor:
    return curvature + la.precision[la.lin.groups.index].diag()


def check(la: Laplace, net: nn.Module, curvature: Tensor, x_test: Tensor, tolerance: float = 1e-9) -> None:
    """Covariance, log-determinant, effective dimensions and Σv of a dense H."""
    lam = la.precision[la.lin.groups.index]
    covariance = torch.linalg.inv(precision_matrix(la, curvature))
    j = reference.jacobian(net, x_test)
    structure = la.curvature
    close(structure.covariance(la.lin.pack(x_test)), j @ covariance @ j.mT, tolerance)
    close(structure.logdet(), torch.linalg.slogdet(curvature / lam + torch.eye(len(lam), dtype=DOUBLE))[1], tolerance)
    gammas, channels = structure.gammas()
    each = (curvature @ covariance).diagonal()
    close(gammas, la.lin.groups.sum_per_group(each), tolerance)
    close(channels.sum(), each.sum(), tolerance)
    v = torch.linspace(-1, 1, len(lam), dtype=DOUBLE)
    close(structure.solve(v), covariance @ v, tolerance)


def layer_of_rows(inputs: list[Tensor], rows: Tensor, count: int) -> Tensor:
    """(Σ ggᵀ) ⊗ (Σ aaᵀ)/count from all positions: inputs (·, I), whitened gradients (·, O)."""
    a = torch.cat(inputs)
    return torch.kron(rows.T @ rows, a.T @ a / count)


def gradients(net: nn.Module, x: Tensor, layer: nn.Module, roots: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer saw, and Sᵀ∂f/∂(its output), row by row and column of S by column, each at all positions."""
    inputs, found = [], []
    for n in range(len(x)):
        seen = []
        handle = layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        f = net(x[n : n + 1])[0]
        handle.remove()
        a, out = seen[0]
        inputs.append(a.detach())
        for column in roots[n].T:
            found.append(torch.autograd.grad(f @ column, out, retain_graph=True)[0])
    return torch.cat(inputs), torch.cat(found)


def joined(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(len(a), 1, dtype=DOUBLE)], -1)


def places(net: nn.Module, prefix: str) -> Tensor:
    """Places of a layer's (O, I + 1) weights, the bias last, row-major."""
    start, found = 0, {}
    for name, p in net.named_parameters():
        found[name] = torch.arange(start, start + p.numel()).reshape(len(p), -1)
        start += p.numel()
    return torch.cat([found[f"{prefix}.weight"], found[f"{prefix}.bias"]], -1).reshape(-1)


@functools.cache
def perceptron() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """4-7-6-2, affine LayerNorm after the first layer, trained a little."""
    with reference.seeded(7) as generator:
        net = nn.Sequential(
            nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 2)
        ).double()  # fmt: skip
        x = torch.randn(25, 4, generator=generator, dtype=DOUBLE)
        y = torch.stack([torch.sin(x.sum(-1)), x[:, 0] * x[:, 1]], -1)
        reference.train(net, lambda: (net(x) - y).square().mean(), 60)
        return net, x, y, torch.randn(5, 4, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_perceptron_with_layer_norm(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    net, x, y, x_test = perceptron()
    target = y if kind == "regression" else (y[:, 0] > 0).long()
    options = {"noise": NOISE} if kind == "regression" else {}
    with caplog.at_level(logging.INFO, "ntkgp"):
        la = Laplace(net, kind, structure="kfac", groups="layer", evidence=None, precision=0.7, **options).fit(
            (x, target)
        )
    assert "an exact block for 1.weight, 1.bias" in caplog.text
    f = reference.outputs(net, x)
    if kind == "regression":
        roots = NOISE.rsqrt().diag().expand(len(x), 2, 2)
    else:
        p = f.softmax(-1)
        roots = torch.linalg.eigh(torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))
        roots = roots.eigenvectors * roots.eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)
    curvature = torch.zeros(la.lin.num_parameters, la.lin.num_parameters, dtype=DOUBLE)
    for prefix in ("0", "3", "5"):
        a, g = gradients(net, x, net[int(prefix)], roots)
        where = places(net, prefix)
        curvature[where.unsqueeze(-1), where] = layer_of_rows([joined(a)], g, len(x))
    where = places(net, "1").sort().values  # weight, then bias of the LayerNorm: exact
    rows = torch.einsum("ncp,ncr->nrp", reference.jacobian(net, x), roots).flatten(0, 1)[:, where]
    curvature[where.unsqueeze(-1), where] = rows.T @ rows
    check(la, net, curvature, x_test)


def test_convolutions() -> None:
    with reference.seeded(2) as generator:
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, stride=2), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 2, dilation=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(3, 2),
        ).double()  # fmt: skip
        x = torch.randn(6, 1, 6, 6, generator=generator, dtype=DOUBLE)
    la = Laplace(net, structure="kfac", evidence=None, noise=NOISE, precision=0.9).fit((x, torch.zeros(6, 2)))
    plain = copy.deepcopy(net)
    plain[1] = nn.ReLU()
    roots = NOISE.rsqrt().diag().expand(len(x), 2, 2)
    curvature = torch.zeros(la.lin.num_parameters, la.lin.num_parameters, dtype=DOUBLE)
    for prefix in ("0", "2", "5"):
        layer = plain[int(prefix)]
        a, g = gradients(plain, x, layer, roots)
        if isinstance(layer, nn.Conv2d):
            a = unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)
            g = g.flatten(2).mT.flatten(0, 1)
        where = places(plain, prefix)
        curvature[where.unsqueeze(-1), where] = layer_of_rows([joined(a)], g, len(a))
    check(la, plain, curvature, x[:3] * 0.5)


def test_exact_where_gradients_are_the_same_for_all_data() -> None:
    """A deep linear network: G does not depend on the data, so that G ⊗ A is the block of the curvature itself."""
    with reference.seeded(4) as generator:
        net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)).double()
        x = torch.randn(12, 3, generator=generator, dtype=DOUBLE)
    la = Laplace(net, structure="kfac", evidence=None, noise=NOISE, precision=0.5).fit((x, x[:, :2]))
    rows = (reference.jacobian(net, x) / NOISE.sqrt().unsqueeze(-1)).flatten(0, 1)
    h = rows.T @ rows
    curvature = torch.zeros_like(h)
    for prefix in ("0", "1", "2"):
        where = places(net, prefix)
        curvature[where.unsqueeze(-1), where] = h[where.unsqueeze(-1), where]
    check(la, net, curvature, x[:4] + 1)


class Tied(nn.Module):
    """One matrix used by two layers, a bare scale, and a layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.first(x))) * self.scale
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


def test_tied_weights_and_bare_parameters_get_an_exact_block(caplog: pytest.LogCaptureFixture) -> None:
    with reference.seeded(5) as generator:
        net = Tied().double()
        x = torch.randn(15, 4, generator=generator, dtype=DOUBLE)
    with caplog.at_level(logging.INFO, "ntkgp"):
        la = Laplace(net, structure="kfac", evidence=None, noise=0.1).fit((x, x[:, :2]))
    assert "an exact block for scale, first.weight" in caplog.text
    assert [layer.name for layer in la.curvature.layers] == ["twice", "head"]
    rows = (reference.jacobian(net, x) / 0.1**0.5).flatten(0, 1)[:, :17]  # scale, then the tied matrix
    covariance = torch.linalg.inv(rows.T @ rows + torch.eye(17, dtype=DOUBLE))
    v = torch.zeros(la.lin.num_parameters, dtype=DOUBLE)
    v[:17] = torch.linspace(1, 2, 17)
    close(la.curvature.solve(v)[:17], covariance @ v[:17])


def test_groups_that_part_weight_and_bias() -> None:
    """Each tensor its own precision: the weight is Kronecker-factored alone, the biases are exact."""
    net, x, y, x_test = perceptron()
    la = Laplace(net, structure="kfac", groups="tensor", evidence=None, noise=NOISE, precision=0.7).fit((x, y))
    assert all(not layer.joint_bias for layer in la.curvature.layers)
    roots = NOISE.rsqrt().diag().expand(len(x), 2, 2)
    rows = torch.einsum("ncp,ncr->nrp", reference.jacobian(net, x), roots).flatten(0, 1)
    h = rows.T @ rows
    rest = torch.ones(len(h), dtype=torch.bool)
    curvature = torch.zeros_like(h)
    for prefix in ("0", "3", "5"):
        layer = net[int(prefix)]
        where = places(net, prefix).reshape(layer.out_features, -1)[:, :-1].reshape(-1)
        rest[where] = False
        a, g = gradients(net, x, layer, roots)
        curvature[where.unsqueeze(-1), where] = layer_of_rows([a], g, len(x))
    mask = rest.unsqueeze(-1) & rest
    curvature[mask] = h[mask]
    check(la, net, curvature, x_test)


def test_batches_do_not_matter() -> None:
    net, x, y, x_test = perceptron()
    options = {"structure": "kfac", "evidence": None, "noise": NOISE}
    whole = Laplace(net, **options).fit((x, y))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    close(Laplace(net, **options).fit(loader).log_evidence, whole.log_evidence)
    packed = whole.lin.pack(x_test)
    close(Laplace(net, **options).fit(loader).curvature.covariance(packed), whole.curvature.covariance(packed))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_factors_are_those_of_curvlinops(kind: str) -> None:
    """On the layers that curvlinops knows: convolutions and Linear, all positions, outputs exactly (not sampled)."""
    curvlinops = pytest.importorskip("curvlinops")
    with reference.seeded(5) as generator:
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, stride=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3),
        ).double()  # fmt: skip
        x = torch.randn(9, 1, 6, 6, generator=generator, dtype=DOUBLE)
        y = torch.randn(9, 3, generator=generator, dtype=DOUBLE) if kind == "regression" else torch.arange(9) % 3
    noise = 0.07
    options = {"noise": noise} if kind == "regression" else {}
    la = Laplace(net, kind, structure="kfac", groups="layer", evidence=None, precision=0.7, **options).fit((x, y))
    parameters = list(net.parameters())
    loss = (nn.MSELoss if kind == "regression" else nn.CrossEntropyLoss)(reduction="sum")
    factors = curvlinops.KFACLinearOperator(
        net, loss, parameters, [(x, y)], fisher_type="type-2", separate_weight_and_bias=False, check_deterministic=False
    )
    dense = torch.as_tensor(factors @ torch.eye(la.lin.num_parameters, dtype=DOUBLE))
    # The squared error's Hessian is 2, a Gaussian log-likelihood's 1/σ².
    check(la, net, dense / (2 * noise) if kind == "regression" else dense, x[:4], tolerance=1e-6)
