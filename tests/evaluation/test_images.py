"""Scores and the picture of a reconstruction, against definitions written out with scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from scipy import ndimage, stats

from ntkgp.evaluation.metrics.images import FLOORS, QUANTISATION, psnr, score_image, ssim


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(9, 7, generator=generator, dtype=torch.float64)
    root = 0.1 * torch.randn(63, 63, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / 63
    draw = torch.linalg.cholesky(covariance) @ torch.randn(63, generator=generator, dtype=torch.float64)
    mean = truth + draw.reshape(9, 7)
    return truth, mean, covariance


def _ssim(x, y, span):
    """Wang et al. with scipy's Gaussian filter of 11 pixels, windows inside the image."""

    def smooth(a):
        return ndimage.gaussian_filter(a, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = smooth(x), smooth(y)
    xx, yy, xy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    return ((2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2))).mean()


def test_psnr_states_its_range():
    truth = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert psnr(truth + 0.1, truth) == pytest.approx(20 * math.log10(2 / 0.1), abs=1e-5)
    assert psnr(truth + 0.1, truth, data_range=1.0) == pytest.approx(20, abs=1e-5)
    assert psnr(truth, truth) == math.inf
    with pytest.raises(ValueError, match="constant image needs a stated range"):
        psnr(torch.ones(3), torch.ones(3))


def test_ssim_is_that_of_wang_et_al():
    generator = np.random.default_rng(0)
    x, y = generator.random((24, 31)), generator.random((24, 31))
    y = 0.7 * x + 0.3 * y
    for span in (None, 2.0):
        expected = _ssim(x, y, np.ptp(y) if span is None else span)
        assert ssim(torch.tensor(x), torch.tensor(y), span) == pytest.approx(expected, rel=1e-10)
    colour = ssim(torch.tensor(np.stack([x, x])), torch.tensor(np.stack([y, y])), 2.0)
    assert colour == pytest.approx(_ssim(x, y, 2.0), rel=1e-10)
    x = torch.rand(4, 5)
    assert 0.5 < ssim(x, x + 0.01 * torch.randn(4, 5)) < 1  # a smaller window
    with pytest.raises(ValueError, match="odd number"):
        ssim(torch.rand(9, 9), torch.rand(9, 9), window=4)
    with pytest.raises(ValueError, match="H, W"):
        ssim(torch.rand(9), torch.rand(9))


def test_likelihoods_are_those_of_scipy(problem):
    truth, mean, covariance = problem
    mask = torch.zeros(9, 7, dtype=torch.bool)
    mask[2:6, 1:5] = True
    scores = score_image(truth, mean, covariance, floors=(1e-4, 1e-3), patch_size=3, foreground=mask)
    inside = mask.flatten().numpy()
    for found, calibration in zip(scores.likelihoods, scores.calibrations, strict=True):
        total = (covariance + found.floor * torch.eye(63, dtype=torch.float64)).numpy()
        error = (truth - mean).flatten().numpy()

        def density(index, total=total, error=error):
            return stats.multivariate_normal(cov=total[np.ix_(index, index)]).logpdf(error[index])

        assert found.full == pytest.approx(density(np.arange(63)) / 63, rel=1e-9)
        single = stats.norm.logpdf(error, scale=np.sqrt(total.diagonal()))
        assert found.diagonal == pytest.approx(single.mean(), rel=1e-9)
        assert found.foreground == pytest.approx(density(np.flatnonzero(inside)) / inside.sum(), rel=1e-9)
        assert found.foreground_diagonal == pytest.approx(single[inside].mean(), rel=1e-9)
        grid = np.arange(63).reshape(9, 7)
        patches = [grid[r : r + 3, c : c + 3].ravel() for r in range(0, 9, 3) for c in range(0, 7, 3)]
        assert sorted(np.concatenate(patches)) == list(range(63))
        assert found.patch == pytest.approx(sum(map(density, patches)) / 63, rel=1e-9)
        z = error / np.sqrt(total.diagonal())
        assert calibration.z_sd == pytest.approx(np.sqrt((z**2).mean()), rel=1e-9)
        assert calibration.coverage_95 == pytest.approx((np.abs(z) <= stats.norm.ppf(0.975)).mean())
        assert calibration.coverage_68 == pytest.approx((np.abs(z) <= 1).mean())
        white = np.linalg.solve(np.linalg.cholesky(total), error)
        assert calibration.whitened_sd == pytest.approx(np.sqrt((white**2).mean()), rel=1e-9)
    sd = covariance.diagonal().sqrt()
    expected = stats.spearmanr((truth - mean).abs().flatten(), sd).statistic
    assert scores.rank_correlation == pytest.approx(expected)
    mse = float((truth - mean).square().mean())
    assert scores.oracle == pytest.approx(-0.5 * math.log(2 * math.pi * math.e * mse))
    assert scores.num_foreground == 16


def test_no_constant_variance_beats_the_oracle(problem):
    truth, mean, _ = problem
    for variance in (1e-4, 1e-3, float((truth - mean).square().mean()), 1e-1):
        scores = score_image(truth, mean, variance=torch.full_like(truth, variance), floors=(0.0,))
        assert scores.likelihoods[0].diagonal <= scores.oracle + 1e-12
        assert math.isnan(scores.likelihoods[0].full)
        assert math.isnan(scores.rank_correlation)


def test_samples_are_their_covariance(problem):
    """By the matrix inversion lemma where they are fewer than the pixels, densely where they are more."""
    truth, mean, covariance = problem
    factor = torch.linalg.cholesky(covariance)
    for count in (20, 100):
        samples = mean + (torch.randn(count, 63, dtype=torch.float64) @ factor.T).reshape(count, 9, 7)
        centred = (samples - samples.mean(0)).reshape(count, 63)
        dense = score_image(truth, mean, centred.T @ centred / (count - 1))
        found = score_image(truth, mean, samples=samples)
        for a, b in zip(found.likelihoods, dense.likelihoods, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8)
        for a, b in zip(found.calibrations, dense.calibrations, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7)


def test_a_calibrated_posterior_scores_as_one():
    """Errors drawn from the covariance itself: coverage and z within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(60, 60, generator=generator, dtype=torch.float64)
    variance = 0.01 + torch.rand(60, 60, generator=generator, dtype=torch.float64)
    mean = truth + variance.sqrt() * torch.randn(60, 60, generator=generator, dtype=torch.float64)
    calibration = score_image(truth, mean, variance=variance, floors=(0.0,)).calibrations[0]
    assert abs(calibration.coverage_95 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 3600)
    assert abs(calibration.coverage_68 - 0.6827) < 4 * math.sqrt(0.68 * 0.32 / 3600)
    assert abs(calibration.z_sd - 1) < 4 / math.sqrt(2 * 3600)


def test_a_distribution_over_pixels_and_the_table(problem):
    truth, mean, covariance = problem
    scores = score_image(truth, MultivariateNormal(mean.flatten(), covariance))
    assert scores == score_image(truth, mean, covariance)
    assert [entry.floor for entry in scores.likelihoods] == list(FLOORS)
    assert pytest.approx(1.28e-6, rel=2e-3) == QUANTISATION
    table = scores.as_dict()
    assert table["ll_full@0.0001"] == scores.likelihoods[0].full
    assert table["coverage_95@1.3e-06"] == scores.calibrations[1].coverage_95
    assert "oracle homoscedastic" in str(scores)
    assert "1.00e-04" in str(scores)


def test_bad_input_is_refused(problem):
    truth, mean, covariance = problem
    with pytest.raises(ValueError, match="one of the three, got none"):
        score_image(truth, mean)
    with pytest.raises(ValueError, match="one of the three"):
        score_image(truth, mean, covariance, variance=truth)
    with pytest.raises(ValueError, match=r"covariance: expected shape \(63, 63\)"):
        score_image(truth, mean, torch.eye(4))
    with pytest.raises(ValueError, match="truth: expected the shape of mean"):
        score_image(truth[:4], mean, covariance)
    with pytest.raises(ValueError, match="variance: expected numbers >= 0"):
        score_image(truth, mean, variance=-truth)
    with pytest.raises(ValueError, match="samples: expected shape"):
        score_image(truth, mean, samples=truth)
    with pytest.raises(ValueError, match="not positive definite at the floor 0"):
        score_image(truth, mean, torch.ones(63, 63), floors=(0.0,))
    with pytest.raises(ValueError, match="need a floor above zero"):
        score_image(truth, mean, variance=torch.zeros(9, 7), floors=(0.0,))
    with pytest.raises(ValueError, match="floors: expected numbers >= 0"):
        score_image(truth, mean, covariance, floors=(-1.0,))
    with pytest.raises(ValueError, match="foreground: expected a boolean mask"):
        score_image(truth, mean, covariance, foreground=torch.zeros(9, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="finite"):
        score_image(truth, mean * math.nan, covariance)


def test_the_picture_shows_the_numbers(problem, tmp_path):
    pytest.importorskip("matplotlib")
    from ntkgp.evaluation.plots_images import image_report

    truth, mean, covariance = problem
    variance = covariance.diagonal().reshape(9, 7)
    figure = image_report(mean, variance, truth, floor=1e-4, data_range=1.0, title="glyph")
    panels = [ax for ax in figure.axes if ax.get_title()]
    titles = [ax.get_title() for ax in panels]
    assert len(panels) == 6
    assert titles[1] == f"reconstruction, PSNR {psnr(mean, truth, 1.0):.2f} dB"
    shown = [ax.images[0].get_array() for ax in panels[:5]]
    np.testing.assert_allclose(shown[2], (truth - mean).abs())
    np.testing.assert_allclose(shown[3], variance.sqrt())
    np.testing.assert_allclose(shown[4], (truth - mean) / (variance + 1e-4).sqrt())
    assert panels[2].images[0].get_clim() == panels[3].images[0].get_clim()
    scores = score_image(truth, mean, covariance).calibrations[0]
    assert f"95 % covers {100 * scores.coverage_95:.1f} %" in titles[5]
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    plain = image_report(mean.unsqueeze(0), variance.unsqueeze(0))
    assert [ax.get_title() for ax in plain.axes if ax.get_title()] == ["reconstruction", "standard deviation"]
    with pytest.raises(ValueError, match="variance: expected numbers >= 0"):
        image_report(mean, -variance)
    with pytest.raises(ValueError, match="mean: expected an image"):
        image_report(mean.flatten(), variance.flatten())
    with pytest.raises(ValueError, match="floor"):
        image_report(mean, variance, floor=-1.0)
