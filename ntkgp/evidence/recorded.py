"""Answers of an evidence objective, written down: an optimiser that was killed is run again on what it was told."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ntkgp.checkpoint import Run
from ntkgp.evidence.hyperprior import PenalisedObjective
from ntkgp.evidence.objective import Evaluation
from ntkgp.fingerprint import digest

logger = logging.getLogger("ntkgp")

_NUMBERS = ("value", "sse", "jitter", "rounding", "gap")
_VECTORS = ("pull", "push", "effective_dimension", "squared_norms")


class Answers:
    """All answers of one fit, in order.

    Optimisers are functions of what the objective tells them: fed with the same numbers they come to the same point,
    bit by bit, with whatever memory of theirs (pairs of L-BFGS, line searches, scipy's workspace). So nothing of them
    is kept but the answers, a few numbers each. What the objective itself remembers, warm starts, is kept beside them
    and put back when the first new question comes.

    :param run: where the answers are offered.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._entries: list[dict[str, Any]] = []
        self._warm: dict[str, Any] | None = None
        self._next = 0
        if run.state is not None:
            self._entries, self._warm = list(run.state["answers"]), run.state["warm"]
        self._pending, self._stored = self._warm, len(self._entries)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        self._stored = self._next
        return {"answers": self._entries[: self._next], "warm": self._warm}

    def save(self) -> None:
        """Write the state now, unless nothing is new."""
        if self._stored != self._next:
            self._run.save(self.state())

    def answer(self, objective: Any, question: str, at: tuple[Tensor, ...], ask: Callable[[], Any]) -> Any:
        """The answer that is known, or the objective's own."""
        if self._next < len(self._entries):
            entry = self._entries[self._next]
            if entry["question"] == question and _equal(entry["at"], at):
                self._next += 1
                if self._next == len(self._entries):
                    self._restore(objective)
                return _restored(entry["answer"], at[0])
            # Other code or another processor: what is known from here on is of another search.
            logger.warning("checkpoint: the search takes another way after %d answers, and goes on anew", self._next)
            del self._entries[self._next :]
            self._pending = None
        found = ask()
        self._entries.append({"question": question, "at": _written(at), "answer": _kept(found)})
        self._next += 1
        self._warm = warm_start(objective)
        self._run.offer(self.state)
        return found

    def _restore(self, objective: Any) -> None:
        """Give the objective that answered last its memory back."""
        if self._pending is not None:
            objective.set_warm_start(self._pending)
            self._pending = None


class RecordedObjective:
    """An objective that looks its answers up before it computes them.

    :param objective: any evidence objective.
    :param answers: of this fit.
    """

    def __init__(self, objective: Any, answers: Answers) -> None:
        self.objective, self._answers = objective, answers

    def __getattr__(self, name: str) -> Any:
        if name in ("objective", "_answers"):
            raise AttributeError(name)
        return getattr(self.objective, name)

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        return self._answers.answer(self.objective, "evaluation", (x,), lambda: self.objective(x))

    def mode_point(self, x: Tensor) -> Tensor:
        """Where the curvature would be taken at theta_star."""
        return self._answers.answer(self.objective, "mode", (x,), lambda: self.objective.mode_point(x))

    def logit_change(self, new: Tensor, old: Tensor) -> tuple[float, float]:
        """Largest change of a logit between two points of curvature, and largest logit at the first."""
        return self._answers.answer(self.objective, "change", (new, old), lambda: self.objective.logit_change(new, old))

    def frozen_at(self, point: Tensor) -> RecordedObjective:
        """The same with the curvature of a classification at another point."""
        return RecordedObjective(self.objective.frozen_at(point), self._answers)


def warm_start(objective: Any) -> dict[str, Any] | None:
    """What an objective remembers of its last evaluation; None where evaluations do not depend on it."""
    found = getattr(objective, "warm_start", None)
    return None if found is None else found()


def problem_identity(model: Any, problem: Any, objective: Any, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What a fit of the evidence depends on, as arguments of :meth:`~ntkgp.checkpoint.Checkpoint.run`."""
    lin = getattr(model, "lin", None) or getattr(getattr(model, "features", None), "lin", None)
    options = dict(configuration)
    options["groups"] = [list(problem.group_names), list(problem.group_sizes)]
    if isinstance(objective, PenalisedObjective):
        start = objective.start()
        densities = [objective.log_prior(start + shift) for shift in (0.0, 1.0)]
        options["prior"] = [type(objective.prior).__qualname__, densities]
    noise = getattr(problem, "noise", None)
    # The present values of learned variances are no start of the search.
    options["noise"] = [getattr(noise, name, None) for name in ("fixed", "component", "minimum")]
    x, y = getattr(model, "train_inputs", None), getattr(model, "train_targets", None)
    # What determines the evidence stands for data that the model does not hold.
    names = (
        [field.name for field in dataclasses.fields(problem)] if dataclasses.is_dataclass(problem) else vars(problem)
    )
    fields = {name: getattr(problem, name) for name in names if name not in ("noise", "variant")}
    data = fields if x is None else [list(x), y]
    return {"network": None if lin is None else lin.theta, "data": digest(data), "configuration": options}


def _equal(kept: list[Tensor], at: tuple[Tensor, ...]) -> bool:
    return len(kept) == len(at) and all(torch.equal(a, b.detach().cpu()) for a, b in zip(kept, at, strict=True))


def _written(at: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.detach().to("cpu", copy=True) for x in at]


def _kept(found: Any) -> Any:
    """An answer as tensors and plain values."""
    if isinstance(found, Evaluation):
        numbers = [float(getattr(found, name)) for name in _NUMBERS]
        return {"numbers": numbers, "vectors": _written(tuple(getattr(found, name) for name in _VECTORS))}
    return _written((found,))[0] if isinstance(found, Tensor) else found


def _restored(answer: Any, like: Tensor) -> Any:
    """Inverse of :func:`_kept`."""
    if isinstance(answer, dict):
        vectors = (vector.to(like.device) for vector in answer["vectors"])
        return Evaluation(
            **dict(zip(_NUMBERS, answer["numbers"], strict=True)), **dict(zip(_VECTORS, vectors, strict=True))
        )
    return answer.to(like.device) if isinstance(answer, Tensor) else answer
