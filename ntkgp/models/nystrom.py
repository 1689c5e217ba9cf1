"""The trained network as a Gaussian process with a Nyström kernel (ELLA), from one pass over the data."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.models import GP
from linear_operator.operators import BlockDiagLinearOperator
from torch import Tensor

from ntkgp.checkpoint import Checkpoint, moved_to, running
from ntkgp.distributed import alone
from ntkgp.evidence.accumulation import accumulate
from ntkgp.evidence.collapsed import Collapsed
from ntkgp.evidence.single_pass import (
    OnePassEvidence,
    check_choices,
    check_landmarks,
    current_noise,
    pass_identity,
    restored_features,
    statistics_kind,
    write_noise,
)
from ntkgp.evidence.streaming import StreamedEvidence, StreamStatistics
from ntkgp.kernels import NeuralTangentKernel
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import check_count
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.nystrom import EIGENVALUE_CUT, LandmarkFeatures
from ntkgp.means import LinearizedMean, NetworkMean
from ntkgp.models.batches import Batches
from ntkgp.models.certified import Certified
from ntkgp.models.early_stopping import EarlyStopping
from ntkgp.models.landmarks import choose_landmarks
from ntkgp.models.network_gp import NetworkGP
from ntkgp.models.noise import prepare_likelihood
from ntkgp.models.paths import FixedMean, FunctionSamples, ShiftedMean
from ntkgp.models.posterior import LowRankCovariance, ResidualCovariance, without_rounding

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUT_SELECTIONS = ("all", "random")


class NystromNTKGP(Certified, NetworkGP, GP):
    r"""The trained network as a Gaussian process with a Nyström kernel: ELLA, for any number of data.

    The kernel :math:`k_\Lambda(x, x') = J(x)\Lambda^{-1}J(x')^\top` is replaced by :math:`\hat k(x, x') =
    \varphi(x)\varphi(x')^\top` with K features :math:`\varphi(x) = k_\Lambda(x, Z)\, q\, p^{-1/2}` of M landmarks Z,
    (q, p) the leading eigenpairs of :math:`k_\Lambda(Z, Z)`. One pass over the data accumulates
    :math:`\sum_n\varphi^\top B\varphi` in float64, B the curvature of the negative log-likelihood (1/σ² or, for
    classes, diag(p) − ppᵀ at the network's logits), and the latent posterior is
    :math:`N(f, \varphi(I + \sum\varphi^\top
    B\varphi)^{-1}\varphi^\top)` (Deng et al. 2022, *Accelerated linearized Laplace approximation*).

    The sums are kept by parameter group, so that precisions and noise may change afterwards: the posterior and the
    evidence (:func:`~ntkgp.fit_evidence`: the collapsed bound, with bounds of the exact evidence in the report) are
    those of the present values without another pass. What stays is the subspace of the features, chosen at the
    precisions that :meth:`fit` finds; call it again to choose anew.

    At equal precisions and noise the variance is never larger than that of :class:`~ntkgp.ExactNTKGP` and falls to zero
    away from the landmarks. ``residual=True`` adds K(x, x) − φ(x)φ(x)ᵀ at every input, as FITC does: to a joint
    covariance a block-diagonal matrix of one C × C block per input, so that marginals are those of the sparse
    variational posterior (Titsias 2009) and covariances between inputs remain those of ELLA.

    :param train_data: ``(x, y)``, a Dataset or a DataLoader; may be None if :meth:`fit` gets them.
    :param likelihood: Gaussian with one noise or one per output, :class:`~ntkgp.CategoricalLikelihood` or
        :class:`~ntkgp.likelihoods.BernoulliLikelihood`; moved to float64.
    :param lin: the linearised network.
    :param num_landmarks: M; all data where there are fewer.
    :param num_features: K, or None for all rows of the landmarks.
    :param residual: add K − Q at single inputs.
    :param landmarks: ``"random"``, ``"balanced"``, ``"kmeans"``, ``"greedy"`` (see
        :func:`~ntkgp.models.landmarks.choose_landmarks`) or inputs.
    :param output_selection: ``"all"`` outputs of each landmark, or one at ``"random"`` as in the paper.
    :param tolerance: eigenvalues below this fraction of the largest are cut.
    :param mean: ``"network"`` (exactly the network's output) or ``"posterior"`` (of the Nyström model).
    :param bound: which evidence is fitted, ``"vfe"`` or ``"dtc"``.
    :param seed: of landmarks and outputs; the global random state is left alone.
    :param batch_size: rows per batch of tensors.
    :param max_memory: budget for landmarks, statistics and one block of rows.
    :raises ValueError: data or arguments that cannot be used.
    :raises TypeError: another likelihood or network.

    Cost: M·C rows' Gram (or Lanczos) and K backward passes; per data point a forward pass, C backward chains and the
    products with the landmarks or with K directions, and R²/2 additions of R ≤ G·K features; test points likewise.

    >>> import gpytorch, ntkgp
    >>> x = torch.linspace(-1, 1, 200).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x)
    >>> likelihood = gpytorch.likelihoods.GaussianLikelihood()
    >>> model = NystromNTKGP((x, torch.sin(3 * x)), likelihood, lin, num_landmarks=50, num_features=10).fit()
    >>> report = ntkgp.fit_evidence(model)
    >>> posterior = model(torch.zeros(2, 1))
    >>> torch.equal(posterior.mean, net(torch.zeros(2, 1)).squeeze(-1).double()), posterior.variance.shape
    (True, torch.Size([2]))
    """

    def __init__(
        self,
        train_data: Any,
        likelihood: Likelihood,
        lin: LinearizedNetwork,
        num_landmarks: int = 2000,
        num_features: int | None = 20,
        residual: bool = False,
        *,
        landmarks: str | Any = "random",
        output_selection: str = "all",
        tolerance: float = EIGENVALUE_CUT,
        mean: str = "network",
        bound: str = "vfe",
        seed: int = 0,
        batch_size: int | None = None,
        max_memory: str | int | float = "2GiB",
    ) -> None:
        if not isinstance(lin, LinearizedNetwork):
            raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
        if output_selection not in OUTPUT_SELECTIONS:
            raise ValueError(f"output_selection: expected one of {OUTPUT_SELECTIONS}, got {output_selection!r}")
        for name, value in (("num_landmarks", num_landmarks), ("num_features", num_features)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if num_landmarks is None:
            raise ValueError("num_landmarks: expected a positive integer, got None")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number from 0 to below 1, got {tolerance}")
        if bound not in ("vfe", "dtc"):
            raise ValueError(f"bound: expected 'vfe' or 'dtc', got {bound!r}")
        super().__init__()
        object.__setattr__(self, "lin", lin)
        self.max_memory = parse_memory(max_memory)
        self.likelihood = prepare_likelihood(likelihood, lin.num_outputs)
        self._kind = statistics_kind(self.likelihood)
        self.num_landmarks, self.num_features, self.residual = num_landmarks, num_features, residual
        self.landmark_selection, self.output_selection = landmarks, output_selection
        self.tolerance, self.bound, self.seed, self._batch_size = tolerance, bound, seed, batch_size
        self.mean = mean
        self.mean_module = LinearizedMean(lin)
        self._network_mean = NetworkMean(lin)
        self.kernel = NeuralTangentKernel(lin, max_memory=max_memory).to(torch.float64)
        self.features: LandmarkFeatures | None = None
        self.statistics: StreamStatistics | None = None
        self._prior_scale = 1.0
        self._kept: tuple[tuple[Tensor, ...], Collapsed] | None = None
        self._batches = None if train_data is None else self._passes(train_data)

    @classmethod
    def from_evidence(cls, evidence: OnePassEvidence, **options: Any) -> NystromNTKGP:
        """The model of a :class:`~ntkgp.evidence.OnePassEvidence`, whose sums it shares, in eval mode."""
        features = evidence.features
        model = cls(
            None, evidence.likelihood, features.lin, max_memory=features.max_memory, num_features=None, **options
        )
        model.features, model.statistics, model.bound = features, evidence.statistics, evidence.bound
        model.kernel.precision = evidence.precision
        return model.eval()

    def _passes(self, data: Any) -> Batches:
        return Batches.of(data, self.lin, self.likelihood, self._batch_size or 4096)

    def fit(
        self,
        train_data: Any = None,
        *,
        progress: bool = True,
        validation: Any = None,
        search_frequency: int = 10_000,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    ) -> NystromNTKGP:
        """Choose the landmarks and their features at the present precisions, and pass over the data once.

        An interrupt leaves the model as it was. In a process group (:mod:`ntkgp.distributed`) all ranks make this call
        with all of the data and share the pass, with the same bits for any number of them; with validation data every
        rank makes the whole pass.

        :param train_data: as to the constructor; by default the data given there, or to the last call.
        :param progress: show a progress bar.
        :param validation: data, as `train_data`, for the early stopping of the paper: every `search_frequency` rows
            the NLL of the predictive distribution is taken with the prior precision scaled by seen/N, and the pass
            keeps the sums (and that scale) with the smallest. They are of a part of the data: no evidence then.
        :param search_frequency: rows between two looks at the validation data.
        :param checkpoint: a folder, or a :class:`~ntkgp.checkpoint.Checkpoint`: a call that was killed is repeated on a
            model made alike, by any number of processes, and goes on where it stood, to the very same sums.
        :raises CheckpointMismatch: a checkpoint of another network, other data or other options.
        :return: the model, in eval mode.
        """
        batches = self._batches if train_data is None else self._passes(train_data)
        if batches is None:
            raise ValueError("train_data: neither the model nor fit() was given any")
        batches.share()
        validation = (
            None if validation is None else Batches.of(validation, self.lin, self.likelihood, name="validation")
        )
        with (
            torch.inference_mode(False),
            running(checkpoint, lambda: self._identity(batches, validation, search_frequency)) as run,
        ):
            if run.state is None:
                with alone():  # by every rank alike, as by a single process
                    features = self._choose_features(batches)
            else:
                features = restored_features(self.lin, run.state, self.max_memory)
            search = None if validation is None else EarlyStopping(self, features, batches, validation)
            after = None if search is None else search.every(search_frequency)
            if search is not None and run.state is not None:
                search.set_state(run.state["search"])
            kept = {"features": features.state()}
            statistics = accumulate(
                features, self._kind, batches, progress=progress, after=after, run=run,
                extra=lambda: kept if search is None else {**kept, "search": search.state()},
            )  # fmt: skip
        scale = 1.0
        if search is not None:
            statistics, scale = search.best(statistics)
        self.features, self.statistics, self._prior_scale, self._kept = features, statistics, scale, None
        self._batches = batches
        return self.eval()

    def _choose_features(self, batches: Batches) -> LandmarkFeatures:
        """Landmarks and their features at the present precisions."""
        precision, lin = self.kernel.precision.detach(), self.lin
        check_landmarks(
            batches, lin, self.landmark_selection, self.num_landmarks, self.num_features, self._kind, self.max_memory,
            one_output=self.output_selection == "random",
        )  # fmt: skip
        z = choose_landmarks(
            batches, lin, self.num_landmarks, self.landmark_selection, classification=self.is_classification,
            precision=precision, seed=self.seed, max_memory=self.max_memory,
        ).to(precision.device)  # fmt: skip
        outputs = None
        if self.output_selection == "random":
            generator = torch.Generator().manual_seed(self.seed + 1)
            outputs = torch.randint(lin.num_outputs, (len(z),), generator=generator)
        return LandmarkFeatures.build(
            lin, z, outputs, precision=precision, num_features=self.num_features, tolerance=self.tolerance,
            max_memory=self.max_memory,
        )  # fmt: skip

    def _identity(self, batches: Batches, validation: Batches | None, search_frequency: int) -> dict[str, Any]:
        """What a fit depends on, for a checkpoint."""
        names = ("num_landmarks", "num_features", "output_selection", "tolerance", "seed", "max_memory")
        options = {name: getattr(self, name) for name in names}
        options |= {"landmarks": self.landmark_selection, "likelihood": self._kind, "batch_size": self._batch_size}
        options["precision"] = self.kernel.precision.detach()
        if validation is not None:
            noise = self.likelihood.state_dict()
            options |= {"validation": validation.rows(), "search_frequency": search_frequency, "noise": noise}
        return pass_identity(self.lin, batches, options)

    def _fitted(self) -> tuple[LandmarkFeatures, StreamStatistics]:
        """Features and sums; made now from the data given to the constructor where :meth:`fit` was not called."""
        if self.features is None or self.statistics is None:
            training = self.training
            self.fit(progress=False)
            self.train(training)
        assert self.features is not None
        assert self.statistics is not None
        return self.features, self.statistics

    def collapsed(self) -> Collapsed:
        """The Nyström model at the present precisions and noise, kept until one changes."""
        features, statistics = self._fitted()
        noise = current_noise(self.likelihood, self.num_outputs, statistics).values
        noise = noise if noise.numel() else torch.ones_like(statistics.counts)
        state = (self.kernel.precision.detach(), noise, statistics.second)
        if self._kept is not None:
            old, found = self._kept
            if old[2] is state[2] and torch.equal(old[0], state[0]) and torch.equal(old[1], state[1]):
                return found
        with torch.inference_mode(False), torch.no_grad():
            precision = state[0].clone() * self._prior_scale
            found = Collapsed(statistics.sums(), features.group, features.stacked, precision, noise.clone())
        self._kept = (state[0].clone(), state[1].clone(), state[2]), found
        return found

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior at packed inputs: mean f − Jθ̃, covariance φφᵀ (and K − φφᵀ at single inputs)."""
        phi = self._phi(x)
        return self._distribution(self.mean_module(x), self._covariance(x, phi, phi))

    def __call__(self, x: Any, **kwargs: Any) -> MultivariateNormal:
        """Train mode: the prior. Eval mode: the latent posterior. Any inputs, (*batch, T, D)."""
        x = self._inputs(x)
        if self.training or gpytorch.settings.prior_mode.on():
            return self.forward(x)
        phi = self._phi(x)
        model = self.collapsed()
        return self._distribution(self._reported(x, phi, model), self._covariance(x, phi, model.covariance_root(phi)))

    def _reported(self, x: Tensor, phi: Tensor, model: Collapsed) -> Tensor:
        """The reported predictive mean at packed inputs with features φ."""
        if self.mean == "network":
            return self._network_mean(x)
        mean = self.mean_module(x)
        return mean + (phi @ model.mean).reshape(mean.shape)

    def _phi(self, x: Tensor) -> Tensor:
        """φ at packed inputs, (*batch, T, D) -> (*batch, T·C, r)."""
        features, _ = self._fitted()
        psi = features(x.reshape(-1, x.shape[-1]))
        return self.collapsed().features(psi).reshape(*x.shape[:-2], x.shape[-2] * self.num_outputs, -1)

    def _covariance(self, x: Tensor, phi: Tensor, root: Tensor) -> LowRankCovariance | ResidualCovariance:
        low_rank = LowRankCovariance(root)
        if not self.residual:
            return low_rank
        c = self.num_outputs
        variance = (self.kernel.precision.detach() * self._prior_scale).reciprocal()
        own = self.lin.gram_diagonals(x.reshape(-1, x.shape[-1]), max_memory=self.max_memory)
        own = torch.einsum("g,gncd->ncd", variance, own).reshape(*x.shape[:-1], c, c)
        rows = phi.unflatten(-2, (-1, c))
        left = own - rows @ rows.mT
        return ResidualCovariance(low_rank, BlockDiagLinearOperator(without_rounding(left)))

    def evidence_problem(
        self, *, at: str = "theta_star", curvature: str = "simple", targets: str = "data"
    ) -> StreamedEvidence:
        """What determines the evidence (see :func:`~ntkgp.fit_evidence`); no pass over the data after :meth:`fit`."""
        check_choices(self._kind, at, curvature)
        if targets == "residual" and self.mean == "posterior":
            raise ValueError("targets='residual' centres the prior at the trained weights; use mean='network'")
        features, statistics = self._fitted()
        if self._prior_scale != 1.0:
            raise ValueError("the pass was stopped early, on a part of the data; call fit() without validation first")
        noise = current_noise(self.likelihood, self.num_outputs, statistics)
        return StreamedEvidence(features, statistics, noise, self.bound, targets)

    def set_hyperparameters(self, precision: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Write group precisions (G,) and learned noise variances; return what their constraints let through."""
        self.kernel.precision = precision
        return self.kernel.precision.detach().clone(), write_noise(self.likelihood, self.num_outputs, noise)

    def sample_functions(self, num_samples: int, generator: torch.Generator | None = None) -> FunctionSamples:
        """Draw functions from the posterior of the Nyström model.

        :param num_samples: S ≥ 1.
        :param generator: makes the draw reproducible; the global random state is used without it.
        :raises ValueError: `residual=True`, whose draws are no linear functions of the weights.

        Cost: S·G backward passes over the landmarks; memory S·P.
        """
        check_count(num_samples, "num_samples")
        if self.residual:
            raise ValueError("sample_functions: residual=True adds independent variances that no weights draw")
        features, model = self._fitted()[0], self.collapsed()
        with torch.no_grad():
            draw = torch.randn(num_samples, len(model.mean), generator=generator, dtype=torch.float64).to(model.mean)
            solved = torch.linalg.solve_triangular(model.precision_factor.mT, draw.mT, upper=True).mT
            weights = features.pull(solved @ model.basis.mT * model.root)
            mean: Callable[[Tensor], Tensor] = FixedMean(self._network_mean)
            if self.mean == "posterior":
                shift = features.pull((model.basis @ model.mean * model.root).unsqueeze(0))
                mean = ShiftedMean(self.lin, self.mean_module, shift)
        return FunctionSamples(self.lin, mean, weights)

    def _saved(self, training_data: bool) -> dict[str, Any]:
        """What the model is made of again, beside its parameters and its likelihood; for a file."""
        self._fitted()
        names = (
            "num_landmarks", "num_features", "residual", "output_selection", "tolerance", "mean", "bound", "seed",
            "max_memory",
        )  # fmt: skip
        chosen = self.landmark_selection
        options = {**{name: getattr(self, name) for name in names}, "batch_size": self._batch_size}
        options["landmarks"] = chosen if isinstance(chosen, str) else self.lin.pack(chosen)
        if training_data and (self._batches is None or not self._batches.in_memory):
            raise ValueError("training_data: those of a loader or of a file are not the model's; expected False")
        data = self._batches.collect() if training_data and self._batches is not None else None
        return {"model": options, "data": data}

    @classmethod
    def _from_saved(cls, lin: LinearizedNetwork, likelihood: Likelihood, state: dict[str, Any]) -> NystromNTKGP:
        """Inverse of :meth:`_saved`."""
        return cls(state["data"], likelihood, lin, **state["model"])

    def get_extra_state(self) -> dict[str, Any] | None:
        """Features and sums, for ``state_dict``."""
        if self.features is None or self.statistics is None:
            return None
        return {
            "features": self.features.state(),
            "statistics": dict(self.statistics.__dict__),
            "prior_scale": self._prior_scale,
        }

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Inverse of :meth:`get_extra_state`."""
        self._kept = None
        if state is None:
            self.features = self.statistics = None
            return
        self.features = LandmarkFeatures.from_state(self.lin, state["features"], self.max_memory)
        self.statistics = StreamStatistics(**state["statistics"])
        self._prior_scale = state["prior_scale"]

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_kept": None}
        if self.statistics is not None and self._batches is not None and not self._batches.in_memory:
            state["_batches"] = None  # loaders need not have a pickle; predictions and evidence need none
        return state

    def _apply(self, fn: Any) -> NystromNTKGP:
        """Moves between devices; ``float()`` and ``half()`` change nothing, since all algebra is in float64."""
        state = self.get_extra_state()
        if state is not None:
            self.set_extra_state(moved_to(state, fn(self.kernel.precision.detach()).device))
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device))
