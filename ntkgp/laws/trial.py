"""A law, and the trial of a library by it: one structure on one problem."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ntkgp.laws.oracle import DOUBLE, Dense, point_blocks
from ntkgp.laws.problems import Problem, problem
from ntkgp.laws.protocol import Adapter, Fitted, NotApplicableError, Structure, Task

Measure = Callable[["Trial"], "float | tuple[float, str]"]
# Of structures whose H is that of exact inference on their weights.
PROJECTED = ("exact", "last_layer", "subnetwork")
DENSE = (*PROJECTED, "diagonal", "kfac")
ALL = (*DENSE, "subset", "nystrom", "variational")
# Networks on which every author's K-FAC is the same matrix: no biases in hidden layers, Linear layers only.
_PLAIN_KFAC = ("normalised", "softmax")


@dataclass(frozen=True)
class Law:
    """An identity, an inequality or a promise, and how far a library is from it.

    :ivar id: stable; letters and numbers follow the laws of the project's tests, ``U`` are promises to users.
    :ivar statement: in one line.
    :ivar kinds: of structures that it says something about.
    :ivar problems: that it is tried on.
    :ivar tolerance: the error up to which it holds.
    :ivar per_tensor: whether it needs a prior precision for each tensor.
    :ivar definition_free: whether K-FAC may be tried on networks where its definitions differ.
    :ivar strict: whether the adapter's stated rounding is left out of the tolerance.
    :ivar measure: the error of a :class:`Trial`, with a word about it if there is one to say.
    """

    id: str
    statement: str
    kinds: tuple[str, ...]
    problems: tuple[str, ...]
    tolerance: float
    per_tensor: bool
    definition_free: bool
    strict: bool
    measure: Measure

    def problems_of(self, kind: str) -> tuple[str, ...]:
        """The problems on which it says something about a kind of structure."""
        if kind not in self.kinds:
            return ()
        if kind == "kfac" and not self.definition_free:
            return tuple(name for name in self.problems if name in _PLAIN_KFAC)
        return self.problems


ENTERED: dict[str, Law] = {}


def law(
    name: str,
    statement: str,
    *,
    kinds: tuple[str, ...] = DENSE,
    problems: tuple[str, ...] = ("normalised",),
    tolerance: float = 1e-9,
    per_tensor: bool = False,
    definition_free: bool = False,
    strict: bool = False,
) -> Callable[[Measure], Measure]:
    """Enter a function as the measure of a law."""

    def enter(measure: Measure) -> Measure:
        ENTERED[name] = Law(name, statement, kinds, problems, tolerance, per_tensor, definition_free, strict, measure)
        return measure

    return enter


class Trial:
    """One structure of an adapter on one problem.

    :param adapter: of the library.
    :param name: of the structure.
    :param problem_name: of the problem.
    """

    def __init__(self, adapter: Adapter, name: str, problem_name: str) -> None:
        self.adapter, self.name, self.problem_name = adapter, name, problem_name
        self.structure: Structure = adapter.structures[name]
        self.kind = self.structure.kind
        self.problem = problem(problem_name)
        self.x_test = self.problem.x_test

    @cached_property
    def condition(self) -> float:
        """Of the problem's dense system with all weights."""
        return self.exact.condition

    @property
    def precision(self) -> Tensor:
        """Of the task, (T,)."""
        given = self.problem.precision
        return torch.full_like(given, 2.0) if self.structure.single_precision else given

    def precisions(self, count: int) -> list[Tensor]:
        """Some other precisions, each (T,)."""
        generator = torch.Generator().manual_seed(11)
        width = 1 if self.structure.single_precision else len(self.precision)
        draws = torch.randn(count, width, generator=generator, dtype=DOUBLE)
        return [self.precision * torch.exp(draw) for draw in draws]

    def task(self, changed: Problem | None = None, **changes: Any) -> Task:
        """What the adapter is asked to fit; ``changes`` of the :class:`Task`, on this problem or a changed one."""
        p = self.problem if changed is None else changed
        indices = torch.arange(1, sum(q.numel() for q in p.net.parameters()), 5)
        task = Task(
            copy.deepcopy(p.net), p.x, p.y, p.likelihood, self.precision, p.noise, self.name, self.kind, indices=indices
        )
        return replace(task, **changes)

    def fit(self, changed: Problem | None = None, **changes: Any) -> Fitted:
        """By the library."""
        return self.adapter.fit(self.task(changed, **changes))

    @cached_property
    def fitted(self) -> Fitted:
        """By the library, kept for the laws that only ask for moments."""
        return self.fit()

    @cached_property
    def reference(self) -> Dense:
        """By the reference, kept."""
        return self.dense()

    @cached_property
    def exact(self) -> Dense:
        """Exact inference with all weights by the reference, kept."""
        return self.dense(kind="exact")

    def dense(self, changed: Problem | None = None, **changes: Any) -> Dense:
        """By the reference."""
        return Dense(self.task(changed, **changes))

    def require(self, condition: bool, reason: str) -> None:
        """End the trial where the law says nothing."""
        if not condition:
            raise NotApplicableError(reason)


def worst_of(*errors: float) -> float:
    """The largest; infinite where one is no number, which ``max`` would pass over."""
    return max(map(float, errors)) if all(map(math.isfinite, errors)) else math.inf


def learned(fitted: Fitted) -> tuple[Tensor, float]:
    """The hyper-parameters at the end of a fit.

    :raises ValueError: they are no positive numbers.
    """
    precision, noise = fitted.hyperparameters()
    if not bool((torch.isfinite(precision) & (precision > 0)).all()) or not 0 < noise < math.inf:
        raise ValueError(f"learned precision {precision.tolist()} and noise {noise}")
    return precision, noise


def spread(fitted: Fitted, x: Tensor) -> Tensor:
    """The largest covariances that a library gives: of all inputs, (1, N·C, N·C), or of each, (N, C, C)."""
    try:
        return fitted.joint_covariance(x).unsqueeze(0)
    except (NotApplicableError, AttributeError):
        return fitted.covariance(x)


def spread_like(found: Tensor, joint: Tensor, num_outputs: int) -> Tensor:
    """A joint covariance (N·C, N·C) in the form of what :func:`spread` gave."""
    return joint.unsqueeze(0) if found.shape[1:] == joint.shape else point_blocks(joint, num_outputs)
