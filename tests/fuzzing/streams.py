"""Public calls on loaders, samplers, sums of kernels and checkpoints, each beside the dense oracle."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import gpytorch
import torch
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.evidence import sampled_evidence
from tests import reference as ref
from tests.fuzzing.calls import as_data, call, evidence_of, exact, no_negative, prior_scale, require
from tests.fuzzing.problem import DOUBLE, Problem


@call
def streamed(p: Problem, rng: random.Random) -> None:
    """A loader in weight space is the tensors."""
    if not isinstance(p.x, torch.Tensor):
        return
    labels = rng.random() < 0.4
    loader = DataLoader(TensorDataset(p.x, p.labels if labels else p.y), batch_size=rng.choice([1, 3, 8]))
    likelihood = p.categorical() if labels else p.gaussian()
    model = ntkgp.ExactNTKGP(loader, None, likelihood, p.lin, mean=rng.choice(["network", "posterior"])).eval()
    model.kernel.precision = p.precision
    b = ref.curvature(p.f) if labels else torch.eye(len(p.k), dtype=DOUBLE) / p.noise
    expected = p.j_test @ torch.linalg.solve(p.j.T @ b @ p.j + p.entries.diag(), p.j_test.T)
    came = model(p.x_test)
    p.close("covariance", came.covariance_matrix.detach(), expected, factor=p.condition, scale=prior_scale(p))
    if labels or p.case.dtype != DOUBLE or p.has_idle_groups:
        return
    report = ntkgp.fit_evidence(model)
    oracle = evidence_of(p, report.precision, float(report.noise))
    rounding = 1e-7 * (1 + abs(oracle)) * len(p.k)
    require(abs(report.log_evidence - oracle) <= rounding, f"evidence {report.log_evidence!r}, oracle {oracle!r}")


@call
def sampled(p: Problem, rng: random.Random) -> None:
    """θ⋆ of the reported precisions and noise; draws are those of some Gaussian."""
    if p.case.dtype != DOUBLE or p.has_idle_groups:
        return
    found = sampled_evidence(
        p.lin, as_data(p, p.y, rng), p.gaussian(), 3, form=rng.choice(["dual", "weights"]), max_steps=3,
        solver_tolerance=1e-9,
    )  # fmt: skip
    noise = torch.full((len(p.k),), float(found.noise), dtype=DOUBLE)
    entries = found.precision[p.index]
    star = ref.gaussian_primal(p.j, p.t, entries, noise, p.index).theta_star
    require(bool(torch.isfinite(found.samples).all()), "samples: not finite")
    condition = 1 + float(torch.linalg.matrix_norm(ref.gram(p.j, entries), 2)) / float(found.noise)
    if found.report.converged:
        came, expected = p.j_test @ found.theta_star, p.j_test @ star
        scale = float((p.j_test.abs() @ star.abs()).max())
        p.close("J θ⋆", came, expected, factor=1e-6 * condition / p.rounding, scale=scale)
    low, high = found.report.evidence_bounds or (0.0, 0.0)
    if found.report.evidence_bounds is not None:
        oracle = evidence_of(p, found.precision, float(found.noise))
        slack = 1e-7 * (1 + abs(oracle)) * len(p.k)
        require(low - slack <= oracle <= high + slack, f"evidence {oracle!r} outside of [{low!r}, {high!r}]")


@call
def factors(p: Problem, rng: random.Random) -> None:
    """Kept factors, of all outputs or of one per input, give the Gram of these rows."""
    chosen = torch.tensor([rng.randrange(p.c) for _ in range(p.sizes[0])]) if rng.random() < 0.5 else None
    kept = p.lin.factors(p.x, max_memory=p.lin.factors_memory(p.sizes[0]), outputs=chosen)
    rows = p.j if chosen is None else p.j[torch.arange(p.sizes[0]) * p.c + chosen]
    scale = float(p.k.abs().max())
    came = p.lin.weighted_gram(p.x_test, kept, 1 / p.precision)
    p.close("weighted_gram(x, factors)", came, ref.gram(p.j_test, p.entries, rows), scale=scale)
    p.close("weighted_gram(factors)", p.lin.weighted_gram(kept, None, 1 / p.precision), ref.gram(rows, p.entries))


@call
def composed_kernel(p: Problem, rng: random.Random) -> None:
    """A sum or a product with a single-output kernel, for any number of outputs."""
    if p.case.net.kind in ("tokens", "dict"):
        return
    own = ntkgp.kernels.NeuralTangentKernel(p.lin, precision=p.precision).double()
    other = gpytorch.kernels.RBFKernel().double()
    other.lengthscale = 1.5
    x = p.lin.pack(p.x).double()
    rbf = other(x).to_dense().detach()
    plus = rng.random() < 0.5
    came = (own + other if plus else own * other)(x).to_dense().detach()
    shape = torch.eye(p.c, dtype=DOUBLE) if plus else torch.ones(p.c, p.c, dtype=DOUBLE)
    lifted = torch.kron(rbf.contiguous(), shape)
    p.close("composed", came, p.k + lifted if plus else p.k * lifted, scale=float(p.k.abs().max()))


@call
def checkpointed(p: Problem, rng: random.Random) -> None:
    """A fit that is cut short and goes on ends where an undisturbed one does, bit by bit."""
    if p.case.dtype != DOUBLE:
        return
    form, method = rng.choice(["dual", "primal"]), rng.choice(["mackay", "lbfgs"])
    whole = ntkgp.fit_evidence(exact(p, form=form), method=method, max_evaluations=8)
    with tempfile.TemporaryDirectory() as folder:
        kept: Any = ntkgp.checkpoint.Checkpoint(folder, every=0)
        ntkgp.fit_evidence(exact(p, form=form), method=method, max_evaluations=3, checkpoint=kept)
        again = ntkgp.fit_evidence(exact(p, form=form), method=method, max_evaluations=8, checkpoint=kept)
    require(
        torch.equal(whole.precision, again.precision), f"precision {again.precision}, undisturbed {whole.precision}"
    )
    require(whole.log_evidence == again.log_evidence, "evidence")


@call
def prior_and_state(p: Problem, rng: random.Random) -> None:
    """Before any data the covariance is K, and a state dict carries precisions and noise."""
    model = exact(p, form=rng.choice(["dual", "primal"]))
    state = model.state_dict()
    other = ntkgp.ExactNTKGP(p.x, p.y, p.gaussian(), p.lin, form=model.form).eval()
    other.load_state_dict(state)
    one, two = model(p.x_test).covariance_matrix, other(p.x_test).covariance_matrix
    p.same("covariance of a loaded state", two, one)
    with gpytorch.settings.prior_mode():
        came = model.train()(*model.train_inputs).covariance_matrix.detach()
    p.close("prior", came, p.k)
    no_negative("prior", came, float(p.k.abs().max()))
