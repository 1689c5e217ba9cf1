"""A stationary Gaussian prior of images, and the noise level that its evidence finds in measurements alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.baselines.references import minimum
from ntkgp.inverse.operators import ForwardOperator
from ntkgp.inverse.total_variation import spatial_dims

SMOOTHNESS = (0.5, 1.5, 2.5)
_LENGTH_SCALES = (1.0, 2.0, 5.0, 10.0)
_CUT = 1e-12  # of the largest eigenvalue
_LOWEST, _HIGHEST = -20.0, 12.0  # log of the noise variance over the mean variance of what the image explains


class MaternField:
    r"""Images with the covariance :math:`K(p, q) = k_\nu(\|p - q\| / \ell)` of variance one between pixels p and q.

    Channels (dimensions before the last two) are independent. Products use the fast Fourier transform on a grid of
    twice the size, on which they are exact.

    :param image_shape: of one image; the last two dimensions are space.
    :param length_scale: ℓ in pixels; 0 is white noise, K = I.
    :param smoothness: ν, 0.5, 1.5 or 2.5.
    :raises ValueError: an unknown smoothness or a negative length scale.

    >>> field = MaternField((5, 4), 2.0)
    >>> x = torch.randn(3, 5, 4, dtype=torch.float64)
    >>> torch.allclose(field(x).reshape(3, 20), x.reshape(3, 20) @ field.matrix())
    True
    """

    def __init__(self, image_shape: Sequence[int], length_scale: float, smoothness: float = 1.5) -> None:
        if smoothness not in SMOOTHNESS:
            raise ValueError(f"smoothness: expected one of {SMOOTHNESS}, got {smoothness!r}")
        if not (math.isfinite(length_scale) and length_scale >= 0):
            raise ValueError(f"length_scale: expected a number of pixels >= 0, got {length_scale!r}")
        self.image_shape = tuple(image_shape)
        self.length_scale, self.smoothness = float(length_scale), smoothness
        self._space = self.image_shape[len(self.image_shape) - spatial_dims(self.image_shape) :]
        lags = [torch.arange(2 * n, dtype=torch.float64) for n in self._space]
        grid = torch.meshgrid(*[torch.minimum(lag, len(lag) - lag) for lag in lags], indexing="ij")
        distance = torch.stack(grid).square().sum(0).sqrt()
        self._transform = torch.fft.rfftn(self._correlation(distance))

    def _correlation(self, distance: Tensor) -> Tensor:
        """Correlation at a distance in pixels."""
        if self.length_scale == 0:
            return (distance == 0).to(torch.float64)
        r = distance * math.sqrt(2 * self.smoothness) / self.length_scale
        polynomial = torch.ones_like(r) if self.smoothness == 0.5 else 1 + r
        if self.smoothness == 2.5:
            polynomial = polynomial + r.square() / 3
        return polynomial * (-r).exp()

    def __call__(self, x: Tensor) -> Tensor:
        """K x of images (*batch, *image_shape), in float64."""
        if self.length_scale == 0:
            return x.to(torch.float64)
        d = len(self._space)
        dims, size = tuple(range(-d, 0)), [2 * n for n in self._space]
        moved = torch.fft.rfftn(x.to(torch.float64), s=size, dim=dims) * self._transform.to(x.device)
        found = torch.fft.irfftn(moved, s=size, dim=dims)
        inside = (Ellipsis, *(slice(n) for n in self._space))
        return found[inside]

    def matrix(self) -> Tensor:
        """K, shape (d, d), of the flattened image."""
        d = math.prod(self.image_shape)
        return self(torch.eye(d, dtype=torch.float64).reshape(d, *self.image_shape)).reshape(d, d)


class NoiseEstimate(NamedTuple):
    """What :func:`estimate_noise` finds.

    :ivar sd: σ̂, the standard deviation of a measurement; of weighted ones the factor of their given sds.
    :ivar image_sd: prior standard deviation of a pixel.
    :ivar length_scale: ℓ in pixels, the most likely of those tried.
    :ivar log_evidence: of the measurements that were used.
    :ivar smoothness: ν, the most likely of those tried.
    """

    sd: float
    image_sd: float
    length_scale: float
    log_evidence: float
    smoothness: float


def estimate_noise(
    y: Tensor,
    A: ForwardOperator,
    *,
    weights: Tensor | None = None,
    length_scales: Sequence[float] = _LENGTH_SCALES,
    smoothness: float | Sequence[float] = SMOOTHNESS,
    max_measurements: int = 1000,
    progress: bool = False,
) -> NoiseEstimate:
    r"""The noise level in linear measurements of an unknown image, from the measurements alone.

    Under a stationary Gaussian prior of the image the measurements are Gaussian,

    .. math:: y \sim N(0,\; a\,A K_{\ell\nu} A^\top + \sigma^2 D), \qquad D = \mathrm{diag}(d^2),

    and :math:`(a, \sigma, \ell, \nu)` that make them most likely are found by one eigendecomposition for each length
    scale and smoothness, and a search in one number. A smooth image cannot make what is rough in the data, so that is
    noise; how smooth is for the data to say: a prior smoother than the image takes its edges for noise. On handwritten
    glyphs of 28² pixels with 10 and 20 views the level was 0.996 and 1.000 of the truth in the mean, with a spread of
    5 %; of a disc with sharp holes ν = 1.5 alone finds 2.7 times what ν = 0.5 does, which is more likely by 105 nats
    and is what the evidence of the network finds in the end. Priors under which there is no noise at all are believed
    only where all of them say so.

    :param y: measurements, ``A.data_shape``.
    :param A: the forward operator.
    :param weights: known relative standard deviations d of the measurements, in y's shape.
    :param length_scales: ℓ that are tried, in pixels.
    :param smoothness: ν of the Matérn covariances that are tried, of 0.5, 1.5 and 2.5; or one of them.
    :param max_measurements: n, of which there may be more: whole slices along the first dimension are then taken at
        equal distances.
    :return: :class:`NoiseEstimate`.
    :raises ValueError: measurements that are all zero, or not of the operator's shape; an unknown smoothness; nothing
        to try.

    Cost: n applications of Aᵀ, and n products with K and O(n³ + n²·d) flops for each length scale and smoothness;
    memory 2·n·d.

    >>> from ntkgp.inverse.geometry import ParallelBeam
    >>> from ntkgp.inverse.operators import RayTransform
    >>> A = RayTransform(ParallelBeam((16, 16), torch.arange(12) * torch.pi / 12))
    >>> y = A(torch.ones(16, 16, dtype=torch.float64).tril())
    >>> found = estimate_noise(y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), A)
    >>> 0.4 < found.sd < 0.6
    True
    """
    y = checked_measurements(y, A).to(torch.float64)
    rows = _rows(tuple(y.shape), max_measurements).to(y.device)
    d = torch.ones_like(y) if weights is None else weights.to(y)
    target, scale = (y / d).flatten()[rows], d.flatten()[rows]
    if not bool(target.any()):
        raise ValueError("y: all measurements are zero; there is nothing to estimate a noise level from")
    tried = [
        MaternField(A.image_shape, length_scale, nu)
        for nu in ((smoothness,) if isinstance(smoothness, (int, float)) else smoothness)
        for length_scale in length_scales
    ]
    if not tried:
        raise ValueError("length_scales, smoothness: expected at least one of each")
    images = adjoint_rows(A, rows, progress) / scale.reshape(-1, *[1] * len(A.image_shape))
    profiles = [
        _profile(images.flatten(1) @ field(images).flatten(1).T, target, field)
        for field in tqdm(tried, "noise", disable=not progress)
    ]
    # A prior as rough as noise may take all noise for image: such ones count where the others see none either.
    return max(profiles, key=lambda profile: (not profile[1], profile[0].log_evidence))[0]


def pinv_floor(matrix: Tensor, noise: float, *, num_singular: int | None = 100, cutoff: float | None = None) -> float:
    r"""
    bayes_dip's floor, :math:`\sigma^2 \cdot \frac1{d}\operatorname{tr}\,(A^\top A)^+`; for comparison with it only.

    It is so large that methods become nearly indistinguishable: on sparse views of glyphs it put all of them below
    the homoscedastic oracle.

    :param matrix: A, (d_y, d).
    :param noise: σ.
    :param num_singular: how many of the largest singular values are inverted, or
    :param cutoff: those above this share of the largest.
    :raises ValueError: both or neither given.
    """
    if (num_singular is None) == (cutoff is None):
        raise ValueError("num_singular, cutoff: expected one of the two")
    values = torch.linalg.svdvals(matrix.to(torch.float64))
    kept = values[:num_singular] if cutoff is None else values[values > cutoff * values[0]]
    return noise**2 * float((1 / kept[kept > 0].square()).sum()) / matrix.shape[1]


def _profile(gram: Tensor, target: Tensor, field: MaternField) -> tuple[NoiseEstimate, bool]:
    """The most likely a and σ of targets with covariance a·gram + σ² of a field, and whether σ is as good as zero."""
    values, vectors = torch.linalg.eigh(0.5 * (gram + gram.T))
    values = torch.where(values > _CUT * values[-1], values, 0.0)
    squares, level, n = (vectors.T @ target).square(), float(values.mean()), len(target)
    if not level > 0:
        raise ValueError("A: its adjoint is zero on the measurements; they say nothing about the image")

    def loss(log_ratio: float) -> float:
        total = values + level * math.exp(log_ratio)
        return float(0.5 * (n * (squares / total).mean().log() + total.log().sum()))

    best = minimum(loss, _LOWEST, _HIGHEST)
    ratio = level * math.exp(best)
    amplitude = float((squares / (values + ratio)).mean())
    evidence = -loss(math.log(ratio / level)) - 0.5 * n * (1 + math.log(2 * math.pi))
    sd, image_sd = math.sqrt(amplitude * ratio), math.sqrt(amplitude)
    return NoiseEstimate(sd, image_sd, field.length_scale, evidence, field.smoothness), best < _LOWEST + 1.0


def _rows(shape: tuple[int, ...], most: int) -> Tensor:
    """Flat indices of at most so many measurements: whole slices along the first dimension at equal distances."""
    index = torch.arange(math.prod(shape)).reshape(*shape)
    if index.numel() <= most:
        return index.flatten()
    per_slice = index[0].numel()
    count = min(max(1, most // per_slice), len(index))
    chosen = torch.linspace(0, len(index) - 1, count + 2)[1:-1].round().long() if count < len(index) else slice(None)
    return index[chosen].flatten()[:most]


def adjoint_rows(A: ForwardOperator, rows: Tensor, progress: bool = False) -> Tensor:
    """Rows of the operator's matrix as images, (n, *image_shape) float64."""
    total, parts = math.prod(A.data_shape), []
    for part in tqdm(rows.split(128), "rows of A", disable=not progress):
        units = torch.zeros(len(part), total, dtype=torch.float64, device=rows.device)
        units[torch.arange(len(part)), part] = 1.0
        parts.append(A.adjoint(units.reshape(-1, *A.data_shape)).detach())
    return torch.cat(parts)


def checked_measurements(y: Tensor, A: ForwardOperator, name: str = "y") -> Tensor:
    """Measurements of one image, refused unless they are finite, and are the operator's."""
    if not isinstance(A, ForwardOperator):
        raise TypeError(f"A: expected a ntkgp.inverse.ForwardOperator, got {type(A).__name__}")
    return A.check_data(y, name).detach()
