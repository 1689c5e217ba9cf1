"""One picture of a reconstruction and its error map. Needs the extra ``ntkgp[plots]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkgp.evaluation import metrics
from ntkgp.evaluation.checks import same_shape
from ntkgp.evaluation.metrics.images import FLOORS, psnr
from ntkgp.evaluation.plots import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["image_report"]

_Z_LIMIT = 4.0


def image_report(
    mean: Tensor,
    variance: Tensor,
    truth: Tensor | None = None,
    *,
    floor: float = FLOORS[0],
    data_range: float | None = None,
    unit: str = "",
    title: str | None = None,
) -> Figure:
    r"""
    Draw truth, reconstruction, error, standard deviation, z-map and calibration curve.

    The error and the standard deviation share one scale, so that one can be laid over the other by eye. The z-map is
    :math:`(x - \mu) / \sqrt{v + \tau}` between ±4, the curve the coverage of central intervals under the same
    variances. Without a truth: reconstruction and standard deviation.

    :param mean: reconstruction, (H, W), or (1, H, W).
    :param variance: of every pixel, same shape, non-negative.
    :param truth: the true image, same shape.
    :param floor: τ ≥ 0, stated in the titles of the panels that it enters.
    :param data_range: of the PSNR; ``None`` for max − min of the truth.
    :param unit: of the image, at its colour bar.
    :param title: of the figure.
    :return: the figure; ``figure.savefig(path)`` writes it.
    :raises ValueError: another number of dimensions, shapes that differ, negative variances, values not finite.
    :raises ImportError: matplotlib is not installed.

    Example:
        >>> figure = image_report(torch.rand(8, 8), torch.rand(8, 8), torch.rand(8, 8))
        >>> [ax.get_title().split(",")[0] for ax in figure.axes if ax.get_title()][:3]
        ['truth', 'reconstruction', 'error']
    """
    given = {"mean": mean, "variance": variance} | ({} if truth is None else {"truth": truth})
    images = dict(zip(given, same_shape(**given), strict=True))
    shape = images["mean"].shape
    if len(shape) == 3 and shape[0] == 1:
        images = {name: image[0] for name, image in images.items()}
    elif len(shape) != 2:
        raise ValueError(f"mean: expected an image (H, W) or (1, H, W), got shape {tuple(shape)}")
    if bool((images["variance"] < 0).any()):
        raise ValueError(f"variance: expected numbers >= 0, got {float(images['variance'].min()):.3g}")
    if not floor >= 0:
        raise ValueError(f"floor: expected a number >= 0, got {floor!r}")
    reconstruction, sd = images["mean"], images["variance"].sqrt()
    if truth is None:
        figure, axes = new_figure(1, 2, size=(7.4, 3.4))
        _show(axes[0], reconstruction, "reconstruction", "gray", None, unit)
        _show(axes[1], sd, "standard deviation", "magma", (0.0, float(sd.max())), unit)
    else:
        figure, axes = new_figure(2, 3, size=(10.6, 6.6))
        _compared(axes, images["truth"], reconstruction, sd, floor, data_range, unit)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def _compared(
    axes: list[Axes], truth: Tensor, mean: Tensor, sd: Tensor, floor: float, data_range: float | None, unit: str
) -> None:
    """The six panels."""
    limits = (float(truth.min()), float(truth.max()))
    error = (mean - truth).abs()
    top = max(float(error.max()), float(sd.max()))
    total = sd.square() + floor
    quality = f", PSNR {psnr(mean, truth, data_range):.2f} dB" if data_range or limits[1] > limits[0] else ""
    _show(axes[0], truth, "truth", "gray", limits, unit)
    _show(axes[1], mean, f"reconstruction{quality}", "gray", limits, unit)
    _show(axes[2], error, f"error, root mean square {float(error.square().mean().sqrt()):.3g}", "magma", (0, top), unit)
    _show(axes[3], sd, f"standard deviation, {float(sd.square().mean().sqrt()):.3g}", "magma", (0, top), unit)
    z = (truth - mean) / total.clamp_min(1e-300).sqrt()
    label = f"z, root mean square {float(z.square().mean().sqrt()):.3g} at floor {floor:.2g}"
    _show(axes[4], z, label, "RdBu_r", (-_Z_LIMIT, _Z_LIMIT), "")
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    curve = metrics.coverage_curve(mean, total.clamp_min(1e-300), truth, levels)
    axes[5].plot([0, 1], [0, 1], color=COLORS[5], lw=1.0, ls=(0, (4, 3)))
    axes[5].plot(levels.numpy(), curve.numpy(), color=COLORS[0], lw=1.6)
    axes[5].set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="observed coverage")
    axes[5].set_title(f"calibration, 95 % covers {100 * float(curve[95]):.1f} %", fontsize=9)


def _show(ax: Axes, image: Tensor, title: str, cmap: str, limits: tuple[float, float] | None, unit: str) -> Any:
    """One image with its colour bar."""
    low, high = limits if limits is not None else (None, None)
    shown = ax.imshow(image.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.02, label=unit)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return shown
