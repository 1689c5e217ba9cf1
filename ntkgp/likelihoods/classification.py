"""Classification likelihoods whose predictive averages the link over the latent Gaussian."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import DenseLinearOperator
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.nn.functional import logsigmoid

from ntkgp.likelihoods.curvature import validate_labels

__all__ = ["BernoulliLikelihood", "CategoricalLikelihood", "bridge_log_concentration", "point_covariances"]

_MAX_DENSE_ROWS = 2048  # below, one dense covariance is cheaper than many slices
_MAX_DRAWN_NUMBERS = 1 << 24  # Monte-Carlo draws held at once: 128 MiB in float64


def point_covariances(latent: MultitaskMultivariateNormal) -> Tensor:
    """
    Covariance of the C outputs at each input: the diagonal blocks of the joint covariance.

    Covariances that know their blocks (a method ``point_blocks(num_outputs)``) are asked for them; of others only
    slices of at most 2048 rows are evaluated.

    :param latent: a multi-output Gaussian over N inputs, interleaved or not.
    :return: ``(*batch, N, C, C)``.

    Cost: O(N·C²) memory beyond a slice of the covariance.

    Example:
        >>> latent = MultitaskMultivariateNormal(torch.zeros(2, 3), torch.eye(6))
        >>> point_covariances(latent).shape
        torch.Size([2, 3, 3])
    """
    num_data, num_outputs = latent.event_shape
    covar = latent.lazy_covariance_matrix
    if isinstance(covar, LazyEvaluatedKernelTensor):
        covar = covar.evaluate_kernel()
    if latent._interleaved and hasattr(covar, "point_blocks"):
        return covar.point_blocks(num_outputs)
    if num_data * num_outputs <= _MAX_DENSE_ROWS or isinstance(covar, DenseLinearOperator):
        dense = covar.to_dense()
        order = (num_data, num_outputs) if latent._interleaved else (num_outputs, num_data)
        blocks = dense.unflatten(-1, order).unflatten(-3, order)  # shape: (*batch, N, C, N, C) or (*batch, C, N, C, N)
        first, second = (-4, -2) if latent._interleaved else (-3, -1)
        return blocks.diagonal(dim1=first, dim2=second).movedim(-1, -3)
    if not latent._interleaved:
        point = torch.arange(num_data, device=covar.device).view(-1, 1, 1)
        output = torch.arange(num_outputs, device=covar.device) * num_data
        return covar[..., point + output.unsqueeze(-1), point + output.unsqueeze(-2)]
    step = max(1, _MAX_DENSE_ROWS // num_outputs)
    parts = []
    for start in range(0, num_data, step):
        rows = slice(start * num_outputs, min(start + step, num_data) * num_outputs)
        block = covar[..., rows, rows].to_dense()
        block = block.unflatten(-1, (-1, num_outputs)).unflatten(-3, (-1, num_outputs))
        parts.append(block.diagonal(dim1=-4, dim2=-2).movedim(-1, -3))
    return torch.cat(parts, dim=-3)


def _variances(latent: MultivariateNormal) -> Tensor:
    """Variances in the shape of the mean: rounding below zero is cut, but tiny ones are not raised to a floor."""
    diagonal = latent.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2).clamp_min(0)
    if isinstance(latent, MultitaskMultivariateNormal) and not latent._interleaved:
        return diagonal.unflatten(-1, (latent.event_shape[1], latent.event_shape[0])).mT
    return diagonal.reshape(latent.mean.shape)


def _root(covariance: Tensor) -> Tensor:
    """L with L Lᵀ = Σ: the Cholesky factor, or the eigenvalue root of blocks that are only semi-definite."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    singular = info != 0
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(covariance[singular])
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        factor = factor.masked_scatter(singular[..., None, None].expand_as(factor), root)
    return factor


def _contrasts(num_classes: int, like: Tensor) -> Tensor:
    """Orthonormal basis of the vectors with sum zero, (C, C − 1), by Helmert's construction."""
    index = torch.arange(1, num_classes, dtype=like.dtype, device=like.device)
    basis = torch.ones(num_classes, num_classes - 1, dtype=like.dtype, device=like.device).triu()
    basis[torch.arange(1, num_classes), torch.arange(num_classes - 1)] = -index
    return basis / (index * (index + 1)).sqrt()


def bridge_log_concentration(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""
    Laplace bridge: the Dirichlet distribution whose softmax-basis Laplace approximation is a given Gaussian.

    Both sides are made comparable by conditioning the Gaussian on :math:`\mathbf 1^\top f = 0`,

    .. math::
        w = \frac{\Sigma \mathbf 1}{\mathbf 1^\top \Sigma \mathbf 1}, \qquad
        \mu \leftarrow \mu - w\, \mathbf 1^\top \mu, \qquad
        \Sigma \leftarrow \Sigma - w\, \mathbf 1^\top \Sigma, \qquad
        \alpha_c = \frac{1}{\Sigma_{cc}} \Bigl(1 - \frac2C + \frac{e^{\mu_c}}{C^2} \sum_k e^{-\mu_k} \Bigr).

    Where :math:`\mathbf 1^\top \Sigma \mathbf 1 = 0` the mean is centred instead, as for :math:`\Sigma \propto I`.

    :param mean: latent means, ``(*batch, C)``, C >= 2.
    :param covariance: latent covariances, ``(*batch, C, C)``.
    :return: :math:`\log \alpha`, ``(*batch, C)``; the predictive probabilities are :math:`\alpha_c / \sum_k \alpha_k`.

    Cost: O(C²) per point.

    Source: Hobbhahn, Kristiadi & Hennig, *Fast Predictive Uncertainty for Classification with Bayesian Deep Networks*,
    UAI 2022.

    Example:
        >>> bridge_log_concentration(torch.zeros(3), torch.eye(3)).exp()
        tensor([1., 1., 1.])
    """
    num_classes = mean.shape[-1]
    sums = covariance.sum(-1)
    total = sums.sum(-1, keepdim=True)
    weight = torch.where(total > 0, sums / total.where(total > 0, 1.0), 1.0 / num_classes)
    mean = mean - weight * mean.sum(-1, keepdim=True)
    variance = covariance.diagonal(dim1=-2, dim2=-1) - weight * sums
    variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)
    bracket = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(num_classes)
    if num_classes > 2:
        bracket = torch.logaddexp(bracket, torch.full_like(bracket, math.log1p(-2 / num_classes)))
    return bracket - variance.log()


class _LatentLikelihood(Likelihood):
    """What both classification likelihoods share: the choice of link and reproducible Monte Carlo."""

    _links: tuple[str, ...]

    def __init__(self, link: str, num_samples: int, seed: int) -> None:
        super().__init__()
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples: expected a positive integer, got {num_samples!r}")
        self.link = link
        self.num_samples = num_samples
        self.seed = seed

    @property
    def link(self) -> str:
        """How the latent Gaussian is turned into probabilities; may be changed at any time."""
        return self._link

    @link.setter
    def link(self, value: str) -> None:
        if value not in self._links:
            raise ValueError(f"link: expected one of {', '.join(self._links)}, got {value!r}")
        self._link = value

    @abstractmethod
    def _moments(self, latent: MultivariateNormal) -> tuple[Tensor, Tensor]:
        """Mean and root covariance of the latent values at each input, (*batch, N, C) and (*batch, N, C, R)."""

    @abstractmethod
    def _log_probabilities(self, values: Tensor) -> Tensor:
        """Log-probabilities of all labels, (*batch, N, labels), given latent values (*batch, N, C)."""

    def _draws(self, latent: MultivariateNormal, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Blocks of latent draws, (S, *batch, N, C), num_samples together, independent over inputs."""
        mean, root = self._moments(latent)
        if generator is None:
            generator = torch.Generator(device=mean.device).manual_seed(self.seed)
        numbers = root.shape[:-2] + root.shape[-1:]
        step = max(1, _MAX_DRAWN_NUMBERS // max(1, mean.numel()))
        for start in range(0, self.num_samples, step):
            shape = (min(step, self.num_samples - start), *numbers)
            noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
            yield mean + torch.einsum("...cr,s...r->s...c", root, noise)

    def _mean_log_probabilities(self, latent: MultivariateNormal, generator: torch.Generator | None) -> Tensor:
        """Log of the Monte-Carlo average of the probabilities, (*batch, N, labels)."""
        parts = [self._log_probabilities(draws).logsumexp(0) for draws in self._draws(latent, generator)]
        return torch.stack(parts).logsumexp(0) - math.log(self.num_samples)

    def expected_log_prob(
        self,
        observations: Tensor,
        function_dist: MultivariateNormal,
        *params: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        :math:`\mathbb E_{q(f_n)} \log p(y_n \mid f_n)` of each point by Monte Carlo.

        :param observations: labels, ``(*batch, N)``.
        :param function_dist: the latent distribution.
        :param generator: source of the random numbers; by default a new one from ``seed``, so that the same call gives
            the same value. The global random state is never used.
        :return: ``(*batch, N)``.

        Cost: O(num_samples·N·C) time, at most 128 MiB of draws at once (more where gradients are kept).
        """
        labels = validate_labels(observations, self._num_labels).unsqueeze(-1)

        def total(draws: Tensor) -> Tensor:
            log_p = self._log_probabilities(draws)
            return log_p.gather(-1, labels.expand(*log_p.shape[:-1], 1)).squeeze(-1).sum(0)

        parts = [total(draws) for draws in self._draws(function_dist, generator)]
        return torch.stack(parts).sum(0) / self.num_samples

    def log_marginal(
        self, observations: Tensor, function_dist: MultivariateNormal, *params: Any, **kwargs: Any
    ) -> Tensor:
        """
        Log predictive probability of each label, ``(*batch, N)``, under the chosen link.

        :param observations: labels, ``(*batch, N)``.
        :param function_dist: the latent distribution.
        :param generator: (keyword) as in :meth:`expected_log_prob`, for ``link="mc"``.
        """
        labels = validate_labels(observations, self._num_labels)
        predictive = self.marginal(function_dist, *params, **kwargs)
        return predictive.log_prob(labels.to(function_dist.mean.dtype))

    @property
    @abstractmethod
    def _num_labels(self) -> int:
        """Number of values that a label can take."""


class CategoricalLikelihood(_LatentLikelihood):
    r"""
    Softmax likelihood, :math:`p(y = c \mid f) = \mathrm{softmax}(f)_c`, for a latent Gaussian over C logits.

    ``likelihood(model(x))`` is a :class:`torch.distributions.Categorical` over the N inputs with probabilities

    =========  ==========================================================================================
    link       probabilities for :math:`f_n \sim \mathcal N(m, \Sigma)`, :math:`\Sigma` of shape C × C
    =========  ==========================================================================================
    probit     :math:`\mathrm{softmax}_c \bigl(m_c / \sqrt{1 + \tfrac\pi8 \Sigma_{cc}}\bigr)`
    mc         :math:`\tfrac1S \sum_s \mathrm{softmax}(m + L\varepsilon_s)`, :math:`LL^\top = \Sigma`
    bridge     :math:`\alpha_c / \sum_k \alpha_k`, see :func:`~ntkgp.likelihoods.bridge_log_concentration`
    =========  ==========================================================================================

    The softmax does not change when all logits move together, so Monte Carlo draws in the C − 1 contrasts only: its
    result is exactly invariant to adding c·11ᵀ to :math:`\Sigma`, and to an a priori common shift of the logits.
    ``likelihood(f)`` with a tensor f ``(*batch, N, C)`` is ``Categorical(logits=f)``; logits are never transposed, also
    not when N = C.

    :param num_classes: C, at least 2; for one logistic output use :class:`BernoulliLikelihood`.
    :param link: ``"probit"`` (default), ``"mc"`` or ``"bridge"``. ``"probit"`` and ``"bridge"`` look at the diagonal of
        :math:`\Sigma` (``"bridge"`` after its correction) and may change which class is the most probable.
    :param num_samples: draws for ``link="mc"`` and for :meth:`expected_log_prob`.
    :param seed: seed of these draws; predictions are reproducible and leave the global random state alone.

    Cost: ``probit`` O(N·C), ``bridge`` O(N·C²), ``mc`` O(N·C³ + num_samples·N·C²).

    Source: Gibbs, *Bayesian Gaussian processes for regression and classification*, 1997 (multi-class probit); Hobbhahn
    et al., UAI 2022 (bridge).

    Example:
        >>> likelihood = CategoricalLikelihood(num_classes=3)
        >>> latent = MultitaskMultivariateNormal(torch.tensor([[2.0, 0.0, 0.0]]), torch.eye(3))
        >>> likelihood(latent).probs
        tensor([[0.7314, 0.1343, 0.1343]])
        >>> likelihood(latent.mean).probs
        tensor([[0.7870, 0.1065, 0.1065]])
    """

    _links = ("probit", "mc", "bridge")

    def __init__(self, num_classes: int, link: str = "probit", num_samples: int = 512, seed: int = 0) -> None:
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"num_classes: expected an integer of at least 2, got {num_classes!r} "
                "(one logistic output belongs to BernoulliLikelihood)"
            )
        super().__init__(link, num_samples, seed)
        self.num_classes = num_classes

    @property
    def _num_labels(self) -> int:
        return self.num_classes

    def _check(self, latent: MultivariateNormal) -> MultitaskMultivariateNormal:
        """The latent distribution, when it has num_classes outputs."""
        if not isinstance(latent, MultitaskMultivariateNormal):
            raise ValueError(
                "latent distribution: expected a MultitaskMultivariateNormal over (N, num_classes), got "
                f"{type(latent).__name__}; MultitaskMultivariateNormal.from_batch_mvn turns a batch into outputs"
            )
        if latent.event_shape[-1] != self.num_classes:
            raise ValueError(f"latent distribution: expected {self.num_classes} outputs, got {latent.event_shape[-1]}")
        return latent

    def _moments(self, latent: MultivariateNormal) -> tuple[Tensor, Tensor]:
        latent = self._check(latent)
        basis = _contrasts(self.num_classes, latent.mean)
        mean = latent.mean
        covariance = point_covariances(latent)
        return mean, basis @ _root(basis.mT @ covariance @ basis)

    def _log_probabilities(self, values: Tensor) -> Tensor:
        return values.log_softmax(-1)

    def forward(self, function_samples: Tensor, *params: Any, **kwargs: Any) -> Categorical:
        """Distribution of the labels given logits ``(*batch, N, C)``."""
        if function_samples.dim() < 1 or function_samples.shape[-1] != self.num_classes:
            raise ValueError(
                f"function_samples: expected shape (*batch, N, {self.num_classes}), got {tuple(function_samples.shape)}"
            )
        return Categorical(logits=function_samples)

    def marginal(
        self,
        function_dist: MultivariateNormal,
        *params: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Categorical:
        """
        Predictive distribution of the labels under the chosen link.

        :param function_dist: latent ``MultitaskMultivariateNormal`` with ``num_classes`` outputs.
        :param generator: for ``link="mc"``, the source of the random numbers (default: a new one from ``seed``).
        :return: ``Categorical`` with batch shape ``(*batch, N)``.
        :raises ValueError: when the latent distribution has other outputs.
        """
        latent = self._check(function_dist)
        if self.link == "mc":
            return Categorical(logits=self._mean_log_probabilities(latent, generator))
        if self.link == "bridge":
            return Categorical(logits=bridge_log_concentration(latent.mean, point_covariances(latent)))
        return Categorical(logits=latent.mean / (1 + math.pi / 8 * _variances(latent)).sqrt())


class BernoulliLikelihood(_LatentLikelihood):
    r"""
    Logistic likelihood, :math:`p(y = 1 \mid f) = \sigma(f)`, for networks with one output trained with BCE on logits.

    (GPyTorch's class of the same name uses the normal distribution function instead of the logistic one.)
    ``likelihood(model(x))`` is a :class:`torch.distributions.Bernoulli` over the N inputs with

    =========  ==========================================================================================
    link       :math:`p(y = 1)` for :math:`f_n \sim \mathcal N(m, v)`
    =========  ==========================================================================================
    probit     :math:`\sigma\bigl(m / \sqrt{1 + \tfrac\pi8 v}\bigr)`
    mc         :math:`\tfrac1S \sum_s \sigma(m + \sqrt v\, \varepsilon_s)`
    =========  ==========================================================================================

    There is no Laplace bridge here: for two classes its mean is :math:`\sigma(m)`, whatever the variance.

    :param link: ``"probit"`` (default) or ``"mc"``.
    :param num_samples: draws for ``link="mc"`` and for :meth:`expected_log_prob`.
    :param seed: seed of these draws; predictions are reproducible and leave the global random state alone.

    Cost: O(N), ``mc`` O(num_samples·N).

    Source: MacKay, *The evidence framework applied to classification networks*, Neural Computation 4 (1992).

    Example:
        >>> likelihood = BernoulliLikelihood()
        >>> likelihood(MultivariateNormal(torch.tensor([2.0, 0.0]), 4 * torch.eye(2))).probs
        tensor([0.7768, 0.5000])
    """

    _links = ("probit", "mc")

    def __init__(self, link: str = "probit", num_samples: int = 512, seed: int = 0) -> None:
        super().__init__(link, num_samples, seed)

    @property
    def _num_labels(self) -> int:
        return 2

    def _check(self, latent: MultivariateNormal) -> MultivariateNormal:
        """The latent distribution, when it has a single output."""
        if isinstance(latent, MultitaskMultivariateNormal):
            raise ValueError(
                f"latent distribution: expected one output, got {latent.event_shape[-1]}; use CategoricalLikelihood"
            )
        return latent

    def _moments(self, latent: MultivariateNormal) -> tuple[Tensor, Tensor]:
        latent = self._check(latent)
        return latent.mean.unsqueeze(-1), _variances(latent).sqrt()[..., None, None]

    def _log_probabilities(self, values: Tensor) -> Tensor:
        return torch.cat([logsigmoid(-values), logsigmoid(values)], -1)

    def forward(self, function_samples: Tensor, *params: Any, **kwargs: Any) -> Bernoulli:
        """Distribution of the labels given logits ``(*batch, N)``."""
        return Bernoulli(logits=function_samples)

    def marginal(
        self,
        function_dist: MultivariateNormal,
        *params: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Bernoulli:
        """
        Predictive distribution of the labels under the chosen link.

        :param function_dist: latent ``MultivariateNormal`` (one output).
        :param generator: for ``link="mc"``, the source of the random numbers (default: a new one from ``seed``).
        :return: ``Bernoulli`` with batch shape ``(*batch, N)``.
        :raises ValueError: when the latent distribution has several outputs.
        """
        latent = self._check(function_dist)
        if self.link == "mc":
            log_p = self._mean_log_probabilities(latent, generator)
            return Bernoulli(logits=log_p[..., 1] - log_p[..., 0])
        return Bernoulli(logits=latent.mean / (1 + math.pi / 8 * _variances(latent)).sqrt())
