r"""Priors of the weights with structure within a group: the same network in coordinates in which they are isotropic.

With :math:`\theta = T\phi` and :math:`\phi_g \sim N(0, I/\lambda_g)` the weights of group g have the prior covariance
:math:`T_gT_g^\top/\lambda_g`. A network reparametrised by T has the Jacobian JT: every model, evidence and bound works
with it as with any other.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntkgp.evidence import GaussianEvidence, fixed_point
from ntkgp.evidence.gaussian import GaussianObjective
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.system import cholesky_with_jitter
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import format_memory
from ntkgp.models.inverse.checks import check_operator, image_input
from ntkgp.models.inverse.measured import DerivedNetwork, MeasuredNetwork
from ntkgp.models.inverse.model import InverseNTKGP
from ntkgp.models.noise import NoiseLink

logger = logging.getLogger("ntkgp")

_JITTER = 1e-6
_LENGTHS = (1e-2, 1e2)
_CONVOLUTIONS = nn.modules.conv._ConvNd


class _Reparametrised(nn.Module):
    """A copy of a network whose parameters are coordinates φ: weights w = s·φ, or w = φLᵀ over the last dimensions.

    :param scales: factors of a parameter, by name, in its shape.
    :param roots: L by name of a parameter whose dimensions from the third on are a filter.
    """

    def __init__(self, net: nn.Module, scales: dict[str, Tensor], roots: dict[str, Tensor]) -> None:
        super().__init__()
        self.net = net
        self.names = (*scales, *roots)
        for i, name in enumerate(self.names):
            self.register_buffer(f"factor{i}", scales[name] if name in scales else roots[name])
        self.rooted = frozenset(roots)
        with torch.no_grad():
            parameters = dict(net.named_parameters())
            for name, factor in self._factors().items():
                parameters[name].copy_(_undone(parameters[name].double(), factor, name in self.rooted))

    def _factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"factor{i}") for i, name in enumerate(self.names)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network, at weights made of the coordinates."""
        parameters, weights = dict(self.net.named_parameters()), {}
        for name, factor in self._factors().items():
            phi = parameters[name]
            factor = factor.to(phi.dtype)
            weights[name] = (phi.flatten(2) @ factor.mT).view_as(phi) if name in self.rooted else phi * factor
        return functional_call(self.net, weights, args, kwargs)


def _undone(weight: Tensor, factor: Tensor, rooted: bool) -> Tensor:
    """T⁻¹θ of one parameter."""
    if not rooted:
        return weight / factor
    rows = weight.flatten(2)
    return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT.reshape(weight.shape)


def _in_coordinates(lin: LinearizedNetwork, scales: dict[str, Tensor], roots: dict[str, Tensor]) -> LinearizedNetwork:
    net = copy.deepcopy(lin.frozen.module(lin.frozen.device))
    found = DerivedNetwork(lin, _Reparametrised(net, scales, roots), lin.packing, lin._probe_rows, lin.output_shape)
    found.frozen._select = lin.frozen._select
    return found


def g_prior(lin: LinearizedNetwork, A: Any, x: Any = None, floor: float = 1e-6) -> LinearizedNetwork:
    r"""The network in coordinates in which every weight moves the measurements by the same amount.

    :math:`\theta_j = s_j\phi_j` with :math:`s_j = (\tfrac1n\sum_i [AJ]_{ij}^2)^{-1/2}`: the prior variance of a weight
    is the smaller the more the data see of it, up to one factor g per group (one in all for ``groups="single"``). The
    evidence then does not depend on how weights are scaled, one by one.

    :param lin: the network.
    :param A: the forward operator.
    :param x: the network's input, as of :class:`~ntkgp.InverseNTKGP`.
    :param floor: smallest root mean square, relative to the largest of all: weights that the data hardly see would
        have no bound on their prior.
    :return: to be given to :class:`~ntkgp.InverseNTKGP` in place of `lin`.
    :raises ValueError: an operator of other images, a floor that is not in (0, 1), or no effect of any weight.

    Cost: one backward pass per measurement. Layers then go by per-sample gradients. Antorán et al. 2023,
    *Sampling-based inference for large linear models, with application to linearised Laplace*.

    >>> import ntkgp
    >>> class First(torch.nn.Module):
    ...     image_shape, data_shape, num_measurements = (3,), (1,), 1
    ...     def forward(self, image):
    ...         return image[..., :1]
    ...     def adjoint(self, data):
    ...         return torch.nn.functional.pad(data, (0, 2))
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 3), torch.ones(1, 2))
    >>> g_prior(lin, First()).jacobian(torch.ones(1, 2))[0, 0].abs().max()
    tensor(1.)
    """
    if not 0.0 < floor < 1.0:
        raise ValueError(f"floor: expected a number in (0, 1), got {floor!r}")
    check_operator(A, lin)
    network = MeasuredNetwork(lin, image_input(lin, x), (A,))
    rows = network.rows_of(0)
    squares = torch.zeros(lin.num_parameters, dtype=torch.float64, device=rows.device)
    for chunk in rows.split(32):
        units = torch.eye(len(chunk), dtype=torch.float64, device=rows.device).unsqueeze(-1)
        squares += network.vjp(chunk, units).to(torch.float64).square().sum(0)
    size = (squares / len(rows)).sqrt()
    if not float(size.max()) > 0:
        raise ValueError("lin: no weight has any effect on the measurements")
    scale = size.clamp_min(floor * float(size.max())).reciprocal()
    parts = scale.split([p.numel() for p in lin.frozen.theta.values()])
    shaped = {n: part.view(p.shape) for (n, p), part in zip(lin.frozen.theta.items(), parts, strict=True)}
    return _in_coordinates(lin, shaped, {})


def filter_prior(lin: LinearizedNetwork, lengthscale: float | Tensor = 1.0) -> LinearizedNetwork:
    r"""The network in coordinates that make the filters of its convolutions smooth.

    Within each filter of a kernel (one input and output channel) the prior correlation of the weights at places i and j
    is :math:`e^{-\|i - j\|_2/\ell} + 10^{-6}\delta_{ij}`; ℓ → 0 is the isotropic prior. Other weights stay as they
    are.

    :param lin: the network.
    :param lengthscale: ℓ > 0 in places of the filter: a number, or one for each group, shape (G,), of which those of
        groups without filters do not matter. See :func:`filter_lengthscales` for those of the largest evidence.
    :return: to be given to :class:`~ntkgp.InverseNTKGP`, or any other model, in place of `lin`.
    :raises ValueError: lengths that are not positive, or no kernel with more than one place.

    Cost: nothing by itself; layers then go by per-sample gradients. Antorán et al. 2022, *Uncertainty estimation for
    computed tomography with a linearised deep image prior*, section 4.

    >>> import ntkgp
    >>> net = torch.nn.Conv2d(1, 1, 3, padding=1)
    >>> lin = ntkgp.LinearizedNetwork(net, torch.ones(1, 1, 5, 5))
    >>> smooth = filter_prior(lin, 2.0)
    >>> bool((smooth(torch.ones(1, 1, 5, 5)) - lin(torch.ones(1, 1, 5, 5))).abs().max() < 1e-5)
    True
    """
    groups = lin.groups
    lengths = torch.as_tensor(lengthscale, dtype=torch.float64).reshape(-1)
    if lengths.numel() not in (1, len(groups)):
        raise ValueError(f"lengthscale: expected a number or shape ({len(groups)},), got {tuple(lengths.shape)}")
    lengths, kernels = lengths.expand(len(groups)), _kernels(lin)
    used = lengths[sorted(set(kernels.values()))]
    if not bool((used > 0).all()) or not bool(torch.isfinite(used).all()):
        raise ValueError(f"lengthscale: expected positive finite numbers, got {lengths.tolist()}")
    roots = {}
    for name, group in kernels.items():
        distance = _distances(lin.frozen.theta[name].shape[2:]).to(lin.theta.device)
        correlation = torch.exp(-distance / lengths[group]) + _JITTER * torch.eye(len(distance)).to(distance)
        roots[name] = torch.linalg.cholesky(correlation)
    return _in_coordinates(lin, {}, roots)


def _kernels(lin: LinearizedNetwork) -> dict[str, int]:
    """Kernels of convolutions with more than one place, by name, with their groups."""
    module = lin.frozen.module(lin.frozen.device)
    wanted = {
        id(m.weight) for m in module.modules() if isinstance(m, _CONVOLUTIONS) and "weight" in m._parameters
    }  # fmt: skip
    group_of = dict(zip(lin.frozen.theta, lin.groups.of_tensor, strict=True))
    found = {
        name: group_of[name]
        for name, p in module.named_parameters()
        if id(p) in wanted and name in group_of and p.shape[2:].numel() > 1
    }
    if not found:
        raise ValueError("lin: its network has no trainable convolution with more than one place in its filters")
    return found


def _distances(shape: torch.Size) -> Tensor:
    """Distances of the places of a filter, (k, k)."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in shape)).reshape(shape.numel(), -1)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class FilterFit:
    """What :func:`filter_lengthscales` returns.

    :param lengthscale: ℓ of every group, shape (G,); NaN for groups without filters.
    :param precision: λ_g, shape (G,).
    :param noise: learned noise variances.
    :param log_evidence: at all of these.
    :param evaluations: of the profile.
    """

    lengthscale: Tensor
    precision: Tensor
    noise: Tensor
    log_evidence: float
    evaluations: int


def filter_lengthscales(
    model: InverseNTKGP, start: float = 1.0, *, max_evaluations: int = 50, tolerance: float = 1e-4
) -> FilterFit:
    r"""Length scales of :func:`filter_prior` by the evidence, together with all precisions and the noise.

    In the Gram of a group only a few distances δ occur, :math:`K_g(\ell) = \sum_\delta e^{-\delta/\ell} K_{g,\delta}`:
    with these computed once, the evidence costs no network pass at any ℓ. The profile
    :math:`\max_{\lambda,\sigma^2} M(\lambda, \sigma^2, \ell)` is maximised in log ℓ by L-BFGS-B, its gradient being the
    partial derivative at the inner optimum.

    :param model: on the network without a filter prior; it is not changed.
    :param start: of every ℓ.
    :param max_evaluations: of the profile; each is a fit of the precisions that starts from the last one's.
    :param tolerance: accepted gradient per measurement.
    :return: the lengths for :func:`filter_prior`, with what goes with them.
    :raises ValueError: no convolution, or rows of the Jacobian that do not fit in half of the model's `max_memory`.

    Cost: a backward pass per measurement, n·P numbers, and O(δ·n²·P) once for δ distances (six for 3 × 3 filters).
    """
    grams, rows = _DistanceGrams.of(model), model.lin.rows_of(0)
    assert model.train_targets is not None
    offset = model.lin(rows) - model.lin.jvp(rows, model.lin.theta)
    targets = model.train_targets - offset[:, 0]
    profile = _Profile(grams, targets, NoiseLink(model.likelihood, len(targets), 1).model())
    low, high = np.log(_LENGTHS)
    free = [g for g, parts in enumerate(grams.parts) if len(parts) > 1]
    scipy.optimize.minimize(
        profile, np.full(len(free), np.log(start)), jac=True, method="L-BFGS-B", bounds=[(low, high)] * len(free),
        options={"maxfun": max_evaluations, "gtol": tolerance * len(targets), "ftol": 1e-12},
    )  # fmt: skip
    assert profile.best is not None
    value, lengths, x = profile.best
    whole = torch.full((len(grams.parts),), torch.nan, dtype=torch.float64)
    whole[free] = lengths
    count = len(grams.parts)
    return FilterFit(whole, x[:count].exp(), x[count:].exp(), value, profile.evaluations)


@dataclass(frozen=True)
class _DistanceGrams:
    """K_{g,δ} of every group: pairs of δ and a symmetric matrix, δ = 0 (with all other weights) first."""

    parts: list[list[tuple[float, Tensor]]]

    @classmethod
    def of(cls, model: InverseNTKGP) -> _DistanceGrams:
        """From the rows of the Jacobian, one tensor at a time."""
        network, lin = model.lin, model.lin.base
        kernels, rows = _kernels(lin), network.rows_of(0)
        needed = torch.finfo(lin.dtype).bits // 8 * len(rows) * lin.num_parameters
        if needed > model.max_memory // 2:
            raise ValueError(
                f"max_memory: {format_memory(model.max_memory)} is too small for the rows of the Jacobian; the "
                f"smallest possible is {format_memory(2 * needed)}"
            )
        units = torch.eye(len(rows), dtype=torch.float64, device=rows.device).unsqueeze(-1)
        jacobian = torch.cat([network.vjp(rows, unit) for unit in units.split(32)])
        parts: list[dict[float, Tensor]] = [{} for _ in lin.groups.names]
        sizes = [p.numel() for p in lin.frozen.theta.values()]
        group_of = dict(zip(lin.frozen.theta, lin.groups.of_tensor, strict=True))
        for (name, p), block in zip(lin.frozen.theta.items(), jacobian.split(sizes, dim=-1), strict=True):
            found, block = parts[group_of[name]], block.to(torch.float64)
            if name not in kernels:
                found[0.0] = found.get(0.0, 0.0) + block @ block.mT
                continue
            filters = block.view(len(rows), -1, p.shape[2:].numel())
            distance = _distances(p.shape[2:]).to(block)
            for delta in sorted({round(d, 9) for d in distance.flatten().tolist()}):
                pairs = ((distance - delta).abs() < 1e-6).to(block)
                found[delta] = found.get(delta, 0.0) + (filters @ pairs).flatten(1) @ block.mT
                if delta == 0.0:
                    jitter = block @ block.mT
                    found[0.0] = found[0.0] + _JITTER * jitter
        return cls([sorted(found.items(), key=lambda pair: pair[0]) for found in parts])

    def at(self, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """K_g(ℓ), shape (G, n, n), and their derivatives in log ℓ, for groups with filters; ℓ of these groups only."""
        grams, slopes = [], []
        remaining = iter(lengths.tolist())
        for parts in self.parts:
            if len(parts) == 1:
                grams.append(parts[0][1])
                continue
            length = next(remaining)
            weights = [torch.exp(torch.tensor(-delta / length, dtype=torch.float64)) for delta, _ in parts]
            each = torch.stack([w * gram for w, (_, gram) in zip(weights, parts, strict=True)])
            deltas = torch.tensor([delta for delta, _ in parts], dtype=torch.float64)
            grams.append(each.sum(0))
            slopes.append(torch.einsum("d,dnm->nm", deltas / length, each))
        return torch.stack(grams), slopes


class _Profile:
    """Minus the evidence at the best precisions and noise for given log ℓ, with its gradient."""

    def __init__(self, grams: _DistanceGrams, targets: Tensor, noise: NoiseModel) -> None:
        self.grams, self.targets, self.noise = grams, targets, noise
        self.x: Tensor | None = None
        self.evaluations = 0
        self.best: tuple[float, Tensor, Tensor] | None = None

    def __call__(self, point: Any) -> tuple[float, Any]:
        lengths = torch.from_numpy(point.copy()).exp()
        grams, slopes = self.grams.at(lengths)
        objective = GaussianObjective(GaussianEvidence(0.5 * (grams + grams.mT), self.targets, self.noise))
        found = fixed_point(objective, start=self.x)
        self.x, value = found.x, found.evaluation.value
        self.evaluations += 1
        if self.best is None or value > self.best[0]:
            self.best = value, lengths, found.x
        precision, noise = objective.split(found.x)
        matrix = torch.einsum("g,gnm->nm", 1 / precision, grams)
        matrix.diagonal().add_(self.noise.diagonal(noise))
        root, _ = cholesky_with_jitter(matrix)
        inverse = torch.cholesky_inverse(root)
        alpha = inverse @ self.targets
        pull = torch.outer(alpha, alpha) - inverse
        free = [g for g, parts in enumerate(self.grams.parts) if len(parts) > 1]
        gradient = torch.stack(
            [0.5 / precision[g] * (pull * slope).sum() for g, slope in zip(free, slopes, strict=True)]
        )
        return -value, -gradient.numpy()
