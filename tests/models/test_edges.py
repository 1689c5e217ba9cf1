"""What models, likelihoods and evidences refuse, and branches that few uses take."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel
from torch import nn

import ntkgp
from ntkgp.evidence import GaussianEvidence, NoiseModel, evidence_objective, sampled_evidence
from ntkgp.evidence.streaming import StreamedObjective
from ntkgp.likelihoods import whitened_targets
from ntkgp.likelihoods.curvature import validate_labels
from ntkgp.models.posterior import PosteriorCovariance
from ntkgp.models.variational import kmeans_inducing_points

DOUBLE = torch.float64
GAUSSIAN = gpytorch.likelihoods.GaussianLikelihood


def linearized(outputs=1):
    net = nn.Sequential(
        nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)
    ).double()
    return ntkgp.LinearizedNetwork(net, torch.randn(3, 2, dtype=DOUBLE))


def data(rows=14):
    x = torch.randn(rows, 2, dtype=DOUBLE)
    return x, torch.sin(x.sum(-1))


def variational(lin, points=4, **options):
    return ntkgp.VariationalNTKGP(torch.randn(points, 2, dtype=DOUBLE), GAUSSIAN(), lin, 14, **options)


# --- Nyström -----------------------------------------------------------------------------------------


def test_a_nystrom_model_refuses_by_name():
    lin, given = linearized(), data()
    with pytest.raises(ValueError, match="num_landmarks: expected a positive integer, got None"):
        ntkgp.NystromNTKGP(given, GAUSSIAN(), lin, num_landmarks=None)
    model = ntkgp.NystromNTKGP(given, GAUSSIAN(), lin, 5, 4, mean="posterior")
    with pytest.raises(ValueError, match="search_frequency: expected a positive number, got 0"):
        model.fit(validation=data(5), search_frequency=0, progress=False)
    model.fit(progress=False)
    with pytest.raises(ValueError, match="targets='residual' centres the prior at the trained weights"):
        ntkgp.fit_evidence(model, targets="residual", held_out=True)
    problem = model.evidence_problem()
    with pytest.raises(ValueError, match="at='theta_map': evidence from Nyström features"):
        problem.objective("theta_map")
    with pytest.raises(ValueError, match="bounds must be"):
        StreamedObjective(problem, (1.0, 0.5))
    with pytest.raises(ValueError, match="statistics of different features"):
        _ = model.statistics + ntkgp.NystromNTKGP(given, GAUSSIAN(), lin, 3, 2).fit(progress=False).statistics


def test_a_state_of_a_nystrom_model_before_its_fit_undoes_a_fit():
    lin, given = linearized(), data()
    fresh = ntkgp.NystromNTKGP(given, GAUSSIAN(), lin, 5, 4)
    state = fresh.state_dict()
    fitted = ntkgp.NystromNTKGP(given, GAUSSIAN(), lin, 5, 4).fit(progress=False)
    fitted.load_state_dict(state)
    assert fitted.features is None
    assert fitted.statistics is None


def test_a_streamed_objective_starts_where_another_was():
    model = ntkgp.NystromNTKGP(data(), GAUSSIAN(), linearized(), 5, 4).fit(progress=False)
    first, second = (StreamedObjective(model.evidence_problem()) for _ in range(2))
    assert first.warm_start() is None
    x = first.start()
    first(x)
    second.set_warm_start(first.warm_start())
    assert torch.equal(second.warm_start()["x"], x)
    second.set_warm_start(None)
    assert second.warm_start() is None


# --- variational -------------------------------------------------------------------------------------


def test_a_variational_model_refuses_by_name():
    lin, (x, y) = linearized(2), data()
    with pytest.raises(TypeError, match=r"lin: expected a ntkgp.LinearizedNetwork, got Sequential"):
        variational(nn.Sequential())
    with pytest.raises(ValueError, match="kernel: expected no batch shape"):
        variational(lin, kernel=RBFKernel(batch_shape=torch.Size([2])))
    with pytest.raises(ValueError, match="kernel: expected 1 or C = 2 outputs per input, got 3"):
        variational(lin, kernel=gpytorch.kernels.MultitaskKernel(RBFKernel(), num_tasks=3))
    with pytest.raises(ValueError, match="inducing_points has N = 0 rows"):
        variational(lin, points=0)
    for bad in (x.long(), x[0]):
        with pytest.raises(ValueError, match="x: expected packed floating-point inputs"):
            kmeans_inducing_points(bad, 2)
    with pytest.raises(ValueError, match=r"labels: expected integers of shape \(14,\)"):
        kmeans_inducing_points(x, 2, y)
    with pytest.raises(ValueError, match="training_data: the model holds none"):
        variational(linearized())._saved(training_data=True)


def test_a_kernel_of_ones_own_has_no_evidence_of_the_tangent_kernel():
    model, given = variational(linearized(), kernel=RBFKernel(), learn_inducing=False), data()
    with pytest.raises(ValueError, match="evidence='bound' is that of the tangent kernel"):
        model.fit(given, evidence="bound")
    with pytest.raises(ValueError, match="fit_evidence fits precisions of the tangent kernel"):
        ntkgp.fit_evidence(model)
    model.fit(given, progress=False)
    with pytest.raises(ValueError, match="sample_functions draws weights of the tangent model"):
        model.sample_functions(2)


def test_an_objective_that_is_no_number_ends_the_fit(monkeypatch):
    model = variational(linearized(), objective=0.5)
    monkeypatch.setattr("ntkgp.models.variational.fit.shared_gradient", lambda *_: float("nan"))
    with pytest.raises(FloatingPointError, match="the objective became nan; lower learning_rate"):
        model.fit(data(), epochs=1, evidence=None, progress=False)


def test_interrupted_inducing_inputs_are_the_best_so_far(monkeypatch):
    from ntkgp.models.variational.optimum import CollapsedSearch

    call, left = CollapsedSearch.__call__, [4]

    def interrupted(self, point):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return call(self, point)

    monkeypatch.setattr(CollapsedSearch, "__call__", interrupted)
    model, given = variational(linearized()), data()
    start = model.inducing_points.detach().clone()
    model.fit(given, epochs=50, progress=False)
    assert model.history.interrupted
    assert not torch.equal(model.inducing_points, start)
    assert model.history.objective[-1] > model.history.objective[0]


# --- covariances and likelihoods ---------------------------------------------------------------------


def test_blocks_of_a_dense_prior_are_those_of_the_matrix():
    prior, root = torch.randn(2, 6, 6, dtype=DOUBLE), torch.randn(2, 6, 3, dtype=DOUBLE)
    prior = prior @ prior.mT
    dense = (prior - root @ root.mT).reshape(2, 3, 2, 3, 2)
    found = PosteriorCovariance.from_root(prior, root).point_blocks(2)
    for point in range(3):
        torch.testing.assert_close(found[:, point], dense[:, point, :, point])


def test_labels_logits_and_offsets_are_refused_by_name():
    with pytest.raises(ValueError, match=r"labels: expected an integer dtype, got torch.complex64"):
        validate_labels(torch.zeros(3, dtype=torch.complex64), 2)
    logits, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="logits: expected a tensor of shape"):
        whitened_targets(torch.zeros(3, 0), labels, torch.zeros(3, 0))
    with pytest.raises(ValueError, match="offset: contains NaN"):
        whitened_targets(logits, labels, torch.full((3, 2), torch.nan))


# --- evidence ----------------------------------------------------------------------------------------


def test_an_evidence_problem_is_refused_by_name():
    grams, targets, noise = torch.eye(4)[None], torch.ones(4), NoiseModel.homoscedastic(4, 1.0)
    tangent = {"tangent_theta": torch.zeros(1, 4), "theta_norms": torch.ones(1)}
    with pytest.raises(TypeError, match=r"targets must be a torch.Tensor, got list"):
        GaussianEvidence(grams, [1.0] * 4, noise)
    with pytest.raises(ValueError, match=r"component must have shape \(4,\), got \(3,\)"):
        NoiseModel(torch.zeros(4), torch.zeros(3, dtype=torch.long), torch.ones(1))
    with pytest.raises(ValueError, match="theta_norms must not be negative"):
        GaussianEvidence(grams, targets, noise, **{**tangent, "theta_norms": -torch.ones(1)})
    with pytest.raises(ValueError, match="group_sizes must have length 1, got 2"):
        GaussianEvidence(grams, targets, noise, group_sizes=(3, 4))
    problem = GaussianEvidence(grams, targets, noise)
    with pytest.raises(ValueError, match="tangent_theta is needed for the residual of the network"):
        _ = problem.residual
    objective = evidence_objective(problem, "theta_star")
    with pytest.raises(ValueError, match="tangent_theta and theta_norms are needed for the shift"):
        objective.squared_shift(objective.start())


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupted_sampled_fit_reports_its_last_step(steps, monkeypatch):
    from ntkgp.evidence.probes import DualProbes

    call, left = DualProbes.__call__, [steps]

    def interrupted(self, *args):
        if left[0] == 0:
            left[0] = -1  # standard errors are made of further steps
            raise KeyboardInterrupt
        left[0] -= 1
        return call(self, *args)

    monkeypatch.setattr(DualProbes, "__call__", interrupted)
    fit = lambda: sampled_evidence(linearized(), data(), GAUSSIAN(), 4, form="dual", tolerance=1e-12)  # noqa: E731
    if steps == 0:
        with pytest.raises(KeyboardInterrupt):
            fit()
        return
    report = fit().report
    assert report.iterations == steps
    assert not report.converged
    assert "interrupted: the last completed step is reported" in report.warnings
