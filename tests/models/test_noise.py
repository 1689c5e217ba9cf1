"""Between a likelihood's noise and the evidence's."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor

from ntkgp.likelihoods import CategoricalLikelihood, MultioutputGaussianLikelihood
from ntkgp.models.noise import NoiseLink, has_fixed_noise, prepare_likelihood

DOUBLE = torch.float64
N = 4


def tasks(**kwargs: object) -> MultitaskGaussianLikelihood:
    return MultitaskGaussianLikelihood(num_tasks=3, **kwargs)


def prepared(kind: str) -> tuple[gpytorch.likelihoods.Likelihood, int]:
    values = 0.1 + torch.arange(N, dtype=DOUBLE)
    made = {
        "gaussian": (GaussianLikelihood(), 1),
        "gaussian, 3 outputs": (GaussianLikelihood(), 3),
        "tasks": (tasks(has_global_noise=False), 3),
        "global": (tasks(has_task_noise=False), 3),
        "both": (tasks(), 3),
        "fixed": (FixedNoiseGaussianLikelihood(values), 1),
        "fixed and learned": (FixedNoiseGaussianLikelihood(values, learn_additional_noise=True), 1),
        "fixed and learned, 3 outputs": (FixedNoiseGaussianLikelihood(values, learn_additional_noise=True), 3),
    }[kind]
    return prepare_likelihood(*made), made[1]


KINDS = ["gaussian", "gaussian, 3 outputs", "tasks", "global", "both", "fixed", "fixed and learned",
         "fixed and learned, 3 outputs"]  # fmt: skip


def diagonal(likelihood: gpytorch.likelihoods.Likelihood, c: int) -> Tensor:
    shape = torch.Size((N,) if c == 1 else (N, c))
    return likelihood._shaped_noise_covar(shape).diagonal(dim1=-1, dim2=-2).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_written_noise_is_the_likelihoods_own(kind: str) -> None:
    likelihood, c = prepared(kind)
    link = NoiseLink(likelihood, N, c)
    model = link.model()
    assert torch.allclose(model.diagonal(), diagonal(likelihood, c), rtol=1e-12)
    if kind == "fixed":
        assert model.num_learned == 0
        return
    for scale in (1e-2, 3.0, 1e3):
        values = scale * (1 + torch.arange(model.num_learned, dtype=DOUBLE))
        stored = link.write(values)
        assert torch.allclose(stored, values, rtol=1e-6)
        assert torch.allclose(link.model().diagonal(), diagonal(likelihood, c), rtol=1e-9)
    low = link.write(torch.full_like(values, 1e-30))
    assert torch.allclose(low, torch.full_like(low, model.minimum), rtol=1e-4)
    assert all(torch.isfinite(p).all() for p in likelihood.parameters())


def test_constraints_are_respected() -> None:
    likelihood = prepare_likelihood(GaussianLikelihood(noise_constraint=GreaterThan(0.5)), 1)
    link = NoiseLink(likelihood, N, 1)
    assert link.model().minimum == 0.5
    assert float(link.write(torch.tensor([0.01]))) == pytest.approx(0.5, rel=1e-4)
    bounded = prepare_likelihood(GaussianLikelihood(noise_constraint=Interval(0.1, 1.0)), 1)
    stored = float(NoiseLink(bounded, N, 1).write(torch.tensor([50.0])))
    assert stored == pytest.approx(1.0, rel=1e-4)
    assert all(torch.isfinite(p).all() for p in bounded.parameters())


def test_prepared_likelihoods_share_their_parameters() -> None:
    stock = GaussianLikelihood()
    wrapped = prepare_likelihood(stock, 3)
    assert isinstance(wrapped, MultioutputGaussianLikelihood)
    assert wrapped.raw_noise is stock.raw_noise
    assert stock.raw_noise.dtype == DOUBLE
    assert prepare_likelihood(wrapped, 3) is wrapped
    assert prepare_likelihood(stock, 1) is stock


def test_which_likelihoods_have_fixed_noise() -> None:
    assert has_fixed_noise(FixedNoiseGaussianLikelihood(torch.ones(3)))
    assert has_fixed_noise(prepare_likelihood(FixedNoiseGaussianLikelihood(torch.ones(3)), 2))
    assert not has_fixed_noise(prepare_likelihood(GaussianLikelihood(), 2))
    assert not has_fixed_noise(CategoricalLikelihood(num_classes=3))
