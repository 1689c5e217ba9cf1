"""Variational inference with inducing inputs and the network as fixed mean."""

from __future__ import annotations

import os
import warnings
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.models import ApproximateGP
from torch import Tensor
from tqdm import tqdm

from ntkgp.checkpoint import Checkpoint
from ntkgp.evidence.single_pass import one_pass
from ntkgp.evidence.streaming import StreamedEvidence
from ntkgp.kernels import NeuralTangentKernel
from ntkgp.kernels.composition import SharedKernel, outputs_of
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import check_count
from ntkgp.linearization.memory import parse_memory
from ntkgp.means import LinearizedMean, NetworkMean
from ntkgp.models.batches import Batches
from ntkgp.models.network_gp import NetworkGP
from ntkgp.models.noise import NoiseLink, has_fixed_noise, prepare_likelihood
from ntkgp.models.paths import FixedMean, FunctionSamples
from ntkgp.models.variational.fit import BATCH, FitHistory, fit_variational
from ntkgp.models.variational.inducing import checked_inducing_points, checked_output_index
from ntkgp.models.variational.objective import Objective
from ntkgp.models.variational.optimum import Statistics, gather
from ntkgp.models.variational.products import KernelProducts
from ntkgp.models.variational.strategy import FixedMeanStrategy


class VariationalNTKGP(NetworkGP, ApproximateGP):
    r"""The trained network as the mean of a sparse variational Gaussian process (VaLLA and fixed-mean GPs).

    With M' inducing rows Z, a free matrix L, :math:`A = L(I + L^\top K_Z L)^{-1}L^\top` and the kernel K,

    .. math:: q(f) = GP\big(f(x; \tilde\theta),\; K(x, x') - K_{xZ} A K_{Zx'}\big),

    which is fitted by minibatches at a cost that does not grow with N per step. For the tangent kernel and the ELBO it
    approximates the exact Laplace–GP covariance of :class:`~ntkgp.ExactNTKGP` (equal for Z = X); for given Z the best L
    is known in closed form (Titsias 2009), for Gaussian likelihoods and for the second-order expansion of a
    classification. Any GPyTorch kernel may take the tangent kernel's place.

    A GPyTorch ``ApproximateGP``: ``gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data)`` works in a loop
    of your own. The variance is no bound of the exact one in either direction.

    :param inducing_points: M inputs as the network takes them, or packed; see
        :func:`~ntkgp.models.variational.inducing.kmeans_inducing_points`.
    :param likelihood: as of :class:`~ntkgp.ExactNTKGP`, but noise given per training point.
    :param lin: the linearised network.
    :param num_data: N, the number of training points that a minibatch stands for.
    :param output_index: one output of every inducing point, integers (M,); by default all C of them: M' = M·C.
    :param learn_inducing: whether the inducing inputs are optimised; not for integer inputs.
    :param objective: ``"elbo"``, or a number α in (0, 1] for the black-box α objective; 1 is that of VaLLA's code, the
        log predictive density (probit for classification; other α by Monte Carlo).
    :param kernel: another GPyTorch kernel, on packed inputs, with one output (independent copies for the C outputs) or
        with C; moved to float64. The tangent kernel by default.
    :param mean: ``"network"``, or ``"posterior"`` for m0(x) + K_xZ a, the variational posterior mean of the tangent
        model, after a fit.
    :param expectation: of the ELBO of a classification: ``"ggn"``, the second-order expansion at the network's logits
        (Laplace–GGN), or ``"mc"``, Monte Carlo on the likelihood itself.
    :param learn_hyperparameters: learn kernel and noise in the fit. By default only those of another kernel: precisions
        of the tangent kernel come from the evidence. Their objective then has a second term, with a mean of its own
        that pays its price under the prior (Ortega et al. 2024b): a fixed mean holds no prior scale back.
    :param max_memory: of one product with the tangent kernel and what is made of it; gradients to inducing inputs or
        hyper-parameters come on top.
    :raises ValueError: inputs of other shapes, NaN, M = 0, an index or α out of range, integer inputs to be learned, a
        `max_memory` that does not hold the products; the message gives the smallest.
    :raises TypeError: another likelihood, kernel or index.

    Cost per step of B inputs: O(M'³ + B·C·M'²), the passes over B + M inputs and their kernel products. Memory: M'² and
    one batch.

    Ortega, Rodríguez-Santana & Hernández-Lobato, *Variational linearized Laplace approximation*, ICML 2024.

    >>> import gpytorch, ntkgp
    >>> x = torch.linspace(-1, 1, 40).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x)
    >>> likelihood = gpytorch.likelihoods.GaussianLikelihood()
    >>> model = VariationalNTKGP(x[::4], likelihood, lin, num_data=40)
    >>> posterior = model.fit((x, torch.sin(3 * x)), progress=False)(torch.zeros(2, 1))
    >>> torch.equal(posterior.mean, net(torch.zeros(2, 1)).squeeze(-1).double()), posterior.variance.shape
    (True, torch.Size([2]))
    """

    variational_strategy: FixedMeanStrategy
    _output_index: Tensor | None

    def __init__(
        self,
        inducing_points: Any,
        likelihood: gpytorch.likelihoods.Likelihood,
        lin: LinearizedNetwork,
        num_data: int,
        *,
        output_index: Tensor | None = None,
        learn_inducing: bool = True,
        objective: str | float = "elbo",
        kernel: Kernel | None = None,
        mean: str = "network",
        expectation: str = "ggn",
        learn_hyperparameters: bool | None = None,
        max_memory: str | int | float = "2GiB",
    ) -> None:
        if not isinstance(lin, LinearizedNetwork):
            raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
        if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < 1:
            raise ValueError(f"num_data: expected a positive integer, got {num_data!r}")
        super().__init__(None)
        object.__setattr__(self, "lin", lin)
        self.max_memory, self.num_data = parse_memory(max_memory), num_data
        self.likelihood = prepare_likelihood(likelihood, lin.num_outputs)
        if has_fixed_noise(self.likelihood):
            raise ValueError(
                "likelihood: FixedNoiseGaussianLikelihood gives a noise to each training row, and a minibatch does not "
                "say which rows it holds; use GaussianLikelihood, or ntkgp.ExactNTKGP"
            )
        self.objective = Objective(objective, expectation, self.is_classification)
        self.kernel = self._prepare_kernel(kernel)
        self.learn_hyperparameters = kernel is not None if learn_hyperparameters is None else learn_hyperparameters
        if not self.learn_hyperparameters:
            self.kernel.requires_grad_(False)
        points = checked_inducing_points(lin, inducing_points, learn_inducing)
        index = checked_output_index(lin, output_index, len(points))
        self.register_buffer("_output_index", index)
        self.products = KernelProducts(self.kernel, lin, index, self.max_memory)
        closed = self.objective.is_closed_form and not (learn_inducing or self.learn_hyperparameters)
        self.products.check_memory(len(points), 1 if closed else min(num_data, BATCH))
        self.mean_module = NetworkMean(lin)
        self._prior_mean = LinearizedMean(lin) if self.products.is_tangent else None
        self.mean = mean
        rows = self.products.num_rows(len(points))
        self.variational_strategy = FixedMeanStrategy(self, points, rows, learn_inducing)
        dual = torch.zeros(rows, dtype=torch.float64, device=points.device)
        self.register_parameter("dual_mean", torch.nn.Parameter(dual, self.learn_hyperparameters))
        # Written by the fit; the posterior mean of a loaded model depends on it.
        self.register_buffer("_fitted", torch.tensor(False))
        self.history: FitHistory | None = None
        self._fitting = False
        self._data: Batches | None = None
        self.reset_variational()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def _prepare_kernel(self, kernel: Kernel | None) -> Kernel:
        lin = self.lin
        if kernel is None:
            return NeuralTangentKernel(lin, max_memory=self.max_memory).to(torch.float64)
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel: expected a gpytorch Kernel, got {type(kernel).__name__}")
        if kernel.batch_shape:
            raise ValueError(f"kernel: expected no batch shape, got {tuple(kernel.batch_shape)}")
        kernel = kernel.to(torch.float64)
        found = outputs_of(kernel, lin.input_width)
        if found == 1 and lin.num_outputs > 1:
            return SharedKernel(kernel, lin.num_outputs)
        if found != lin.num_outputs:
            raise ValueError(f"kernel: expected 1 or C = {lin.num_outputs} outputs per input, got {found}")
        return kernel

    def _check_mean(self, value: str) -> None:
        if value == "posterior" and not self.products.is_tangent:
            raise ValueError("mean='posterior' is that of the tangent model; with another kernel use mean='network'")

    @property
    def inducing_points(self) -> Tensor:
        """Z, packed, (M, D)."""
        return self.variational_strategy.inducing_points

    @property
    def output_index(self) -> Tensor | None:
        """The output of each inducing point, or None for all."""
        return self._output_index

    def reset_variational(self) -> None:
        """Set L to a multiple of the identity in the units of the kernel, where its gradient is not zero."""
        with torch.no_grad():
            root = self.variational_strategy.variational_root
            z = self.inducing_points.detach()
            scale = self.products.blocks(z).diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30).rsqrt()
            root.copy_(scale * torch.eye(len(root), dtype=root.dtype, device=root.device))
            self.dual_mean.zero_()
            self._fitted.fill_(False)

    def network_outputs(self, x: Tensor) -> Tensor:
        """The network at packed inputs (N, D) -> (N, C)."""
        return self.mean_module(x).reshape(len(x), -1)

    def prior_mean(self, x: Tensor) -> Tensor:
        """m0 = f − Jθ̃ under the tangent kernel and zero under another one, (N, D) -> (N, C)."""
        if self._prior_mean is None:
            return x.new_zeros(len(x), self.num_outputs)
        return self._prior_mean(x).reshape(len(x), -1)

    def predictive_mean(self, x: Tensor, cross: Tensor) -> Tensor:
        """The reported mean at packed inputs, (N, D) -> (N, C), given K(x, Z)."""
        if self.mean == "network":
            return self.network_outputs(x)
        if not bool(self._fitted):
            raise RuntimeError("mean='posterior': fit the model first, or use mean='network'")
        return self.prior_mean(x) + (cross @ self.dual_mean).reshape(len(x), -1)

    def _saved(self, training_data: bool) -> dict[str, Any]:
        """What the model is made of again, beside its parameters and its likelihood; for a file."""
        if not self.products.is_tangent:
            raise TypeError(
                "save: this model has a kernel of the user's own, which is in no file; keep its state_dict()"
            )
        if training_data and (self._data is None or not self._data.in_memory):
            raise ValueError("training_data: the model holds none, or those of a loader; expected False")
        options = {
            "learn_inducing": self.inducing_points.requires_grad, "objective": self.objective.power or "elbo",
            "expectation": self.objective.expectation, "mean": self.mean, "max_memory": self.max_memory,
            "learn_hyperparameters": self.learn_hyperparameters, "num_data": self.num_data,
            "output_index": self.output_index,
        }  # fmt: skip
        data = self._data.collect() if training_data and self._data is not None else None
        return {"model": options, "points": self.inducing_points.detach(), "data": data}

    @classmethod
    def _from_saved(
        cls, lin: LinearizedNetwork, likelihood: gpytorch.likelihoods.Likelihood, state: dict[str, Any]
    ) -> VariationalNTKGP:
        """Inverse of :meth:`_saved`."""
        model = cls(state["points"], likelihood, lin, **state["model"])
        if state["data"] is not None:
            model._data = model._batches(state["data"], None)
        return model

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior around the network's outputs at packed inputs (*batch, N, D)."""
        return self._distribution(self.mean_module(x), self.kernel(x))

    def __call__(self, inputs: Any, prior: bool = False, **kwargs: Any) -> MultivariateNormal:
        """The latent process at any inputs; in train mode with the graph to everything that is learned."""
        return self.variational_strategy(self._inputs(inputs), prior=prior)

    def _apply(self, fn: Any) -> VariationalNTKGP:
        """Moves between devices; ``float()`` and ``half()`` change nothing, since all algebra is in float64."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device))

    def _warn_of_free_hyperparameters(self) -> None:
        if self.learn_hyperparameters and not self._fitting:
            warnings.warn(
                "the mean is fixed and pays no price under the prior: with this objective alone nothing ties the "
                "kernel's scale to the data. Use model.fit, which adds a term that does, or "
                "learn_hyperparameters=False",
                UserWarning,
                stacklevel=3,
            )

    def statistics(self, data: Any, *, batch_size: int | None = None, progress: bool = False) -> Statistics:
        """One pass over the data at the present inducing inputs and hyper-parameters.

        The result gives the collapsed bound of the tangent model and the optimum of L.
        """
        return gather(self, self._batches(data, batch_size), progress)

    def set_optimum(self, data: Any, *, batch_size: int | None = None, progress: bool = False) -> Statistics:
        r"""Set L to its optimum for the present inducing inputs, :math:`LL^\top = K_Z^+ K_{ZX} B K_{XZ} K_Z^+`.

        For a Gaussian likelihood, and for the second-order expansion of a classification, nothing is better (Titsias
        2009); for other objectives it is a start. Eigenvalues of K_Z below 1e-10 of the largest are left out.

        :param data: training data, see :meth:`fit`.
        :return: the statistics of the pass.

        Cost: one pass; see :meth:`statistics`.
        """
        found = self.statistics(data, batch_size=batch_size, progress=progress)
        self.adopt(found)
        return found

    def adopt(self, found: Statistics) -> None:
        """Write the optimum that statistics give."""
        with torch.no_grad():
            root = self.variational_strategy.variational_root
            best = found.root()
            root.zero_()
            root[:, : best.shape[1]] = best
            self.dual_mean.copy_(found.dual_mean())
            self._fitted.fill_(True)

    def _batches(self, data: Any, batch_size: int | None, name: str = "train_data") -> Batches:
        return Batches.of(data, self.lin, self.likelihood, batch_size, name)

    def fit(
        self,
        train_data: Any,
        *,
        epochs: int | None = None,
        iterations: int | None = None,
        learning_rate: float = 1e-2,
        batch_size: int | None = None,
        validation: Any = None,
        patience: int = 5,
        evidence: str | None = "auto",
        evidence_rows: int = 1500,
        seed: int = 0,
        progress: bool = True,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    ) -> VariationalNTKGP:
        """Fit hyper-parameters by the evidence, then L and the inducing inputs by the objective.

        With the ELBO and fixed inducing inputs one pass gives the optimum. Learned ones are moved by L-BFGS on the
        collapsed bound where K(X, Z) with its graph fits in ``max_memory``, else, and for all other objectives, by Adam
        on minibatches from the closed-form start; L is then set to its optimum again where that is known. An interrupt
        keeps the best state so far. What happened is in ``model.history``.

        In a process group (:mod:`ntkgp.distributed`) all ranks make this call with all of the data, on models made
        alike. They share the rows of every minibatch and of the closed-form pass; the rest each does by itself.

        :param train_data: ``(x, y)``, a Dataset or a DataLoader; N must be ``num_data``.
        :param epochs: passes of Adam over the data (default 20), or
        :param iterations: steps of Adam, or of L-BFGS (default 120).
        :param learning_rate: of Adam, relative to the size of what it moves.
        :param batch_size: rows per step where `train_data` does not say (default 256).
        :param validation: data on which the predictive log-likelihood is checked after every epoch; the best state is
            restored at the end.
        :param patience: epochs without a better validation score before the fit stops.
        :param evidence: ``"subset"``: precisions and noise by the exact evidence at θ⋆ on a random part of the data;
            ``"bound"``: and then all precisions times one number and all noise times another by the collapsed bound of
            all data, at no further pass; ``"validation"``: and then all precisions times the number between 1e-2 and
            1e4 that predicts the validation data best; None: as they are; ``"auto"``: None if precisions have been
            set or learned before, else ``"validation"`` with validation data, else ``"subset"`` if that is all data and
            ``"bound"`` if not.
        :param evidence_rows: N·C of that part at most.
        :param seed: of the part and of Monte Carlo.
        :param checkpoint: a folder, or a :class:`~ntkgp.checkpoint.Checkpoint`: a call that was killed is repeated on a
            model made alike and goes on with the step where it stood, to the very same state.
        :raises CheckpointMismatch: a checkpoint of another network, another model, other data or other arguments.
        :return: the model, in eval mode.
        :raises ValueError: another N than num_data, bad data, named by their batch.
        """
        return fit_variational(
            self, train_data, epochs=epochs, iterations=iterations, learning_rate=learning_rate,
            batch_size=batch_size, validation=validation, patience=patience, evidence=evidence,
            evidence_rows=evidence_rows, seed=seed, progress=progress, checkpoint=checkpoint,
        )  # fmt: skip

    def elbo(self, data: Any, *, batch_size: int | None = None, progress: bool = False) -> float:
        r"""The variational bound of all data at the present parameters, in nats.

        With ``mean="posterior"`` the ELBO of the tangent model, :math:`\le \log p(y)` for a Gaussian likelihood, its
        Kullback–Leibler term with the part of the mean, ½ aᵀK_Z a. With ``mean="network"`` that part is left out, and
        the number is the objective of the fit but no bound of any evidence.

        Cost: one pass.
        """
        batches = self._batches(data, batch_size)
        with torch.inference_mode(False), torch.no_grad():
            found = self.variational_strategy.reduction()
            total = -float(found.kl)
            if self.mean == "posterior":
                total -= 0.5 * float(self.dual_mean @ found.gram @ self.dual_mean)
            for x, y in tqdm(batches, desc="bound", disable=not progress, unit=" batches"):
                cross = self.variational_strategy.cross(x)
                mean = None if self.mean == "network" else self.predictive_mean(x, cross)
                total += float(self.objective.terms(self, x, y, cross @ found.root, mean, elbo=True).sum())
        return total

    def evidence_problem(
        self, *, at: str = "theta_star", curvature: str = "simple", targets: str = "data"
    ) -> StreamedEvidence:
        """The collapsed bound over the data of the last fit, for :func:`~ntkgp.fit_evidence`; tangent kernel only.

        All outputs of the inducing inputs take part, also with an `output_index`. Once the hyper-parameters are
        written, L is set to its optimum for them.

        Cost: one pass over the data, and another one afterwards.
        """
        if not self.products.is_tangent:
            raise ValueError("fit_evidence fits precisions of the tangent kernel; this model has another kernel")
        if self._data is None:
            raise RuntimeError("fit_evidence: the model has seen no data yet; call model.fit(train_data) first")
        found = one_pass(
            self.lin, self._data, self.likelihood, landmarks=self.inducing_points.detach(),
            num_landmarks=len(self.inducing_points), precision=self.kernel.precision.detach(),
            max_memory=self.max_memory,
        )  # fmt: skip
        return found.evidence_problem(at=at, curvature=curvature, targets=targets)

    def set_hyperparameters(self, precision: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Write group precisions (G,) and learned noise variances; return what their constraints let through.

        After a fit L is set to its optimum for them, by a pass over the data of the fit.
        """
        if not self.products.is_tangent:
            raise ValueError("precision: this model's kernel is not the tangent kernel of its network")
        self.kernel.precision = precision
        stored, written = self.kernel.precision.detach().clone(), None
        if noise is not None:
            written = NoiseLink(self.likelihood, self.num_data, self.num_outputs).write(noise)
        if self._data is not None and not self._fitting:
            self.set_optimum(self._data)
        return stored, written

    def sample_functions(self, num_samples: int, generator: torch.Generator | None = None) -> FunctionSamples:
        r"""Draw functions from the process by Matheron's rule in weight space; tangent kernel only.

        :math:`w_s = w - \Lambda^{-1} J_Z^\top L H^{-1} (L^\top J_Z w + \varepsilon)` with :math:`w \sim N(0,
        \Lambda^{-1})`.

        :param num_samples: S ≥ 1.
        :param generator: makes the draw reproducible; the global random state is used without it.

        Cost: S forward-mode and S backward passes over the inducing inputs; memory S·P.
        """
        check_count(num_samples, "num_samples")
        if not self.products.is_tangent:
            raise ValueError("sample_functions draws weights of the tangent model; this model has another kernel")
        lin, z = self.lin, self.inducing_points.detach()
        with torch.no_grad():
            scale = lin.groups.expand(self.kernel.precision.detach().rsqrt())
            weights = scale * torch.randn(
                num_samples, lin.num_parameters, generator=generator, dtype=torch.float64, device=scale.device
            )
            root = self.variational_strategy.variational_root
            inner = root.mT @ self.products.inducing(z) @ root
            seen = self._select(lin.jvp(z, weights).to(torch.float64)) @ root
            noise = torch.randn(seen.shape, generator=generator, dtype=torch.float64, device=scale.device)
            factor = torch.linalg.cholesky(torch.eye(len(inner), dtype=torch.float64, device=z.device) + inner)
            dual = torch.cholesky_solve((seen + noise).mT, factor).mT @ root.mT
            weights = weights - lin.vjp(z, self._spread(dual).to(lin.dtype)).to(torch.float64) * scale.square()
        mean = FixedMean(self.mean_module)
        if self.mean == "posterior":
            mean = FixedMean(self._posterior_mean_module(), self._mean_source(), self.max_memory)
        return FunctionSamples(lin, mean, weights)

    def _posterior_mean_module(self) -> NetworkMean:
        assert self._prior_mean is not None
        return self._prior_mean

    def _mean_source(self) -> tuple[Any, Tensor, Tensor]:
        z = self.inducing_points.detach()
        factors = self.lin.factors(z, self.max_memory, self.output_index)
        return factors, self.kernel.precision.detach().reciprocal(), self.dual_mean.detach().clone()

    def _select(self, values: Tensor) -> Tensor:
        """(S, M, C) -> the inducing rows, (S, M')."""
        if self.output_index is None:
            return values.flatten(1)
        return values.gather(-1, self.output_index.expand(values.shape[:2]).unsqueeze(-1)).squeeze(-1)

    def _spread(self, rows: Tensor) -> Tensor:
        """Inducing rows (S, M') -> (S, M, C), zero at outputs without a row."""
        shape = (len(rows), len(self.inducing_points), self.num_outputs)
        if self.output_index is None:
            return rows.reshape(shape)
        index = self.output_index.expand(shape[:2]).unsqueeze(-1)
        return rows.new_zeros(shape).scatter(-1, index, rows.unsqueeze(-1))
