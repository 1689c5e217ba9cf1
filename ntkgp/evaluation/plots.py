"""Pictures for results: predictive bands, reliability diagram, coverage curve, evidence trace.

Each function draws into ``ax`` and returns it; without ``ax`` it makes a figure of its own (``ax.figure``). Figures are
made without pyplot, so nothing is registered globally and no display is needed. Needs the extra ``ntkgp[plots]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkgp.evaluation import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "coverage_curve", "evidence_trace", "new_figure", "predictive_bands", "reliability_diagram"]

COLORS = ("#3B6FB6", "#C8553D", "#5B8E5A", "#8A6BB1", "#B08A2E", "#5A5A5A")
"""Line colours in the order of use, told apart in print and with colour-blind eyes."""

_INK = "#333333"
_GRID = "#E6E6E6"
_LEGEND = {"frameon": False, "fontsize": 8, "handlelength": 1.6}
_MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, list[Axes]]:
    """
    Make a figure with a grid of styled axes, without pyplot.

    :param rows: number of rows.
    :param columns: number of columns.
    :param size: width and height in inches; default 4.4 × 3.3 per panel.
    :return: the figure and its axes, row by row. ``figure.savefig(path)`` writes it.
    :raises ImportError: matplotlib is not installed.

    Example:
        >>> figure, axes = new_figure(1, 3)
        >>> len(axes)
        3
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ntkgp[plots]'") from error
    figure = Figure(figsize=size or (4.4 * columns, 3.3 * rows), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        _style(ax)
    return figure, axes


def predictive_bands(
    x: Tensor,
    mean: Tensor,
    latent_variance: Tensor,
    noise_variance: Tensor | float = 0.0,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    truth: Tensor | None = None,
    label: str = "network ± 2 sd",
    color: str = COLORS[0],
    ax: Axes | None = None,
) -> Axes:
    """
    Mean of a one-dimensional regression with bands of ± 2 standard deviations, without and with noise.

    :param x: where the curve is drawn, ``(N,)`` or ``(N, 1)``, increasing.
    :param mean: predictive mean, ``(N,)``.
    :param latent_variance: variance of the function, ``(N,)``.
    :param noise_variance: σ², a number or ``(N,)``; 0 draws one band only.
    :param data: training inputs and targets, drawn as points.
    :param truth: noise-free function at ``x``, drawn dashed.
    :param label: of the latent band in the legend.
    :param color: of line and bands; call again with another colour for a second model.
    :param ax: where to draw; default: a new figure.
    :return: the axes.
    :raises ValueError: a variance that is negative.

    >>> x = torch.linspace(-1, 1, 5)
    >>> predictive_bands(x, x.sin(), 0.1 * torch.ones(5), 0.01).get_legend_handles_labels()[1]
    ['with noise', 'network ± 2 sd']
    """
    ax = ax if ax is not None else new_figure()[1][0]
    position, middle = _numbers(x), _numbers(mean)
    variance = latent_variance.detach().double().flatten()
    total = variance + torch.as_tensor(noise_variance, dtype=torch.float64)
    if bool((variance < 0).any()):
        raise ValueError(f"latent_variance: expected non-negative numbers, got {float(variance.min()):.3g}")
    if bool((total > variance).any()):
        half = _numbers(2 * total.sqrt())
        ax.fill_between(position, middle - half, middle + half, color=color, alpha=0.12, lw=0, label="with noise")
    half = _numbers(2 * variance.sqrt())
    ax.fill_between(position, middle - half, middle + half, color=color, alpha=0.28, lw=0, label=label)
    ax.plot(position, middle, color=color, lw=1.8, solid_capstyle="round", zorder=3)
    if truth is not None:
        ax.plot(position, _numbers(truth), color=_INK, lw=1.0, ls=(0, (4, 3)), label="truth", zorder=2)
    if data is not None:
        ax.plot(_numbers(data[0]), _numbers(data[1]), ".", color=_INK, ms=4.5, mew=0, label="data", zorder=4)
    ax.set_xlim(position.min(), position.max())
    ax.set_xlabel("x")
    ax.set_ylabel("y")
    ax.legend(**_LEGEND)
    return ax


def reliability_diagram(
    predictions: Mapping[str, Tensor],
    labels: Tensor,
    *,
    bins: int = 15,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """
    Accuracy against confidence per bin of the largest probability; the area of a marker is the share of points.

    :param predictions: name of each model and its probabilities ``(N, C)``.
    :param labels: classes, ``(N,)``.
    :param bins: number of bins; the expected calibration error of each model in the legend uses the same.
    :param colors: line colour per model; default: :data:`COLORS` in turn.
    :param ax: where to draw; default: a new figure.
    :return: the axes.
    :raises ValueError: no model, rows that are no probabilities, labels out of range.

    >>> ax = reliability_diagram({"sure": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, torch.tensor([0, 0]))
    >>> ax.get_legend_handles_labels()[1]
    ['sure  (ECE 0.500)']
    """
    if not predictions:
        raise ValueError("predictions: expected at least one model")
    ax = ax if ax is not None else new_figure()[1][0]
    ax.plot([0, 1], [0, 1], color=_INK, lw=1.0, ls=(0, (4, 3)), zorder=1)
    lowest = 1.0
    for index, (name, probabilities) in enumerate(predictions.items()):
        count, confidence, correct = metrics.reliability_bins(probabilities, labels, bins)
        error = float(metrics.expected_calibration_error(probabilities, labels, bins))
        keep = count > 0
        lowest = min(lowest, float(confidence[keep].min()), float(correct[keep].min()))
        area = _numbers(12 + 160 * (count / count.sum())[keep])
        color, marker = _color(colors, name, index), _MARKERS[index % len(_MARKERS)]
        points = _numbers(confidence[keep]), _numbers(correct[keep])
        ax.plot(*points, color=color, lw=1.3, alpha=0.8, zorder=2)
        ax.scatter(*points, s=area, color=color, marker=marker, alpha=0.8, lw=0, zorder=3)
        ax.plot([], [], color=color, marker=marker, ms=5, lw=1.3, label=f"{name}  (ECE {error:.3f})")
    floor = max(0.0, lowest - 0.05)
    ax.set_xlim(floor, 1.02)
    ax.set_ylim(floor, 1.02)
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.legend(loc="lower right", **_LEGEND)
    return ax


def coverage_curve(
    predictions: Mapping[str, tuple[Tensor, Tensor]],
    target: Tensor,
    *,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """
    Observed against nominal coverage of the central intervals of Gaussian predictions.

    :param predictions: name of each model and its predictive mean and total variance, each of the shape of ``target``.
    :param target: observed values.
    :param colors: line colour per model; default: :data:`COLORS` in turn.
    :param ax: where to draw; default: a new figure.
    :return: the axes.
    :raises ValueError: no model, shapes that differ, a variance that is not positive.

    >>> exact = torch.zeros(3), torch.ones(3)
    >>> coverage_curve({"exact": exact}, torch.zeros(3)).get_ylabel()
    'observed coverage'
    """
    if not predictions:
        raise ValueError("predictions: expected at least one model")
    ax = ax if ax is not None else new_figure()[1][0]
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    ax.plot([0, 1], [0, 1], color=_INK, lw=1.0, ls=(0, (4, 3)), zorder=1)
    for index, (name, (mean, variance)) in enumerate(predictions.items()):
        observed = metrics.coverage_curve(mean, variance, target, levels)
        area = float(metrics.centered_quantile_metric(mean, variance, target))
        color = _color(colors, name, index)
        ax.plot(_numbers(levels), _numbers(observed), color=color, lw=1.6, label=f"{name}  (CQM {area:.3f})")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("observed coverage")
    ax.legend(loc="lower right", **_LEGEND)
    return ax


def evidence_trace(
    traces: Mapping[str, Sequence[float] | Tensor],
    *,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """
    Log evidence after each accepted step, one line per run, with its final value.

    :param traces: name of each run and its log evidence per step, in nats.
    :param colors: line colour per run; default: :data:`COLORS` in turn.
    :param ax: where to draw; default: a new figure.
    :return: the axes.
    :raises ValueError: no run, an empty trace.

    >>> evidence_trace({"groups": [-20.0, -8.0, -7.5]}).get_legend_handles_labels()[1]
    ['groups  (-7.5)']
    """
    if not traces:
        raise ValueError("traces: expected at least one run")
    ax = ax if ax is not None else new_figure()[1][0]
    lowest, highest = [], []
    for index, (name, trace) in enumerate(traces.items()):
        values = torch.as_tensor(trace, dtype=torch.float64).flatten()
        if len(values) == 0:
            raise ValueError(f"traces: {name!r} is empty")
        color, marker = _color(colors, name, index), _MARKERS[index % len(_MARKERS)]
        label = f"{name}  ({float(values[-1]):.1f})"
        ax.plot(range(len(values)), _numbers(values), color=color, lw=1.4, marker=marker, ms=3.5, mew=0, label=label)
        highest.append(float(values.max()))
        lowest.append(float(values[min(1, len(values) - 1) :].min()))
    # The first step often comes from very far below and would flatten everything after it.
    bottom, top = min(lowest), max(highest)
    margin = max(0.08 * (top - bottom), 1e-3 * max(1.0, abs(top)))
    ax.set_ylim(bottom - margin, top + margin)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("accepted step")
    ax.set_ylabel("log evidence (nats)")
    ax.legend(loc="lower right", **_LEGEND)
    return ax


def _color(colors: Mapping[str, str] | None, name: str, index: int) -> str:
    """Colour asked for, or the next one."""
    return (colors or {}).get(name, COLORS[index % len(COLORS)])


def _numbers(values: Tensor) -> Any:
    """A flat float64 array for matplotlib."""
    return values.detach().to("cpu", torch.float64).flatten().numpy()


def _style(ax: Axes) -> None:
    """Light grid, no box, small type."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#999999")
    ax.grid(color=_GRID, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, color="#999999", labelcolor=_INK)
    ax.xaxis.label.set(size=9, color=_INK)
    ax.yaxis.label.set(size=9, color=_INK)
    ax.title.set(size=10, color=_INK)
