"""One call that compares methods on one trained network and one data set."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ntkgp.baselines import Baseline
from ntkgp.baselines.protocol import likelihood_of
from ntkgp.evaluation.comparison.isolation import Outcome, Unsendable, Workplace, attempt
from ntkgp.evaluation.comparison.methods import GaussianProcess, Method, Predictor, default_methods
from ntkgp.evaluation.comparison.results import Comparison, Row
from ntkgp.evaluation.comparison.scores import Predicted, Scale, collect, score
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
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
        ``f(net, train_data)`` that return something with ``predict(x)``; or a dict of them by label. Default: all
        names that need nothing more.
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
    :param folder: where results are kept: a second call with the same network, data and options takes them from there.
        Failures are tried again.
    :param name: of the data set, for :meth:`Comparison.joined`; ``"set/3"`` is split 3 of a set.
    :param progress: show a progress bar.
    :return: :class:`Comparison`. A method that failed is a row that says why.
    :raises ValueError: an unknown method, two of the same label, data that do not fit the network.
    :raises TypeError: data or methods of another kind.

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
    problem = _problem(net, train_data, test_data, ood_data, likelihood, groups, output, target_scale)
    problem.shared.update(max_memory=max_memory, seed=seed)
    if validation is not None:
        problem.shared["validation"] = validation
    chosen = _labelled(default_methods(net, problem.shared) if methods is None else methods)
    kept = None if folder is None else _Kept(Path(folder), problem)
    rows, notes = [], []
    with ExitStack() as stack:
        bench = _Bench(problem, isolate, time_limit, stack)
        for label, method in tqdm(chosen.items(), "methods", disable=not progress):
            row = kept.load(label, method) if kept else None
            if row is None:
                row = bench.row(label, method)
                if kept and not row.failure:
                    kept.save(label, method, row)
            rows.append(replace(row, data=name))
        notes = bench.notes
    kind = problem.shared["likelihood"]
    return Comparison(rows, kind, {name: _targets(problem, kind)}, notes)


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
        try:
            if self._place is None:
                self._place = self._stack.enter_context(Workplace(evaluate, self._problem, warm_up))
            return self._place.run(method, self._limit)
        except Unsendable as reason:
            if self._place is None:
                self._isolate = False
                self.notes.append(f"all methods ran in one process, memory not measured: the network or data {reason}")
            else:
                self.notes.append(f"{label} ran in the calling process, memory not measured: it {reason}")
            return None


class _Kept:
    """Results of earlier calls, by a hash of all that they depend on."""

    def __init__(self, folder: Path, problem: Problem) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        net = [problem.net.state_dict(), str(problem.net)]
        data = [problem.train_data, problem.x, problem.y, problem.outside, problem.scale.mean, problem.scale.std]
        self._key = _digest([net, data, problem.shared])

    def _path(self, label: str, method: Any) -> Path:
        key = _digest((self._key, label, _description(method)))
        plain = "".join(letter if letter.isalnum() else "-" for letter in label)[:40]
        return self._folder / f"{plain}-{key[:16]}.pt"

    def load(self, label: str, method: Any) -> Row | None:
        """The row kept for this method, if it is there and whole."""
        path = self._path(label, method)
        if not path.is_file():
            return None
        try:
            state = torch.load(path, weights_only=True)
            return replace(Row.from_json(state["row"]), predicted=Predicted(**state["predicted"]))
        except Exception:  # a broken file may raise anything; it is written again
            return None

    def save(self, label: str, method: Any, row: Row) -> None:
        """Keep a row; it appears whole or not at all."""
        path = self._path(label, method)
        predicted = {} if row.predicted is None else {k: v for k, v in vars(row.predicted).items() if v is not None}
        part = path.with_suffix(f".{os.getpid()}.part")
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
    _, y = Batches.of(test_data, lin, targets, name="test_data").collect()
    shared = {"likelihood": likelihood, "groups": groups, "output": output}
    outside = None
    if ood_data is not None:
        outside = _inputs(ood_data)
        lin.pack(outside)
    return Problem(net, train_data, test.x, y, outside, Scale.of(target_scale), shared)


def _inputs(data: Any) -> Any:
    """Inputs of data, or the data themselves where they are inputs."""
    if isinstance(data, DataLoader | Dataset) or (isinstance(data, tuple | list) and len(data) == 2):
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
    return method(problem.net, problem.train_data)


def _description(method: Any) -> Any:
    """What a method depends on, as far as it can be told."""
    if isinstance(method, Method):
        other = None if method.net is None else [method.net.state_dict(), str(method.net)]
        return [method.name, other, method.options]
    if isinstance(method, nn.Module):
        return [type(method).__qualname__, method.state_dict()]
    if isinstance(method, Baseline):
        return [
            type(method).__qualname__,
            method.net.state_dict(),
            {k: v for k, v in vars(method).items() if k != "net"},
        ]
    return method


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Add a value to a hash: tensors by their bytes, functions and classes by their names."""
    if isinstance(value, Tensor):
        plain = value.detach().to("cpu").contiguous()
        found.update(f"tensor {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, Mapping):
        found.update(b"{")
        for key in sorted(value, key=str):
            _feed(found, str(key))
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"[{len(value)}".encode())
        for part in value:
            _feed(found, part)
    elif isinstance(value, nn.Module):
        _feed(found, [str(value), value.state_dict()])
    elif isinstance(value, DataLoader | Dataset):
        data = collect_raw(value)
        leaves, _ = torch.utils._pytree.tree_flatten(data.x)
        _feed(found, [leaves, data.y])
    elif value is None or isinstance(value, str | int | float | bool | bytes):
        found.update(repr(value).encode())
    else:
        named = value if callable(value) else type(value)
        found.update(f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', named)}".encode())
