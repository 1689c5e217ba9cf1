"""The evidence of a structure, at θ̃ or θ⋆, and its maximum over precisions and noise."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy
import scipy
import torch
from torch import Tensor

from ntkgp.baselines.laplace.kfac import Kfac
from ntkgp.baselines.laplace.structures import Diagonal, Dual, Primal, Structure
from ntkgp.baselines.laplace.tangent import Fit, Tangent, minimise

logger = logging.getLogger("ntkgp")

# Bounds of log λ: a group at the upper one is pruned.
_BOUND = 20.0
_MOST_EXACT = 2000
# Of log σ², counted from where it starts: data that a group can interpolate would take it to −∞.
_NOISE = math.log(1e6)


@dataclass(frozen=True)
class Evaluated:
    """The evidence and its gradient at some precisions and noise.

    :ivar value: log evidence.
    :ivar precision: its derivatives in log λ, (G,).
    :ivar noise: its derivatives in log σ², (K,); of no meaning for classification.
    :ivar delta: θ⋆ − θ̃ of the structure's weights, (p,); zero at θ̃.
    """

    value: float
    precision: Tensor
    noise: Tensor
    delta: Tensor


def finds_mode_directly(structure: Structure, tangent: Tangent) -> bool:
    """Whether θ⋆ is found by some factorisations of kept rows, not by many products."""
    return tangent.is_kept and (not isinstance(structure, Diagonal | Kfac) or _fits_exactly(structure, tangent))


def _fits_exactly(structure: Structure, tangent: Tangent) -> bool:
    """Whether the whole H beside an approximate structure is small."""
    exact = _exact(structure, tangent)
    size = min(tangent.count() * structure.lin.num_outputs, tangent.size)
    # The vectors of the fit are those of the structure.
    return size <= _MOST_EXACT and 8 * exact.numbers() + exact.smallest_room() <= exact.max_memory


def _exact(structure: Structure, tangent: Tangent) -> Structure:
    """The whole H, empty, within what the structure and the kept rows leave of the budget."""
    lin, left = structure.lin, structure.room - tangent.most_held
    if tangent.count() * lin.num_outputs < tangent.size:
        return Dual(lin, tangent.count(), structure.classification, left)
    return Primal(lin, None, structure.classification, left)


def _companion(structure: Structure, tangent: Tangent) -> Structure | None:
    """The whole H, to find θ⋆ of an approximate structure in a step or two, where it is small and rows are kept."""
    if not isinstance(structure, Diagonal | Kfac) or not tangent.is_kept or not _fits_exactly(structure, tangent):
        return None
    exact = _exact(structure, tangent)
    exact.collect(tangent)
    return exact


class Evidence:
    r"""The Laplace evidence of a structure,

    .. math:: M_\theta(\Lambda, \sigma^2) = \log p(y \mid h_\theta) - \tfrac12 \lVert\theta\rVert^2_\Lambda
        - \tfrac12 \log\det(I + \Lambda^{-1} H),

    at θ̃ (where :math:`h_\theta = f`) or at θ⋆, the minimiser of the convex loss of the tangent model in the structure's
    weights. H is the structure's own, at θ̃; θ⋆ is that of the exact loss for every structure. At θ⋆ the derivatives
    follow from the envelope theorem: ½(γ_g − λ_g‖θ_g‖²) in log λ_g, ½(SSE_c/σ_c² − N + γ_c) in log σ_c².
    """

    def __init__(self, structure: Structure, tangent: Tangent, at: str) -> None:
        self.structure, self.tangent, self.at = structure, tangent, at
        self.theta = structure.lin.theta.double()[structure.columns]
        self._delta = torch.zeros_like(self.theta)
        self._fit: Fit | None = None
        self._exact = _companion(structure, tangent) if at == "theta_star" else None
        self.active = structure.per_group(torch.ones_like(self.theta)) > 0

    def _network_fit(self) -> Fit:
        if self._fit is None:
            self._fit = Fit(self.tangent, None, torch.ones(self.structure.num_channels, dtype=torch.float64))
        return self._fit

    def at_mode(self, precision: Tensor, noise: Tensor) -> tuple[Tensor, Fit]:
        """θ⋆ − θ̃ and its fit; the structure takes these precisions and noise."""
        weights = noise.reciprocal()
        self.structure.update(precision, weights)
        if self._exact is not None:
            self._exact.update(precision, weights)
        solve = (self._exact or self.structure).solve
        self._delta, fit = minimise(self.tangent, self.theta, self.structure.precision, weights, solve, self._delta)
        return self._delta, fit

    def evaluate(self, precision: Tensor, noise: Tensor) -> Evaluated:
        """The evidence at precisions (G,) and noise (K,)."""
        if self.at == "theta_star":
            delta, fit = self.at_mode(precision, noise)
        else:
            self.structure.update(precision, noise.reciprocal())
            delta, fit = torch.zeros_like(self.theta), self._network_fit()
        norms = self.structure.per_group((self.theta + delta).square())
        value = -float((precision * norms).sum()) / 2 - self.structure.logdet() / 2
        by_group, by_channel = self.structure.gammas()
        n = self.tangent.num_data
        if self.tangent.classification:
            value += fit.log_likelihood
            slope = torch.zeros_like(by_channel)
        else:
            value += float((-fit.errors / noise - n * (2 * math.pi * noise).log()).sum()) / 2
            slope = (fit.errors / noise - n + by_channel) / 2
        return Evaluated(value, (by_group - precision * norms) / 2, slope, delta)

    def maximise(self, precision: Tensor, noise: Tensor, fit_noise: bool) -> tuple[Tensor, Tensor]:
        """Precisions and noise of the largest evidence, by L-BFGS in their logarithms.

        Noise stays within a factor of 1e6 of where it starts, precisions within e^±20; a group at the upper bound is
        pruned.
        """
        groups = torch.where(self.active)[0]
        free_noise = fit_noise and not self.tangent.classification
        count = len(groups)
        noise_start = noise.log()

        def unpack(z: numpy.ndarray) -> tuple[Tensor, Tensor]:
            values = torch.as_tensor(z, dtype=torch.float64)
            lam = precision.clone()
            lam[groups] = values[:count].exp()
            return lam, values[count:].exp() if free_noise else noise

        def objective(z: numpy.ndarray) -> tuple[float, numpy.ndarray]:
            found = self.evaluate(*unpack(z))
            slope = torch.cat([found.precision[groups], found.noise]) if free_noise else found.precision[groups]
            return -found.value, -slope.numpy()

        start = torch.cat([precision[groups].log().clamp(-_BOUND, _BOUND), *([noise_start] if free_noise else [])])
        bounds = [(-_BOUND, _BOUND)] * count
        bounds += [(v - _NOISE, v + _NOISE) for v in noise_start.tolist()] if free_noise else []
        result = scipy.optimize.minimize(
            objective, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": 200, "ftol": 1e-13, "gtol": 1e-7 * max(1, self.tangent.num_data)},
        )  # fmt: skip
        lam, noise = unpack(result.x)
        pruned = [self.structure.lin.groups.names[g] for g in groups.tolist() if lam[g].log() > _BOUND - 1e-3]
        if pruned:
            logger.info("evidence prunes %s: their precision is at its bound", ", ".join(pruned))
        # Rounding of the value ends the search before the slopes reach the tolerance; that is an optimum too.
        if not result.success and "ABNORMAL" not in str(result.message):
            logger.warning("evidence: L-BFGS stopped before convergence (%s)", result.message)
        return lam, noise
