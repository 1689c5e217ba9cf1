"""The network alone, and the network with its prior's error bars: what any posterior has to beat."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ntkgp.baselines.protocol import Baseline, labelled, observed
from ntkgp.baselines.references import (
    OutputSamples,
    check_link,
    gaussian_logits,
    label_log_probabilities,
    likely_noise,
    minimum,
    probabilities_through,
)
from ntkgp.linearization.checks import real_numbers
from ntkgp.models.batches import Batches

logger = logging.getLogger("ntkgp")

_ROUNDS = 2000
_TOLERANCE = 1e-8


class Point(OutputSamples):
    r"""The network alone: :math:`N(f(x), \mathrm{diag}\,\sigma^2)` or :math:`\mathrm{softmax}(f(x)/T)`.

    Without ``validation`` the noise is the mean squared residual of the training data, per output, and T = 1: the
    over-confident reference. With it both are the maximum-likelihood values there: the calibrated reference, without
    which rankings of other methods say little. It has no latent distribution.

    :param validation: held-out data in the forms that ``fit`` takes.

    Cost: one forward pass of the data.

    Source: Guo et al., *On calibration of modern neural networks*, ICML 2017 (temperature); Ashukha et al., *Pitfalls
    of in-domain uncertainty estimation*, ICLR 2020.

    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> Point(nn.Linear(1, 1)).fit((x, x)).predict(x[:3]).mean.shape
    torch.Size([3])
    """

    def _prepare(self, batches: Batches) -> None:
        pass

    def _samples(self, x: Tensor) -> Tensor:
        return self.lin(x).to(torch.float64).unsqueeze(0)


class PriorOnly(Baseline):
    r"""Laplace with H = 0: mean :math:`f(x)` and covariance :math:`J(x) \Lambda^{-1} J(x)^\top` of the prior.

    The ablation that shows what the fitted curvature adds. Precisions and noise are those of the linearised model's
    evidence (MacKay's fixed point in function space; with labels, of its quadratic expansion at the weights), given
    ones, or the single precision that makes ``validation`` most likely under these very predictions.

    :param precision: prior precisions, one number or one per group; by default they are fitted.
    :param noise: noise variances, one number or one per output; regression only, by default fitted.
    :param validation: held-out data in the forms that ``fit`` takes.
    :param link: ``"probit"``, ``"mc"`` or ``"bridge"``, classification only.
    :raises ValueError: numbers that are not positive, or of another shape.

    Cost: by evidence G Grams and some hundred factorisations, O((N·C)³); otherwise, and to predict, the diagonal
    blocks of the prior covariance.

    Source: the ablation of *Unveiling Empirical Pathologies of Laplace Approximation*, arXiv 2312.10464; MacKay 1992.

    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> found = PriorOnly(nn.Linear(1, 1), precision=2.0).fit((x, x)).predict(torch.ones(1, 1))
    >>> found.latent.variance  # (x² + 1) / λ
    tensor([1.], dtype=torch.float64)
    """

    _state = ("precision", "noise")
    precision: Tensor  # (G,)
    noise: Tensor  # (C,); ones for labels

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        precision: float | Tensor | None = None,
        noise: float | Tensor | None = None,
        validation: Any = None,
        link: str = "probit",
        **common: Any,
    ) -> None:
        super().__init__(net, likelihood, **common)
        if noise is not None and self.is_classification:
            raise ValueError("noise: expected None with likelihood='classification'")
        check_link(link)
        self._given_precision, self._given_noise = precision, noise
        self.validation, self.link = validation, link

    def _fit(self, batches: Batches) -> None:
        groups, c = len(self.lin.groups), self.lin.num_outputs
        if self.is_classification:
            check_link(self.link, c)
        precision = given_numbers("precision", self._given_precision, groups)
        noise = torch.ones(c, dtype=torch.float64) if self.is_classification else None
        noise = given_numbers("noise", self._given_noise, c) if noise is None else noise
        if precision is None and self.validation is None:
            precision, found = self._by_evidence(batches, noise)
            noise = found if noise is None else noise
        elif precision is None or noise is None:
            held_out = batches
            if self.validation is not None:
                held_out = Batches.of(self.validation, self.lin, self._shape_of_targets(), name="validation")
            precision, noise = self._by_prediction(held_out, precision, noise)
        assert precision is not None
        assert noise is not None
        self.precision, self.noise = precision, noise

    def _by_evidence(self, batches: Batches, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = batches.collect()
        lin = self.lin
        grams = lin.grams(x, max_memory=self.max_memory, progress=self.progress)
        f, linear = lin(x).to(torch.float64), lin.jvp(x, lin.theta).to(torch.float64)
        if self.is_classification:
            root, residual = _curvature_root(f, y)
            n, c = f.shape
            blocks = grams.reshape(-1, n, c, n, c)
            grams = torch.einsum("nab,gnbmc,mcd->gnamd", root, blocks, root).reshape_as(grams)
            targets = torch.einsum("nab,nb->na", root, linear) + residual
        else:
            targets = y.reshape(f.shape) - f + linear
        start = (targets - linear).square().mean(0) if noise is None else noise
        return fixed_point(grams, targets, start, torch.tensor(lin.groups.sizes), learn_noise=noise is None)

    def _by_prediction(self, data: Batches, precision: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = data.collect()
        mean, blocks = self.lin(x).to(torch.float64), self._blocks(x)
        ones = torch.ones(len(blocks), dtype=torch.float64, device=x.device)

        def parts(log_precision: float) -> tuple[Tensor, Tensor]:
            # shape: (N, C, C), (C,)
            each = ones * math.exp(log_precision) if precision is None else precision.to(x.device)
            covariance = torch.einsum("g,gncd->ncd", 1 / each, blocks)
            variance = covariance.diagonal(dim1=-2, dim2=-1)
            found = likely_noise(y.reshape(mean.shape) - mean, variance) if noise is None else noise
            return covariance, found.to(x.device)

        def loss(log_precision: float) -> float:
            covariance, found = parts(log_precision)
            if self.is_classification:
                p = probabilities_through(self.link, mean, covariance, self.seed)
                logits = p.log() if p.ndim == 2 else p.logit().unsqueeze(-1)
                return -float(label_log_probabilities(logits, y).mean())
            return -float(observed(mean, covariance, found).log_prob(y).mean())

        if precision is None:
            best = minimum(loss, -12.0, 25.0)
            precision = torch.full((len(blocks),), math.exp(best), dtype=torch.float64)
            return precision, parts(best)[1].cpu()
        return precision, parts(0.0)[1].cpu()

    def _blocks(self, x: Tensor) -> Tensor:
        return self.lin.gram_diagonals(x, max_memory=self.max_memory)

    def _predict(self, x: Tensor) -> Distribution:
        mean = self.lin(x).to(torch.float64)
        covariance = torch.einsum("g,gncd->ncd", 1 / self.precision.to(x.device), self._blocks(x))
        if not self.is_classification:
            return observed(mean, covariance, self.noise.to(x.device))
        p = probabilities_through(self.link, mean, covariance, self.seed)
        return labelled(p, gaussian_logits(mean, covariance))


def given_numbers(name: str, value: float | Tensor | None, count: int) -> Tensor | None:
    """Positive numbers, one or ``count`` of them, as float64 (count,); None stays None.

    :raises ValueError: other shapes or numbers.
    """
    if value is None:
        return None
    numbers = real_numbers(value, name).cpu()
    if numbers.shape not in (torch.Size(()), torch.Size((1,)), torch.Size((count,))):
        raise ValueError(f"{name}: expected one number or {count}, got shape {tuple(numbers.shape)}")
    if not bool(((numbers > 0) & numbers.isfinite()).all()):
        raise ValueError(f"{name}: expected positive finite numbers, got {numbers.tolist()}")
    return numbers.expand(count).clone()


def _curvature_root(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric roots of the likelihood's curvatures (N, C, C), and their pseudo-inverses times onehot − p (N, C)."""
    if logits.shape[-1] == 1:
        p = logits.sigmoid()
        curvature, residual = (p * (1 - p)).unsqueeze(-1), labels.to(p).unsqueeze(-1) - p
    else:
        p = logits.softmax(-1)
        curvature = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        residual = nn.functional.one_hot(labels.long(), p.shape[-1]).to(p) - p
    values, vectors = torch.linalg.eigh(curvature)
    kept = values > 1e-12 * values.amax(-1, keepdim=True)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(kept, 1 / root.where(kept, 1.0), 0.0)
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, torch.einsum(
        "nab,nb->na", (vectors * inverse.unsqueeze(-2)) @ vectors.mT, residual
    )


def fixed_point(
    grams: Tensor, targets: Tensor, noise: Tensor, sizes: Tensor, learn_noise: bool = True
) -> tuple[Tensor, Tensor]:
    r"""MacKay's fixed point of the evidence :math:`\log N(t; 0, \sum_g K_g/\lambda_g + I_N \otimes D)`.

    With :math:`C` that covariance and :math:`\alpha = C^{-1} t`,
    :math:`\lambda_g \leftarrow \lambda_g\,\mathrm{tr}(C^{-1}K_g) / \alpha^\top K_g \alpha` and
    :math:`\sigma_c^2 \leftarrow \sigma_c^2 \sum_n \alpha_{nc}^2 / \sum_n (C^{-1})_{nc,nc}`.

    :param grams: (G, N·C, N·C).
    :param targets: (N, C).
    :param noise: where the noise variances start, (C,).
    :param sizes: parameters per group, (G,).
    :return: precisions (G,), noise variances (C,).
    """
    n, c = targets.shape
    t = targets.reshape(-1)
    scale = grams.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TOLERANCE)
    precision = scale * len(grams) / t.square().mean().clamp_min(_TOLERANCE)
    noise = noise.to(t.device).clamp_min(1e-6 * t.var(correction=0) + 1e-12)
    low, high = math.exp(-20), math.exp(20)
    for _ in range(_ROUNDS):
        total = torch.einsum("g,gab->ab", 1 / precision, grams) + noise.repeat(n).diag()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(total))
        alpha = inverse @ t
        gamma = torch.einsum("ab,gab->g", inverse, grams) / precision
        gamma = torch.minimum(gamma.clamp_min(1e-6), sizes.to(gamma))
        norms = torch.einsum("a,gab,b->g", alpha, grams, alpha) / precision.square()
        new = (gamma / norms.clamp_min(1e-300)).clamp(low, high)
        found = noise
        if learn_noise:
            ratio = alpha.reshape(n, c).square().sum(0) / inverse.diagonal().reshape(n, c).sum(0)
            found = (noise * ratio).clamp_min(1e-12)
        change = max(float((new / precision).log().abs().max()), float((found / noise).log().abs().max()))
        precision, noise = new, found
        if change < _TOLERANCE:
            break
    else:
        logger.warning("PriorOnly: the evidence still moved after %d rounds (by %.1e)", _ROUNDS, change)
    return precision.cpu(), noise.cpu()
