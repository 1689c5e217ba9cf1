"""ExactNTKGP in weight space against data space and against the dense oracle, on deep, normalised networks."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ntkgp
from ntkgp.evidence import evidence_objective
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.models.forms import dual_form
from tests import reference as ref

DOUBLE = torch.float64
TOLERANCE = 1e-8
POINTS = 80

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fixed noise.*:gpytorch.utils.warnings.GPInputWarning"),
    pytest.mark.filterwarnings("ignore:You have passed data through a Fixed:gpytorch.utils.warnings.GPInputWarning"),
]


def net(outputs: int, seed: int = 0) -> nn.Module:
    """Four layers, two norms, P = 62 parameters for one output and 72 for three: fewer than rows of the data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Linear(2, 5),
            nn.LayerNorm(5),
            nn.Tanh(),
            nn.Linear(5, 4),
            nn.LayerNorm(4),
            nn.Tanh(),
            nn.Linear(4, outputs),
        )
        with torch.no_grad():
            for p in body.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return body.double().eval()


def data(outputs: int, points: int = POINTS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(points + 7, 2, dtype=DOUBLE, generator=generator)
    y = torch.stack([torch.sin((c + 1.5) * x[:, 0]) + x[:, 1] * (c + 1) / 3 for c in range(outputs)], -1)
    y = y + 0.2 * torch.randn(y.shape, dtype=DOUBLE, generator=generator)
    return x[:points], y[:points], x[points:]


def gaussian(n: int, c: int) -> Likelihood:
    return GaussianLikelihood().double()


def multitask(**kwargs: bool) -> Callable[[int, int], Likelihood]:
    return lambda n, c: MultitaskGaussianLikelihood(num_tasks=c, **kwargs).double()


def fixed(learned: bool, distinct: int = 10**6) -> Callable[[int, int], Likelihood]:
    def make(n: int, c: int) -> Likelihood:
        values = 0.05 + (torch.arange(n, dtype=DOUBLE) % distinct) / (10 * min(distinct, n))
        return FixedNoiseGaussianLikelihood(values, learn_additional_noise=learned).double()

    return make


REGRESSIONS: dict[str, tuple[int, Callable[[int, int], Likelihood]]] = {
    "gaussian": (1, gaussian),
    "gaussian, 3 outputs": (3, gaussian),
    "task noise": (3, multitask(has_global_noise=False)),
    "global noise": (3, multitask(has_task_noise=False)),
    "both noises": (3, multitask()),
    "fixed": (1, fixed(False)),
    "fixed, 3 outputs": (3, fixed(False)),
    "fixed and learned, all different": (1, fixed(True)),
    "fixed and learned, two kinds": (3, fixed(True, 2)),
}
CLASSES = [(1, "simple"), (1, "quadratic"), (1, "full"), (3, "simple"), (3, "quadratic"), (3, "full")]


def pair(
    likelihood: Callable[[], Likelihood], c: int, x: Tensor, y: Tensor, groups: str = "layer", **kwargs: str
) -> tuple[ntkgp.ExactNTKGP, ntkgp.ExactNTKGP]:
    network = net(c)
    models = []
    for form in ("dual", "primal"):
        lin = ntkgp.LinearizedNetwork(network, x, groups=groups)
        model = ntkgp.ExactNTKGP(x, y, likelihood(), lin, form=form, **kwargs).eval()
        assert model.form == form
        model.kernel.precision = torch.linspace(0.5, 3.0, len(lin.groups), dtype=DOUBLE)
        models.append(model)
    return models[0], models[1]


def regression(name: str, points: int = POINTS, **kwargs: str) -> tuple[ntkgp.ExactNTKGP, ntkgp.ExactNTKGP, Tensor]:
    c, make = REGRESSIONS[name]
    x, y, test = data(c, points)
    return *pair(lambda: make(points, c), c, x, y, **kwargs), test


def classification(c: int, points: int = POINTS, **kwargs: str) -> tuple[ntkgp.ExactNTKGP, ntkgp.ExactNTKGP, Tensor]:
    x, y, test = data(max(c, 2), points)
    labels = (y + 0.4 * torch.cos(3 * y.flip(-1))).argmax(-1)
    make = BernoulliLikelihood if c == 1 else lambda: CategoricalLikelihood(num_classes=c)
    return *pair(make, c, x, labels, **kwargs), test


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = (found.detach() - expected.detach()).abs().max() / expected.detach().abs().max().clamp_min(1e-300)
    assert float(error) < tolerance, float(error)


def same_evaluation(dual: ntkgp.ExactNTKGP, primal: ntkgp.ExactNTKGP, at: str, **options: str) -> None:
    """Evidence, gradient and everything else at four points, the limits and the start."""
    problems = [model.evidence_problem(at=at, **options) for model in (dual, primal)]
    a, b = (evidence_objective(problem, at) for problem in problems)
    close(b.start(), a.start())
    for found, expected in zip(b.limits(), a.limits(), strict=True):
        close(found, expected)
    assert b.size == a.size
    assert problems[1].max_dimension == problems[0].max_dimension
    for shift in (0.0, 0.7, -1.1, 2.0):
        x = (a.start() + shift * torch.linspace(-1, 1, len(a.start()), dtype=DOUBLE)).clamp(*a.limits())
        expected, found = a(x), b(x)
        assert found.value == pytest.approx(expected.value, rel=TOLERANCE)
        for name in ("gradient", "effective_dimension", "squared_norms"):
            close(getattr(found, name), getattr(expected, name))
        if at == "theta_star" and options.get("targets") != "residual":
            expected_shift, found_shift = a.squared_shift(x), b.squared_shift(x)
            assert found_shift[0] == pytest.approx(expected_shift[0], rel=1e-7)
            close(found_shift[1], expected_shift[1], 1e-7)


def same_predictions(dual: ntkgp.ExactNTKGP, primal: ntkgp.ExactNTKGP, test: Tensor) -> None:
    for mean in ("network", "posterior"):
        dual.mean = primal.mean = mean
        expected, found = dual(test), primal(test)
        close(found.mean, expected.mean)
        close(found.covariance_matrix, expected.covariance_matrix)
        close(found.variance, expected.variance)
        if not isinstance(dual.likelihood, FixedNoiseGaussianLikelihood) and not dual.is_classification:
            close(primal.likelihood(found).variance, dual.likelihood(expected).variance)


@pytest.mark.parametrize("at", ["theta_star", "theta_map"])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression_evidence(name: str, at: str) -> None:
    dual, primal, _ = regression(name)
    same_evaluation(dual, primal, at)


def test_sse_of_regression() -> None:
    for name in ("gaussian", "task noise"):
        dual, primal, _ = regression(name)
        a, b = (evidence_objective(model.evidence_problem()) for model in (dual, primal))
        assert b(a.start()).sse == pytest.approx(a(a.start()).sse, rel=TOLERANCE)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression_predictions(name: str) -> None:
    dual, primal, test = regression(name)
    same_predictions(dual, primal, test)


@pytest.mark.parametrize("groups", ["normalization", "single"])
def test_residual_targets(groups: str) -> None:
    dual, primal, _ = regression("gaussian, 3 outputs", groups=groups)
    same_evaluation(dual, primal, "theta_star", targets="residual")


@pytest.mark.parametrize(("c", "curvature"), CLASSES)
def test_classification_predictions(c: int, curvature: str) -> None:
    dual, primal, test = classification(c)
    dual.curvature = primal.curvature = curvature
    same_predictions(dual, primal, test)


@pytest.mark.parametrize("at", ["theta_star", "theta_map"])
@pytest.mark.parametrize(("c", "curvature"), [case for case in CLASSES if case[1] != "full"])
def test_classification_evidence(c: int, curvature: str, at: str) -> None:
    dual, primal, _ = classification(c)
    same_evaluation(dual, primal, at, curvature=curvature)


def test_classification_residual_targets() -> None:
    dual, primal, _ = classification(3)
    same_evaluation(dual, primal, "theta_star", targets="residual")


def same_report(a: ntkgp.evidence.EvidenceReport, b: ntkgp.evidence.EvidenceReport) -> None:
    assert b.converged
    assert a.converged
    assert b.log_evidence == pytest.approx(a.log_evidence, rel=TOLERANCE)
    # Flat directions of log λ are known to the square root of the tolerance only.
    for name in ("precision", "noise", "effective_dimension", "theta_star_norm"):
        if getattr(a, name).numel():
            close(getattr(b, name), getattr(a, name), 1e-4)
    assert b.theta_shift == pytest.approx(a.theta_shift, rel=1e-5)
    assert (a.residual_noise is None) == (b.residual_noise is None)
    if a.residual_noise is not None:
        close(b.residual_noise, a.residual_noise)
    for name in ("group_names", "group_sizes", "pruned", "eigenvalues_cut", "method", "at"):
        assert getattr(b, name) == getattr(a, name), name


@pytest.mark.parametrize("name", ["gaussian", "task noise", "fixed", "fixed and learned, two kinds"])
@pytest.mark.parametrize("groups", ["single", "normalization"])
def test_regression_report(name: str, groups: str) -> None:
    dual, primal, _ = regression(name, groups=groups)
    same_report(ntkgp.fit_evidence(dual), ntkgp.fit_evidence(primal))


@pytest.mark.parametrize(("c", "curvature"), [(1, "full"), (3, "simple"), (3, "quadratic"), (3, "full")])
def test_classification_report(c: int, curvature: str) -> None:
    dual, primal, _ = classification(c)
    found = [ntkgp.fit_evidence(model, curvature=curvature) for model in (dual, primal)]
    same_report(*found)


# --- against the dense oracle -------------------------------------------------------------------------


def test_regression_is_the_dense_weight_space_posterior() -> None:
    _, model, test = regression("gaussian, 3 outputs")
    x, y = model.train_inputs[0], model.train_targets
    network, lin = net(3), model.lin
    j, index = ref.jacobian(network, x), lin.groups.index
    theta, f = ref.theta(network), ref.outputs(network, x)
    t = (y - f + j @ theta).reshape(-1)
    noise = model.likelihood.noise.detach().expand(len(t))
    rows = j.flatten(0, 1)
    expected = ref.gaussian_primal(rows, t, model.kernel.precision.detach()[index], noise, index)
    found = evidence_objective(model.evidence_problem()).evaluate(model.kernel.precision.detach())
    assert found.value == pytest.approx(expected.log_evidence, rel=1e-10)
    close(found.effective_dimension, expected.gamma, 1e-9)
    close(found.squared_norms, expected.norms, 1e-9)
    model.mean = "posterior"
    latent, j_test = model(test), ref.jacobian(network, test)
    close(latent.mean, ref.outputs(network, test) + j_test @ (expected.theta_star - theta), 1e-9)
    b = j_test.flatten(0, 1)
    close(latent.covariance_matrix, b @ expected.covariance @ b.T, 1e-9)


# --- shapes of the problem ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "task noise", "fixed"])
def test_fewer_rows_than_parameters(name: str) -> None:
    dual, primal, test = regression(name, points=10)
    same_evaluation(dual, primal, "theta_star")
    same_predictions(dual, primal, test)


@pytest.mark.parametrize(("c", "curvature"), CLASSES)
def test_fewer_labels_than_parameters(c: int, curvature: str) -> None:
    dual, primal, test = classification(c, points=10)
    dual.curvature = primal.curvature = curvature
    same_predictions(dual, primal, test)
    if curvature != "full":
        same_evaluation(dual, primal, "theta_star", curvature=curvature)


def test_one_point() -> None:
    dual, primal, test = regression("gaussian", points=1)
    same_evaluation(dual, primal, "theta_star")
    same_predictions(dual, primal, test)


def test_rank_deficient_jacobian_with_dead_units() -> None:
    x, y, test = data(2)
    network = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=DOUBLE) + i).reshape(p.shape))
        network[0].bias[:3] = -50.0  # three units are never on: columns of zeros
    models = [
        ntkgp.ExactNTKGP(x, y, gaussian(0, 0), ntkgp.LinearizedNetwork(network, x, groups="tensor"), form=form).eval()
        for form in ("dual", "primal")
    ]
    assert torch.linalg.matrix_rank(models[0].lin.jacobian(x).flatten(0, 1)) < models[0].lin.num_parameters - 10
    same_evaluation(*models, "theta_star")
    same_predictions(*models, test)
    same_report(*(ntkgp.fit_evidence(model) for model in models))


def test_no_jacobian_reaches_the_data() -> None:
    x, y, test = data(1)
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        network[0].bias.fill_(-50.0)
        network[0].weight.fill_(0.1)
    lin = ntkgp.LinearizedNetwork(network, x, groups="single")
    a, b = (ntkgp.ExactNTKGP(x, y, gaussian(0, 0), lin, form=form).eval() for form in ("dual", "primal"))
    values = [evidence_objective(m.evidence_problem()).evaluate(torch.ones(1)).value for m in (a, b)]
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    assert torch.equal(b(test).lazy_covariance_matrix.diagonal(), torch.zeros(len(test), dtype=DOUBLE))


def test_float32_network() -> None:
    x, y, test = data(1)
    network = net(1).float()
    models = [
        ntkgp.ExactNTKGP(x.float(), y, gaussian(0, 0), ntkgp.LinearizedNetwork(network, x.float()), form=form).eval()
        for form in ("dual", "primal")
    ]
    a, b = (evidence_objective(model.evidence_problem()) for model in models)
    assert b(a.start()).value == pytest.approx(a(a.start()).value, rel=1e-6)
    close(models[1](test.float()).variance, models[0](test.float()).variance, 1e-5)


# --- warnings of the report ---------------------------------------------------------------------------


def test_repeated_inputs_and_constant_targets_are_reported() -> None:
    x, y, _ = data(1)
    x, y = torch.cat([x, x[5:9], x[5:6]]), torch.ones(len(x) + 5, dtype=DOUBLE)
    models = pair(lambda: gaussian(0, 0), 1, x, y)
    found = [set(ntkgp.fit_evidence(model).warnings) for model in models]
    assert found[0] == found[1]
    assert "constant targets: all training targets are equal" in found[1]
    assert "5 training inputs repeat another one (equal rows in every Gram)" in found[1]
    labels = torch.zeros(len(x), dtype=torch.long)
    _, primal = pair(BernoulliLikelihood, 1, x, labels)
    assert "constant targets: all training targets are equal" in ntkgp.fit_evidence(primal).warnings


# --- samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian, 3 outputs", "fixed", "softmax"])
def test_samples_have_the_posterior_of_the_model(name: str) -> None:
    _, model, test = classification(3) if name == "softmax" else regression(name)
    model.mean = "posterior"
    weights = model.sample_functions(20000, torch.Generator().manual_seed(0)).weights
    latent = model(test)
    draws = latent.mean.detach().reshape(-1) + weights @ model.lin.jacobian(test).flatten(0, 1).T
    mean, covariance = latent.mean.detach().reshape(-1), latent.covariance_matrix.detach()
    scale = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / scale).abs().max()) < 5 / math.sqrt(20000)
    assert float(((draws.T.cov() - covariance) / torch.outer(scale, scale)).abs().max()) < 5 * math.sqrt(2 / 20000)


def test_samples_make_no_pass_and_are_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, test = regression("gaussian")
    model(test)
    expected = model.sample_functions(3, torch.Generator().manual_seed(1))(test)
    found = model.sample_functions(3, torch.Generator().manual_seed(1))
    monkeypatch.setattr("ntkgp.models.visits.jacobian_rows", None)
    assert torch.equal(found(test), expected)


# --- loaders ------------------------------------------------------------------------------------------


class Ragged(Dataset):
    """Batches by hand: one of them empty, the last one short."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.parts = [slice(0, 30), slice(30, 30), slice(30, 61), slice(61, len(x))]
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[self.parts[i]], self.y[self.parts[i]]


def loaders(x: Tensor, y: Tensor) -> dict[str, Dataset | DataLoader]:
    whole = TensorDataset(x, y)
    return {
        "dataset": whole,
        "ragged": DataLoader(whole, batch_size=17),
        "shuffled": DataLoader(whole, batch_size=17, shuffle=True),
        "empty batch": DataLoader(Ragged(x, y), batch_size=None),
    }


@pytest.mark.parametrize("kind", ["dataset", "ragged", "shuffled", "empty batch"])
def test_loader_is_the_tensors(kind: str) -> None:
    dual, _, test = regression("task noise")
    x, y = dual.train_inputs[0], dual.train_targets
    model = ntkgp.ExactNTKGP(loaders(x, y)[kind], None, REGRESSIONS["task noise"][1](0, 3), dual.lin).eval()
    model.kernel.precision = dual.kernel.precision.detach()
    assert (model.form, model.train_inputs, model.train_targets) == ("primal", None, None)
    state = torch.get_rng_state()
    same_predictions(dual, model, test)
    same_evaluation(dual, model, "theta_star")
    assert torch.equal(torch.get_rng_state(), state)
    same_report(ntkgp.fit_evidence(dual), ntkgp.fit_evidence(model))


@pytest.mark.parametrize("kind", ["shuffled", "empty batch"])
@pytest.mark.parametrize("curvature", ["simple", "full"])
def test_classification_from_a_loader(kind: str, curvature: str) -> None:
    dual, _, test = classification(3, 150)
    x, y = dual.train_inputs[0], dual.train_targets
    # Rows are not kept in this budget: every pass makes them anew.
    source = loaders(x, y)[kind]
    model = ntkgp.ExactNTKGP(source, None, CategoricalLikelihood(num_classes=3), dual.lin, max_memory="400kB").eval()
    model.kernel.precision = dual.kernel.precision.detach()
    dual.curvature = model.curvature = curvature
    same_predictions(dual, model, test)
    assert model._training_side()._visits._kept is None


def test_few_rows_from_a_loader() -> None:
    dual, _, test = regression("gaussian", points=9)
    source = TensorDataset(dual.train_inputs[0], dual.train_targets)
    model = ntkgp.ExactNTKGP(source, None, gaussian(0, 0), dual.lin).eval()
    model.kernel.precision = dual.kernel.precision.detach()
    same_predictions(dual, model, test)
    same_evaluation(dual, model, "theta_star")


def test_data_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, test = data(1)
    reads = []

    class Counted(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            reads.append(i)
            return super().__getitem__(i)

    model = ntkgp.ExactNTKGP(Counted(x, y), None, gaussian(0, 0), ntkgp.LinearizedNetwork(net(1), x))
    ntkgp.fit_evidence(model)
    model.eval()(test)
    model.sample_functions(2)
    assert len(reads) == len(x)


# --- bad input ----------------------------------------------------------------------------------------


def from_batches(parts: list[tuple[Tensor, Tensor]], c: int = 1) -> ntkgp.ExactNTKGP:
    class Listed(Dataset):
        def __len__(self) -> int:
            return len(parts)

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return parts[i]

    lin = ntkgp.LinearizedNetwork(net(c), parts[0][0][:2])
    likelihood = gaussian(0, 0) if c == 1 else CategoricalLikelihood(num_classes=c)
    loader = DataLoader(Listed(), batch_size=None)
    return ntkgp.ExactNTKGP(loader, None, likelihood, lin, max_memory="400kB" if c > 1 else "2GiB").eval()


@pytest.mark.parametrize("part", [0, 1])
def test_nan_in_a_batch_is_named(part: int) -> None:
    x, y, test = data(1)
    parts = [[x[i : i + 10].clone(), y[i : i + 10].clone()] for i in range(0, 60, 10)]
    parts[3][part][4] = math.nan
    with pytest.raises(ValueError, match="batch 3"):
        from_batches([tuple(p) for p in parts])(test)


def test_another_length_on_the_second_pass() -> None:
    x, y, test = data(3, 160)
    parts = [(x[i : i + 40], y[i : i + 40].argmax(-1)) for i in range(0, 160, 40)]
    model = from_batches(parts, c=3)
    model._training_side()
    parts.pop()
    with pytest.raises(ValueError, match="120 rows, the one before 160"):
        model(test)


def test_infinite_outputs_are_refused() -> None:
    x, y, test = data(1)

    class Diverging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.where(x[:, :1] > 10, math.inf, 0.0)

    x[41] = 20.0
    model = ntkgp.ExactNTKGP(x, y, gaussian(0, 0), ntkgp.LinearizedNetwork(Diverging(), x[:5]), form="primal").eval()
    with pytest.raises(ValueError, match="outputs are NaN or infinite"):
        model(test)


def test_refusals() -> None:
    x, y, _ = data(3)
    lin = ntkgp.LinearizedNetwork(net(3), x)
    with pytest.raises(ValueError, match="form: expected one of"):
        ntkgp.ExactNTKGP(x, y, gaussian(0, 0), lin, form="weights")
    with pytest.raises(ValueError, match=r"max_memory: 64 KiB is too small for weight space with P = 72.*it needs"):
        ntkgp.ExactNTKGP(x, y, gaussian(0, 0), lin, form="primal", max_memory="64KiB")
    with pytest.raises(ValueError, match=r"rank=1.*form='dual'"):
        ntkgp.ExactNTKGP(x, y, MultitaskGaussianLikelihood(num_tasks=3, rank=1), lin, form="primal")
    with pytest.raises(ValueError, match="fixed noise belongs to rows"):
        ntkgp.ExactNTKGP(TensorDataset(x, y), None, FixedNoiseGaussianLikelihood(torch.ones(len(x))), lin)
    with pytest.raises(ValueError, match="form: 'dual' needs tensors"):
        ntkgp.ExactNTKGP(TensorDataset(x, y), None, gaussian(0, 0), lin, form="dual")
    with pytest.raises(TypeError, match="train_y: expected None beside a TensorDataset"):
        ntkgp.ExactNTKGP(TensorDataset(x, y), y, gaussian(0, 0), lin)
    with pytest.raises(TypeError, match="train_y: expected a tensor, got NoneType"):
        ntkgp.ExactNTKGP(x, None, gaussian(0, 0), lin)
    model = ntkgp.ExactNTKGP(TensorDataset(x, y), None, gaussian(0, 0), lin)
    with pytest.raises(RuntimeError, match="holds no training inputs"):
        model(x)
    with pytest.raises(ValueError, match="applies to classification"):
        ntkgp.fit_evidence(model, curvature="quadratic")
    with pytest.raises(ValueError, match="inputs: expected new data"):
        model.set_train_data(targets=y)


# --- choice of the form -------------------------------------------------------------------------------


def test_auto_takes_weight_space_where_it_is_cheaper(caplog: pytest.LogCaptureFixture) -> None:
    x, y, _ = data(3, 400)
    lin = ntkgp.LinearizedNetwork(net(3), x)
    with caplog.at_level("INFO", logger="ntkgp"):
        model = ntkgp.ExactNTKGP(x, y, gaussian(0, 0), lin)
    assert model.form == "primal"
    assert "primal form: 72 compressed rows at most of N·C = 1,200, P = 72" in caplog.text
    assert "form='primal' (72 compressed rows at most of N·C = 1,200, P = 72; " in repr(model)
    assert ntkgp.ExactNTKGP(x[:20], y[:20], gaussian(0, 0), lin).form == "dual"
    assert "form='dual' (N·C = 60 rows; " in repr(ntkgp.ExactNTKGP(x[:20], y[:20], gaussian(0, 0), lin))
    full = MultitaskGaussianLikelihood(num_tasks=3, rank=1)
    assert ntkgp.ExactNTKGP(x, y, full, lin).form == "dual"
    # One noise variance per output: 3 · 72 rows of 1200, still worth it; of 255, not.
    task = MultitaskGaussianLikelihood(num_tasks=3)
    assert ntkgp.ExactNTKGP(x, y, task, lin).form == "primal"
    assert ntkgp.ExactNTKGP(x[:85], y[:85], task, lin).form == "dual"


def test_auto_takes_weight_space_where_data_space_does_not_fit() -> None:
    x, y, _ = data(1, 75)
    lin = ntkgp.LinearizedNetwork(net(1), x)
    assert ntkgp.ExactNTKGP(x, y, gaussian(0, 0), lin).form == "dual"
    assert ntkgp.ExactNTKGP(x, y, gaussian(0, 0), lin, max_memory=64 * 74**2).form == "primal"


@pytest.mark.parametrize("points", [2, 10, 60])
def test_data_space_works_in_the_memory_that_it_asks_for(points: int) -> None:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
    body = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.randn(points, 1, 12, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    lin = ntkgp.LinearizedNetwork(body, x)
    needed = dual_form(lin, points).nbytes
    assert dual_form(lin, 400).nbytes == 64 * 1200**2  # the matrices of the fit
    model = ntkgp.ExactNTKGP(x, x[:, :, 0, :3].squeeze(1), gaussian(0, 0), lin, form="dual", max_memory=needed).eval()
    ntkgp.fit_evidence(model, max_evaluations=3)
    assert bool((model(x[:1]).variance > 0).all())


# --- what a model does besides ------------------------------------------------------------------------


def test_new_observations() -> None:
    dual, primal, test = regression("gaussian, 3 outputs")
    x, y = test[:3], torch.ones(3, 3, dtype=DOUBLE)
    for mean in ("network", "posterior"):
        dual.mean = primal.mean = mean
        expected, found = (model.get_fantasy_model(x, y)(test) for model in (dual, primal))
        close(found.mean, expected.mean)
        close(found.covariance_matrix, expected.covariance_matrix)


def test_botorch_posterior_and_its_gradient() -> None:
    pytest.importorskip("botorch")
    dual, primal, test = regression("gaussian, 3 outputs")
    found = []
    for model in (dual, primal):
        model.mean = "posterior"
        x = test.clone().requires_grad_()
        posterior = model.posterior(x)
        gradient = torch.autograd.grad((posterior.mean.sum() + posterior.variance.sin().sum()), x)[0]
        found.append((posterior.mean, posterior.variance, gradient))
    for expected, value in zip(*found, strict=True):
        close(value, expected)


def test_copies_and_pickles() -> None:
    _, primal, test = regression("gaussian")
    expected = primal(test).covariance_matrix
    for other in (copy.deepcopy(primal), pickle.loads(pickle.dumps(primal))):
        assert other.form == "primal"
        assert torch.equal(other(test).covariance_matrix, expected)
    fresh, _, _ = regression("gaussian")[1], None, None
    fresh.kernel.precision = torch.ones(len(fresh.lin.groups))
    fresh.load_state_dict(primal.state_dict())
    assert torch.equal(fresh(test).covariance_matrix, expected)


def test_copies_of_a_loader_model_share_its_data() -> None:
    x, y, test = data(1)
    reads = []

    class Counted(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            reads.append(i)
            return super().__getitem__(i)

    source = DataLoader(Counted(x, y), batch_size=16)
    model = ntkgp.ExactNTKGP(source, None, gaussian(0, 0), ntkgp.LinearizedNetwork(net(1), x)).eval()
    expected = model(test).covariance_matrix
    other = copy.deepcopy(model)
    assert other._source is model._source
    assert torch.equal(other(test).covariance_matrix, expected)
    assert len(reads) == len(x)
    stored = ntkgp.ExactNTKGP(TensorDataset(x, y), None, gaussian(0, 0), model.lin).eval()
    assert torch.allclose(stored(test).covariance_matrix, expected, rtol=1e-10)
    loaded = pickle.loads(pickle.dumps(stored))
    loaded._source = None  # not needed for predictions
    loaded.train_inputs = None
    assert torch.allclose(loaded(test).covariance_matrix, expected, rtol=1e-10)


def test_set_train_data() -> None:
    dual, primal, test = regression("gaussian")
    for model in (dual, primal):
        model(test)
        model.mean = "posterior"
        model.set_train_data(targets=model.train_targets.flip(0))
    close(primal(test).mean, dual(test).mean)
    for model in (dual, primal):
        model.set_train_data(model.train_inputs[0][:70], model.train_targets[:70], strict=False)
    close(primal(test).mean, dual(test).mean)
    close(primal(test).covariance_matrix, dual(test).covariance_matrix)
    source = TensorDataset(dual.train_inputs[0][:50], dual.train_targets[:50])
    primal.set_train_data(source)
    dual.set_train_data(dual.train_inputs[0][:50], dual.train_targets[:50], strict=False)
    close(primal(test).covariance_matrix, dual(test).covariance_matrix)
    primal.set_train_data(dual.train_inputs[0], dual.train_targets)
    assert primal.train_inputs is not None


def test_changed_targets_and_noise_are_seen() -> None:
    dual, primal, test = regression("fixed")
    for model in (dual, primal):
        model.mean = "posterior"
        model(test)
        model.likelihood.noise_covar.noise = model.likelihood.noise_covar.noise.flip(0) * 2
    close(primal(test).covariance_matrix, dual(test).covariance_matrix)
    for model in (dual, primal):
        model.likelihood = fixed(True, 4)(POINTS, 1)
    close(primal(test).mean, dual(test).mean)


def test_inference_mode_leaves_nothing_that_breaks_gradients() -> None:
    _, primal, test = regression("gaussian")
    with torch.inference_mode():
        primal(test).variance  # noqa: B018
    x = test.clone().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(primal(x).variance.sum(), x)[0]).all()


def test_grams_on_disk() -> None:
    dual, _, test = regression("gaussian, 3 outputs")
    primal = ntkgp.ExactNTKGP(
        dual.train_inputs[0], dual.train_targets, gaussian(0, 0), dual.lin, form="primal", max_memory="400kB"
    ).eval()
    primal.kernel.precision = dual.kernel.precision.detach()
    same_predictions(dual, primal, test)
    assert primal._training_side().grams.storage == "disk"


def test_train_mode_is_the_prior_at_the_data() -> None:
    dual, primal, _ = regression("gaussian")
    mll = gpytorch.mlls.ExactMarginalLogLikelihood
    values = []
    for model in (dual, primal):
        model.train()
        x, y = model.train_inputs[0], model.train_targets
        values.append(float(mll(model.likelihood, model)(model(x), y).detach()) * len(y))
        found = evidence_objective(model.evidence_problem()).evaluate(model.kernel.precision.detach())
        assert found.value == pytest.approx(values[0], rel=1e-9)


def test_several_batches_of_inputs() -> None:
    dual, primal, test = regression("gaussian, 3 outputs")
    x = test[:6].reshape(2, 3, 2)
    dual.mean = primal.mean = "posterior"
    close(primal(x).mean, dual(x).mean)
    close(primal(x).covariance_matrix, dual(x).covariance_matrix)


@pytest.mark.parametrize("form", ["auto", "dual", "primal"])
def test_fixed_noise_of_other_data(form: str) -> None:
    x, y, test = data(1)
    lin = ntkgp.LinearizedNetwork(net(1), x)
    with pytest.raises(ValueError, match="fixed noise of 40 inputs, but the training data have N = 80"):
        ntkgp.ExactNTKGP(x, y, fixed(False)(40, 1), lin, form=form).eval()(test)
    model = ntkgp.ExactNTKGP(x, y, fixed(False)(80, 1), lin, form=form).eval()
    model.likelihood.noise_covar.noise = torch.full((30,), 0.1, dtype=DOUBLE)
    model.set_train_data(x[:30], y[:30], strict=False)
    fresh = ntkgp.ExactNTKGP(
        x[:30], y[:30], FixedNoiseGaussianLikelihood(torch.full((30,), 0.1, dtype=DOUBLE)), lin
    ).eval()
    close(model(test).covariance_matrix, fresh(test).covariance_matrix)


def test_progress_bar_of_a_pass(capsys: pytest.CaptureFixture) -> None:
    x, y, test = data(1)
    lin = ntkgp.LinearizedNetwork(net(1), x)
    ntkgp.ExactNTKGP(TensorDataset(x, y), None, gaussian(0, 0), lin, progress=True).eval()(test)
    assert "pass over the data" in capsys.readouterr().err
    ntkgp.ExactNTKGP(TensorDataset(x, y), None, gaussian(0, 0), lin).eval()(test)
    assert not capsys.readouterr().err


def test_rows_of_a_regression_are_not_kept() -> None:
    _, model, test = regression("gaussian")
    model(test)
    assert model._training_side()._visits._kept is None


@pytest.mark.parametrize("name", ["gaussian, 3 outputs", "softmax"])
def test_certified_bounds_hold(name: str) -> None:
    _, model, test = classification(3) if name == "softmax" else regression(name)
    low, high = model.posterior_bounds(test)
    variance = model(test).variance.detach()
    assert bool((low <= variance * (1 + 1e-9)).all())
    assert bool((variance <= high * (1 + 1e-9)).all())
