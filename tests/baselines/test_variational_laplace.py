"""Variational Laplace against its exact optimum, and its objective against dense algebra."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkgp.baselines.variational_laplace import VariationalLaplace, smooth
from tests import reference
from tests.reference import DOUBLE


def linear(outputs: int = 1, rows: int = 24) -> tuple[nn.Linear, Tensor]:
    with reference.seeded(0) as generator:
        return nn.Linear(3, outputs).double(), torch.randn(rows, 3, generator=generator, dtype=DOUBLE)


def at(net: nn.Module, mean: Tensor) -> nn.Module:
    """A copy of the network with weights μ."""
    copied = copy.deepcopy(net)
    torch.nn.utils.vector_to_parameters(mean, [p for p in copied.parameters() if p.requires_grad])
    return copied


def fisher(net: nn.Module, x: Tensor, noise: Tensor | None) -> Tensor:
    """Diagonal of Σ_n J_nᵀ B_n J_n."""
    j = reference.jacobian(net, x)
    flat = j.reshape(-1, j.shape[-1])
    if noise is not None:
        return (j.square() / noise.unsqueeze(-1)).sum((0, 1))
    return (flat * (reference.curvature(reference.outputs(net, x)) @ flat)).sum(0)


# --- the optimum σ² = 1 / (F/β + 1/s²) ---


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(("variance", "epochs"), [("closed_form", 40), ("gradient", 320)])
def test_linear_model_reaches_the_optimum_by_sampled_outputs(variance: str, epochs: int, temperature: float) -> None:
    # One row per batch and probabilities of ½: (ỹ − p)² = ¼ whatever is drawn, so that sampling has no noise.
    net, x = linear(rows=4)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    y = torch.tensor([0, 1] * 2)
    vl = VariationalLaplace(
        net, "classification", groups="single", precision=4.0, temperature=temperature, variance=variance,
        exact_fisher=False, batch_size=1, learning_rate=1e-9, log_std_rate=1e7, epochs=epochs, decay=0.9999,
    ).fit((x, y))  # fmt: skip
    f = (torch.cat([x, torch.ones(4, 1, dtype=DOUBLE)], -1).square() / 4).sum(0)
    torch.testing.assert_close(vl.variance, 1 / (f / temperature + 4.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_linear_regression_by_drawn_targets_and_by_the_exact_fisher(temperature: float) -> None:
    net, x = linear(outputs=2)
    y = torch.randn(24, 2, dtype=DOUBLE)
    noise = torch.tensor([0.5, 2.0], dtype=DOUBLE)
    options = {
        "groups": "single", "precision": 3.0, "noise": noise, "temperature": temperature, "epochs": 60,
        "learning_rate": 1e-3, "batch_size": 12, "num_draws": 10, "decay": 0.999,
    }  # fmt: skip
    exact = VariationalLaplace(net, **options).fit((x, y))
    expected = 1 / (fisher(net, x, noise) / temperature + 3.0)
    torch.testing.assert_close(exact.variance, expected, rtol=1e-10, atol=0)
    drawn = VariationalLaplace(net, exact_fisher=False, **options).fit((x, y))
    # 1200 squared normals: a standard error of 4 % of F.
    torch.testing.assert_close(drawn.variance, expected, rtol=0.2, atol=0)
    assert not torch.allclose(drawn.variance, expected, rtol=1e-6)


def trained(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Deep normalised smooth networks with several outputs, one logistic output, or several classes."""
    if kind == "regression":
        sample = reference.batchnorm_net()
        return sample.net, sample.x, sample.y
    if kind == "softmax":
        sample = reference.problem_c()
        return sample.net, sample.x, sample.y
    with reference.seeded(1) as generator:
        net = reference.layernorm_mlp(1)
        x = torch.randn(30, 3, generator=generator, dtype=DOUBLE)
        y = (x.sum(-1) > 0).long()
        loss = nn.functional.binary_cross_entropy_with_logits
        reference.train(net, lambda: loss(net(x).squeeze(-1), y.double()), 40)
        return net, x, y


@pytest.mark.parametrize("kind", ["regression", "bound", "binary", "softmax"])
def test_deep_networks_end_at_the_optimum_for_their_mean(kind: str) -> None:
    learned = "bound" if kind == "bound" else None
    kind = "regression" if kind == "bound" else kind
    net, x, y = trained(kind)
    likelihood = "regression" if kind == "regression" else "classification"
    vl = VariationalLaplace(
        net, likelihood, precision=2.0, noise=learned, temperature=0.7, epochs=5, learning_rate=1e-3, batch_size=10
    ).fit((x, y))
    moved = at(net, vl.mean)
    assert (vl.mean - reference.theta(net)).abs().max() > 1e-3
    noise = vl.noise if kind == "regression" else None
    expected = 1 / (fisher(moved, x, noise) / 0.7 + 2.0)
    torch.testing.assert_close(vl.variance, expected, rtol=1e-8, atol=0)
    if kind == "regression":
        j = reference.jacobian(moved, x)
        spread = (y - reference.outputs(moved, x)).square()
        spread = spread + j.square() @ vl.variance if learned else spread
        torch.testing.assert_close(vl.noise, spread.mean(0), rtol=1e-8, atol=0)


def test_precision_of_each_group_by_the_bound() -> None:
    net, x, y = trained("regression")
    vl = VariationalLaplace(net, groups="layer", precision=None, epochs=3).fit((x, y))
    index = vl.lin.groups.index
    second = vl.variance + vl.mean.square()
    expected = torch.stack([1 / second[index == g].mean() for g in range(len(vl.lin.groups))])
    torch.testing.assert_close(vl.precision, expected, rtol=1e-8, atol=0)
    assert vl.precision.std() > 0


# --- the objective ---


def weighted_draws(kind: str, f: Tensor, noise: Tensor | None) -> list[tuple[Tensor, float]]:
    """Targets and weights with which any mean of a quadratic in ỹ − E ỹ is its expectation under the model."""
    if noise is not None:
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * f.numel())
        return [(f + noise.sqrt() * pattern.view_as(f), 1 / len(signs)) for pattern in signs]
    labels = torch.cartesian_prod(*[torch.arange(f.shape[-1])] * len(f))
    p = f.softmax(-1)
    return [(one, float(p[torch.arange(len(f)), one].prod())) for one in labels]


def dense_objective(net: nn.Module, theta: Tensor, variance: Tensor, x: Tensor, y: Tensor, noise: Tensor | None):
    """Minus the objective per point of 30 with β = ½ and λ = 2: E ḡ² = Σ_n J_nᵀ B_n J_n / S², B held."""
    named = dict(net.named_parameters())

    def run(theta: Tensor) -> Tensor:
        parts = zip(named.items(), theta.split([p.numel() for p in named.values()]), strict=True)
        return torch.func.functional_call(net, {name: part.view_as(p) for (name, p), part in parts}, (x,))

    f, size = run(theta), len(x)
    # Row by row: the vmapped backward pass of torch's layer norm has wrong derivatives.
    j = torch.stack([torch.autograd.grad(one, theta, create_graph=True)[0] for one in f.flatten()])
    if noise is not None:
        log_p = -((y - f).square() / noise + (2 * math.pi * noise).log()).sum() / 2
        b = (1 / noise).repeat(size).diag()
    else:
        log_p = -nn.functional.cross_entropy(f, y, reduction="sum")
        b = reference.curvature(f.detach())
    squares = (j * (b @ j)).sum(0) / size**2
    kl = ((variance + theta.square()) * 2 - 1 - (2 * variance).log()).sum() / 2
    fit = -log_p / size + 0.5 / 30 * kl
    return fit, size / 2 * (variance * squares).sum(), squares


@pytest.mark.parametrize("kind", ["regression", "softmax"])
def test_objective_and_its_gradient_in_expectation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with reference.seeded(3):
        net = nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Softplus(), nn.Linear(4, 2)
        ).double()  # fmt: skip
        x = torch.randn(3, 2, dtype=DOUBLE)
        y = torch.randn(3, 2, dtype=DOUBLE) if kind == "regression" else torch.tensor([0, 1, 1])
        variance = 0.02 + 0.1 * torch.rand(sum(p.numel() for p in net.parameters()), dtype=DOUBLE)
    noise = torch.tensor([0.5, 0.8], dtype=DOUBLE) if kind == "regression" else None
    likelihood = "regression" if kind == "regression" else "classification"
    options = {"precision": 2.0, "noise": noise, "temperature": 0.5, "epochs": 1, "learning_rate": 1e-30}
    vl = VariationalLaplace(net, likelihood, **options).fit((x, y))
    theta = reference.theta(net).requires_grad_()
    fit, penalty, squares = dense_objective(net, theta, variance, x, y, noise)
    expected = torch.autograd.grad(fit + penalty, theta, retain_graph=True)[0]
    assert torch.autograd.grad(penalty, theta)[0].norm() > 0.05 * expected.norm()

    found, gradient, found_squares = 0.0, torch.zeros_like(theta), torch.zeros_like(theta)
    for drawn, weight in weighted_draws(kind, reference.outputs(net, x), noise):
        monkeypatch.setattr(vl, "_drawn", lambda outputs, generator, drawn=drawn: drawn)
        mean = theta.detach().clone().requires_grad_()
        loss, g2, _ = vl._loss(mean, variance, x, y, 30, torch.Generator())
        found += weight * float(loss.detach())
        gradient += weight * torch.autograd.grad(loss, mean)[0]
        found_squares += weight * g2
    assert abs(found / float((fit + penalty).detach()) - 1) < 1e-9
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found_squares, squares.detach(), rtol=1e-8, atol=1e-12)


def test_targets_are_drawn_from_the_model() -> None:
    f = torch.tensor([[1.0, -1.0, 0.5]], dtype=DOUBLE).expand(40000, 3)
    x = torch.randn(6, 3, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    softmax = VariationalLaplace(nn.Linear(3, 3).double(), "classification", epochs=1).fit((x, torch.arange(6) % 3))
    counts = torch.bincount(softmax._drawn(f, generator)) / 40000
    assert (counts - f[0].softmax(-1)).abs().max() < 0.01
    binary = VariationalLaplace(nn.Linear(3, 1).double(), "classification", epochs=1).fit((x, torch.arange(6) % 2))
    assert abs(float(binary._drawn(f[:, :1], generator).mean() - f[0, 0].sigmoid())) < 0.01
    noise = torch.tensor([0.1, 1.0, 4.0], dtype=DOUBLE)
    regression = VariationalLaplace(nn.Linear(3, 3).double(), noise=noise, epochs=1).fit((x, x))
    drawn = regression._drawn(f, generator)
    torch.testing.assert_close(drawn.var(0), noise, rtol=0.03, atol=0)
    assert ((drawn.mean(0) - f[0]) / noise.sqrt()).abs().max() < 0.02


def test_what_the_weights_variance_adds_to_the_residuals() -> None:
    net, x, y = trained("regression")
    vl = VariationalLaplace(net, epochs=1, learning_rate=1e-30).fit((x, y))
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([vl._wobble(vl.mean, x, generator) for _ in range(400)]).mean(0)
    expected = (reference.jacobian(net, x).square() @ vl.variance).sum(0)
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0)


def test_training_raises_the_bound() -> None:
    net, x, y = trained("regression")
    noise = torch.full((3,), 0.05, dtype=DOUBLE)

    def bound(vl: VariationalLaplace) -> float:
        moved = at(net, vl.mean)
        f = reference.outputs(moved, x)
        log_p = -((y - f).square() / noise + (2 * math.pi * noise).log()).sum() / 2
        kl = (vl.variance + vl.mean.square() - 1 - vl.variance.log()).sum() / 2
        return float(log_p - (vl.variance * fisher(moved, x, noise)).sum() / 2 - kl)

    start = VariationalLaplace(net, noise=noise, epochs=1, learning_rate=1e-30).fit((x, y))
    end = VariationalLaplace(net, noise=noise, epochs=80, learning_rate=1e-2, batch_size=10).fit((x, y))
    assert bound(start) < -1000
    assert bound(end) > -900


def test_colder_is_narrower() -> None:
    net, x, y = trained("softmax")
    widths = [
        float(VariationalLaplace(net, "classification", temperature=t, epochs=2).fit((x, y)).variance.mean())
        for t in (0.1, 1.0)
    ]
    assert widths[0] < widths[1]


# --- predictions ---


def test_predictions_are_linearised_at_the_mean() -> None:
    net, x, y = trained("regression")
    vl = VariationalLaplace(net, epochs=4, learning_rate=1e-3, batch_size=10, max_memory="200kB").fit((x, y))
    x_test = reference.batchnorm_net().x_test
    moved = at(net, vl.mean)
    j = reference.jacobian(moved, x_test)
    p = vl.predict(x_test)
    torch.testing.assert_close(p.mean, reference.outputs(moved, x_test), rtol=1e-9, atol=1e-12)
    expected = (j * vl.variance) @ j.mT
    torch.testing.assert_close(p.latent.covariance_matrix, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p.covariance_matrix, expected + vl.noise.diag(), rtol=1e-9, atol=1e-12)
    vl.prediction = "network"
    torch.testing.assert_close(vl.predict(x_test).variance, vl.noise.expand(6, 3), rtol=1e-9, atol=0)
    fresh = VariationalLaplace(net).load_state_dict(vl.state_dict(), example=x)
    torch.testing.assert_close(fresh.predict(x_test).covariance_matrix, p.covariance_matrix, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["binary", "softmax"])
def test_probabilities_by_the_probit_link(kind: str) -> None:
    net, x, y = trained(kind)
    vl = VariationalLaplace(net, "classification", epochs=2, precision=0.5).fit((x, y))
    moved = at(net, vl.mean)
    f, j = reference.outputs(moved, x), reference.jacobian(moved, x)
    scaled = f / (1 + math.pi / 8 * (j.square() @ vl.variance)).sqrt()
    found = vl.predict(x).probs.reshape(len(x), -1)
    torch.testing.assert_close(found, reference.probabilities(scaled), rtol=1e-9, atol=1e-12)
    vl.prediction = "network"
    found = vl.predict(x).probs.reshape(len(x), -1)
    torch.testing.assert_close(found, reference.probabilities(f), rtol=1e-9, atol=1e-12)


def test_float32_loaders_and_what_is_left_alone() -> None:
    sample = reference.batchnorm_net()
    net = copy.deepcopy(sample.net).float().train()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    data = TensorDataset(sample.x.float(), sample.y.float())
    vl = VariationalLaplace(net, epochs=3, learning_rate=1e-3).fit(DataLoader(data, batch_size=10, shuffle=True))
    assert vl.mean.dtype == torch.float32
    assert vl.variance.dtype == torch.float64
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in vl.at_mean.frozen.module(torch.device("cpu")).state_dict().items():
        if "running" in name:
            assert torch.equal(value, before[name])
    again = VariationalLaplace(net, epochs=3, learning_rate=1e-3)
    # The loader shuffles by the global random state, which no fit moves.
    again.fit(DataLoader(data, batch_size=10, shuffle=True))
    assert torch.equal(again.mean, vl.mean)


def test_frozen_parameters_are_constants() -> None:
    net, x, y = trained("regression")
    net = copy.deepcopy(net)
    net[0].requires_grad_(False)
    vl = VariationalLaplace(net, epochs=2, learning_rate=1e-3).fit((x, y))
    assert len(vl.variance) == sum(p.numel() for p in net.parameters() if p.requires_grad)
    torch.testing.assert_close(vl.predict(x).mean, reference.outputs(at(net, vl.mean), x), rtol=1e-9, atol=1e-12)


# --- refusals ---


class FunctionalRelu(nn.Module):
    """A ReLU that no module shows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


KINKED = [
    nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.ReLU6(), nn.RReLU(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(),
    nn.SELU(), nn.ELU(alpha=0.5), nn.Threshold(0.1, 0.0), nn.Softshrink(), nn.Hardshrink(),
]  # fmt: skip


@pytest.mark.parametrize("activation", KINKED, ids=lambda a: type(a).__name__)
def test_kinked_activations_are_refused(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 1))
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"have kinks.*smooth\(net\)"):
        VariationalLaplace(net).fit((x, x[:, :1]))


@pytest.mark.parametrize("function", [nn.functional.relu, lambda x: x.clamp(min=0), torch.relu_])
def test_functional_relu_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="have kinks"):
        VariationalLaplace(FunctionalRelu(function)).fit((x, x[:, :1]))


@pytest.mark.parametrize(
    "activation", [nn.Tanh(), nn.Softplus(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.CELU(2.0), nn.Sigmoid()],
    ids=lambda a: type(a).__name__,
)  # fmt: skip
def test_smooth_activations_pass(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 1))
    x = torch.randn(6, 3)
    assert VariationalLaplace(net, epochs=1).fit((x, x[:, :1])).variance.isfinite().all()


def test_smooth_replaces_relus_in_a_copy() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU()), nn.Linear(4, 1))
    soft = smooth(net, sharpness=5.0)
    assert isinstance(net[1], nn.ReLU)
    x = torch.randn(6, 3)
    inner = nn.functional.softplus(net[0](x), beta=5.0)
    expected = net[3](nn.functional.softplus(net[2][0](inner), beta=5.0))
    torch.testing.assert_close(soft(x), expected)
    VariationalLaplace(soft, epochs=1).fit((x, x[:, :1]))
    assert isinstance(smooth(nn.ReLU()), nn.Softplus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "exact"}, "variance: expected one of"),
        ({"prediction": "weights"}, "prediction: expected one of"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"noise": "residual"}, "noise: expected numbers, 'bound' or None"),
        ({"decay": 1.0}, "decay: expected a number in"),
        ({"epochs": 1.5}, "epochs: expected a positive integer"),
        ({"likelihood": "classification", "noise": 1.0}, "noise: expected None"),
    ],
)
def test_refused_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariationalLaplace(nn.Linear(3, 1), **options)


def test_divergence_is_an_error() -> None:
    net, x, y = trained("regression")
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        VariationalLaplace(net, learning_rate=1e200, epochs=3).fit((x, y))
