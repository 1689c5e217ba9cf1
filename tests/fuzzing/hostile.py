"""Public calls with bad arguments: each is refused by an error of the library that names the argument."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp import baselines
from ntkgp.evidence import one_pass, sampled_evidence
from tests.fuzzing.problem import DOUBLE, Problem
from tests.fuzzing.watch import Find, is_clear, where

# (what, names of which one must be in the message, the call)
Attempt = tuple[str, tuple[str, ...], Callable[[], Any]]
HOSTILE: dict[str, Callable[[Problem, random.Random], None]] = {}


def hostile(attempts: Callable[[Problem], Iterator[Attempt]]) -> Callable[[Problem], Iterator[Attempt]]:
    """Register a generator of attempts; a case makes four of them."""

    def check(p: Problem, rng: random.Random) -> None:
        found = list(attempts(p))
        for what, names, attempt in rng.sample(found, min(4, len(found))):
            try:
                attempt()
            except Exception as error:
                if not is_clear(error, names):
                    said = " ".join(str(error).split())[:200]
                    raise Find(f"{what}: {type(error).__name__} at {where(error)}: {said}") from error
            else:
                raise Find(f"{what}: accepted")

    HOSTILE[attempts.__name__] = check
    return attempts


def broken(p: Problem, x: Any) -> Iterator[tuple[str, Any]]:
    """Inputs that are none, from good ones."""
    packed = p.lin.pack(x)
    yield "None", None
    yield "a string", "x"
    yield "a list of numbers", [1.0, 2.0]
    yield "no rows", packed[:0]
    yield "one column more", torch.cat([packed, packed[:, :1]], 1)
    yield "complex", packed.to(torch.complex128)
    yield "NaN", torch.full_like(packed, math.nan)
    yield "infinite", torch.full_like(packed, math.inf)
    yield "a scalar", torch.tensor(1.0)
    yield "a numpy array", packed.numpy()
    if isinstance(x, dict):
        yield "a missing key", {"ids": x["ids"]}
        yield "rows that differ", {"ids": x["ids"], "side": torch.cat([x["side"]] * 2)}
    if isinstance(x, tuple):
        yield "a tuple of one", x[:1]


INPUTS = ("input", "x", "train", "test")


@hostile
def bad_inputs(p: Problem) -> Iterator[Attempt]:
    model = ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), p.lin).eval()
    v, u = torch.ones(p.lin.num_parameters), torch.ones(p.f.shape)
    calls: dict[str, Callable[[Any], Any]] = {
        "lin": p.lin, "pack": p.lin.pack, "jvp": lambda x: p.lin.jvp(x, v), "vjp": lambda x: p.lin.vjp(x, u),
        "jacobian": p.lin.jacobian, "grams": p.lin.grams, "grams x2": lambda x: p.lin.grams(p.x, x) if x is not None
        else p.lin.grams(x), "gram_diagonals": p.lin.gram_diagonals, "factors": p.lin.factors, "model": model,
        "posterior": model.posterior, "features": lambda x: p.lin.features(x, v[None]),
        "symmetric_grams": p.lin.symmetric_grams, "verify": p.lin.groups.verify,
        "posterior_bounds": model.posterior_bounds,
    }  # fmt: skip
    for what, x in broken(p, p.x_test):
        for name, function in calls.items():
            yield f"{name}({what})", INPUTS, lambda f=function, x=x: f(x)


@hostile
def bad_examples(p: Problem) -> Iterator[Attempt]:
    for what, x in broken(p, p.x_test):
        if what == "one column more" and p.case.net.kind == "sequence":
            continue
        yield f"example {what}", ("example", "net"), lambda x=x: ntkgp.LinearizedNetwork(p.case.net, x)
    net = p.case.net
    for groups in ("none", None, 3, "layers", ntkgp.ParameterGroups({"a": "nothing*"}), {"a": ["*"]}):
        yield f"groups {groups!r}", ("groups",), lambda g=groups: ntkgp.LinearizedNetwork(net, p.x, groups=g)
    for memory in (0, -1, "two GiB", None, math.nan):
        yield (
            f"max_memory {memory!r}", ("max_memory",),
            lambda m=memory: ntkgp.LinearizedNetwork(net, p.x, max_memory=m),
        )  # fmt: skip
    for what, bad in (("a function", torch.sin), ("None", None), ("no weights", nn.Tanh())):
        yield f"net {what}", ("net",), lambda n=bad: ntkgp.LinearizedNetwork(n, p.x)


@hostile
def bad_vectors(p: Problem) -> Iterator[Attempt]:
    lin, size, shape = p.lin, p.lin.num_parameters, p.f.shape
    for what, v in (
        ("too long", torch.ones(size + 1)), ("empty", torch.ones(0)), ("None", None), ("a list", [1.0] * size),
        ("three axes", torch.ones(1, 1, size)), ("complex", torch.ones(size, dtype=torch.complex64)),
    ):  # fmt: skip
        yield f"jvp v {what}", ("v",), lambda v=v: lin.jvp(p.x, v)
        v2 = v[None] if isinstance(v, Tensor) and v.ndim == 1 else v
        yield f"features v {what}", ("v",), lambda v=v2: lin.features(p.x, v)
    for what, u in (
        ("rows", torch.ones(shape[0] + 1, shape[1])), ("flat", torch.ones(p.f.numel() + 1)), ("None", None),
        ("complex", torch.ones(shape, dtype=torch.complex64)),
    ):  # fmt: skip
        yield f"vjp u {what}", ("u",), lambda u=u: lin.vjp(p.x, u)
    groups = len(lin.groups)
    for what, w in (
        ("long", torch.ones(groups + 1)), ("number", 1.0), ("None", None),
    ):  # fmt: skip
        yield f"weighted_gram variance {what}", ("variance",), lambda w=w: lin.weighted_gram(p.x, None, w)
    for memory in (1, 0, -5, "1 B", "lots", None):
        yield f"grams max_memory {memory!r}", ("max_memory",), lambda m=memory: lin.grams(p.x, max_memory=m)
        yield (
            f"diagonals max_memory {memory!r}", ("max_memory",),
            lambda m=memory: lin.gram_diagonals(p.x, max_memory=m),
        )  # fmt: skip
        yield f"factors max_memory {memory!r}", ("max_memory",), lambda m=memory: lin.factors(p.x, max_memory=m)
        yield (
            f"symmetric_grams max_memory {memory!r}", ("max_memory",),
            lambda m=memory: lin.symmetric_grams(p.x, max_memory=m),
        )  # fmt: skip
    yield "grams dtype", ("dtype",), lambda: lin.grams(p.x, dtype=torch.float16)
    yield "storage", ("storage",), lambda: lin.symmetric_grams(p.x, storage="cloud")
    yield "outputs", ("outputs",), lambda: lin.factors(p.x, outputs=torch.full((p.sizes[0],), p.c))


@hostile
def bad_targets(p: Problem) -> Iterator[Attempt]:
    n, c = p.f.shape
    y = p.y
    wrong = {
        "None": None, "one row more": torch.cat([y, y[:1]]), "NaN": torch.full_like(y, math.nan),
        "infinite": torch.full_like(y, math.inf), "a list": y.tolist(), "a string": "y",
        "another width": torch.zeros(n, c + 1, dtype=DOUBLE), "a scalar": torch.tensor(1.0),
        "complex": y.to(torch.complex128),
    }  # fmt: skip
    names = ("train_y", "target", "train_data", "y", "data")
    for what, bad in wrong.items():
        yield f"exact {what}", names, lambda b=bad: ntkgp.ExactNTKGP(p.x, b, p.gaussian(), p.lin)
        yield (
            f"nystrom {what}", names,
            lambda b=bad: ntkgp.NystromNTKGP((p.x, b), p.gaussian(), p.lin).fit(progress=False),
        )  # fmt: skip
        yield f"from_network {what}", names, lambda b=bad: ntkgp.from_network(p.case.net, (p.x, b))
        yield f"one_pass {what}", names, lambda b=bad: one_pass(p.lin, (p.x, b), p.gaussian())
        yield f"laplace {what}", names, lambda b=bad: baselines.Laplace(p.case.net).fit((p.x, b))
        yield f"point {what}", names, lambda b=bad: baselines.Point(p.case.net).fit((p.x, b))
    labels = {
        "too large": torch.full((n,), max(c, 2)), "negative": torch.full((n,), -1), "halves": torch.full((n,), 0.5),
        "two columns": torch.zeros(n, 2, dtype=torch.long), "none": torch.zeros(0, dtype=torch.long), "None": None,
    }  # fmt: skip
    names = (*names, "label")
    for what, bad in labels.items():
        yield f"exact labels {what}", names, lambda b=bad: ntkgp.ExactNTKGP(p.x, b, p.categorical(), p.lin)
        yield (
            f"from_network labels {what}", names,
            lambda b=bad: ntkgp.from_network(p.case.net, (p.x, b), "classification"),
        )  # fmt: skip
        yield (
            f"laplace labels {what}", names,
            lambda b=bad: baselines.Laplace(p.case.net, "classification").fit((p.x, b)),
        )  # fmt: skip
    for what, data in (("None", None), ("x alone", p.x), ("a triple", (p.x, y, y)), ("empty", ()), ("a number", 3)):
        yield f"from_network data {what}", names, lambda d=data: ntkgp.from_network(p.case.net, d)
        yield f"laplace data {what}", names, lambda d=data: baselines.Laplace(p.case.net).fit(d)
        yield f"one_pass data {what}", names, lambda d=data: one_pass(p.lin, d, p.gaussian())


def _bad_precisions(p: Problem) -> Iterator[Attempt]:
    """What is no precision, and no noise."""
    lin, net, data = p.lin, p.case.net, (p.x, p.y)
    for bad in (0, -1.0, math.nan, math.inf, "one", None, torch.ones(97), torch.zeros(1)):

        def set_precision(bad: Any = bad) -> None:
            ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), lin).kernel.precision = bad

        yield f"precision {bad!r}", ("precision",), set_precision
        if bad is not None:
            yield (
                f"laplace precision {bad!r}", ("precision",),
                lambda b=bad: baselines.Laplace(net, precision=b).fit(data),
            )  # fmt: skip
            yield (
                f"prior precision {bad!r}", ("precision",),
                lambda b=bad: baselines.PriorOnly(net, precision=b).fit(data),
            )  # fmt: skip
            yield (
                f"hfl precision {bad!r}", ("precision",),
                lambda b=bad: baselines.HessianFreeLaplace(net, precision=b).fit(data),
            )  # fmt: skip
            yield (
                f"vl precision {bad!r}", ("precision", "activations"),
                lambda b=bad: baselines.VariationalLaplace(net, precision=b, epochs=1).fit(data),
            )  # fmt: skip
            if not (isinstance(bad, Tensor) and len(bad) > 1):
                yield f"laplace noise {bad!r}", ("noise",), lambda b=bad: baselines.Laplace(net, noise=b).fit(data)


def _bad_counts(p: Problem) -> Iterator[Attempt]:
    """What is no number of anything."""
    lin, data = p.lin, (p.x, p.y)
    for number in (0, -1, 1.5, "two", True):
        yield (
            f"num_landmarks {number!r}", ("num_landmarks",),
            lambda b=number: ntkgp.NystromNTKGP(data, p.gaussian(), lin, num_landmarks=b),
        )  # fmt: skip
        yield (
            f"num_features {number!r}", ("num_features",),
            lambda b=number: ntkgp.NystromNTKGP(data, p.gaussian(), lin, num_features=b),
        )  # fmt: skip
        yield (
            f"one_pass num_landmarks {number!r}", ("num_landmarks",),
            lambda b=number: one_pass(lin, data, p.gaussian(), num_landmarks=b),
        )  # fmt: skip
        yield (
            f"num_data {number!r}", ("num_data",),
            lambda b=number: ntkgp.VariationalNTKGP(p.x, p.gaussian(), lin, b, learn_inducing=False),
        )  # fmt: skip
        yield (
            f"num_samples {number!r}", ("num_samples",),
            lambda b=number: sampled_evidence(lin, data, p.gaussian(), b),
        )  # fmt: skip
        yield (
            f"sample_functions {number!r}", ("num_samples",),
            lambda b=number: _exact(p).sample_functions(b, torch.Generator()),
        )  # fmt: skip
        yield (
            f"max_iterations {number!r}", ("max_iterations",),
            lambda b=number: _bounds(p, max_iterations=b) if b != 0 else _bounds(p, max_iterations=-2),
        )  # fmt: skip


@hostile
def bad_options(p: Problem) -> Iterator[Attempt]:
    lin, net, data = p.lin, p.case.net, (p.x, p.y)
    yield "lin", ("lin",), lambda: ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), net)
    yield "likelihood None", ("likelihood",), lambda: ntkgp.ExactNTKGP(p.x, p.y, None, lin)
    student = gpytorch.likelihoods.StudentTLikelihood()
    yield "likelihood Student", ("likelihood",), lambda: ntkgp.ExactNTKGP(p.x, p.y, student, lin)
    other = ntkgp.CategoricalLikelihood(num_classes=p.c + 1)
    yield "likelihood classes", ("likelihood",), lambda: ntkgp.ExactNTKGP(p.x, p.labels, other, lin)
    yield "mean", ("mean",), lambda: ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), lin, mean="map")
    yield "form", ("form",), lambda: ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), lin, form="both")
    yield "memory", ("max_memory",), lambda: ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), lin, form="primal", max_memory=9)
    yield from _bad_precisions(p)
    yield from _bad_counts(p)
    named = {"landmarks": "best"}
    best = lambda: ntkgp.NystromNTKGP(data, p.gaussian(), lin, **named).fit(progress=False)  # noqa: E731
    yield "landmarks", ("landmark",), best
    for tolerance in (-1.0, 1.0, math.nan):
        yield (
            f"tolerance {tolerance}", ("tolerance",),
            lambda b=tolerance: ntkgp.NystromNTKGP(data, p.gaussian(), lin, tolerance=b),
        )  # fmt: skip
    yield "inference", ("inference",), lambda: ntkgp.from_network(net, data, inference="best")
    yield "from_network likelihood", ("likelihood",), lambda: ntkgp.from_network(net, data, "counts")
    yield "structure", ("structure",), lambda: baselines.Laplace(net, structure="block")
    yield "size", ("size",), lambda: baselines.Laplace(net, structure="subnetwork", size=10**9).fit(data)
    yield "mask", ("mask",), lambda: baselines.Laplace(net, structure="subnetwork", mask=torch.zeros(3)).fit(data)
    yield "not fitted", ("fit",), lambda: baselines.Laplace(net).predict(p.x)
    yield "link", ("link",), lambda: baselines.Laplace(net, link="exact")
    yield "layer", ("layer",), lambda: baselines.Laplace(net, structure="last_layer", layer="nothing").fit(data)
    yield "load", ("state",), lambda: baselines.Laplace(net).load_state_dict({}, p.x)


def _exact(p: Problem) -> ntkgp.ExactNTKGP:
    return ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), p.lin).eval()


def _bounds(p: Problem, **options: Any) -> Any:
    return _exact(p).posterior_bounds(p.x_test, **options)


@hostile
def bad_evidence(p: Problem) -> Iterator[Attempt]:
    model = ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), p.lin)
    for name, bad in (
        ("method", "newton"), ("at", "theta"), ("curvature", "half"), ("targets", "residual"), ("targets", "y"),
        ("curvature", "full"), ("bounds", (1.0, 0.5)), ("bounds", (0.0, 1.0)), ("bounds", (math.nan, 1.0)),
        ("bounds", 3), ("bounds", None), ("tolerance", -1.0), ("tolerance", math.nan), ("tolerance", "small"),
        ("max_evaluations", 0), ("max_evaluations", -3), ("max_evaluations", "many"), ("prior", 3),
    ):  # fmt: skip
        yield f"{name}={bad!r}", (name,), lambda n=name, b=bad: ntkgp.fit_evidence(model, **{n: b})
    yield "model", ("model",), lambda: ntkgp.fit_evidence(p.lin)
    unfitted = ntkgp.VariationalNTKGP(p.x, p.gaussian(), p.lin, p.sizes[0], learn_inducing=False)
    yield "variational without data", ("fit", "data"), lambda: ntkgp.fit_evidence(unfitted)
    for name, bad in (
        ("form", "both"), ("curvature", "full"), ("max_steps", 0), ("tolerance", -1.0), ("num_landmarks", 0),
    ):  # fmt: skip
        yield (
            f"sampled {name}={bad!r}", (name,),
            lambda n=name, b=bad: sampled_evidence(p.lin, (p.x, p.y), p.gaussian(), 2, **{n: b}),
        )  # fmt: skip
