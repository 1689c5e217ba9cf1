"""The network alone and the prior alone, against dense references."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal

from ntkgp.baselines.point import Point, PriorOnly, fixed_point
from ntkgp.baselines.references import likely_noise
from tests import reference
from tests.reference import DOUBLE


def index_of_tensors(net: nn.Module) -> Tensor:
    return torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(net.parameters())])


def classified(outputs: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained on labels that depend on x, with noise."""
    with reference.seeded(0) as generator:
        net = reference.layernorm_mlp(outputs)
        x = torch.randn(40, 3, generator=generator, dtype=DOUBLE)
        noise = 0.1 * torch.randn(40, 4, generator=generator, dtype=DOUBLE)
        scores = torch.cat([x, x.sum(-1, keepdim=True).sin()], -1) + noise
        y = (x.sum(-1) + noise[:, 0] > 0).long() if outputs == 1 else scores.argmax(-1)
        loss = nn.functional.binary_cross_entropy_with_logits
        if outputs == 1:
            reference.train(net, lambda: loss(net(x).squeeze(-1), y.double()), 150)
        else:
            reference.train(net, lambda: nn.functional.cross_entropy(net(x), y), 150)
        return net, x, y


# --- Point ---


def test_regression_by_training_residuals() -> None:
    sample = reference.batchnorm_net()
    found = Point(sample.net).fit((sample.x, sample.y))
    noise = (sample.y - reference.outputs(sample.net, sample.x)).square().mean(0)
    torch.testing.assert_close(found.noise, noise, rtol=1e-9, atol=0)
    p = found.predict(sample.x_test)
    assert isinstance(p, MultivariateNormal)
    assert p.batch_shape == (6,)
    assert not hasattr(p, "latent")
    f = reference.outputs(sample.net, sample.x_test)
    y = f + 0.1
    torch.testing.assert_close(p.log_prob(y), Normal(f, noise.sqrt()).log_prob(y).sum(-1), rtol=1e-9, atol=1e-9)


def test_one_output_is_a_normal_and_validation_gives_the_noise() -> None:
    sample = reference.problem_r()
    held_out = (sample.x_test, torch.sin(2 * sample.x_test.sum(-1)))
    found = Point(sample.net, validation=held_out).fit((sample.x, sample.y))
    f = reference.outputs(sample.net, sample.x_test)[:, 0]
    p = found.predict(sample.x_test)
    assert isinstance(p, Normal)
    torch.testing.assert_close(p.mean, f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.variance, (held_out[1] - f).square().mean().expand(15), rtol=1e-9, atol=0)
    alone = Point(sample.net).fit((sample.x, sample.y)).predict(sample.x_test)
    assert p.log_prob(held_out[1]).mean() > alone.log_prob(held_out[1]).mean()


@pytest.mark.parametrize("outputs", [1, 4])
def test_temperature_is_where_validation_is_most_likely(outputs: int) -> None:
    net, x, y = classified(outputs)
    generator = torch.Generator().manual_seed(1)
    x_val = torch.randn(50, 3, generator=generator, dtype=DOUBLE)
    # Half of the labels as the network has them: neither certain nor useless.
    f = reference.outputs(net, x_val)
    guess = (f[:, 0] > 0).long() if outputs == 1 else f.argmax(-1)
    random = torch.randint(0, max(outputs, 2), (50,), generator=generator)
    y_val = torch.where(torch.rand(50, generator=generator) < 0.5, guess, random)
    found = Point(net, "classification", validation=(x_val, y_val)).fit((x, y))
    temperature = found.temperature.clone().requires_grad_()
    scaled = f / temperature
    if outputs == 1:
        loss = nn.functional.binary_cross_entropy_with_logits(scaled[:, 0], y_val.double())
    else:
        loss = nn.functional.cross_entropy(scaled, y_val)
    slope = torch.autograd.grad(loss, temperature)[0]
    assert abs(float(slope)) < 1e-7
    assert abs(float(found.temperature) - 1) > 0.05
    p = found.predict(x_val)
    assert isinstance(p, Bernoulli if outputs == 1 else Categorical)
    torch.testing.assert_close(-p.log_prob(y_val.double()).mean(), loss.detach(), rtol=1e-9, atol=0)
    plain = Point(net, "classification").fit((x, y))
    torch.testing.assert_close(plain.predict(x_val).probs.reshape(50, -1), reference.probabilities(f))


def test_the_users_network_and_random_state_stay() -> None:
    sample = reference.batchnorm_net()
    net = copy.deepcopy(sample.net).train()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Point(net).fit((sample.x, sample.y)).predict(sample.x_test)
    PriorOnly(net, groups="tensor").fit((sample.x, sample.y)).predict(sample.x_test)
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", [Point, PriorOnly])
def test_state(method: type) -> None:
    sample = reference.problem_r()
    fitted = method(sample.net).fit((sample.x, sample.y))
    state = fitted.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    fresh = method(sample.net)
    with pytest.raises(ValueError, match="example: expected inputs"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, example=sample.x)
    y = torch.zeros(15, dtype=DOUBLE)
    assert torch.equal(fresh.predict(sample.x_test).log_prob(y), fitted.predict(sample.x_test).log_prob(y))
    with pytest.raises(ValueError, match=r"unexpected \['more'\], missing \['noise'\]"):
        fresh.load_state_dict({name: v for name, v in state.items() if name != "noise"} | {"more": torch.ones(1)})
    with pytest.raises(RuntimeError, match="call fit"):
        method(sample.net).state_dict()


def test_likely_noise_given_variances() -> None:
    # One large residual where the variance is zero: the noise exceeds the mean square.
    squares = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    variance = torch.tensor([1000.0, 0.0], dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(200, 2, generator=generator, dtype=DOUBLE)
    v = 0.5 * torch.rand(200, 2, generator=generator, dtype=DOUBLE)
    for residual, v_n in ((squares.sqrt().unsqueeze(-1), variance.unsqueeze(-1)), (r, v)):
        noise = likely_noise(residual, v_n).requires_grad_()
        total = v_n + noise
        slope = torch.autograd.grad((total.log() + residual.square() / total).sum(), noise)[0]
        assert (slope * noise).abs().max() < 1e-4
    assert float(likely_noise(squares.sqrt().unsqueeze(-1), variance.unsqueeze(-1))) > 0.9


# --- PriorOnly ---


def test_prior_covariance_with_given_numbers() -> None:
    sample = reference.batchnorm_net()
    noise = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    found = PriorOnly(sample.net, groups="tensor", precision=sample.precision, noise=noise)
    p = found.fit((sample.x, sample.y)).predict(sample.x_test)
    j = reference.jacobian(sample.net, sample.x_test)
    expected = (j / sample.precision[index_of_tensors(sample.net)]) @ j.mT
    torch.testing.assert_close(p.latent.covariance_matrix, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p.covariance_matrix, expected + noise.diag(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p.mean, reference.outputs(sample.net, sample.x_test), rtol=1e-9, atol=1e-12)


def test_evidence_is_stationary_for_groups_and_one_noise_per_output() -> None:
    sample = reference.batchnorm_net()
    found = PriorOnly(sample.net, groups="layer").fit((sample.x, sample.y))
    j = reference.jacobian(sample.net, sample.x)
    theta = reference.theta(sample.net)
    targets = (sample.y - reference.outputs(sample.net, sample.x) + j @ theta).flatten()
    index = found.lin.groups.index
    logs = torch.cat([found.precision.log(), found.noise.log()]).requires_grad_()
    precision, noise = logs[: len(found.precision)].exp(), logs[len(found.precision) :].exp()
    flat = j.reshape(90, -1)
    covariance = (flat / precision[index]) @ flat.T + noise.repeat(30).diag()
    evidence = MultivariateNormal(torch.zeros(90, dtype=DOUBLE), covariance).log_prob(targets)
    slope = torch.autograd.grad(evidence, logs)[0]
    inside = (logs.detach().abs() < 19.9) & (logs.detach() > math.log(2e-12))
    assert int(inside.sum()) >= 5
    assert slope[inside].abs().max() < 1e-3


@pytest.mark.parametrize("outputs", [1, 4])
def test_evidence_of_labels_is_stationary_in_weight_space(outputs: int) -> None:
    net, x, y = classified(outputs)
    found = PriorOnly(net, "classification", groups="tensor").fit((x, y))
    j, f, theta = reference.jacobian(net, x), reference.outputs(net, x), reference.theta(net)
    flat = j.reshape(-1, len(theta))
    onehot = y.double().unsqueeze(-1) if outputs == 1 else nn.functional.one_hot(y, 4).double()
    h = flat.T @ reference.curvature(f) @ flat
    b = h @ theta + flat.T @ (onehot - reference.probabilities(f)).flatten()

    def evidence(logs: Tensor) -> Tensor:
        """Log of ∫ exp(quadratic expansion at the weights) dN(0, Λ⁻¹), up to a constant."""
        full = logs.exp()[index_of_tensors(net)]
        posterior = h + full.diag()
        return b @ torch.linalg.solve(posterior, b) / 2 - (torch.logdet(posterior) - full.log().sum()) / 2

    logs = found.precision.log().requires_grad_()
    value = evidence(logs)
    slope = torch.autograd.grad(value, logs)[0]
    pruned = logs.detach() > 19.9
    assert not pruned.all()
    assert slope[~pruned].abs().max() < 1e-3
    generator = torch.Generator().manual_seed(0)
    others = 14 * torch.rand(50, 4, generator=generator, dtype=DOUBLE) - 4
    assert all(evidence(other) < value for other in others)


def test_probit_link_on_the_prior() -> None:
    sample = reference.problem_c()
    found = PriorOnly(sample.net, "classification", precision=2.0).fit((sample.x, sample.y))
    j, f = reference.jacobian(sample.net, sample.x_test), reference.outputs(sample.net, sample.x_test)
    variance = j.square().sum(-1) / 2
    expected = (f / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
    p = found.predict(sample.x_test)
    torch.testing.assert_close(p.probs, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p.latent.variance, variance, rtol=1e-9, atol=1e-12)
    mc = PriorOnly(sample.net, "classification", precision=2.0, link="mc").fit((sample.x, sample.y))
    draws = MultivariateNormal(f, j @ j.mT / 2).sample((20000,)).softmax(-1).mean(0)
    assert (mc.predict(sample.x_test).probs - draws).abs().max() < 0.06  # 512 draws against 20000


@pytest.mark.parametrize("labels", [False, True])
def test_precision_by_validation_is_a_minimum(labels: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=generator, dtype=DOUBLE)
    if labels:
        net, x_train, y_train = classified(4)
        random = torch.randint(0, 4, (40,), generator=generator)
        y = torch.where(torch.arange(40) % 3 > 0, reference.outputs(net, x).argmax(-1), random)
    else:
        sample = reference.problem_r()
        net, x_train, y_train, y = sample.net, sample.x, sample.y, torch.sin(2 * x.sum(-1))
    kind = "classification" if labels else "regression"
    found = PriorOnly(net, kind, groups="single", validation=(x, y)).fit((x_train, y_train))

    def loss(factor: float) -> float:
        noise = None if labels else found.noise
        other = PriorOnly(net, kind, groups="single", precision=found.precision * factor, noise=noise)
        return -float(other.fit((x_train, y_train)).predict(x).log_prob(y).mean())

    assert loss(1.0) < loss(1.2)
    assert loss(1.0) < loss(0.8)


def test_fixed_point_finds_known_hyperparameters() -> None:
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(600, 20, generator=generator, dtype=DOUBLE)
    precision = torch.tensor([0.25, 25.0], dtype=DOUBLE)
    theta = torch.randn(20, generator=generator, dtype=DOUBLE) / precision.repeat_interleave(10).sqrt()
    t = j @ theta + 0.3 * torch.randn(600, generator=generator, dtype=DOUBLE)
    grams = torch.stack([j[:, :10] @ j[:, :10].T, j[:, 10:] @ j[:, 10:].T])
    found, noise = fixed_point(grams, t.unsqueeze(-1), torch.ones(1, dtype=DOUBLE), torch.tensor([10, 10]))
    assert abs(float(noise) - 0.09) < 0.02
    empirical = 10 / theta.square().reshape(2, 10).sum(-1)
    torch.testing.assert_close(found, empirical, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": -1.0}, "precision: expected positive"),
        ({"precision": torch.ones(7)}, "precision: expected one number or 2"),
        ({"noise": torch.ones(3)}, "noise: expected one number or 1"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    sample = reference.problem_r()
    with pytest.raises(ValueError, match=message):
        PriorOnly(sample.net, groups=_two_groups(sample.net), **options).fit((sample.x, sample.y))


def _two_groups(net: nn.Module):
    from ntkgp.linearization import ParameterGroups

    names = [name for name, _ in net.named_parameters()]
    return ParameterGroups({"first": names[:1], "rest": names[1:]})


def test_refusals_at_construction() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="link: expected"):
        PriorOnly(net, link="logit")
    with pytest.raises(ValueError, match="noise: expected None"):
        PriorOnly(net, "classification", noise=1.0)
    with pytest.raises(ValueError, match="likelihood: expected"):
        Point(net, "poisson")


def test_the_bridge_needs_classes() -> None:
    net, x, y = classified(1)
    with pytest.raises(ValueError, match="link: expected one of"):
        PriorOnly(net, "classification", precision=1.0, link="bridge").fit((x, y))
