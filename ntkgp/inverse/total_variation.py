"""Total variation of images, its expectation under a Gaussian in closed form, and hyper-priors made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import parse_memory

FORMS = ("density", "tempered")
_HALF_LOG_2_PI = 0.5 * math.log(2 / math.pi)


def spatial_dims(image_shape: Sequence[int]) -> int:
    """How many of the last dimensions of an image are space: two, or the only one; those before are channels."""
    return min(2, len(image_shape))


def total_variation(image: Tensor, dims: int = 2, *, isotropic: bool = False) -> Tensor:
    r"""Sum over all neighbours of the absolute differences, or of the lengths of the gradients.

    .. math:: \sum_{ij} |x_{i+1,j} - x_{ij}| + |x_{i,j+1} - x_{ij}| \quad\text{or}\quad
        \sum_{ij} \sqrt{(x_{i+1,j} - x_{ij})^2 + (x_{i,j+1} - x_{ij})^2}

    with differences across the border left out of the first and zero in the second.

    :param image: the last ``dims`` dimensions are space; every other one is summed over.
    :param dims: number of spatial dimensions.
    :param isotropic: the second form. Its gradient where all differences vanish is taken as zero.
    :return: a scalar of the image's dtype, differentiable.
    :raises ValueError: fewer dimensions than ``dims``.

    Cost: O(number of pixels).

    >>> total_variation(torch.tensor([[0.0, 0.0], [3.0, 0.0]])), total_variation(torch.eye(2), isotropic=True)
    (tensor(6.), tensor(3.4142))
    """
    if not 1 <= dims <= image.dim():
        raise ValueError(f"image: expected at least {dims} dimensions, got shape {tuple(image.shape)}")
    if not isotropic:
        return sum((image.diff(dim=-d).abs().sum() for d in range(1, dims + 1)), image.new_zeros(()))
    steps = []
    for d in range(1, dims + 1):
        shape = list(image.shape)
        shape[-d] = 1
        steps.append(torch.cat([image.diff(dim=-d), image.new_zeros(shape)], dim=-d))
    squares = torch.stack(steps).square().sum(0)
    flat = squares == 0
    return torch.where(flat, torch.zeros_like(squares), torch.where(flat, 1.0, squares).sqrt()).sum()


def neighbours(image_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flat indices (i, j) of all pairs of neighbours of an image, each of shape (M,).

    Neighbours differ by one in one of the last two dimensions (see :func:`spatial_dims`); channels have none.

    >>> neighbours((2, 2))
    (tensor([1, 3, 2, 3]), tensor([0, 2, 0, 1]))
    """
    index = torch.arange(math.prod(image_shape)).reshape(*image_shape)
    first, second = [], []
    for d in range(1, spatial_dims(image_shape) + 1):
        size = index.shape[-d]
        first.append(index.narrow(-d, 1, size - 1).flatten())
        second.append(index.narrow(-d, 0, size - 1).flatten())
    return torch.cat(first), torch.cat(second)


def expected_absolute(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Mean of the folded normal: :math:`E|\delta|` of :math:`\delta \sim N(m, s^2)`, elementwise.

    .. math:: E|\delta| = s \sqrt{2/\pi}\, e^{-m^2/2s^2} + m\, \mathrm{erf}(m / (s\sqrt2)),
        \qquad E|\delta| = |m| \text{ for } s = 0.

    :param mean: m.
    :param variance: s² ≥ 0, of a shape that broadcasts with m's.
    :return: differentiable, with a zero gradient in the variance where that is zero.

    Source: Leone, Nelson & Nottingham, *The folded normal distribution*, Technometrics 1961.

    >>> expected_absolute(torch.tensor([0.0, 3.0]), torch.tensor([torch.pi / 2, 0.0]))
    tensor([1., 3.])
    """
    mean, variance = torch.broadcast_tensors(mean, variance)
    certain = variance <= 0
    s = torch.where(certain, 1.0, variance).sqrt()
    z = mean / s
    folded = s * math.sqrt(2 / math.pi) * (-0.5 * z.square()).exp() + mean * torch.erf(z / math.sqrt(2))
    return torch.where(certain, mean.abs(), folded)


def expected_total_variation(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Expected anisotropic total variation of a Gaussian image, in closed form.

    :math:`E[TV] = \sum_{(i,j)} E|\delta_{ij}|` with :math:`\delta_{ij} \sim N(m_i - m_j, C_{ii} + C_{jj} - 2C_{ij})`
    over all neighbours: expectation is linear, so correlations between the differences do not enter.

    :param mean: an image; its last two dimensions are space, those before channels.
    :param covariance: of the flattened image, shape (d, d).
    :return: a scalar, differentiable in both.
    :raises ValueError: a covariance of another shape.

    Cost: O(d).

    >>> expected_total_variation(torch.zeros(2), 0.5 * torch.pi * torch.eye(2)) ** 2
    tensor(2.0000)
    """
    d = mean.numel()
    if covariance.shape != (d, d):
        raise ValueError(f"covariance: expected shape {(d, d)} for {d} pixels, got {tuple(covariance.shape)}")
    i, j = (index.to(mean.device) for index in neighbours(mean.shape))
    diagonal, flat = covariance.diagonal(), mean.flatten()
    variance = (diagonal[i] + diagonal[j] - covariance[i, j] - covariance[j, i]).clamp_min(0)
    return expected_absolute(flat[i] - flat[j], variance).sum()


def difference_variances(
    lin: LinearizedNetwork,
    x: Any,
    *,
    image_shape: Sequence[int] | None = None,
    num_probes: int | None = None,
    max_memory: str | int | float = "2GiB",
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    r"""Prior variances of all neighbour differences per group at unit prior variance.

    :math:`t_{g,(i,j)} = \|(e_i - e_j)^\top J_g\|^2`, so that under :math:`\theta_g \sim N(\cdot, v_g I)` alone the
    difference has the variance :math:`v_g t_{g,(i,j)}`.

    :param lin: a network whose C outputs are the pixels.
    :param x: its one input.
    :param image_shape: of the C outputs; ``lin.output_shape`` without leading ones by default.
    :param num_probes: estimate from so many random weight vectors instead, :math:`t \approx
        \frac1K\sum_k (J_g z_k)^2_{i-j}`, with relative standard error :math:`\sqrt{2/K}` for each entry.
    :param max_memory: for the Grams; beyond it one backward pass is made for each pair of neighbours.
    :param seed: of the probes; the global random state is not touched.
    :return: shape (G, M), float64, pairs as :func:`neighbours` has them.
    :raises ValueError: several inputs, or outputs that do not fill the image.

    Cost: C backward chains and the Gram over pixels, O(G·C²) memory; else 2C backward passes; with probes G·K
    forward-mode passes.
    """
    shape = _image_shape(lin, image_shape)
    packed = lin.pack(x)
    if len(packed) != 1:
        raise ValueError(f"x: expected one input, the fixed input of the image network, got {len(packed)}")
    i, j = (index.to(packed.device) for index in neighbours(shape))
    if num_probes is not None:
        return _probed(lin, packed, i, j, num_probes, seed, progress)
    if lin.gram_memory(1, 1) <= parse_memory(max_memory):
        grams = lin.grams(packed, max_memory=max_memory, progress=progress)
        diagonal = grams.diagonal(dim1=-2, dim2=-1)
        return (diagonal[:, i] + diagonal[:, j] - 2 * grams[:, i, j]).clamp_min(0)
    chunk = max(1, min(64, parse_memory(max_memory) // (24 * lin.num_parameters)))
    parts = []
    pairs = list(zip(i.split(chunk), j.split(chunk), strict=True))
    for first, second in tqdm(pairs, "differences", disable=not progress):
        rows = torch.zeros(len(first), 1, lin.num_outputs, dtype=lin.dtype, device=packed.device)
        rows[torch.arange(len(first)), 0, first] = 1
        rows[torch.arange(len(first)), 0, second] = -1
        parts.append(lin.groups.sum_per_group(lin.vjp(packed, rows).to(torch.float64).square()))
    return torch.cat(parts).T.contiguous()


def _probed(
    lin: LinearizedNetwork, x: Tensor, i: Tensor, j: Tensor, num_probes: int, seed: int, progress: bool
) -> Tensor:
    """The same by random weight vectors."""
    if num_probes < 1:
        raise ValueError(f"num_probes: expected a positive number, got {num_probes}")
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(len(lin.groups), len(i), dtype=torch.float64, device=x.device)
    index = lin.groups.index
    for _ in tqdm(range(num_probes), "probes", disable=not progress):
        z = torch.randn(lin.num_parameters, generator=generator, dtype=torch.float64)
        masked = torch.stack([torch.where(index == g, z, 0.0) for g in range(len(lin.groups))]).to(x.device)
        moved = lin.jvp(x, masked.to(lin.dtype)).to(torch.float64).squeeze(1)
        table += (moved[:, i] - moved[:, j]).square() / num_probes
    return table


def _image_shape(lin: LinearizedNetwork, image_shape: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of the image that the outputs are."""
    shape = tuple(lin.output_shape if image_shape is None else image_shape)
    if image_shape is None:
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
    if math.prod(shape) != lin.num_outputs:
        raise ValueError(f"image_shape: {shape} has {math.prod(shape)} pixels, the network {lin.num_outputs} outputs")
    return shape


class TVPredCP:
    r"""Hyper-prior of the group variances by the total variation that they cause, exactly.

    The expected total variation when only group g varies, :math:`\kappa_g(v_g) = E[TV(\tilde f + J_g \Delta)]`,
    :math:`\Delta \sim N(0, v_g I)`, is increasing in :math:`v_g = 1/\lambda_g` from :math:`\kappa_g(0) =
    TV(\tilde f)`. An exponential prior of rate s on what exceeds that is, by change of variables,

    .. math:: \log p(\log\lambda) = \sum_g \log s - s\,[\kappa_g - \kappa_g(0)]
        + \log\frac{\partial\kappa_g}{\partial\log v_g},\qquad
        \frac{\partial\kappa_g}{\partial\log v_g} = \tfrac12\sum_p s_p \sqrt{2/\pi}\, e^{-m_p^2/2s_p^2},

    with :math:`m_p` and :math:`s_p^2 = v_g t_{g,p}` the means and variances of the differences of neighbours. Nothing
    is sampled. The Jacobian's term falls without bound as :math:`v_g \to 0`: no group is pruned by it.

    :param lin: the linearised network whose outputs are the pixels.
    :param x: its fixed input, one row.
    :param rate: s > 0; :meth:`ntkgp.inverse.DeepImagePrior.predcp` takes scale·d_y·γ from the fit's TV weight γ.
    :param form: ``"density"``, the equation above, which integrates to one; ``"tempered"``, bayes_dip's
        :math:`s\,[-\kappa_g + \log|\partial\kappa_g/\partial\log v_g|]`, whose Jacobian is weighted by s too: no
        density of a stated variable.
    :param options: ``image_shape``, ``num_probes``, ``max_memory``, ``seed``, ``progress`` of
        :func:`difference_variances`.
    :raises ValueError: a rate that is not positive, an unknown form, or a network without derivative in all groups.

    Cost: :func:`difference_variances` once; a density O(G·C). Memory 2·G·C numbers.

    Source: Nalisnick, Gordon & Hernández-Lobato, *Predictive complexity priors*, AISTATS 2021; Antorán et al. 2022
    (arXiv 2203.00479), who sample :math:`\kappa` and differentiate it twice.

    >>> import ntkgp
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 9))
    >>> x = torch.randn(1, 2)
    >>> prior = TVPredCP(ntkgp.LinearizedNetwork(net, x, groups="layer"), x, rate=0.1, image_shape=(3, 3))
    >>> prior.log_density(torch.zeros(2)).shape, prior.expected_tv(torch.zeros(2)).shape
    (torch.Size([]), torch.Size([2]))
    """

    def __init__(self, lin: LinearizedNetwork, x: Any, rate: float, *, form: str = "density", **options: Any) -> None:
        if not (isinstance(rate, int | float) and math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate: expected a positive number, got {rate!r}")
        if form not in FORMS:
            raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
        self.rate, self.form = float(rate), form
        self.variances = difference_variances(lin, x, **options)
        dead = [name for name, row in zip(lin.groups.names, self.variances, strict=True) if not bool((row > 0).any())]
        if dead:
            raise ValueError(
                f"lin: the groups {dead} move no difference of neighbours, so their total variation says nothing "
                "about their precision; merge them into another group"
            )
        i, j = neighbours(_image_shape(lin, options.get("image_shape")))
        image = lin(x).reshape(-1).to(torch.float64)
        self.differences = image[i] - image[j]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.variances)

    def expected_tv(self, log_precision: Tensor) -> Tensor:
        r""":math:`\kappa_g`, shape (G,), at log precisions (G,)."""
        variance = self._variance(log_precision)
        return expected_absolute(self.differences.to(variance.device), variance).sum(-1)

    def log_jacobian(self, log_precision: Tensor) -> Tensor:
        r""":math:`\log|\partial\kappa_g/\partial\log\lambda_g|`, shape (G,); of pairs that a group moves only."""
        variance = self._variance(log_precision)
        moved = variance > 0
        positive = torch.where(moved, variance, 1.0)
        terms = 0.5 * (positive.log() - self.differences.to(variance.device).square() / positive) + _HALF_LOG_2_PI
        return torch.where(moved, terms, -torch.inf).logsumexp(-1) - math.log(2)

    def log_density(self, log_precision: Tensor) -> Tensor:
        """The log density at log precisions (G,), a differentiable scalar."""
        kappa, jacobian = self.expected_tv(log_precision), self.log_jacobian(log_precision)
        if self.form == "tempered":
            return self.rate * (jacobian - kappa).sum()
        excess = kappa - self.differences.abs().sum().to(kappa)
        return (math.log(self.rate) - self.rate * excess + jacobian).sum()

    def _variance(self, log_precision: Tensor) -> Tensor:
        """Variances of the differences, (G, M)."""
        _check_log_precision(log_precision, self.num_groups)
        return (-log_precision.to(torch.float64)).exp().unsqueeze(-1) * self.variances.to(log_precision.device)

    def __repr__(self) -> str:
        return f"TVPredCP(rate={self.rate:.4g}, form={self.form!r}, num_groups={self.num_groups})"


class ScalePrior:
    r"""Log-normal hyper-prior of the group variances, against pruning.

    :math:`\log v_g \sim N(\mu, s^2)`; with ``location=None`` :math:`\mu` is the mean over the groups, so that only the
    spread between groups is penalised and the common scale is left to the evidence: s → 0 is one common precision,
    s → ∞ are free ones.

    :param spread: s in nats: 1.15 is a factor of ten in variance at two standard deviations.
    :param location: :math:`\mu = \log v`, one number or one for each group; None for partial pooling.
    :raises ValueError: a spread that is not positive.

    The pooled density is that of the G − 1 differences and constant along the common scale.

    >>> ScalePrior(1.0).log_density(torch.tensor([3.0, 3.0])) - ScalePrior(1.0).log_density(torch.tensor([2.0, 4.0]))
    tensor(1., dtype=torch.float64)
    """

    def __init__(self, spread: float = 1.0, location: float | Tensor | None = None) -> None:
        if not (isinstance(spread, int | float) and math.isfinite(spread) and spread > 0):
            raise ValueError(f"spread: expected a positive number, got {spread!r}")
        self.spread = float(spread)
        self.location = None if location is None else torch.as_tensor(location, dtype=torch.float64)

    def log_density(self, log_precision: Tensor) -> Tensor:
        """The log density at log precisions (G,), a differentiable scalar."""
        _check_log_precision(log_precision, None)
        log_variance = -log_precision.to(torch.float64)
        free = len(log_variance)
        if self.location is None:
            centred, free = log_variance - log_variance.mean(), free - 1
        else:
            centred = log_variance - self.location.to(log_variance.device)
        constant = free * (math.log(self.spread) + 0.5 * math.log(2 * math.pi))
        return -0.5 * (centred / self.spread).square().sum() - constant

    def __repr__(self) -> str:
        return f"ScalePrior(spread={self.spread:.4g}, location={self.location})"


class HalfCauchyPrior:
    r"""Half-Cauchy hyper-prior of the group standard deviations :math:`\sqrt{v_g}`, with heavy tails to both sides.

    In :math:`u = \tfrac12\log v_g - \log a` its density is :math:`\frac{2}{\pi}\,\frac{e^u}{1 + e^{2u}}`, which falls
    as :math:`e^{-|u|}`: pruning (u → −∞) costs half a nat for each nat of variance, and no more.

    :param scale: a > 0, one number or one for each group: the median of the standard deviation.
    :raises ValueError: a scale that is not positive.

    Source: Gelman, *Prior distributions for variance parameters in hierarchical models*, Bayesian Analysis 2006.

    >>> HalfCauchyPrior(2.0).log_density(-torch.tensor([4.0]).log())  # log(2 / π · ½ · ½) at the median
    tensor(-1.8379, dtype=torch.float64)
    """

    def __init__(self, scale: float | Tensor = 1.0) -> None:
        self.scale = torch.as_tensor(scale, dtype=torch.float64)
        if not bool((self.scale > 0).all() and self.scale.isfinite().all()):
            raise ValueError(f"scale: expected positive numbers, got {scale!r}")

    def log_density(self, log_precision: Tensor) -> Tensor:
        """The log density at log precisions (G,), a differentiable scalar."""
        _check_log_precision(log_precision, None)
        u = -0.5 * log_precision.to(torch.float64) - self.scale.log().to(log_precision.device)
        # |du / dlog λ| = ½ makes it a density of log λ.
        return (math.log(1 / math.pi) + u - torch.nn.functional.softplus(2 * u)).sum()

    def __repr__(self) -> str:
        return f"HalfCauchyPrior(scale={self.scale.tolist()})"


def _check_log_precision(log_precision: Tensor, num_groups: int | None) -> None:
    """Refuse anything but a vector of the right length."""
    shape = tuple(log_precision.shape)
    if log_precision.dim() != 1 or (num_groups is not None and shape != (num_groups,)):
        hint = "" if num_groups is None else "; the prior was made for other groups than the model's"
        raise ValueError(
            f"log_precision: expected shape ({'G' if num_groups is None else num_groups},), got {shape}{hint}"
        )


def collapse_warnings(
    prior_sd: Tensor,
    *,
    names: Sequence[str] | None = None,
    posterior_sd: Tensor | None = None,
    noise: float | None = None,
    residual_rms: float | None = None,
    floor: float = 1 / (255 * math.sqrt(12)),
) -> tuple[str, ...]:
    r"""Plain words on error bars that have collapsed, from what an evidence fit left.

    :param prior_sd: standard deviation of the image under the prior of each group alone, (G,):
        :math:`\sqrt{v_g \operatorname{tr}(J_g J_g^\top)/C}`.
    :param names: of the groups.
    :param posterior_sd: standard deviation of every pixel.
    :param noise: σ̂.
    :param residual_rms: root mean square of y − A f̃.
    :param floor: the discretisation: an sd below it claims more than the image can show; by default that of 8 bits on
        images in [0, 1].
    :return: one sentence for each: groups pruned (their sd below ``floor``), all of them, pixels below ``floor``, noise
        equal to the residuals within 1 % (the evidence explains nothing by the network).

    >>> collapse_warnings(torch.tensor([0.1, 1e-6]), names=("inc", "out"))
    ('pruned: the groups out move the image by less than 0.00113; a common precision or a ScalePrior prevents it',)
    """
    found = []
    labels = [f"group {g}" for g in range(len(prior_sd))] if names is None else list(names)
    small = [label for label, sd in zip(labels, prior_sd.tolist(), strict=True) if not sd >= floor]
    if small and len(small) == len(labels):
        found.append(f"collapsed: no group moves the image by {floor:.3g}; the evidence was taken on fitted residuals?")
    elif small:
        found.append(
            f"pruned: the groups {', '.join(small)} move the image by less than {floor:.3g}; a common precision or a "
            "ScalePrior prevents it"
        )
    if posterior_sd is not None:
        share = float((posterior_sd < floor).double().mean())
        if share > 0.01:
            found.append(f"{share:.0%} of the pixels have a standard deviation below {floor:.3g}")
    if noise is not None and residual_rms is not None and abs(noise / max(residual_rms, 1e-300) - 1) < 0.01:
        found.append(
            f"the noise {noise:.4g} is the residual of the network, {residual_rms:.4g}: its weights explain nothing"
        )
    return tuple(found)
