"""Exact Gaussian-process inference with the tangent kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import GP, ExactGP
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ntkgp.evidence.problem import AnyProblem
from ntkgp.kernels import NeuralTangentKernel
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import check_count
from ntkgp.linearization.memory import format_memory, parse_memory
from ntkgp.linearization.statistics import rows_at_a_time
from ntkgp.means import LinearizedMean, NetworkMean
from ntkgp.models.batches import Batches, packed_inputs, shaped_targets
from ntkgp.models.certified import Certified
from ntkgp.models.dual import DualSide
from ntkgp.models.forms import Form, choose_form
from ntkgp.models.network_gp import NetworkGP
from ntkgp.models.noise import NoiseLink, has_fixed_noise, prepare_likelihood
from ntkgp.models.paths import FixedMean, FunctionSamples
from ntkgp.models.posterior import PosteriorCovariance
from ntkgp.models.primal import PrimalSide, SavedSide

logger = logging.getLogger("ntkgp")

CURVATURES = ("simple", "quadratic", "full")


class ExactNTKGP(Certified, NetworkGP, ExactGP):
    r"""The trained network as an exact Gaussian process.

    The tangent model :math:`h(x;\theta) = f(x;\tilde\theta) + J(x)(\theta-\tilde\theta)` with the prior
    :math:`\theta \sim N(0, \Lambda^{-1})` is

    .. math:: h \sim GP\big(f(x;\tilde\theta) - J(x)\tilde\theta,\; J(x)\Lambda^{-1}J(x')^\top\big),

    so that GPyTorch's marginal likelihood of ``model(train_x)`` in train mode *is* the evidence at θ⋆ (Antorán et al.
    2022). In eval mode ``model(x)`` is the latent posterior and ``model.likelihood(model(x))`` the predictive
    distribution. Gaussian likelihoods are conditioned on exactly; categorical and Bernoulli ones by the Laplace–GGN
    approximation with the full C × C curvature, in data space.

    There are two forms with the same results (``model.form``, also in ``repr`` and the logger ``"ntkgp"``):

    * *dual*, in data space: N·C × N·C Grams;
    * *primal*, in weight space: one pass gathers what JᵀWJ and JᵀWt say in P × P numbers: at most P rows for each noise
      variance that stand for all N·C (:mod:`ntkgp.evidence.primal`). N is not limited. θ⋆ of a classification is found
      by quasi-Newton steps over further passes.

    All algebra is in float64, the network's passes in its own dtype. What the passes leave behind is kept: later
    predictions make no pass over the training data, except for θ⋆ of a classification in weight space.

    :param train_x: N inputs as the network takes them, or packed; or, with ``train_y=None``, a Dataset or DataLoader of
        pairs (or dicts with ``"labels"``), which is passed over in weight space and never copied.
    :param train_y: (N,) or (N, 1) for one output, else (N, C) or (N, *output_shape); class labels (N,).
    :param likelihood: ``GaussianLikelihood``, ``FixedNoiseGaussianLikelihood``, ``MultitaskGaussianLikelihood``,
        :class:`~ntkgp.CategoricalLikelihood` or :class:`~ntkgp.likelihoods.BernoulliLikelihood`; moved to float64.
        For several outputs a ``GaussianLikelihood`` is wrapped (``model.likelihood``) and shares its noise with it.
    :param lin: the linearised network.
    :param mean: ``"network"`` (the predictive mean is exactly the network's output) or ``"posterior"`` (h at θ⋆).
    :param max_memory: budget for the Grams, and another of the same size for the kept Jacobian rows.
    :param progress: show a progress bar for passes over a loader, or over tensors in weight space.
    :param form: ``"auto"`` (the rule: :func:`~ntkgp.models.forms.choose_form`), ``"dual"`` or ``"primal"``.
    :raises ValueError: NaN or infinite data (a batch is named by its index), N = 0, other shapes, labels out of range,
        an unknown `mean` or `form`, weight space that does not fit in `max_memory` (with the bytes that it needs), a
        noise covariance between outputs or fixed noise of a loader in weight space.
    :raises TypeError: another likelihood, other data.

    Cost: dual: O(N²C²P) once for the Grams (G·(NC)² numbers), O((NC)³) per set of hyper-parameters; then per test input
    C backward passes, O(NC²P) for the cross-covariance and O((NC)²C) for the variance. Primal: 2·N·C·P² flops once,
    P² numbers per noise variance; then as the dual with n ≤ P compressed rows per noise variance in place of N·C.

    >>> import gpytorch, ntkgp
    >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x)
    >>> model = ntkgp.ExactNTKGP(x, torch.sin(3 * x), gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> report = ntkgp.fit_evidence(model)
    >>> posterior = model.eval()(torch.zeros(2, 1))
    >>> torch.equal(posterior.mean, net(torch.zeros(2, 1)).squeeze(-1).double()), posterior.variance.shape
    (True, torch.Size([2]))
    >>> data = torch.utils.data.TensorDataset(x, torch.sin(3 * x))
    >>> streamed = ntkgp.ExactNTKGP(data, None, gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> streamed.form, abs(ntkgp.fit_evidence(streamed).log_evidence - report.log_evidence) < 1e-4
    ('primal', True)
    """

    def __init__(
        self,
        train_x: Any,
        train_y: Tensor | None,
        likelihood: gpytorch.likelihoods.Likelihood,
        lin: LinearizedNetwork,
        mean: str = "network",
        *,
        max_memory: str | int | float = "2GiB",
        form: str = "auto",
        progress: bool = False,
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
        self._asked_form, self._progress = form, progress
        self._source: _Source | None = None
        self._set_data(train_x, train_y)
        self.mean_module = LinearizedMean(lin)
        self._network_mean = NetworkMean(lin)
        self.kernel = NeuralTangentKernel(lin, max_memory=max_memory).to(torch.float64)
        self.prediction_strategy: Any = None
        self._kept: DualSide | PrimalSide | None = train_x if isinstance(train_x, SavedSide) else None
        logger.info("ExactNTKGP in %s form: %s", self.form, self._form.reason)

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
    def form(self) -> str:
        """In which space the model works, ``"dual"`` or ``"primal"``; decided by the data's size."""
        return self._form.name

    def extra_repr(self) -> str:
        """Form, size and memory."""
        return (
            f"form={self.form!r} ({self._form.reason}; {format_memory(self._form.nbytes)} beside the Grams), "
            f"mean={self.mean!r}"
        )

    def _set_data(self, x: Any, y: Tensor | None) -> None:
        """Take training data and choose the form."""
        if isinstance(x, SavedSide):
            self._form: Form = x.saved_form
            self._source, self.train_inputs, self.train_targets = _Source(x), None, None
            return
        if isinstance(x, Dataset | DataLoader):
            if y is not None:
                raise TypeError(f"train_y: expected None beside a {type(x).__name__}, which yields the targets")
            if self._asked_form == "dual":
                raise ValueError(f"form: 'dual' needs tensors; a {type(x).__name__} is passed over in weight space")
            batches = Batches.of(x, self.lin, self.likelihood)
            size = None if has_fixed_noise(self.likelihood) else _known_size(batches)
            self._form = choose_form("primal", self.lin, self.likelihood, size, self.max_memory)
            self._source, self.train_inputs, self.train_targets = _Source(batches), None, None
            return
        packed = self._pack(x, "train_x").detach().clone()
        targets = self._targets(y, len(packed))
        self._form = choose_form(self._asked_form, self.lin, self.likelihood, len(packed), self.max_memory)
        self._source, self.train_inputs, self.train_targets = None, (packed,), targets

    def _targets(self, train_y: Any, num_rows: int) -> Tensor:
        """Targets in GPyTorch's shape: (N,) for one output and for labels, else (N, C)."""
        return shaped_targets(train_y, self.lin, self.is_classification, num_rows, "train_y")

    def set_train_data(self, inputs: Any = None, targets: Tensor | None = None, strict: bool = True) -> None:
        """Replace the training data, given as to the constructor; the hyper-parameters stay.

        :param strict: require the number of rows to stay the same, as GPyTorch does; of tensors only.
        """
        if isinstance(inputs, tuple | list) and len(inputs) == 1:
            inputs = inputs[0]
        if self._source is not None or isinstance(inputs, Dataset | DataLoader):
            if inputs is None:
                raise ValueError("inputs: expected new data, the targets of a loader come with its inputs; got None")
            self._set_data(inputs, targets)
            self.prediction_strategy = self._kept = None
            return
        assert self.train_inputs is not None
        old = self.train_inputs[0]
        x = old if inputs is None else self._pack(inputs, "inputs").detach().clone()
        if strict and x.shape != old.shape:
            raise RuntimeError(f"inputs: expected shape {tuple(old.shape)} (strict=True), got {tuple(x.shape)}")
        y = self._targets(self.train_targets if targets is None else targets, len(x))
        if len(x) != len(old):
            self._form = choose_form(self._asked_form, self.lin, self.likelihood, len(x), self.max_memory)
        self.train_targets = y
        self.prediction_strategy = None
        if not torch.equal(x, old):
            self.train_inputs = (x,)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors travel with the model; what a loader gave may not be there to be passed over again.
        kept = None if self._source is None else self._kept
        return {**self.__dict__, "_kept": kept, "prediction_strategy": None}

    def _saved(self, training_data: bool) -> dict[str, Any]:
        """What the model is made of again, beside its parameters and its likelihood; for a file."""
        options = {"mean": self.mean, "max_memory": self.max_memory, "form": self.form}
        if training_data:
            if self.train_inputs is None:
                raise ValueError(
                    "training_data: those of a DataLoader or of a file are not the model's; expected False"
                )
            return {"kind": "data", "model": options, "x": self.train_inputs[0], "y": self.train_targets}
        if self.form == "dual":
            raise ValueError(
                "training_data: in data space (form='dual') predictions need the training inputs; save the model with "
                "training_data=True, or make it with form='primal', whose factors need none"
            )
        factors = self._factors()[0]
        return {"kind": "factors", "model": options, "side": self._training_side().saved(self, factors)}

    @classmethod
    def _from_saved(cls, lin: LinearizedNetwork, likelihood: Any, state: dict[str, Any]) -> ExactNTKGP:
        """Inverse of :meth:`_saved`."""
        if state["kind"] == "data":
            return cls(state["x"], state["y"], likelihood, lin, **state["model"])
        model = cls(SavedSide(lin, state["side"]), None, likelihood, lin, **state["model"])
        assert isinstance(model._kept, SavedSide)
        model._kept.prior_mean = model.mean_module
        return model

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at packed inputs: mean f(x; θ̃) − J(x)θ̃, covariance the tangent kernel."""
        return self._distribution(self.mean_module(x), self.kernel(x))

    def _pack(self, x: Any, name: str) -> Tensor:
        """Raw or packed inputs, (N,) where D = 1, as packed float64."""
        return packed_inputs(x, self.lin, name)

    def _apply(self, fn: Any) -> ExactNTKGP:
        """Moves between devices; ``float()`` and ``half()`` change nothing, since all algebra is in float64."""
        self._kept = self._kept.moved(fn) if isinstance(self._kept, SavedSide) else None
        self.prediction_strategy = None
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device))

    def __call__(self, x: Any, **kwargs: Any) -> MultivariateNormal:
        """Train mode: the prior at the training inputs. Eval mode: the latent posterior at any inputs."""
        packed = self._inputs(x)
        if self.training and self._source is not None:
            raise RuntimeError(
                "a model of a DataLoader holds no training inputs for a prior at them: fit it by ntkgp.fit_evidence, "
                "and call model.eval() for predictions"
            )
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
        return self._distribution(mean, covariance)

    def _mean(self, x: Tensor, cross: Tensor | None = None) -> Tensor:
        """The reported predictive mean, (N, D) -> (N, C)."""
        if self.mean == "network":
            return self._network_mean(x).reshape(len(x), -1)
        shift = self._training_side().shift(x, self._factors()[0], self.kernel.precision, cross)
        return self.mean_module(x).reshape(len(x), -1) + shift

    def _mean_of_now(self) -> Callable[[Tensor], Tensor]:
        """The reported predictive mean, whatever becomes of the model."""
        if self.mean == "network":
            return FixedMean(self._network_mean)
        return self._training_side().posterior_mean(self._factors()[0], self.kernel.precision.detach())

    def _cross(self, x: Tensor) -> Tensor:
        """K(x, X) with the rows that the factors condition on: the training data, or what they are compressed to."""
        return self._training_side().cross(x, self.kernel.precision, self._factors()[0])

    def _training_side(self) -> Any:
        """Passes over the training data: made once, whatever the hyper-parameters."""
        x = None if self.train_inputs is None else self.train_inputs[0]
        kept = self._kept
        if kept is None or kept.form != self.form or not kept.is_of(x, self.train_targets, self.likelihood):
            # Tensors made in inference mode would break every later gradient.
            with torch.inference_mode(False):
                self._kept = self._visit(x)
        return self._kept

    def _visit(self, x: Tensor | None) -> DualSide | PrimalSide:
        """Pass over the training data."""
        if self.form == "dual" and x is not None:
            return DualSide.build(self.lin, self.mean_module, x, self.max_memory)
        data = None if x is None or self.train_targets is None else (x, self.train_targets)
        if data is not None:
            step = rows_at_a_time(self.lin, self.max_memory)
            batches = Batches(data, self.lin, self.is_classification, "train_data", step)
        else:
            assert self._source is not None
            batches = self._source.batches
        device = self.kernel.raw_precision.device
        return PrimalSide.build(
            self.lin, self.mean_module, batches, self.likelihood, self.max_memory, device, data, self._progress
        )

    @property
    def _num_data(self) -> int:
        """N; of a loader known after the first pass."""
        return len(self.train_inputs[0]) if self.train_inputs is not None else self._training_side().num_data

    def _factors(self) -> tuple[Any, NeuralTangentKernel]:
        """Factors at the present hyper-parameters with the kernel as a constant of them, kept until one changes."""
        kept = self._training_side()
        key = (self.curvature, self.likelihood, kept)
        state = [self.kernel.precision, *self.likelihood.parameters()]
        if self.train_targets is not None:
            state.append(self.train_targets)
        if has_fixed_noise(self.likelihood):
            state.append(self.likelihood.noise_covar.noise)
        if self.prediction_strategy is not None:
            (old_key, old_state), found = self.prediction_strategy
            unchanged = all(a is b or (isinstance(a, str) and a == b) for a, b in zip(old_key, key, strict=True))
            if unchanged and all(torch.equal(a, b) for a, b in zip(old_state, state, strict=True)):
                return found
        with torch.inference_mode(False), torch.no_grad():
            precision = self.kernel.precision.detach()
            factors = kept.condition(precision, self.likelihood, self.train_targets, self.curvature)
        # The factors carry no graph to the hyper-parameters, and half a gradient is worse than none.
        prior = NeuralTangentKernel(self.lin, max_memory=self.max_memory).to(self.kernel.raw_precision)
        prior.precision = self.kernel.precision.detach()
        found = factors, prior.requires_grad_(False)
        self.prediction_strategy = (key, [value.detach().clone() for value in state]), found
        return found

    def evidence_problem(
        self, *, at: str = "theta_star", curvature: str = "simple", targets: str = "data"
    ) -> AnyProblem:
        """What determines the evidence (see :func:`~ntkgp.fit_evidence`); no network pass after the first call.

        The posterior of a classification uses the `curvature` asked for here from now on.
        """
        if targets == "residual" and self.mean == "posterior":
            raise ValueError(
                "targets='residual' centres the prior at the trained weights, mean='posterior' reports the mode of the "
                "prior centred at zero; use mean='network'"
            )
        if self.is_classification:
            self.curvature = curvature
        return self._training_side().problem(self.likelihood, self.train_targets, curvature, targets)

    def set_hyperparameters(self, precision: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Write group precisions (G,) and learned noise variances; return what their constraints let through."""
        self.kernel.precision = precision
        stored = self.kernel.precision.detach().clone()
        if noise is None:
            return stored, None
        return stored, NoiseLink(self.likelihood, self._num_data, self.num_outputs).write(noise)

    def sample_functions(self, num_samples: int, generator: torch.Generator | None = None) -> FunctionSamples:
        r"""Draw functions from the posterior by Matheron's rule in weight space.

        :math:`w_s = w + \Lambda^{-1}J^\top v`, :math:`w \sim N(0,\Lambda^{-1})`,
        :math:`v = -(K+\sigma^2 I)^{-1}(Jw + \varepsilon)` (Wilson et al. 2020).

        :param num_samples: S ≥ 1.
        :param generator: makes the draw reproducible; the global random state is used without it.

        Cost: dual: S forward-mode and S backward passes over the training data, O(S·(NC)²). Primal: O(S·n·P), no pass.
        Memory S·P.

        >>> import gpytorch, ntkgp
        >>> x = torch.randn(10, 2)
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 1), x)
        >>> model = ntkgp.ExactNTKGP(x, x[:, 0], gpytorch.likelihoods.GaussianLikelihood(), lin).eval()
        >>> draw = model.sample_functions(5, torch.Generator().manual_seed(0))
        >>> draw(x).shape
        torch.Size([5, 10])
        """
        check_count(num_samples, "num_samples")
        lin = self.lin
        with torch.no_grad():
            precision = self.kernel.precision.detach()
            scale = lin.groups.expand(precision.rsqrt())
            draw = torch.randn(
                num_samples, lin.num_parameters, generator=generator, dtype=torch.float64, device=scale.device
            )
            weights = draw * scale
            side, factors = self._training_side(), self._factors()[0]
            weights = weights + side.pathwise(weights, precision, factors, generator)
        return FunctionSamples(lin, self._mean_of_now(), weights)


def _known_size(batches: Batches) -> int | None:
    """N where it is known before the first pass."""
    try:
        return batches.num_data
    except ValueError:
        return None


class _Source:
    """A loader that copies of a model share: data are not copied behind the user's back."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __deepcopy__(self, memo: dict[int, Any]) -> _Source:
        return self
