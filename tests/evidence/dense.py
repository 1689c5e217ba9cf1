"""Dense float64 references of the evidence room: explicit Jacobians, primal formulas, autograd."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgp.evidence import GaussianEvidence, NoiseModel, SoftmaxEvidence


@dataclass
class Linear:
    """An explicit tangent model: J per group, trained weights, network outputs."""

    blocks: list[Tensor]
    theta: list[Tensor]
    network: Tensor  # (n,)

    @property
    def jacobian(self) -> Tensor:
        return torch.cat(self.blocks, -1)

    @property
    def weights(self) -> Tensor:
        return torch.cat(self.theta)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(block.shape[1] for block in self.blocks)

    @property
    def grams(self) -> Tensor:
        return torch.stack([block @ block.T for block in self.blocks])

    @property
    def tangent_theta(self) -> Tensor:
        return torch.stack([block @ theta for block, theta in zip(self.blocks, self.theta, strict=True)])

    @property
    def theta_norms(self) -> Tensor:
        return torch.stack([theta.square().sum() for theta in self.theta])

    @property
    def offset(self) -> Tensor:
        return self.network - self.jacobian @ self.weights

    def expand(self, per_group: Tensor) -> Tensor:
        return torch.cat([per_group[g].expand(size) for g, size in enumerate(self.sizes)])

    def scaled(self, factors: tuple[float, ...]) -> Linear:
        """The same network with theta_g -> k_g theta_g, hence J_g -> J_g / k_g."""
        blocks = [block / k for block, k in zip(self.blocks, factors, strict=True)]
        return Linear(blocks, [theta * k for theta, k in zip(self.theta, factors, strict=True)], self.network)

    def shared(self) -> dict:
        names = tuple(f"layer{g}" for g in range(len(self.blocks)))
        return {
            "tangent_theta": self.tangent_theta,
            "theta_norms": self.theta_norms,
            "group_names": names,
            "group_sizes": self.sizes,
        }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def linear_model(
    seed: int, rows: int, sizes: tuple[int, ...] = (20, 40, 30), decay: float = 3.0, rank: int | None = None
) -> Linear:
    """Random J with a decaying spectrum (rank deficient when `rank` is given)."""
    g = generator(seed)
    blocks = []
    for size in sizes:
        block = randn(g, rows, size) * torch.exp(-decay * torch.arange(size, dtype=torch.float64) / size)
        if rank is not None:
            block = block[:, :rank] @ randn(g, min(rank, size), size) / math.sqrt(rank)
        blocks.append(block)
    theta = [randn(g, size) for size in sizes]
    network = sum((block @ t for block, t in zip(blocks, theta, strict=True)), torch.zeros(rows)) + randn(g, rows)
    return Linear(blocks, theta, network)


def targets_of(model: Linear, seed: int, noise: float = 0.1) -> Tensor:
    """Observations y near the network's outputs."""
    g = generator(seed + 1000)
    drift = sum(block @ (0.3 * randn(g, block.shape[1])) for block in model.blocks)
    return model.network + drift + math.sqrt(noise) * randn(g, len(model.network))


def gaussian_problem(model: Linear, y: Tensor, noise: NoiseModel | None = None, outputs: int = 1) -> GaussianEvidence:
    noise = NoiseModel.homoscedastic(len(y), 0.1) if noise is None else noise
    return GaussianEvidence(model.grams, y - model.offset, noise, outputs, observations=y, **model.shared())


def softmax_problem(
    seed: int, points: int, classes: int, variant: str = "simple", **kwargs
) -> tuple[Linear, SoftmaxEvidence]:
    model = linear_model(seed, points * classes, **kwargs)
    logits = model.network.reshape(points, classes)
    # Labels drawn from the network's own probabilities: a network that fits its data as far as they are predictable.
    p = logits.softmax(-1) if classes > 1 else torch.cat([1 - logits.sigmoid(), logits.sigmoid()], -1)
    labels = torch.multinomial(p, 1, generator=generator(seed + 1))[:, 0]
    return model, softmax_evidence(model, labels, classes, variant)


def softmax_evidence(model: Linear, labels: Tensor, classes: int, variant: str) -> SoftmaxEvidence:
    shape = (len(labels), classes)
    return SoftmaxEvidence(
        model.grams, model.network.reshape(shape), model.offset.reshape(shape), labels, variant, **model.shared()
    )


def softmax_evidence_like(problem: SoftmaxEvidence, variant: str) -> SoftmaxEvidence:
    return dataclasses.replace(problem, variant=variant)


def primal_gaussian(model: Linear, t: Tensor, precision: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Weight-space quantities of a regression with row variances `variance`."""
    jac, lam = model.jacobian, model.expand(precision)
    hessian = (jac.T / variance) @ jac
    sigma = torch.linalg.inv(hessian + torch.diag(lam))
    star = sigma @ (jac.T @ (t / variance))
    gamma = torch.stack(
        [
            size - precision[g] * block.trace()
            for g, (size, block) in enumerate(zip(model.sizes, _diagonal_blocks(sigma, model.sizes), strict=True))
        ]
    )
    return {
        "star": star,
        "sigma": sigma,
        "hessian": hessian,
        "gamma": gamma,
        "norms": torch.stack([part.square().sum() for part in star.split(list(model.sizes))]),
        "logdet": torch.linalg.slogdet(torch.eye(len(lam)).double() + hessian / lam[:, None])[1],
    }


def _diagonal_blocks(matrix: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [matrix[end - size : end, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def gaussian_joint(model: Linear, t: Tensor, precision: Tensor, variance: Tensor, theta: Tensor) -> Tensor:
    """M_theta: log-likelihood at theta - |theta|^2_Lambda / 2 - logdet(I + H / Lambda) / 2, written in weight space."""
    jac, lam = model.jacobian, model.expand(precision)
    error = t - jac @ theta
    fit = -0.5 * (error.square() / variance).sum() - 0.5 * (2 * math.pi * variance).log().sum()
    hessian = (jac.T / variance) @ jac
    root = lam.rsqrt()
    logdet = torch.linalg.slogdet(torch.eye(len(lam)).double() + root[:, None] * hessian * root)[1]
    return fit - 0.5 * (lam * theta.square()).sum() - 0.5 * logdet


def marginal(model: Linear, t: Tensor, precision: Tensor, variance: Tensor) -> Tensor:
    """log N(t; 0, K + D)."""
    cov = torch.einsum("g,gnm->nm", 1.0 / precision, model.grams) + torch.diag(variance)
    return torch.distributions.MultivariateNormal(torch.zeros_like(t), cov).log_prob(t)


def curvature(logits: Tensor) -> Tensor:
    """Block-diagonal B from its definition, (N*C, N*C)."""
    if logits.shape[-1] == 1:
        p = torch.sigmoid(logits[:, 0])
        return torch.diag(p * (1 - p))
    p = logits.softmax(-1)
    return torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None, :]))


def log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        return torch.distributions.Bernoulli(logits=logits[:, 0]).log_prob(labels.double()).sum()
    return torch.distributions.Categorical(logits=logits).log_prob(labels).sum()


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        return (labels[:, None] - torch.sigmoid(logits)).reshape(-1)
    return (torch.nn.functional.one_hot(labels, logits.shape[-1]) - logits.softmax(-1)).reshape(-1)


def softmax_mode(model: Linear, labels: Tensor, classes: int, precision: Tensor, steps: int = 200) -> Tensor:
    """theta_star in weight space: Newton with halving on the penalised log-likelihood."""
    theta, lam = torch.zeros_like(model.weights), model.expand(precision)

    def loss(value: Tensor) -> Tensor:
        logits = (model.offset + model.jacobian @ value).reshape(-1, classes)
        return 0.5 * (lam * value.square()).sum() - log_prob(logits, labels)

    for _ in range(steps):
        step, size = softmax_newton_step(model, labels, classes, lam, theta) - theta, 1.0
        while size > 1e-8 and loss(theta + size * step) > loss(theta) + 1e-12:
            size /= 2
        theta = theta + size * step
        if step.abs().max() < 1e-13:
            break
    return theta


def softmax_newton_step(model: Linear, labels: Tensor, classes: int, lam: Tensor, theta: Tensor) -> Tensor:
    """One full Newton step in weight space, differentiable in lam: exact first derivatives at a converged theta."""
    jac = model.jacobian
    logits = (model.offset + jac @ theta).reshape(-1, classes)
    gradient = jac.T @ residual(logits, labels) - lam * theta
    return theta + torch.linalg.solve(jac.T @ curvature(logits) @ jac + torch.diag(lam), gradient)


def softmax_joint(
    model: Linear, labels: Tensor, classes: int, precision: Tensor, theta: Tensor, curvature_at: Tensor
) -> Tensor:
    """M_theta of a classification in weight space with the curvature at given logits."""
    jac, lam = model.jacobian, model.expand(precision)
    logits = (model.offset + jac @ theta).reshape(-1, classes)
    root = lam.rsqrt()
    inner = root[:, None] * (jac.T @ curvature(curvature_at) @ jac) * root
    logdet = torch.linalg.slogdet(torch.eye(len(lam)).double() + inner)[1]
    return log_prob(logits, labels) - 0.5 * (lam * theta.square()).sum() - 0.5 * logdet


def quadratic_joint(model: Linear, labels: Tensor, classes: int, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Evidence of the second-order expansion at the trained weights, and its mode, in weight space."""
    jac, lam = model.jacobian, model.expand(precision)
    logits = model.network.reshape(-1, classes)
    b, r = curvature(logits), residual(logits, labels)
    gradient = jac.T @ r + jac.T @ b @ jac @ model.weights
    theta = torch.linalg.solve(jac.T @ b @ jac + torch.diag(lam), gradient)
    shift = jac @ (theta - model.weights)
    expansion = log_prob(logits, labels) + r @ shift - 0.5 * shift @ b @ shift
    root = lam.rsqrt()
    logdet = torch.linalg.slogdet(torch.eye(len(lam)).double() + root[:, None] * (jac.T @ b @ jac) * root)[1]
    return expansion - 0.5 * (lam * theta.square()).sum() - 0.5 * logdet, theta


def log_gradient(value, *logs: Tensor) -> Tensor:
    """Autograd gradient of value(*exp(logs)) in the logs, concatenated."""
    logs = tuple(log.clone().requires_grad_(True) for log in logs)
    out = value(*(log.exp() for log in logs))
    used = [log for log in logs if log.numel()]
    return torch.cat(torch.autograd.grad(out, used))
