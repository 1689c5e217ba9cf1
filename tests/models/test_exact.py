"""ExactNTKGP against dense weight-space and function-space references on deep, normalised networks."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import ClassVar

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

import ntkgp
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from tests import reference as ref
from tests.architectures import CASES

DOUBLE = torch.float64


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def gaussian(value: float = 0.04) -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = value
    return likelihood


def multitask(rank: int = 0, **kwargs: bool) -> Callable[[int, int], Likelihood]:
    def make(n: int, c: int) -> Likelihood:
        likelihood = MultitaskGaussianLikelihood(num_tasks=c, rank=rank, **kwargs).double()
        with torch.no_grad():
            for i, p in enumerate(likelihood.parameters()):
                p.copy_(-1.0 - i + torch.arange(p.numel()).reshape(p.shape) / 3)
        return likelihood

    return make


def fixed(learned: bool, per_output: bool = False) -> Callable[[int, int], Likelihood]:
    def make(n: int, c: int) -> Likelihood:
        values = 0.05 + torch.arange(n * (c if per_output else 1), dtype=DOUBLE) / 100
        return FixedNoiseGaussianLikelihood(
            values.reshape(n, c) if per_output else values, learn_additional_noise=learned
        ).double()

    return make


LIKELIHOODS: dict[str, tuple[int, Callable[[int, int], Likelihood]]] = {
    "gaussian": (1, lambda n, c: gaussian()),
    "gaussian, 3 outputs": (3, lambda n, c: gaussian()),
    "fixed": (1, fixed(False)),
    "fixed and learned": (1, fixed(True)),
    "fixed, 3 outputs": (3, fixed(False)),
    "fixed per output and learned": (3, fixed(True, per_output=True)),
    "task noise": (3, multitask(has_global_noise=False)),
    "global noise": (3, multitask(has_task_noise=False)),
    "both noises": (3, multitask()),
    "full task covariance": (3, multitask(rank=1)),
}


def dense_noise(likelihood: Likelihood, n: int, c: int) -> Tensor:
    """Covariance of the noise, from the parameters of the likelihood and nothing else."""
    eye = torch.eye(n, dtype=DOUBLE)
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        total = torch.zeros(c, c, dtype=DOUBLE)
        if likelihood.has_task_noise:
            if likelihood.rank:
                factor = likelihood.task_noise_covar_factor
                total = total + factor @ factor.T
            else:
                total = total + likelihood.task_noises.diag()
        if likelihood.has_global_noise:
            total = total + likelihood.noise * torch.eye(c)
        return torch.kron(eye, total).detach()
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        values = likelihood.noise_covar.noise
        values = (values.unsqueeze(-1) if values.ndim == 1 else values).expand(n, c).reshape(-1)
        extra = likelihood.second_noise_covar.noise if likelihood.second_noise_covar is not None else 0.0
        return (values + extra).detach().diag()
    return likelihood.noise.detach() * torch.eye(n * c, dtype=DOUBLE)


class Dense:
    """Posterior of the tangent model in function space, all of it N·C × N·C."""

    def __init__(self, sample: ref.Sample, model: ntkgp.ExactNTKGP, x: Tensor, y: Tensor, x_test: Tensor) -> None:
        names = [set(members) for members in model.lin.groups.members]
        index, theta = ref.index(sample.net, names), ref.theta(sample.net)
        precision = model.kernel.precision.detach()[index]
        j, self.j_test = (ref.jacobian(sample.net, inputs) for inputs in (x, x_test))
        self.f_test = ref.outputs(sample.net, x_test)
        n, c, p = j.shape
        a, b = j.reshape(n * c, p), self.j_test.reshape(-1, p)
        self.t = y.reshape(-1) - ref.outputs(sample.net, x).reshape(-1) + a @ theta
        self.k = ref.gram(a, precision)
        cross, self.prior = ref.gram(b, precision, a), ref.gram(b, precision)
        self.noise = None if model.is_classification else dense_noise(model._given, n, c)
        self.prior_mean = self.f_test - (self.j_test @ theta)
        if self.noise is not None:
            system = self.k + self.noise
            self.mean = self.prior_mean + (cross @ torch.linalg.solve(system, self.t)).reshape(self.prior_mean.shape)
            self.covariance = self.prior - cross @ torch.linalg.solve(system, cross.T)


def regression(
    name: str, mean: str = "network", groups: str = "tensor"
) -> tuple[ref.Sample, ntkgp.ExactNTKGP, Tensor, Tensor]:
    outputs, make = LIKELIHOODS[name]
    sample = ref.batchnorm_net(3) if outputs == 3 else ref.problem_r()
    x, y = sample.x[:20], sample.y[:20]
    given = make(20, outputs)
    model = ntkgp.ExactNTKGP(x, y, given, ntkgp.LinearizedNetwork(sample.net, x, groups=groups), mean).eval()
    object.__setattr__(model, "_given", given)
    if groups == "tensor":
        model.kernel.precision = sample.precision
    return sample, model, x, y


@pytest.mark.parametrize("mean", ["network", "posterior"])
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.filterwarnings("ignore:.*fixed noise.*:gpytorch.utils.warnings.GPInputWarning")
@pytest.mark.filterwarnings("ignore:You have passed data through a Fixed:gpytorch.utils.warnings.GPInputWarning")
def test_posterior_is_the_dense_one(name: str, mean: str) -> None:
    sample, model, x, y = regression(name, mean)
    dense = Dense(sample, model, x, y, sample.x_test)
    latent = model(sample.x_test)
    c = model.num_outputs
    if mean == "network":
        assert error(latent.mean.reshape(-1, c), dense.f_test) < 1e-13
        assert torch.equal(latent.mean.reshape(-1, c), model.lin(sample.x_test))
    else:
        assert error(latent.mean.reshape(-1, c), dense.mean) < 1e-9
    assert error(latent.covariance_matrix, dense.covariance) < 1e-9
    assert error(latent.variance.reshape(-1), dense.covariance.diagonal()) < 1e-9
    if isinstance(model._given, FixedNoiseGaussianLikelihood):
        return
    predictive = model.likelihood(latent)
    noise = dense_noise(model._given, len(sample.x_test), c)
    assert error(predictive.covariance_matrix, dense.covariance + noise) < 1e-9
    assert torch.equal(predictive.mean, latent.mean)


def test_fixed_noise_of_the_test_inputs() -> None:
    sample, model, x, y = regression("fixed")
    dense = Dense(sample, model, x, y, sample.x_test)
    values = torch.rand(len(sample.x_test), dtype=DOUBLE)
    predictive = model.likelihood(model(sample.x_test), noise=values)
    assert error(predictive.variance, dense.covariance.diagonal() + values) < 1e-9


@pytest.mark.parametrize("name", ["gaussian", "gaussian, 3 outputs"])
def test_draws_have_the_joint_covariance(name: str) -> None:
    sample, model, x, y = regression(name)
    latent = model(sample.x_test[:2])
    draws = latent.rsample(torch.Size([4000])).reshape(4000, -1)
    expected = Dense(sample, model, x, y, sample.x_test[:2]).covariance
    assert error(draws.T.cov(), expected) < 0.15


def labels_model(
    outputs: int, curvature: str, mean: str = "posterior"
) -> tuple[ref.Sample, ntkgp.ExactNTKGP, Tensor, Tensor]:
    sample = ref.layernorm_cnn(outputs)
    x = sample.x[:12]
    y = sample.y[:12] % max(outputs, 2)
    likelihood = BernoulliLikelihood() if outputs == 1 else CategoricalLikelihood(num_classes=outputs)
    model = ntkgp.ExactNTKGP(x, y, likelihood, ntkgp.LinearizedNetwork(sample.net, x, groups="layer"), mean)
    model.curvature = curvature
    model.kernel.precision = torch.linspace(0.5, 2.0, len(model.lin.groups), dtype=DOUBLE)
    return sample, model.eval(), x, y


@pytest.mark.parametrize("curvature", ["simple", "full", "quadratic"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_classification_is_the_dense_laplace_posterior(outputs: int, curvature: str) -> None:
    if outputs == 1:
        # One logistic output of the trained three: the same deep body.
        base = ref.layernorm_cnn(3)
        net = copy.deepcopy(base.net)
        net[-1] = nn.Linear(12, 1).double()
        sample = ref.Sample(net, base.x, base.y, base.x_test, base.precision, base.noise)
        x, y = base.x[:12], base.y[:12] % 2
        model = ntkgp.ExactNTKGP(
            x, y, BernoulliLikelihood(), ntkgp.LinearizedNetwork(net, x, groups="layer"), "posterior"
        ).eval()
        model.curvature = curvature
        model.kernel.precision = torch.linspace(0.5, 2.0, len(model.lin.groups), dtype=DOUBLE)
    else:
        sample, model, x, y = labels_model(outputs, curvature)
    index = ref.index(sample.net, [set(members) for members in model.lin.groups.members])
    precision = model.kernel.precision.detach()[index]
    j, theta, f = ref.jacobian(sample.net, x), ref.theta(sample.net), ref.outputs(sample.net, x)
    offset = f - j @ theta
    flat = j.flatten(0, 1)
    if curvature == "quadratic":
        residual = (nn.functional.one_hot(y, outputs) if outputs > 1 else y.unsqueeze(-1)) - ref.probabilities(f)
        hessian = flat.T @ ref.curvature(f) @ flat
        star = torch.linalg.solve(hessian + precision.diag(), hessian @ theta + flat.T @ residual.reshape(-1))
        at = f
    else:
        star = ref.softmax_theta_star(flat, offset, y, precision)
        at = f if curvature == "simple" else offset + j @ star
    posterior = torch.linalg.inv(flat.T @ ref.curvature(at) @ flat + precision.diag())
    j_test = ref.jacobian(sample.net, sample.x_test)
    mean = ref.outputs(sample.net, sample.x_test) + j_test @ (star - theta)
    latent = model(sample.x_test)
    assert error(latent.mean.reshape(mean.shape), mean) < 1e-7
    rows = j_test.flatten(0, 1)
    assert error(latent.covariance_matrix, rows @ posterior @ rows.T) < 1e-9
    probabilities = model.likelihood(latent).probs
    blocks = j_test @ posterior @ j_test.mT
    scaled = mean / (1 + math.pi / 8 * blocks.diagonal(dim1=-2, dim2=-1)).sqrt()
    expected = ref.probabilities(scaled)
    assert error(probabilities.reshape(expected.shape), expected) < 1e-7


def test_network_mean_of_a_classifier_is_the_network() -> None:
    sample, model, _, _ = labels_model(3, "simple", "network")
    assert torch.equal(model(sample.x_test).mean, model.lin(sample.x_test))


# --- evidence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LIKELIHOODS if "full" not in n])
def test_marginal_likelihood_is_the_evidence(name: str) -> None:
    sample, model, x, y = regression(name)
    dense = Dense(sample, model, x, y, sample.x_test)
    model.train()
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    value = mll(model(x), model.train_targets) * y.numel()
    a = dense.k + dense.noise
    expected = torch.distributions.MultivariateNormal(torch.zeros(len(a), dtype=DOUBLE), a).log_prob(dense.t)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    report = ntkgp.fit_evidence(model, max_evaluations=1)
    fitted = mll(model(x), model.train_targets) * y.numel()
    assert report.log_evidence == pytest.approx(fitted.item(), rel=1e-7)


@pytest.mark.parametrize("name", ["gaussian", "gaussian, 3 outputs", "task noise", "fixed", "both noises"])
def test_fit_raises_the_evidence_and_both_methods_agree(name: str) -> None:
    reports = {}
    for method in ("mackay", "lbfgs"):
        _, model, _, _ = regression(name, groups="layer")
        reports[method] = ntkgp.fit_evidence(model, method=method)
        trace = torch.tensor(reports[method].trace)
        assert (trace.diff() >= -1e-9 * trace[1:].abs()).all()
        assert torch.allclose(model.kernel.precision.detach(), reports[method].precision, rtol=1e-4)
    assert reports["mackay"].log_evidence == pytest.approx(reports["lbfgs"].log_evidence, rel=1e-6)


def test_a_full_task_covariance_is_not_fitted_by_the_fixed_point() -> None:
    _, model, _, _ = regression("full task covariance")
    with pytest.raises(ValueError, match="likelihood: fit_evidence learns one noise or one per output"):
        ntkgp.fit_evidence(model)


def test_a_shared_likelihood_sees_the_fitted_noise() -> None:
    _, model, _, _ = regression("gaussian, 3 outputs", groups="layer")
    ntkgp.fit_evidence(model)
    assert model._given.noise.item() == model.likelihood.noise.item() != 0.04


# --- passes over the data --------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A network that counts the rows it is asked about, in a list shared by all copies."""

    rows: ClassVar[list[int]] = []

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        type(self).rows.append(x.shape[0])
        return self.body(x)


def counted(outputs: int, max_memory: str | int = "2GiB") -> tuple[ref.Sample, ntkgp.ExactNTKGP]:
    sample = ref.batchnorm_net(outputs)
    lin = ntkgp.LinearizedNetwork(Counter(sample.net), sample.x, groups="single")
    Counter.rows = []
    return sample, ntkgp.ExactNTKGP(sample.x, sample.y, gaussian(), lin, "posterior", max_memory=max_memory)


def test_later_predictions_make_no_pass_over_the_training_data(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, model = counted(3)
    seen: list[Tensor] = []
    pack = model.lin.packing.leaves
    monkeypatch.setattr(model.lin.packing, "leaves", lambda x: (seen.append(x), pack(x))[1])

    def touched() -> bool:
        hit = any(bool((row == sample.x).all(-1).any()) for x in seen for row in x)
        seen.clear()
        return hit

    model.eval()
    first = model(sample.x_test)
    before = first.covariance_matrix.detach()
    assert touched()
    assert torch.equal(model(sample.x_test).covariance_matrix, before)
    assert not touched()
    assert model(sample.x_test.reshape(3, 2, 4)).covariance_matrix.shape == (3, 6, 6)
    assert model(sample.x_test.clone().requires_grad_()).variance.requires_grad
    assert not touched()
    model.kernel.precision = 3.0
    model.likelihood.noise = 0.3
    changed = model(sample.x_test)
    assert not touched()
    assert error(changed.covariance_matrix, before) > 1e-3
    model.train()
    model.eval()
    ntkgp.fit_evidence(model)
    assert model.likelihood(model(sample.x_test)).variance.shape == (6, 3)
    assert not touched()
    assert model(sample.x + 1).variance.shape == (30, 3)
    assert not touched()
    assert Counter.rows


@pytest.mark.parametrize("outputs", [3])
def test_a_small_budget_gives_the_same(outputs: int) -> None:
    sample, model = counted(outputs)
    latent = model.eval()(sample.x_test)
    _, small = counted(outputs, max_memory=8 * (30 * outputs) ** 2 + 100_000)
    assert small.lin.factors_memory(30) + small.lin.gram_memory(30, 30) > small.max_memory
    found = small.eval()(sample.x_test)
    assert error(found.covariance_matrix, latent.covariance_matrix.detach()) < 1e-10
    assert error(found.mean, latent.mean.detach()) < 1e-10
    with pytest.raises(ValueError, match=r"max_memory: .* smallest possible"):
        counted(outputs, max_memory="10 kB")[1].eval()(sample.x_test)


def test_factors_follow_the_data() -> None:
    sample, model, x, y = regression("gaussian, 3 outputs", "posterior")
    model(sample.x_test)
    model.set_train_data(targets=2 * y)
    assert error(model(sample.x_test).mean, Dense(sample, model, x, 2 * y, sample.x_test).mean) < 1e-9
    model.set_train_data(sample.x[5:15], sample.y[5:15], strict=False)
    dense = Dense(sample, model, sample.x[5:15], sample.y[5:15], sample.x_test)
    assert error(model(sample.x_test).mean, dense.mean) < 1e-9
    assert error(model(sample.x_test).covariance_matrix, dense.covariance) < 1e-9
    with pytest.raises(RuntimeError, match=r"inputs: expected shape \(10, 4\)"):
        model.set_train_data(sample.x)
    with pytest.raises(ValueError, match="train_y: expected shape"):
        model.set_train_data(sample.x, sample.y[:5], strict=False)
    assert model.train_inputs[0].shape == (10, 4)


# --- forms of the inputs ---------------------------------------------------------------------------------------------


def test_batches_of_inputs() -> None:
    for name in ("gaussian", "gaussian, 3 outputs"):
        sample, model, _, _ = regression(name, "posterior")
        batch = torch.stack([sample.x_test[:4], sample.x_test[2:6]]).unsqueeze(1)
        latent = model(batch)
        c = model.num_outputs
        assert latent.mean.shape == ((2, 1, 4) if c == 1 else (2, 1, 4, c))
        for b in range(2):
            single = model(batch[b, 0])
            assert error(latent.mean[b, 0], single.mean.detach()) < 1e-12
            assert error(latent.covariance_matrix[b, 0], single.covariance_matrix.detach()) < 1e-10
            assert error(latent.variance[b, 0], single.variance.detach()) < 1e-10
        predictive = model.likelihood(latent)
        assert error(predictive.variance, latent.variance.detach() + model.likelihood.noise.detach().max()) < 1e-12


def test_one_dimensional_inputs() -> None:
    with ref.seeded(0):
        net = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.linspace(-1, 1, 9)
    lin = ntkgp.LinearizedNetwork(net, x.unsqueeze(-1))
    a = ntkgp.ExactNTKGP(x, torch.sin(x), gaussian(), lin).eval()
    b = ntkgp.ExactNTKGP(x.unsqueeze(-1), torch.sin(x).unsqueeze(-1), gaussian(), lin).eval()
    assert torch.equal(a(x + 0.1).variance, b((x + 0.1).unsqueeze(-1)).variance)
    a.train()
    assert a(x).mean.shape == (9,)


def test_images_raw_and_packed() -> None:
    sample, model, _, _ = labels_model(3, "simple")
    packed = model.lin.pack(sample.x_test)
    assert torch.equal(model(sample.x_test).mean, model(packed).mean)
    assert torch.equal(model(sample.x_test).covariance_matrix, model(packed).covariance_matrix)
    assert model(packed.reshape(1, 5, 1, 36)).mean.shape == (1, 5, 1, 3)


def test_image_outputs() -> None:
    case = CASES["unet_group_norm"]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example, groups="single")
    targets = torch.randn(len(case.example), *lin.output_shape, dtype=DOUBLE)
    model = ntkgp.ExactNTKGP(case.example, targets, gaussian(), lin, "posterior").eval()
    j, f = ref.jacobian(case.net, case.example).flatten(0, 1), ref.outputs(case.net, case.example)
    t = targets.reshape(-1) - f.reshape(-1) + j @ ref.theta(case.net)
    k = j @ j.T
    mean = f.reshape(-1) - j @ ref.theta(case.net) + k @ torch.linalg.solve(k + 0.04 * torch.eye(len(k)), t)
    found = lin.restore(model(case.example).mean)
    assert found.shape == targets.shape
    assert error(found, mean.reshape(targets.shape)) < 1e-8


def test_a_transformers_classifier_end_to_end() -> None:
    pytest.importorskip("transformers")
    case = CASES["hf_bert"]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example, groups="single")
    labels = torch.arange(6) % 3
    model = ntkgp.ExactNTKGP(case.example, labels, CategoricalLikelihood(num_classes=3), lin)
    report = ntkgp.fit_evidence(model)
    predictive = model.eval().likelihood(model(case.example))
    assert predictive.probs.shape == (6, 3)
    assert math.isfinite(report.log_evidence)
    j = ref.jacobian(case.net, case.example)
    flat, precision = j.flatten(0, 1), report.precision.expand(j.shape[-1])
    f = ref.outputs(case.net, case.example)
    system = ref.curvature(f)
    k = ref.gram(flat, precision)
    covariance = k - k @ torch.linalg.solve(torch.eye(18, dtype=DOUBLE) + system @ k, system @ k)
    assert error(model(case.example).covariance_matrix, covariance) < 1e-7


# --- dtypes, copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data_dtype", [torch.float32, torch.float64])
def test_dtypes_of_network_and_data(net_dtype: torch.dtype, data_dtype: torch.dtype) -> None:
    sample = ref.batchnorm_net(3)
    net = copy.deepcopy(sample.net).to(net_dtype)
    x, y = sample.x.to(data_dtype), sample.y.to(data_dtype)
    model = ntkgp.ExactNTKGP(x, y, GaussianLikelihood(), ntkgp.LinearizedNetwork(net, x), "posterior")
    report = ntkgp.fit_evidence(model)
    latent = model.eval()(sample.x_test.to(data_dtype))
    assert latent.mean.dtype == latent.variance.dtype == DOUBLE
    exact = ntkgp.ExactNTKGP(
        sample.x, sample.y, GaussianLikelihood(), ntkgp.LinearizedNetwork(sample.net, sample.x), "posterior"
    )
    assert report.log_evidence == pytest.approx(ntkgp.fit_evidence(exact).log_evidence, rel=1e-3)
    exact.set_hyperparameters(report.precision, report.noise)
    assert error(latent.mean, exact.eval()(sample.x_test).mean.detach()) < 2e-2


@pytest.mark.parametrize("cast", ["double", "float", "half"])
def test_casting_the_model_changes_nothing(cast: str) -> None:
    sample, model, x, _ = regression("gaussian, 3 outputs", "posterior")
    before = model(sample.x_test)
    getattr(model, cast)()
    after = model(sample.x_test)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.covariance_matrix, after.covariance_matrix)
    model.train()
    model(x)


def test_state_dict_round_trip() -> None:
    for name in ("gaussian", "both noises", "fixed and learned"):
        sample, model, _, _ = regression(name, "posterior", "layer")
        ntkgp.fit_evidence(model)
        _, other, _, _ = regression(name, "posterior", "layer")
        other(sample.x_test)
        assert all("theta" not in key and "body" not in key for key in model.state_dict())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(sample.x_test).mean, model(sample.x_test).mean)
        assert torch.equal(other(sample.x_test).variance, model(sample.x_test).variance)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_copies(how: str, kind: str) -> None:
    sample, model, _, _ = regression("task noise") if kind == "regression" else labels_model(3, "simple")
    latent = model(sample.x_test)
    other = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    found = other(sample.x_test)
    assert torch.equal(found.mean, latent.mean)
    assert error(found.covariance_matrix, latent.covariance_matrix.detach()) < 1e-12
    other.kernel.precision = 17.0
    assert not torch.equal(other.kernel.precision, model.kernel.precision)
    assert torch.equal(model(sample.x_test).mean, latent.mean)
    assert other.lin.groups.names == model.lin.groups.names


def test_only_hyper_parameters_are_parameters() -> None:
    _, model, _, _ = regression("gaussian")
    assert sorted(name for name, _ in model.named_parameters()) == [
        "kernel.raw_precision", "likelihood.noise_covar.raw_noise"
    ]  # fmt: skip


def test_nothing_of_the_user_changes() -> None:
    sample = ref.batchnorm_net(3)
    net = copy.deepcopy(sample.net).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y, random = sample.x.clone(), sample.y.clone(), torch.get_rng_state()
    model = ntkgp.ExactNTKGP(x, y, GaussianLikelihood(), ntkgp.LinearizedNetwork(net, x))
    ntkgp.fit_evidence(model)
    assert model.eval()(sample.x_test).covariance_matrix.shape == (18, 18)
    model.train()
    model(x)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, sample.x)
    assert torch.equal(y, sample.y)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


# --- derivatives with respect to the inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["network", "posterior"])
@pytest.mark.parametrize("name", ["gaussian", "gaussian, 3 outputs"])
def test_derivatives_of_the_posterior_in_the_inputs(name: str, mean: str) -> None:
    sample, model, _, _ = regression(name, mean)
    x, h = sample.x_test[:3], 1e-4
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=DOUBLE)
    c = model.num_outputs
    weights = torch.randn(3 * c, 3 * c, generator=generator, dtype=DOUBLE)
    functions = {
        "mean": lambda x: (model(x).mean.reshape(-1) * weights[0]).sum(),
        "variance": lambda x: (model(x).variance.reshape(-1) * weights[1]).sum(),
        "covariance": lambda x: (model(x).covariance_matrix * weights).sum(),
        "predictive": lambda x: model.likelihood(model(x)).variance.log().sum(),
    }
    for label, function in functions.items():
        leaf = x.clone().requires_grad_()
        slope = float((torch.autograd.grad(function(leaf), leaf)[0] * direction).sum())
        step = lambda s: float((function(x + s * direction) - function(x - s * direction)).detach()) / (2 * s)  # noqa: B023, E731
        d1, d2 = step(h), step(2 * h)
        assert slope == pytest.approx((4 * d1 - d2) / 3, rel=1e-5), label


def test_the_posterior_claims_no_gradient_in_the_precisions() -> None:
    sample, model, _, _ = regression("gaussian", "posterior")
    latent = model(sample.x_test)
    assert not latent.mean.requires_grad
    assert not latent.variance.requires_grad
    assert not latent.covariance_matrix.requires_grad


# --- hard data -------------------------------------------------------------------------------------------------------


def test_one_row() -> None:
    for outputs, sample in ((1, ref.problem_r()), (3, ref.batchnorm_net(3))):
        lin = ntkgp.LinearizedNetwork(sample.net, sample.x[:1])
        model = ntkgp.ExactNTKGP(sample.x[:1], sample.y[:1], GaussianLikelihood(), lin)
        report = ntkgp.fit_evidence(model)
        assert math.isfinite(report.log_evidence)
        latent = model.eval()(sample.x_test)
        assert latent.mean.numel() == len(sample.x_test) * outputs
        assert (latent.variance >= 0).all()


def test_duplicated_rows() -> None:
    sample = ref.batchnorm_net(3)
    x, y = sample.x[:8].repeat(4, 1), sample.y[:8].repeat(4, 1)
    lin = ntkgp.LinearizedNetwork(sample.net, x)
    model = ntkgp.ExactNTKGP(x, y, gaussian(4 * 0.04), lin, "posterior").eval()
    other = ntkgp.ExactNTKGP(sample.x[:8], sample.y[:8], gaussian(0.04), lin, "posterior").eval()
    assert error(model(sample.x_test).mean, other(sample.x_test).mean.detach()) < 1e-9
    assert error(model(sample.x_test).covariance_matrix, other(sample.x_test).covariance_matrix.detach()) < 1e-9
    assert math.isfinite(ntkgp.fit_evidence(model).log_evidence)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_targets(value: float) -> None:
    sample = ref.problem_r()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x)
    model = ntkgp.ExactNTKGP(sample.x, torch.full((40,), value), GaussianLikelihood(), lin)
    report = ntkgp.fit_evidence(model)
    assert math.isfinite(report.log_evidence)
    assert report.warnings
    assert (model.eval()(sample.x_test).lazy_covariance_matrix.diagonal() >= 0).all()


def test_one_class_only() -> None:
    sample, model, _, _ = labels_model(3, "simple")
    model.set_train_data(targets=torch.zeros(12, dtype=torch.long))
    report = ntkgp.fit_evidence(model)
    assert math.isfinite(report.log_evidence)
    assert torch.isfinite(model(sample.x_test).variance).all()


# --- bad input -------------------------------------------------------------------------------------------------------


def lin3() -> ntkgp.LinearizedNetwork:
    sample = ref.batchnorm_net(3)
    return ntkgp.LinearizedNetwork(sample.net, sample.x)


X, Y = ref.batchnorm_net(3).x, ref.batchnorm_net(3).y
NAN = float("nan")


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X * NAN, Y, "train_x: NaN or infinite values"),
        (X, Y * float("inf"), "train_y holds NaN or infinite values"),
        (X, Y[:5], r"train_y: expected shape \(30, 3\), got \(5, 3\)"),
        (X, Y[:, 0], r"train_y: expected shape \(30, 3\), got \(30,\)"),
        (X, Y.T, r"train_y: expected shape \(30, 3\), got \(3, 30\)"),
        (X[:0], Y[:0], "train_x has N = 0 rows"),
        (X[:, :2], Y, "train_x: expected"),
        (X[0], Y[:1], "train_x: expected"),
    ],
)
def test_bad_data(x: Tensor, y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ntkgp.ExactNTKGP(x, y, GaussianLikelihood(), lin3())


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [
        (torch.full((30,), 3), ValueError, "3"),
        (torch.full((30,), -1), ValueError, "-1"),
        (torch.zeros(29, dtype=torch.long), ValueError, "shape"),
        (torch.full((30,), 0.5), (ValueError, TypeError), "integer"),
        (torch.full((30,), NAN), (ValueError, TypeError), "NaN"),
        (torch.zeros(30, 3), ValueError, "shape"),
    ],
)
def test_bad_labels(labels: Tensor, kind, words: str) -> None:
    with pytest.raises(kind, match="(labels|train_y).*" + words):
        ntkgp.ExactNTKGP(X, labels, CategoricalLikelihood(num_classes=3), lin3())


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"mean": "zero"}, ValueError, "mean: expected one of"),
        ({"lin": nn.Linear(2, 1)}, TypeError, "lin: expected a ntkgp.LinearizedNetwork, got Linear"),
        ({"likelihood": gpytorch.likelihoods.StudentTLikelihood()}, TypeError, "likelihood: got StudentTLikelihood"),
        ({"likelihood": CategoricalLikelihood(num_classes=4)}, ValueError, r"likelihood: .*num_classes=4.*C = 3"),
        ({"likelihood": BernoulliLikelihood()}, ValueError, "likelihood: BernoulliLikelihood needs one output"),
        ({"likelihood": MultitaskGaussianLikelihood(num_tasks=2)}, ValueError, "likelihood: .*num_tasks=2"),
        ({"train_y": [1.0]}, TypeError, "train_y: expected a tensor, got list"),
        ({"train_y": Y + 1j}, TypeError, "train_y: expected real numbers"),
        ({"max_memory": "lots"}, ValueError, "max_memory: expected"),
    ],
)
def test_bad_arguments(kwargs: dict, kind, words: str) -> None:
    arguments = {"train_x": X, "train_y": Y, "likelihood": GaussianLikelihood(), "lin": lin3()} | kwargs
    with pytest.raises(kind, match=words):
        ntkgp.ExactNTKGP(**arguments)


def test_bad_test_inputs() -> None:
    sample, model, x, _ = regression("gaussian, 3 outputs")
    wrong = "inputs: expected"
    for bad, words in ((x * NAN, "inputs: NaN"), (x[:, :2], wrong), (x[:0], "N = 0"), ("x", wrong)):
        with pytest.raises(ValueError, match=words):
            model(bad)
    model.train()
    with pytest.raises(RuntimeError, match="train on the training inputs"):
        model(sample.x_test)
