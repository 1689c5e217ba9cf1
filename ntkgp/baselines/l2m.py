"""Laplace from the optimiser's second moment: a diagonal posterior that training leaves behind."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ntkgp.baselines.moments import SecondMoments, second_moments
from ntkgp.baselines.protocol import Baseline, labelled, normal, observed
from ntkgp.linearization.checks import real_numbers
from ntkgp.linearization.frozen import pass_environment
from ntkgp.models.batches import Batches

logger = logging.getLogger("ntkgp")

VARIANTS = ("paper", "corrected")
LOSSES = ("auto", "mse", "nll")
PREDICTIONS = ("weights", "glm")
_EPSILON = 1e-8  # of the printed form
_FLOOR = 1e-10  # of a latent covariance, relative: S samples may span fewer directions than there are outputs


class L2M(Baseline):
    r"""Weights :math:`\theta_i \sim \mathcal N(\tilde\theta_i, 1/p_i)` with precisions from an adaptive optimiser's
    running mean v of squared gradients.

    ``variant="paper"``, exactly as printed (equation 6 and appendix A):

    .. math:: p_i = v_i + 1/\lambda + 10^{-8}, \qquad \lambda = \text{the weight decay}.

    The prior of precision λ enters as 1/λ, and v is a mean over batches of squared *mean* gradients of the *mean* loss,
    with no number of data in it: with standardised targets v is 1e-7 to 1e-3 beside 1/λ = 10, and every weight has the
    same variance λ whatever the data are. :attr:`data_share` says how much the data matter; the fit logs it.

    ``variant="corrected"``: with :math:`\hat v = v/(1 - \beta_2^t)`, N data, batches of b and the full mean gradient
    :math:`\bar g` of the training loss at the given weights,

    .. math:: p_i = s^2\, N \Bigl[\frac{b (N-1)}{N-b} \bigl(\hat v_i - (\bar g_i + w\theta_i)^2\bigr)
        + \bar g_i^2\Bigr] + \lambda_i :

    the sum of squared per-example gradients of the negative log-likelihood, which is s times the training loss of an
    example (:math:`s = C/2\sigma^2` for mean squared error), and the prior's precision. The factor (N − 1)/(N − b) is
    that of batches without replacement; w is the coefficient of a coupled decay, which adds to the gradient. Still an
    *empirical* Fisher, with gradients of the last 1/(1 − β₂) steps instead of those at the mode.

    :param net: the trained network; copied, never modified.
    :param likelihood: ``"regression"`` (one noise for all outputs: the loss weighs them alike) or ``"classification"``.
    :param optimizer: the optimiser of ``net`` (Adam, AdamW, NAdam, RAdam, RMSprop) after training, or its
        ``state_dict()``; not AMSGrad.
    :param batch_size: b, of training; needed by ``"corrected"``. Training with all data at once (b = N) leaves only the
        squared mean gradient, from which no sum of squares can be had.
    :param replacement: whether batches were drawn with replacement: factor b instead of b(N − 1)/(N − b).
    :param loss: what was minimised, a mean over the batch: ``"mse"`` (and over the outputs, as
        ``torch.nn.functional.mse_loss``) or ``"nll"``; ``"auto"``: ``"mse"`` for regression.
    :param precision: λ of the prior, one number or one per group. By default, ``"paper"``: the optimiser's weight
        decay; ``"corrected"``: sNw for a coupled decay w; AdamW's decoupled decay corresponds to no precision, so that
        one has to be given.
    :param noise: σ²; the mean squared residual by default.
    :param prediction: ``"weights"``, samples of weights through the network itself, as printed, or ``"glm"``, the exact
        moments of the tangent model; by default that of the variant, ``"glm"`` for the corrected one.
    :param num_samples: of weights.
    :param common: groups, output, max_memory, seed, progress, see :class:`~ntkgp.baselines.Baseline`.
    :raises ValueError: an option out of its range; at :meth:`fit`, an optimiser or a batch size that does not fit.

    The printed form shows the standard deviation of the mean function and adds no noise: that is ``predict(x).latent``.

    Cost: the corrected fit one backward pass over the data; prediction ``num_samples`` forward passes, or a Jacobian
    row per output. Memory: a few P numbers, chunks of rows within ``max_memory``.

    Source: `Perone, Silveira & Paula 2021 <https://arxiv.org/abs/2107.04695>`_; the corrections are derived here.

    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    >>> x = torch.linspace(-1, 1, 12).unsqueeze(-1)
    >>> torch.nn.functional.mse_loss(net(x), x.sin()).backward(); optimizer.step()
    >>> l2m = L2M(net, optimizer=optimizer, variant="paper").fit((x, x.sin()))
    >>> l2m.predict(x[:3]).latent.variance.shape
    torch.Size([3])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
        variant: str = "corrected",
        batch_size: int | None = None,
        replacement: bool = False,
        loss: str = "auto",
        precision: float | Tensor | None = None,
        noise: float | None = None,
        prediction: str | None = None,
        num_samples: int = 500,
        **common: Any,
    ) -> None:
        if prediction is None:
            prediction = "weights" if variant == "paper" else "glm"
        super().__init__(net, likelihood, **common)
        for name, value, known in (
            ("variant", variant, VARIANTS), ("loss", loss, LOSSES), ("prediction", prediction, PREDICTIONS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, count, least in (("num_samples", num_samples, 2), ("batch_size", batch_size, 1)):
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
                raise ValueError(f"{name}: expected a whole number >= {least}, got {count!r}")
        if noise is not None and not (math.isfinite(noise) and noise > 0):
            raise ValueError(f"noise: expected a positive number, got {noise!r}")
        if self.is_classification and loss == "mse":
            raise ValueError("loss: expected 'nll' for classification, got 'mse'")
        self.optimizer, self.variant, self.batch_size, self.replacement = optimizer, variant, batch_size, replacement
        self.loss = ("nll" if self.is_classification else "mse") if loss == "auto" else loss
        self.given_precision = None if precision is None else real_numbers(precision, "precision")
        self.given_noise, self.prediction, self.num_samples = noise, prediction, num_samples
        # The weights' precisions, the data's part of them, and the noise.
        self._found: dict[str, Tensor] = {}

    @property
    def weight_precision(self) -> Tensor:
        """p, the posterior precision of each weight, (P,)."""
        return self._fitted()["precision"]

    @property
    def data_share(self) -> Tensor:
        """Part of each weight's precision that comes from the data, (P,), between 0 and 1."""
        return self._fitted()["data"] / self.weight_precision

    def _fitted(self) -> dict[str, Tensor]:
        if not self._found:
            raise RuntimeError("L2M: call fit(train_data) first")
        return self._found

    def _fit(self, batches: Batches) -> None:
        if self.optimizer is None:
            raise ValueError("optimizer: expected the one that trained the network, or its state_dict(), got None")
        moments = second_moments(self.optimizer, self.net)
        noise, num_data = self._noise_and_rows(batches)
        if self.variant == "paper":
            data, prior = moments.raw, self._printed_prior(moments)
        else:
            scale = self._scale(noise)
            data = scale**2 * self._sum_of_squares(moments, batches, num_data)
            prior = self._prior_precision(moments, scale * num_data)
        self._found = {"precision": data + prior, "data": data, "noise": noise}
        share = self.data_share
        logger.log(
            logging.WARNING if float(share.median()) < 0.01 else logging.INFO,
            "L2M (%s): of the weights' precisions %.2g %% come from the data (median; largest %.2g %%), the rest from "
            "the prior",
            self.variant, 100 * float(share.median()), 100 * float(share.max()),
        )  # fmt: skip

    def _noise_and_rows(self, batches: Batches) -> tuple[Tensor, int]:
        """σ², () (of labels 1), and N."""
        total, count, rows = 0.0, 0, 0
        for x, y in batches:
            rows += len(x)
            if not self.is_classification and self.given_noise is None:
                f = self.lin(x).to("cpu", torch.float64)
                total += float((f - y.to("cpu").reshape(f.shape)).square().sum())
                count += f.numel()
        if self.is_classification or self.given_noise is not None:
            return torch.tensor(self.given_noise or 1.0, dtype=torch.float64), rows
        if total == 0:
            raise ValueError("noise: the network has no residuals to take it from; expected a positive number")
        return torch.tensor(total / count, dtype=torch.float64), rows

    def _scale(self, noise: Tensor) -> float:
        """s, negative log-likelihood of an example per training loss."""
        return float(self.lin.num_outputs / (2 * noise)) if self.loss == "mse" else 1.0

    def _per_weight(self, value: Tensor) -> Tensor:
        g = len(self.lin.groups)
        if value.shape not in ((), (g,)) or not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"precision: expected positive numbers, one or {g} (one per group), got {value}")
        return self.lin.groups.expand(value.expand(g))

    def _printed_prior(self, moments: SecondMoments) -> Tensor:
        decay = moments.weight_decay if self.given_precision is None else self._per_weight(self.given_precision)
        if not bool((decay > 0).all()):
            raise ValueError("optimizer: its weight decay is 0 and the printed form adds 1/0; expected precision=")
        return 1 / decay + _EPSILON

    def _prior_precision(self, moments: SecondMoments, per_decay: float) -> Tensor:
        if self.given_precision is not None:
            return self._per_weight(self.given_precision)
        if not bool(((moments.weight_decay > 0) & (moments.decoupled == 0)).all()):
            raise ValueError(
                "precision: expected a positive number, because the optimiser has no weight decay or a decoupled one "
                "(AdamW), to which no precision corresponds"
            )
        return per_decay * moments.weight_decay

    def _sum_of_squares(self, moments: SecondMoments, batches: Batches, num_data: int) -> Tensor:
        """Σ_n g_n² of the training loss, (P,)."""
        b = self.batch_size
        if b is None:
            raise ValueError("batch_size: expected the size of the batches of training, got None")
        if b > num_data or (b == num_data and not self.replacement):
            raise ValueError(
                f"batch_size: {b} of N = {num_data} data; batches must be smaller than the data set, because the "
                "gradient of all data says nothing of the single ones"
            )
        factor = b if self.replacement else b * (num_data - 1) / (num_data - b)
        mean = self._mean_gradient(batches, num_data)
        theta = self.lin.theta.to("cpu", torch.float64)
        centre = mean + moments.weight_decay * (1 - moments.decoupled) * theta
        spread = moments.corrected - centre.square()
        negative = float((spread < 0).double().mean())
        if negative > 0.5:
            logger.warning(
                "L2M: for %.0f %% of the weights the squared mean gradient at the given weights exceeds the second "
                "moment: training went on since, or these are not its weights",
                100 * negative,
            )
        return num_data * (factor * spread.clamp_min(0) + mean.square())

    def _mean_gradient(self, batches: Batches, num_data: int) -> Tensor:
        """Gradient of the training loss over all data, in evaluation mode, (P,)."""
        total = torch.zeros(self.lin.num_parameters, dtype=torch.float64)
        for x, y in batches:
            f = self.lin(x)
            y = y.to(f.device)
            if self.is_classification:
                c = f.shape[-1]
                slope = f.sigmoid() - y.reshape(f.shape) if c == 1 else f.softmax(-1) - nn.functional.one_hot(y, c)
            else:
                slope = f - y.reshape(f.shape)
                # A Gaussian "nll" has σ² in it; σ² is that of the fit.
                slope = slope * (2 / f.shape[-1] if self.loss == "mse" else 1 / float(self._training_noise))
            total += self.lin.vjp(x, slope.to(f.dtype)).to("cpu", torch.float64)
        return total / num_data

    @property
    def _training_noise(self) -> float:
        if self.given_noise is None:
            raise ValueError("noise: expected the σ² of the Gaussian likelihood that was minimised (loss='nll')")
        return self.given_noise

    def _predict(self, x: Tensor) -> Distribution:
        if self.prediction == "glm":
            return self._predict_linearised(x)
        f = self.output_samples(x)
        mean, centred = f.mean(0), f - f.mean(0)
        covariance = torch.einsum("snc,snd->ncd", centred, centred) / (len(f) - 1)
        latent = normal(mean, _positive(covariance))
        if not self.is_classification:
            return self._observed(mean, covariance)
        return labelled(f[..., 0].sigmoid().mean(0) if f.shape[-1] == 1 else f.softmax(-1).mean(0), latent)

    def _predict_linearised(self, x: Tensor) -> Distribution:
        variance, c = 1 / self.weight_precision, self.lin.num_outputs
        blocks = []
        for rows in x.split(max(1, self.max_memory // (24 * c * len(variance)))):
            j = self.lin.jacobian(rows).to("cpu", torch.float64)
            blocks.append((j * variance) @ j.mT)
        mean, covariance = self.lin(x).to("cpu", torch.float64), torch.cat(blocks)
        if not self.is_classification:
            return self._observed(mean, covariance)
        logits = mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
        latent = normal(mean, _positive(covariance))
        return labelled(logits[:, 0].sigmoid() if c == 1 else logits.softmax(-1), latent)

    def _observed(self, mean: Tensor, covariance: Tensor) -> Distribution:
        return observed(mean, _positive(covariance), self._fitted()["noise"].expand(mean.shape[-1]))

    def weight_samples(self) -> Iterator[Tensor]:
        """Weights (P,) drawn from the posterior, ``num_samples`` of them, the same at each call."""
        generator = torch.Generator().manual_seed(self.seed)
        theta, deviation = self.lin.theta.to("cpu", torch.float64), self.weight_precision.rsqrt()
        for _ in range(self.num_samples):
            yield theta + deviation * torch.randn(theta.shape, generator=generator, dtype=torch.float64)

    def output_samples(self, x: Any) -> Tensor:
        """Outputs (S, N, C) of the network itself at N inputs under sampled weights, float64."""
        packed, frozen = self.lin.pack(x).to(torch.float64), self.lin.frozen
        parts = []
        with pass_environment(frozen.device), torch.no_grad():
            # A module of our own instead of functional weights: right for any network, however it reaches them.
            module = copy.deepcopy(frozen.module(frozen.device))
            parameters = dict(module.named_parameters())
            size = max(1, self.max_memory // (2 * self.lin.activation_bytes))
            leaves = [self.lin.packing.leaves(rows.to(frozen.device)) for rows in packed.split(size)]
            for weights in self.weight_samples():
                start = 0
                for name, p in frozen.theta.items():
                    parameters[name].copy_(weights[start : start + p.numel()].reshape(p.shape))
                    start += p.numel()
                rows = [frozen.run(module, batch).reshape(len(batch[0]), -1) for batch in leaves]
                parts.append(torch.cat(rows).to("cpu", torch.float64))
        return torch.stack(parts)

    def _get_state(self) -> dict[str, Tensor]:
        return self._fitted()

    def _set_state(self, state: dict[str, Tensor]) -> None:
        p = self.lin.num_parameters
        shapes = {"precision": (p,), "data": (p,), "noise": ()}
        came = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if came != shapes:
            raise ValueError(f"state: expected {shapes}, got {came}")
        self._found = state


class L2MEnsemble:
    """A deep ensemble whose members are each an :class:`L2M`: the equal mixture of their predictions.

    :param members: of differently trained networks with the same outputs and likelihood, each with its own optimiser.
    :raises ValueError: no members, or different likelihoods.

    Regression: mean and covariance of the mixture; classification: the mean probabilities.

    Cost: that of the members.
    """

    def __init__(self, members: Sequence[L2M]) -> None:
        if not members or len({member.kind for member in members}) != 1:
            raise ValueError("members: expected one or more L2M of the same likelihood")
        self.members = list(members)

    def fit(self, train_data: Any) -> L2MEnsemble:
        """Fit each member; return itself."""
        for member in self.members:
            member.fit(train_data)
        return self

    def predict(self, x: Any) -> Distribution:
        """The mixture at N inputs; its ``latent`` has the mixture's mean and covariance of the outputs."""
        found = [member.predict(x) for member in self.members]
        moments = [_moments_of(d.latent) for d in found]  # type: ignore[attr-defined]
        means, inner = (torch.stack(parts) for parts in zip(*moments, strict=True))
        centred = means - means.mean(0)
        covariance = inner.mean(0) + torch.einsum("snc,snd->ncd", centred, centred) / len(found)
        if self.members[0].is_classification:
            return labelled(torch.stack([_probabilities(d) for d in found]).mean(0), normal(means.mean(0), covariance))
        noise = torch.stack([member.state_dict()["noise"] for member in self.members]).mean(0)
        return observed(means.mean(0), covariance, noise.expand(means.shape[-1]))

    def state_dict(self) -> dict[str, Tensor]:
        """States of the members, their entries named by number."""
        return {f"{i}.{name}": t for i, m in enumerate(self.members) for name, t in m.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], example: Any = None) -> L2MEnsemble:
        """Take the state of another one with as many members; return itself."""
        for i, member in enumerate(self.members):
            own = {name.removeprefix(f"{i}."): t for name, t in state.items() if name.startswith(f"{i}.")}
            member.load_state_dict(own, example)
        return self


def _moments_of(latent: Distribution) -> tuple[Tensor, Tensor]:
    """Mean (N, C) and covariance (N, C, C)."""
    if isinstance(latent, torch.distributions.MultivariateNormal):
        return latent.mean, latent.covariance_matrix
    return latent.mean.unsqueeze(-1), latent.variance[:, None, None]


def _probabilities(predictive: Distribution) -> Tensor:
    return predictive.probs  # type: ignore[attr-defined]


def _positive(covariance: Tensor) -> Tensor:
    """With a Cholesky factor: S samples or few weights may span fewer directions than there are outputs."""
    if covariance.shape[-1] == 1:
        return covariance
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    return covariance + torch.diag_embed((_FLOOR * size + 1e-30).unsqueeze(-1).expand(covariance.shape[:-1]))
