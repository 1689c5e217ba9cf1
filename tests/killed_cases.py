"""Small runs for tests.killing: each takes a folder for checkpoints, or None, and returns all that it found."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.checkpoint import Checkpoint, running
from ntkgp.evidence import one_pass, sampled_evidence
from ntkgp.solvers import solve

DOUBLE = torch.float64


def kept(folder: Path | None) -> Checkpoint | None:
    """A state at every offer."""
    return None if folder is None else Checkpoint(folder, every=0)


def network(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    """Three weight layers, one of them normalised."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(2, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, outputs)
        ).double()


def data(outputs: int = 1, rows: int = 30) -> tuple[Tensor, Tensor]:
    """Inputs and noisy targets, or labels where there are several outputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, generator=generator, dtype=DOUBLE)
    if outputs == 1:
        return x, torch.sin(2 * x.sum(-1)) + 0.2 * torch.randn(rows, generator=generator, dtype=DOUBLE)
    return x, torch.randint(0, outputs, (rows,), generator=generator)


def report_of(report: Any) -> dict[str, Any]:
    """Everything but the time."""
    found = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    found.pop("seconds")
    return found


@functools.cache
def linearized(outputs: int = 1) -> ntkgp.LinearizedNetwork:
    return ntkgp.LinearizedNetwork(network(outputs), data(outputs)[0], groups="tensor")


def likelihood_of(outputs: int) -> Any:
    return gpytorch.likelihoods.GaussianLikelihood() if outputs == 1 else ntkgp.CategoricalLikelihood(outputs)


def exact(outputs: int = 1, form: str = "auto") -> ntkgp.ExactNTKGP:
    return ntkgp.ExactNTKGP(*data(outputs), likelihood_of(outputs), linearized(outputs), form=form)


def image_prior(folder: Path | None) -> dict[str, Any]:
    from ntkgp.inverse import DeepImagePrior, ParallelBeam, RayTransform

    x = torch.zeros(8, 8)
    x[2:5, 3:7] = 1.0
    A = RayTransform(ParallelBeam((8, 8), torch.arange(5) * torch.pi / 5))
    y = A(x) + 0.1 * torch.randn(A.data_shape, generator=torch.Generator().manual_seed(0))
    unet = {"channels": (8, 8), "skip_channels": (2,), "norm": "group"}
    dip = DeepImagePrior(A, noise=0.1, unet=unet, callback_every=3, max_iterations=2000, learning_rate=1e-2)
    place = kept(folder)
    dip.fit(y) if place is None else place.fit(dip, y)
    found = {**dip.state_dict(), "reconstruction": dip.reconstruction}
    return {**found.pop("net"), **found}


class Pull:
    """A hyper-prior: log-normal around λ = 1."""

    def log_density(self, log_precision: Tensor) -> Tensor:
        return -0.5 * log_precision.square().sum()


def mackay(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(), checkpoint=kept(folder)))


def lbfgs(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(), method="lbfgs", checkpoint=kept(folder)))


def with_prior(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(), method="lbfgs", prior=Pull(), checkpoint=kept(folder)))


def softmax(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(3), checkpoint=kept(folder)))


def softmax_full(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(3), curvature="full", checkpoint=kept(folder)))


def softmax_primal(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(3, "primal"), curvature="full", checkpoint=kept(folder)))


def at_map(folder: Path | None) -> dict[str, Any]:
    return report_of(ntkgp.fit_evidence(exact(3), at="theta_map", checkpoint=kept(folder)))


def sampled(folder: Path | None, form: str = "dual", outputs: int = 1) -> dict[str, Any]:
    found = sampled_evidence(
        linearized(outputs), data(outputs), likelihood_of(outputs), 4, form=form, batch_size=8, solver_tolerance=1e-3,
        checkpoint=kept(folder),
    )  # fmt: skip
    names = ("log_precision_error", "log_noise_error", "effective_dimension_error", "theta_star", "samples")
    return {**report_of(found.report), **{name: getattr(found, name) for name in (*names, "iterations")}}


def sampled_weights(folder: Path | None) -> dict[str, Any]:
    return sampled(folder, "weights", 3)


def passes(folder: Path | None) -> dict[str, Any]:
    found = one_pass(
        linearized(), data(rows=60), likelihood_of(1), num_landmarks=9, batch_size=4, checkpoint=kept(folder)
    )
    return {**vars(found.statistics), **report_of(ntkgp.fit_evidence(found))}


def variational(folder: Path | None, epochs: int = 3, **options: Any) -> dict[str, Any]:
    x, y = data(1 if "objective" not in options else 3)
    outputs = 1 if y.is_floating_point() else 3
    model = ntkgp.VariationalNTKGP(x[::6].clone(), likelihood_of(outputs), linearized(outputs), len(x), **options)
    validation = (x[:7] + 0.1, y[:7]) if outputs == 3 else None
    model.fit(
        (x, y), epochs=epochs, batch_size=8, validation=validation, evidence="bound", evidence_rows=30 * outputs,
        progress=False, checkpoint=kept(folder),
    )  # fmt: skip
    assert model.history is not None
    found = {**model.state_dict(), **vars(model.history), **report_of(model.history.evidence)}
    return {name: value for name, value in found.items() if name not in ("seconds", "evidence")}


def variational_collapsed(folder: Path | None) -> dict[str, Any]:
    return variational(folder, 6)


def variational_minibatches(folder: Path | None) -> dict[str, Any]:
    return variational(folder, objective=0.5)


@functools.cache
def adam_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Grams (6, 200, 200) of a network with P = 301, and targets of its evidence; start of (log λ, log σ²)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 3, generator=generator, dtype=DOUBLE)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 1)).double()
    lin = ntkgp.LinearizedNetwork(net, x, groups="tensor")
    y = torch.sin(2 * x.sum(-1)) + 0.1 * torch.randn(200, generator=generator, dtype=DOUBLE)
    targets = y - lin(x)[:, 0] + lin.jvp(x, lin.theta)[:, 0]
    return lin.grams(x), targets, torch.tensor([0.0] * 6 + [-2.0], dtype=DOUBLE)


def adam(folder: Path | None, steps: int = 120, omit: str | None = None) -> dict[str, Any]:
    """Law E3's run: Adam on log λ and log σ² by 4 fresh probes and 15 warm-started iterations of CG a step.

    :param omit: what a resumed run forgets, "warm", "generator" or "optimizer".
    """
    grams, targets, start = adam_problem()
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    generator = torch.Generator().manual_seed(4)
    warm, done = torch.zeros(len(targets), 5, dtype=DOUBLE), 0
    identity = {"network": grams, "data": targets, "configuration": {"rate": 0.05}}
    with running(kept(folder), lambda: identity) as run:
        if run.state is not None:
            with torch.no_grad():
                x.copy_(run.state["x"])
            done = run.state["step"]
            if omit != "optimizer":
                optimizer.load_state_dict(run.state["optimizer"])
            if omit != "generator":
                generator.set_state(run.state["generator"])
            if omit != "warm":
                warm = run.state["warm"]
        while done < steps:
            variance = x.detach().exp()
            parts = torch.cat([grams / variance[:6, None, None], variance[6] * torch.eye(200, dtype=DOUBLE)[None]])
            probes = torch.randint(0, 2, (200, 4), generator=generator).to(DOUBLE) * 2 - 1
            rhs = torch.cat([targets.unsqueeze(-1), probes], -1)
            warm = solve(parts.sum(0), rhs, tolerance=1e-12, max_iterations=15, x0=warm).solution
            images = parts @ warm  # shape: (7, 200, 5)
            fit = (warm[:, 0] * images[..., 0]).sum(-1)
            trace = torch.einsum("nk,ink->i", rhs[:, 1:], images[..., 1:]) / 4
            x.grad = 0.5 * (fit - trace) * torch.tensor([1.0] * 6 + [-1.0], dtype=DOUBLE)
            optimizer.step()
            done += 1
            now = done

            def state(step: int = now, warm: Tensor = warm) -> dict[str, Any]:
                return {
                    "x": x, "step": step, "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
                    "warm": warm,
                }  # fmt: skip

            if done % 5 == 0:
                run.offer(state)
    return {"x": x.detach(), "warm": warm}
