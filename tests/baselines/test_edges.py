"""What the comparators refuse, and branches that only some data take."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntkgp import baselines

DOUBLE = torch.float64


def network(outputs=1, inputs=2):
    return nn.Sequential(
        nn.Linear(inputs, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)
    ).double()


def data(outputs=1, rows=12):
    x = torch.randn(rows, 2, dtype=DOUBLE)
    return x, torch.randn(rows, outputs, dtype=DOUBLE)


def labels(classes, rows=12):
    x = torch.randn(rows, 2, dtype=DOUBLE)
    return x, torch.arange(rows) % classes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: baselines.DeepEnsemble(net, members=[]), "members: expected at least one network"),
        (lambda net: baselines.SWAG(net, momentum=1.0), "momentum, weight_decay: expected 0 <= momentum < 1"),
        (lambda net: baselines.SWAG(net, weight_decay=-1.0), "momentum, weight_decay: expected 0 <= momentum < 1"),
        (
            lambda net: baselines.Laplace(net, "classification", noise=0.1),
            "noise: expected for likelihood='regression' only",
        ),
        (lambda net: baselines.L2MEnsemble([]), "members: expected one or more L2M"),
    ],
)
def test_options_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(network())


def test_a_network_without_residuals_gives_no_noise():
    net, (x, _) = network(), data()
    y = net(x).detach()
    with pytest.raises(ValueError, match="noise: the network has no residuals"):
        baselines.HessianFreeLaplace(net).fit((x, y))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-9)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x).sin()).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="noise: the network has no residuals"):
        baselines.L2M(net, optimizer=optimizer).fit((x, net(x).detach()))


def test_a_network_that_does_not_move_has_no_refit():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
        net[2].weight.zero_()
    with pytest.raises(ValueError, match="its gradients are zero at all training inputs"):
        baselines.HessianFreeLaplace(net, noise=0.1).fit(data())


def test_a_subnetwork_of_nothing_is_refused():
    net = network()
    mask = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.bool)
    with pytest.raises(ValueError, match="mask: picks no weight"):
        baselines.Laplace(net, structure="subnetwork", mask=mask).fit(data())


@pytest.mark.parametrize("outputs", [1, 3])
def test_swag_scores_of_a_classification_come_from_its_own_loss(outputs):
    """Weights that move along SGD on the cross-entropy, done by hand."""
    net, (x, y) = network(outputs), labels(max(outputs, 2))
    loader = DataLoader(TensorDataset(x, y), batch_size=12)
    found = baselines.Laplace(
        net, "classification", structure="subnetwork", size=6, score="swag", swag_snapshots=3, swag_lr=0.05,
        swag_weight_decay=0.01, evidence=None,
    ).fit(loader)  # fmt: skip
    parameters = [p.detach().clone().requires_grad_() for p in net.parameters()]
    start = torch.cat([p.detach().flatten() for p in parameters])
    momenta, moved = [torch.zeros_like(p) for p in parameters], []
    for _ in range(3):
        names = [name for name, _ in net.named_parameters()]
        f = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), x)
        picked = (
            f.log_softmax(-1).gather(1, y[:, None])
            if outputs > 1
            else -nn.functional.softplus(f * (1 - 2 * y[:, None]))
        )
        gradients = torch.autograd.grad(-picked.mean(), parameters)
        with torch.no_grad():
            for p, m, g in zip(parameters, momenta, gradients, strict=True):
                m.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(0.05 * m)
        moved.append(torch.cat([p.detach().flatten() for p in parameters]) - start)
    variance = torch.stack(moved).var(0, correction=0)
    assert found.curvature.columns.sort().values.equal(variance.topk(6).indices.sort().values)


def test_swag_scores_of_a_loss_that_explodes_are_refused():
    method = baselines.Laplace(network(), structure="subnetwork", size=3, score="swag", swag_lr=1e12, noise=0.1)
    with pytest.raises(ValueError, match=r"swag_lr: SGD with 1000000000000.0 diverged"):
        method.fit(data())


def test_states_of_another_shape_are_refused_and_change_nothing():
    net, given = network(), data()
    state = baselines.HessianFreeLaplace(net, noise=0.1, model="tangent").fit(given).state_dict()
    fresh = baselines.HessianFreeLaplace(net, noise=0.1, model="tangent")
    with pytest.raises(ValueError, match=r"state: theta has shape \(3,\)"):
        fresh.load_state_dict({**state, "theta": torch.zeros(3)}, given[0])
    with pytest.raises(RuntimeError, match="call fit"):
        fresh.predict(given[0])

    laplace = baselines.Laplace(net, noise=0.1, evidence=None).fit(given)
    state = laplace.state_dict()
    other = baselines.Laplace(net, noise=0.1, evidence=None)
    with pytest.raises(ValueError, match=r"state: expected precision of shape"):
        other.load_state_dict({**state, "precision": torch.ones(7)}, given[0])
    lacking = {name: value for name, value in state.items() if not name.startswith("curvature.")}
    with pytest.raises(ValueError, match=r"state: has no .* of structure='full'"):
        other.load_state_dict(lacking, given[0])
    swag = baselines.SWAG(net, num_snapshots=2, rank=2).fit(given)
    fresh = baselines.SWAG(net, num_snapshots=2, rank=2)
    with pytest.raises(ValueError, match="state: expected mean of shape"):
        fresh.load_state_dict({**swag.state_dict(), "mean": torch.ones(2)}, given[0])


def test_swag_leaves_out_a_last_batch_of_one_row_where_statistics_need_two():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    found = baselines.SWAG(net, num_snapshots=2, rank=0, batch_size=4, num_samples=3).fit(data(rows=9))
    assert torch.isfinite(found.predict(torch.randn(3, 2, dtype=DOUBLE)).mean).all()


def test_kfac_of_a_convolution_in_one_dimension_is_that_of_its_patches():
    """With one row and one position the factors are exact: the block is the GGN of the weight."""
    net = nn.Sequential(nn.Conv1d(2, 1, 3, bias=False), nn.Flatten()).double()
    x, y = torch.randn(1, 2, 3, dtype=DOUBLE), torch.randn(1, 1, dtype=DOUBLE)
    found = baselines.Laplace(net, structure="kfac", noise=0.5, precision=2.0, evidence=None).fit((x, y))
    a = x.flatten()
    expected = a @ torch.linalg.solve(torch.outer(a, a) / 0.5 + 2 * torch.eye(6, dtype=DOUBLE), a)
    torch.testing.assert_close(found.predict(x).latent.variance.squeeze(), expected)
