"""Exact Gaussian-process inference with the tangent kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.models import GP, ExactGP
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.evidence.problem import GaussianEvidence, Problem, SoftmaxEvidence
from ntkgp.kernels import NeuralTangentKernel
from ntkgp.likelihoods import validate_labels
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.grams import Factors
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.symmetric import SymmetricGrams
from ntkgp.means import LinearizedMean, NetworkMean
from ntkgp.models.conditioned import Conditionable
from ntkgp.models.factors import GaussianFactors, SoftmaxFactors
from ntkgp.models.noise import NoiseLink, has_fixed_noise, is_classification, prepare_likelihood
from ntkgp.models.paths import FixedMean, FunctionSamples
from ntkgp.models.posterior import PosteriorCovariance

MEANS = ("network", "posterior")
CURVATURES = ("simple", "quadratic", "full")


class ExactNTKGP(Conditionable, ExactGP):
    r"""The trained network as an exact Gaussian process.

    The tangent model :math:`h(x;\theta) = f(x;\tilde\theta) + J(x)(\theta-\tilde\theta)` with the prior
    :math:`\theta \sim N(0, \Lambda^{-1})` is

    .. math:: h \sim GP\big(f(x;\tilde\theta) - J(x)\tilde\theta,\; J(x)\Lambda^{-1}J(x')^\top\big),

    so that GPyTorch's marginal likelihood of ``model(train_x)`` in train mode *is* the evidence at θ⋆ (Antorán et al.
    2022). In eval mode ``model(x)`` is the latent posterior and ``model.likelihood(model(x))`` the predictive
    distribution. Gaussian likelihoods are conditioned on exactly; categorical and Bernoulli ones by the Laplace–GGN
    approximation with the full C × C curvature, in data space.

    All algebra is in float64, the network's passes in its own dtype. The Grams and, where they fit in `max_memory`, the
    Jacobian rows of the training inputs are kept: later predictions make no pass over the training data.

    :param train_x: N inputs as the network takes them, or packed.
    :param train_y: (N,) or (N, 1) for one output, else (N, C) or (N, *output_shape); class labels (N,).
    :param likelihood: ``GaussianLikelihood``, ``FixedNoiseGaussianLikelihood``, ``MultitaskGaussianLikelihood``,
        :class:`~ntkgp.CategoricalLikelihood` or :class:`~ntkgp.likelihoods.BernoulliLikelihood`; moved to float64.
        For several outputs a ``GaussianLikelihood`` is wrapped (``model.likelihood``) and shares its noise with it.
    :param lin: the linearised network.
    :param mean: ``"network"`` (the predictive mean is exactly the network's output) or ``"posterior"`` (h at θ⋆).
    :param max_memory: budget for the Grams, and another of the same size for the kept Jacobian rows.
    :raises ValueError: NaN or infinite data, N = 0, other shapes, labels out of range, an unknown `mean`.
    :raises TypeError: another likelihood.

    Cost: O(N²C²P) once for the Grams (G·(NC)² numbers), O((NC)³) per set of hyper-parameters; then per test input C
    backward passes, O(NC²P) for the cross-covariance and O((NC)²C) for the variance.

    >>> import gpytorch, ntkgp
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x)
    >>> model = ntkgp.ExactNTKGP(x, torch.sin(3 * x), gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> report = ntkgp.fit_evidence(model)
    >>> posterior = model.eval()(torch.zeros(2, 1))
    >>> torch.equal(posterior.mean, net(torch.zeros(2, 1)).squeeze(-1).double()), posterior.variance.shape
    (True, torch.Size([2]))
    """

    def __init__(
        self,
        train_x: Any,
        train_y: Tensor,
        likelihood: gpytorch.likelihoods.Likelihood,
        lin: LinearizedNetwork,
        mean: str = "network",
        *,
        max_memory: str | int | float = "2GiB",
    ) -> None:
        if not isinstance(lin, LinearizedNetwork):
            raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
        GP.__init__(self)
        object.__setattr__(self, "lin", lin)
        self.max_memory = parse_memory(max_memory)
        self.likelihood = prepare_likelihood(likelihood, lin.num_outputs)
        self.mean = mean
        # A buffer: the posterior of a loaded model depends on it as on the precisions.
        self.register_buffer("_curvature", torch.tensor(0))
        self.train_inputs = (self._pack(train_x, "train_x").detach().clone(),)
        self.train_targets = self._targets(train_y, len(self.train_inputs[0]))
        self.mean_module = LinearizedMean(lin)
        self._network_mean = NetworkMean(lin)
        self.kernel = NeuralTangentKernel(lin, max_memory=max_memory).to(torch.float64)
        self.prediction_strategy: Any = None
        self._kept: _Kept | None = None

    @property
    def covar_module(self) -> NeuralTangentKernel:
        """The kernel, by GPyTorch's usual name."""
        return self.kernel

    @property
    def mean(self) -> str:
        """Which predictive mean is reported, ``"network"`` or ``"posterior"``; may be changed at any time."""
        return self._reported_mean

    @mean.setter
    def mean(self, value: str) -> None:
        if value not in MEANS:
            raise ValueError(f"mean: expected one of {MEANS}, got {value!r}")
        self._reported_mean = value

    @property
    def curvature(self) -> str:
        """Curvature of a classification, set by :func:`~ntkgp.fit_evidence`; may be changed at any time."""
        return CURVATURES[int(self._curvature)]

    @curvature.setter
    def curvature(self, value: str) -> None:
        if value not in CURVATURES:
            raise ValueError(f"curvature: expected one of {CURVATURES}, got {value!r}")
        self._curvature.fill_(CURVATURES.index(value))

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: one model, however many batches of inputs it is asked about."""
        return torch.Size()

    @property
    def is_classification(self) -> bool:
        """Whether the likelihood is categorical or Bernoulli."""
        return is_classification(self.likelihood)

    def _targets(self, train_y: Any, num_rows: int) -> Tensor:
        """Targets in GPyTorch's shape: (N,) for one output and for labels, else (N, C)."""
        c = self.lin.num_outputs
        if not isinstance(train_y, Tensor):
            raise TypeError(f"train_y: expected a tensor, got {type(train_y).__name__}")
        if self.is_classification:
            flat = train_y.squeeze(-1) if train_y.ndim == 2 and train_y.shape[-1] == 1 else train_y
            return validate_labels(flat, max(c, 2), torch.Size((num_rows,))).clone()
        shapes = {(num_rows, c), (num_rows, *self.lin.output_shape)} | ({(num_rows,)} if c == 1 else set())
        if tuple(train_y.shape) not in shapes:
            raise ValueError(
                f"train_y: expected shape {' or '.join(map(str, sorted(shapes, key=len)))}, got {tuple(train_y.shape)}"
            )
        if train_y.is_complex() or train_y.dtype == torch.bool:
            raise TypeError(f"train_y: expected real numbers, got {train_y.dtype}")
        if not torch.isfinite(train_y).all():
            raise ValueError("train_y holds NaN or infinite values")
        # A copy: what the caller later does to the tensor in place must not reach half of the model.
        return train_y.detach().to(torch.float64).reshape((num_rows,) if c == 1 else (num_rows, c)).clone()

    def set_train_data(self, inputs: Any = None, targets: Tensor | None = None, strict: bool = True) -> None:
        """Replace the training data, given as to the constructor; the hyper-parameters stay.

        :param strict: require the number of rows to stay the same, as GPyTorch does.
        """
        if isinstance(inputs, tuple | list) and len(inputs) == 1:
            inputs = inputs[0]
        old = self.train_inputs[0]
        x = old if inputs is None else self._pack(inputs, "inputs").detach().clone()
        if strict and x.shape != old.shape:
            raise RuntimeError(f"inputs: expected shape {tuple(old.shape)} (strict=True), got {tuple(x.shape)}")
        y = self.train_targets if targets is None else targets
        self.train_targets = self._targets(y, len(x))
        self.prediction_strategy = None
        if not torch.equal(x, old):
            self.train_inputs = (x,)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "prediction_strategy": None}

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at packed inputs: mean f(x; θ̃) − J(x)θ̃, covariance the tangent kernel."""
        return self._distribution(self.mean_module(x), self.kernel(x))

    def _distribution(self, mean: Tensor, covariance: LinearOperator | Tensor) -> MultivariateNormal:
        """(*batch, N) or (*batch, N, C) means with interleaved covariances."""
        if self.lin.num_outputs == 1:
            return MultivariateNormal(mean, covariance)
        return MultitaskMultivariateNormal(mean, covariance)

    def _pack(self, x: Any, name: str) -> Tensor:
        """Raw or packed inputs, (N,) where D = 1, as packed float64."""
        packing = self.lin.packing
        if isinstance(x, Tensor) and x.ndim == 1 and packing.width == 1 and not packing.is_raw(x):
            x = x.unsqueeze(-1)
        return packing.pack(x, name).to(torch.float64)

    def _inputs(self, x: Any) -> Tensor:
        """The same, packed ones with any batch dimensions."""
        packing = self.lin.packing
        if packing.is_packed(x) and x.ndim > 2 and not packing.is_raw(x):
            return self._pack(x.reshape(-1, x.shape[-1]), "inputs").reshape(x.shape)
        return self._pack(x, "inputs")

    def _apply(self, fn: Any) -> ExactNTKGP:
        """Moves between devices; ``float()`` and ``half()`` change nothing, since all algebra is in float64."""
        self._kept = self.prediction_strategy = None
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device))

    def __call__(self, x: Any, **kwargs: Any) -> MultivariateNormal:
        """Train mode: the prior at the training inputs. Eval mode: the latent posterior at any inputs."""
        packed = self._inputs(x)
        if self.training or gpytorch.settings.prior_mode.on():
            return super().__call__(packed, **kwargs)
        return self._posterior(packed)

    def _posterior(self, x: Tensor) -> MultivariateNormal:
        """Latent posterior at packed inputs, (*batch, T, D)."""
        c = self.lin.num_outputs
        batch, points = x.shape[:-2], x.shape[-2]
        factors, prior = self._factors()
        cross = self._cross(x.reshape(-1, x.shape[-1]))
        root = factors.root(cross)
        mean = self._mean(x.reshape(-1, x.shape[-1]), cross).reshape(*batch, points, c)
        covariance = PosteriorCovariance.from_root(prior(x), root.reshape(*batch, points * c, root.shape[-1]))
        return self._distribution(mean.squeeze(-1) if c == 1 else mean, covariance)

    def _mean(self, x: Tensor, cross: Tensor | None = None) -> Tensor:
        """The reported predictive mean, (N, D) -> (N, C)."""
        if self.mean == "network":
            return self._network_mean(x).reshape(len(x), -1)
        cross = self._cross(x) if cross is None else cross
        return self.mean_module(x).reshape(len(x), -1) + (cross @ self._factors()[0].alpha).reshape(len(x), -1)

    def _mean_of_now(self) -> FixedMean:
        """The reported predictive mean, whatever becomes of the model."""
        if self.mean == "network":
            return FixedMean(self._network_mean)
        kept = self._training_side()
        source = kept.factors if kept.factors is not None else kept.x
        variance = self.kernel.precision.detach().reciprocal()
        return FixedMean(self.mean_module, (source, variance, self._factors()[0].alpha), self.max_memory)

    def _cross(self, x: Tensor) -> Tensor:
        """K(x, X), shape (T·C, N·C)."""
        kept = self._training_side()
        source = kept.factors if kept.factors is not None else self.train_inputs[0]
        return self.lin.weighted_gram(x, source, self.kernel.precision.reciprocal(), self.max_memory)

    def _training_side(self) -> _Kept:
        """Passes over the training data: made once, whatever the hyper-parameters."""
        x = self.train_inputs[0]
        if self._kept is None or self._kept.x is not x:
            # Tensors made in inference mode would break every later gradient.
            with torch.inference_mode(False):
                self._kept = _Kept.build(self.lin, self.mean_module, x, self.max_memory)
        return self._kept

    def _gram(self) -> Tensor:
        return self._training_side().grams.weighted_sum(self.kernel.precision.detach().reciprocal().to(torch.float64))

    def _noise(self) -> LinearOperator:
        """Covariance of the observation noise of the training data."""
        return self.likelihood._shaped_noise_covar(self.train_targets.shape)

    def _factors(self) -> tuple[GaussianFactors | SoftmaxFactors, NeuralTangentKernel]:
        """Factors at the present hyper-parameters with the kernel as a constant of them, kept until one changes."""
        kept = self._training_side()
        key = (self.curvature, self.likelihood, kept)
        state = [self.kernel.precision, *self.likelihood.parameters(), self.train_targets]
        if has_fixed_noise(self.likelihood):
            state.append(self.likelihood.noise_covar.noise)
        if self.prediction_strategy is not None:
            (old_key, old_state), found = self.prediction_strategy
            unchanged = all(a is b or (isinstance(a, str) and a == b) for a, b in zip(old_key, key, strict=True))
            if unchanged and all(torch.equal(a, b) for a, b in zip(old_state, state, strict=True)):
                return found
        with torch.inference_mode(False), torch.no_grad():
            factors: GaussianFactors | SoftmaxFactors
            if self.is_classification:
                factors = SoftmaxFactors.build(
                    self._gram(), kept.outputs, kept.offset, self.train_targets, self.curvature
                )
            else:
                targets = self.train_targets.reshape(-1) - kept.offset.reshape(-1)
                factors = GaussianFactors.build(self._gram(), self._noise(), targets)
        # The factors carry no graph to the hyper-parameters, and half a gradient is worse than none.
        prior = NeuralTangentKernel(self.lin, max_memory=self.max_memory).to(self.kernel.raw_precision)
        prior.precision = self.kernel.precision.detach()
        found = factors, prior.requires_grad_(False)
        self.prediction_strategy = (key, [value.detach().clone() for value in state]), found
        return found

    def evidence_problem(self, *, at: str = "theta_star", curvature: str = "simple", targets: str = "data") -> Problem:
        """What determines the evidence (see :func:`~ntkgp.fit_evidence`); no network pass after the first call.

        The posterior of a classification uses the `curvature` asked for here from now on.
        """
        if targets == "residual" and self.mean == "posterior":
            raise ValueError(
                "targets='residual' centres the prior at the trained weights, mean='posterior' reports the mode of the "
                "prior centred at zero; use mean='network'"
            )
        kept = self._training_side()
        shared = {"group_names": self.lin.groups.names, "group_sizes": self.lin.groups.sizes}
        if targets == "data":
            shared["tangent_theta"] = kept.tangent_theta
            shared["theta_norms"] = self.lin.groups.sum_per_group(self.lin.theta.to(torch.float64).square())
        offset = kept.offset if targets == "data" else kept.outputs
        if self.is_classification:
            self.curvature = curvature
            return SoftmaxEvidence(kept.grams, kept.outputs, offset, self.train_targets, curvature, **shared)
        y = self.train_targets.reshape(-1)
        return GaussianEvidence(
            kept.grams, y - offset.reshape(-1), NoiseLink(self.likelihood, len(kept.outputs), self.num_outputs).model(),
            self.num_outputs, observations=y, **shared,
        )  # fmt: skip

    def set_hyperparameters(self, precision: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Write group precisions (G,) and learned noise variances; return what their constraints let through."""
        self.kernel.precision = precision
        stored = self.kernel.precision.detach().clone()
        if noise is None:
            return stored, None
        return stored, NoiseLink(self.likelihood, len(self.train_inputs[0]), self.num_outputs).write(noise)

    def sample_functions(self, num_samples: int, generator: torch.Generator | None = None) -> FunctionSamples:
        r"""Draw functions from the posterior by Matheron's rule in weight space.

        :math:`w_s = w + \Lambda^{-1}J^\top v`, :math:`w \sim N(0,\Lambda^{-1})`,
        :math:`v = -(K+\sigma^2 I)^{-1}(Jw + \varepsilon)` (Wilson et al. 2020).

        :param num_samples: S ≥ 1.
        :param generator: makes the draw reproducible; the global random state is used without it.

        Cost: S forward-mode and S backward passes over the training data, O(S·(NC)²); memory S·P.

        >>> import gpytorch, ntkgp
        >>> x = torch.randn(10, 2)
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 1), x)
        >>> model = ntkgp.ExactNTKGP(x, x[:, 0], gpytorch.likelihoods.GaussianLikelihood(), lin).eval()
        >>> draw = model.sample_functions(5, torch.Generator().manual_seed(0))
        >>> draw(x).shape
        torch.Size([5, 10])
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected a positive number, got {num_samples}")
        lin, x = self.lin, self.train_inputs[0]
        with torch.no_grad():
            scale = lin.groups.expand(self.kernel.precision.detach().rsqrt())
            draw = torch.randn(
                num_samples, lin.num_parameters, generator=generator, dtype=torch.float64, device=scale.device
            )
            weights = draw * scale
            prior = lin.jvp(x, weights).to(torch.float64).flatten(1)
            dual = self._factors()[0].pathwise(prior, generator)
            pulled = lin.vjp(x, dual.reshape(num_samples, len(x), -1).to(lin.dtype))
            weights = weights + pulled.to(torch.float64) * scale.square()
        return FunctionSamples(lin, self._mean_of_now(), weights)


def matrices_of_fit(rows: int) -> int:
    """Bytes of the N·C × N·C matrices that a fit holds beside the Grams: their sum, factors, inverse and workspace."""
    return 8 * 8 * rows**2


@dataclass(frozen=True)
class _Kept:
    """What one visit to the training data leaves behind; independent of every hyper-parameter.

    :param x: the training inputs, packed.
    :param grams: K_g, shape (G, N·C, N·C), half of the entries, in memory or on disk.
    :param outputs: f, shape (N, C).
    :param offset: f − Jθ̃ as the prior mean gives it, shape (N, C).
    :param tangent_theta: J_g θ̃_g, shape (G, N·C).
    :param factors: what the layers saw and what came back to them, where it fits.
    """

    x: Tensor
    grams: SymmetricGrams
    outputs: Tensor
    offset: Tensor
    tangent_theta: Tensor
    factors: Factors | None

    @classmethod
    def build(cls, lin: LinearizedNetwork, prior_mean: LinearizedMean, x: Tensor, max_memory: int) -> _Kept:
        n, groups = len(x) * lin.num_outputs, len(lin.groups)
        with torch.no_grad():
            reserved, held = matrices_of_fit(n), SymmetricGrams.size_of(groups, n)
            storage = "memory" if held + reserved <= max_memory or x.device.type != "cpu" else "disk"
            taken = reserved + (held if storage == "memory" else 0)
            factors = lin.factors(x, max_memory) if taken + lin.factors_memory(len(x)) <= max_memory else None
            grams = lin.symmetric_grams(x if factors is None else factors, max_memory, storage=storage)
            index = torch.arange(groups, device=lin.theta.device).unsqueeze(-1)
            masked = lin.theta * (lin.groups.index.to(lin.theta.device) == index)
            tangent = lin.jvp(x, masked).to(torch.float64).flatten(1)
            outputs = lin(x).to(torch.float64)
            return cls(x, grams, outputs, prior_mean(x).reshape_as(outputs), tangent, factors)
