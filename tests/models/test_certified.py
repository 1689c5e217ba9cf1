"""posterior_bounds of the models: every likelihood, kept and matrix-free products, shapes, refusals."""

import copy
import pickle

import gpytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.evidence import evidence_bounds, evidence_objective
from ntkgp.models.certified import Certified
from ntkgp.models.nystrom import NystromNTKGP
from ntkgp.solvers import NystromPreconditioner, TangentGram
from tests import reference as ref

DOUBLE = torch.float64


def net_and_data(outputs: int, dtype: torch.dtype = DOUBLE):
    with ref.seeded(3) as generator:
        layers: list[nn.Module] = []
        for width in (4, 9, 9):
            layers += [nn.Linear(width, 9), nn.LayerNorm(9), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(9, outputs)).to(dtype)
    x = torch.randn(18, 4, generator=generator, dtype=DOUBLE).to(dtype)
    x_test = 2 * torch.randn(7, 4, generator=generator, dtype=DOUBLE).to(dtype)
    y = torch.randn(18, outputs, generator=generator, dtype=DOUBLE)
    return ntkgp.LinearizedNetwork(net, x, groups="layer"), x, y, x_test


def likelihoods():
    correlated = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, rank=1)
    correlated.task_noise_covar_factor.data = torch.tensor([[0.6], [-0.3], [0.2]])
    return {
        "gaussian": (1, gpytorch.likelihoods.GaussianLikelihood()),
        "several outputs": (3, gpytorch.likelihoods.GaussianLikelihood()),
        "multitask": (3, gpytorch.likelihoods.MultitaskGaussianLikelihood(3)),
        "correlated": (3, correlated),
        "fixed": (1, gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.linspace(0.1, 1, 18))),
        "bernoulli": (1, ntkgp.likelihoods.BernoulliLikelihood()),
        "categorical": (3, ntkgp.CategoricalLikelihood(3)),
    }


def model_of(kind: str, dtype: torch.dtype = DOUBLE, **options):
    outputs, likelihood = likelihoods()[kind]
    lin, x, y, x_test = net_and_data(outputs, dtype)
    if kind in ("bernoulli", "categorical"):
        y = torch.randint(max(outputs, 2), (18,), generator=torch.Generator().manual_seed(0))
    model = ntkgp.ExactNTKGP(x, y, likelihood, lin, **options).eval()
    model.kernel.precision = torch.logspace(-1, 1, len(lin.groups), dtype=DOUBLE)
    return model, x_test


def inside(low, v, high, slack=1e-9):
    return bool((low <= v * (1 + slack)).all() and (v <= high * (1 + slack)).all())


@pytest.mark.parametrize("kind", list(likelihoods()))
def test_every_likelihood(kind):
    model, x_test = model_of(kind, form="dual")
    v = model(x_test).variance.detach()
    for steps in (0, 2, 10):
        low, high = model.posterior_bounds(x_test, steps, preconditioner=2)
        assert low.shape == high.shape == v.shape
        assert low.dtype == DOUBLE
        assert inside(low, v, high)
    low, high = model.posterior_bounds(x_test)
    assert inside(low, v, high)
    assert ((high - low) <= 1e-6 * v).all()


@pytest.mark.parametrize("curvature", ["simple", "quadratic", "full"])
@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_the_curvature_is_the_models(kind, curvature):
    model, x_test = model_of(kind, form="dual")
    model.curvature = curvature
    low, high = model.posterior_bounds(x_test)
    assert inside(low, model(x_test).variance.detach(), high)
    problem = model.evidence_problem(curvature=curvature)
    objective = evidence_objective(problem)
    if curvature == "full":
        logits = objective.dual_mode(model.kernel.precision.detach().log()).logits
        objective = type(objective)(problem, curvature_at=logits)
    exact = objective.evaluate(model.kernel.precision.detach()).value
    least, most = evidence_bounds(model)
    assert least - 1e-9 <= exact <= most + 1e-9
    assert most - least <= 1e-4


@pytest.mark.parametrize("seed", [3, 4])
def test_curvature_at_a_mode_that_hardly_anything_holds(seed):
    with ref.seeded(seed) as generator:
        net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(30, 2, generator=generator, dtype=DOUBLE)
    labels = (torch.sin(3 * x[:, 0]) + 0.2 * torch.randn(30, generator=generator, dtype=DOUBLE) > 0).long()
    lin = ntkgp.LinearizedNetwork(net, x, groups="layer")
    model = ntkgp.ExactNTKGP(x, labels, ntkgp.likelihoods.BernoulliLikelihood(), lin, form="primal").eval()
    model.kernel.precision, model.curvature = torch.full((len(lin.groups),), 1e-6, dtype=DOUBLE), "full"
    low, high = model.posterior_bounds(2 * x, 60)
    assert inside(low, model(2 * x).variance.detach(), high, 1e-7)
    assert ((high - low) <= 1e-2 * high).all()


@pytest.mark.parametrize("kind", ["gaussian", "several outputs", "multitask", "fixed"])
def test_evidence_of_the_model_is_inside(kind):
    model, _ = model_of(kind, form="dual")
    exact = evidence_objective(model.evidence_problem()).evaluate(model.kernel.precision.detach()).value
    for landmarks in (2, None):
        low, high = evidence_bounds(model, num_landmarks=landmarks)
        assert low <= exact <= high
    assert high - low <= 1e-4


@pytest.mark.parametrize("kind", ["several outputs", "categorical"])
@pytest.mark.parametrize("budget", [2**31, 150 * 1024])
def test_kept_and_matrix_free_products_agree(kind, budget):
    model, x_test = model_of(kind)
    lin, x = model.lin, model.train_inputs[0]
    assert TangentGram.best(lin, x, 2**31).grams is not None
    assert TangentGram.best(lin, x, 150 * 1024).grams is None
    variance = model.kernel.precision.detach().reciprocal()
    dense = lin.weighted_gram(x, None, variance)
    v = torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    stored = lin.symmetric_grams(x)
    for gram in (TangentGram(lin, x), TangentGram(lin, x, 2**31, stored), TangentGram(lin, x, 8, stored)):
        assert torch.allclose(gram.product(variance)(v), dense @ v, rtol=1e-10)
        assert torch.allclose(gram.traces(), lin.grams(x).diagonal(dim1=-2, dim2=-1).sum(-1)) or gram.max_memory == 8
    kept = TangentGram(lin, x, 2**31, stored)
    free = TangentGram(lin, x)
    points = torch.tensor([1, 5, 6])
    assert torch.allclose(kept.columns(points, variance), free.columns(points, variance))
    model.max_memory = budget
    small = TangentGram(lin, x, budget)
    assert small.precision == torch.finfo(DOUBLE).eps
    exact = model_of(kind, form="dual")[0](x_test).variance.detach()
    low, high = model.posterior_bounds(x_test)
    assert inside(low, exact, high, 1e-8)


def test_single_precision_network_matrix_free_allows_for_its_rounding():
    model, x_test = model_of("several outputs", torch.float32, form="dual")
    v = model(x_test).variance.detach()
    low, high = model.posterior_bounds(x_test)
    assert inside(low, v, high)
    model._kept = model.prediction_strategy = None
    model.max_memory = 150 * 1024  # too little for Grams
    low, high = model.posterior_bounds(x_test)
    assert inside(low, v, high)
    assert ((high - low) / v).median() < 0.1


def test_batch_dimensions_and_one_dimensional_inputs():
    model, x_test = model_of("several outputs")
    low, high = model.posterior_bounds(x_test)
    batched = torch.stack([x_test, x_test.flip(0)])
    lows, highs = model.posterior_bounds(batched)
    assert lows.shape == (2, 7, 3)
    assert torch.allclose(lows[1].flip(0), low, rtol=1e-6)
    assert torch.allclose(highs[0], high, rtol=1e-6)


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_form_of_the_model_does_not_matter(form):
    model, x_test = model_of("several outputs", form=form)
    v = model(x_test).variance.detach()  # so that its own sums are kept
    low, high = model.posterior_bounds(x_test)
    assert inside(low, v, high, 1e-8)


def test_model_of_a_loader():
    outputs, likelihood = likelihoods()["several outputs"]
    lin, x, y, x_test = net_and_data(outputs)
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    model = ntkgp.ExactNTKGP(loader, None, likelihood, lin).eval()
    low, high = model.posterior_bounds(x_test)
    assert inside(low, model(x_test).variance.detach(), high, 1e-8)


def test_nystrom_model_knows_how_far_it_is_from_exact():
    outputs, likelihood = likelihoods()["several outputs"]
    lin, x, y, x_test = net_and_data(outputs)
    exact = ntkgp.ExactNTKGP(x, y, copy.deepcopy(likelihood), lin, form="dual").eval()
    model = NystromNTKGP((x, y), likelihood, lin, num_landmarks=4).fit(progress=False)
    assert isinstance(model, Certified)
    v = exact(x_test).variance.detach()
    low, high = model.posterior_bounds(x_test)
    assert inside(low, v, high)
    assert (model(x_test).variance < low).any()  # ELLA is over-confident (C3), and the interval says so
    nothing = NystromNTKGP(None, copy.deepcopy(likelihood), lin, num_landmarks=4)
    with pytest.raises(ValueError, match="no training data"):
        nothing.posterior_bounds(x_test)


def test_follows_data_and_hyperparameters():
    model, x_test = model_of("gaussian", form="dual")
    before = model.posterior_bounds(x_test)
    model.kernel.precision = 3 * model.kernel.precision.detach()
    model.likelihood.noise = 0.05
    changed = model.posterior_bounds(x_test)
    assert inside(changed[0], model(x_test).variance.detach(), changed[1])
    assert not torch.allclose(before[0], changed[0])
    model.set_train_data(model.train_inputs[0][:9], model.train_targets[:9], strict=False)
    fewer = model.posterior_bounds(x_test)
    assert inside(fewer[0], model(x_test).variance.detach(), fewer[1])


def test_leaves_nothing_behind():
    model, x_test = model_of("gaussian")
    state = torch.get_rng_state()
    with torch.inference_mode():
        inference = model.posterior_bounds(x_test.clone())
    plain = model.posterior_bounds(x_test)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(inference[0], plain[0])
    x = x_test.clone().requires_grad_()
    model(x).variance.sum().backward()  # no poisoned cache
    assert x.grad is not None
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.posterior_bounds(x_test)[1], plain[1])


def test_reproducible_and_own_preconditioner():
    model, x_test = model_of("several outputs")
    first, second = model.posterior_bounds(x_test, 3), model.posterior_bounds(x_test, 3)
    assert torch.equal(first[0], second[0])
    own = model.nystrom(5, seed=7)
    assert isinstance(own, NystromPreconditioner)
    low, high = model.posterior_bounds(x_test, 6, own)
    assert inside(low, model(x_test).variance.detach(), high, 1e-8)


def test_preconditioner_of_other_hyperparameters_is_refused():
    model, x_test = model_of("several outputs")
    own = model.nystrom(9)
    before = model.kernel.precision.detach().clone()
    model.kernel.precision = 100 * before  # the old approximation is above this kernel: its lower bound would be wrong
    with pytest.raises(ValueError, match="preconditioner: made at other precisions"):
        model.posterior_bounds(x_test, 3, own)
    model.kernel.precision = before
    assert inside(*_three(model, x_test, own))
    model.likelihood.noise = 0.01
    with pytest.raises(ValueError, match="preconditioner: made at other noise"):
        model.posterior_bounds(x_test, 3, own)
    model, x_test = model_of("several outputs")
    own = model.nystrom(9)
    model.set_train_data(model.train_inputs[0] + 0.1)
    with pytest.raises(ValueError, match="preconditioner: made at other data"):
        model.posterior_bounds(x_test, 3, own)


def _three(model, x_test, preconditioner):
    low, high = model.posterior_bounds(x_test, 3, preconditioner)
    return low, model(x_test).variance.detach(), high


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_iterations": -1}, "max_iterations: expected an integer"),
        ({"max_iterations": 1.5}, "max_iterations: expected an integer"),
        ({"preconditioner": 0}, "num_points: expected a positive"),
        ({"preconditioner": NystromPreconditioner(torch.eye(4), torch.eye(4))}, "preconditioner: expected 18 rows"),
    ],
)
def test_bad_input(arguments, words):
    model, x_test = model_of("gaussian")
    with pytest.raises(ValueError, match=words):
        model.posterior_bounds(x_test, **arguments)
