"""Scores against hand values, scikit-learn, torchmetrics, Monte Carlo and their own invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

from ntkgp.evaluation import divergence, metrics


def _close(value, expected, tol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tol,
        atol=tol,
    )


def _regression(n=200, shape=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, *shape, generator=g, dtype=torch.float64) * 3
    variance = torch.rand(n, *shape, generator=g, dtype=torch.float64) * 2 + 0.1
    target = mean + 1.3 * torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return mean, variance, target


def _classification(n=300, c=4, seed=0, sharpness=2.0):
    g = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, c, generator=g, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(0.6 * logits, -1), 1, generator=g).squeeze(-1)
    return torch.softmax(logits, -1), labels


# --- regression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,)])
def test_gaussian_nll_is_the_mean_of_the_log_densities(shape):
    mean, variance, target = _regression(shape=shape)
    _close(metrics.gaussian_nll(mean, variance, target), -Normal(mean, variance.sqrt()).log_prob(target).mean())


def test_gaussian_nll_by_hand():
    value = metrics.gaussian_nll(torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([3.0]))
    _close(value, 0.5 * (math.log(2 * math.pi) + math.log(4.0) + 1.0))


def test_original_units_change_the_nll_by_the_log_scale():
    mean, variance, target = _regression()
    shifted = metrics.original_units(mean, variance, 150.0, 77.0)
    value = metrics.gaussian_nll(*shifted, target * 77.0 + 150.0)
    _close(value, metrics.gaussian_nll(mean, variance, target) + math.log(77.0))


def test_original_units_per_output():
    mean, variance, _ = _regression(shape=(2,))
    moved, scaled = metrics.original_units(mean, variance, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5]))
    _close(moved[:, 1], mean[:, 1] * 0.5 + 2)
    _close(scaled[:, 0], variance[:, 0] * 9)
    with pytest.raises(ValueError, match="target_std"):
        metrics.original_units(mean, variance, 0.0, 0.0)


def test_rmse_against_sklearn():
    mean, _, target = _regression()
    _close(metrics.rmse(mean, target), sk.root_mean_squared_error(target.numpy(), mean.numpy()))


def test_crps_is_the_energy_form_by_monte_carlo():
    mean, variance, target = _regression(n=5)
    g = torch.Generator().manual_seed(1)
    draws = mean + variance.sqrt() * torch.randn(400_000, 5, generator=g, dtype=torch.float64)
    other = draws[torch.randperm(len(draws), generator=g)]
    energy = (draws - target).abs().mean(0) - 0.5 * (draws - other).abs().mean(0)
    _close(metrics.gaussian_crps(mean, variance, target), energy.mean(), tol=4e-3)


def test_crps_is_the_integral_over_thresholds():
    mean, variance, target = (torch.tensor([v], dtype=torch.float64) for v in (0.7, 2.0, -1.1))
    grid = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    integrand = (Normal(mean, variance.sqrt()).cdf(grid) - (grid >= target).double()).square()
    _close(metrics.gaussian_crps(mean, variance, target), torch.trapezoid(integrand, grid), tol=2e-4)


def test_coverage_counts_and_width():
    mean, variance, target = _regression(n=4000)
    fraction, width = metrics.coverage(mean, variance, target, level=0.9)
    z = 1.6448536269514722
    _close(fraction, (((target - mean) / variance.sqrt()).abs() <= z).double().mean())
    _close(width, 2 * z * variance.sqrt().mean(), tol=1e-9)


def test_calibrated_gaussians_have_their_coverage():
    g = torch.Generator().manual_seed(3)
    variance = torch.rand(100_000, generator=g, dtype=torch.float64) + 0.2
    target = variance.sqrt() * torch.randn(100_000, generator=g, dtype=torch.float64)
    mean = torch.zeros_like(variance)
    assert abs(float(metrics.coverage(mean, variance, target).fraction) - 0.95) < 0.003
    assert float(metrics.centered_quantile_metric(mean, variance, target)) < 2e-3
    assert float(metrics.centered_quantile_metric(mean, 4 * variance, target)) > 0.1


def test_coverage_curve_is_coverage_at_each_level_and_fixed_at_the_ends():
    mean, variance, target = _regression(n=57)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    curve = metrics.coverage_curve(mean, variance, target, levels)
    assert float(curve[0]) == 0.0
    assert float(curve[-1]) == 1.0
    for level, value in zip(levels[1:-1], curve[1:-1], strict=True):
        _close(value, metrics.coverage(mean, variance, target, level=float(level)).fraction)


def test_cqm_by_hand():
    # z-scores inside the 0.35 and 0.75 intervals, one far out: c = 0, 0, 0, then 1/3 from 0.4 and 2/3 from 0.8 on.
    z = Normal(0.0, 1.0).icdf(torch.tensor([0.5 + 0.35 / 2, 0.5 + 0.75 / 2], dtype=torch.float64))
    target = torch.tensor([float(z[0]), -float(z[1]), 50.0], dtype=torch.float64)
    curve = [0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3]
    expected = 0.1 * sum(abs(c - a / 10) for a, c in enumerate(curve, start=1))
    _close(metrics.centered_quantile_metric(torch.zeros(3), torch.ones(3), target), expected, tol=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_scores_follow_the_units(scale, shift, seed):
    mean, variance, target = _regression(n=20, seed=seed)
    moved = (mean * scale + shift, variance * scale**2, target * scale + shift)
    tol = 1e-9 * max(1.0, abs(shift) / scale)
    _close(metrics.gaussian_crps(*moved) / scale, metrics.gaussian_crps(mean, variance, target), tol=tol)
    _close(metrics.gaussian_nll(*moved) - math.log(scale), metrics.gaussian_nll(mean, variance, target), tol=tol)
    _close(metrics.rmse(moved[0], moved[2]) / scale, metrics.rmse(mean, target), tol=tol)


# --- classification --------------------------------------------------------------------------------------------------


def test_classification_against_sklearn():
    p, y = _classification()
    labels = range(p.shape[1])
    _close(metrics.accuracy(p, y), sk.accuracy_score(y.numpy(), p.argmax(-1).numpy()))
    _close(metrics.categorical_nll(p, y), sk.log_loss(y.numpy(), p.numpy(), labels=list(labels)))
    hot = torch.nn.functional.one_hot(y, p.shape[1])
    _close(metrics.brier_score(p, y), p.shape[1] * sk.mean_squared_error(hot.numpy(), p.numpy()))
    _close(metrics.predictive_entropy(p), Categorical(probs=p).entropy())


def test_binary_brier_is_twice_sklearns():
    p, y = _classification(c=2)
    _close(metrics.brier_score(p, y), 2 * sk.brier_score_loss(y.numpy(), p[:, 1].numpy()))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_against_a_loop_and_torchmetrics(bins):
    p, y = _classification(n=500)
    value, total = metrics.expected_calibration_error(p, y, bins=bins), 0.0
    confidence, predicted = p.max(-1)
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = (predicted == y)[inside].double().mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    _close(value, total)
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.classification.MulticlassCalibrationError(num_classes=4, n_bins=bins, norm="l1")
    _close(value, metric(p, y).double(), tol=1e-6)


def test_ece_bins_are_open_below_and_closed_above():
    # Confidence 0.5 = 1/2 belongs to the first of two bins; with [lo, hi) both points would share the second bin.
    p = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.25, 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    count, confidence, correct = metrics.reliability_bins(p, y, bins=2)
    _close(count, [1.0, 1.0])
    _close(confidence, [0.5, 0.75])
    _close(correct, [0.0, 1.0])
    _close(metrics.expected_calibration_error(p, y, bins=2), 0.5 * 0.5 + 0.5 * 0.25)


def test_ece_of_certain_points_and_empty_bins():
    p = torch.eye(3, dtype=torch.float64)
    _close(metrics.expected_calibration_error(p, torch.arange(3)), 0.0)
    _close(metrics.expected_calibration_error(p, torch.tensor([1, 2, 0])), 1.0)
    assert metrics.reliability_bins(p, torch.arange(3)).confidence[:14].isnan().all()


def test_nll_is_infinite_for_a_label_of_probability_zero():
    assert metrics.categorical_nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_float32_softmax_is_accepted():
    p, y = _classification(n=1000, c=10)
    assert abs(float(metrics.categorical_nll(p.float(), y) - metrics.categorical_nll(p, y))) < 1e-6


@pytest.mark.parametrize("ties", [False, True])
def test_ood_auc_against_sklearn(ties):
    g = torch.Generator().manual_seed(5)
    inside = torch.randn(400, generator=g, dtype=torch.float64)
    outside = torch.randn(150, generator=g, dtype=torch.float64) + 0.7
    if ties:
        inside, outside = inside.round(), outside.round()
    truth = torch.cat([torch.zeros(400), torch.ones(150)])
    expected = sk.roc_auc_score(truth.numpy(), torch.cat([inside, outside]).numpy())
    _close(metrics.ood_auc(inside, outside), expected)


def test_ood_auc_extremes():
    assert metrics.ood_auc(torch.zeros(3), torch.zeros(4)) == 0.5
    assert metrics.ood_auc(torch.zeros(3), torch.ones(4)) == 1.0
    assert metrics.ood_auc(torch.ones(3), torch.zeros(4)) == 0.0
    assert metrics.ood_auc(torch.zeros(2), torch.tensor([math.inf])) == 1.0


# --- Gaussian KL -----------------------------------------------------------------------------------------------------


def _covariance(n, seed):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


def test_gaussian_kl_against_torch_distributions():
    s0, s1 = _covariance(6, 0), _covariance(6, 1)
    m0, m1 = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    result = divergence.gaussian_kl(s0, s1, m0, m1)
    p, q = MultivariateNormal(m0, s0), MultivariateNormal(m1, s1)
    _close(result.forward, kl_divergence(p, q), tol=1e-9)
    _close(result.reverse, kl_divergence(q, p), tol=1e-9)
    p, q = Normal(m0, s0.diagonal().sqrt()), Normal(m1, s1.diagonal().sqrt())
    _close(result.marginal_forward, kl_divergence(p, q).sum(), tol=1e-9)
    _close(result.marginal_reverse, kl_divergence(q, p).sum(), tol=1e-9)
    no_means = divergence.gaussian_kl(s0, s1)
    dense = 0.5 * (torch.linalg.solve(s1, s0).trace() - 6 + torch.logdet(s1) - torch.logdet(s0))
    _close(no_means.forward, dense, tol=1e-9)
    assert float(no_means.forward) != pytest.approx(float(no_means.reverse), rel=0.1)


def test_gaussian_kl_by_monte_carlo():
    s0, s1 = _covariance(3, 2), _covariance(3, 3)
    torch.manual_seed(4)
    p = MultivariateNormal(torch.zeros(3, dtype=torch.float64), s0)
    q = MultivariateNormal(torch.zeros(3, dtype=torch.float64), s1)
    x = p.sample((400_000,))
    log_ratio = p.log_prob(x) - q.log_prob(x)
    error = 5 * float(log_ratio.std()) / math.sqrt(len(x))
    assert abs(float(divergence.gaussian_kl(s0, s1).forward - log_ratio.mean())) < error


def test_gaussian_kl_of_equal_gaussians_is_zero():
    assert abs(float(divergence.gaussian_kl(_covariance(5, 1), _covariance(5, 1)).forward)) < 1e-12


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [metrics.gaussian_nll, metrics.gaussian_crps, metrics.coverage])
def test_regression_scores_refuse_bad_input(function):
    one, bad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    with pytest.raises(ValueError, match=r"target: .*shape .*\(3,\), got \(4,\)"):
        function(one, one, torch.ones(4))
    with pytest.raises(ValueError, match="variance: expected positive"):
        function(one, torch.zeros(3), one)
    with pytest.raises(ValueError, match="mean: expected finite numbers, got 1"):
        function(bad, one, one)
    with pytest.raises(ValueError, match="at least one"):
        function(torch.ones(0), torch.ones(0), torch.ones(0))
    with pytest.raises(TypeError, match=r"mean: expected a torch\.Tensor, got list"):
        function([1.0], one, one)


@pytest.mark.parametrize(
    "function",
    [metrics.accuracy, metrics.categorical_nll, metrics.brier_score, metrics.expected_calibration_error],
)
def test_classification_scores_refuse_bad_input(function):
    p, y = _classification(n=5, c=3)
    with pytest.raises(ValueError, match="labels: expected classes 0 to 2, got 0 to 3"):
        function(p, torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(TypeError, match="labels: expected a tensor of integers"):
        function(p, y.double())
    with pytest.raises(ValueError, match=r"labels: expected shape \(5,\)"):
        function(p, y[:4])
    with pytest.raises(ValueError, match="sum to one"):
        function(2 * p, y)
    with pytest.raises(ValueError, match=r"expected shape \(N, C\)"):
        function(p[:, 0], y)


def test_other_bad_input():
    p, y = _classification(n=5, c=3)
    with pytest.raises(ValueError, match="bins"):
        metrics.reliability_bins(p, y, bins=0)
    with pytest.raises(ValueError, match="level"):
        metrics.coverage(torch.ones(1), torch.ones(1), torch.ones(1), level=1.0)
    with pytest.raises(ValueError, match="levels"):
        metrics.coverage_curve(torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([1.5]))
    with pytest.raises(ValueError, match="outside: expected no nan"):
        metrics.ood_auc(torch.ones(2), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="inside: expected a vector"):
        metrics.ood_auc(torch.ones(0), torch.ones(2))
    with pytest.raises(ValueError, match="covariance_1: not positive definite"):
        divergence.gaussian_kl(torch.eye(2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="both or none"):
        divergence.gaussian_kl(torch.eye(2), torch.eye(2), torch.zeros(2))


def test_arguments_are_left_alone():
    mean = torch.zeros(4, requires_grad=True)
    variance, target = torch.ones(4), torch.ones(4)
    result = metrics.gaussian_nll(mean, variance, target)
    assert result.dtype == torch.float64
    assert not result.requires_grad
    assert mean.grad is None
    assert variance.dtype == torch.float32
