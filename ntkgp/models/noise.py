"""Between a likelihood's noise parameters and the evidence's noise model."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from torch import Tensor

from ntkgp.evidence.problem import NoiseModel
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood, MultioutputGaussianLikelihood


def is_classification(likelihood: Likelihood) -> bool:
    """Whether the likelihood is one of the library's discrete ones."""
    return isinstance(likelihood, CategoricalLikelihood | BernoulliLikelihood)


def prepare_likelihood(likelihood: Likelihood, num_outputs: int) -> Likelihood:
    """The likelihood in float64, fit for C interleaved outputs; an error where it cannot be."""
    if isinstance(likelihood, CategoricalLikelihood):
        if num_outputs < 2 or likelihood.num_classes != num_outputs:
            raise ValueError(
                f"likelihood: CategoricalLikelihood(num_classes={likelihood.num_classes}) on a network with "
                f"C = {num_outputs} outputs; expected num_classes = C ≥ 2 (one logistic output: BernoulliLikelihood)"
            )
    elif isinstance(likelihood, BernoulliLikelihood):
        if num_outputs != 1:
            raise ValueError(f"likelihood: BernoulliLikelihood needs one output, the network has C = {num_outputs}")
    elif isinstance(likelihood, MultitaskGaussianLikelihood):
        if num_outputs < 2 or likelihood.num_tasks != num_outputs:
            raise ValueError(
                f"likelihood: MultitaskGaussianLikelihood(num_tasks={likelihood.num_tasks}) on a network with "
                f"C = {num_outputs} outputs; expected num_tasks = C ≥ 2 (one output: GaussianLikelihood)"
            )
    elif isinstance(likelihood, GaussianLikelihood | FixedNoiseGaussianLikelihood):
        if num_outputs > 1:
            likelihood = MultioutputGaussianLikelihood(likelihood)
    elif not isinstance(likelihood, MultioutputGaussianLikelihood):
        raise TypeError(
            f"likelihood: got {type(likelihood).__name__}; expected gpytorch's GaussianLikelihood, "
            "FixedNoiseGaussianLikelihood or MultitaskGaussianLikelihood, ntkgp.CategoricalLikelihood, or "
            "ntkgp.likelihoods.BernoulliLikelihood"
        )
    return likelihood.to(torch.float64)


def has_fixed_noise(likelihood: Likelihood) -> bool:
    """Whether the likelihood holds given noise variances of the training data."""
    return isinstance(likelihood, FixedNoiseGaussianLikelihood) or getattr(likelihood, "_fixed", False)


def learned_on_fixed(likelihood: Likelihood) -> Tensor | None:
    """The learned variance that every observation has besides its given one (``learn_additional_noise=True``)."""
    learned = getattr(likelihood, "second_noise_covar", None)
    return None if learned is None else learned.noise.detach()


def fits_fixed_noise(likelihood: Likelihood, num_rows: int) -> bool:
    """Whether given noise variances, if there are any, are those of so many inputs."""
    return not has_fixed_noise(likelihood) or len(likelihood.noise_covar.noise) == num_rows


def check_fixed_noise(likelihood: Likelihood, num_rows: int) -> None:
    """Refuse given noise variances of other inputs.

    :raises ValueError: their number is not N.
    """
    if not fits_fixed_noise(likelihood, num_rows):
        raise ValueError(
            f"likelihood: fixed noise of {len(likelihood.noise_covar.noise)} inputs, but the training data have N = "
            f"{num_rows}; assign the variances of the new data to likelihood.noise_covar.noise"
        )


def noise_floor(y: Tensor) -> float:
    r"""Smallest noise variance that targets as recorded allow.

    Targets that take few values were rounded to steps of some δ; they carry at least the rounding noise δ²/12. Below it
    the evidence is not bounded: repeated inputs with the same rounded target count as proof of no noise at all. Other
    targets get 1e-8 of their mean square, a bound in their own units.

    :param y: targets, shape (N, *event): the smallest floor of the outputs, which may have different units.

    >>> round(noise_floor(torch.tensor([5.0, 6.0, 5.0, 7.0, 5.0, 6.0])), 4)  # ratings in steps of 1
    0.0833
    >>> noise_floor(torch.tensor([0.0, 2.0])) == 1e-8 * 2.0
    True
    """
    rows = y.detach().to(torch.float64).reshape(len(y), -1) if y.ndim else y.new_zeros(0, 0)
    outputs = [column for column in rows.mT if 0 < float(column.square().mean()) < float("inf")]
    return min(map(_floor_of_output, outputs), default=1e-8)


def _floor_of_output(values: Tensor) -> float:
    """The floor of the targets of one output, (N,), not all zero."""
    floor = 1e-8 * float(values.square().mean())
    distinct = values.unique()
    if 2 <= len(distinct) <= len(values) // 2:
        floor = max(floor, float(distinct.diff().min()) ** 2 / 12)
    return floor


class NoiseLink:
    """Reads a Gaussian likelihood's noise as a :class:`~ntkgp.evidence.NoiseModel`, and writes fitted values back.

    :raises ValueError: a full noise covariance between outputs (``rank > 0``), which has no fixed point: fit it on
        GPyTorch's marginal likelihood.
    """

    def __init__(self, likelihood: Likelihood, num_rows: int, num_outputs: int) -> None:
        self._likelihood, self._n, self._c = likelihood, num_rows, num_outputs
        if isinstance(likelihood, MultitaskGaussianLikelihood) and likelihood.rank > 0:
            raise ValueError(
                f"likelihood: fit_evidence learns one noise or one per output; MultitaskGaussianLikelihood(rank="
                f"{likelihood.rank}) has a full covariance: use rank=0, or fit GPyTorch's marginal likelihood"
            )

    def _second_noise(self) -> gpytorch.Module | None:
        return getattr(self._likelihood, "second_noise_covar", None)

    def model(self) -> NoiseModel:
        """The noise of the training data as it is now."""
        likelihood, rows = self._likelihood, self._n * self._c
        if has_fixed_noise(self._likelihood):
            check_fixed_noise(likelihood, self._n)
            shape = torch.Size((self._n,) if self._c == 1 else (self._n, self._c))
            learned = self._second_noise()
            total = likelihood._shaped_noise_covar(shape).diagonal(dim1=-1, dim2=-2).detach().to(torch.float64)
            if learned is None:
                return NoiseModel.known(total.reshape(rows))
            value = learned.noise.detach().reshape(())
            return NoiseModel.known((total - value).clamp_min(0.0).reshape(rows), value, _minimum(learned, "raw_noise"))
        if isinstance(likelihood, MultitaskGaussianLikelihood):
            return self._multitask(likelihood)
        return NoiseModel.homoscedastic(
            rows, likelihood.noise.detach().reshape(()), _minimum(likelihood.noise_covar, "raw_noise")
        )

    def _multitask(self, likelihood: MultitaskGaussianLikelihood) -> NoiseModel:
        rows = self._n * self._c
        if not likelihood.has_task_noise:
            value = likelihood.noise.detach().reshape(())
            return NoiseModel.homoscedastic(rows, value, _minimum(likelihood, "raw_noise"))
        values, low = likelihood.task_noises.detach().reshape(-1), _minimum(likelihood, "raw_task_noises")
        if likelihood.has_global_noise:
            # The two are redundant: their sum is what the data determine.
            values, low = values + likelihood.noise.detach(), low + _minimum(likelihood, "raw_noise")
        return NoiseModel.per_output(rows, values, low)

    def write(self, noise: Tensor) -> Tensor:
        """Store learned variances and return what the constraints let through."""
        likelihood = self._likelihood
        if has_fixed_noise(self._likelihood):
            learned = self._second_noise()
            assert learned is not None
            _assign(learned, "raw_noise", noise)
        elif isinstance(likelihood, MultitaskGaussianLikelihood):
            self._write_multitask(likelihood, noise)
        else:
            _assign(likelihood.noise_covar, "raw_noise", noise)
        return self.model().values

    @staticmethod
    def _write_multitask(likelihood: MultitaskGaussianLikelihood, noise: Tensor) -> None:
        if not likelihood.has_task_noise:
            _assign(likelihood, "raw_noise", noise)
            return
        if likelihood.has_global_noise:
            low = _minimum(likelihood, "raw_noise")
            _assign(likelihood, "raw_noise", noise.new_full((1,), low))
            noise = noise - likelihood.noise.detach()
        _assign(likelihood, "raw_task_noises", noise)


def _minimum(module: gpytorch.Module, name: str) -> float:
    """Lower bound that the constraint of a parameter sets."""
    bound = module.constraint_for_parameter_name(name).lower_bound
    return max(float(bound), 0.0)


def _assign(module: gpytorch.Module, name: str, value: Tensor) -> None:
    """Set a constrained parameter, a hair inside its bounds so that its raw value stays finite."""
    raw = getattr(module, name)
    constraint = module.constraint_for_parameter_name(name)
    low = max(float(constraint.lower_bound), 0.0)
    high = float(constraint.upper_bound)
    inside = value.to(raw).reshape(raw.shape).clamp(low * (1 + 1e-6) + 1e-30, high * (1 - 1e-6))
    with torch.no_grad():
        raw.copy_(constraint.inverse_transform(inside))
