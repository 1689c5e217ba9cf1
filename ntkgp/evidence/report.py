"""The report of an evidence fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class EvidenceReport:
    r"""What an evidence fit found, and how far it can be trusted.

    :param log_evidence: the evidence in nats at the reported precisions and noise, all constants included.
    :param trace: evidence at the start and after each accepted step (for curvature "full": after each re-evaluation of
        the curvature, where it need not increase).
    :param precision: precisions lambda_g, shape (G,).
    :param noise: learned noise variances, shape (S,), empty when none is learned.
    :param effective_dimension: gamma_g, shape (G,).
    :param theta_star_norm: norms of theta_star per group, shape (G,).
    :param theta_shift: distance between theta_star and the trained weights in the posterior metric
        :math:`\|\theta_\star - \tilde\theta\|_{H+\Lambda}`: half its square is what the classical evidence loses, in
        nats (for a quadratic loss). NaN where the trained weights are not part of the problem.
    :param residual_noise: mean squared error of the network itself on the training data per noise component, shape
        (S,) or (1,); None for classification. With `mean="network"` this, not `noise`, is the error of the reported
        mean.
    :param group_names: names of the groups.
    :param group_sizes: numbers of parameters, empty when unknown.
    :param pruned: names of the groups without effect (gamma_g below 1e-4).
    :param jitter: added to the diagonal of the kernel matrix, in its units.
    :param eigenvalues_cut: eigenvalues below 1e-10 of the largest, set to zero (one group only).
    :param iterations: accepted steps.
    :param evaluations: evaluations of the evidence.
    :param seconds: wall-clock time.
    :param converged: whether the projected gradient met the tolerance, or rounding of the evidence was reached.
    :param method: "mackay" or "lbfgs".
    :param at: "theta_star" or "theta_map".
    :param warnings: plain words on everything that deserves attention.
    :param evidence_bounds: lower and upper bound of the exact log evidence at the reported precisions and noise, where
        `log_evidence` is itself an approximation of it; None where it is exact.
    :param log_prior: log-density of the hyper-prior at the reported precisions; None where none was given.
    """

    log_evidence: float
    trace: list[float]
    precision: Tensor
    noise: Tensor
    effective_dimension: Tensor
    theta_star_norm: Tensor
    theta_shift: float
    residual_noise: Tensor | None
    group_names: tuple[str, ...]
    group_sizes: tuple[int, ...]
    pruned: tuple[str, ...]
    jitter: float
    eigenvalues_cut: int
    iterations: int
    evaluations: int
    seconds: float
    converged: bool
    method: str
    at: str
    warnings: tuple[str, ...]
    evidence_bounds: tuple[float, float] | None = None
    log_prior: float | None = None

    def __str__(self) -> str:
        """Return a table for people."""
        status = "converged" if self.converged else "NOT converged"
        lines = [
            f"Evidence at {self.at} by {self.method}: {self.log_evidence:.4f} nats "
            f"({status}, {self.iterations} steps, {self.evaluations} evaluations, {self.seconds:.2f} s)"
        ]
        if self.evidence_bounds is not None:
            low, high = self.evidence_bounds
            lines.append(f"exact log evidence between {low:.4f} and {high:.4f} nats")
        if self.log_prior is not None:
            lines.append(f"log density of the prior {self.log_prior:.4f}, which the fit adds to the evidence")
        if self.noise.numel():
            lines.append(f"noise variance           {_numbers(self.noise)}")
        if self.residual_noise is not None:
            lines.append(f"network's training MSE   {_numbers(self.residual_noise)}")
        if not math.isnan(self.theta_shift):
            pruned = ", pruned groups included" if self.pruned else ""
            lines.append(f"|theta_star - theta|     {self.theta_shift:.4g} in the posterior metric{pruned}")
        width = min(max(5, *(len(name) for name in self.group_names)), 60)
        lines.append(f"{'group':<{width}} {'parameters':>10} {'precision':>11} {'effective':>10} {'|theta_star|':>12}")
        sizes = [str(size) for size in self.group_sizes] or ["-"] * len(self.group_names)
        for g, name in enumerate(self.group_names):
            label = name if len(name) <= width else name[: width - 1] + "…"
            lines.append(
                f"{label:<{width}} {sizes[g]:>10} {float(self.precision[g]):>11.4g} "
                f"{float(self.effective_dimension[g]):>10.4g} {float(self.theta_star_norm[g]):>12.4g}"
                + ("  pruned" if name in self.pruned else "")
            )
        if self.jitter > 0:
            lines.append(f"jitter {self.jitter:.2e}")
        if self.eigenvalues_cut:
            lines.append(f"eigenvalues cut: {self.eigenvalues_cut}")
        lines.extend(f"warning: {text}" for text in self.warnings)
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the evidence over the accepted steps.

        :param ax: matplotlib axes (default: those of a new figure).
        :raises ImportError: when matplotlib is not installed.
        """
        ax = _axes(ax)
        ax.plot(range(len(self.trace)), self.trace, marker="o", markersize=3)
        ax.set_xlabel("accepted step")
        ax.set_ylabel("log evidence (nats)")
        ax.set_title(f"{self.method} at {self.at}: {self.log_evidence:.2f} nats")
        ax.grid(alpha=0.3)
        return ax

    def plot_groups(self, ax: Axes | None = None) -> Axes:
        """Draw effective dimension (bars, lower axis) and precision (dots, logarithmic upper axis) of each group.

        :param ax: matplotlib axes (default: those of a new figure).
        :raises ImportError: when matplotlib is not installed.
        """
        ax = _axes(ax)
        rows = list(range(len(self.group_names)))
        colors = ["tab:red" if name in self.pruned else "tab:blue" for name in self.group_names]
        ax.barh(rows, self.effective_dimension.tolist(), color="tab:orange", alpha=0.6)
        ax.set_xlim(left=0.0)
        ax.set_xlabel("effective dimension", color="tab:orange")
        labels = [name if len(name) <= 40 else name[:39] + "…" for name in self.group_names]
        ax.set_yticks(rows, labels)
        ax.invert_yaxis()
        upper: Any = ax.twiny()
        upper.scatter(self.precision.tolist(), rows, c=colors, zorder=3)
        upper.set_xscale("log")
        # A decade of room on each side, so that nearly equal precisions do not look different.
        low, high = float(self.precision.min()), float(self.precision.max())
        upper.set_xlim(low / 10.0, high * 10.0)
        upper.set_xlabel("precision" + (" (red: pruned)" if self.pruned else ""), color="tab:blue")
        return ax


def _numbers(values: Tensor) -> str:
    """Format a short vector, eliding its middle."""
    shown = [f"{value:.4g}" for value in values.tolist()]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])


def _axes(ax: Axes | None) -> Axes:
    """Return the given axes or those of a new figure that no global state holds."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ntkgp[plots]'") from error
    return Figure(figsize=(6.0, 4.0), layout="constrained").subplots()
