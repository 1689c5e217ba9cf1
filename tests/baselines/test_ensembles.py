"""Deep ensembles, dropout and SWAG, against plain loops and closed forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

from ntkgp.baselines.ensembles import SWAG, DeepEnsemble, MCDropout, reinitialized
from ntkgp.baselines.point import Point
from tests import reference
from tests.reference import DOUBLE


def networks(outputs: int, count: int = 4) -> list[nn.Module]:
    found = []
    for seed in range(count):
        with reference.seeded(seed):
            found.append(reference.layernorm_mlp(outputs))
    return found


def adam(net: nn.Module, data: Any) -> None:
    x, y = data
    reference.train(net, lambda: (net(x).reshape(y.shape) - y).square().mean(), 30)


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- deep ensembles ---


def test_moments_of_given_members() -> None:
    members = networks(3)
    x = torch.randn(20, 3, dtype=DOUBLE)
    y = torch.randn(20, 3, dtype=DOUBLE)
    found = DeepEnsemble(members[0], members=members).fit((x, y))
    x_test = torch.randn(7, 3, dtype=DOUBLE)
    f = torch.stack([reference.outputs(member, x_test) for member in members])
    p = found.predict(x_test)
    torch.testing.assert_close(p.mean, f.mean(0), rtol=1e-9, atol=1e-12)
    for n in range(7):
        covariance = torch.cov(f[:, n].T, correction=0)
        torch.testing.assert_close(p.covariance_matrix[n], covariance + found.noise.diag(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p.latent.covariance_matrix[n], covariance, rtol=1e-6, atol=1e-9)
    train = torch.stack([reference.outputs(member, x) for member in members])
    noise = found.noise.clone().requires_grad_()
    total = train.var(0, correction=0) + noise
    slope = torch.autograd.grad((total.log() + (y - train.mean(0)).square() / total).sum(), noise)[0]
    assert (slope * noise).abs().max() < 1e-5


def test_more_outputs_than_members() -> None:
    members = networks(6, count=3)
    x, y = torch.randn(20, 3, dtype=DOUBLE), torch.randn(20, 6, dtype=DOUBLE)
    p = DeepEnsemble(members[0], members=members).fit((x, y)).predict(x)
    assert torch.isfinite(p.log_prob(y)).all()
    assert torch.isfinite(p.latent.log_prob(p.mean)).all()


@pytest.mark.parametrize("outputs", [1, 4])
def test_probabilities_are_averaged(outputs: int) -> None:
    members = networks(outputs)
    x = torch.randn(20, 3, dtype=DOUBLE)
    y = torch.randint(0, max(2, outputs), (20,))
    f = torch.stack([reference.outputs(member, x) for member in members])
    plain = DeepEnsemble(members[0], "classification", members=members).fit((x, y))
    expected = torch.stack([reference.probabilities(one) for one in f]).mean(0)
    torch.testing.assert_close(plain.predict(x).probs.reshape(20, -1), expected, rtol=1e-9, atol=1e-12)
    calibrated = DeepEnsemble(members[0], "classification", members=members, validation=(x, y)).fit((x, y))
    temperature = calibrated.temperature.clone().requires_grad_()
    mixture = torch.stack([reference.probabilities(one / temperature) for one in f]).mean(0)
    picked = torch.where(y == 1, mixture[:, 0], 1 - mixture[:, 0]) if outputs == 1 else mixture[torch.arange(20), y]
    loss = -picked.log().mean()
    # Random labels may want T at its bound; inside, the slope is zero.
    if abs(float(temperature.detach().log())) < 4.9:
        assert abs(float(torch.autograd.grad(loss, temperature)[0] * temperature)) < 1e-6
    assert calibrated.predict(x).log_prob(y.double()).mean() >= plain.predict(x).log_prob(y.double()).mean()


def test_training_is_seeded_and_leaves_everything_else() -> None:
    sample = reference.problem_r()
    net, before = copy.deepcopy(sample.net).train(), copy.deepcopy(sample.net.state_dict())
    random = torch.get_rng_state()
    x, y = sample.x, sample.y
    found = DeepEnsemble(net, train=adam, size=3, seed=5).fit((x, y))
    again = DeepEnsemble(net, train=adam, size=3, seed=5).fit((x, y))
    other = DeepEnsemble(net, train=adam, size=3, seed=50).fit((x, y))
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert unchanged(net, before)
    p = found.predict(sample.x_test)
    assert torch.equal(p.mean, again.predict(sample.x_test).mean)
    assert not torch.allclose(p.mean, other.predict(sample.x_test).mean)
    f = [reference.outputs(member, x) for member in found.members]
    torch.testing.assert_close(f[0], reference.outputs(sample.net, x))
    assert (f[1] - f[2]).abs().max() > 1e-3
    alone = DeepEnsemble(net, train=adam, size=2, seed=5, include_net=False).fit((x, y))
    assert (reference.outputs(alone.members[0], x) - f[0]).abs().max() > 1e-3
    # What is trained is better than what was drawn.
    untrained = DeepEnsemble(net, train=lambda net, data: None, size=3, include_net=False).fit((x, y))
    assert found.noise < untrained.noise


def test_state_of_members_from_a_factory() -> None:
    sample = reference.problem_r()
    factory = lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()  # noqa: E731
    options = {"train": adam, "factory": factory, "size": 2, "include_net": False}
    fitted = DeepEnsemble(sample.net, **options).fit((sample.x, sample.y))
    fresh = DeepEnsemble(sample.net, **options).load_state_dict(fitted.state_dict(), sample.x)
    assert torch.equal(fresh.predict(sample.x_test).stddev, fitted.predict(sample.x_test).stddev)
    with pytest.raises(ValueError, match="missing the tensors of members"):
        fresh.load_state_dict({k: v for k, v in fitted.state_dict().items() if not k.startswith("members.")})
    with pytest.raises(ValueError, match="state: expected that of DeepEnsemble for regression, got Point for regr"):
        fresh.load_state_dict(Point(sample.net).fit((sample.x, sample.y)).state_dict())


def test_reinitialized_keeps_frozen_layers() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    net[0].requires_grad_(False)
    fresh = reinitialized(net)
    assert torch.equal(fresh[0].weight, net[0].weight)
    assert not torch.equal(fresh[3].weight, net[3].weight)
    assert not fresh[0].weight.requires_grad

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"'0' \(Bare\) has parameters and no reset_parameters"):
        reinitialized(nn.Sequential(Bare()))


def test_refusals_of_ensembles() -> None:
    net = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="train, members: expected one of them"):
        DeepEnsemble(net)
    with pytest.raises(ValueError, match="size: expected a positive integer"):
        DeepEnsemble(net, train=adam, size=0)
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="member 1: expected C = 1 finite outputs"):
        DeepEnsemble(net, members=[net, nn.Linear(3, 2)]).fit((x, x[:, :1]))
    with pytest.raises(TypeError, match=r"train: expected it to return a network, or None .* got float"):
        DeepEnsemble(net, train=lambda net, data: 0.5).fit((x, x[:, :1]))


# --- dropout ---


def test_dropout_on_the_inputs_has_the_binomial_variance() -> None:
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 4, dtype=DOUBLE), torch.randn(12, 2, dtype=DOUBLE)
    w = net[1].weight.detach()
    expected = torch.einsum("ci,ni,di->ncd", w, x.square(), w) * 0.3 / 0.7
    scale = expected.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)

    def moments(**options: Any) -> tuple[Tensor, Tensor]:
        """Mean and unbiased covariance over 50 draws of each of 400 copies of the rows."""
        latent = MCDropout(net, num_samples=50, **options).fit((x, y)).predict(x.repeat(400, 1)).latent
        covariance = latent.covariance_matrix.reshape(400, 12, 2, 2).mean(0) * 50 / 49
        return latent.mean.reshape(400, 12, 2).mean(0), covariance

    mean, covariance = moments()
    assert ((covariance - expected) / scale.unsqueeze(-1)).abs().max() < 0.05
    assert ((mean - copy.deepcopy(net).eval()(x).detach()) / scale.sqrt()).abs().max() < 0.03
    _, stronger = moments(rate=0.6)
    expected = expected * (0.6 / 0.4) / (0.3 / 0.7)
    assert ((stronger - expected) / (scale.unsqueeze(-1) * 3.5)).abs().max() < 0.05


class Functional(nn.Module):
    """Dropout called as a function, between normalised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.2, self.training))


def test_dropout_is_reproducible_and_keeps_batchnorm() -> None:
    net = Functional().double().eval()
    x, y = torch.randn(40, 3, dtype=DOUBLE), torch.randint(0, 3, (40,))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = MCDropout(net, "classification", num_samples=20).fit((x, y))
    p = found.predict(x)
    assert isinstance(p, Categorical)
    assert torch.equal(p.probs, found.predict(x).probs)
    assert torch.equal(torch.get_rng_state(), random)
    assert unchanged(net, before)
    assert not net.training
    # With batch statistics a prediction would depend on the other rows; only the masks do, and those are random.
    one = found.predict(x[:1].repeat(1000, 1)).probs.mean(0)
    many = found.predict(x.repeat(1000, 1)).probs.reshape(1000, 40, 3)[:, 0].mean(0)
    assert (one - many).abs().max() < 0.004
    fresh = MCDropout(net, "classification", num_samples=20).load_state_dict(found.state_dict(), x)
    assert torch.equal(fresh.predict(x).probs, p.probs)


def test_dropout_needs_a_random_network() -> None:
    sample = reference.problem_r()
    with pytest.raises(ValueError, match="not random in training mode"):
        MCDropout(sample.net).fit((sample.x, sample.y))
    with pytest.raises(ValueError, match="rate: expected a probability"):
        MCDropout(sample.net, rate=1.0)


# --- SWAG ---


def sgd_iterates(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> Tensor:
    """Full-batch SGD written out: lr 0.01, momentum 0.9, weight decay 3e-4."""
    net = copy.deepcopy(net).train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in parameters]
    found = []
    for _ in range(epochs):
        out = net(x)
        loss = (out - y).square().mean() if y.is_floating_point() else nn.functional.cross_entropy(out, y)
        for p, v, g in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
            v.mul_(0.9).add_(g + 3e-4 * p.detach())
            p.data.sub_(0.01 * v)
        found.append(torch.cat([p.detach().flatten() for p in parameters]).clone())
    return torch.stack(found)


@pytest.mark.parametrize("labels", [False, True])
def test_swag_moments_and_draws(labels: bool) -> None:
    sample = reference.problem_c() if labels else reference.batchnorm_net()
    kind = "classification" if labels else "regression"
    options = {"num_snapshots": 8, "rank": 4, "batch_size": 10**6, "seed": 3}
    found = SWAG(sample.net, kind, num_samples=4000, **options)
    with pytest.MonkeyPatch.context() as patch:
        # The draws alone are tested here; their statistics below.
        patch.setattr(SWAG, "_recomputed", lambda self, module, batches: torch.zeros(0, dtype=DOUBLE))
        patch.setattr(SWAG, "_samples", lambda self, x: torch.zeros(1, len(x), self.lin.num_outputs, dtype=DOUBLE))
        found.fit((sample.x, sample.y))
    iterates = sgd_iterates(sample.net, sample.x, sample.y, 8)
    torch.testing.assert_close(found.mean, iterates.mean(0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.variance, iterates.var(0, correction=0).clamp_min(1e-30), rtol=1e-6, atol=1e-16)
    running = torch.stack([iterates[: k + 1].mean(0) for k in range(8)])
    deviations = (iterates - running)[-4:]
    torch.testing.assert_close(found.deviations, deviations, rtol=1e-6, atol=1e-10)
    covariance = (found.variance.diag() + deviations.T @ deviations / 3) / 2
    scale = covariance.diagonal().sqrt()
    error = (torch.cov(found.weights.T) - covariance) / (scale * scale.unsqueeze(-1))
    assert error.abs().max() < 0.12  # 4000 draws: standard errors up to 0.022
    assert ((found.weights.mean(0) - found.mean) / scale).abs().max() < 0.08


def test_diagonal_swag_has_the_full_variance() -> None:
    sample = reference.problem_r()
    found = SWAG(sample.net, rank=0, num_snapshots=6, num_samples=3000, batch_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SWAG, "_samples", lambda self, x: torch.zeros(1, len(x), 1, dtype=DOUBLE))
        found.fit((sample.x, sample.y))
    ratio = found.weights.var(0) / found.variance
    assert (ratio - 1).abs().max() < 0.15
    assert found.deviations.shape == (0, found.lin.num_parameters)


def test_swag_predicts_with_its_draws_and_their_batch_statistics() -> None:
    sample = reference.batchnorm_net()
    net = copy.deepcopy(sample.net)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = SWAG(net, rank=3, num_snapshots=4, num_samples=5, batch_size=10).fit((sample.x, sample.y))
    assert unchanged(net, before)
    assert torch.equal(torch.get_rng_state(), random)
    outputs = []
    for s in range(5):
        member = copy.deepcopy(net).train()
        torch.nn.utils.vector_to_parameters(found.weights[s], member.parameters())
        for norm in member.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.reset_running_stats()
                norm.momentum = None
        member(sample.x)
        outputs.append(reference.outputs(member, sample.x_test))
    f = torch.stack(outputs)
    p = found.predict(sample.x_test)
    torch.testing.assert_close(p.mean, f.mean(0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(p.latent.variance, f.var(0, correction=0), rtol=1e-6, atol=1e-10)
    fresh = SWAG(net, rank=3, num_snapshots=4, num_samples=5).load_state_dict(found.state_dict(), sample.x)
    assert torch.equal(fresh.predict(sample.x_test).mean, p.mean)


def test_swag_takes_a_loader_and_is_reproducible() -> None:
    sample = reference.problem_c()
    data = TensorDataset(sample.x, sample.y)
    runs = [
        SWAG(sample.net, "classification", num_snapshots=4, rank=2, num_samples=4)
        .fit(DataLoader(data, batch_size=8))
        .predict(sample.x_test)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].probs, runs[1].probs)


def test_refusals_of_swag() -> None:
    net = nn.Linear(3, 1)
    x = torch.randn(20, 3)
    with pytest.raises(ValueError, match="rank: expected 0 or 2 to num_snapshots = 5, got 6"):
        SWAG(net, rank=6, num_snapshots=5)
    with pytest.raises(ValueError, match="learning_rate: expected a positive number"):
        SWAG(net, learning_rate=0.0)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        SWAG(net, learning_rate=1e6).fit((x, x[:, :1]))


def test_swag_says_when_sgd_left_the_trained_weights(caplog) -> None:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).unsqueeze(-1)
    net = nn.Linear(1, 1).double()
    with caplog.at_level("WARNING", logger="ntkgp"):
        SWAG(net, batch_size=10, num_snapshots=5, rank=2, learning_rate=0.01).fit((x, 2 * x))
        assert caplog.text == ""
        SWAG(net, batch_size=10, num_snapshots=5, rank=2, learning_rate=2.0).fit((x, 2 * x))
    assert "SWAG: the training loss of an epoch rose" in caplog.text
