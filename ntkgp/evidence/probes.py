"""Expectation steps of the sampled evidence: posterior draws and the mode at given hyper-parameters, by solvers.

With prior draws w ~ N(0, Λ⁻¹) and whitened noise ε ~ N(0, I) let d = Λ⁻¹JᵀW A⁻¹(WᵀJw + ε), A = I + WᵀKW. Then w − d
is a draw from the posterior, centred at zero (Matheron's rule, law B20), and λ_g‖d_g‖² is an unbiased, positive
estimate of the effective dimension γ_g = tr(A⁻¹WᵀK_gW)/λ_g of variance 2 tr((A⁻¹WᵀK_gW)²)/λ_g² ≤ 2γ_g. In weight space
the same d solves (H + Λ) d = JᵀW(WᵀJw − ε) (sample-then-optimise with the part that the data do not reach left out, law
B19). The standard normal numbers behind w and ε are drawn once: every quantity is a smooth function of the
hyper-parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ntkgp.evidence.bounds import EvidenceSystem
from ntkgp.evidence.newton_cg import iterative_mode
from ntkgp.evidence.problem import NoiseModel
from ntkgp.likelihoods import curvature_factor, whitened_targets
from ntkgp.linearization import LinearizedNetwork
from ntkgp.solvers import WhitenedSystem, solve
from ntkgp.solvers.sharded import tangent_gram
from ntkgp.solvers.whitened import default_rows


@dataclass(frozen=True)
class Expectation:
    r"""What one expectation step finds; K = G + S components, the groups and the learned noise variances.

    :param traces: estimates of tr(A⁻¹A_i) from each draw, A_i = dA/dlog(variance i), shape (K, S).
    :param quadratics: αᵀA_iα at the mode, shape (K,).
    :param draws: posterior draws of the weights centred at zero, shape (S, P).
    :param theta_star: shape (P,).
    :param iterations: of conjugate gradients.
    :param converged: whether every solve reached its tolerance.
    """

    traces: Tensor
    quadratics: Tensor
    draws: Tensor
    theta_star: Tensor
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Settings:
    """Of the solvers and probes; see :func:`~ntkgp.evidence.sampled.sampled_evidence`."""

    num_samples: int
    num_landmarks: int | None
    tolerance: float
    max_iterations: int
    max_memory: int
    seed: int
    curvature: str


class DualProbes:
    """In data space, N·C rows: products with K by kept Grams or by passes, which the ranks of a process group share.

    :param x: packed inputs, shape (N, D).
    :param targets: y − m0, shape (n,), or labels (N,).
    :param noise: of the rows of a regression; None for a classification.
    """

    def __init__(
        self, lin: LinearizedNetwork, x: Tensor, targets: Tensor, noise: NoiseModel | None, settings: Settings
    ) -> None:
        self.lin, self.x, self.noise, self.settings = lin, x, noise, settings
        n, c = len(x) * lin.num_outputs, lin.num_outputs
        columns = default_rows(n) if settings.num_landmarks is None else c * settings.num_landmarks
        self.gram = tangent_gram(lin, x, settings.max_memory, columns, settings.num_samples + 1)
        logits = lin(x).to(torch.float64)
        self.offset = logits - lin.jvp(x, lin.theta).to(torch.float64)
        self.logits, self.observed = logits, targets
        self.targets: Tensor | None = targets.reshape(-1) - self.offset.reshape(-1) if noise is not None else None
        self.factor = None if noise is not None else curvature_factor(logits)
        if noise is None and settings.curvature == "quadratic":
            self.targets = whitened_targets(logits, targets, self.offset).targets.reshape(-1)
        generator = torch.Generator().manual_seed(settings.seed)
        rows = logits.numel() if self.factor is None else self.factor.shape[0] * self.factor.shape[2]
        shape = (settings.num_samples, lin.num_parameters)
        self.prior = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)
        self.epsilon = torch.randn(rows, settings.num_samples, generator=generator, dtype=torch.float64).to(x.device)
        self.last: tuple[Tensor, Tensor] | None = None
        self.points: Tensor | None = None

    def warm_start(self) -> dict[str, Any]:
        """What the next step starts from."""
        return {"last": self.last}

    def set_warm_start(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`warm_start`."""
        self.last = state["last"]

    def traces(self) -> Tensor:
        """Tr K_g, shape (G,)."""
        return self.gram.traces()

    def squared_errors(self) -> Tensor | None:
        """Mean squared residual of the network per noise component (or of all rows); None for labels."""
        if self.noise is None:
            return None
        return mean_per_component(self.noise, (self.observed.reshape(-1) - self.logits.reshape(-1)).square())

    def target_squares(self) -> Tensor:
        """Mean square of the evidence's targets per noise component (or of all rows)."""
        assert self.noise is not None
        assert self.targets is not None
        return mean_per_component(self.noise, self.targets.square())

    def system(self, precision: Tensor, noise: Tensor) -> WhitenedSystem:
        """I + WᵀKW at the hyper-parameters."""
        variance = precision.reciprocal()
        factor = self.factor
        if factor is None:
            assert self.noise is not None
            factor = torch.diag_embed(self.noise.diagonal(noise).rsqrt().reshape(self.logits.shape))
        return self.gram.system(variance, factor)

    def evidence_system(self, precision: Tensor, noise: Tensor) -> EvidenceSystem:
        """What the bounds of the evidence need."""
        system = self.system(precision, noise)
        if self.noise is not None:
            assert self.targets is not None
            return EvidenceSystem.gaussian(system, self.targets, self.gram.precision)
        variant = self.settings.curvature
        return EvidenceSystem.softmax(system, self.logits, self.offset, self.observed, variant, self.gram.precision)

    def __call__(self, precision: Tensor, noise: Tensor) -> Expectation:
        """One expectation step."""
        system, s = self.system(precision, noise), self.settings.num_samples
        scale = self.lin.groups.expand(precision.rsqrt())
        weights = self.prior * scale
        if self.points is None:
            self.points = system.landmarks(self.settings.num_landmarks, self.settings.seed)
        preconditioner = system.preconditioner(self.points)
        image = self.gram.push(weights)
        rhs = [system.reduce(image) + self.epsilon]
        if self.targets is not None:
            whitened = self.targets.unsqueeze(-1)
            rhs.append(system.reduce(whitened) if self.noise is not None else whitened)
        b = torch.cat(rhs, -1)
        last = None if self.last is None else self.last[0]
        found = solve(
            system, b, preconditioner=preconditioner, tolerance=self.settings.tolerance,
            max_iterations=self.settings.max_iterations, x0=last,
        )  # fmt: skip
        dual = system.expand(found.solution)
        alpha = dual[:, -1]
        if self.targets is None:
            start = None if self.last is None else self.last[1]
            mode = iterative_mode(
                replace(system), self.offset, self.observed, tolerance=1e-6,
                nystrom_points=self.settings.num_landmarks, seed=self.settings.seed, start=start,
            )  # fmt: skip
            alpha = mode.alpha
            dual = torch.cat([dual, alpha.unsqueeze(-1)], -1)
        self.last = found.solution, alpha
        pulled = self.gram.pull(dual)  # shape: (S + 1, P)
        squares = self.lin.groups.sum_per_group(pulled.square()).mT / precision.unsqueeze(-1)  # shape: (G, S + 1)
        traces, quadratics = squares[:, :s], squares[:, s]
        if self.noise is not None and self.noise.num_learned:
            solved, kernel = found.solution, b - found.solution - found.residual
            share = noise[self.noise.component] / self.noise.diagonal(noise)
            # Two unbiased estimates of diag A⁻¹: the first is accurate where little is explained, the second elsewhere.
            little, much = (
                torch.stack([self.noise.sum_per_component(share * column) for column in rows.mT], -1)
                for rows in (1.0 - solved[:, :s] * kernel[:, :s], solved[:, :s].square())
            )
            left = (much.mean(-1, keepdim=True) / self.noise.sum_per_component(share).unsqueeze(-1)).clamp(0.0, 1.0)
            per_draw = left * little + (1.0 - left) * much
            alphas = self.noise.sum_per_component(share * solved[:, s].square())
            traces, quadratics = torch.cat([traces, per_draw]), torch.cat([quadratics, alphas])
        steps = pulled * scale.square()
        return Expectation(traces, quadratics, weights - steps[:s], steps[s], found.iterations, found.converged)


def mean_per_component(noise: NoiseModel, rows: Tensor) -> Tensor:
    """Means over the rows of each noise component, (S,); over all rows, (1,), where nothing is learned."""
    if not noise.num_learned:
        return rows.mean().reshape(1)
    return noise.sum_per_component(rows) / noise.sum_per_component(torch.ones_like(rows))
