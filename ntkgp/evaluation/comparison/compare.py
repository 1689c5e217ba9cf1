"""One call that compares methods on one trained network and one data set."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ntkgp.baselines import Baseline
from ntkgp.baselines.protocol import likelihood_of
from ntkgp.distributed import alone, broadcast_object, gather_objects, rank, world_size
from ntkgp.evaluation.comparison.isolation import Ended, Outcome, Unsendable, Workplace, attempt
from ntkgp.evaluation.comparison.methods import GaussianProcess, Method, Predictor, default_methods
from ntkgp.evaluation.comparison.results import Comparison, Row
from ntkgp.evaluation.comparison.scores import Predicted, Scale, collect, score
from ntkgp.fingerprint import Unknowable, fingerprint
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.frozen import private_copy
from ntkgp.models.batches import Batches, collect_raw
from ntkgp.models.network_gp import NetworkGP

KINDS = ("auto", "regression", "classification")


@dataclass(frozen=True)
class Problem:
    """What all methods share."""

    net: nn.Module
    train_data: Any
    x: Any
    y: Tensor
    outside: Any
    scale: Scale
    shared: dict[str, Any]


def compare(
    net: nn.Module,
    train_data: Any,
    test_data: Any,
    methods: Sequence[Any] | Mapping[str, Any] | str | None = None,
    ood_data: Any = None,
    *,
    likelihood: str = "auto",
    validation: Any = None,
    groups: str | ParameterGroups = "normalization",
    output: Callable[[Any], Tensor] | None = None,
    target_scale: tuple[Any, Any] | None = None,
    max_memory: str | int | float = "2GiB",
    seed: int = 0,
    isolate: bool = True,
    time_limit: float | None = None,
    folder: str | Path | None = None,
    name: str = "",
    progress: bool = False,
) -> Comparison:
    """
    Fit methods to one trained network and its training data, and score their predictions of the test data.

    :param net: the trained network; never modified.
    :param train_data: ``(x, y)`` with x as the network takes it, or a Dataset or DataLoader of such pairs.
    :param test_data: the same, held in memory.
    :param methods: names (:func:`method_names`), :class:`Method` with options, comparators not yet fitted
        (:class:`~ntkgp.baselines.Baseline`), fitted models (``ExactNTKGP``, …), functions
        ``f(net, train_data)``, called with a copy of the network, that return something with ``predict(x)``; or a dict
        of them by label. Default: all names that need nothing more.
    :param ood_data: inputs from elsewhere, or data of which the inputs are taken: how well are they told from the test
        inputs by the variance (regression), or by the entropy and by the latent variance (classification)?
    :param likelihood: ``"regression"``, ``"classification"``, or ``"auto"``: integer targets are labels.
    :param validation: held-out data, for the methods that calibrate on them.
    :param groups, output, max_memory, seed: passed to every method that has them.
    :param target_scale: ``(mean, std)`` by which targets were standardised; scores are then in original units.
    :param isolate: every method in a process of its own, whose peak memory is reported, and which may fail as it
        likes. What cannot be sent there (functions and classes of ``__main__``) runs in this process, without the
        memory and with a note.
    :param time_limit: seconds for each method, where it has a process of its own.
    :param folder: where results are kept: a second call with the same network, data and options takes them from there,
        by :func:`~ntkgp.fingerprint.fingerprint`. Failures are tried again.
    :param name: of the data set, for :meth:`Comparison.joined`; ``"set/3"`` is split 3 of a set.
    :param progress: show a progress bar.
    :return: :class:`Comparison`. A method that failed is a row that says why.
    :raises ValueError: an unknown method, two of the same label, data that do not fit the network.
    :raises TypeError: data or methods of another kind.

    In a process group (:mod:`ntkgp.distributed`) all ranks make this call; each computes its share of the missing
    methods by itself, and all of them get the whole table.

    Cost: that of the methods, and with ``isolate`` some seconds for another interpreter. Prediction is timed apart from
    the fit; a method's memory is beyond that of the interpreter with network and data.

    >>> x = torch.linspace(-1, 1, 40).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> found = compare(net, (x, x.sin()), (x, x.sin()), ["network", "gp", "laplace-diagonal"], isolate=False)
    >>> found.methods, sorted(found["gp"].scores)[:3]
    (['network', 'gp', 'laplace-diagonal'], ['coverage', 'cqm', 'crps'])
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
    if time_limit is not None and not (isinstance(time_limit, int | float) and time_limit > 0):
        raise ValueError(f"time_limit: expected a positive number of seconds, got {time_limit!r}")
    problem = _problem(net, train_data, test_data, ood_data, likelihood, groups, output, target_scale)
    problem.shared.update(max_memory=max_memory, seed=seed)
    if validation is not None:
        problem.shared["validation"] = validation
    chosen = _labelled(default_methods(net, problem.shared) if methods is None else methods)
    with ExitStack() as stack:
        bench = _Bench(problem, isolate, time_limit, stack)
        kept = _Kept(None if folder is None else Path(folder), problem, isolate, bench.notes)
        # Before the fits, which may change the methods.
        paths = {label: kept.path(label, method) for label, method in chosen.items()}
        rows = {label: row for label, path in paths.items() if path is not None and (row := _load(path)) is not None}
        # What rank 0 has found: a rank that looks later may find what another has just written.
        rows = broadcast_object(rows)
        own = [label for label in chosen if label not in rows][rank() :: world_size()]
        with alone():
            for label in tqdm(own, "methods", disable=not progress):
                row, path = bench.row(label, chosen[label]), paths[label]
                if path is not None and not row.failure:
                    _save(path, row)
                rows[label] = row
    notes: list[str] = []
    for found, said in gather_objects((rows, bench.notes)):
        rows |= found
        notes += said
    kind = problem.shared["likelihood"]
    listed = [replace(rows[label], data=name) for label in chosen]
    return Comparison(listed, kind, {name: _targets(problem, kind)}, notes)


def evaluate(problem: Problem, method: Any) -> Row:
    """Fit one method, predict and score: a row without label and memory."""
    start = time.perf_counter()
    predictor = _fitted(problem, method)
    middle = time.perf_counter()
    found = predictor.predict(problem.x)
    end = time.perf_counter()
    kind = problem.shared["likelihood"]
    if isinstance(found, Bernoulli | Categorical) != (kind == "classification"):
        raise TypeError(f"predict: {type(found).__name__} is no prediction for {kind}")
    predicted = collect(found, problem.y, problem.scale)
    outside = None if problem.outside is None else collect(predictor.predict(problem.outside), None, problem.scale)
    scores = score(predicted, problem.y, outside, problem.scale)
    return Row(
        "", "", {key: value for key, (value, _) in scores.items()}, {key: error for key, (_, error) in scores.items()},
        middle - start, end - middle, predicted=predicted,
    )  # fmt: skip


def warm_up() -> None:
    """A comparison of one number, for what torch and this library import on first use."""
    x = torch.ones(2, 1)
    with torch.random.fork_rng(devices=[]):
        compare(nn.Linear(1, 1), (x, x), (x, x), ["laplace-full", "gp"], isolate=False)


class _Bench:
    """Where methods are run."""

    def __init__(self, problem: Problem, isolate: bool, limit: float | None, stack: ExitStack) -> None:
        self._problem, self._isolate, self._limit, self._stack = problem, isolate, limit, stack
        self._place: Workplace | None = None
        self.notes: list[str] = []

    def row(self, label: str, method: Any) -> Row:
        """The row of one method."""
        outcome = self._elsewhere(label, method) if self._isolate else None
        if outcome is None:
            # A method sees the random state that it was given, and leaves none behind.
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                outcome = Outcome(*attempt(evaluate, self._problem, method), math.nan)
        if outcome.failure:
            return Row(label, failure=outcome.failure)
        return replace(outcome.result, method=label, memory=outcome.memory)

    def _elsewhere(self, label: str, method: Any) -> Outcome | None:
        if self._place is None:
            try:
                _on_cpu(self._problem)
                self._place = self._stack.enter_context(Workplace(evaluate, self._problem, warm_up))
            except (Unsendable, Ended) as reason:
                self._isolate = False
                self.notes.append(f"all methods ran in one process, memory not measured: network and data: {reason}")
                return None
        try:
            return self._place.run(method, self._limit)
        except Unsendable as reason:
            self.notes.append(f"{label} ran in the calling process, memory not measured: it {reason}")
            return None
        except Ended as reason:
            self._place.close()
            self._place = None
            return Outcome(None, str(reason), math.nan)


def _on_cpu(problem: Problem) -> None:
    """A fork of a process that holds tensors of an accelerator cannot use it."""
    data = tree_leaves((problem.x, problem.y, problem.outside, problem.train_data))
    for part in (*problem.net.parameters(), *problem.net.buffers(), *data):
        if isinstance(part, Tensor) and part.device.type != "cpu":
            raise Unsendable(f"on {part.device}, that a forked process cannot use")


class _Kept:
    """Results of earlier calls, by a hash of all that they depend on."""

    def __init__(self, folder: Path | None, problem: Problem, isolate: bool, notes: list[str]) -> None:
        self._folder, self._notes = folder, notes
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        data = [problem.train_data, problem.x, problem.y, problem.outside, problem.scale.mean, problem.scale.std]
        try:
            self._key = fingerprint(_version(), isolate, problem.net, data, problem.shared)
        except Unknowable as reason:
            self._folder = None
            notes.append(f"no results are kept: {reason}")

    def path(self, label: str, method: Any) -> Path | None:
        """Where a row of this method is kept; None where it cannot be."""
        if self._folder is None:
            return None
        plain = "".join(letter if letter.isalnum() else "-" for letter in label)[:40]
        try:
            return self._folder / f"{plain}-{fingerprint(self._key, label, method)[:16]}.pt"
        except Unknowable as reason:
            self._notes.append(f"the result of {label} is not kept: {reason}")
            return None


def _version() -> str:
    try:
        return version("ntkgp")
    except PackageNotFoundError:
        return ""


def _load(path: Path) -> Row | None:
    """The row that is kept in a file, if it is there and whole."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True)
        return replace(Row.from_json(state["row"]), predicted=Predicted(**state["predicted"]))
    except Exception:  # a broken file may raise anything; it is written again
        return None


def _save(path: Path, row: Row) -> None:
    """Keep a row; it appears whole or not at all."""
    predicted = {} if row.predicted is None else {k: v for k, v in vars(row.predicted).items() if v is not None}
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    torch.save({"row": row.to_json(), "predicted": predicted}, part)
    part.replace(path)


def _problem(
    net: nn.Module, train_data: Any, test_data: Any, ood_data: Any, likelihood: str,
    groups: str | ParameterGroups, output: Callable[[Any], Tensor] | None, target_scale: Any,
) -> Problem:  # fmt: skip
    """Data that were looked at: a mistake in them is an error now, not a failure of every row."""
    if likelihood not in KINDS:
        raise ValueError(f"likelihood: expected one of {KINDS}, got {likelihood!r}")
    train, test = collect_raw(train_data, limit=0), collect_raw(test_data, "test_data")
    if likelihood == "auto":
        is_integer = isinstance(train.y, Tensor) and not train.y.is_floating_point() and not train.y.is_complex()
        likelihood = "classification" if is_integer else "regression"
    lin = LinearizedNetwork(net, test.example, groups="single", output=output)
    targets = likelihood_of(likelihood, lin.num_outputs)
    for _ in Batches.of(train_data, lin, targets):
        pass
    # Of the rows just read: a second pass over a loader may have another order.
    _, y = Batches.of((test.x, test.y), lin, targets, name="test_data").collect()
    scale = Scale.of(target_scale)
    for part in (scale.mean, scale.std):
        if part.numel() not in (1, lin.num_outputs):
            raise ValueError(f"target_scale: expected one number or {lin.num_outputs} each, got {part.numel()}")
    shared = {"likelihood": likelihood, "groups": groups, "output": output}
    outside = None
    if ood_data is not None:
        outside = _inputs(ood_data, lin)
        lin.packing.pack(outside, "ood_data")
    return Problem(net, train_data, test.x, y, outside, scale, shared)


def _inputs(data: Any, lin: LinearizedNetwork) -> Any:
    """Inputs of data, or the data themselves where they are inputs."""
    is_data = isinstance(data, DataLoader | Dataset) or (isinstance(data, tuple | list) and len(data) == 2)
    if is_data and not lin.packing.is_raw(data):  # a network may have two inputs
        return collect_raw(data, "ood_data").x
    return data


def _targets(problem: Problem, kind: str) -> Tensor:
    """Test targets as the kept predictions are scaled."""
    y = problem.y.detach().to("cpu")
    if kind == "classification":
        return y.flatten().long()
    return y.double().reshape(len(y), -1) * problem.scale.std + problem.scale.mean


def _labelled(methods: Any) -> dict[str, Any]:
    """Methods by label."""
    if isinstance(methods, str | Method | Baseline | NetworkGP):
        methods = [methods]
    if isinstance(methods, Mapping):
        pairs = [(label, _method(method, label)) for label, method in methods.items()]
        for label in methods:
            if not (isinstance(label, str) and label.strip() and label.isprintable()):
                raise ValueError(f"methods: expected labels of printable characters, got {label!r}")
    else:
        pairs = [(_label(method), method) for method in map(_method, methods)]
    if not pairs:
        raise ValueError("methods: expected at least one, got none")
    labels = [label for label, _ in pairs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"methods: {', '.join(twice)} more than once; give labels, Method(name, label) or a dict")
    return dict(pairs)


def _method(given: Any, label: str | None = None) -> Any:
    if isinstance(given, str):
        return Method(given, label)
    if isinstance(given, Method | Baseline | NetworkGP) or callable(given) or hasattr(given, "predict"):
        return given
    raise TypeError(f"methods: expected a name, a Method, a model or a function, got {type(given).__name__}")


def _label(method: Any) -> str:
    if isinstance(method, Method):
        return method.label
    return getattr(method, "__name__", type(method).__name__)


def _fitted(problem: Problem, method: Any) -> Predictor:
    if isinstance(method, Method):
        return method.build(problem.net, problem.train_data, problem.shared)
    if isinstance(method, NetworkGP):
        return GaussianProcess(method)
    if hasattr(method, "predict") and not isinstance(method, type):
        return method.fit(problem.train_data)
    return method(private_copy(problem.net), problem.train_data)
