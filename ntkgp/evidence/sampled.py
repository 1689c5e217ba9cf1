"""Evidence and posterior by sampling: expectation–maximisation for problems that no matrix of theirs fits in memory."""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor
from tqdm import tqdm

from ntkgp.checkpoint import Checkpoint, Run, moved_to, running
from ntkgp.distributed import checksum, gather_numbers, gather_objects, world_size
from ntkgp.evidence.ascent import PRUNED_DIMENSION
from ntkgp.evidence.probes import DualProbes, Expectation, Settings
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.report import EvidenceReport
from ntkgp.evidence.weight_probes import WeightProbes
from ntkgp.fingerprint import digest
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import check_count
from ntkgp.linearization.memory import parse_memory
from ntkgp.solvers.tangent import push

if TYPE_CHECKING:
    from ntkgp.models.batches import Batches

_MEMORY = 5
_LARGEST_STEP = 3.0
_FADING = 1e-2
_STEADY = 0.7
_DIFFERENCE = 0.05
_RATIOS = (1e-10, 1e10)
_NOISE_BOUNDS = (1e-10, 1e4)


@dataclass(frozen=True)
class SampledEvidence:
    r"""What :func:`sampled_evidence` returns: hyper-parameters with their Monte-Carlo errors, and posterior draws.

    :param report: as of :func:`~ntkgp.fit_evidence`; ``log_evidence`` is NaN, which no sample estimates, and
        ``evidence_bounds`` holds an interval of it where the work was done in data space.
    :param precision: λ_g, shape (G,).
    :param noise: learned noise variances, shape (S,).
    :param log_precision_error: standard errors of log λ_g from the finite number of draws, shape (G,); infinite for
        pruned groups.
    :param log_noise_error: those of the log noise variances.
    :param effective_dimension: γ_g, shape (G,).
    :param effective_dimension_error: standard errors of γ_g at the reported hyper-parameters.
    :param theta_star: the mode, shape (P,).
    :param samples: draws from the posterior of the weights *centred at zero*, shape (num_samples, P).
    :param form: "dual" or "weights".
    :param iterations: of conjugate gradients, in total.
    """

    report: EvidenceReport
    precision: Tensor
    noise: Tensor
    log_precision_error: Tensor
    log_noise_error: Tensor
    effective_dimension: Tensor
    effective_dimension_error: Tensor
    theta_star: Tensor
    samples: Tensor
    form: str
    iterations: int
    lin: LinearizedNetwork

    def functions(self, x: Any) -> Tensor:
        """Posterior draws of the function around the network's output, f(x) + J(x)z, shape (num_samples, N, C)."""
        packed = self.lin.pack(x).detach()
        with torch.no_grad():
            draws = push(self.lin, packed, self.samples).permute(2, 0, 1)
            return self.lin(packed).to(torch.float64) + draws

    def variance(self, x: Any) -> Tensor:
        """Latent variance estimated from the draws, shape (N, C); its relative standard error is √(2/num_samples)."""
        with torch.no_grad():
            return push(self.lin, self.lin.pack(x).detach(), self.samples).square().mean(-1)


def sampled_evidence(
    lin: LinearizedNetwork,
    train_data: Any,
    likelihood: Likelihood,
    num_samples: int = 16,
    *,
    form: str = "auto",
    curvature: str = "simple",
    num_landmarks: int | None = None,
    max_steps: int = 50,
    tolerance: float = 1e-3,
    solver_tolerance: float = 1e-6,
    max_iterations: int = 1000,
    batch_size: int | None = None,
    max_memory: str | int | float = "2GiB",
    bounds: bool = True,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> SampledEvidence:
    r"""Fit precisions and noise by MacKay's fixed point on posterior draws; no N·C × N·C or P × P matrix is formed.

    Expectation: `num_samples` posterior draws :math:`w - d` and the mode :math:`\theta_\star` by preconditioned
    conjugate gradients, warm-started; :math:`\hat\gamma_g = \tfrac1S\sum_k\lambda_g\|d_{k,g}\|^2`. Maximisation:

    .. math:: \lambda_g \leftarrow \hat\gamma_g / \|\theta_{\star g}\|^2, \qquad
        \sigma^2 \leftarrow \mathrm{SSE} / (N C - \textstyle\sum_g\hat\gamma_g).

    The random numbers are drawn once and rescaled as Λ and the noise change, each entry of the weights with its own:
    the fixed point is that of a deterministic map, accelerated by Anderson's method, and differs from the exact optimum
    by a Monte-Carlo error which is estimated by linearising the map (reported as standard errors of log λ and log σ²).

    In a process group (:mod:`ntkgp.distributed`) all ranks make this call with all of the data and the same arguments,
    and get the same bits for any number of them. In weight space they share the batches; in data space, from 1,024 rows
    on, each computes and keeps its own rows of the Gram and of the preconditioner.

    :param lin: the linearised network.
    :param train_data: ``(x, y)``, a Dataset or a DataLoader, see :class:`ntkgp.models.batches.Batches`.
    :param likelihood: as of :class:`~ntkgp.ExactNTKGP`; a copy is used. Its noise is where a known noise comes from.
    :param num_samples: S ≥ 2 draws; the relative error of λ_g is about √(2 / (S γ_g)).
    :param form: "dual" (data in memory; the Gram where it fits, otherwise passes), "weights" (streamed), or "auto".
    :param curvature: classification: "simple" (true loss, H at the network) or "quadratic" (its expansion there).
    :param num_landmarks: inputs of the preconditioner (default: about 8·√n rows; in weight space up to P of them, but
        no more than an eighth of the data and 2000).
    :param max_steps: largest number of expectation steps.
    :param tolerance: accepted change of any log λ or log σ² by a step, times its effective dimension where that is
        below one; Monte-Carlo errors are far above 1e-3.
    :param solver_tolerance: of the conjugate gradients.
    :param max_iterations: of conjugate gradients per step.
    :param batch_size: rows per pass of tensors and Datasets.
    :param max_memory: budget of each process for Grams, kept Jacobian rows and preconditioner; the smallest of them
        counts for all.
    :param bounds: in data space, bound the log evidence at the end.
    :param seed: of all random numbers; the global generator is not used.
    :param progress: show a progress bar. An interrupt keeps the last completed step; one of several processes it ends.
    :param checkpoint: a folder, or a :class:`~ntkgp.checkpoint.Checkpoint`: a call that was killed is repeated with the
        same arguments (`max_steps` may differ) and goes on with the step where it stood, to the very same result.
    :raises CheckpointMismatch: a checkpoint of another network, other data or other arguments.
    :raises ValueError: unknown choices, fewer than two samples, known noise variances in weight space, or processes
        with different data, weights or arguments.

    Cost: per step, S + 1 solves. A product is O(n²) or a backward and a forward pass over the data per vector ("dual":
    memory n·(S + m) for m landmark rows; "weights": (S·G + m)·P numbers). Standard errors cost as much as G plus the
    number of noise variances further steps. MacKay 1992; Antorán et al. 2023, *Sampling-based inference for large
    linear models*.

    >>> import gpytorch, ntkgp
    >>> x = torch.linspace(-1, 1, 40).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> lin = ntkgp.LinearizedNetwork(net, x)
    >>> found = sampled_evidence(lin, (x, torch.sin(3 * x)), gpytorch.likelihoods.GaussianLikelihood())
    >>> found.precision.shape, found.samples.shape
    (torch.Size([1]), torch.Size([16, 25]))
    """
    # The rooms below this one must not be imported at the top: models import evidence.
    from ntkgp.models.batches import Batches
    from ntkgp.models.noise import NoiseLink, is_classification, prepare_likelihood

    started = time.perf_counter()
    _check_arguments(
        lin, form, curvature, tolerance, num_samples=num_samples, max_steps=max_steps, max_iterations=max_iterations,
        num_landmarks=1 if num_landmarks is None else num_landmarks,
    )  # fmt: skip
    likelihood = prepare_likelihood(copy.deepcopy(likelihood), lin.num_outputs)
    batches = Batches.of(train_data, lin, likelihood, batch_size)
    batches.share()
    if len(set(gather_numbers(checksum(0, lin.theta)))) > 1:
        raise ValueError("lin: the processes have different networks; give all of them the same weights")
    total = sum(len(x) for x, _ in batches)
    noise = None if is_classification(likelihood) else NoiseLink(likelihood, total, lin.num_outputs).model()
    # What fits decides how to go about it, on all processes alike.
    (memory,) = min(gather_numbers(parse_memory(max_memory)))
    settings = Settings(num_samples, num_landmarks, solver_tolerance, max_iterations, memory, seed, curvature)
    form = _chosen_form(form, lin, total, noise, settings.max_memory)
    options = {
        **vars(settings), "solver_tolerance": solver_tolerance, "tolerance": tolerance, "form": form, "noise": noise,
        "likelihood": [type(likelihood).__qualname__, likelihood.state_dict()], "batch_size": batch_size,
        "groups": [list(lin.groups.names), lin.groups.index],
    }  # fmt: skip
    _check_agreement({**options, "max_steps": max_steps, "bounds": bounds})
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        running(checkpoint, lambda: {"network": lin.theta, "data": batches.rows(), "configuration": options}) as run,
    ):
        if run.state is not None:
            batches.set_random_state(run.state["first_pass"])
        first_pass = batches.random_state()
        probes = _probes(form, lin, batches, total, noise, settings)
        ascent = _Ascent(probes, lin, noise, total * lin.num_outputs, progress)
        notes = ascent.run(tolerance, max_steps, run, batches, first_pass)
        errors, gamma_errors = ascent.errors()
        interval = None
        if bounds and isinstance(probes, DualProbes):
            interval = probes.evidence_system(*ascent.split(ascent.y)).bounds(num_landmarks, seed=seed)
    return ascent.result(form, notes, errors, gamma_errors, interval, time.perf_counter() - started)


def _check_arguments(lin: LinearizedNetwork, form: str, curvature: str, tolerance: float, **counts: int) -> None:
    """Refuse what cannot be used, by name."""
    if not isinstance(lin, LinearizedNetwork):
        raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
    for name, value, allowed in (
        ("form", form, ("auto", "dual", "weights")), ("curvature", curvature, ("simple", "quadratic"))
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    for name, number in counts.items():
        check_count(number, name, 2 if name == "num_samples" else 1)
    if not 0.0 < tolerance:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")


def _check_agreement(options: dict[str, Any]) -> None:
    """Refuse what differs between the processes, by name: their sums would be of different things."""
    if world_size() == 1:
        return
    found = gather_objects({name: digest(value) for name, value in options.items()})
    different = [name for name in options if len({own[name] for own in found}) > 1]
    if different:
        raise ValueError(f"{', '.join(different)}: the processes were given different ones; give all of them the same")


def _known_rows(noise: NoiseModel) -> bool:
    """Whether rows have known variances of their own."""
    if noise.num_learned:
        return bool(noise.fixed.any())
    return bool((noise.fixed != noise.fixed[0]).any())


def _chosen_form(form: str, lin: LinearizedNetwork, total: int, noise: NoiseModel | None, max_memory: int) -> str:
    """Data space where the Gram fits, where there are fewer rows than weights, or where noise is known by rows."""
    known = noise is not None and _known_rows(noise)
    if form == "weights" and known:
        raise ValueError("likelihood: known noise variances of single rows need form='dual'")
    if form != "auto":
        return form
    rows = total * lin.num_outputs
    fits = 8 * rows**2 * (3 + len(lin.groups) / 2) <= max_memory
    return "dual" if known or rows <= lin.num_parameters or (fits and rows <= 4 * lin.num_parameters) else "weights"


def _probes(
    form: str, lin: LinearizedNetwork, batches: Batches, total: int, noise: NoiseModel | None, settings: Settings
) -> DualProbes | WeightProbes:
    """The expectation step in data or in weight space."""
    if form == "dual":
        return DualProbes(lin, *batches.collect(), noise, settings)
    return WeightProbes(lin, batches, total, noise, settings)


class _Ascent:
    """Anderson's method on y = (−log λ, log σ²), the logarithms of all variances: y ← y + log(αᵀA_iα / tr A⁻¹A_i)."""

    def __init__(
        self,
        probes: DualProbes | WeightProbes,
        lin: LinearizedNetwork,
        noise: NoiseModel | None,
        rows: int,
        progress: bool,
    ) -> None:
        self.probes, self.lin, self.noise, self.rows = probes, lin, noise, rows
        self.groups = len(lin.groups)
        self.low, self.high, self.y = self._start()
        self.bar = tqdm(desc="sampled evidence", unit=" steps", disable=not progress)
        self.found: Expectation | None = None
        self.steps = self.iterations = 0
        self.size = math.inf
        self.solved, self.done = True, False
        # Where the next step is taken, the last change, its stretch, and the points behind Anderson's step.
        self.next, self.last, self.stretch = self.y, torch.zeros_like(self.y), torch.ones_like(self.y)
        self.history: list[tuple[Tensor, Tensor]] = []

    def _start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds and start of y: prior variance shared equally by the groups, the network's training error."""
        traces = self.probes.traces() / self.rows
        positive = traces[traces > 0]
        traces = torch.where(traces > 0, traces, positive.mean() if positive.numel() else 1.0)
        learned = 0 if self.noise is None else self.noise.num_learned
        scale = traces.new_ones(()) if self.noise is None else self.probes.target_squares().mean()
        share = (scale if float(scale) > 0 else 1.0) / traces
        low, high, start = (torch.log(ratio * share) for ratio in (*_RATIOS, 1.0 / self.groups))
        if not learned:
            return low, high, start
        assert self.noise is not None
        errors, squares = self.probes.squared_errors(), self.probes.target_squares()
        assert errors is not None
        squares = torch.where(squares > 0, squares, 1.0)
        smallest = (_NOISE_BOUNDS[0] * squares).clamp_min(self.noise.minimum * (1 + 1e-6))
        largest = torch.maximum(_NOISE_BOUNDS[1] * squares, 10 * smallest)
        first = torch.minimum(torch.maximum(errors, 1e-4 * squares), squares).clamp(smallest, largest)
        return (
            torch.cat([low, smallest.log()]), torch.cat([high, largest.log()]), torch.cat([start, first.log()])
        )  # fmt: skip

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Precisions (G,) and learned noise variances (S,)."""
        return (-y[: self.groups]).exp(), y[self.groups :].exp()

    def step(self, y: Tensor) -> tuple[Tensor, Expectation]:
        """MacKay's step, zero for what a bound holds, and the expectation behind it."""
        found = self.probes(*self.split(y))
        self.iterations += found.iterations
        tiny = torch.finfo(torch.float64).tiny
        means = found.traces.mean(-1)
        # A noise variance that explains no row has a trace of about zero, below which draws may put it.
        change = found.quadratics.clamp_min(tiny).log() - means.clamp_min(1e-12 * self.rows).log()
        change = torch.where((found.quadratics <= 0) & (means <= 0), 0.0, change)
        held = (y <= self.low) & (change < 0) | (y >= self.high) & (change > 0)
        return torch.where(held, 0.0, change).clamp(-_LARGEST_STEP, _LARGEST_STEP), found

    def run(
        self, tolerance: float, max_steps: int, run: Run, batches: Batches, first_pass: dict[str, Tensor]
    ) -> tuple[str, ...]:
        """Iterate; return notes on what ended the run early."""
        if run.state is not None:
            self._resume(run.state, batches)

        def state() -> dict[str, Any]:
            return {**self._state(), "first_pass": first_pass, "passes": batches.random_state()}

        try:
            while not self.done and self.steps < max_steps:
                self._advance(tolerance)
                run.offer(state)
        except KeyboardInterrupt:
            # The other processes are somewhere else: what follows would be answers to other questions of theirs.
            if self.found is None or world_size() > 1:
                raise
            return ("interrupted: the last completed step is reported",)
        finally:
            self.bar.close()
        # Standard errors are made by steps that must not be lost, and start from here.
        run.save(state())
        if self.done:
            return ()
        return (f"not converged: the last of max_steps={max_steps} steps still changed a logarithm by {self.size:.1e}",)

    def _advance(self, tolerance: float) -> None:
        """One step, and where to go from there."""
        y = self.next
        change, found = self.step(y)
        # Without effect on the data a group's logarithm means nothing.
        size = float((change.abs() * found.traces.mean(-1).maximum(found.quadratics).clamp(0.0, 1.0)).max())
        self.steps += 1
        self.bar.update()
        self.bar.set_postfix_str(f"largest change {size:.1e}")
        if size > 2.0 * self.size:
            self.history = []
        self.y, self.found, self.size, self.solved = y, found, size, found.converged
        self.done = size <= tolerance
        if self.done:
            return
        # A variance without an optimum runs away by equal steps, which would take very many.
        steady = (change * self.last > 0) & (change.abs() > _STEADY * self.last.abs()) & (change.abs() > _FADING)
        self.stretch, self.last = torch.where(steady, 2.0 * self.stretch, 1.0), change
        stretched = (self.stretch * change).clamp(-_LARGEST_STEP, _LARGEST_STEP)
        self.history = [*self.history[-_MEMORY:], (y, change)]
        y = (y + torch.where(self.stretch > 2.0, stretched, _accelerated(self.history))).clamp(self.low, self.high)
        fading = (found.traces.mean(-1)[: self.groups] < _FADING) & (change[: self.groups] < 0)
        y[: self.groups] = torch.where(fading, self.low[: self.groups], y[: self.groups])
        self.next = y

    def _state(self) -> dict[str, Any]:
        """Everything that a later run needs to go on."""
        assert self.found is not None
        names = ("next", "last", "stretch", "y", "history", "size", "solved", "steps", "iterations", "done")
        found = {name: getattr(self, name) for name in names}
        return {**found, "found": dict(vars(self.found)), "probes": self.probes.warm_start()}

    def _resume(self, state: dict[str, Any], batches: Batches) -> None:
        """Go back to a state."""
        batches.set_random_state(state["passes"])
        moved = moved_to(state, self.y.device)
        self.probes.set_warm_start(moved.pop("probes"))
        self.found = Expectation(**moved.pop("found"))
        for name in set(moved) - {"first_pass", "passes"}:
            setattr(self, name, moved[name])

    def errors(self) -> tuple[Tensor, Tensor]:
        """Standard errors of y, infinite where pruned, and of the effective dimensions at y."""
        assert self.found is not None
        traces = self.found.traces
        means = traces.mean(-1)
        relative = (traces - means.unsqueeze(-1)) / means.clamp_min(1e-12).unsqueeze(-1)
        samples = traces.shape[-1]
        base, _ = self.step(self.y)
        # The logarithm of what has no effect is anyone's, and a system with it has no solution.
        pruned = torch.cat([means[: self.groups] < PRUNED_DIMENSION, torch.zeros_like(means[self.groups :]).bool()])
        free = ((self.y > self.low) & (self.y < self.high) & ~pruned).nonzero()[:, 0]
        slopes = torch.zeros(len(free), len(free), dtype=torch.float64, device=self.y.device)
        for column, index in enumerate(free.tolist()):
            moved = self.y.clone()
            moved[index] += _DIFFERENCE
            slopes[:, column] = (self.step(moved)[0] - base)[free] / _DIFFERENCE
        covariance = relative[free] @ relative[free].mT / (samples * (samples - 1))
        inverse = torch.linalg.pinv(slopes)
        out = torch.full_like(self.y, torch.inf)
        out[free] = (inverse @ covariance @ inverse.mT).diagonal().clamp_min(0.0).sqrt()
        return out, traces[: self.groups].std(-1) / math.sqrt(samples)

    def result(
        self,
        form: str,
        notes: tuple[str, ...],
        errors: Tensor,
        gamma_errors: Tensor,
        interval: tuple[float, float] | None,
        seconds: float,
    ) -> SampledEvidence:
        """Collect what was found."""
        assert self.found is not None
        precision, noise = self.split(self.y)
        gamma = self.found.traces.mean(-1)[: self.groups]
        names = self.lin.groups.names
        off = (gamma < PRUNED_DIMENSION).tolist()
        pruned = tuple(name for name, out in zip(names, off, strict=True) if out)
        warnings = list(notes)
        if not self.solved:
            warnings.append("a linear system was not solved to solver_tolerance: raise max_iterations or num_landmarks")
        if pruned:
            warnings.append(f"pruned: the data ask for no variance from {', '.join(pruned)}")
        report = EvidenceReport(
            log_evidence=math.nan,
            trace=[],
            precision=precision,
            noise=noise,
            effective_dimension=gamma,
            theta_star_norm=self.lin.groups.sum_per_group(self.found.theta_star.square()).sqrt(),
            theta_shift=math.nan,
            residual_noise=self.probes.squared_errors(),
            group_names=names,
            group_sizes=self.lin.groups.sizes,
            pruned=pruned,
            jitter=0.0,
            eigenvalues_cut=0,
            iterations=self.steps,
            evaluations=self.steps,
            seconds=seconds,
            converged=not notes and self.solved,
            method="sampled",
            at="theta_star",
            warnings=tuple(warnings),
            evidence_bounds=interval,
        )
        return SampledEvidence(
            report, precision, noise, errors[: self.groups], errors[self.groups :], gamma, gamma_errors,
            self.found.theta_star, self.found.draws, form, self.iterations, self.lin,
        )  # fmt: skip


def _accelerated(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's step from the last points and their steps; the plain step where that is not moderate."""
    change = history[-1][1]
    if len(history) < 3:
        return change
    moves = torch.stack([b[0] - a[0] for a, b in pairwise(history)], -1)
    bends = torch.stack([b[1] - a[1] for a, b in pairwise(history)], -1)
    weights = torch.linalg.pinv(bends, rtol=1e-8) @ change
    step = change - (moves + bends) @ weights
    if not bool(torch.isfinite(step).all()) or float(step.abs().max()) > _LARGEST_STEP:
        return change
    return step
