"""The dense float64 reference that the laws compare with: full Jacobians, full matrices, no code of the engine."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cached_property

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ntkgp.laws.protocol import Fitted, NotApplicableError, Optimum, Task

DOUBLE = torch.float64


def outputs_and_jacobian(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """F (N, C) and J (N, C, P) of a copy in float64 and evaluation mode, row by row."""
    net = copy.deepcopy(net).double().eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def row(weights: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        out = functional_call(net, {**weights, **buffers}, (z.unsqueeze(0),)).reshape(-1)
        return out, out

    jacobians, f = vmap(jacrev(row, has_aux=True), (None, 0))(parameters, x.double())
    return f.detach(), torch.cat([j.detach().flatten(2) for j in jacobians.values()], -1)


def kronecker_factors(net: nn.Module, x: Tensor, curvature: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(first index, A, G) of each Linear weight: Σ aaᵀ/N (I, I) and Σ gᵀBg (O, O), B = `curvature` (N, C, C)."""
    net = copy.deepcopy(net).double().eval()
    starts = {id(p): start for p, start in zip(net.parameters(), _starts(net), strict=True)}
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out: seen.append((m, args[0].detach(), out)))
        for module in net.modules()
        if isinstance(module, nn.Linear)
    ]
    out = net(x.double())
    for handle in handles:
        handle.remove()
    found = []
    for module, inputs, output in seen:
        g = torch.stack(
            [torch.autograd.grad(out[:, c].sum(), output, retain_graph=True)[0] for c in range(out.shape[1])], 1
        )
        pulled = torch.einsum("nco,ncd,ndp->op", g, curvature, g)
        found.append((starts[id(module.weight)], inputs.T @ inputs / len(x), pulled))
    return found


def _kronecker(g: Tensor, a: Tensor) -> Tensor:
    """G ⊗ A; ``torch.kron`` refuses some strides that ``einsum`` leaves where opt_einsum is installed."""
    size = len(g) * len(a)
    return (g[:, None, :, None] * a[None, :, None, :]).reshape(size, size)


def _starts(net: nn.Module) -> list[int]:
    sizes = [p.numel() for p in net.parameters()]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def loewner(upper: Tensor, lower: Tensor) -> float:
    """By how much lower ≼ upper is violated, relative to the largest eigenvalue of both; (..., D, D).

    Infinite for other shapes or NaN.
    """
    if upper.shape != lower.shape or not bool(torch.isfinite(upper).all() and torch.isfinite(lower).all()):
        return math.inf
    scale = max(float(torch.linalg.eigvalsh(m).abs().max()) for m in (upper, lower))
    return max(0.0, -float(torch.linalg.eigvalsh(upper - lower).min()) / max(scale, 1e-300))


def rel(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry; infinite for other shapes or NaN."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return math.inf
    scale = float(expected.abs().max())
    return float((found.double() - expected).abs().max()) / (scale if scale > 0 else 1.0)


def point_blocks(joint: Tensor, num_outputs: int) -> Tensor:
    """(N, C, C) of the diagonal of an (N·C, N·C) matrix."""
    n = len(joint) // num_outputs
    return joint.reshape(n, num_outputs, n, num_outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)


class Dense(Fitted):
    """A task by dense algebra in the scaled weights Λ^½θ, for every structure that has a definition.

    :param task: of any kind; a ``"nystrom"`` one has all data as landmarks and all features, a ``"subset"`` one takes
        the first ``task.subset`` data, a ``"variational"`` one is the exact model (its optimum at Z = X).

    Cost: N·C·P numbers for the Jacobian, P² for H, and O(P³) operations; for small problems.
    """

    def __init__(self, task: Task, _shared: tuple[Tensor, Tensor] | None = None) -> None:
        if task.kind == "subset":
            task = replace(task, x=task.x[: task.subset], y=task.y[: task.subset])
        self.task = task
        self.f, self.j = outputs_and_jacobian(task.net, task.x) if _shared is None else _shared
        self.theta = torch.cat([p.detach().double().flatten() for p in task.net.parameters()])
        self.sizes = [p.numel() for p in task.net.parameters()]
        self.tensor = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        self.columns = self._columns()
        self.entries = task.precision.double().expand(len(self.sizes))[self.tensor][self.columns]

    def at(self, precision: Tensor | None = None, noise: float | None = None, kind: str | None = None) -> Dense:
        """The same network and data with other hyper-parameters, or by another structure."""
        task = self.task.at(precision, noise)
        task = task if kind is None else replace(task, kind=kind)
        return self if task is self.task else Dense(task, (self.f, self.j))

    def _columns(self) -> Tensor:
        if self.task.kind == "last_layer":
            last = [m for m in self.task.net.modules() if any(True for _ in m.parameters(recurse=False))][-1]
            return torch.arange(len(self.theta))[-sum(p.numel() for p in last.parameters()) :]
        if self.task.kind == "subnetwork":
            assert self.task.indices is not None
            return self.task.indices
        return torch.arange(len(self.theta))

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.f.shape[1]

    @cached_property
    def curvature(self) -> Tensor:
        """B of each row, (N, C, C): I/σ², or diag(p) − ppᵀ."""
        if not self.task.classify:
            return (torch.eye(self.num_outputs, dtype=DOUBLE) / self.task.noise).expand(len(self.f), -1, -1)
        p = self.f.softmax(-1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def _features(self, x: Tensor) -> Tensor:
        """JΛ^-½ of the structure's weights, (N·C, p)."""
        return outputs_and_jacobian(self.task.net, x)[1].flatten(0, 1)[:, self.columns] * self.entries.rsqrt()

    @cached_property
    def phi(self) -> Tensor:
        """Of the training inputs."""
        return self.j.flatten(0, 1)[:, self.columns] * self.entries.rsqrt()

    @cached_property
    def projection(self) -> Tensor | None:
        """Orthonormal rows that span the landmarks' features, (r, p); None where nothing is projected."""
        if self.task.kind != "nystrom":
            return None
        _, values, rows = torch.linalg.svd(self.phi, full_matrices=False)
        return rows[values > 1e-8 * values[0]]

    @cached_property
    def hessian(self) -> Tensor:
        """Λ^-½HΛ^-½ as the structure has it, (p, p)."""
        phi = self.phi if self.projection is None else self.phi @ self.projection.T
        n, c = self.f.shape
        weighted = torch.einsum("ncd,ndp->ncp", self.curvature, phi.reshape(n, c, -1)).reshape(n * c, -1)
        exact = phi.T @ weighted
        if self.task.kind == "diagonal":
            return exact.diagonal().diag()
        if self.task.kind != "kfac":
            return (exact + exact.T) / 2
        kron, rest = torch.zeros_like(exact), torch.ones(len(self.theta), dtype=torch.bool)
        for start, a, g in kronecker_factors(self.task.net, self.task.x, self.curvature):
            own = slice(start, start + len(a) * len(g))
            scale = self.entries[own].rsqrt()
            kron[own, own] = _kronecker(g, a) * scale * scale.unsqueeze(-1)
            rest[own] = False
        return torch.where(rest & rest.unsqueeze(-1), exact, kron)

    @cached_property
    def _system(self) -> Tensor:
        return self.hessian + torch.eye(len(self.hessian), dtype=DOUBLE)

    @property
    def condition(self) -> float:
        """Largest eigenvalue of I + Λ^-½HΛ^-½: by how much rounding may be enlarged."""
        return float(torch.linalg.eigvalsh(self._system)[-1])

    # -- what a library is asked --

    def mean(self, x: Tensor) -> Tensor:
        """f(x; θ̃)."""
        return outputs_and_jacobian(self.task.net, x)[0]

    @cached_property
    def _offset(self) -> Tensor:
        """Y − f + Jθ̃, the targets of the structure's weights, (N·C,)."""
        y = self.task.y.double().reshape(self.f.shape)
        return (y - self.f).flatten() + self.phi @ (self.entries.sqrt() * self.theta[self.columns])

    @cached_property
    def _scaled_star(self) -> Tensor:
        """Λ^½θ⋆ of the exact quadratic loss of the structure's weights, (p,)."""
        if self.task.classify:
            raise NotApplicableError("θ⋆ of a classification is a convention")
        h = self.phi.T @ self.phi / self.task.noise + torch.eye(self.phi.shape[1], dtype=DOUBLE)
        return torch.linalg.solve(h, self.phi.T @ self._offset / self.task.noise)

    def posterior_mean(self, x: Tensor) -> Tensor:
        """h(x; θ⋆)."""
        f, j = outputs_and_jacobian(self.task.net, x)
        change = self._scaled_star * self.entries.rsqrt() - self.theta[self.columns]
        return f + j[..., self.columns] @ change

    def joint_covariance(self, x: Tensor) -> Tensor:
        """J⋆ΣJ⋆ᵀ."""
        phi = self._features(x)
        phi = phi if self.projection is None else phi @ self.projection.T
        factor = torch.linalg.cholesky(self._system)
        half = torch.linalg.solve_triangular(factor, phi.T, upper=False)
        return half.T @ half

    def covariance(self, x: Tensor) -> Tensor:
        """Diagonal blocks of :meth:`joint_covariance`."""
        return point_blocks(self.joint_covariance(x), self.num_outputs)

    def prior_covariance(self, x: Tensor) -> Tensor:
        """J⋆Λ⁻¹J⋆ᵀ."""
        phi = self._features(x)
        return phi @ phi.T

    def noiseless_covariance(self, x: Tensor) -> Tensor:
        """The limit σ² → 0: what no training row reaches."""
        _, values, rows = torch.linalg.svd(self.phi, full_matrices=False)
        rows, phi = rows[values > 1e-8 * values[0]], self._features(x)
        outside = phi - phi @ rows.T @ rows
        return outside @ outside.T

    def log_evidence(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """Log N(y; m0, K + σ²I), in data space."""
        if precision is not None or noise is not None:
            return self.at(precision, noise).log_evidence()
        if self.task.classify or self.task.kind != "exact":
            raise NotApplicableError("no marginal likelihood in closed form")
        k = self.phi @ self.phi.T + self.task.noise * torch.eye(len(self.phi), dtype=DOUBLE)
        t = self._offset
        quadratic = float(t @ torch.linalg.solve(k, t))
        return -(quadratic + float(torch.linalg.slogdet(k)[1]) + len(t) * math.log(2 * math.pi)) / 2

    def _log_likelihood(self, f: Tensor) -> float:
        if self.task.classify:
            return float(-nn.functional.cross_entropy(f, self.task.y, reduction="sum"))
        residual = (self.task.y.double().reshape(f.shape) - f).square().sum()
        return float(-(residual / self.task.noise + f.numel() * math.log(2 * math.pi * self.task.noise)) / 2)

    @cached_property
    def logdet(self) -> float:
        """Log-determinant of I + Λ⁻¹H."""
        return float(torch.linalg.slogdet(self._system)[1])

    def log_evidence_map(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """Log p(y | θ̃) − ½‖θ̃‖²_Λ − ½logdet(I + Λ⁻¹H)."""
        if precision is not None or noise is not None:
            return self.at(precision, noise).log_evidence_map()
        norm = float((self.entries * self.theta[self.columns].square()).sum())
        return self._log_likelihood(self.f) - norm / 2 - self.logdet / 2

    def distance(self) -> float:
        """½‖θ⋆ − θ̃‖²_{H+Λ}: what the evidence at θ̃ loses."""
        shift = self._scaled_star - self.entries.sqrt() * self.theta[self.columns]
        return float(shift @ self._system @ shift) / 2

    def effective_dimension(self) -> Tensor:
        """γ_t = P_t − λ_t tr Σ_tt."""
        inside = 1 - torch.linalg.inv(self._system).diagonal()
        return torch.zeros(len(self.sizes), dtype=DOUBLE).index_add(0, self.tensor[self.columns], inside)

    def samples(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Weights from N(θ̃, Σ), through the tangent model."""
        phi = self._features(x)
        phi = phi if self.projection is None else phi @ self.projection.T
        factor = torch.linalg.cholesky(self._system)
        draws = torch.randn(len(factor), size, generator=generator, dtype=DOUBLE)
        moves = phi @ torch.linalg.solve_triangular(factor.T, draws, upper=True)
        return self.mean(x) + moves.T.reshape(size, len(x), -1)

    def random_prediction(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The mean of a few samples."""
        return self.samples(x, 5, generator).mean(0)

    def probabilities(self, x: Tensor) -> Tensor:
        """Probit: softmax of f/√(1 + π/8 diag V)."""
        v = self.covariance(x).diagonal(dim1=1, dim2=2)
        return (self.mean(x) / (1 + math.pi / 8 * v).sqrt()).softmax(-1)

    def hyperparameters(self) -> tuple[Tensor, float]:
        """As given."""
        return self.task.precision, self.task.noise

    def update(self, x: Tensor, y: Tensor) -> Dense:
        """All data together."""
        return Dense(replace(self.task, x=torch.cat([self.task.x, x]), y=torch.cat([self.task.y, y])))

    def refit(self) -> None:
        """Nothing is kept."""

    def optimum(self, at: str = "theta_map", single: bool = False, fit_noise: bool = False) -> Optimum:
        """Maximise the structure's evidence over log λ (one or per tensor) and, if asked, log σ², by L-BFGS-B."""
        columns = self.tensor[self.columns]
        alive = columns.unique()
        count = 1 if single else len(alive)

        def unpack(z: np.ndarray) -> tuple[Tensor, float]:
            precision = torch.ones(len(self.sizes), dtype=DOUBLE)
            precision[alive] = torch.as_tensor(z[:count]).exp().expand(len(alive))
            return precision, math.exp(z[-1]) if fit_noise else self.task.noise

        def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
            model = self.at(*unpack(z))
            scaled = model._scaled_star if at == "theta_star" else model.entries.sqrt() * model.theta[model.columns]
            value = model.log_evidence() if at == "theta_star" else model.log_evidence_map()
            norms = torch.zeros(len(self.sizes), dtype=DOUBLE).index_add(0, columns, scaled.square())
            gamma = model.effective_dimension()
            gradient = ((gamma - norms) / 2)[alive]
            gradient = gradient.sum().reshape(1) if single else gradient
            if fit_noise:
                fit = model._offset - model.phi @ scaled
                own = (float(fit.square().sum()) / model.task.noise - len(fit) + float(gamma.sum())) / 2
                gradient = torch.cat([gradient, torch.tensor([own], dtype=DOUBLE)])
            return -value, -gradient.numpy()

        start = self.task.precision.double().expand(len(self.sizes))[alive].log()
        start = start.mean().reshape(1) if single else start
        z0 = np.append(start.numpy(), math.log(self.task.noise)) if fit_noise else start.numpy()
        bounds = [(-18.0, 18.0)] * len(z0)
        options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-9}
        found = scipy.optimize.minimize(objective, z0, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        precision, noise = unpack(found.x)
        return Optimum(precision, noise if fit_noise else None, at)
