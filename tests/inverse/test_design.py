"""Experimental design against the mutual information of the dense Gaussian joint distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import Tensor

from ntkgp.inverse.design import Design, expected_information_gain, greedy_design
from ntkgp.models.inverse import InverseNTKGP
from tests.laws.problems import rel
from tests.models.inverse_problems import DOUBLE, InverseProblem, Matrix, dense, problem, rays


def dense_information(p: InverseProblem, rows: Tensor, noise: Tensor) -> float:
    """Mutual information of weights and measurement: ½ log of the ratio of the posterior precisions' determinants."""
    before = p.weights.diag() + p.aj.T @ p.aj / p.noise
    seen = rows @ p.j
    after = before + seen.T @ (seen / noise.unsqueeze(-1))
    return 0.5 * float(torch.linalg.slogdet(after)[1] - torch.linalg.slogdet(before)[1])


def dense_variance(p: InverseProblem, rows: Tensor, noise: Tensor) -> float:
    """Of all pixels, that which the measurement removes."""
    cross = dense(p)[2] @ rows.T
    return float((cross @ torch.linalg.solve(rows @ cross + noise.diag(), cross.T)).trace())


ORACLE = {"information": dense_information, "variance": dense_variance}


@pytest.mark.parametrize("criterion", ["information", "variance"])
@pytest.mark.parametrize(
    ("kind", "form"), [("conv", "dual"), ("conv", "primal"), ("mlp", "dual"), ("mlp", "primal"), ("mlp", "matrix_free")]
)
def test_gains_are_the_dense_ones(kind: str, form: str, criterion: str) -> None:
    p = problem(kind)
    size = p.A.image_shape[0]
    other = rays(size, 4, seed=2)
    model = p.model(form=form)
    found = expected_information_gain(model, other, criterion=criterion)
    noise = torch.full((3,), p.noise, dtype=DOUBLE)
    expected = [ORACLE[criterion](p, other.rows[3 * k : 3 * k + 3], noise) for k in range(4)]
    assert rel(found, torch.tensor(expected, dtype=DOUBLE)) < (1e-6 if form == "matrix_free" else 1e-9)
    parts = [Matrix(other.rows[3 * k : 3 * k + 3], (size, size), (3,)) for k in range(4)]
    assert rel(expected_information_gain(model, parts, criterion=criterion), found) < 1e-12


def test_given_noise() -> None:
    p = problem("conv")
    other = rays(6, 3, seed=2)
    noise = 0.01 + torch.rand(9, dtype=DOUBLE)
    model = InverseNTKGP(p.y, p.A, FixedNoiseGaussianLikelihood(torch.full((15,), p.noise, dtype=DOUBLE)), p.lin)
    model.set_hyperparameters(p.precision)
    found = expected_information_gain(model, other, noise=noise)
    expected = [dense_information(p, other.rows[3 * k : 3 * k + 3], noise[3 * k : 3 * k + 3]) for k in range(3)]
    assert rel(found, torch.tensor(expected, dtype=DOUBLE)) < 1e-9
    with pytest.raises(ValueError, match="noise: the model's noise is known for its own"):
        expected_information_gain(model, other)


def test_greedy_gains_add_up_to_the_information_of_the_set() -> None:
    p = problem("conv")
    other = rays(6, 5, seed=2)
    found = greedy_design(p.model(), other, 3)
    assert isinstance(found, Design)
    rows = torch.cat([other.rows[3 * k : 3 * k + 3] for k in found.chosen])
    covariance, noise = dense(p)[2], torch.full((9,), p.noise, dtype=DOUBLE)
    assert float(found.gains.sum()) == pytest.approx(dense_information(p, rows, noise), rel=1e-9)
    cross = covariance @ rows.T
    after = covariance - cross @ torch.linalg.solve(rows @ cross + noise.diag(), cross.T)
    assert rel(found.covariance, after) < 1e-8
    assert len(set(found.chosen)) == 3
    assert found.chosen[0] == int(expected_information_gain(p.model(), other).argmax())
    assert bool((found.gains.diff() <= 1e-9).all())


def test_greedy_is_near_the_best_set() -> None:
    p = problem("mlp")
    other = rays(5, 5, seed=6)
    noise = torch.full((6,), p.noise, dtype=DOUBLE)
    best = max(
        dense_information(p, torch.cat([other.rows[3 * k : 3 * k + 3] for k in pair]), noise)
        for pair in itertools.combinations(range(5), 2)
    )
    assert float(greedy_design(p.model(), other, 2).gains.sum()) >= (1 - 2.72**-1) * best


def test_the_same_measurement_again_tells_less() -> None:
    p = problem("conv")
    seen = expected_information_gain(p.model(), [p.A])
    before = InverseProblem(p.net, p.x, p.A, p.y, "layer", noise=1e6)
    fresh = expected_information_gain(before.model(), [p.A], noise=p.noise)
    assert float(seen) < float(fresh)


def test_what_is_measured_twice_is_chosen_once() -> None:
    p = problem("conv")
    assert sorted(greedy_design(p.model(), rays(6, 3), 3).chosen) == [0, 1, 2]


def test_criteria_may_differ_but_both_are_positive() -> None:
    p = problem("conv")
    for criterion in ("information", "variance"):
        assert bool((greedy_design(p.model(), rays(6, 4, seed=1), 4, criterion=criterion).gains > 0).all())


def test_mode_is_left_alone() -> None:
    model = problem("conv").model()
    expected_information_gain(model, rays(6, 2))
    assert model.training


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"candidates": []}, ValueError, "candidates: expected at least one operator"),
        ({"candidates": rays(5, 2)}, ValueError, "candidates: takes images of shape"),
        ({"candidates": [rays(6, 1), rays(5, 1)]}, ValueError, r"candidates\[1\]: takes images of shape"),
        ({"candidates": torch.eye(3)}, TypeError, "candidates: expected a forward operator"),
        ({"noise": 0.0}, ValueError, "noise: expected positive"),
        ({"noise": torch.ones(5)}, ValueError, "noise: expected a number or 6 variances"),
        ({"criterion": "best"}, ValueError, "criterion: expected one of"),
        ({"number": 3}, ValueError, "number: expected an integer from 1 to 2"),
        ({"number": 0}, ValueError, "number: expected an integer from 1 to 2"),
        ({"model": None}, TypeError, "model: expected a ntkgp.InverseNTKGP"),
    ],
)
def test_bad_arguments(options: dict, kind: type[Exception], words: str) -> None:
    arguments = {"model": problem("conv").model(), "candidates": rays(6, 2), "number": 1, **options}
    with pytest.raises(kind, match=words):
        greedy_design(**arguments)


def test_too_many_pixels_for_the_budget() -> None:
    model = problem("conv", count=10).model(max_memory="20KiB", form="matrix_free")
    with pytest.raises(ValueError, match="covariance of 36 pixels"):
        expected_information_gain(model, rays(6, 2))
