"""Fits of variational models: evidence, closed form, collapsed bound, minibatches."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.checkpoint import Checkpoint, Run, moved_to, plain, running
from ntkgp.distributed import world_size
from ntkgp.models.batches import Batches
from ntkgp.models.noise import NoiseLink
from ntkgp.models.variational.batch import shared_gradient
from ntkgp.models.variational.expectations import gaussian_term, noise_block
from ntkgp.models.variational.optimum import CollapsedObjective, CollapsedSearch, Statistics, predictive_scores

if TYPE_CHECKING:
    from ntkgp.evidence.report import EvidenceReport
    from ntkgp.models.variational import VariationalNTKGP

BATCH = 256  # rows per step where nobody says
_EPOCHS = 20
_COLLAPSED_STEPS = 120
_EVIDENCE = ("auto", "subset", "bound", "validation", None)
_SCALES = tuple(10 ** (i / 6) for i in range(-24, 13))
_SHUFFLE = 1
_FLAT = 1e-9  # relative gain of a step of the collapsed bound below which it has converged


@dataclass
class FitHistory:
    """What a fit did.

    :ivar stages: what was run, in order: "evidence", "bound", "validation", "optimum", "collapsed",
        "minibatches".
    :ivar objective: objective of all data in nats after each step (an estimate of it for minibatches).
    :ivar validation: mean predictive log-likelihood of the validation data, the start first.
    :ivar evidence: report of the evidence on a part of the data.
    :ivar interrupted: whether the fit was cut short by the keyboard.
    :ivar seconds: wall-clock time.
    """

    stages: list[str] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    evidence: EvidenceReport | None = None
    interrupted: bool = False
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """As tensors and plain values."""
        report = self.evidence
        known = None if report is None else {part.name: getattr(report, part.name) for part in fields(report)}
        return {**vars(self), "evidence": known}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        from ntkgp.evidence.report import EvidenceReport

        report = state["evidence"]
        known = None if report is None else EvidenceReport(**report)
        # Copies: the state is written again with later answers, and must stay that of its stage's start.
        traces = {name: list(state[name]) for name in ("stages", "objective", "validation")}
        vars(self).update({**state, **traces, "evidence": known, "interrupted": False})


@dataclass(frozen=True)
class _Plan:
    """Arguments of a fit."""

    epochs: int | None
    iterations: int | None
    learning_rate: float
    patience: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations", "patience"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("epochs, iterations: expected one of the two, got both")
        if not (isinstance(self.learning_rate, int | float) and 0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate!r}")


def fit_variational(
    model: VariationalNTKGP, train_data: Any, *, epochs: int | None, iterations: int | None, learning_rate: float,
    batch_size: int | None, validation: Any, patience: int, evidence: str | None, evidence_rows: int, seed: int,
    progress: bool, checkpoint: Checkpoint | str | os.PathLike[str] | None,
) -> VariationalNTKGP:  # fmt: skip
    """See :meth:`ntkgp.VariationalNTKGP.fit`."""
    plan = _Plan(epochs, iterations, learning_rate, patience, seed, progress)
    if evidence not in _EVIDENCE:
        raise ValueError(f"evidence: expected one of {_EVIDENCE}, got {evidence!r}")
    if evidence == "validation" and validation is None:
        raise ValueError("evidence='validation' needs validation data, got validation=None")
    if evidence in _EVIDENCE[1:4] and not model.products.is_tangent:
        raise ValueError(f"evidence={evidence!r} is that of the tangent kernel; this model has another kernel")
    started = time.perf_counter()
    batches = model._batches(train_data, batch_size)
    batches.share()
    try:
        known = batches.num_data
    except ValueError:  # not before the first pass
        known = model.num_data
    _check_length(model, known)
    held_out = None if validation is None else model._batches(validation, batch_size, "validation")
    closed = model.objective.is_closed_form and not (model.inducing_points.requires_grad or model.learn_hyperparameters)
    held = [batches.batch_size or 1] if not closed else []
    held += [] if held_out is None else [held_out.batch_size or 1]
    model.products.check_memory(len(model.inducing_points), min(known, max([1, *held])))
    history = model.history = FitHistory()
    if evidence == "auto":
        evidence = _automatic(model, evidence_rows, held_out is not None)
    with running(checkpoint, lambda: _identity(model, batches, held_out, plan, evidence, evidence_rows)) as kept:
        with _fitting(model):
            run = _Run(model, batches, held_out, plan, history, kept)
            try:
                if evidence is not None and kept.state is None:
                    _fit_evidence(model, batches, evidence_rows, plan, history, kept.checkpoint)
                run(rescale=evidence if evidence in ("bound", "validation") else None)
            except KeyboardInterrupt:
                history.interrupted = True
                if world_size() > 1:  # the others could only wait for this one
                    raise
            finally:
                run.restore()
                history.seconds = time.perf_counter() - started
        if not history.interrupted and (kept.state is None or kept.state["stage"] != "done"):
            kept.save(run.state("done"))
    model._data = batches
    return model


def _identity(
    model: VariationalNTKGP, batches: Batches, held_out: Batches | None, plan: _Plan, evidence: str | None, rows: int
) -> dict[str, Any]:
    """What a fit depends on, for a checkpoint."""
    options = {name: value for name, value in vars(plan).items() if name != "progress"}
    options |= {name: getattr(model, name) for name in ("mean", "learn_hyperparameters", "num_data", "max_memory")}
    options |= {
        "objective": [model.objective.power, model.objective.expectation],
        "kernel": str(model.kernel),
        "model": model.state_dict(),
    }
    options |= {"evidence": evidence, "evidence_rows": rows, "batch_size": batches.batch_size}
    options["groups"] = [list(model.lin.groups.names), model.lin.groups.index]
    options["validation"] = None if held_out is None else held_out.rows()
    return {"network": model.lin.theta, "data": batches.rows(), "configuration": options}


def _check_length(model: VariationalNTKGP, num_data: int) -> None:
    if num_data != model.num_data:
        raise ValueError(f"train_data: has N = {num_data} rows, the model was made for {model.num_data}")


@contextmanager
def _fitting(model: VariationalNTKGP) -> Iterator[None]:
    """The model in train mode, whatever the caller's gradient mode; in eval mode afterwards."""
    model._fitting = True
    model.train()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        model._fitting = False
        model.objective.generator = None
        model.eval()


def _automatic(model: VariationalNTKGP, rows: int, validated: bool) -> str | None:
    """How hyper-parameters are found: not at all if they are learned, or no longer what they were made with."""
    if not model.products.is_tangent or model.learn_hyperparameters or not bool((model.kernel.precision == 1).all()):
        return None
    if validated:
        return "validation"
    # The optimum for a part of the data leaves too much prior variance where few inducing inputs stand for many.
    return "subset" if model.num_data <= rows // model.num_outputs else "bound"


def _fit_evidence(
    model: VariationalNTKGP, batches: Batches, rows: int, plan: _Plan, history: FitHistory,
    checkpoint: Checkpoint | None,
) -> None:  # fmt: skip
    """Precisions and noise by the exact evidence on a random part of the data."""
    from ntkgp.evidence import fit_evidence
    from ntkgp.models.exact import ExactNTKGP
    from ntkgp.models.forms import dual_form

    count = max(1, min(model.num_data, rows // model.num_outputs))
    # As many as the budget allows.
    while count > 1 and dual_form(model.lin, count).nbytes > model.max_memory:
        count //= 2
    x, y = _sample(batches, count, plan.seed)
    exact = ExactNTKGP(x, y, copy.deepcopy(model.likelihood), model.lin, max_memory=model.max_memory)
    part = None if checkpoint is None else checkpoint.part("evidence")
    history.evidence = fit_evidence(exact, progress=plan.progress, checkpoint=part)
    noise = history.evidence.noise
    model.set_hyperparameters(history.evidence.precision, noise if noise.numel() else None)
    model.reset_variational()
    history.stages.append("evidence")


def _sample(batches: Batches, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `count` rows of one pass, all alike likely (reservoir sampling)."""
    generator = torch.Generator().manual_seed(seed)
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    for x, y in batches:
        key = torch.rand(len(x), generator=generator, dtype=torch.float64).to(x.device)
        joined = (x, y, key) if kept is None else tuple(torch.cat(pair) for pair in zip(kept, (x, y, key), strict=True))
        chosen = joined[2].topk(min(count, len(joined[2])), largest=False).indices.sort().values
        kept = joined[0][chosen], joined[1][chosen], joined[2][chosen]
    assert kept is not None
    return kept[0], kept[1]


@dataclass
class _Place:
    """Where a fit by minibatches stands: steps done, before this epoch, epochs without progress, sums of the epoch."""

    done: int = 0
    epoch: int = 0
    stale: int = 0
    sums: float = 0.0
    seen: int = 0


class _Run:
    """One fit of L, the inducing inputs and perhaps hyper-parameters."""

    def __init__(
        self, model: VariationalNTKGP, batches: Batches, held_out: Batches | None, plan: _Plan, history: FitHistory,
        kept: Run | None = None,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.held_out, self.plan, self.history = model, batches, held_out, plan, history
        self.kept = kept or Run()
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def __call__(self, rescale: str | None = None) -> None:
        model, found = self.model, self.kept.state
        if found is None:
            self._optimum(rescale)
        else:
            self._resume(found)
            if found["stage"] == "done":
                return
        closed = model.objective.is_closed_form and not model.learn_hyperparameters
        learned = model.inducing_points.requires_grad
        if closed and not learned:
            return
        if closed and model.products.fits(model.num_data, len(model.inducing_points)):
            self._collapsed()
        else:
            self._minibatches()
            self.restore()
        if closed:
            self._optimum()

    def state(self, stage: str, **more: Any) -> dict[str, Any]:
        """Of the model and the fit, for a checkpoint; `more` belongs to the stage."""
        best = None if self.best is None else {"score": self.best[0], "model": self.best[1]}
        model = dict(self.model.state_dict())
        return {"stage": stage, "model": model, "history": self.history.state(), "best": best, **more}

    def _resume(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self.model.load_state_dict(state["model"])
        self.history.set_state(state["history"])
        best = moved_to(state["best"], self.model.inducing_points.device)
        self.best = None if best is None else (best["score"], best["model"])
        if "passes" in state:
            self.batches.set_random_state(state["passes"])

    def restore(self) -> None:
        """The state with the best validation score, where there is one."""
        if self.best is not None:
            self.model.load_state_dict(self.best[1])

    def _optimum(self, rescale: str | None = None) -> None:
        found = self.model.statistics(self.batches, progress=self.plan.progress)
        _check_length(self.model, found.num_data)
        if rescale == "bound":
            found = self._rescaled(found)
        elif rescale == "validation":
            found = self._validated(found)
        self.model.adopt(found)
        self.history.stages.append("optimum")
        if self.model.objective.is_closed_form and not self.model.learn_hyperparameters:
            self.history.objective.append(found.fixed_mean_bound())
        self._validate()

    def _rescaled(self, found: Statistics) -> Statistics:
        """Kernel and noise times what maximises the collapsed bound of all data; written to the model."""
        model = self.model
        noise = None if model.is_classification else NoiseLink(model.likelihood, 1, model.num_outputs).model().values
        kernel_scale, noise_scale = found.best_scales(learn_noise=noise is not None)
        wanted = None if noise is None else noise * noise_scale
        _, stored = model.set_hyperparameters(model.kernel.precision.detach() / kernel_scale, wanted)
        self.history.stages.append("bound")
        if wanted is not None and stored is not None and not torch.allclose(stored, wanted, rtol=1e-9, atol=0):
            return model.statistics(self.batches, progress=self.plan.progress)
        return found.rescaled(kernel_scale, noise_scale)

    def _validated(self, found: Statistics) -> Statistics:
        """Kernel times what predicts the validation data best; written to the model."""
        model = self.model
        assert self.held_out is not None
        scores = predictive_scores(model, found, self.held_out, _SCALES)
        best = _SCALES[int(scores.argmax())]
        model.set_hyperparameters(model.kernel.precision.detach() / best)
        self.history.stages.append("validation")
        return found.rescaled(best)

    def _validate(self) -> bool:
        """Score the present state; whether it is worse than the best."""
        if self.held_out is None:
            return False
        model = self.model
        total = count = 0.0
        model.eval()
        with torch.no_grad():
            for x, y in self.held_out:
                latent = model(x)
                if model.is_classification:
                    total += float(model.likelihood.log_marginal(y, latent).sum())
                else:
                    total += float(_log_density(model, latent, y))
                count += len(x)
        model.train()
        score = total / count
        self.history.validation.append(score)
        if self.best is not None and score <= self.best[0]:
            return True
        self.best = score, {name: value.detach().clone() for name, value in model.state_dict().items()}
        return False

    def _collapsed(self) -> None:
        """L-BFGS on the collapsed bound over the inducing inputs, in units of their spread."""
        model, history, kept = self.model, self.history, self.kept
        start = kept.state
        if start is None:
            history.stages.append("collapsed")
            start = plain(self.state("collapsed", passes=self.batches.random_state(), answers=[]))
        x, y = self.batches.collect()
        search = CollapsedSearch(CollapsedObjective(model, x, y), model.inducing_points, _spread(x), start["answers"])
        steps = self.plan.iterations or self.plan.epochs or _COLLAPSED_STEPS
        bar = tqdm(total=steps, desc="inducing inputs", disable=not self.plan.progress)

        def record(_: np.ndarray) -> None:
            history.objective.append(search.best[1])
            bar.set_postfix(objective=f"{search.best[1]:.2f}")
            bar.update()

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
            found = search(point)
            # The model has not moved: its state is that of the start, and the answers say the rest.
            kept.offer(lambda: {**start, "answers": search.answers})
            return found

        try:
            scipy.optimize.minimize(
                evaluate, search.start, jac=True, method="L-BFGS-B", callback=record,
                options={"maxiter": steps, "maxfun": 2 * steps, "ftol": _FLAT, "gtol": 0.0},
            )  # fmt: skip
        except KeyboardInterrupt:
            history.interrupted = True
            if world_size() > 1:
                raise
        finally:
            bar.close()
            with torch.no_grad():
                model.inducing_points.copy_(search.best[0])

    def _minibatches(self) -> None:
        """Adam on an unbiased estimate of the objective."""
        model, plan, kept = self.model, self.plan, self.kept
        generator = torch.Generator(model.inducing_points.device).manual_seed(plan.seed)
        model.objective.generator = generator
        optimizer = torch.optim.Adam(self._parameter_groups(), betas=(0.9, 0.99))
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        total = plan.iterations or (plan.epochs or _EPOCHS) * self._batches_per_epoch()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        at = _Place()
        if kept.state is None:
            self.history.stages.append("minibatches")
        else:
            found = kept.state
            optimizer.load_state_dict(found["optimizer"])
            schedule.load_state_dict(found["schedule"])
            generator.set_state(found["generator"])
            at = _Place(**found["place"])
        with tqdm(total=total, initial=at.done, desc="fit", disable=not plan.progress) as bar:
            # An epoch may be complete but for its score.
            while at.stale < plan.patience and (at.done < total or at.epoch < at.done):
                passes = {} if kept.checkpoint is None else self.batches.random_state()

                def state(passes: dict[str, Tensor] = passes) -> dict[str, Any]:
                    return self.state(
                        "minibatches", optimizer=optimizer.state_dict(), schedule=dict(schedule.state_dict()),
                        generator=generator.get_state(), place=dict(vars(at)), passes=passes,
                    )  # fmt: skip

                for index, (x, y) in enumerate(self._shuffled(at.epoch)):
                    if at.done == total:
                        break
                    if index < at.done - at.epoch:
                        continue
                    optimizer.zero_grad()
                    value = shared_gradient(model, x, y, learned)
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the objective became {value}; lower learning_rate")
                    optimizer.step()
                    schedule.step()
                    at.sums, at.seen = at.sums + value * len(x), at.seen + len(x)
                    at.done += 1
                    bar.update()
                    kept.offer(state)
                self.history.objective.append(at.sums / at.seen)
                bar.set_postfix(objective=f"{at.sums / at.seen:.2f}")
                at.stale = at.stale + 1 if self._validate() else 0
                at.epoch, at.sums, at.seen = at.done, 0.0, 0

    def _batches_per_epoch(self) -> int:
        try:
            return len(self.batches)
        except TypeError:  # a stream of data
            return sum(1 for _ in self.batches)

    def _shuffled(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch; tensors in a new order each time, loaders as they come."""
        if not self.batches.in_memory:
            yield from self.batches
            return
        x, y = self.batches.collect()
        generator = torch.Generator().manual_seed(_SHUFFLE + self.plan.seed + step)
        size = -(-len(x) // len(self.batches))
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(size):
            yield x[rows], y[rows]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What is learned, with steps relative to its size."""
        model, rate = self.model, self.plan.learning_rate
        strategy = model.variational_strategy
        groups = [{"params": [strategy.variational_root], "lr": rate * _size(strategy.variational_root)}]
        if model.inducing_points.requires_grad:
            unit = float(_spread(model.inducing_points.detach()).mean())
            groups.append({"params": [model.inducing_points], "lr": rate * unit})
        if model.learn_hyperparameters:
            groups.append({"params": [model.dual_mean], "lr": rate * _size(model.dual_mean)})
            learned = [p for p in (*model.kernel.parameters(), *model.likelihood.parameters()) if p.requires_grad]
            if learned:
                groups.append({"params": learned, "lr": rate})
        return groups


def _log_density(model: VariationalNTKGP, latent: Any, y: Tensor) -> Tensor:
    """Sum over the points of log N(y; m, V + D)."""
    c = model.num_outputs
    mean = latent.mean.reshape(len(y), c)
    blocks = latent.lazy_covariance_matrix.point_blocks(c)
    return gaussian_term(y.reshape(mean.shape) - mean, blocks, noise_block(model.likelihood, c), 1.0).sum()


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each column, (D,), of all together where it is zero."""
    if len(x) < 2:
        return torch.ones_like(x[0])
    each, overall = x.std(0), x.std()
    return torch.where(each > 0, each, overall.clamp_min(1e-12))


def _size(parameter: Tensor) -> float:
    """Root mean square, one where it is zero."""
    size = float(parameter.detach().square().mean().sqrt())
    return size if size > 0 else 1.0
