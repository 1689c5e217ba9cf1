"""Joint losses against torch.distributions and loops over tuples; the draws against their covariance (law D4n)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from ntkgp.evaluation import metrics


def _close(value, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64), expected, rtol=tol, atol=tol)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _covariance(n, seed=0):
    root = _draw(n, n, seed=seed) * torch.logspace(-1, 0.7, n, dtype=torch.float64).unsqueeze(-1)
    return root @ root.mT + 1e-3 * torch.eye(n, dtype=torch.float64)


# --- draws -----------------------------------------------------------------------------------------------------------


def _largest_z(samples, mean, covariance):
    """Largest distance of an entry of the empirical covariance from Σ, in its standard errors (Wishart)."""
    centred = samples - mean
    empirical = centred.mT @ centred / len(samples)
    variance = covariance.diagonal()
    error = ((covariance.square() + variance.unsqueeze(-1) * variance) / len(samples)).sqrt()
    return float(((empirical - covariance).abs() / error).max())


def test_draws_have_the_covariance_and_a_factor_from_the_wrong_side_does_not():
    """D4n: 10×10, 55 different entries, 5 standard errors; LᵀL fails by a factor of hundreds."""
    covariance, mean = _covariance(10), _draw(10, seed=1)
    assert _largest_z(metrics.gaussian_samples(mean, covariance, 50_000), mean, covariance) < 5
    factor = torch.linalg.cholesky(covariance)
    noise = _draw(50_000, 10, seed=2)
    assert _largest_z(mean + noise @ factor.mT, mean, covariance) < 5
    assert _largest_z(mean + noise @ factor, mean, covariance) > 500


def test_mean_of_the_draws():
    covariance, mean = _covariance(6), 3 * _draw(6, seed=1)
    samples = metrics.gaussian_samples(mean, covariance, 50_000)
    z = (samples.mean(0) - mean) / (covariance.diagonal() / 50_000).sqrt()
    assert z.abs().max() < 4.5


def test_batches_are_drawn_each_with_its_own_covariance():
    covariance = torch.stack([_covariance(4, seed=s) for s in range(6)]).reshape(2, 3, 4, 4)
    mean = _draw(2, 3, 4)
    samples = metrics.gaussian_samples(mean, covariance, 20_000)
    assert samples.shape == (20_000, 2, 3, 4)
    for i in range(2):
        for j in range(3):
            assert _largest_z(samples[:, i, j], mean[i, j], covariance[i, j]) < 5
    crossed = samples[:, 0, 0].mT @ (samples[:, 0, 1] - mean[0, 1]) / 20_000
    scale = (samples[:, 0, 0].square().mean(0).unsqueeze(-1) * covariance[0, 1].diagonal() / 20_000).sqrt()
    assert (crossed / scale).abs().max() < 5


def test_singular_covariances_are_drawn_from_without_jitter():
    root = _draw(8, 3)
    samples = metrics.gaussian_samples(torch.zeros(8), root @ root.mT, 100)
    values = torch.linalg.svdvals(samples)
    assert values[3] < 1e-6 * values[0]
    assert values[2] > 1e-2 * values[0]
    assert (metrics.gaussian_samples(torch.ones(2), torch.zeros(2, 2), 3) == 1).all()


def test_seeds_repeat_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (metrics.gaussian_samples(torch.zeros(3), torch.eye(3), 4, seed=s) for s in (1, 1, 2))
    metrics.dyadic_tuples(10, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# --- tuples ----------------------------------------------------------------------------------------------------------


def test_tuples_come_from_their_anchors_evenly():
    tuples = metrics.dyadic_tuples(7, 20_000, size=6, anchors=3)
    assert tuples.shape == (20_000, 6)
    assert max(len(row.unique()) for row in tuples[:2000]) == 3
    share = tuples.flatten().bincount(minlength=7) / tuples.numel()
    assert (share - 1 / 7).abs().max() < 0.006
    # Two different places name the same point with probability 1/κ, anchors being different points.
    same = (tuples[:, 0] == tuples[:, 1]).double().mean()
    assert abs(float(same) - 1 / 3) < 4 * math.sqrt(2 / 9 / 20_000)
    assert torch.equal(metrics.dyadic_tuples(7, 5, seed=3), metrics.dyadic_tuples(7, 5, seed=3))
    assert sorted(metrics.dyadic_tuples(2, 1, size=200)[0].unique().tolist()) == [0, 1]


# --- joint loss from draws -------------------------------------------------------------------------------------------


def test_sampled_joint_nll_is_the_loop():
    log_p, tuples = -_draw(5, 8).square(), metrics.dyadic_tuples(8, 30, size=4)
    losses = []
    for row in tuples:
        products = [math.prod(float(log_p[s, n].exp()) for n in row) for s in range(5)]
        losses.append(-math.log(sum(products) / 5) / 4)
    _close(metrics.sampled_joint_nll(log_p, tuples), sum(losses) / 30)


def test_categorical_joint_nll_of_single_points_is_the_loss_of_the_mean_probability():
    logits, labels = 2 * _draw(6, 20, 4), torch.arange(20) % 4
    single = metrics.categorical_joint_nll(logits, labels, torch.arange(20).unsqueeze(-1))
    _close(single, metrics.categorical_nll(logits.softmax(-1).mean(0), labels))
    one = metrics.categorical_joint_nll(logits[:1], labels)
    _close(one, metrics.categorical_nll(logits[0].softmax(-1), labels))


def test_joint_loss_tells_joint_draws_from_shuffled_ones():
    """Same marginals, but only joint draws know that repeats of a point share their label."""
    logits, labels = 4 * _draw(400, 30, 2), torch.arange(30) % 2
    tuples = metrics.dyadic_tuples(30, 200, size=10)
    shuffled = torch.stack([logits[torch.randperm(400, generator=torch.Generator().manual_seed(n))] for n in range(9)])
    table = logits.log_softmax(-1)[:, torch.arange(30), labels]
    joint = metrics.categorical_joint_nll(logits, labels, tuples)
    _close(joint, metrics.sampled_joint_nll(table, tuples))
    marginal = metrics.categorical_nll(logits.softmax(-1).mean(0), labels)
    assert joint < marginal - 0.3
    # One point ten times, each time from its own shuffled draws: the product of the marginals.
    point = torch.stack([logits[:, 0], *shuffled[:, :, 0]], 1).log_softmax(-1)[..., labels[0]]
    apart = metrics.sampled_joint_nll(point)
    together = metrics.sampled_joint_nll(point[:, :1].expand(-1, 10))
    assert together < apart - 0.3


def test_joint_loss_survives_tiny_likelihoods():
    log_p = torch.full((3, 50), -1e4, dtype=torch.float64)
    _close(metrics.sampled_joint_nll(log_p), 1e4)
    assert metrics.sampled_joint_nll(torch.full((2, 3), -math.inf)) == math.inf


# --- joint loss of Gaussians -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
def test_gaussian_joint_nll_is_the_log_density(outputs):
    n = 6 * outputs
    covariance, mean, target = _covariance(n), _draw(6, outputs), _draw(6, outputs, seed=1)
    noise = torch.linspace(0.1, 0.5, outputs, dtype=torch.float64)
    total = covariance + torch.diag(noise.repeat(6))
    expected = -MultivariateNormal(mean.flatten(), total).log_prob(target.flatten()) / n
    _close(metrics.gaussian_joint_nll(mean, covariance, target, noise=noise), expected, tol=1e-9)
    if outputs == 1:
        value = metrics.gaussian_joint_nll(mean[:, 0], covariance, target[:, 0], noise=float(noise))
        _close(value, expected, tol=1e-9)


@pytest.mark.parametrize("outputs", [1, 2])
def test_gaussian_joint_nll_of_tuples_is_the_loop(outputs, monkeypatch):
    covariance, mean, target = _covariance(5 * outputs), _draw(5, outputs), _draw(5, outputs, seed=1)
    noise = torch.full((outputs,), 0.3, dtype=torch.float64)
    tuples = metrics.dyadic_tuples(5, 12, size=4)
    losses = []
    for row in tuples:
        places = [int(n) * outputs + c for n in row for c in range(outputs)]
        select = torch.eye(5 * outputs, dtype=torch.float64)[places]
        total = select @ covariance @ select.mT + 0.3 * torch.eye(4 * outputs, dtype=torch.float64)
        losses.append(-MultivariateNormal(select @ mean.flatten(), total).log_prob(select @ target.flatten()))
    expected = torch.stack(losses).mean() / (4 * outputs)
    _close(metrics.gaussian_joint_nll(mean, covariance, target, noise=noise, tuples=tuples), expected, tol=1e-9)
    monkeypatch.setattr("ntkgp.evaluation.metrics.joint._NUMBERS", 5 * (4 * outputs) ** 2)  # blocks of 5, 5 and 2
    _close(metrics.gaussian_joint_nll(mean, covariance, target, noise=noise, tuples=tuples), expected, tol=1e-9)


def test_gaussian_joint_nll_without_correlations_is_the_marginal_loss():
    mean, target, variance = _draw(9, 2), _draw(9, 2, seed=1), _draw(9, 2, seed=2).square() + 0.1
    value = metrics.gaussian_joint_nll(mean, torch.diag(variance.flatten()), target, noise=0.2)
    _close(value, metrics.gaussian_nll(mean, variance + 0.2, target), tol=1e-10)


def test_joint_draws_reach_the_joint_gaussian():
    covariance, mean, target = _covariance(4), _draw(4), _draw(4, seed=1)
    tuples = metrics.dyadic_tuples(4, 50, size=4)
    draws = metrics.gaussian_samples(mean, covariance, 100_000)
    log_p = torch.distributions.Normal(draws, 1.0).log_prob(target)
    expected = metrics.gaussian_joint_nll(mean, covariance, target, noise=1.0, tuples=tuples)
    _close(metrics.sampled_joint_nll(log_p, tuples), expected, tol=1e-2)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_draws_refuse_bad_input():
    with pytest.raises(ValueError, match=r"covariance: expected shape \(3, 3\), got \(2, 2\)"):
        metrics.gaussian_samples(torch.zeros(3), torch.eye(2), 1)
    with pytest.raises(ValueError, match="covariance: expected symmetric"):
        metrics.gaussian_samples(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1)
    with pytest.raises(ValueError, match="covariance: not positive semidefinite"):
        metrics.gaussian_samples(torch.zeros(2), torch.diag(torch.tensor([1.0, -0.1])), 1)
    with pytest.raises(ValueError, match="num_samples: expected a positive integer, got 0"):
        metrics.gaussian_samples(torch.zeros(2), torch.eye(2), 0)


def test_tuples_refuse_bad_input():
    with pytest.raises(ValueError, match="anchors: expected at most the 3 points"):
        metrics.dyadic_tuples(3, 1, anchors=4)
    with pytest.raises(ValueError, match="num_tuples: expected a positive integer"):
        metrics.dyadic_tuples(3, 0)
    log_p = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="tuples: expected indices 0 to 2, got 0 to 3"):
        metrics.sampled_joint_nll(log_p, torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"tuples: expected shape \(B, τ\), got \(3,\)"):
        metrics.sampled_joint_nll(log_p, torch.arange(3))
    for bad in (torch.tensor([[True]]), torch.zeros(1, 1), [[0]]):
        with pytest.raises(TypeError, match="tuples: expected a tensor of integers"):
            metrics.sampled_joint_nll(log_p, bad)


def test_joint_losses_refuse_bad_input():
    with pytest.raises(ValueError, match=r"log_likelihood: expected shape \(S, N\)"):
        metrics.sampled_joint_nll(torch.zeros(3))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log_likelihood: expected finite numbers or -inf"):
            metrics.sampled_joint_nll(torch.full((1, 2), bad))
    with pytest.raises(ValueError, match=r"logits: expected shape \(S, N, C\), got \(2, 3\)"):
        metrics.categorical_joint_nll(torch.zeros(2, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match="labels: expected classes 0 to 2"):
        metrics.categorical_joint_nll(torch.zeros(1, 2, 3), torch.tensor([0, 3]))
    mean, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"covariance: expected shape \(6, 6\), got \(3, 3\)"):
        metrics.gaussian_joint_nll(torch.zeros(3, 2), eye, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="target: expected the shape of mean"):
        metrics.gaussian_joint_nll(mean, eye, torch.zeros(4))
    with pytest.raises(ValueError, match="mean: expected shape"):
        metrics.gaussian_joint_nll(torch.zeros(1, 1, 3), eye, torch.zeros(1, 1, 3))
    for noise in (-1.0, torch.ones(2), math.nan):
        with pytest.raises(ValueError, match="noise: expected"):
            metrics.gaussian_joint_nll(mean, eye, mean, noise=noise)
    with pytest.raises(ValueError, match="repeated points need positive noise"):
        metrics.gaussian_joint_nll(mean, eye, mean, tuples=torch.tensor([[1, 1]]))
