"""What a tangent-model error map is compared with: reconstructions and posteriors of other methods, in one form."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor
from tqdm import tqdm

from ntkgp.evidence import fit_evidence
from ntkgp.inverse.adapters import to_cuqi
from ntkgp.inverse.dip import DeepImagePrior
from ntkgp.inverse.noise import MaternField, adjoint_rows, checked_measurements, estimate_noise, pinv_floor
from ntkgp.inverse.operators import ForwardOperator
from ntkgp.inverse.total_variation import spatial_dims
from ntkgp.linearization.memory import format_memory, parse_memory
from ntkgp.models.inverse import InverseNTKGP
from ntkgp.models.inverse.priors import filter_prior

_DENSE = 4096  # pixels up to which a covariance is given
_WEIGHTS = 20  # solves in search of a weight


@dataclass(frozen=True)
class ImagePosterior:
    r"""A reconstruction and what its method says about its error.

    At most one of ``covariance``, ``variance`` and ``samples`` is there; :attr:`spread` is the keyword that
    :func:`~ntkgp.evaluation.metrics.images.score_image` takes. A method without any gives a point estimate.

    :param method: name, for a table.
    :param mean: the reconstruction, image_shape, float64.
    :param covariance: of the flattened pixels, (d, d).
    :param variance: of the pixels, image_shape.
    :param samples: S images.
    :param noise: σ that was used, or the standard deviations that were given.
    :param settings: hyper-parameters that were found or used.
    :param seconds: wall-clock time.
    """

    method: str
    mean: Tensor
    covariance: Tensor | None = None
    variance: Tensor | None = None
    samples: Tensor | None = None
    noise: float | Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def spread(self) -> dict[str, Tensor]:
        """What is known of the covariance by the name of its form; empty for a point estimate."""
        forms = {"covariance": self.covariance, "variance": self.variance, "samples": self.samples}
        return {name: value for name, value in forms.items() if value is not None}

    @property
    def sd(self) -> Tensor | None:
        """Standard deviation of every pixel, image_shape."""
        if self.samples is not None:
            return self.samples.std(0)
        if self.covariance is not None:
            return self.covariance.diagonal().clamp_min(0).sqrt().reshape(self.mean.shape)
        return None if self.variance is None else self.variance.sqrt()


def fbp_reference(y: Tensor, A: Any, noise: float | Tensor | None = None, **options: Any) -> ImagePosterior:
    r"""Filtered backprojection, with the measurement noise propagated through it: covariance :math:`F D F^\top`.

    It is linear in y, so this is exact for the noise, and silent about what the views do not determine.

    :param y: measurements.
    :param A: an operator with ``fbp``.
    :param noise: σ or standard deviations; estimated by default.
    :param options: of ``A.fbp``.
    :raises TypeError: an operator without ``fbp``.

    Cost: one FBP of each unit measurement; memory d_y·d up to 4096 pixels, in chunks beyond (variances only).
    """
    start, (y, sd, noise) = time.perf_counter(), _measured(y, A, noise)
    if not hasattr(A, "fbp"):
        raise TypeError(f"A: {type(A).__name__} has no filtered backprojection; expected a RayTransform")
    dense, parts, variance = A.num_pixels <= _DENSE, [], torch.zeros(A.num_pixels, dtype=torch.float64)
    with torch.no_grad():
        for rows in torch.arange(A.num_measurements).split(256):
            units = torch.zeros(len(rows), A.num_measurements, dtype=torch.float64)
            units[torch.arange(len(rows)), rows] = sd.flatten()[rows]
            images = A.fbp(units.reshape(-1, *A.data_shape), **options).reshape(len(rows), -1)
            variance += images.square().sum(0)
            if dense:
                parts.append(images)
        mean = A.fbp(y, **options)
    root = torch.cat(parts) if dense else None
    return ImagePosterior(
        "FBP", mean, covariance=None if root is None else root.T @ root,
        variance=None if dense else variance.reshape(mean.shape), noise=noise, seconds=time.perf_counter() - start,
    )  # fmt: skip


def gp_reference(
    y: Tensor,
    A: ForwardOperator,
    noise: float | Tensor | None = None,
    *,
    smoothness: float = 0.5,
    length_scales: Sequence[float] = (2.0, 5.0, 10.0),
    max_memory: str | int | float = "4GiB",
) -> ImagePosterior:
    r"""Gaussian process prior of the image, :math:`x \sim N(0, aK_\ell)`, its hyper-parameters by the evidence.

    :param y: measurements.
    :param A: forward operator.
    :param noise: σ or standard deviations; by the evidence too by default.
    :param smoothness: ν of the Matérn covariance.
    :param length_scales: of which the most likely is taken; ``(0.0,)`` is the ridge, :math:`x \sim N(0, aI)`.
    :param max_memory: for the d_y × d matrices.
    :raises ValueError: beyond the budget.

    Cost: O(d_y³ + d_y²·d) and d_y adjoints; the covariance up to 4096 pixels O(d_y·d²), else variances.
    """
    start = time.perf_counter()
    y = checked_measurements(y, A).to(torch.float64)
    need = 8 * A.num_measurements * (3 * A.num_pixels + 3 * A.num_measurements)
    if need > parse_memory(max_memory):
        raise ValueError(f"max_memory: {max_memory} is too small; the smallest possible is {format_memory(need)}")
    given = noise if isinstance(noise, Tensor) and noise.dim() > 0 else None
    weights = None if given is None else given / given.double().square().mean().sqrt()
    found = estimate_noise(
        y, A, weights=weights, length_scales=length_scales, smoothness=smoothness, max_measurements=A.num_measurements
    )
    sd = _measured(y, A, found.sd if noise is None else noise)[1].flatten()
    prior = MaternField(A.image_shape, found.length_scale, smoothness)
    rows = adjoint_rows(A, torch.arange(A.num_measurements))
    cross = found.image_sd**2 * prior(rows).flatten(1)  # A K, (d_y, d)
    factor = torch.linalg.cholesky(cross @ rows.flatten(1).T + sd.square().diag())
    root = torch.linalg.solve_triangular(factor, cross, upper=False)
    mean = root.T @ torch.linalg.solve_triangular(factor, y.flatten().unsqueeze(-1), upper=False)
    ridge = tuple(length_scales) == (0.0,)
    dense = A.num_pixels <= _DENSE
    covariance = found.image_sd**2 * prior.matrix() - root.T @ root if dense else None
    variance = (found.image_sd**2 - root.square().sum(0)).clamp_min(0).reshape(A.image_shape)
    return ImagePosterior(
        "ridge" if ridge else f"GP, Matérn {smoothness:g}", mean.reshape(A.image_shape), covariance=covariance,
        variance=None if dense else variance, noise=found.sd if noise is None else noise,
        settings={"length_scale": found.length_scale, "image_sd": found.image_sd, "log_evidence": found.log_evidence},
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def tv_reference(
    y: Tensor,
    A: ForwardOperator,
    noise: float | Tensor | None = None,
    *,
    weight: float | None = None,
    isotropic: bool = True,
    nonnegative: bool = False,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    progress: bool = False,
) -> ImagePosterior:
    r"""Total-variation reconstruction, :math:`\arg\min_x \tfrac12\|D^{-1/2}(Ax - y)\|^2 + w\,TV(x)`; a point estimate.

    :param y: measurements.
    :param A: forward operator.
    :param noise: σ or standard deviations, D = diag of their squares; estimated by default.
    :param weight: w; by default that at which the residuals are what the noise is,
        :math:`\|D^{-1/2}(Ax - y)\|^2 = d_y` (the discrepancy principle, by bisection).
    :param isotropic: the length of the gradient, or the sum of absolute differences.
    :param nonnegative: restrict to x ≥ 0, as attenuations are.
    :param tolerance: relative change of x between iterations at which one solve ends.
    :param max_iterations: of one solve.
    :param progress: show a bar over the weights.
    :raises ValueError: a weight or noise that is not positive, or noise of another shape.

    Cost: two products with A for each iteration; about ten solves for the weight.

    Source: Chambolle & Pock, *A first-order primal-dual algorithm*, JMIV 2011; Sidky, Jørgensen & Pan 2012 for CT.
    """
    start, (y, sd, noise) = time.perf_counter(), _measured(y, A, noise)
    solver = _PrimalDual(A, y, sd, isotropic, nonnegative, tolerance, max_iterations)
    if weight is not None:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight: expected a positive number, got {weight!r}")
        found = solver.solve(weight)
    else:
        weight, found = _discrepant_weight(solver, progress)
    return ImagePosterior(
        "TV",
        found,
        noise=noise,
        settings={"weight": weight, "isotropic": isotropic},
        seconds=time.perf_counter() - start,
    )


def _discrepant_weight(solver: _PrimalDual, progress: bool) -> tuple[float, Tensor]:
    """The weight whose residuals are what the noise is, and its minimiser: the residual grows with the weight."""
    at, low, high = -math.log(solver.size), -math.inf, math.inf
    for _ in tqdm(range(_WEIGHTS), "TV weights", disable=not progress):
        found = solver.solve(math.exp(at))
        misfit = solver.misfit(found)
        if abs(misfit - 1) < 0.01 or high - low < 0.01:
            break
        low, high = (at, high) if misfit < 1 else (low, at)
        bracketed = math.isfinite(low) and math.isfinite(high)
        at = 0.5 * (low + high) if bracketed else at + math.copysign(math.log(10), 1 - misfit)
    return math.exp(at), found


class _PrimalDual:
    """Chambolle and Pock's iteration, with A and the gradient scaled to norms of at most one; warm-started."""

    def __init__(
        self, A: ForwardOperator, y: Tensor, sd: Tensor, isotropic: bool, nonnegative: bool, tolerance: float, most: int
    ) -> None:
        self._operator, self._y, self._sd = A, y, sd
        self._isotropic, self._nonnegative, self._tolerance, self._most = isotropic, nonnegative, tolerance, most
        self._dims = spatial_dims(A.image_shape)
        self._norm = 1.01 * A.norm() / float(sd.min())
        self._slope = math.sqrt(4 * self._dims)
        self.x = torch.zeros(tuple(A.image_shape), dtype=torch.float64)
        self._p = torch.zeros(tuple(A.data_shape), dtype=torch.float64)
        self._q = torch.zeros(self._dims, *A.image_shape, dtype=torch.float64)
        # Of the image, roughly: where the search for a weight starts.
        self.size = float((y / sd).square().mean().sqrt()) / self._norm or 1.0

    def misfit(self, x: Tensor) -> float:
        """Mean squared residual over the noise."""
        return float(((self._operator(x) - self._y) / self._sd).square().mean())

    def _gradient(self, x: Tensor) -> Tensor:
        """Forward differences over ``_slope``, zero across the border."""
        out = torch.zeros(self._dims, *x.shape, dtype=x.dtype)
        for d in range(1, self._dims + 1):
            out[d - 1].narrow(-d, 0, x.shape[-d] - 1).copy_(x.diff(dim=-d))
        return out / self._slope

    def _divergence(self, q: Tensor) -> Tensor:
        """The transpose of :meth:`_gradient`."""
        out = torch.zeros(q.shape[1:], dtype=q.dtype)
        for d in range(1, self._dims + 1):
            inner = q[d - 1].narrow(-d, 0, q.shape[-d] - 1)
            out.narrow(-d, 1, q.shape[-d] - 1).add_(inner)
            out.narrow(-d, 0, q.shape[-d] - 1).sub_(inner)
        return out / self._slope

    def solve(self, weight: float) -> Tensor:
        """The minimiser at a weight, from where the last solve ended."""
        scale = self._norm
        data, bound = self._y / self._sd / scale, weight * self._slope / scale**2
        step, x, bar = 0.7, self.x, self.x
        with torch.no_grad():
            for _ in range(self._most):
                self._p = (self._p + step * (self._operator(bar) / self._sd / scale - data)) / (1 + step)
                q = self._q + step * self._gradient(bar)
                size = q.square().sum(0).sqrt() if self._isotropic else q.abs()
                self._q = q / (size / bound).clamp_min(1.0)
                pulled = self._operator.adjoint(self._p / self._sd) / scale + self._divergence(self._q)
                new = x - step * pulled
                new = new.clamp_min(0) if self._nonnegative else new
                change = float((new - x).norm()) / max(float(new.norm()), 1e-300)
                x, bar = new, 2 * new - x
                if change < self._tolerance:
                    break
        self.x = x
        return x.clone()


def mc_dropout_reference(
    y: Tensor,
    A: ForwardOperator,
    noise: float | Tensor | None = None,
    *,
    rate: float = 0.05,
    num_samples: int = 500,
    unet: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> ImagePosterior:
    """A deep image prior fitted with channels dropped after each 3×3 convolution, and left on: S images.

    Fitted without total variation, as bayes_dip's rival. The mean is that of the samples.

    :param y: measurements.
    :param A: forward operator.
    :param noise: σ or standard deviations; estimated by default.
    :param rate: dropout probability.
    :param num_samples: S ≥ 2.
    :param unet: of the U-Net.
    :param seed: of the fit and of the samples.
    :param options: of :class:`~ntkgp.inverse.DeepImagePrior`.
    :raises ValueError: fewer than two samples, or a rate outside of (0, 1).

    Cost: one fit and S forward passes.

    Source: Gal & Ghahramani 2016; Laves, Tölle & Ortmaier, *Uncertainty estimation in medical image denoising with
    Bayesian deep image prior*, 2020.
    """
    start = time.perf_counter()
    if num_samples < 2 or not 0 < rate < 1:
        raise ValueError(f"num_samples, rate: expected S >= 2 and a probability, got {num_samples} and {rate}")
    fit = DeepImagePrior(
        A, unet={**(unet or {}), "dropout": rate}, noise=noise, seed=seed, **{"tv_weight": 0.0, **options}
    ).fit(y)
    module = fit.net
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout2d):
            part.train()
    found = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for first in range(0, num_samples, 64):
            rows = fit.input.expand(min(64, num_samples - first), *fit.input.shape[1:])
            found.append(module(rows).to(torch.float64))
    samples = torch.cat(found)
    return ImagePosterior(
        "MC dropout", samples.mean(0), samples=samples, noise=fit.noise,
        settings={"rate": rate, "iterations": fit.iteration, "stopped_by": fit.stopped_by},
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def ensemble_reference(
    y: Tensor,
    A: ForwardOperator,
    noise: float | Tensor | None = None,
    *,
    size: int = 5,
    make: Callable[[int], DeepImagePrior] | None = None,
    seed: int = 0,
    **options: Any,
) -> ImagePosterior:
    """Deep image priors from several random starts; their spread is the error map.

    :param y: measurements.
    :param A: forward operator.
    :param noise: σ or standard deviations; estimated once by default.
    :param size: number of members, at least 2.
    :param make: makes a member from its seed; by default a :class:`~ntkgp.inverse.DeepImagePrior` of the ``options``.
    :param seed: of the first member.
    :raises ValueError: fewer than two members, or ``options`` beside ``make``.

    Cost: ``size`` fits. The covariance has rank size − 1.

    Source: Lakshminarayanan, Pritzel & Blundell, *Simple and scalable predictive uncertainty estimation*, 2017.
    """
    start = time.perf_counter()
    if size < 2:
        raise ValueError(f"size: expected at least two members, got {size}")
    if make is None:
        level = noise if noise is not None else estimate_noise(checked_measurements(y, A), A).sd
        members = [DeepImagePrior(A, noise=level, seed=seed + i, **options) for i in range(size)]
    elif options:
        raise ValueError(f"make: it makes the members; options of them have no effect, got {sorted(options)}")
    else:
        members = [make(seed + i) for i in range(size)]
    samples = torch.stack([member.fit(y).reconstruction.to(torch.float64) for member in members])
    return ImagePosterior(
        "DIP ensemble", samples.mean(0), samples=samples, noise=members[0].noise,
        settings={"size": size, "iterations": [member.iteration for member in members]},
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def bayes_dip_reference(
    y: Tensor,
    A: ForwardOperator,
    noise: float | None = None,
    *,
    dip: DeepImagePrior | None = None,
    lengthscale: float | None = None,
    predcp: float | None = 1.0,
    num_singular: int = 100,
    **options: Any,
) -> ImagePosterior:
    r"""bayes_dip's recipe on this library's parts: what its error maps would be.

    A U-Net without normalisation and with a sigmoid; J of the kernels of convolutions only, one prior for each block;
    all hyper-parameters at θ̃ (MacKay's evidence, with the tempered TV-PredCP); covariance of the image plus
    :math:`10^{-6} + \hat\sigma^2 \tfrac1d \operatorname{tr}(A^\top A)^+`, its floor (see
    :func:`~ntkgp.inverse.noise.pinv_floor`). Its fit differs in the stopping rule, which is this library's.

    :param y: measurements.
    :param A: forward operator.
    :param noise: σ of the fit; the one of the covariance is the evidence's.
    :param dip: a fit of these measurements, instead of a new one with the ``options``.
    :param lengthscale: ℓ of the covariance within 3×3 filters, fixed; ``None`` for none, which is where bayes_dip
        starts (ℓ = 0.1).
    :param predcp: factor of the rate of the hyper-prior, or ``None`` to go without.
    :param num_singular: singular values in the floor.
    :raises ValueError: ``options`` beside a fit.

    Cost: the fit, a dense evidence, and the dense covariance of the pixels.

    Source: Antorán, Barbano, Leuschner, Hernández-Lobato & Jin 2022 (arXiv 2203.00479) and its code's settings.
    """
    start = time.perf_counter()
    if dip is not None and options:
        raise ValueError(f"dip: it is fitted; options of a fit have no effect, got {sorted(options)}")
    if dip is None:
        options = {"unet": {"output": "sigmoid"}, "noise": noise, **options}
        dip = DeepImagePrior(A, **options).fit(y)
    lin = dip.linearize("block", parameters="convolutions")
    if lengthscale is not None:
        lin = filter_prior(lin, lengthscale)
    model = InverseNTKGP(y, A, GaussianLikelihood().to(torch.float64), lin)
    prior = None if predcp is None else dip.predcp(lin, predcp, form="tempered")
    report = fit_evidence(model, at="theta_map", prior=prior)
    level = float(report.noise.sqrt())
    floor = pinv_floor(A.matrix(), level, num_singular=num_singular) + 1e-6
    covariance = model.eval()().covariance_matrix.detach().to(torch.float64)
    return ImagePosterior(
        "bayes_dip", dip.reconstruction.to(torch.float64), noise=level,
        covariance=covariance + floor * torch.eye(len(covariance), dtype=torch.float64),
        settings={"precision": report.precision.tolist(), "floor": floor, "log_evidence": report.log_evidence},
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def lmrf_reference(
    y: Tensor,
    A: ForwardOperator,
    noise: float | None = None,
    *,
    scale: float | None = None,
    num_samples: int = 500,
    warmup: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> ImagePosterior:
    """Laplace Markov random field prior sampled by CUQIpy's UGLA; needs the package ``cuqipy``.

    :param y: measurements.
    :param A: forward operator.
    :param noise: σ, one number; estimated by default.
    :param scale: of the Laplace distribution of neighbours' differences; ``None`` for 0.15 of the standard
        deviation of a pixel under the Matérn prior that the evidence finds.
    :param num_samples: kept.
    :param warmup: draws before them that are not.
    :param seed: of numpy's legacy generator that CUQIpy draws from, whose state is put back.
    :param progress: show CUQIpy's own bars.
    :raises ImportError: CUQIpy is not installed.
    :raises ValueError: noise that differs between measurements.

    Cost: up to 50 products with A and its adjoint for each sample.

    Source: Uribe et al., SIAM/ASA JUQ 2022; CUQIpy (Riis et al., Inverse Problems 2024).
    """
    start = time.perf_counter()
    y = checked_measurements(y, A).to(torch.float64)
    if isinstance(noise, Tensor) and noise.dim() > 0:
        raise ValueError("noise: expected one number for all measurements")
    model = to_cuqi(A)
    import cuqi  # type: ignore[import-not-found, unused-ignore]

    found = estimate_noise(y, A) if noise is None or scale is None else None
    level = float(noise) if noise is not None else found.sd if found is not None else 0.0
    width = scale if scale is not None else 0.15 * found.image_sd if found is not None else 0.0
    state = np.random.get_state()  # noqa: NPY002 -- what CUQIpy draws from
    try:
        np.random.seed(seed)  # noqa: NPY002
        x = cuqi.distribution.LMRF(0, width, geometry=model.domain_geometry, name="x")
        data = cuqi.distribution.Gaussian(model @ x, level**2, name="y")
        target = cuqi.distribution.JointDistribution(x, data)(y=y.flatten().numpy())
        sampler = cuqi.sampler.UGLA(target)
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            sampler.warmup(warmup).sample(num_samples)
        drawn = sampler.get_samples().samples[:, -num_samples:]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    samples = torch.from_numpy(np.ascontiguousarray(drawn.T)).to(torch.float64).reshape(-1, *A.image_shape)
    return ImagePosterior(
        "LMRF (CUQIpy)", samples.mean(0), samples=samples, noise=level, settings={"scale": width},
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _measured(y: Tensor, A: ForwardOperator, noise: float | Tensor | None) -> tuple[Tensor, Tensor, float | Tensor]:
    """Measurements in float64, their standard deviations in the same shape, and the noise as it was given or found."""
    y = checked_measurements(y, A).to(torch.float64)
    if noise is None:
        noise = estimate_noise(y, A).sd
    sd = torch.as_tensor(noise, dtype=torch.float64)
    if sd.dim() and sd.shape != y.shape:
        raise ValueError(f"noise: expected a number or shape {tuple(y.shape)}, got {tuple(sd.shape)}")
    if not bool((sd > 0).all() and sd.isfinite().all()):
        raise ValueError(f"noise: expected positive numbers, got a minimum of {float(sd.min()):.3g}")
    return y, sd.expand(y.shape), noise
