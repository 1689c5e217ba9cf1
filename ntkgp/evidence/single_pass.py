"""The one-pass evidence on its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood, MultitaskGaussianLikelihood
from torch import Tensor

from ntkgp.checkpoint import Checkpoint, moved_to, running
from ntkgp.distributed import alone
from ntkgp.evidence.accumulation import accumulate, check_choice
from ntkgp.evidence.streaming import StreamedEvidence, StreamNoise, StreamStatistics
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import check_count
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.nystrom import EIGENVALUE_CUT, LandmarkFeatures

if TYPE_CHECKING:
    from ntkgp.models.batches import Batches
    from ntkgp.models.nystrom import NystromNTKGP

_BATCH = 4096


@dataclass
class OnePassEvidence:
    r"""What one pass over the data leaves: bound, evidence and posterior for every :math:`\Lambda, \sigma^2` (law C19).

    Made by :func:`one_pass`. :func:`~ntkgp.fit_evidence` optimises it as it does a model. ``a + b`` joins the passes
    over two parts of the data with the same landmarks.

    :param features: the landmarks' features.
    :param statistics: the sums.
    :param likelihood: whose noise is fitted.
    :param precision: current :math:`\lambda_g`, shape (G,).
    :param bound: "vfe" or "dtc", see :class:`~ntkgp.evidence.streaming.StreamedEvidence`.
    """

    features: LandmarkFeatures
    statistics: StreamStatistics
    likelihood: Likelihood
    precision: Tensor = field(repr=False)
    bound: str = "vfe"

    def __add__(self, other: OnePassEvidence) -> OnePassEvidence:
        """The evidence of both parts of the data, at the hyper-parameters of the first."""
        if not self.features.same(other.features):
            raise ValueError("one-pass statistics of different landmarks cannot be added; give the same ones to all")
        return replace(self, statistics=self.statistics + other.statistics)

    def evidence_problem(
        self, *, at: str = "theta_star", curvature: str = "simple", targets: str = "data"
    ) -> StreamedEvidence:
        """What :func:`~ntkgp.fit_evidence` optimises; no pass over the data."""
        check_choices(self.statistics.kind, at, curvature)
        noise = current_noise(self.likelihood, self.features.lin.num_outputs, self.statistics)
        return StreamedEvidence(self.features, self.statistics, noise, self.bound, targets)

    def set_hyperparameters(self, precision: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Store precisions and noise; return what the constraints let through."""
        self.precision = precision.detach().to(self.precision).clone()
        return self.precision.clone(), write_noise(self.likelihood, self.features.lin.num_outputs, noise)

    def model(self, **options: Any) -> NystromNTKGP:
        """The Gaussian process of these statistics; `options` are those of :class:`~ntkgp.models.NystromNTKGP`."""
        from ntkgp.models.nystrom import NystromNTKGP

        return NystromNTKGP.from_evidence(self, **options)

    def posterior(self, x: Any, residual: bool = False) -> MultivariateNormal:
        """Latent posterior at x with the present hyper-parameters; `residual` as in the model."""
        return self.model(residual=residual)(x)


def check_choices(kind: str, at: str, curvature: str) -> None:
    """Refuse what statistics of a pass cannot answer."""
    if at != "theta_star":
        raise ValueError(f"at={at!r}: the evidence of a pass exists at 'theta_star' only")
    if kind == "classification" and curvature == "full":
        raise ValueError("curvature='full' needs passes at θ⋆; the one-pass evidence is that of curvature='quadratic'")


def statistics_kind(likelihood: Likelihood) -> str:
    """Which statistics a likelihood needs.

    :raises ValueError: noise given input by input, or a full covariance between outputs.
    """
    from ntkgp.models.noise import has_fixed_noise, is_classification

    if is_classification(likelihood):
        return "classification"
    if has_fixed_noise(likelihood):
        raise ValueError(
            "likelihood: noise given input by input has no meaning in a pass over batches; use GaussianLikelihood or "
            "MultitaskGaussianLikelihood(rank=0), or ExactNTKGP"
        )
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        if likelihood.rank > 0:
            raise ValueError(f"likelihood: expected rank=0, got MultitaskGaussianLikelihood(rank={likelihood.rank})")
        return "per_output" if likelihood.has_task_noise else "shared"
    return "shared"


def current_noise(likelihood: Likelihood, num_outputs: int, statistics: StreamStatistics) -> StreamNoise:
    """Learned noise variances as they are now."""
    from ntkgp.models.noise import NoiseLink

    if statistics.kind == "classification":
        return StreamNoise(statistics.counts.new_zeros(0))
    found = NoiseLink(likelihood, 1, num_outputs).model()
    return StreamNoise(found.values.to(statistics.counts), found.minimum)


def write_noise(likelihood: Likelihood, num_outputs: int, noise: Tensor | None) -> Tensor | None:
    """Store noise variances in the likelihood; return what its constraint lets through."""
    from ntkgp.models.noise import NoiseLink

    return None if noise is None else NoiseLink(likelihood, 1, num_outputs).write(noise)


def one_pass(
    lin: LinearizedNetwork,
    data: Any,
    likelihood: Likelihood,
    *,
    landmarks: str | Any = "random",
    num_landmarks: int = 128,
    num_features: int | None = None,
    precision: Tensor | None = None,
    tolerance: float = EIGENVALUE_CUT,
    bound: str = "vfe",
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    max_memory: str | int | float = "2GiB",
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> OnePassEvidence:
    r"""Pass over the data once; afterwards the evidence bound of every :math:`\Lambda, \sigma^2` costs milliseconds.

    With :math:`\psi(x) = [J_g(x) J_{Z,g}^\top]_g` in an orthonormal basis of every group, the sums :math:`\sum \psi
    \psi^\top`, :math:`\sum \psi t`, :math:`\sum t^2` and :math:`\sum \|J_g\|^2` determine the collapsed bound of
    Titsias (2009) and the posterior for every choice of hyper-parameters (law C19). A classification is expanded to
    second order at the network's logits.

    :param lin: the linearised network.
    :param data: ``(x, y)``, a Dataset or a DataLoader.
    :param likelihood: Gaussian with one noise or one per output, categorical or Bernoulli.
    :param landmarks: "random", "balanced", "kmeans", "greedy", or inputs.
    :param num_landmarks: M.
    :param num_features: K mixtures of the landmarks' rows, see
        :class:`~ntkgp.linearization.nystrom.LandmarkFeatures`; None for all.
    :param precision: initial :math:`\lambda_g`; ones by default.
    :param tolerance: eigenvalues of the landmarks' Grams below this fraction of the largest are cut.
    :param bound: "vfe" or "dtc".
    :param batch_size: rows per batch of tensors.
    :param dtype: of the products with the landmarks; float32 is faster, with errors of 1e-7 of the largest eigenvalue.
    :param seed: of the landmarks.
    :param max_memory: budget for landmarks, statistics and one block of rows.
    :param progress: show a progress bar.
    :param checkpoint: a folder, or a :class:`~ntkgp.checkpoint.Checkpoint`: a call that was killed is repeated with the
        same arguments, by any number of processes, and goes on where it stood, to the very same sums; no batch counts
        twice.
    :raises CheckpointMismatch: a checkpoint of another network, other data or other arguments.
    :raises ValueError: data, landmarks or a budget that cannot be used; processes that were given different data.

    In a process group (:mod:`ntkgp.distributed`) all ranks make this call with all of the data and share the batches;
    the sums have the same bits for any number of them.

    Cost: N·(passes + products with M landmarks + R²/2) with R ≤ Σ_g min(M·C, P_g) features, divided by the processes;
    memory 2R² per noise component, 4R² with several processes.

    >>> import gpytorch, torch, ntkgp
    >>> x = torch.linspace(-1, 1, 200).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x, groups="layer")
    >>> likelihood = gpytorch.likelihoods.GaussianLikelihood()
    >>> found = one_pass(lin, (x, torch.sin(3 * x)), likelihood, num_landmarks=20)
    >>> report = ntkgp.fit_evidence(found)
    >>> report.evidence_bounds[0] <= report.evidence_bounds[1], found.posterior(x[:3]).variance.shape
    (True, torch.Size([3]))
    """
    from ntkgp.models.batches import Batches
    from ntkgp.models.landmarks import choose_landmarks
    from ntkgp.models.noise import prepare_likelihood

    likelihood = prepare_likelihood(likelihood, lin.num_outputs)
    kind = statistics_kind(likelihood)
    budget = parse_memory(max_memory)
    batches = Batches.of(data, lin, likelihood, _BATCH if batch_size is None else batch_size)
    batches.share()
    ones = torch.ones(len(lin.groups), dtype=torch.float64)
    options = {
        "likelihood": kind, "landmarks": landmarks, "num_landmarks": num_landmarks, "num_features": num_features,
        "precision": precision, "tolerance": tolerance, "batch_size": batch_size, "dtype": dtype, "seed": seed,
        "max_memory": budget,
    }  # fmt: skip
    with running(checkpoint, lambda: pass_identity(lin, batches, options)) as run:
        if run.state is None:
            check_landmarks(batches, lin, landmarks, num_landmarks, num_features, kind, budget)
            # By every rank alike, as by a single process.
            with alone():
                z = choose_landmarks(
                    batches, lin, num_landmarks, landmarks, classification=kind == "classification",
                    precision=precision, seed=seed, max_memory=budget,
                )  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            precision = ones if precision is None else precision.to(torch.float64).clone()
            if run.state is None:
                with alone():
                    features = LandmarkFeatures.build(
                        lin, z, precision=precision, num_features=num_features, tolerance=tolerance, max_memory=budget
                    )
            else:
                features = restored_features(lin, run.state, budget)
            kept = {"features": features.state()}
            statistics = accumulate(
                features, kind, batches, dtype=dtype, progress=progress, run=run, extra=lambda: kept
            )
    return OnePassEvidence(features, statistics, likelihood, precision.to(features.landmarks.device), bound)


def check_landmarks(
    batches: Batches, lin: LinearizedNetwork, landmarks: str | Any, num_landmarks: int, num_features: int | None,
    kind: str, budget: int, one_output: bool = False,
) -> None:  # fmt: skip
    """Refuse a budget that is too small before anything is visited; see :func:`check_choice`."""
    from ntkgp.models.landmarks import candidates_of

    try:
        known = batches.num_data
    except ValueError:  # not before the first pass
        known = sys.maxsize
    check_count(num_landmarks, "num_landmarks")
    own = None if isinstance(landmarks, str) else lin.packing.pack(landmarks, "landmarks")
    count = max(1, min(num_landmarks, known)) if own is None else len(own)
    candidates = min(candidates_of(landmarks, num_landmarks), known) if landmarks == "greedy" else 0
    check_choice(
        lin, count, num_features, kind, budget, one_output=one_output,
        candidates=candidates if candidates > count else 0,
    )  # fmt: skip


def pass_identity(lin: LinearizedNetwork, batches: Batches, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What a pass depends on, as arguments of :meth:`~ntkgp.checkpoint.Checkpoint.run`."""
    groups = [list(lin.groups.names), lin.groups.index]
    return {"network": lin.theta, "data": batches.rows(), "configuration": {**configuration, "groups": groups}}


def restored_features(lin: LinearizedNetwork, state: Mapping[str, Any], max_memory: int) -> LandmarkFeatures:
    """The features that a killed pass had chosen."""
    return LandmarkFeatures.from_state(lin, moved_to(state["features"], lin.theta.device), max_memory)
