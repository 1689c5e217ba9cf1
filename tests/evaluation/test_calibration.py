"""Calibration errors in other bins than equal ones of the largest probability, against loops and torchmetrics."""

from __future__ import annotations

import pytest
import torch

from ntkgp.evaluation import metrics


def _close(value, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64), expected, rtol=tol, atol=tol)


def _classification(n=300, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, c, generator=g, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(0.6 * logits, -1), 1, generator=g).squeeze(-1)
    return torch.softmax(logits, -1), labels


@pytest.mark.parametrize(("n", "bins"), [(300, 15), (307, 15), (10, 15), (300, 1)])
def test_adaptive_error_against_a_loop_over_sorted_points(n, bins):
    p, y = _classification(n)
    confidence, predicted = p.max(-1)
    order = confidence.argsort().tolist()
    total, sizes = 0.0, []
    for b in range(bins):
        members = [i for rank, i in enumerate(order) if b * n <= rank * bins < (b + 1) * n]
        sizes.append(len(members))
        if members:
            gap = (predicted == y)[members].double().mean() - confidence[members].mean()
            total += len(members) / n * abs(float(gap))
    assert max(sizes) - min(sizes) <= 1
    _close(metrics.adaptive_reliability_bins(p, y, bins).points, sizes)
    _close(metrics.adaptive_calibration_error(p, y, bins), total)


def test_one_bin_is_the_gap_of_the_means_in_every_form():
    p, y = _classification()
    gap = (metrics.accuracy(p, y) - p.max(-1).values.mean()).abs()
    _close(metrics.adaptive_calibration_error(p, y, bins=1), gap)
    _close(metrics.expected_calibration_error(p, y, bins=1), gap)


def test_equal_confidences_share_a_bin_in_any_order():
    top = torch.tensor([0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.9, 0.9], dtype=torch.float64)
    p, y = torch.stack([top, 1 - top], -1), torch.tensor([0, 1, 0, 0, 1, 0, 0, 1])
    binned = metrics.adaptive_reliability_bins(p, y, bins=4)  # ranks 0, 1, 1, 1, 1, 1, 6, 6: bins 0 and 3
    _close(binned.points, [6.0, 0.0, 0.0, 2.0])
    assert binned.accuracy[1:3].isnan().all()
    value = metrics.adaptive_calibration_error(p, y, bins=4)
    _close(value, 6 / 8 * abs(4 / 6 - 4.1 / 6) + 2 / 8 * abs(1 / 2 - 0.9))
    for seed in range(5):
        shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        _close(metrics.adaptive_calibration_error(p[shuffle], y[shuffle], bins=4), value)


def test_adaptive_bins_see_what_equal_bins_average_away():
    # All confidences in (14/15, 1]: one half too low, the other too high, equal on average.
    top = torch.linspace(0.95, 0.99, 1000, dtype=torch.float64)
    y = torch.zeros(1000).long()
    y[500:560] = 1  # accuracy 1 below, .88 above; mean confidence .97 against accuracy .94
    p = torch.stack([top, 1 - top], -1)
    assert metrics.expected_calibration_error(p, y) < 0.031
    assert metrics.adaptive_calibration_error(p, y) > 0.06


@pytest.mark.parametrize("bins", [1, 15])
def test_classwise_error_against_a_loop_and_torchmetrics(bins):
    p, y = _classification()
    total = 0.0
    for c in range(4):
        for b in range(bins):
            inside = (p[:, c] > b / bins) & (p[:, c] <= (b + 1) / bins)
            if inside.any():
                gap = (y == c)[inside].double().mean() - p[inside, c].mean()
                total += float(inside.double().mean() * gap.abs()) / 4
    value = metrics.classwise_calibration_error(p, y, bins)
    _close(value, total)
    classification = pytest.importorskip("torchmetrics.classification")
    theirs = [classification.BinaryCalibrationError(n_bins=bins)(p[:, c], (y == c).long()) for c in range(4)]
    _close(value, torch.stack(theirs).double().mean(), tol=1e-6)


def test_classwise_error_of_certain_points():
    p = torch.eye(3, dtype=torch.float64)
    _close(metrics.classwise_calibration_error(p, torch.arange(3)), 0.0)
    _close(metrics.classwise_calibration_error(p, torch.tensor([1, 2, 0])), 2 / 3)


@pytest.mark.parametrize(
    "function",
    [metrics.adaptive_calibration_error, metrics.adaptive_reliability_bins, metrics.classwise_calibration_error],
)
def test_bad_input_is_refused(function):
    p, y = _classification(n=5, c=3)
    for bins in (0, 2.0, True):
        with pytest.raises(ValueError, match="bins: expected a positive integer"):
            function(p, y % 3, bins=bins)
    with pytest.raises(ValueError, match="sum to one"):
        function(2 * p, y)
    with pytest.raises(TypeError, match="labels: expected a tensor of integers"):
        function(p, y.double())
