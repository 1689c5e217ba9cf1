"""Detection scores against scikit-learn, torchmetrics, thresholds tried one by one and orders tried at random."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sklearn import metrics as sk

from ntkgp.evaluation import metrics


def _close(value, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64), expected, rtol=tol, atol=tol)


def _scores(ties, seed=0):
    g = torch.Generator().manual_seed(seed)
    inside = torch.randn(300, generator=g, dtype=torch.float64)
    outside = torch.randn(120, generator=g, dtype=torch.float64) + 0.8
    return (inside.round(decimals=1), outside.round(decimals=1)) if ties else (inside, outside)


def _sk(inside, outside, positive):
    """Truth and scores as scikit-learn wants them."""
    sign = 1 if positive == "outside" else -1
    truth = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])
    return (truth if sign == 1 else 1 - truth).numpy(), (sign * torch.cat([inside, outside])).numpy()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("positive", ["outside", "inside"])
def test_aupr_and_fpr_against_sklearn(ties, positive):
    inside, outside = _scores(ties)
    truth, score = _sk(inside, outside, positive)
    _close(metrics.ood_aupr(inside, outside, positive=positive), sk.average_precision_score(truth, score))
    false, true, _ = sk.roc_curve(truth, score, drop_intermediate=False)
    for recall in (0.05, 0.5, 0.55, 0.8, 0.95, 1.0):
        expected = false[(true >= recall).argmax()]
        _close(metrics.ood_fpr(inside, outside, recall, positive=positive), expected)


def test_aupr_against_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    inside, outside = (scores.sigmoid() for scores in _scores(ties=True))
    truth = torch.cat([torch.zeros(300), torch.ones(120)]).long()
    score = torch.cat([inside, outside])
    _close(metrics.ood_aupr(inside, outside), classification.BinaryAveragePrecision()(score, truth), tol=1e-6)
    _close(metrics.ood_auc(inside, outside), classification.BinaryAUROC()(score, truth), tol=1e-6)


def test_fpr_by_trying_every_threshold():
    inside, outside = _scores(ties=True, seed=3)
    best = 1.0
    for threshold in torch.cat([inside, outside]):
        if int((outside >= threshold).sum()) * 100 >= 95 * len(outside):
            best = min(best, float((inside >= threshold).double().mean()))
    _close(metrics.ood_fpr(inside, outside), best)
    assert 0.2 < best < 0.95


def test_perfect_useless_and_infinite_scores():
    low, high = torch.zeros(4), torch.full((3,), math.inf)
    assert [float(v) for v in metrics.ood_detection(low, high)] == [1.0, 1.0, 1.0, 0.0]
    useless = metrics.ood_detection(torch.zeros(30), torch.zeros(10))
    assert [float(v) for v in useless] == [0.5, 0.25, 0.75, 1.0]
    assert float(metrics.ood_fpr(high, low)) == 1.0


def test_bundle_holds_the_single_figures():
    inside, outside = _scores(ties=False)
    bundle = metrics.ood_detection(inside, outside)
    assert bundle.auroc == metrics.ood_auc(inside, outside)
    assert bundle.aupr_out == metrics.ood_aupr(inside, outside)
    assert bundle.aupr_in == metrics.ood_aupr(inside, outside, positive="inside")
    assert bundle.fpr95 == metrics.ood_fpr(inside, outside, 0.95)


def test_entropy_and_variance_as_scores():
    g = torch.Generator().manual_seed(1)
    sharp = torch.softmax(6 * torch.randn(200, 5, generator=g), -1)
    flat = torch.softmax(0.5 * torch.randn(100, 5, generator=g), -1)
    by_entropy = metrics.ood_detection(metrics.predictive_entropy(sharp), metrics.predictive_entropy(flat))
    assert by_entropy.auroc > 0.95
    variance = torch.rand(200, 3, generator=g)
    by_variance = metrics.ood_detection(metrics.total_variance(variance), metrics.total_variance(variance + 1))
    assert by_variance.auroc == 1.0
    assert by_variance.fpr95 == 0.0


# --- total variance --------------------------------------------------------------------------------------------------


def test_total_variance_of_each_shape():
    root = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = root @ root.mT
    _close(metrics.total_variance(covariance), [matrix.trace() for matrix in covariance])
    _close(metrics.total_variance(covariance.diagonal(dim1=-2, dim2=-1)), metrics.total_variance(covariance))
    _close(metrics.total_variance(covariance[:, 0, 0]), covariance[:, 0, 0])


def test_contrasts_do_not_see_a_common_shift():
    root = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = root @ root.mT
    value = metrics.total_variance(covariance, contrasts=True)
    centre = torch.eye(3, dtype=torch.float64) - 1 / 3
    _close(value, [(centre @ matrix @ centre).trace() for matrix in covariance])
    _close(metrics.total_variance(covariance + 7.0, contrasts=True), value)
    assert (metrics.total_variance(covariance + 7.0) > metrics.total_variance(covariance) + 20).all()


# --- risk and coverage -----------------------------------------------------------------------------------------------


def test_aurc_is_the_loop():
    g = torch.Generator().manual_seed(2)
    uncertainty, loss = torch.rand(50, generator=g), torch.rand(50, generator=g, dtype=torch.float64)
    order = uncertainty.argsort()
    risks = [loss[order[:k]].mean() for k in range(1, 51)]
    curve = metrics.risk_coverage(uncertainty, loss)
    _close(curve.risk, risks)
    _close(curve.coverage, torch.arange(1, 51) / 50, tol=1e-7)
    _close(metrics.aurc(uncertainty, loss), torch.stack(risks).mean())


def test_ties_count_as_the_mean_over_their_orders():
    uncertainty = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.9])
    loss = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    areas = []
    for middle in itertools.permutations([0, 2, 3]):
        ordered = loss[[1, *middle, 4]]
        areas.append((ordered.cumsum(0) / torch.arange(1, 6)).mean())
    _close(metrics.aurc(uncertainty, loss), torch.stack(areas).mean())
    _close(metrics.aurc(torch.zeros(5), loss), loss.mean())


def test_excess_is_zero_for_the_best_order_and_positive_for_others():
    wrong = torch.tensor([False, True, False, False, True])
    assert float(metrics.aurc(wrong.double(), wrong, excess=True)) == 0.0
    assert float(metrics.aurc(-wrong.double(), wrong, excess=True)) > 0.3
    best = (torch.tensor([0, 0, 0, 1 / 4, 2 / 5], dtype=torch.float64)).mean()
    _close(metrics.aurc(wrong.double(), wrong), best)


def test_only_the_order_of_the_uncertainty_counts():
    g = torch.Generator().manual_seed(4)
    uncertainty, loss = torch.rand(80, generator=g, dtype=torch.float64), torch.rand(80, generator=g).round()
    shuffle = torch.randperm(80, generator=g)
    value = metrics.aurc(uncertainty, loss)
    _close(metrics.aurc((5 * uncertainty).exp(), loss), value)
    _close(metrics.aurc(uncertainty[shuffle], loss[shuffle]), value)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [metrics.ood_auc, metrics.ood_aupr, metrics.ood_fpr, metrics.ood_detection])
def test_detection_refuses_bad_scores(function):
    with pytest.raises(ValueError, match="outside: expected no nan"):
        function(torch.ones(2), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"inside: expected a vector of at least one score, got shape \(0,\)"):
        function(torch.ones(0), torch.ones(2))
    with pytest.raises(TypeError, match=r"inside: expected a torch\.Tensor, got list"):
        function([1.0], torch.ones(2))


def test_other_bad_input():
    one = torch.ones(3)
    with pytest.raises(ValueError, match='positive: expected "outside" or "inside", got \'out\''):
        metrics.ood_aupr(one, one, positive="out")
    for recall in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="recall"):
            metrics.ood_fpr(one, one, recall)
    with pytest.raises(ValueError, match=r"loss: expected the shape of uncertainty \(3,\), got \(2,\)"):
        metrics.aurc(one, torch.ones(2))
    with pytest.raises(ValueError, match="loss: expected finite"):
        metrics.aurc(one, torch.tensor([0.0, math.inf, 0.0]))
    with pytest.raises(ValueError, match="uncertainty: expected no nan"):
        metrics.aurc(torch.tensor([math.nan]), torch.ones(1))
    with pytest.raises(ValueError, match=r"variance: expected shape .*got \(3, 2, 4\)"):
        metrics.total_variance(torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match="variance: expected non-negative"):
        metrics.total_variance(-one)
    with pytest.raises(ValueError, match="contrasts: expected covariances"):
        metrics.total_variance(torch.ones(3, 2), contrasts=True)
