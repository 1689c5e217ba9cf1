"""The sampled evidence against exact MacKay, and its posterior draws against the exact covariance."""

import copy
import math

import gpytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.checkpoint import CheckpointMismatch
from ntkgp.evidence import sampled
from ntkgp.evidence.probes import DualProbes, Settings
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.sampled import sampled_evidence
from ntkgp.evidence.weight_probes import WeightProbes, _Rows
from ntkgp.fingerprint import digest
from tests import reference as ref

DOUBLE = torch.float64


def exact(sample: ref.Sample, lin: ntkgp.LinearizedNetwork, likelihood, curvature: str = "simple"):
    """The exact model at its optimum."""
    model = ntkgp.ExactNTKGP(sample.x, sample.y, copy.deepcopy(likelihood), lin, form="dual")
    return model, ntkgp.fit_evidence(model, curvature=curvature)


def assert_within_error(found, report, errors: float = 4.0, informative: bool = True) -> None:
    """|log λ̂ − log λ| within so many standard errors; what one prunes, both do."""
    kept = report.effective_dimension > 0.05
    assert (found.effective_dimension[~kept] < 0.2).all()
    z = (found.precision.log() - report.precision.log()) / found.log_precision_error
    assert (z[kept].abs() <= errors).all(), z
    if informative:
        assert (found.log_precision_error[report.effective_dimension > 2] < 0.5).all()  # error bars that say something
    z = (found.noise.log() - report.noise.log()) / found.log_noise_error
    assert (z.abs() <= errors).all(), z


@pytest.mark.parametrize("form", ["dual", "weights"])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_exact_mackay_on_a_deep_normalised_network(form, seed):
    sample = ref.batchnorm_net()  # 3 outputs, three BatchNorm layers
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="layer")
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    _, report = exact(sample, lin, likelihood)
    found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 32, form=form, seed=seed)
    assert found.report.converged
    assert found.form == form
    assert (report.effective_dimension > 1).sum() >= 3  # several groups matter
    assert_within_error(found, report)
    assert float(found.report.effective_dimension.sum()) == pytest.approx(
        float(report.effective_dimension.sum()), rel=0.1
    )


def many_rows() -> ref.Sample:
    """150 inputs, 3 outputs of different noise, P = 99: more rows than weights."""
    with ref.seeded(6) as generator:
        net = nn.Sequential(
            nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        ).double()  # fmt: skip
        x = torch.randn(150, 3, generator=generator, dtype=DOUBLE)
        spread = torch.tensor([0.05, 0.2, 0.6], dtype=DOUBLE)
        y = torch.sin(x.sum(-1, keepdim=True)) + spread * torch.randn(150, 3, generator=generator, dtype=DOUBLE)
        ref.train(net, lambda: (net(x) - y).square().mean(), 100)
        return ref.Sample(net, x, y, x, torch.ones(1), 1.0)


@pytest.mark.parametrize("form", ["dual", "weights"])
def test_one_noise_per_output(form):
    sample = many_rows()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, has_global_noise=False)
    _, report = exact(sample, lin, likelihood)
    found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 32, form=form)
    assert found.noise.shape == (3,)
    assert_within_error(found, report)


def test_known_and_learned_noise_of_rows():
    sample = ref.problem_r()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    known = torch.linspace(0.01, 0.3, 40)
    for learned in (False, True):
        likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(known, learn_additional_noise=learned)
        _, report = exact(sample, lin, likelihood)
        found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 32)
        assert found.form == "dual"
        # 40 data of an over-parametrised network: their known noise leaves little to learn on top of it.
        assert_within_error(found, report, informative=not learned)
        with pytest.raises(ValueError, match="likelihood: known noise variances"):
            sampled_evidence(lin, (sample.x, sample.y), likelihood, form="weights")


@pytest.mark.parametrize("form", ["dual", "weights"])
@pytest.mark.parametrize(
    ("name", "curvature"), [("C", "simple"), ("CNN", "simple"), ("CNN", "quadratic"), ("B", "simple")]
)
def test_classification(form, name, curvature):
    sample = {"C": ref.problem_c, "CNN": ref.layernorm_cnn, "B": bernoulli}[name]()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="layer" if name == "CNN" else "single")
    likelihood = (
        ntkgp.likelihoods.BernoulliLikelihood() if name == "B" else ntkgp.CategoricalLikelihood(lin.num_outputs)
    )
    _, report = exact(sample, lin, likelihood, curvature)
    found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 32, form=form, curvature=curvature)
    assert report.effective_dimension.sum() > 0.5
    assert_within_error(found, report)


def bernoulli() -> ref.Sample:
    with ref.seeded(5) as generator:
        net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        x = torch.randn(40, 3, generator=generator, dtype=DOUBLE)
        y = (x.sum(-1) + torch.randn(40, generator=generator, dtype=DOUBLE) > 0).long()
        return ref.Sample(net.double(), x, y, x, torch.ones(1), 1.0)


@pytest.mark.parametrize(("form", "name"), [("dual", "R"), ("dual", "C"), ("weights", "BN"), ("weights", "C")])
def test_draws_have_the_exact_covariance(form, name):
    """At given hyper-parameters: the draws' covariance and the effective dimensions within 4 standard errors."""
    sample = {"R": ref.problem_r, "BN": ref.batchnorm_net, "C": ref.problem_c}[name]()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="tensor")
    classify, samples = name == "C", 400
    settings = Settings(samples, 20, 1e-8, 1000, 2**31, 0, "simple")
    noise = None if classify else NoiseModel.homoscedastic(sample.x.shape[0] * lin.num_outputs, sample.noise)
    y = sample.y if classify else sample.y.reshape(len(sample.x), -1)
    if form == "dual":
        probes = DualProbes(lin, sample.x, y, noise, settings)
    else:
        probes = WeightProbes(lin, list(zip(sample.x.split(7), y.split(7), strict=True)), len(y), noise, settings)
    value = torch.tensor([] if classify else [sample.noise], dtype=DOUBLE)
    with torch.no_grad():
        found = probes(sample.precision, value)
    model = ntkgp.ExactNTKGP(
        sample.x, sample.y, ntkgp.CategoricalLikelihood(4) if classify else gpytorch.likelihoods.GaussianLikelihood(),
        lin, form="dual",
    ).eval()  # fmt: skip
    model.kernel.precision = sample.precision
    if not classify:
        model.likelihood.noise = sample.noise
    covariance = model(sample.x_test).covariance_matrix.detach()
    draws = lin.jvp(sample.x_test, found.draws[:200]).flatten(1)
    draws = torch.cat([draws, lin.jvp(sample.x_test, found.draws[200:]).flatten(1)])
    estimate = draws.T @ draws / samples
    scale = covariance.diagonal()
    error = ((covariance.square() + scale[:, None] * scale) / samples).sqrt()
    assert ((estimate - covariance).abs() <= 5 * error).all()
    assert float(((estimate - covariance).diagonal() / scale).abs().mean()) > 1e-4  # draws they are
    index, entries = lin.groups.index, sample.precision[lin.groups.index]
    j = lin.jacobian(sample.x).flatten(0, 1)
    if classify:
        oracle = ref.softmax_primal(j, lin(sample.x) - lin.jvp(sample.x, lin.theta), lin(sample.x), y, entries, index)
    else:
        t = y.flatten() - (lin(sample.x) - lin.jvp(sample.x, lin.theta)).flatten()
        oracle = ref.gaussian_primal(j, t, entries, torch.full((len(j),), sample.noise, dtype=DOUBLE), index)
    groups = len(lin.groups)
    gamma = found.traces[:groups]
    assert ((gamma.mean(-1) - oracle.gamma).abs() <= 4 * gamma.std(-1) / math.sqrt(samples)).all()
    assert torch.allclose(found.theta_star, oracle.theta_star, atol=1e-5 * float(oracle.theta_star.abs().max()))
    assert torch.allclose(found.quadratics[:groups], sample.precision * oracle.norms, rtol=1e-4)
    if not classify:
        k = (j / entries) @ j.T + sample.noise * torch.eye(len(j), dtype=DOUBLE)
        trace = sample.noise * float(torch.linalg.inv(k).trace())
        spread = float(found.traces[groups].std()) / math.sqrt(samples)
        assert float(found.traces[groups].mean()) == pytest.approx(trace, abs=4 * spread)
        assert float(found.quadratics[groups]) == pytest.approx(
            sample.noise * float(torch.linalg.solve(k, t).square().sum()), rel=1e-4
        )


def test_leaves_of_equal_shape_have_independent_draws():
    lin = ntkgp.LinearizedNetwork(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4))
    settings = Settings(200, 2, 1e-6, 100, 2**31, 0, "simple")
    noise = NoiseModel.homoscedastic(8, 1.0)
    x = torch.linspace(-1, 1, 8, dtype=DOUBLE).reshape(2, 4)
    for probes in (
        DualProbes(lin, x, torch.zeros(2, 4, dtype=DOUBLE), noise, settings),
        WeightProbes(lin, [(x, torch.zeros(2, 4, dtype=DOUBLE))], 2, noise, settings),
    ):
        first, second = probes.prior[:, :16], probes.prior[:, 20:36]
        correlation = (first * second).mean(0) / (first.std(0) * second.std(0))
        assert correlation.abs().max() < 0.35


def test_forms_share_their_fixed_point_at_many_samples():
    sample = many_rows()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    data, likelihood = (sample.x, sample.y), gpytorch.likelihoods.GaussianLikelihood()
    found = {form: sampled_evidence(lin, data, likelihood, 300, form=form) for form in ("dual", "weights")}
    gap = found["dual"].precision.log() - found["weights"].precision.log()
    error = (found["dual"].log_precision_error.square() + found["weights"].log_precision_error.square()).sqrt()
    assert (gap.abs() <= 4 * error).all()
    fewer = sampled_evidence(lin, data, likelihood, 30)
    ratio = fewer.log_precision_error / found["dual"].log_precision_error
    assert 1.8 < float(ratio) < 5.5  # √10, give or take its own error


def test_loader_memory_and_reproducibility():
    sample = many_rows()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    state, before = torch.get_rng_state(), float(likelihood.noise.detach())
    loader = DataLoader(TensorDataset(sample.x, sample.y), batch_size=40, shuffle=True)
    _, report = exact(sample, lin, likelihood)
    # Too little to keep rows: every product is a pass over a loader that shuffles.
    streamed = sampled_evidence(lin, loader, likelihood, 8, form="weights", max_memory="600KiB")
    assert streamed.report.converged
    assert_within_error(streamed, report)
    first, second = (sampled_evidence(lin, (sample.x, sample.y), likelihood, 8, form="weights") for _ in range(2))
    assert torch.equal(first.precision, second.precision)
    assert torch.equal(first.samples, second.samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(likelihood.noise.detach()) == before
    assert likelihood.raw_noise.dtype == torch.float32


def test_batches_too_large_for_their_rows_go_by_vectors():
    sample = many_rows()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    by_rows, by_vectors = (_Rows(lin, sample.x[:20], sample.y[:20], budget) for budget in (2**30, 1000))
    assert by_rows.jacobian is not None
    assert by_vectors.jacobian is None
    v = torch.randn(4, lin.num_parameters, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    u = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    assert torch.allclose(by_rows.push(v), by_vectors.push(v))
    assert torch.allclose(by_rows.pull(u), by_vectors.pull(u))
    assert torch.allclose(by_rows.offset, lin(sample.x[:20]) - lin.jvp(sample.x[:20], lin.theta))


def test_matrix_free_data_space():
    sample = ref.batchnorm_net()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    _, report = exact(sample, lin, likelihood)
    found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 16, form="dual", max_memory="300KiB")
    assert_within_error(found, report)


def test_evidence_bounds_and_functions():
    sample = ref.batchnorm_net()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="single")
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model, _ = exact(sample, lin, likelihood)
    found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 64, form="dual")
    objective = ntkgp.evidence.evidence_objective(model.evidence_problem())
    value = objective.evaluate(found.precision, found.noise).value
    low, high = found.report.evidence_bounds
    assert low <= value <= high
    assert high - low < 0.1
    assert math.isnan(found.report.log_evidence)
    assert "sampled" in str(found.report)
    model.set_hyperparameters(found.precision, found.noise)
    v = model.eval()(sample.x_test).variance.detach()
    ratio = found.variance(sample.x_test) / v
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / 64)
    draws = found.functions(sample.x_test)
    assert draws.shape == (64, 6, 3)
    spread = (draws - lin(sample.x_test)).square().mean(0)
    assert torch.allclose(spread, found.variance(sample.x_test))


def test_what_did_not_converge_is_said():
    sample = ref.problem_r()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="tensor")
    data, likelihood = (sample.x, sample.y), gpytorch.likelihoods.GaussianLikelihood()
    short = sampled_evidence(lin, data, likelihood, 4, max_steps=2)
    assert not short.report.converged
    assert "not converged" in short.report.warnings[0]
    loose = sampled_evidence(lin, data, likelihood, 4, max_iterations=1, num_landmarks=1)
    assert not loose.report.converged
    assert any("linear system" in text for text in loose.report.warnings)


class HalfDead(nn.Module):
    """A network, and a layer without effect."""

    def __init__(self, net: nn.Module, dead: nn.Module) -> None:
        super().__init__()
        self.net, self.dead = net, dead

    def forward(self, x):
        return self.net(x) + 0.0 * self.dead(x)


@pytest.mark.parametrize("form", ["dual", "weights"])
def test_the_precision_of_groups_without_effect_is_not_known(form):
    sample = ref.problem_r()
    whole = HalfDead(sample.net, nn.Linear(sample.x.shape[-1], 1).double())
    names = [name for name, _ in whole.named_parameters()]
    groups = ntkgp.ParameterGroups({"net": names[:-2], "weight": names[-2:-1], "bias": names[-1:]})
    lin = ntkgp.LinearizedNetwork(whole, sample.x, groups=groups)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    found = sampled_evidence(lin, (sample.x, sample.y), likelihood, 8, form=form, max_steps=5, bounds=False)
    assert found.log_precision_error.isinf().tolist() == [False, True, True]
    assert found.report.pruned == lin.groups.names[1:]
    assert found.log_noise_error.isfinite().all()


def small_problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(12, 2, dtype=DOUBLE)
    return ntkgp.LinearizedNetwork(net, x), (x, torch.sin(x[:, 0])), gpytorch.likelihoods.GaussianLikelihood()


def test_another_tolerance_is_another_run(tmp_path):
    problem = small_problem()
    sampled_evidence(*problem, 2, max_steps=1, tolerance=10.0, checkpoint=tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"different: tolerance \(10\.0 there"):
        sampled_evidence(*problem, 2, max_steps=1, tolerance=1e-3, checkpoint=tmp_path)


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupt_ends_one_of_several_processes(world, monkeypatch):
    """What followed in it would be taken for answers to what the others ask in the middle of a step."""
    call, steps = DualProbes.__call__, []

    def interrupted(self, *at):
        steps.append(at)
        if len(steps) == 2:
            monkeypatch.setattr(sampled, "world_size", lambda: world)
            raise KeyboardInterrupt
        return call(self, *at)

    monkeypatch.setattr(DualProbes, "__call__", interrupted)
    if world > 1:
        with pytest.raises(KeyboardInterrupt):
            sampled_evidence(*small_problem(), 2, form="dual", bounds=False)
        return
    found = sampled_evidence(*small_problem(), 2, form="dual", bounds=False)
    assert found.report.warnings[0].startswith("interrupted")


def test_processes_agree_on_the_memory_and_refuse_other_arguments(monkeypatch):
    lin, data, likelihood = small_problem()
    numbers = sampled.gather_numbers
    memory = 2**20
    monkeypatch.setattr(sampled, "gather_numbers", lambda *n: [n, (memory,)] if n == (2**21,) else numbers(*n))
    monkeypatch.setattr(sampled, "world_size", lambda: 2)
    given = []
    monkeypatch.setattr(sampled, "gather_objects", lambda own: given.append(own) or [own, {**own, "seed": "other"}])
    with pytest.raises(ValueError, match=r"^seed: the processes were given different ones"):
        sampled_evidence(lin, data, likelihood, 2, max_memory=2**21)
    assert given[0]["max_memory"] == digest(memory)
    assert {"num_samples", "tolerance", "solver_tolerance", "max_steps", "bounds", "likelihood"} <= given[0].keys()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"form": "primal"}, ValueError, "form: expected one of"),
        ({"curvature": "full"}, ValueError, "curvature: expected one of"),
        ({"num_samples": 1}, ValueError, "num_samples: expected an integer >= 2"),
        ({"max_steps": 0}, ValueError, "max_steps: expected an integer >= 1"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a positive"),
        ({"solver_tolerance": 2.0}, ValueError, "tolerance: expected a number in"),
        ({"lin": nn.Linear(3, 1)}, TypeError, "lin: expected a ntkgp.LinearizedNetwork"),
        ({"train_data": torch.ones(3)}, TypeError, "train_data: expected"),
        ({"train_data": (torch.ones(3, 3), torch.full((3,), torch.nan))}, ValueError, "NaN"),
    ],
)
def test_bad_input(change, error, words):
    lin = ntkgp.LinearizedNetwork(nn.Linear(3, 1), torch.randn(2, 3))
    given = {"lin": lin, "train_data": (torch.randn(5, 3), torch.randn(5)), **change}
    with pytest.raises(error, match=words):
        sampled_evidence(likelihood=gpytorch.likelihoods.GaussianLikelihood(), **given)
