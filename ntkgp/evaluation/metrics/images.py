"""Scores of a reconstructed image and of its error map, per pixel, at stated variance floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import scipy
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgp.evaluation.checks import as_float64, same_shape
from ntkgp.evaluation.metrics.inputs import positive_int
from ntkgp.evaluation.metrics.regression import coverage

QUANTISATION = 1 / (255**2 * 12)
"""Variance of the rounding of an image in [0, 1] to 8 bits, 1.28e-6."""

FLOORS = (1e-4, QUANTISATION)
"""Variances added to every pixel before a log-likelihood is taken, for images of data range one."""

_LOG_2_PI = math.log(2 * math.pi)
_LARGEST_DENSE = 20_000  # pixels


def psnr(reconstruction: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """
    Peak signal-to-noise ratio, ``10·log10(R² / MSE)`` in dB; infinite for an exact image.

    :param reconstruction: image.
    :param truth: the true image, same shape.
    :param data_range: R; ``None`` for max − min of the truth, as bayes_dip has it.
    :raises ValueError: shapes that differ, values that are not finite, a range that is not positive.

    Example:
        >>> round(psnr(torch.tensor([0.0, 0.9]), torch.tensor([0.0, 1.0]), data_range=1.0), 3)
        23.01
    """
    reconstruction, truth = same_shape(reconstruction=reconstruction, truth=truth)
    span, mse = _range(truth, data_range), float((reconstruction - truth).square().mean())
    return 10 * math.log10(span**2 / mse) if mse > 0 else math.inf


def ssim(
    reconstruction: Tensor, truth: Tensor, data_range: float | None = None, *, window: int = 11, sigma: float = 1.5
) -> float:
    r"""
    Structural similarity, the mean over all windows inside the image of

    .. math:: \frac{(2\mu_x\mu_y + c_1)(2\sigma_{xy} + c_2)}{(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)},
        \quad c_1 = (0.01 R)^2,\ c_2 = (0.03 R)^2,

    with moments under a Gaussian window.

    :param reconstruction: image (*channels, H, W).
    :param truth: the true image, same shape.
    :param data_range: R; ``None`` for max − min of the truth.
    :param window: odd side of the window; smaller images take the largest odd side that fits.
    :param sigma: of the window, in pixels.
    :raises ValueError: shapes that differ or have no two dimensions, values that are not finite, an even window.

    Cost: O(number of pixels · window).

    Source: Wang, Bovik, Sheikh & Simoncelli, IEEE TIP 2004, with its window of 11 pixels and 1.5.

    Example:
        >>> ssim(torch.eye(16), torch.eye(16))
        1.0
    """
    reconstruction, truth = same_shape(reconstruction=reconstruction, truth=truth)
    if truth.dim() < 2:
        raise ValueError(f"truth: expected an image (*channels, H, W), got shape {tuple(truth.shape)}")
    if positive_int("window", window) % 2 == 0:
        raise ValueError(f"window: expected an odd number, got {window}")
    window = min(window, *((n - 1) // 2 * 2 + 1 for n in truth.shape[-2:]))
    position = torch.arange(window, dtype=torch.float64) - window // 2
    weights = (-0.5 * (position / sigma).square()).exp()
    weights = weights / weights.sum()

    def smooth(image: Tensor) -> Tensor:
        rows = image.reshape(-1, 1, *image.shape[-2:])
        return F.conv2d(F.conv2d(rows, weights.reshape(1, 1, -1, 1)), weights.reshape(1, 1, 1, -1))

    c1, c2 = ((k * _range(truth, data_range)) ** 2 for k in (0.01, 0.03))
    mx, my = smooth(reconstruction), smooth(truth)
    xx, yy = smooth(reconstruction.square()) - mx.square(), smooth(truth.square()) - my.square()
    xy = smooth(reconstruction * truth) - mx * my
    top = (2 * mx * my + c1) * (2 * xy + c2)
    return float((top / ((mx.square() + my.square() + c1) * (xx + yy + c2))).mean())


def oracle_log_likelihood(reconstruction: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """
    Log-likelihood per pixel of the best constant variance, ``−½·log(2πe·MSE)``: no homoscedastic error bar beats it.

    :param floor: where the mean squared error is smaller than this, of the variance ``floor`` instead.

    Example:
        >>> round(oracle_log_likelihood(torch.zeros(4), torch.full((4,), 0.1)), 4)
        0.8836
    """
    reconstruction, truth = same_shape(reconstruction=reconstruction, truth=truth)
    mse = float((reconstruction - truth).square().mean())
    variance = max(mse, floor)
    return -0.5 * (math.log(2 * math.pi * variance) + mse / variance) if variance > 0 else math.inf


class ImageLikelihood(NamedTuple):
    """Log-likelihoods per pixel of one image at one floor; ``nan`` where the covariances they need were not given.

    :ivar floor: variance that was added to every pixel.
    :ivar full: under the joint Gaussian of all pixels.
    :ivar patch: under independent joint Gaussians of patches.
    :ivar diagonal: under independent pixels.
    :ivar foreground: under the joint Gaussian of the foreground's pixels, per pixel of the foreground.
    :ivar foreground_diagonal: under independent pixels of the foreground.
    """

    floor: float
    full: float
    patch: float
    diagonal: float
    foreground: float
    foreground_diagonal: float


class ImageCalibration(NamedTuple):
    """Whether errors are as large as the error bars say, at one floor.

    :ivar floor: variance that was added to every pixel.
    :ivar z_sd: root mean square of (truth − mean) / sd; one is ideal, larger is over-confident.
    :ivar whitened_sd: the same of errors whitened by the joint covariance; ``nan`` without one.
    :ivar coverage_68: share of pixels inside the central 68.27 % interval.
    :ivar coverage_95: of the 95 % interval.
    """

    floor: float
    z_sd: float
    whitened_sd: float
    coverage_68: float
    coverage_95: float


@dataclass(frozen=True)
class ImageScores:
    r"""
    All scores of one reconstruction; prints as a table.

    :param psnr: in dB, at ``data_range``.
    :param ssim: at ``data_range``; ``nan`` for an image of one dimension.
    :param data_range: of the two.
    :param rmse: root mean squared error.
    :param oracle: log-likelihood per pixel of the best constant variance.
    :param rank_correlation: Spearman's of \|error\| and sd over all pixels; ``nan`` where one of them is constant.
    :param likelihoods: :class:`ImageLikelihood` at each floor.
    :param calibrations: :class:`ImageCalibration` at each floor.
    :param patch_size: side of the patches.
    :param num_foreground: pixels in the foreground.
    """

    psnr: float
    ssim: float
    data_range: float
    rmse: float
    oracle: float
    rank_correlation: float
    likelihoods: tuple[ImageLikelihood, ...] = field(default=())
    calibrations: tuple[ImageCalibration, ...] = field(default=())
    patch_size: int = 0
    num_foreground: int = 0

    def as_dict(self) -> dict[str, float]:
        """Flat names and numbers for a table; those of a floor end in ``@`` and the floor."""
        found = {
            "psnr": self.psnr, "ssim": self.ssim, "rmse": self.rmse, "ll_oracle": self.oracle,
            "rank_correlation": self.rank_correlation,
        }  # fmt: skip
        for likelihood, calibration in zip(self.likelihoods, self.calibrations, strict=True):
            for prefix, entry in (("ll_", likelihood._asdict()), ("", calibration._asdict())):
                floor = entry.pop("floor")
                found |= {f"{prefix}{name}@{floor:.2g}": value for name, value in entry.items()}
        return found

    def __str__(self) -> str:
        lines = [
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f} (data range {self.data_range:.4g}), RMSE {self.rmse:.4g}",
            f"Spearman(|error|, sd) {self.rank_correlation:.3f}, oracle homoscedastic LL {self.oracle:.3f}",
            f"{'floor':>9}  {'full':>8}  {'patch':>8}  {'diagonal':>8}  {'foregr.':>8}  {'z sd':>7}  68 %   95 %",
        ]
        for ll, c in zip(self.likelihoods, self.calibrations, strict=True):
            lines.append(
                f"{ll.floor:9.2e}  {ll.full:8.3f}  {ll.patch:8.3f}  {ll.diagonal:8.3f}  {ll.foreground:8.3f}  "
                f"{c.z_sd:7.3f}  {c.coverage_68:.3f}  {c.coverage_95:.3f}"
            )
        return "\n".join(lines)


def score_image(
    truth: Tensor,
    mean: Any,
    covariance: Tensor | None = None,
    *,
    variance: Tensor | None = None,
    samples: Tensor | None = None,
    floors: Sequence[float] = FLOORS,
    data_range: float | None = None,
    patch_size: int = 4,
    foreground: Tensor | None = None,
) -> ImageScores:
    r"""
    Score an image posterior against the truth, at every floor τ by :math:`\log N(x; \mu, C + \tau I)` per pixel.

    Flat parts of an image have no error and, often, no variance, so the floor decides the log-likelihood: it is stated
    with every one. Compare with ``oracle``, which any useful error map beats.

    :param truth: the true image x, (\*channels, H, W) or (n,).
    :param mean: μ in the same shape, or a ``gpytorch`` distribution over the flattened pixels.
    :param covariance: C of the flattened pixels, (d, d).
    :param variance: or its diagonal only, in the shape of the image.
    :param samples: or S images (S, \*shape), whose covariance about their own mean is C.
    :param floors: τ ≥ 0, in the units of the image squared.
    :param data_range: of PSNR and SSIM; ``None`` for max − min of the truth.
    :param patch_size: side of the square patches, which are cut from the top left; smaller at the borders.
    :param foreground: boolean mask in the shape of the image; ``None`` for where the truth exceeds a tenth of its
        range.
    :return: :class:`ImageScores`.
    :raises ValueError: none or several of covariance, variance and samples, other shapes, values that are not finite,
        a negative variance, or a covariance that is not positive definite at a floor.

    Cost: O(d³) once for each floor with a covariance, O(S³ + S²·d) with samples; memory d² and S·d.

    Example:
        >>> truth = torch.eye(8, dtype=torch.float64)
        >>> scores = score_image(truth, truth + 0.1, variance=torch.full((8, 8), 0.01), floors=(0.0,))
        >>> round(scores.likelihoods[0].diagonal - scores.oracle, 6), round(scores.calibrations[0].z_sd, 6)
        (0.0, 1.0)
    """
    if hasattr(mean, "covariance_matrix") and covariance is None and variance is None and samples is None:
        mean, covariance = mean.mean.detach().reshape(truth.shape), mean.covariance_matrix.detach()
    mean, truth = same_shape(mean=mean, truth=truth)
    spread = _spread(truth, covariance, variance, samples)
    error = (truth - mean).flatten()
    mask = _foreground(truth, foreground)
    sd = spread.variance.sqrt()
    span = _range(truth, data_range)
    likelihoods, calibrations = [], []
    patches = _patches(tuple(truth.shape), positive_int("patch_size", patch_size))
    for floor in floors:
        if not (math.isfinite(floor) and floor >= 0):
            raise ValueError(f"floors: expected numbers >= 0, got {floor!r}")
        total = spread.variance + floor
        if not bool((total > 0).all()):
            raise ValueError(f"floors: pixels without any variance need a floor above zero, got {floor!r}")
        single = -0.5 * (_LOG_2_PI + total.log() + error.square() / total)
        full, square = spread.log_density(error, floor)
        inside = spread.part(mask).log_density(error[mask], floor)[0]
        parts = [spread.part(index).log_density(error[index], floor)[0] for index in patches] if spread.joint else []
        likelihoods.append(
            ImageLikelihood(
                floor, full / len(error), sum(parts) / len(error) if parts else math.nan, float(single.mean()),
                inside / len(mask), float(single[mask].mean()),
            )
        )  # fmt: skip
        zero = torch.zeros_like(error)
        covered = [float(coverage(zero, total, error, level).fraction) for level in (math.erf(1 / math.sqrt(2)), 0.95)]
        z = float((error.square() / total).mean().sqrt())
        calibrations.append(ImageCalibration(floor, z, math.sqrt(square / len(error)), *covered))
    varies = bool((sd != sd[0]).any()) and bool((error.abs() != error.abs()[0]).any())
    return ImageScores(
        psnr(mean, truth, span), ssim(mean, truth, span) if truth.dim() > 1 else math.nan, span,
        float(error.square().mean().sqrt()), oracle_log_likelihood(mean, truth),
        float(scipy.stats.spearmanr(error.abs().numpy(), sd.numpy()).statistic) if varies else math.nan,
        tuple(likelihoods), tuple(calibrations), patch_size, len(mask),
    )  # fmt: skip


class _Spread:
    """Variances of the pixels, with their joint covariance where there is one: dense, or of samples."""

    def __init__(self, variance: Tensor, covariance: Tensor | None = None, root: Tensor | None = None) -> None:
        self.variance, self._covariance, self._root = variance, covariance, root

    @property
    def joint(self) -> bool:
        """Whether there is one."""
        return self._covariance is not None or self._root is not None

    def part(self, index: Tensor) -> _Spread:
        """Of some pixels."""
        covariance = None if self._covariance is None else self._covariance[index][:, index]
        return _Spread(self.variance[index], covariance, None if self._root is None else self._root[:, index])

    def log_density(self, error: Tensor, floor: float) -> tuple[float, float]:
        """Joint log density of an error and its squared Mahalanobis length; ``nan`` without a joint covariance."""
        n = len(error)
        if self._root is not None and len(self._root) < n and floor > 0:
            # C + τI = RᵀR + τI by the matrix inversion lemma.
            inner = self._root @ self._root.T / floor + torch.eye(len(self._root), dtype=torch.float64)
            factor = torch.linalg.cholesky(inner)
            moved = torch.linalg.solve_triangular(factor, (self._root @ error / floor).unsqueeze(-1), upper=False)
            square = float(error.square().sum() / floor - moved.square().sum())
            logdet = 2 * float(factor.diagonal().log().sum()) + n * math.log(floor)
            return -0.5 * (n * _LOG_2_PI + logdet + square), square
        covariance = self._covariance if self._root is None else self._root.T @ self._root
        if covariance is None:
            return math.nan, math.nan
        factor, info = torch.linalg.cholesky_ex(covariance + floor * torch.eye(n, dtype=torch.float64))
        if int(info):
            raise ValueError(f"covariance: not positive definite at the floor {floor:.3g}; expected a larger floor")
        square = float(torch.linalg.solve_triangular(factor, error.unsqueeze(-1), upper=False).square().sum())
        return -0.5 * (n * _LOG_2_PI + 2 * float(factor.diagonal().log().sum()) + square), square


def _spread(truth: Tensor, covariance: Tensor | None, variance: Tensor | None, samples: Tensor | None) -> _Spread:
    """What is known of the covariance, checked."""
    given = {"covariance": covariance, "variance": variance, "samples": samples}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"covariance, variance, samples: expected one of the three, got {named or 'none'}")
    d = truth.numel()
    if variance is not None:
        _, found = same_shape(truth=truth, variance=variance)
        if bool((found < 0).any()):
            raise ValueError(f"variance: expected numbers >= 0, got a minimum of {float(found.min()):.3g}")
        return _Spread(found.flatten())
    if covariance is not None:
        found = as_float64("covariance", covariance)
        if found.shape != (d, d):
            raise ValueError(f"covariance: expected shape {(d, d)} for {d} pixels, got {tuple(found.shape)}")
        if d > _LARGEST_DENSE:
            raise ValueError(f"covariance: {d} pixels are too many for a dense factor; give variance or samples")
        return _Spread(found.diagonal().clamp_min(0), 0.5 * (found + found.T))
    assert samples is not None
    found = as_float64("samples", samples)
    if found.shape[1:] != truth.shape or len(found) < 2:
        raise ValueError(f"samples: expected shape (S >= 2, *{tuple(truth.shape)}), got {tuple(found.shape)}")
    root = (found - found.mean(0)).reshape(len(found), d) / math.sqrt(len(found) - 1)
    return _Spread(root.square().sum(0), root=root)


def _foreground(truth: Tensor, mask: Tensor | None) -> Tensor:
    """Flat indices of the foreground."""
    if mask is None:
        low, high = truth.min(), truth.max()
        mask = truth > low + 0.1 * (high - low)
    if mask.shape != truth.shape or mask.dtype != torch.bool or not bool(mask.any()):
        raise ValueError(
            f"foreground: expected a boolean mask of shape {tuple(truth.shape)} that is not empty, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    return mask.flatten().nonzero().flatten()


def _patches(shape: tuple[int, ...], size: int) -> list[Tensor]:
    """Flat indices of the pixels of each patch."""
    index = torch.arange(math.prod(shape)).reshape(-1, *(shape[-2:] if len(shape) > 1 else (1, *shape)))
    rows = index.shape[1] if len(shape) > 1 else 1
    cuts = [index[:, r : r + size] for r in range(0, rows, size)]
    return [cut[:, :, c : c + size].flatten() for cut in cuts for c in range(0, index.shape[2], size)]


def _range(truth: Tensor, data_range: float | None) -> float:
    """The data range, by default that of the truth."""
    span = float(truth.max() - truth.min()) if data_range is None else float(data_range)
    if not (math.isfinite(span) and span > 0):
        raise ValueError(f"data_range: expected a positive number, got {span}; a constant image needs a stated range")
    return span
