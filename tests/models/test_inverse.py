"""InverseNTKGP against the dense oracle: explicit A and J, posterior and evidence in weight space."""

from __future__ import annotations

import copy
import pickle

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from torch import Tensor, nn

import ntkgp
from ntkgp.evidence import evidence_bounds, evidence_objective
from ntkgp.inverse.adapters import from_callables, from_matrix
from ntkgp.inverse.geometry import ParallelBeam
from ntkgp.inverse.imaging import Blur, Inpainting
from ntkgp.inverse.operators import RayTransform
from ntkgp.inverse.total_variation import ScalePrior, TVPredCP
from ntkgp.models.inverse import InverseNTKGP
from tests import reference as ref
from tests.laws.problems import rel
from tests.models.inverse_problems import DOUBLE, InverseProblem, Matrix, dense, problem, rays

KINDS = ("conv", "mlp", "deblur", "inpaint")


def likelihood() -> GaussianLikelihood:
    return GaussianLikelihood(noise_constraint=Positive())


@pytest.mark.parametrize("mean", ["network", "posterior"])
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_of_the_pixels_is_the_dense_one(kind: str, mean: str) -> None:
    p = problem(kind)
    found = p.model(mean=mean).eval()()
    _, star, covariance = dense(p)
    assert rel(found.covariance_matrix, covariance) < 1e-9
    assert rel(found.variance, covariance.diagonal()) < 1e-9
    if mean == "posterior":
        assert rel(found.mean, star) < 1e-9
    else:
        assert torch.equal(found.mean, p.net(p.x).detach().reshape(-1).double())


@pytest.mark.parametrize("groups", ["single", "layer", "normalization", "tensor"])
@pytest.mark.parametrize("at", ["theta_star", "theta_map"])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_evidence_is_the_dense_one(kind: str, at: str, groups: str) -> None:
    p = problem(kind, groups)
    model = p.model()
    objective = evidence_objective(model.evidence_problem(at=at), at)
    noise = torch.full((len(p.aj),), p.noise, dtype=DOUBLE)
    found = objective.evaluate(p.precision)
    if at == "theta_star":
        expected = ref.gaussian_primal(p.aj, p.targets, p.weights, noise, p.index)
        assert found.value == pytest.approx(expected.log_evidence, rel=1e-9)
        assert rel(found.effective_dimension, expected.gamma) < 1e-7
        assert rel(found.squared_norms, expected.norms) < 1e-8
    else:
        expected = ref.map_log_evidence(p.aj, p.targets, p.theta, p.weights, noise, p.index)
        assert found.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("at", ["theta_star", "theta_map"])
def test_evidence_gradient_is_that_of_finite_differences(at: str) -> None:
    p = problem("conv")
    objective = evidence_objective(p.model().evidence_problem(at=at), at)
    x = torch.cat([p.precision.log(), torch.tensor([p.noise], dtype=DOUBLE).log()])
    step = 1e-4 * torch.eye(len(x), dtype=DOUBLE)
    numerical = torch.tensor([(objective(x + s).value - objective(x - s).value) / 2e-4 for s in step], dtype=DOUBLE)
    assert rel(objective(x).gradient, numerical) < 1e-5


def test_marginal_likelihood_is_the_evidence() -> None:
    p = problem("conv")
    model = p.model()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    value = mll(model(), model.train_targets) * len(p.aj)
    noise = torch.full((len(p.aj),), p.noise, dtype=DOUBLE)
    expected = ref.gaussian_log_evidence(ref.gram(p.aj, p.weights), p.targets, noise)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
    value.backward()
    objective = evidence_objective(model.evidence_problem())
    gradient = objective.evaluate(p.precision).gradient
    assert rel(model.kernel.raw_precision.grad.double(), gradient[:-1]) < 1e-5


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_fit_raises_the_evidence_and_both_methods_agree(kind: str) -> None:
    p = problem(kind)
    before = evidence_objective(p.model().evidence_problem()).evaluate(p.precision).value
    reports = [ntkgp.fit_evidence(p.model(), method=method) for method in ("mackay", "lbfgs")]
    assert all(report.converged for report in reports)
    assert reports[0].log_evidence > before
    assert reports[0].log_evidence == pytest.approx(reports[1].log_evidence, abs=1e-5)
    assert reports[0].seconds < 5


def test_the_residual_target_is_refused() -> None:
    with pytest.raises(ValueError, match="targets='residual' is refused"):
        ntkgp.fit_evidence(problem("conv").model(), targets="residual")


def test_known_noise() -> None:
    p = problem("conv")
    noise = 0.01 + 0.1 * torch.rand(len(p.aj), dtype=DOUBLE)
    model = InverseNTKGP(p.y, p.A, FixedNoiseGaussianLikelihood(noise), p.lin, "posterior")
    model.set_hyperparameters(p.precision)
    _, star, covariance = dense(p, noise)
    found = model.eval()()
    assert rel(found.mean, star) < 1e-9
    assert rel(found.covariance_matrix, covariance) < 1e-9
    expected = ref.gaussian_log_evidence(ref.gram(p.aj, p.weights), p.targets, noise)
    assert evidence_objective(model.evidence_problem()).evaluate(p.precision).value == pytest.approx(expected, rel=1e-9)
    assert torch.equal(model.noise_variance, noise.reshape(p.A.data_shape))


def test_learned_noise_beside_a_known_one() -> None:
    p = problem("conv")
    noise = 0.01 + 0.1 * torch.rand(len(p.aj), dtype=DOUBLE)
    model = InverseNTKGP(p.y, p.A, FixedNoiseGaussianLikelihood(noise, learn_additional_noise=True), p.lin)
    objective = evidence_objective(model.evidence_problem())
    expected = ref.gaussian_log_evidence(ref.gram(p.aj, p.weights), p.targets, noise + 0.02)
    assert objective.evaluate(p.precision, torch.tensor([0.02])).value == pytest.approx(expected, rel=1e-9)
    assert ntkgp.fit_evidence(model).noise.shape == (1,)


def test_weighted_noise_has_all_constants() -> None:
    p = problem("conv")
    counts = torch.randint(1, 50, p.A.data_shape)
    model = InverseNTKGP(p.y, p.A, likelihood(), p.lin, "posterior", weights=counts)
    model.set_hyperparameters(p.precision, torch.tensor([p.noise], dtype=DOUBLE))
    scaled = counts.double().flatten() / counts.double().log().mean().exp()
    noise = p.noise / scaled
    assert rel(model.noise_variance.flatten(), noise) < 1e-6
    _, star, covariance = dense(p, noise)
    found = model.eval()()
    assert rel(found.mean, star) < 1e-6
    assert rel(found.covariance_matrix, covariance) < 1e-6
    expected = ref.gaussian_log_evidence(ref.gram(p.aj, p.weights), p.targets, noise)
    value = (
        evidence_objective(model.evidence_problem()).evaluate(p.precision, torch.tensor([p.noise], dtype=DOUBLE)).value
    )
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mean", ["network", "posterior"])
@pytest.mark.parametrize("form", ["dual", "primal", "matrix_free"])
def test_posterior_of_another_operator(form: str, mean: str) -> None:
    p = problem("mlp")
    other = rays(5, 2, seed=9)
    model = p.model(mean=mean, form=form).eval()
    _, star, covariance = dense(p)
    found = model(other)
    image = star if mean == "posterior" else p.image
    assert rel(found.mean, other.rows @ image) < 1e-6
    assert rel(found.covariance_matrix, other.rows @ covariance @ other.rows.T) < 1e-6


@pytest.mark.parametrize("form", ["primal", "matrix_free"])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_other_forms_agree_with_the_dense_oracle(kind: str, form: str) -> None:
    p = problem(kind)
    model = p.model(mean="posterior", form=form).eval()
    assert model.form == form
    found = model()
    _, star, covariance = dense(p)
    assert rel(found.mean, star) < 1e-7
    assert rel(found.variance, covariance.diagonal()) < 1e-6
    assert rel(found.covariance_matrix, covariance) < 1e-6
    vector = torch.randn(len(star), dtype=DOUBLE)
    assert rel(found.lazy_covariance_matrix.matmul(vector), covariance @ vector) < 1e-6


@pytest.mark.parametrize("budget", ["120KiB", "160KiB"])
def test_small_budgets_give_the_same(budget: str) -> None:
    p = problem("conv", count=10)
    model = p.model(mean="posterior", max_memory=budget, form="dual").eval()
    _, star, covariance = dense(p)
    found = model()
    assert model.form == "dual"
    assert model.lin.pixel_grams is None
    assert rel(found.mean, star) < 1e-8
    assert rel(found.covariance_matrix, covariance) < 1e-8
    other = rays(6, 2, seed=9)
    assert rel(model(other).covariance_matrix, other.rows @ covariance @ other.rows.T) < 1e-8


def test_too_little_memory_for_matrices_means_matrix_free() -> None:
    p = problem("conv", count=20)
    model = p.model(max_memory="200KiB")
    assert model.form == "matrix_free"
    assert "measurements" in repr(model)
    with pytest.raises(ValueError, match="fit_sampled_evidence"):
        ntkgp.fit_evidence(model)


@pytest.mark.parametrize("form", ["dual", "matrix_free"])
def test_draws_have_mean_and_covariance(form: str) -> None:
    p = problem("mlp")
    model = p.model(mean="posterior", form=form).eval()
    draws = model.sample(600, torch.Generator().manual_seed(0)).reshape(600, -1)
    _, star, covariance = dense(p)
    sd = covariance.diagonal().sqrt()
    z = (draws.mean(0) - star) / (sd / 600**0.5)
    assert float(z.abs().max()) < 4.5
    ratio = draws.var(0) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 4.5 * (2 / 600) ** 0.5
    sample = torch.cov(draws.T)
    assert rel(sample, covariance) < 0.2


def test_error_maps() -> None:
    p = problem("mlp")
    model = p.model()
    exact = model.standard_deviation()
    assert rel(exact.flatten(), dense(p)[2].diagonal().sqrt()) < 1e-9
    estimated = model.standard_deviation(200, torch.Generator().manual_seed(0))
    assert estimated.shape == (5, 5)
    assert float((estimated / exact - 1).abs().max()) < 4.5 / 400**0.5
    assert model.training


def test_sampled_evidence_is_near_the_exact_optimum() -> None:
    p = problem("conv", "single")
    exact = p.model()
    report = ntkgp.fit_evidence(exact)
    model = p.model(form="matrix_free")
    found = model.fit_sampled_evidence(64, seed=1)
    error = (found.precision.log() - report.precision.log()).abs()
    assert bool((error < 4 * found.log_precision_error + 1e-3).all())
    assert float((found.noise.log() - report.noise.log()).abs()) < 4 * float(found.log_noise_error) + 1e-3
    assert torch.allclose(model.kernel.precision.double(), found.precision, rtol=1e-5)
    low, high = found.report.evidence_bounds
    assert low - 1e-3 <= report.log_evidence + 1e-3
    assert high >= low


def test_prior_mode_is_the_prior_of_the_pixels() -> None:
    p = problem("conv")
    model = p.model().eval()
    with gpytorch.settings.prior_mode(True):
        prior = model()
    assert rel(prior.covariance_matrix, ref.gram(p.j, p.weights)) < 1e-9
    assert rel(prior.mean, p.image - p.j @ p.theta) < 1e-9


def test_bounds_hold_the_exact_values() -> None:
    p = problem("conv")
    model = p.model().eval()
    low, high = model.posterior_bounds(model.lin.rows_of(1), max_iterations=4)
    variance = dense(p)[2].diagonal()
    assert bool((low <= variance * (1 + 1e-9)).all() and (variance <= high * (1 + 1e-9)).all())
    value = evidence_objective(model.evidence_problem()).evaluate(p.precision).value
    below, above = evidence_bounds(model)
    assert below - 1e-6 <= value <= above + 1e-6


def test_nystrom_model_of_measurements() -> None:
    p = problem("conv")
    exact = p.model().eval()
    network = exact.lin
    data = (network.rows_of(0), exact.train_targets)
    model = ntkgp.NystromNTKGP(data, likelihood(), network, num_landmarks=len(p.aj), num_features=len(p.aj))
    model.fit(data)
    model.set_hyperparameters(p.precision, torch.tensor([p.noise], dtype=DOUBLE))
    pixels = network.rows_of(1)
    found = model.eval()(pixels)
    # With every measurement a landmark, the features span all that the data can see.
    observed = p.A.rows @ dense(p)[2] @ p.A.rows.T
    seen = model(network.rows_of(0)).covariance_matrix
    assert torch.equal(found.mean, exact().mean)
    assert rel(seen, observed) < 1e-4


def test_variational_model_of_measurements() -> None:
    p = problem("conv")
    exact = p.model().eval()
    rows = exact.lin.rows_of(0)
    model = ntkgp.VariationalNTKGP(rows, likelihood(), exact.lin, num_data=len(rows), learn_inducing=False)
    model.kernel.precision, model.likelihood.noise = p.precision, p.noise
    model.fit((rows, exact.train_targets), progress=False)
    exact.set_hyperparameters(model.kernel.precision.detach(), model.likelihood.noise.detach())
    found, expected = model.eval()(exact.lin.rows_of(1)), exact()
    assert torch.equal(found.mean, expected.mean)
    assert rel(found.covariance_matrix, expected.covariance_matrix) < 1e-9


def test_a_float32_network() -> None:
    p = problem("conv")
    q = problem("conv", dtype=torch.float32)
    a, b = p.model().eval()(), q.model().eval()()
    assert b.mean.dtype == DOUBLE
    assert rel(b.covariance_matrix, a.covariance_matrix) < 1e-3


def test_every_pixel_that_no_ray_meets_keeps_its_prior_variance_or_less() -> None:
    p = problem("conv")
    rows = p.A.rows.clone()
    rows[:, 7] = 0
    A = Matrix(rows, (6, 6), (5, 3))
    q = InverseProblem(p.net, p.x, A, p.y, "layer")
    found = q.model().eval()()
    prior = ref.gram(q.j, q.weights).diagonal()
    assert bool(torch.isfinite(found.variance).all())
    assert 0 < float(found.variance[7]) <= float(prior[7])
    assert rel(found.variance, dense(q)[2].diagonal()) < 1e-9


def test_one_measurement() -> None:
    p = problem("conv")
    A = Matrix(p.A.rows[:1], (6, 6), (1,))
    q = InverseProblem(p.net, p.x, A, p.y.reshape(-1)[:1], "layer")
    assert rel(q.model().eval()().covariance_matrix, dense(q)[2]) < 1e-9
    ntkgp.fit_evidence(q.model(), max_evaluations=20)


def test_copies_and_state() -> None:
    p = problem("conv")
    model = p.model(mean="posterior").eval()
    expected = model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert rel(twin().covariance_matrix, expected.covariance_matrix) < 1e-12
    fresh = InverseNTKGP(p.y, p.A, likelihood(), p.lin, "posterior").eval()
    fresh.load_state_dict(model.state_dict())
    assert rel(fresh().mean, expected.mean) < 1e-12


def test_new_measurements_keep_the_grams() -> None:
    p = problem("conv")
    model = p.model(mean="posterior").eval()
    model()
    kept = model._kept
    model.set_train_data(targets=2 * p.y)
    q = InverseProblem(p.net, p.x, p.A, 2 * p.y, "layer")
    assert rel(model().mean, dense(q)[1]) < 1e-8
    assert model._kept is kept
    with pytest.raises(ValueError, match="targets: expected shape"):
        model.set_train_data(targets=p.y.T)


def test_reconstruction_and_operator() -> None:
    p = problem("conv")
    model = p.model()
    assert model.operator is p.A
    assert model.image_shape == (6, 6)
    assert torch.equal(model.reconstruction, p.net(p.x).detach().reshape(6, 6))
    assert rel(p.model(mean="posterior").reconstruction.flatten(), dense(p)[1]) < 1e-9


def test_nothing_of_the_user_changes() -> None:
    p = problem("conv")
    net, y = copy.deepcopy(p.net).train(), p.y.clone()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    lin = ntkgp.LinearizedNetwork(net, p.x)
    model = InverseNTKGP(y, p.A, likelihood(), lin)
    ntkgp.fit_evidence(model)
    model.eval()().variance  # noqa: B018
    y.fill_(0.0)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())
    assert bool(model.train_targets.any())


def test_inference_mode_poisons_nothing() -> None:
    p = problem("conv")
    model = p.model()
    with torch.inference_mode():
        model.eval()().variance  # noqa: B018
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    mll(model(), model.train_targets).backward()
    assert bool(torch.isfinite(model.kernel.raw_precision.grad).all())


class Wrong(Matrix):
    def adjoint(self, data: Tensor) -> Tensor:
        return 1.01 * super().adjoint(data)


class Broken(Matrix):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * float("nan")


class Short(Matrix):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[..., :1]


def bad_y(p: InverseProblem, value: float) -> Tensor:
    y = p.y.clone()
    y[1, 2] = value
    return y


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"y": "transposed"}, ValueError, r"y: expected shape \(5, 3\).*looks transposed"),
        ({"y": "stack"}, ValueError, "one model for each image"),
        ({"y": "nan"}, ValueError, "y: 1 of 15 entries are NaN"),
        ({"y": "inf"}, ValueError, "y: 1 of 15 entries are NaN"),
        ({"y": "list"}, TypeError, "y: expected a tensor of real numbers, got list"),
        ({"y": "bool"}, TypeError, "y: expected a tensor of real numbers"),
        ({"A": "matrix"}, TypeError, "A: expected a forward operator.*without image_shape"),
        ({"A": "size"}, ValueError, r"A: takes images of shape \(5, 5\)"),
        ({"A": "wrong"}, ValueError, "adjoint is not its transpose"),
        ({"A": "broken"}, ValueError, "A: gives NaN"),
        ({"A": "short"}, ValueError, "A: expected data"),
        ({"lin": "net"}, TypeError, "lin: expected a ntkgp.LinearizedNetwork"),
        ({"lin": "three"}, ValueError, "lin: was linearised with an example of"),
        ({"lin": "two"}, ValueError, "lin: was linearised with an example of"),
        ({"likelihood": ntkgp.CategoricalLikelihood(num_classes=3)}, TypeError, "likelihood: expected gpytorch's"),
        ({"form": "other"}, ValueError, "form: expected one of"),
        ({"mean": "other"}, ValueError, "mean: expected one of"),
        ({"weights": "zero"}, ValueError, "weights: expected positive numbers, the smallest is 0"),
        ({"weights": "shape"}, ValueError, "weights: expected shape"),
        ({"weights": "known"}, ValueError, "weights: the likelihood has noise variances of its own"),
        ({"x": "two"}, ValueError, "x: expected one input, got N = 2"),
    ],
)
def test_bad_arguments(change: dict, kind: type[Exception], words: str) -> None:
    p = problem("conv")
    many = torch.cat([p.x, p.x.flip(-1) + 0.1, p.x])
    values = {
        "transposed": p.y.T, "stack": torch.stack([p.y, p.y]), "nan": bad_y(p, float("nan")),
        "inf": bad_y(p, float("inf")), "list": [1.0], "bool": p.y > 0, "matrix": p.A.rows, "size": rays(5, 5),
        "wrong": Wrong(p.A.rows, (6, 6), (5, 3)), "broken": Broken(p.A.rows, (6, 6), (5, 3)),
        "short": Short(p.A.rows, (6, 6), (5, 3)), "net": p.net,
        "zero": torch.zeros(5, 3), "shape": torch.ones(4), "known": torch.ones(5, 3),
    }  # fmt: skip
    arguments = {"y": p.y, "A": p.A, "likelihood": likelihood(), "lin": p.lin}
    for name, value in change.items():
        if name == "lin" and value in ("two", "three"):
            value = ntkgp.LinearizedNetwork(p.net, many[:2] if value == "two" else many)
        elif name == "x":
            value = many[:2]
        elif name == "weights" and value == "known":
            arguments["likelihood"] = FixedNoiseGaussianLikelihood(torch.ones(15, dtype=DOUBLE))
        arguments[name] = values.get(value, value) if isinstance(value, str) else value
    with pytest.raises(kind, match=words):
        InverseNTKGP(**arguments)


def test_the_input_may_be_given() -> None:
    p = problem("conv")
    lin = ntkgp.LinearizedNetwork(p.net, torch.rand(3, 1, 6, 6, dtype=DOUBLE), groups="layer")
    model = InverseNTKGP(p.y, p.A, likelihood(), lin, x=p.x)
    assert torch.equal(model.reconstruction, p.net(p.x).detach().reshape(6, 6))


def test_known_noise_of_other_measurements_is_refused() -> None:
    p = problem("conv")
    model = InverseNTKGP(p.y, p.A, FixedNoiseGaussianLikelihood(torch.ones(3, dtype=DOUBLE)), p.lin)
    with pytest.raises(ValueError, match="fixed noise of 3 inputs"):
        model.eval()()


def test_bad_test_operators() -> None:
    model = problem("conv").model().eval()
    with pytest.raises(ValueError, match="x: takes images of shape"):
        model(rays(5, 1))
    with pytest.raises(ValueError, match="indices of rows from 0 to"):
        model(torch.tensor([[500.0]]))
    with pytest.raises(RuntimeError, match="train mode"):
        model.train()(rays(6, 1))


def test_inputs_of_several_tensors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 9), nn.Linear(2, 9)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return torch.tanh(self.a(first)) * self.b(second)

    with ref.seeded(0):
        net = Two().double()
    x = {"first": torch.ones(1, 3, dtype=DOUBLE), "second": torch.tensor([[0.5, -1.0]], dtype=DOUBLE)}
    A = rays(3, 2)
    model = InverseNTKGP(torch.ones(2, 3), A, likelihood(), ntkgp.LinearizedNetwork(net, x, groups="single")).eval()
    j = ref.jacobian(net, x)[0]
    k = j @ j.T
    noise = model.likelihood.noise.detach().double() * torch.ones(6, dtype=DOUBLE)
    expected = ref.gaussian_dual_covariance(A.rows @ k @ A.rows.T, k @ A.rows.T, k, noise)
    assert rel(model().covariance_matrix, expected) < 1e-9


def test_matrix_free_and_exact_agree_for_a_tomogram() -> None:
    """28 × 28 pixels behind 10 angles: means, draws, variances, products, and predictions of other rays."""
    with ref.seeded(0):
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1), nn.Sigmoid()
        ).double()  # fmt: skip
        x = torch.rand(1, 1, 28, 28, dtype=DOUBLE)
    A = RayTransform(ParallelBeam((28, 28), torch.arange(10) * torch.pi / 10, 41))
    truth = torch.zeros(28, 28, dtype=DOUBLE)
    truth[8:20, 10:16] = 1.0
    y = A(truth) + 0.3 * torch.randn(10, 41, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    lin = ntkgp.LinearizedNetwork(net, x)
    models = [InverseNTKGP(y, A, likelihood(), lin, "posterior", form=form) for form in ("dual", "matrix_free")]
    ntkgp.fit_evidence(models[0])
    models[1].load_state_dict(models[0].state_dict())
    exact, free = (model.eval()() for model in models)
    assert rel(free.mean, exact.mean) < 1e-6
    vectors = torch.randn(784, 3, dtype=DOUBLE)
    products = [found.lazy_covariance_matrix.matmul(vectors) for found in (free, exact)]
    assert rel(*products) < 1e-6
    other = RayTransform(ParallelBeam((28, 28), torch.tensor([0.123]), 41))
    seen = [model(other) for model in models]
    assert rel(seen[1].mean, seen[0].mean) < 1e-6
    assert rel(seen[1].variance, seen[0].variance) < 1e-6
    draws = [model.sample(2, torch.Generator().manual_seed(1)) for model in models]
    assert draws[0].shape == (2, 28, 28)
    assert rel(draws[1].mean((1, 2)), draws[0].mean((1, 2))) < 1.0
    k = models[0]._training_side().gram(models[0].kernel.precision.detach())
    operator = models[1]._training_side().operator(*2 * [models[1].lin.rows_of(0)], models[1].kernel.precision)
    assert rel(operator.matmul(torch.eye(410, dtype=DOUBLE)[:, ::40]), k[:, ::40]) < 1e-9


OPERATORS = {
    "rays": lambda: RayTransform(ParallelBeam((6, 6), torch.tensor([0.1, 1.2, 2.0]), 9)),
    "blur": lambda: Blur((6, 6), torch.rand(3, 3, generator=torch.Generator().manual_seed(0))),
    "inpainting": lambda: Inpainting(torch.ones(6, 6, dtype=torch.bool).tril()),
    "matrix": lambda: from_matrix(
        torch.randn(7, 36, generator=torch.Generator().manual_seed(0)).double(), (6, 6), (7,)
    ),
    "callables": lambda: from_callables(lambda x: x.cumsum(-1), None, (6, 6), (6, 6)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_of_the_library(name: str) -> None:
    p, A = problem("conv"), OPERATORS[name]()
    rows = A.matrix().double()
    twin = Matrix(rows, (6, 6), tuple(A.data_shape))
    y = A(torch.rand(6, 6, generator=torch.Generator().manual_seed(1)).double())
    a, b = (InverseProblem(p.net, p.x, operator, y, "layer") for operator in (A, twin))
    found = a.model(mean="posterior").eval()()
    _, star, covariance = dense(b)
    assert rel(found.mean, star) < 1e-6
    assert rel(found.covariance_matrix, covariance) < 1e-6


def test_rays_that_miss_the_image_are_no_repetition() -> None:
    p = problem("conv")
    A = Matrix(torch.cat([p.A.rows, torch.zeros(3, 36, dtype=DOUBLE)]), (6, 6), (6, 3))
    q = InverseProblem(p.net, p.x, A, torch.cat([p.y, torch.zeros(1, 3, dtype=DOUBLE)]), "layer")
    model = q.model()
    assert not any("repeat" in warning for warning in ntkgp.fit_evidence(model).warnings)
    assert float(model.eval()(A).variance[-1]) == 0.0
    twice = InverseProblem(p.net, p.x, Matrix(p.A.rows[[0, 0, 1]], (6, 6), (3,)), p.y.flatten()[[0, 0, 1]], "layer")
    assert any("1 training inputs repeat" in warning for warning in ntkgp.fit_evidence(twice.model()).warnings)


@pytest.mark.parametrize("which", ["tv", "scale"])
def test_hyper_priors_of_images(which: str) -> None:
    p = problem("conv")
    prior = TVPredCP(p.lin, p.x, 0.5, image_shape=(6, 6)) if which == "tv" else ScalePrior()
    plain = ntkgp.fit_evidence(p.model())
    model = p.model()
    report = ntkgp.fit_evidence(model, prior=prior)
    assert report.converged
    assert report.log_evidence <= plain.log_evidence + 1e-6
    log_precision = report.precision.log().requires_grad_()
    prior.log_density(log_precision).backward()
    evidence = evidence_objective(model.evidence_problem()).evaluate(report.precision, report.noise).gradient
    assert float((evidence[:-1] + log_precision.grad).abs().max()) < 1e-3
