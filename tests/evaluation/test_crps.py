"""CRPS and probability integral transforms against double loops, integrals over thresholds, torchmetrics and scipy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ntkgp.evaluation import metrics


def _close(value, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64), expected, rtol=tol, atol=tol)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mixture(shape, components=3):
    means, variances = 2 * _draw(components, *shape), _draw(components, *shape, seed=1).square() + 0.1
    return means, variances, 2 * _draw(*shape, seed=2), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_mixture_crps_is_the_integral_over_thresholds(weighted):
    means, variances, target, weights = _mixture((4,))
    share = weights if weighted else torch.full((3,), 1 / 3, dtype=torch.float64)
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64).unsqueeze(-1)
    values = []
    for n in range(4):
        cdf = (share * Normal(means[:, n], variances[:, n].sqrt()).cdf(grid)).sum(-1)
        values.append(torch.trapezoid((cdf - (grid.squeeze(-1) >= target[n]).double()).square(), grid.squeeze(-1)))
    expected = torch.stack(values).mean()
    _close(metrics.mixture_crps(means, variances, target, weights if weighted else None), expected, tol=5e-5)


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_mixture_of_one_or_of_equals_is_the_gaussian(shape):
    means, variances, target, weights = _mixture(shape)
    one = metrics.gaussian_crps(means[0], variances[0], target)
    _close(metrics.mixture_crps(means[:1], variances[:1], target), one)
    repeated = [value[:1].expand(3, *shape) for value in (means, variances)]
    _close(metrics.mixture_crps(*repeated, target, weights), one)
    certain = torch.tensor([1.0, 0.0, 0.0])
    _close(metrics.mixture_crps(means, variances, target, certain), one)


def test_narrow_mixture_is_the_score_of_its_centres_as_samples():
    means, variances, target, _ = _mixture((6, 2))
    narrow = metrics.mixture_crps(means, 1e-16 * variances, target)
    _close(narrow, metrics.sample_crps(means, target, fair=False), tol=1e-7)


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_sample_crps_is_the_double_loop(fair, shape):
    samples, target = _draw(7, *shape).round(decimals=1), _draw(*shape, seed=1)  # rounded: with ties
    first = sum((x - target).abs() for x in samples) / 7
    pairs = sum((x - z).abs() for x in samples for z in samples)
    _close(metrics.sample_crps(samples, target, fair=fair), (first - pairs / (2 * 7 * (6 if fair else 7))).mean())


def test_sample_crps_against_torchmetrics():
    regression = pytest.importorskip("torchmetrics.regression")
    if not hasattr(regression, "ContinuousRankedProbabilityScore"):
        pytest.skip("this torchmetrics has no CRPS")
    samples, target = _draw(9, 40), _draw(40, seed=1)
    theirs = regression.ContinuousRankedProbabilityScore()(samples.mT, target)
    _close(metrics.sample_crps(samples, target, fair=False), theirs.double(), tol=1e-6)


def test_fair_score_has_no_bias_from_few_samples():
    # 40,000 targets with two samples each, all from one Gaussian: E CRPS = 1/√π, and 1/(2√π) more without `fair`.
    samples, target = _draw(2, 40_000), _draw(40_000, seed=1)
    assert abs(float(metrics.sample_crps(samples, target)) - 1 / math.sqrt(math.pi)) < 0.015
    assert abs(float(metrics.sample_crps(samples, target, fair=False)) - 1.5 / math.sqrt(math.pi)) < 0.015


def test_many_samples_reach_the_closed_form_of_the_mixture():
    means, variances, target, weights = _mixture((3,))
    choice = torch.multinomial(weights, 200_000, replacement=True, generator=torch.Generator().manual_seed(3))
    samples = means[choice] + variances[choice].sqrt() * _draw(200_000, 3, seed=4)
    expected = metrics.mixture_crps(means, variances, target, weights)
    _close(metrics.sample_crps(samples, target), expected, tol=1e-2)


def test_sample_crps_far_from_zero_keeps_its_digits():
    samples, target = _draw(50, 4), _draw(4, seed=1)
    _close(metrics.sample_crps(samples + 1e8, target + 1e8), metrics.sample_crps(samples, target), tol=1e-7)


# --- probability integral transform ----------------------------------------------------------------------------------


def test_gaussian_pit_against_scipy():
    mean, variance, target = _draw(8, 2), _draw(8, 2, seed=1).square() + 0.1, _draw(8, 2, seed=2)
    expected = stats.norm.cdf(target.numpy(), mean.numpy(), variance.sqrt().numpy())
    _close(metrics.gaussian_pit(mean, variance, target), expected)


def test_mixture_pit_is_the_distribution_function():
    means, variances, target, weights = _mixture((5,))
    components = Normal(means.mT, variances.mT.sqrt())
    expected = MixtureSameFamily(Categorical(weights.expand(5, 3)), components).cdf(target)
    _close(metrics.mixture_pit(means, variances, target, weights), expected)
    _close(metrics.mixture_pit(means[:1], variances[:1], target), metrics.gaussian_pit(means[0], variances[0], target))


def test_sample_pit_by_hand():
    samples = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    for target, expected in ((-1.0, 0.5 / 5), (0.5, 1.5 / 5), (1.0, (1 + 0.5 * 3) / 5), (9.0, 4.5 / 5)):
        _close(metrics.sample_pit(samples, torch.tensor([target])), [expected])


def test_randomised_pit_is_exactly_uniform_even_for_counts():
    # Poisson counts have many ties; only the randomised transform is uniform, and the middle of the rank is not.
    counts = torch.poisson(torch.full((6, 20_000), 1.5), generator=torch.Generator().manual_seed(0))
    samples, target = counts[:5], counts[5]
    assert stats.kstest(metrics.sample_pit(samples, target, seed=1).numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(metrics.sample_pit(samples, target).numpy(), "uniform").pvalue < 1e-10
    assert torch.equal(metrics.sample_pit(samples, target, seed=1), metrics.sample_pit(samples, target, seed=1))


def test_pit_tells_calibrated_from_narrow_shifted_and_wide():
    target, zero, one = _draw(5000), torch.zeros(5000), torch.ones(5000)
    limit = 1.63 / math.sqrt(5000)  # 99 % point
    assert metrics.pit_distance(metrics.gaussian_pit(zero, one, target)) < limit
    for mean, variance in ((zero, 0.25 * one), (zero, 4 * one), (0.2 * one, one)):
        assert metrics.pit_distance(metrics.gaussian_pit(mean, variance, target)) > 2 * limit


def test_pit_distance_against_scipy():
    values = _draw(37, 3).sigmoid()
    _close(metrics.pit_distance(values), stats.kstest(values.flatten().numpy(), "uniform").statistic)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [metrics.mixture_crps, metrics.mixture_pit])
def test_mixtures_refuse_bad_input(function):
    means, variances, target, weights = _mixture((5,))
    with pytest.raises(ValueError, match=r"means: expected shape \(K, 5\), got \(5,\)"):
        function(means[0], variances, target)
    with pytest.raises(ValueError, match=r"variances: expected the shape of means \(3, 5\), got \(2, 5\)"):
        function(means, variances[:2], target)
    with pytest.raises(ValueError, match="variances: expected positive"):
        function(means, 0 * variances, target)
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\)"):
        function(means, variances, target, weights[:2])
    with pytest.raises(ValueError, match="weights: expected non-negative numbers that sum to one"):
        function(means, variances, target, 2 * weights)
    with pytest.raises(ValueError, match="target: expected finite"):
        function(means, variances, target / 0.0)


@pytest.mark.parametrize("function", [metrics.sample_crps, metrics.sample_pit])
def test_samples_refuse_bad_input(function):
    with pytest.raises(ValueError, match=r"samples: expected shape \(S, 3\), got \(3, 5\)"):
        function(torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(ValueError, match="samples: expected at least"):
        function(torch.zeros(0, 3), torch.zeros(3))
    with pytest.raises(TypeError, match=r"samples: expected a torch\.Tensor, got list"):
        function([[0.0]], torch.zeros(1))


def test_other_bad_input():
    with pytest.raises(ValueError, match="samples: expected at least 2 per target, got 1"):
        metrics.sample_crps(torch.zeros(1, 3), torch.zeros(3))
    _close(metrics.sample_crps(torch.zeros(1, 3), torch.ones(3), fair=False), 1.0)
    with pytest.raises(ValueError, match=r"values: expected numbers in \[0, 1\], got -0.5 to 0.5"):
        metrics.pit_distance(torch.tensor([-0.5, 0.5]))
