"""Public calls with good arguments: each result is that of the dense oracle."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp import baselines
from ntkgp.evidence import one_pass
from tests import nystrom_oracle as nys
from tests import reference as ref
from tests.fuzzing.problem import DOUBLE, Problem, generator
from tests.fuzzing.watch import Find

CALLS: dict[str, Callable[[Problem, random.Random], None]] = {}


def call(function: Callable[[Problem, random.Random], None]) -> Callable[[Problem, random.Random], None]:
    CALLS[function.__name__] = function
    return function


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Find(what)


def maybe_packed(p: Problem, x: Any, rng: random.Random) -> Any:
    return p.lin.pack(x) if rng.random() < 0.5 else x


def no_negative(what: str, covariance: Tensor, scale: float) -> None:
    """Positive semi-definite up to rounding."""
    require(bool(torch.isfinite(covariance).all()), f"{what}: not finite")
    low = float(torch.linalg.eigvalsh((covariance + covariance.mT) / 2).min())
    require(low >= -1e-9 * max(scale, 1e-30), f"{what}: eigenvalue {low:.2e} beside {scale:.2e}")


# --- the tangent model


@call
def outputs(p: Problem, rng: random.Random) -> None:
    p.close("lin(x)", p.lin(maybe_packed(p, p.x, rng)), p.f)


@call
def packing(p: Problem, rng: random.Random) -> None:
    packed = p.lin.pack(p.x)
    require(torch.equal(p.lin.pack(packed), packed), "pack is not idempotent")
    again = p.lin.pack(p.lin.unpack(packed))
    require(torch.equal(again, packed), "pack(unpack(x)) differs")
    require(packed.shape == (p.sizes[0], p.lin.input_width), "pack: shape")


@call
def jvp(p: Problem, rng: random.Random) -> None:
    count = rng.choice([None, 0, 1, 3])
    shape = (p.lin.num_parameters,) if count is None else (count, p.lin.num_parameters)
    v = torch.randn(shape, generator=generator("v", p.case.number), dtype=DOUBLE)
    expected = (v @ p.j.T).unflatten(-1, p.f.shape)
    p.close("jvp", p.lin.jvp(maybe_packed(p, p.x, rng), v.to(p.case.dtype)), expected, factor=10) if v.numel() else None


@call
def vjp(p: Problem, rng: random.Random) -> None:
    count = rng.choice([None, 1, 3])
    shape = p.f.shape if count is None else (count, *p.f.shape)
    u = torch.randn(shape, generator=generator("u", p.case.number), dtype=DOUBLE)
    expected = u.flatten(-2) @ p.j
    p.close("vjp", p.lin.vjp(maybe_packed(p, p.x, rng), u.to(p.case.dtype)), expected, factor=10)


@call
def jacobian(p: Problem, rng: random.Random) -> None:
    p.close("jacobian", p.lin.jacobian(maybe_packed(p, p.x, rng)).flatten(0, 1), p.j)


def grams_of(p: Problem, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[:, p.index == g] @ b[:, p.index == g].T for g in range(len(p.lin.groups))])


def budget(p: Problem, rng: random.Random) -> Any:
    """A budget that is enough, sometimes only just."""
    n, t = p.sizes
    return rng.choice(["2GiB", 10**7, p.lin.gram_memory(max(n, t), max(n, t))])


@call
def grams(p: Problem, rng: random.Random) -> None:
    if rng.random() < 0.5:
        p.close("grams", p.lin.grams(maybe_packed(p, p.x, rng), max_memory=budget(p, rng)), grams_of(p, p.j, p.j))
        return
    came = p.lin.grams(maybe_packed(p, p.x, rng), maybe_packed(p, p.x_test, rng), max_memory=budget(p, rng))
    p.close("grams(x1, x2)", came, grams_of(p, p.j, p.j_test), scale=float((p.j.square()).sum(1).max()))


@call
def gram_diagonals(p: Problem, rng: random.Random) -> None:
    rows = p.j.unflatten(0, p.f.shape)
    expected = torch.stack([
        rows[..., p.index == g] @ rows[..., p.index == g].mT for g in range(len(p.lin.groups))
    ])  # fmt: skip
    p.close("gram_diagonals", p.lin.gram_diagonals(maybe_packed(p, p.x, rng)), expected)


@call
def weighted_gram(p: Problem, rng: random.Random) -> None:
    variance = 1 / p.precision
    source = p.lin.factors(p.x) if rng.random() < 0.5 else p.x
    scale = float(p.k.abs().max())
    if rng.random() < 0.5:
        p.close("weighted_gram", p.lin.weighted_gram(source, None, variance), p.k)
    else:
        expected = ref.gram(p.j_test, p.entries, p.j)
        p.close("weighted_gram(x1, x2)", p.lin.weighted_gram(p.x_test, source, variance), expected, scale=scale)


@call
def features(p: Problem, rng: random.Random) -> None:
    v = torch.randn(3, p.lin.num_parameters, generator=generator("v", p.case.number), dtype=DOUBLE)
    came = p.lin.features(p.x, v.to(p.case.dtype))
    p.close("features", came, (p.j @ v.T).unflatten(0, p.f.shape), factor=10)


@call
def symmetric_grams(p: Problem, rng: random.Random) -> None:
    kept = p.lin.symmetric_grams(p.x, storage=rng.choice(["memory", "disk", "auto"]))
    p.close("symmetric_grams", kept.weighted_sum(1 / p.precision), p.k)


@call
def groups_verify(p: Problem, rng: random.Random) -> None:
    x = p.case.sample(6, p.case.number)
    error = p.lin.groups.verify(x)
    require(error.shape == (len(p.lin.groups),), "verify: shape")
    require(bool(torch.isfinite(error).all()), "verify: not finite")
    layers = list(p.case.net.modules())
    # Two normalised features are signs; where they agree in all rows, BatchNorm divides rounding by rounding.
    signs = any(isinstance(m, torch.nn.LayerNorm) and m.normalized_shape == (2,) for m in layers)
    signs = signs and any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in layers)
    for name, flag, value in zip(p.lin.groups.names, p.lin.groups.is_normalized, error.tolist(), strict=True):
        require(
            not flag or signs or value < 1e-6,
            f"verify: group {name!r} is marked as normalised, Euler's error {value:.1e}",
        )
    require(bool(repr(p.lin.groups)) and bool(repr(p.lin)), "repr")


@call
def input_gradients(p: Problem, rng: random.Random) -> None:
    """d/dx of a jvp by autograd, against differences of the float64 network."""
    packed = p.lin.pack(p.x_test)
    if p.case.net.kind in ("tokens", "dict") or p.case.dtype != DOUBLE or p.case.has_kinks:
        return
    v = torch.randn(p.lin.num_parameters, generator=generator("v", p.case.number), dtype=DOUBLE)
    d = torch.randn(packed.shape, generator=generator("d", p.case.number), dtype=DOUBLE)
    x = packed.clone().requires_grad_()
    value = p.lin.jvp(x, v)
    slope = float((torch.autograd.grad(value.sum(), x)[0] * d).sum()) if value.requires_grad else 0.0
    h = 1e-5
    sums = [float(p.lin.jvp(packed + s * h * d, v).sum()) for s in (-1, 1)]
    expected = (sums[1] - sums[0]) / (2 * h)
    size = max(abs(expected), float(value.detach().abs().max()) * 0.1, 1e-6)
    require(abs(slope - expected) <= 2e-5 * size, f"gradient in x {slope:.8g}, difference {expected:.8g}")


# --- kernels and means


@call
def kernel(p: Problem, rng: random.Random) -> None:
    kernel = ntkgp.kernels.NeuralTangentKernel(p.lin, precision=p.precision).double()
    x, z = p.lin.pack(p.x).double(), p.lin.pack(p.x_test).double()
    p.close("kernel(x, x)", kernel(x).to_dense().detach(), p.k)
    cross = kernel(x, z).to_dense().detach()
    p.close("kernel(x, z)", cross, ref.gram(p.j, p.entries, p.j_test), scale=float(p.k.abs().max()))
    p.close("kernel(diag=True)", kernel(x, diag=True).detach(), p.k.diagonal())
    batch = torch.stack([x, x.flip(0)])
    p.close("kernel(batch)", kernel(batch).to_dense().detach()[0], p.k)


@call
def means(p: Problem, rng: random.Random) -> None:
    x = p.lin.pack(p.x).double()
    tangent = p.f.flatten() - p.j @ ref.theta(p.case.net)
    scale = float((p.j.abs() @ ref.theta(p.case.net).abs()).max())
    p.close("NetworkMean", ntkgp.means.NetworkMean(p.lin)(x).flatten(), p.f.flatten())
    p.close("LinearizedMean", ntkgp.means.LinearizedMean(p.lin)(x).flatten(), tangent, scale=scale)


@call
def nystrom_kernel(p: Problem, rng: random.Random) -> None:
    kernel = ntkgp.kernels.NystromKernel(p.lin, p.x_test, precision=p.precision).double()
    x, z = p.lin.pack(p.x).double(), p.lin.pack(p.x_test).double()
    # Directions of small eigenvalues are cut at 1e-10.
    at_landmarks = ref.gram(p.j_test, p.entries)
    p.close("K̂ at the landmarks", kernel(z).to_dense().detach(), at_landmarks, factor=100 * max(1, 1e-9 / p.rounding))
    came = kernel(x).to_dense().detach()
    over = float(torch.linalg.eigvalsh(came - p.k).max())
    require(over <= p.rounding * float(p.k.abs().max()) * len(p.k), f"K̂ is not below K: {over:.1e}")


# --- exact inference


def exact(p: Problem, **options: Any) -> ntkgp.ExactNTKGP:
    model = ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), p.lin, **options).eval()
    model.kernel.precision = p.precision
    return model


def prior_scale(p: Problem) -> float:
    return float(ref.gram(p.j_test, p.entries).abs().max())


@call
def exact_regression(p: Problem, rng: random.Random) -> None:
    mean = rng.choice(["network", "posterior"])
    model = exact(p, form=rng.choice(["dual", "primal"]), mean=mean)
    came = model(maybe_packed(p, p.x_test, rng))
    p.close("covariance", came.covariance_matrix.detach(), p.posterior, factor=p.condition, scale=prior_scale(p))
    variance = came.variance.detach().flatten()
    p.close("variance", variance, p.posterior.diagonal(), factor=p.condition, scale=prior_scale(p))
    if mean == "network":
        p.close("mean", came.mean.detach().flatten(), p.f_test.flatten())
    else:
        theta, noise = ref.theta(p.case.net), torch.full((len(p.k),), p.noise, dtype=DOUBLE)
        star = ref.gaussian_primal(p.j, p.t, p.entries, noise, p.index).theta_star
        expected = p.f_test.flatten() + p.j_test @ (star - theta)
        scale = float((p.j_test.abs() @ (star.abs() + theta.abs())).max())
        p.close("mean", came.mean.detach().flatten(), expected, factor=p.condition, scale=scale)
    observed = model.likelihood(came)
    require(bool((observed.variance >= came.variance).all()), "the likelihood adds no noise")


@call
def exact_classification(p: Problem, rng: random.Random) -> None:
    model = ntkgp.ExactNTKGP(p.x, p.labels, p.categorical(), p.lin, form=rng.choice(["dual", "primal"])).eval()
    model.kernel.precision = p.precision
    came = model(p.x_test)
    b = ref.curvature(p.f)
    h = p.j.T @ b @ p.j + p.entries.diag()
    expected = p.j_test @ torch.linalg.solve(h, p.j_test.T)
    p.close("covariance", came.covariance_matrix.detach(), expected, factor=p.condition, scale=prior_scale(p))
    probabilities = model.likelihood(came).probs
    require(bool(((probabilities >= 0) & (probabilities <= 1 + 1e-9)).all()), "probabilities outside [0, 1]")


def evidence_of(p: Problem, precision: Tensor, noise: float) -> float:
    entries = precision[p.index]
    rows = torch.full((len(p.k),), noise, dtype=DOUBLE)
    return ref.gaussian_primal(p.j, p.t, entries, rows, p.index).log_evidence


@call
def evidence_regression(p: Problem, rng: random.Random) -> None:
    """The reported evidence is that of the reported hyper-parameters, and no neighbour has a larger one."""
    if p.case.dtype != DOUBLE or p.has_idle_groups or p.lin.groups.index.unique().numel() > 8:
        return
    at = rng.choice(["theta_star", "theta_star", "theta_map"])
    model = exact(p, form=rng.choice(["dual", "primal"]))
    report = ntkgp.fit_evidence(model, method=rng.choice(["mackay", "lbfgs"]), at=at)
    noise = float(report.noise)
    require(bool(torch.isfinite(report.precision).all()) and noise > 0, "fit_evidence: hyper-parameters")
    if at == "theta_map":
        rows = torch.full((len(p.k),), noise, dtype=DOUBLE)
        theta = ref.theta(p.case.net)
        expected = ref.map_log_evidence(p.j, p.t, theta, report.precision[p.index], rows, p.index)
    else:
        expected = evidence_of(p, report.precision, noise)
    rounding = 1e-7 * (1 + abs(expected)) * len(p.k)
    require(abs(report.log_evidence - expected) <= rounding, f"{at}: {report.log_evidence!r}, oracle {expected!r}")
    require(torch.allclose(model.kernel.precision.detach(), report.precision), "the model has other precisions")
    require(bool(str(report)), "report")
    if at == "theta_star" and report.converged:
        for g in range(len(report.precision)):
            moved = report.precision.clone()
            moved[g] *= rng.choice([0.8, 1.25])
            better = evidence_of(p, moved, noise) - expected
            require(better <= 1e-4 * (1 + abs(expected)), f"group {g}: a neighbour has {better:.2e} nats more")


@call
def evidence_classification(p: Problem, rng: random.Random) -> None:
    if p.case.dtype != DOUBLE or p.has_idle_groups:
        return
    model = ntkgp.ExactNTKGP(p.x, p.labels, p.categorical(), p.lin, form=rng.choice(["dual", "primal"])).eval()
    report = ntkgp.fit_evidence(model, curvature=rng.choice(["simple", "simple", "quadratic", "full"]))
    require(bool(torch.isfinite(report.precision).all()), "precision")
    if model.curvature == "simple":
        offset = (p.f.flatten() - p.j @ ref.theta(p.case.net)).view_as(p.f)
        entries = report.precision[p.index]
        expected = ref.softmax_primal(p.j, offset, p.f, p.labels, entries, p.index).log_evidence
        rounding = 1e-6 * (1 + abs(expected))
        require(abs(report.log_evidence - expected) <= rounding, f"{report.log_evidence!r}, oracle {expected!r}")
    variance = model(p.x_test).variance
    require(bool((variance >= 0).all() and torch.isfinite(variance).all()), "variance")


@call
def conditioning(p: Problem, rng: random.Random) -> None:
    """B10: new observations one after the other are the batch of all."""
    model = exact(p, form=rng.choice(["dual", "primal"]))
    g = generator("more", p.case.number)
    more = p.case.sample(2, p.case.number + 7)
    y = torch.randn(2, p.c, generator=g, dtype=DOUBLE)
    came = model.condition_on_observations(p.lin.pack(more).double(), y)(p.x_test)
    j = torch.cat([p.j, ref.jacobian(p.case.net, more).flatten(0, 1)])
    h = j.T @ j / p.noise + p.entries.diag()
    expected = p.j_test @ torch.linalg.solve(h, p.j_test.T)
    factor = p.condition * (1 + float((j.square() / p.entries).sum()) / min(p.noise, 1.0))
    p.close("conditioned covariance", came.covariance_matrix.detach(), expected, factor=factor, scale=prior_scale(p))


@call
def samples(p: Problem, rng: random.Random) -> None:
    """Whitened by the oracle's covariance, draws have χ² many squares."""
    model = exact(p, form=rng.choice(["dual", "primal"]))
    draws = model.sample_functions(40, generator("draw", p.case.number))(p.x_test).flatten(1).double()
    require(bool(torch.isfinite(draws).all()), "draws: not finite")
    again = (model.sample_functions(1, generator("draw", p.case.number))(p.x_test) for _ in range(2))
    require(torch.equal(*again), "draws: not reproducible")
    values, vectors = torch.linalg.eigh(p.posterior)
    keep = values > 1e-4 * values.max().clamp_min(1e-30)
    # A float32 network whose own Jacobian is off by percents, enlarged by the condition, has no covariance to meet.
    rough = p.rounding * p.condition > 0.1
    if rough or not bool(keep.any()) or float(values.max()) < 1e-10 * prior_scale(p):
        return
    white = (draws - p.f_test.flatten()) @ vectors[:, keep] / values[keep].sqrt()
    freedom = white.numel()
    z = (float(white.square().sum()) - freedom) / (2 * freedom) ** 0.5
    require(abs(z) < 7, f"draws: χ² is {z:.1f} standard deviations off")


@call
def bounds(p: Problem, rng: random.Random) -> None:
    model = exact(p, form="dual")
    low, high = model.posterior_bounds(p.x_test, max_iterations=rng.choice([0, 1, 3, 20]))
    exact_variance, slack = p.posterior.diagonal(), p.rounding * p.condition * prior_scale(p)
    require(bool((low.flatten() <= exact_variance + slack).all()), "posterior_bounds: lower bound above")
    require(bool((high.flatten() >= exact_variance - slack).all()), "posterior_bounds: upper bound below")


@call
def botorch_posterior(p: Problem, rng: random.Random) -> None:
    model = exact(p)
    found = model.posterior(p.lin.pack(p.x_test).double(), observation_noise=rng.random() < 0.5)
    require(found.mean.shape == (p.sizes[1], p.c), f"posterior: shape {tuple(found.mean.shape)}")
    p.close("posterior mean", found.mean.detach().flatten(), p.f_test.flatten())


# --- approximations


def as_data(p: Problem, y: Tensor, rng: random.Random) -> Any:
    """The data as tensors, or as a loader of pairs."""
    if rng.random() < 0.5 or not isinstance(p.x, Tensor):
        return p.x, y
    return DataLoader(TensorDataset(p.x, y), batch_size=rng.choice([1, 3, 8]))


@call
def nystrom_regression(p: Problem, rng: random.Random) -> None:
    """All data as landmarks (C5, C6), in one pass."""
    residual = rng.random() < 0.5
    model = ntkgp.NystromNTKGP(
        as_data(p, p.y, rng), p.gaussian(), p.lin, num_landmarks=100, num_features=None, residual=residual
    )
    model.kernel.precision = p.precision
    came = model.fit(progress=False)(p.x_test).covariance_matrix.detach()
    phi, phi_test = (nys.Nystrom(p.j, p.entries).phi(rows) for rows in (p.j, p.j_test))
    inner = torch.eye(phi.shape[1], dtype=DOUBLE) + phi.T @ phi / p.noise
    expected = phi_test @ torch.linalg.solve(inner, phi_test.T)
    if residual:
        left = ref.gram(p.j_test, p.entries) - phi_test @ phi_test.T
        for t in range(p.sizes[1]):
            block = slice(t * p.c, (t + 1) * p.c)
            expected[block, block] += left[block, block]
    allowed = max(p.rounding * p.condition, 1e-5 * p.condition if p.case.dtype == DOUBLE else 0.02 * p.condition)
    # Directions of small eigenvalues are cut at 1e-10 here and at 1e-13 there; at x_test they may be large.
    less, more = (nys.Nystrom(p.j, p.entries, cut).gram(p.j_test).diagonal() for cut in (1e-7, 1e-14))
    if residual or float((more - less).max()) <= 0.1 * allowed * prior_scale(p):
        p.close("covariance", came, expected, factor=allowed / p.rounding, scale=prior_scale(p))
    no_negative("covariance", came, prior_scale(p))


@call
def nystrom_evidence(p: Problem, rng: random.Random) -> None:
    """C11: with all data as landmarks the bound is the evidence; the report's interval holds it anyway."""
    if p.case.dtype != DOUBLE or p.has_idle_groups:
        return
    found = one_pass(p.lin, as_data(p, p.y, rng), p.gaussian(), num_landmarks=rng.choice([1, 2, 100]))
    report = ntkgp.fit_evidence(found)
    expected = evidence_of(p, report.precision, float(report.noise))
    slack = 1e-5 * (1 + abs(expected)) * len(p.k)
    low, high = report.evidence_bounds
    require(low <= expected + slack, f"lower bound {low} above the evidence {expected}")
    require(high >= expected - slack, f"upper bound {high} below the evidence {expected}")


@call
def nystrom_classification(p: Problem, rng: random.Random) -> None:
    model = ntkgp.NystromNTKGP(
        as_data(p, p.labels, rng), p.categorical(), p.lin, num_landmarks=100, num_features=rng.choice([None, 1, 5])
    )
    model.kernel.precision = p.precision
    came = model.fit(progress=False)(p.x_test)
    h = p.j.T @ ref.curvature(p.f) @ p.j + p.entries.diag()
    above = p.j_test @ torch.linalg.solve(h, p.j_test.T)
    scale = prior_scale(p)
    allowed = 1e9 * p.rounding * p.condition
    no_negative("exact − ELLA", above - came.covariance_matrix.detach(), scale * allowed)
    no_negative("ELLA", came.covariance_matrix.detach(), scale)


@call
def variational_optimum(p: Problem, rng: random.Random) -> None:
    """C9: for given Z the optimum is that of Titsias."""
    if p.case.dtype != DOUBLE:
        return
    labels = rng.random() < 0.3
    z = p.case.sample(2, p.case.number + 9)
    likelihood, y = (p.categorical(), p.labels) if labels else (p.gaussian(), p.y)
    model = ntkgp.VariationalNTKGP(z, likelihood, p.lin, p.sizes[0], learn_inducing=False)
    model.kernel.precision = p.precision
    model.set_optimum(as_data(p, y, rng))
    came = model.eval()(p.x_test).covariance_matrix.detach()
    rows = ref.jacobian(p.case.net, z).flatten(0, 1)
    phi, phi_test = (nys.Nystrom(rows, p.entries).phi(j) for j in (p.j, p.j_test))
    b = ref.curvature(p.f) if labels else torch.eye(len(p.k), dtype=DOUBLE) / p.noise
    inner = torch.eye(phi.shape[1], dtype=DOUBLE) + phi.T @ b @ phi
    expected = ref.gram(p.j_test, p.entries) - phi_test @ phi_test.T + phi_test @ torch.linalg.solve(inner, phi_test.T)
    p.close("covariance", came, expected, factor=1e-5 * p.condition / p.rounding, scale=prior_scale(p))
    no_negative("covariance", came, prior_scale(p))


@call
def variational_fit(p: Problem, rng: random.Random) -> None:
    model = ntkgp.VariationalNTKGP(
        p.case.sample(2, p.case.number + 9), p.gaussian(), p.lin, p.sizes[0], learn_inducing=rng.random() < 0.5
    ) if p.case.net.kind not in ("tokens", "dict") else ntkgp.VariationalNTKGP(
        p.case.sample(2, p.case.number + 9), p.gaussian(), p.lin, p.sizes[0], learn_inducing=False
    )  # fmt: skip
    model.fit((p.x, p.y), iterations=3, progress=False)
    came = model(p.x_test)
    require(bool(torch.isfinite(came.covariance_matrix).all()), "covariance: not finite")
    p.close("mean", came.mean.detach().flatten(), p.f_test.flatten())


@call
def from_network(p: Problem, rng: random.Random) -> None:
    classes = rng.random() < 0.4
    inference = rng.choice(["auto", "auto", "exact", "nystrom", "variational"])
    data = as_data(p, p.labels if classes else p.y, rng)
    kind = "classification" if classes else "regression"
    options = {"iterations": 2} if inference == "variational" else {}
    model = ntkgp.from_network(p.case.net, data, kind, inference, groups=p.case.groups, **options)
    came = model(p.x_test)
    p.close("mean", came.mean.detach().flatten(), p.f_test.flatten())
    variance = came.variance.detach()
    require(bool(torch.isfinite(variance).all() and (variance >= 0).all()), "variance")


# --- files


@call
def saving(p: Problem, rng: random.Random) -> None:
    form = rng.choice(["exact", "nystrom", "variational"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if form == "exact":
            model: Any = exact(p, form="dual")
            model.save(path, training_data=True)
        elif form == "nystrom":
            model = ntkgp.NystromNTKGP((p.x, p.y), p.gaussian(), p.lin, num_landmarks=3).fit(progress=False)
            model.save(path)
        else:
            model = ntkgp.VariationalNTKGP(p.x_test, p.gaussian(), p.lin, p.sizes[0], learn_inducing=False).eval()
            model.set_optimum((p.x, p.y))
            model.save(path)
        again = ntkgp.load(path, p.case.net)
    one, two = (m(p.x_test).covariance_matrix for m in (model, again))
    p.same(f"{form}: loaded covariance", two, one, again.lin)


@call
def copies(p: Problem, rng: random.Random) -> None:
    model = exact(p)
    first = model(p.x_test).variance
    p.same("a copy's variance", copy.deepcopy(model)(p.x_test).variance, first)
    p.same("the variance when asked again", model(p.x_test).variance, first)


# --- comparators


def latent_covariance(found: Any) -> Tensor:
    latent = found.latent
    if isinstance(latent, torch.distributions.MultivariateNormal):
        return latent.covariance_matrix
    return latent.variance[:, None, None]


def blocks(p: Problem, covariance: Tensor) -> Tensor:
    c = p.c
    return torch.stack([covariance[i * c : (i + 1) * c, i * c : (i + 1) * c] for i in range(p.sizes[1])])


@call
def laplace(p: Problem, rng: random.Random) -> None:
    structure = rng.choice(["full", "full", "diagonal", "subnetwork", "kfac", "last_layer"])
    labels = rng.random() < 0.4
    kind = "classification" if labels else "regression"
    options: dict[str, Any] = {"form": rng.choice(["auto", "primal", "dual"])} if structure == "full" else {}
    if structure == "subnetwork":
        options["mask"] = torch.tensor(sorted(rng.sample(range(p.lin.num_parameters), min(5, p.lin.num_parameters))))
    found = baselines.Laplace(
        p.case.net, kind, structure=structure, evidence=None, precision=p.precision,
        noise=None if labels else p.noise, groups=p.case.groups, **options,
    ).fit(as_data(p, p.labels if labels else p.y, rng))  # fmt: skip
    came = latent_covariance(found.predict(p.x_test))
    no_negative(structure, came, prior_scale(p))
    b = ref.curvature(p.f) if labels else torch.eye(len(p.k), dtype=DOUBLE) / p.noise
    h = p.j.T @ b @ p.j
    if structure == "diagonal":
        expected = (p.j_test / (h.diagonal() + p.entries)) @ p.j_test.T
    elif structure in ("full", "subnetwork"):
        columns = options.get("mask", torch.arange(p.lin.num_parameters))
        inner = h[columns][:, columns] + p.entries[columns].diag()
        expected = p.j_test[:, columns] @ torch.linalg.solve(inner, p.j_test[:, columns].T)
    else:
        return
    p.close(structure, came, blocks(p, expected), factor=p.condition, scale=prior_scale(p))
    again = baselines.Laplace(
        p.case.net, kind, structure=structure, evidence=None, groups=p.case.groups, **options
    ).load_state_dict(found.state_dict(), p.x)  # fmt: skip
    p.close("loaded", latent_covariance(again.predict(p.x_test)), came, scale=prior_scale(p))


@call
def laplace_evidence(p: Problem, rng: random.Random) -> None:
    structure = rng.choice(["full", "diagonal", "kfac", "last_layer"])
    labels = rng.random() < 0.4
    found = baselines.Laplace(
        p.case.net, "classification" if labels else "regression", structure=structure, groups=p.case.groups,
        evidence=rng.choice(["theta", "theta_star"]),
    ).fit((p.x, p.labels if labels else p.y))  # fmt: skip
    require(bool(torch.isfinite(found.precision).all() and (found.precision > 0).all()), "precision")
    came = latent_covariance(found.predict(p.x_test))
    require(bool(torch.isfinite(came).all()), "covariance: not finite")


@call
def hessian_free(p: Problem, rng: random.Random) -> None:
    if p.lin.num_parameters > 60 or p.f.numel() * p.f_test.numel() > 12 or p.case.dtype != DOUBLE:
        return
    found = baselines.HessianFreeLaplace(
        p.case.net, precision=p.precision, noise=p.noise, model="tangent", groups=p.case.groups, tolerance=1e-9
    ).fit((p.x, p.y))  # fmt: skip
    came = latent_covariance(found.predict(p.x_test))
    p.close("covariance", came, blocks(p, p.posterior), factor=1e4 * p.condition, scale=prior_scale(p))


@call
def prior_only(p: Problem, rng: random.Random) -> None:
    found = baselines.PriorOnly(p.case.net, precision=p.precision, noise=p.noise, groups=p.case.groups)
    came = latent_covariance(found.fit((p.x, p.y)).predict(p.x_test))
    p.close("covariance", came, blocks(p, ref.gram(p.j_test, p.entries)))


@call
def ensembles(p: Problem, rng: random.Random) -> None:
    kind = rng.choice([baselines.Point, baselines.MCDropout, baselines.SWAG])
    options: dict[str, Any] = {}
    if kind is baselines.SWAG:
        options = {"num_snapshots": 2, "rank": 2, "num_samples": 3, "learning_rate": 1e-4}
    elif kind is baselines.MCDropout:
        options = {"num_samples": 3, "rate": rng.choice([None, 0.2])}
    labels = rng.random() < 0.4
    found = kind(p.case.net, "classification" if labels else "regression", **options)
    came = found.fit(as_data(p, p.labels if labels else p.y, rng)).predict(p.x_test)
    value = came.probs if labels else came.mean
    require(bool(torch.isfinite(value).all()), "not finite")
    require(len(value) == p.sizes[1], "shape")


@call
def variational_laplace(p: Problem, rng: random.Random) -> None:
    options: dict[str, Any] = {"precision": p.precision, "noise": p.noise, "groups": p.case.groups}
    found = baselines.VariationalLaplace(p.case.net, epochs=1, **options)
    came = latent_covariance(found.fit((p.x, p.y)).predict(p.x_test))
    no_negative("covariance", came, prior_scale(p))
