"""Fitting the evidence after the Grams exist: whole fits, single updates, against what forms Jacobians.

    python -m benchmarks.fit [--only fits update gpytorch] [--threads 1] [--storage memory] [--repeats 5]

fits      whole fits at N·C = 2000 with G = 20 groups, by both methods, of a regression (N = 1000, C = 2) and a
          classification (N = 200, C = 10) of trained networks; the Grams whole, and stored as triangles (`--storage`).
update    one MacKay update at N·C = 1000, G = 5 (LeNet, the layers as groups) against the same step from a network
          whose Jacobian is recomputed: `vmap(jacrev)`, J Λ⁻¹ Jᵀ and autograd through it.
gpytorch  value and gradient of the evidence at N = 400, P = 165k, G = 3 against GPyTorch on an explicit root J Λ^-½.

Ratios: same process, run in turn, median of the repeats; CPU seconds. The largest difference of the two
gradients, relative to the largest entry, is printed beside each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import gpytorch
import torch
from linear_operator.operators import RootLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ntkgp
from benchmarks.nets import lenet
from benchmarks.timing import alternate
from ntkgp.evaluation.training import seeded
from ntkgp.evidence import GaussianEvidence, SoftmaxEvidence, evidence_objective, fit_problem
from ntkgp.linearization.symmetric import STORAGES, SymmetricGrams

Problem = GaussianEvidence | SoftmaxEvidence


def mlp(inputs: int, width: int, outputs: int, hidden: int, norm: bool = False) -> nn.Sequential:
    """Tanh layers in float64; with `norm` a LayerNorm in each and four tensors a layer."""
    layers: list[nn.Module] = []
    for k in range(hidden):
        layers.append(nn.Linear(width if k else inputs, width, bias=k > 0 or not norm))
        layers += [nn.LayerNorm(width), nn.Tanh()] if norm else [nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, outputs, bias=not norm)).double()


def train(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> None:
    """Plain Adam, enough to have a function."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()


def regression() -> Problem:
    """N = 1000, C = 2, G = 20."""
    with seeded(0):
        x = torch.randn(1000, 6, dtype=torch.float64)
        y = torch.stack([torch.sin(2 * x[:, 0]) * x[:, 1], torch.cos(x[:, 2] + x[:, 3].square())], -1)
        y = y + 0.2 * torch.randn_like(y)
        net = mlp(6, 24, 2, 5, norm=True)
        train(net, x, y, nn.functional.mse_loss, 300)
    lin = ntkgp.LinearizedNetwork(net, x[:4], groups="tensor")
    return ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), lin, form="dual").evidence_problem()


def classification() -> Problem:
    """N = 200, C = 10, G = 20."""
    with seeded(0):
        x = torch.randn(200, 6, dtype=torch.float64)
        teacher = torch.randn(6, 10, dtype=torch.float64)
        labels = torch.distributions.Categorical(logits=(2 * torch.sin(x) + x) @ teacher).sample()
        net = mlp(6, 24, 10, 5, norm=True)
        train(net, x, labels, nn.functional.cross_entropy, 60)
    lin = ntkgp.LinearizedNetwork(net, x[:4], groups="tensor")
    return ntkgp.ExactNTKGP(x, labels, ntkgp.CategoricalLikelihood(num_classes=10), lin, form="dual").evidence_problem()


def whole_fits(storage: str) -> None:
    for name, make in (("regression", regression), ("classification", classification)):
        problem = make()
        whole = torch.stack([problem.grams.dense(g) for g in range(problem.num_groups)])  # type: ignore[union-attr]
        packed = SymmetricGrams.from_dense(whole, storage=storage)
        for kind, given in (("whole", replace(problem, grams=whole)), (storage, replace(problem, grams=packed))):
            for method in ("mackay", "lbfgs"):
                wall, cpu = time.perf_counter(), time.process_time()
                report = fit_problem(given, method)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                print(
                    f"{name:>14} {kind:>6} {method:>6}: {wall:6.1f} s wall {cpu:6.1f} s CPU, "
                    f"{report.evaluations:3d} evaluations, {report.log_evidence:.6f} nats, "
                    f"{'converged' if report.converged else 'NOT converged'}; n = {problem.rows}, "
                    f"G = {problem.num_groups}",
                    flush=True,
                )


def compare(
    slow: str, slow_step: Callable[[], Tensor], fast_step: Callable[[], Tensor], repeats: int, asked: int
) -> None:
    """Print the agreement, both medians and their ratio."""
    exact = fast_step()
    error = float((exact - slow_step()).abs().max() / exact.abs().max())
    medians = alternate({"cached Grams": fast_step, slow: slow_step}, repeats)
    ratio = medians[slow] / medians["cached Grams"]
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items())
    print(f"  gradients differ by {error:.1e}; CPU: {times}; ratio {ratio:.0f} (asked: {asked})", flush=True)


def setting(net: nn.Module, *shape: int) -> tuple[ntkgp.LinearizedNetwork, Tensor, GaussianEvidence]:
    """A network of layers as groups with a regression problem."""
    with seeded(1):
        x = torch.randn(shape, dtype=torch.float64)
        y = net(x).detach()
        y = (y + 0.3 * torch.randn_like(y)).squeeze(-1)
    lin = ntkgp.LinearizedNetwork(net, x[:4], groups="layer")
    model = ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), lin)
    problem = model.evidence_problem()
    assert isinstance(problem, GaussianEvidence)
    return lin, x, problem


def mackay_update(repeats: int) -> None:
    with seeded(0):
        net = lenet().double()
    lin, x, problem = setting(net, 100, 1, 28, 28)
    objective = evidence_objective(problem)
    start = objective.start()
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    index = lin.groups.index

    def cached() -> Tensor:
        return objective(start).gradient

    def recomputed() -> Tensor:
        logs = start.clone().requires_grad_()
        jacobians = vmap(jacrev(lambda p, row: functional_call(net, p, (row[None],))[0]), (None, 0))(parameters, x)
        jacobian = torch.cat([part.flatten(2) for part in jacobians.values()], -1).flatten(0, 1)
        kernel = (jacobian * (-logs[:-1]).exp()[index]) @ jacobian.T
        kernel = kernel + logs[-1].exp() * torch.eye(len(kernel), dtype=kernel.dtype)
        factor = torch.linalg.cholesky(kernel)
        white = torch.linalg.solve_triangular(factor, problem.targets[:, None], upper=False)
        value = -0.5 * white.square().sum() - factor.diagonal().log().sum()
        return torch.autograd.grad(value, logs)[0]

    print(f"update: N·C = {problem.rows}, G = {problem.num_groups}, P = {lin.num_parameters}")
    compare("J recomputed", recomputed, cached, repeats, 100)


def against_gpytorch(repeats: int) -> None:
    with seeded(0):
        net = mlp(8, 400, 1, 2)
    lin, x, problem = setting(net, 400, 8)
    objective = evidence_objective(problem)
    start = objective.start()
    jacobian = lin.jacobian(x).flatten(0, 1)

    def cached() -> Tensor:
        return objective(start).gradient

    def root() -> Tensor:
        logs = start.clone().requires_grad_()
        features = jacobian * lin.groups.expand((-0.5 * logs[:-1]).exp())
        covariance = RootLinearOperator(features).add_diagonal(logs[-1].exp().expand(problem.rows))
        with gpytorch.settings.fast_computations(False, False, False):
            zero = torch.zeros_like(problem.targets)
            value = gpytorch.distributions.MultivariateNormal(zero, covariance).log_prob(problem.targets)
        return torch.autograd.grad(value, logs)[0]

    print(f"evidence: N = {problem.rows}, G = {problem.num_groups}, P = {lin.num_parameters}")
    compare("GPyTorch, J as root", root, cached, repeats, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("fits", "update", "gpytorch")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--storage", choices=STORAGES, default="memory", help="of the triangles")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "update" in arguments.only:
        mackay_update(arguments.repeats)
    if "gpytorch" in arguments.only:
        against_gpytorch(arguments.repeats)
    if "fits" in arguments.only:
        whole_fits(arguments.storage)


if __name__ == "__main__":
    main()
