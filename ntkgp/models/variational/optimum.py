"""The best variational distribution for given inducing inputs, in closed form, and the bound that is left of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.distributed import sum_over_batches
from ntkgp.evidence.streaming import add_square
from ntkgp.likelihoods import whitened_targets
from ntkgp.linearization.grams.factors import Factors
from ntkgp.models.batches import Batches
from ntkgp.models.variational.expectations import (
    curvature_rows,
    curvature_term,
    gaussian_term,
    noise_block,
    probit_term,
)
from ntkgp.models.variational.products import KernelProducts

if TYPE_CHECKING:
    from ntkgp.models.variational import VariationalNTKGP

# Of the largest eigenvalue of K(Z, Z): what lies below is rounding.
EIGENVALUE_CUT = 1e-10
_JITTER = 1e-9
_MOST_SCALE = math.log(1e6)


@dataclass(frozen=True)
class Whitener:
    """T with TᵀK_ZT = I on the range of K_Z, (M', r): no inverse is taken of what is rounding.

    :param matrix: T.
    :param cut: number of eigenvalues left out.
    """

    matrix: Tensor
    cut: int

    @classmethod
    def of(cls, gram: Tensor) -> Whitener:
        """Build it from K_Z, (M', M')."""
        values, vectors = torch.linalg.eigh(gram)
        kept = values > EIGENVALUE_CUT * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        return cls(vectors[:, kept] * values[kept].rsqrt(), int((~kept).sum()))


@dataclass(frozen=True)
class Statistics:
    r"""Sums over the data, in coordinates u = Tᵀ K_Zx in which K_Z is the identity.

    :param whitener: T.
    :param second: :math:`E = \sum_n T^\top K_{Zn} B_n K_{nZ} T`, (r, r).
    :param first: :math:`b = \sum_n T^\top K_{Zn} (B_n t_n)`, (r,), with t the targets seen from the prior mean.
    :param trace: :math:`\sum_n \operatorname{tr} B_n K(x_n, x_n)`.
    :param squares: :math:`\sum_n t_n^\top B_n t_n`.
    :param constant: log-density of the whitened targets' noise at zero residual, and what turns the pseudo-Gaussian
        likelihood of a classification into its expansion.
    :param log_likelihood: of the network's own outputs.
    :param network_squares: :math:`\sum_n (y_n - f_n)^\top B_n (y_n - f_n)`, 0 for a classification.
    :param num_rows: of unit noise: N·C, or N(C − 1) for a softmax.
    :param num_data: N.
    """

    whitener: Whitener
    second: Tensor
    first: Tensor
    trace: float
    squares: float
    constant: float
    log_likelihood: float
    network_squares: float
    num_rows: int
    num_data: int

    def root(self) -> Tensor:
        r"""L with :math:`LL^\top = K_Z^+ K_{ZX} B K_{XZ} K_Z^+` (Titsias 2009), (M', r)."""
        values, vectors = torch.linalg.eigh(self.second)
        return self.whitener.matrix @ (vectors * values.clamp_min(0.0).sqrt())

    def dual_mean(self) -> Tensor:
        r"""Weights a with posterior mean :math:`m_0(x) + K_{xZ} a`: :math:`a = T(I+E)^{-1} b`, (M',)."""
        return self.whitener.matrix @ torch.cholesky_solve(self.first.unsqueeze(-1), self._factor()).squeeze(-1)

    def rescaled(self, kernel: float, noise: float = 1.0) -> Statistics:
        """The statistics with the kernel and the noise multiplied by numbers: no pass is needed for them."""
        ratio = kernel / noise
        log_noise = 0.5 * self.num_rows * math.log(noise)
        quadratic = self.network_squares * (1 / noise - 1)
        return replace(
            self, whitener=Whitener(self.whitener.matrix * kernel**-0.5, self.whitener.cut),
            second=self.second * ratio, first=self.first * (kernel**0.5 / noise), trace=self.trace * ratio,
            squares=self.squares / noise, constant=self.constant - log_noise,
            log_likelihood=self.log_likelihood - log_noise - 0.5 * quadratic,
            network_squares=self.network_squares / noise,
        )  # fmt: skip

    def best_scales(self, learn_noise: bool) -> tuple[float, float]:
        """Factors of kernel and noise (1 if it is not learned) that maximise the collapsed bound."""
        values, vectors = torch.linalg.eigh(self.second)
        values, first = values.clamp_min(0.0), (vectors.mT @ self.first).square()
        left = self.trace - float(values.sum())

        def negative(point: np.ndarray) -> float:
            kernel, noise = math.exp(point[0]), math.exp(point[1]) if learn_noise else 1.0
            ratio = kernel / noise
            logdet = float((ratio * values).log1p().sum()) + self.num_rows * math.log(noise)
            explained = float((first * (ratio / noise) / (1 + ratio * values)).sum())
            return 0.5 * (logdet + ratio * left + self.squares / noise - explained)

        found = scipy.optimize.minimize(
            negative, np.zeros(2 if learn_noise else 1), method="Nelder-Mead",
            bounds=[(-_MOST_SCALE, _MOST_SCALE)] * (2 if learn_noise else 1),
            options={"xatol": 1e-6, "fatol": 1e-9 * max(1.0, abs(self.constant))},
        )  # fmt: skip
        return math.exp(found.x[0]), math.exp(found.x[1]) if learn_noise else 1.0

    def _factor(self) -> Tensor:
        identity = torch.eye(len(self.second), dtype=torch.float64, device=self.second.device)
        return torch.linalg.cholesky(identity + self.second)

    def collapsed_bound(self) -> float:
        r"""The best ELBO of the tangent model over all means and covariances, :math:`\le \log p(y)` (law C11)."""
        factor = self._factor()
        solved = torch.linalg.solve_triangular(factor, self.first.unsqueeze(-1), upper=False).square().sum()
        fit = -0.5 * (self.squares - float(solved))
        return self.constant + fit + self._covariance_part(factor)

    def fixed_mean_bound(self) -> float:
        """The best objective with the mean held at the network's output."""
        return self.log_likelihood + self._covariance_part(self._factor())

    def _covariance_part(self, factor: Tensor) -> float:
        logdet = float(factor.diagonal().log().sum())
        return -logdet - 0.5 * self.trace + 0.5 * float(self.second.trace())


def gather(model: VariationalNTKGP, batches: Batches, progress: bool = False) -> Statistics:
    """One pass over the data, shared by all ranks of a process group.

    Cost: N·C·M'² flops twice, K_xZ and the C × C blocks; memory of one batch and of a few M' × M' matrices.
    """
    z = model.inducing_points.detach()
    with torch.inference_mode(False), torch.no_grad():
        whitener = Whitener.of(model.products.inducing(z))
        rank, most = whitener.matrix.shape[1], model.products.rows_at_a_time(len(z))

        def visit(batch: tuple[Tensor, Tensor]) -> Tensor:
            parts = zip(*(part.split(most) for part in batch), strict=True)
            return functools.reduce(Tensor.add_, (visit_part(x, y) for x, y in parts))

        def visit_part(x: Tensor, y: Tensor) -> Tensor:
            rows = _Rows.of(model, x, y)
            whitened = rows.pull(model.products.cross(x, z) @ whitener.matrix)
            square = z.new_zeros(rank, rank)
            add_square(square, whitened)
            trace = float(torch.einsum("ncr,ncd,ndr->", rows.factor, model.products.blocks(x), rows.factor))
            squares = float(rows.targets.square().sum())
            own = [trace, squares, rows.constant, rows.log_likelihood, rows.network_squares]
            numbers = z.new_tensor([*own, rows.targets.numel(), len(x)])
            return torch.cat([square.flatten(), whitened.mT @ rows.targets.reshape(-1), numbers])

        passed = tqdm(batches, desc="statistics", disable=not progress, unit=" batches")
        sums = sum_over_batches(passed, visit, z.new_zeros(rank * rank + rank + 7))
    second, first = sums[: rank * rank].view(rank, rank), sums[rank * rank : -7]
    trace, squares, constant, fit, residuals, num_rows, num_data = sums[-7:].tolist()
    return Statistics(
        whitener, second.tril() + second.tril(-1).mT, first.clone(), trace, squares, constant, fit, residuals,
        round(num_rows), round(num_data),
    )  # fmt: skip


def predictive_scores(
    model: VariationalNTKGP, found: Statistics, held_out: Batches, scales: Sequence[float]
) -> Tensor:  # fmt: skip
    r"""Mean predictive log-likelihood of held-out data at the optimum for the kernel times each of some numbers.

    In the eigenbasis of E the latent covariance is :math:`s (K_{xx} - U \operatorname{diag}(s e / (1 + s e)) U^\top)`:
    one pass over the held-out data serves all scales. Classes are predicted under the probit link.

    :return: one number per scale.
    """
    z, total, count = model.inducing_points.detach(), torch.zeros(len(scales), dtype=torch.float64), 0
    with torch.inference_mode(False), torch.no_grad():
        values, vectors = torch.linalg.eigh(found.second)
        basis, values = found.whitener.matrix @ vectors, values.clamp_min(0.0)
        for x, y in held_out:
            outputs, blocks = model.network_outputs(x), model.products.blocks(x)
            rows = (model.products.cross(x, z) @ basis).reshape(*outputs.shape, basis.shape[-1])
            for i, s in enumerate(scales):
                shrunk = rows * (s * values / (1 + s * values)).sqrt()
                covariance = s * (blocks - shrunk @ shrunk.mT)
                if model.is_classification:
                    terms = probit_term(outputs, y, covariance)
                else:
                    noise = noise_block(model.likelihood, model.num_outputs)
                    terms = gaussian_term(y.reshape(outputs.shape) - outputs, covariance, noise, 1.0)
                total[i] += float(terms.sum())
            count += len(x)
    return total / count


@dataclass(frozen=True)
class _Rows:
    """One batch as rows of unit noise.

    :param factor: S with S Sᵀ = B, (B, C, R).
    :param targets: t as the whitened rows see it, (B, R).
    :param constant: log-density of their noise at zero, with the expansion's constant.
    :param log_likelihood: of the network's outputs.
    :param network_squares: (y − f)ᵀB(y − f) of a regression.
    """

    factor: Tensor
    targets: Tensor
    constant: float
    log_likelihood: float
    network_squares: float

    @classmethod
    def of(cls, model: VariationalNTKGP, x: Tensor, y: Tensor) -> _Rows:
        """Rows of a batch."""
        outputs = model.network_outputs(x)
        offset = model.prior_mean(x)
        factor = curvature_rows(model.likelihood, outputs)
        if model.is_classification:
            white = whitened_targets(outputs, y, offset)
            nothing = outputs.new_zeros(*outputs.shape, outputs.shape[-1])
            constant = float(white.constant) - 0.5 * math.log(2 * math.pi) * white.targets.numel()
            return cls(factor, white.targets, constant, float(curvature_term(outputs, y, nothing, None).sum()), 0.0)
        y = y.reshape(outputs.shape)
        noise = noise_block(model.likelihood, outputs.shape[-1])
        zero = outputs.new_zeros(*outputs.shape, outputs.shape[-1])
        targets = torch.einsum("ncr,nc->nr", factor, y - offset)
        constant = float(gaussian_term(torch.zeros_like(outputs), zero, noise, 0.0).sum())
        own = float(torch.einsum("ncr,nc->nr", factor, y - outputs).square().sum())
        return cls(factor, targets, constant, float(gaussian_term(y - outputs, zero, noise, 0.0).sum()), own)

    def pull(self, rows: Tensor) -> Tensor:
        """Sᵀ on the rows of each input: (B·C, r) -> (B·R, r)."""
        n, c, r = self.factor.shape
        blocks = rows.reshape(n, c, rows.shape[-1])
        return torch.einsum("ncr,ncm->nrm", self.factor, blocks).reshape(n * r, rows.shape[-1])


class CollapsedObjective:
    r"""What is left of the fixed-mean ELBO once L is at its optimum, as a function of the inducing inputs,

    .. math:: -\tfrac12 \log\det(I + W B W^\top) - \tfrac12 \operatorname{tr} B(K - W^\top W), \qquad
        W = L_Z^{-1} K_{ZX}, \quad K_Z + \epsilon I = L_Z L_Z^\top

    (Titsias 2009, without its mean), ε = 1e-9 of the mean diagonal. All data at once: for small N.

    :param model: its kernel and inducing rows.
    :param x: all inputs, packed.
    :param y: their targets.
    """

    def __init__(self, model: VariationalNTKGP, x: Tensor, y: Tensor) -> None:
        self._products: KernelProducts = model.products
        with torch.no_grad():
            rows = _Rows.of(model, x, y)
            self._rows = rows
            blocks = model.products.blocks(x)
            self._fixed = -0.5 * float(torch.einsum("ncr,ncd,ndr->", rows.factor, blocks, rows.factor))
            self._fixed += rows.log_likelihood
            self._x: Tensor | Factors = x
            if model.products.is_tangent and model.lin.factors_memory(len(x)) <= model.max_memory:
                self._x = model.lin.factors(x, model.max_memory)

    def __call__(self, z: Tensor) -> Tensor:
        """The objective at inducing inputs (M, D); differentiable."""
        gram = self._products.inducing(z)
        jitter = _JITTER * gram.diagonal().mean().detach()
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram + jitter * identity)
        if int(info):
            return gram.sum() * 0 - math.inf
        rows = self._rows.pull(self._products.cross(self._x, z))
        whitened = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
        second = whitened @ whitened.mT
        logdet = torch.linalg.cholesky(identity + second).diagonal().log().sum()
        return self._fixed - logdet + 0.5 * second.diagonal().sum()


class CollapsedSearch:
    """The collapsed bound as scipy wants it, with answers that are known looked up; remembers the best point."""

    def __init__(self, objective: CollapsedObjective, parameter: Tensor, unit: Tensor, answers: list[Any]) -> None:
        self._objective, self._parameter, self._unit = objective, parameter, unit
        self._known, self.answers = list(answers), []  # type: tuple[list[Any], list[Any]]
        self.start = (parameter.detach() / unit).reshape(-1).cpu().numpy()
        self.best = parameter.detach().clone(), -math.inf

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the bound and minus its gradient."""
        at = torch.from_numpy(point.copy())
        z = (at.to(self._parameter).reshape(self._parameter.shape) * self._unit).requires_grad_()
        known = self._known[len(self.answers)] if len(self.answers) < len(self._known) else None
        if known is None or not torch.equal(known[0], at):
            self._known = []
            known = at, *self._ask(z)
        self.answers.append(known)
        _, found, gradient = known
        if not math.isfinite(found):
            return 1e300, np.zeros_like(point)
        if found > self.best[1]:
            self.best = z.detach(), found
        return -found, gradient.numpy().copy()

    def _ask(self, z: Tensor) -> tuple[float, Tensor]:
        value = self._objective(z)
        if not bool(torch.isfinite(value)):
            return math.nan, torch.zeros(z.numel(), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(value, z)
        return float(value.detach()), -(gradient * self._unit).reshape(-1).cpu()
