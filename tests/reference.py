"""The dense float64 oracle: plain torch, row by row, sharing no code with the package.

Everything is written for small problems, from the definitions: Jacobians by ``autograd.grad`` of one output of one row
at a time, posteriors and evidences once in weight space (P × P) and once in function space (NC × NC).
Rows are input-major: J is (N, C, P) or (N·C, P). ``precision`` has one entry per parameter, ``noise`` one per row.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DOUBLE = torch.float64


# --- networks -------------------------------------------------------------------------------------


def _double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double().eval()


def _row(inputs, n: int):
    """Row n of a tensor, dict, tuple or list of tensors, as a batch of one."""
    if isinstance(inputs, Tensor):
        row = inputs[n : n + 1].detach()
        return row.double() if row.is_floating_point() else row
    if isinstance(inputs, dict):
        return {key: _row(value, n) for key, value in inputs.items()}
    return tuple(_row(value, n) for value in inputs)


def _run(net: nn.Module, row) -> Tensor:
    """Flat output of one row."""
    out = net(**row) if isinstance(row, dict) else net(*row) if isinstance(row, tuple) else net(row)
    return (out if isinstance(out, Tensor) else out.logits).reshape(-1)


def _length(inputs) -> int:
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    return len(inputs)


def trainable(net: nn.Module, names: list[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that the Jacobian is taken in, in the order of ``named_parameters``."""
    chosen = {name: p for name, p in net.named_parameters() if p.requires_grad and (names is None or name in names)}
    assert names is None or set(names) == set(chosen)
    return chosen


def theta(net: nn.Module, names: list[str] | None = None) -> Tensor:
    """The trained weights θ̃, (P,)."""
    return torch.cat([p.detach().double().reshape(-1) for p in trainable(net, names).values()])


def index(net: nn.Module, groups: list[set[str]], names: list[str] | None = None) -> Tensor:
    """Group number of each entry of theta, (P,)."""
    owner = [next(g for g, members in enumerate(groups) if name in members) for name in trainable(net, names)]
    sizes = [p.numel() for p in trainable(net, names).values()]
    return torch.cat([torch.full((size,), g) for g, size in zip(owner, sizes, strict=True)])


def outputs(net: nn.Module, inputs) -> Tensor:
    """f(x; θ̃), (N, C), one row at a time."""
    net = _double(net)
    with torch.no_grad():
        return torch.stack([_run(net, _row(inputs, n)) for n in range(_length(inputs))])


@torch.enable_grad()
def jacobian(net: nn.Module, inputs, names: list[str] | None = None) -> Tensor:
    """J(x), (N, C, P): a loop over rows and outputs, a backward pass each."""
    net = _double(net)
    parameters = list(trainable(net, names).values())
    rows = []
    for n in range(_length(inputs)):
        out = _run(net, _row(inputs, n))
        for c in range(len(out)):
            grads = torch.autograd.grad(out[c], parameters, retain_graph=c + 1 < len(out), allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in filled]))
    return torch.stack(rows).reshape(_length(inputs), -1, rows[0].numel())


# --- Gaussian likelihood --------------------------------------------------------------------------


def _per_group(values: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, dtype=DOUBLE).index_add(0, index, values)


@dataclass(frozen=True)
class Posterior:
    """Of the weights: θ⋆, Σ, and the evidence with its parts."""

    theta_star: Tensor  # (P,)
    covariance: Tensor  # Σ, (P, P)
    gamma: Tensor  # γ_g = P_g − λ_g tr Σ_gg, (G,)
    norms: Tensor  # ‖θ⋆_g‖², (G,)
    logdet: float  # logdet(I + Λ⁻¹H)
    log_evidence: float


def gaussian_log_likelihood(t: Tensor, mean: Tensor, noise: Tensor) -> float:
    """Σ log N(t_i; mean_i, noise_i)."""
    return float((-((t - mean).square() / noise + noise.log() + math.log(2 * math.pi)) / 2).sum())


def gaussian_primal(j: Tensor, t: Tensor, precision: Tensor, noise: Tensor, index: Tensor) -> Posterior:
    """Weight-space posterior of t = Jθ + ε; the evidence is log p(t|θ⋆) − ½‖θ⋆‖²_Λ − ½logdet(I + Λ⁻¹H)."""
    # Symmetric scaling by Λ^-½ keeps this accurate for precisions many decades apart.
    phi = j * precision.rsqrt()
    a = phi.T @ (phi / noise.unsqueeze(-1)) + torch.eye(j.shape[1], dtype=DOUBLE)
    inverse = torch.linalg.inv(a)
    inverse = (inverse + inverse.T) / 2
    scaled = inverse @ (phi.T @ (t / noise))
    theta_star = scaled * precision.rsqrt()
    logdet = float(torch.linalg.slogdet(a)[1])
    evidence = gaussian_log_likelihood(t, j @ theta_star, noise) - float(scaled @ scaled) / 2 - logdet / 2
    gamma = _per_group(1 - inverse.diagonal(), index)
    covariance = inverse * precision.rsqrt() * precision.rsqrt().unsqueeze(-1)
    return Posterior(theta_star, covariance, gamma, _per_group(theta_star.square(), index), logdet, evidence)


def gram(j1: Tensor, precision: Tensor, j2: Tensor | None = None) -> Tensor:
    """J₁Λ⁻¹J₂ᵀ."""
    return (j1 / precision) @ (j1 if j2 is None else j2).T


def gaussian_dual_covariance(k: Tensor, cross: Tensor, test: Tensor, noise: Tensor) -> Tensor:
    """K⋆⋆ − K⋆X(K + D)⁻¹KX⋆ from Grams; cross is (test, train)."""
    return test - cross @ torch.linalg.solve(k + noise.diag(), cross.T)


def gaussian_log_evidence(k: Tensor, t: Tensor, noise: Tensor) -> float:
    """log N(t; 0, K + D)."""
    a = k + noise.diag()
    fit = t @ torch.linalg.solve(a, t)
    return float(-(fit + torch.linalg.slogdet(a)[1] + len(t) * math.log(2 * math.pi)) / 2)


def map_log_evidence(j: Tensor, t: Tensor, theta: Tensor, precision: Tensor, noise: Tensor, index: Tensor) -> float:
    """M_θ = log p(t | θ) − ½‖θ‖²_Λ − ½ logdet(I + Λ⁻¹H) at any θ."""
    logdet = gaussian_primal(j, t, precision, noise, index).logdet
    return gaussian_log_likelihood(t, j @ theta, noise) - float((precision * theta.square()).sum()) / 2 - logdet / 2


# --- softmax and logistic likelihood --------------------------------------------------------------


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities of the C classes; for C = 1 of label 1."""
    return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)


def curvature(logits: Tensor) -> Tensor:
    """B = diag(p) − ppᵀ (p(1 − p) for C = 1) as one block-diagonal (NC, NC) matrix."""
    p = probabilities(logits)
    if logits.shape[-1] == 1:
        return (p * (1 - p)).flatten().diag()
    return torch.block_diag(*(torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)))


def label_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Σ log p(y_n | logits_n)."""
    if logits.shape[-1] == 1:
        return float(-nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), reduction="sum"))
    return float(-nn.functional.cross_entropy(logits, labels, reduction="sum"))


def softmax_theta_star(j: Tensor, offset: Tensor, labels: Tensor, precision: Tensor) -> Tensor:
    """argmin over θ of CE(m0 + Jθ, y) + ½‖θ‖²_Λ by damped Newton in weight space."""
    n, c = offset.shape
    onehot = labels.double().unsqueeze(-1) if c == 1 else nn.functional.one_hot(labels, c).double()
    phi = j * precision.rsqrt()
    w = torch.zeros(j.shape[1], dtype=DOUBLE)

    def loss(w: Tensor) -> float:
        return -label_log_likelihood(offset + (phi @ w).view(n, c), labels) + float(w @ w) / 2

    for _ in range(200):
        h = offset + (phi @ w).view(n, c)
        gradient = phi.T @ (probabilities(h) - onehot).flatten() + w
        hessian = phi.T @ curvature(h) @ phi + torch.eye(len(w), dtype=DOUBLE)
        step, size, before = torch.linalg.solve(hessian, gradient), 1.0, loss(w)
        if step.abs().max() <= 1e-14 * max(1.0, float(w.abs().max())):
            break
        while loss(w - size * step) > before + 1e-13 * abs(before) and size > 1e-10:
            size /= 2
        w = w - size * step
    return w * precision.rsqrt()


def softmax_primal(
    j: Tensor, offset: Tensor, logits: Tensor, labels: Tensor, precision: Tensor, index: Tensor
) -> Posterior:
    """Laplace–GGN posterior with H at the given logits; evidence with θ⋆ of the true convex loss ("simple")."""
    phi = j * precision.rsqrt()
    a = phi.T @ curvature(logits) @ phi + torch.eye(j.shape[1], dtype=DOUBLE)
    inverse = torch.linalg.inv(a)
    inverse = (inverse + inverse.T) / 2
    theta_star = softmax_theta_star(j, offset, labels, precision)
    logdet = float(torch.linalg.slogdet(a)[1])
    fit = label_log_likelihood(offset + (j @ theta_star).view_as(offset), labels)
    evidence = fit - float((precision * theta_star.square()).sum()) / 2 - logdet / 2
    gamma = _per_group(1 - inverse.diagonal(), index)
    covariance = inverse * precision.rsqrt() * precision.rsqrt().unsqueeze(-1)
    return Posterior(theta_star, covariance, gamma, _per_group(theta_star.square(), index), logdet, evidence)


# --- sampled data and trained networks ------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """The global generator seeded for module initialisation and put back afterwards; yields one for data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@torch.enable_grad()
def train(net: nn.Module, loss: Callable[[], Tensor], steps: int) -> nn.Module:
    """Full-batch Adam, lr 1e-2, weight decay 1e-3; the network is left in eval mode."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return net.eval()


@dataclass(frozen=True)
class Sample:
    """A trained network with its data, test inputs and random hyper-parameters (one precision per tensor)."""

    net: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    precision: Tensor  # (number of tensors,)
    noise: float


def _data(generator: torch.Generator, width: int = 3, n: int = 40, n_test: int = 15) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, width, generator=generator, dtype=DOUBLE)
    return x, 2 * torch.randn(n_test, width, generator=generator, dtype=DOUBLE)


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, dtype=DOUBLE)


def layernorm_mlp(outputs: int) -> nn.Sequential:
    """3-16-16-C, LayerNorm without affine parameters and eps = 0 after both bias-free hidden layers."""
    norm = lambda: nn.LayerNorm(16, eps=0.0, elementwise_affine=False)  # noqa: E731
    return nn.Sequential(
        nn.Linear(3, 16, bias=False), norm(), nn.Tanh(), nn.Linear(16, 16, bias=False), norm(), nn.Tanh(),
        nn.Linear(16, outputs),
    ).double()  # fmt: skip


def _regression(net: nn.Module, seed: int, generator: torch.Generator) -> Sample:
    x, x_test = _data(generator)
    y = torch.sin(2 * x.sum(-1)) + 0.1 * torch.randn(len(x), generator=generator, dtype=DOUBLE)
    train(net, lambda: (net(x).squeeze(-1) - y).square().mean(), 300)
    tensors = len(list(net.parameters()))
    return Sample(net, x, y, x_test, _uniform(generator, tensors, 0.3, 3.3), 0.04)


@functools.cache
def problem_r(seed: int = 0) -> Sample:
    """Reference problem R: regression, P = 321, 4 tensors."""
    with seeded(seed) as generator:
        return _regression(layernorm_mlp(1), seed, generator)


@functools.cache
def problem_u(seed: int = 0) -> Sample:
    """Reference problem U: the sizes of R, ReLU, no norm, all biases."""
    with seeded(seed) as generator:
        net = nn.Sequential(
            nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
        ).double()  # fmt: skip
        return _regression(net, seed, generator)


@functools.cache
def problem_c(seed: int = 0) -> Sample:
    """Reference problem C: the body of R, 4 outputs, random labels."""
    with seeded(seed) as generator:
        net = layernorm_mlp(4)
        x, x_test = _data(generator)
        y = torch.randint(0, 4, (len(x),), generator=generator)
        train(net, lambda: nn.functional.cross_entropy(net(x), y), 60)
        return Sample(net, x, y, x_test, _uniform(generator, 4, 0.5, 1.5), 1.0)


@functools.cache
def batchnorm_net(outputs: int = 3, seed: int = 0) -> Sample:
    """A deep trained BatchNorm network, 4-10-10-10-C, affine normalisers, biases, eps = 1e-30; regression."""
    with seeded(seed) as generator:
        layers: list[nn.Module] = []
        for width in (4, 10, 10):
            layers += [nn.Linear(width, 10), nn.BatchNorm1d(10, eps=1e-30), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(10, outputs)).double()
        x, x_test = _data(generator, width=4, n=30, n_test=6)
        phase = torch.arange(outputs, dtype=DOUBLE)
        y = torch.sin(x.sum(-1, keepdim=True) + phase)
        y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=DOUBLE)
        train(net, lambda: (net(x) - y).square().mean(), 150)
        tensors = len(list(net.parameters()))
        return Sample(net, x, y, x_test, _uniform(generator, tensors, 0.3, 3.3), 0.04)


@functools.cache
def layernorm_cnn(outputs: int = 3, seed: int = 0) -> Sample:
    """A trained convolutional network on 1 × 6 × 6 images with affine LayerNorm over (C, H, W); labels."""
    with seeded(seed) as generator:
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.LayerNorm([3, 4, 4], eps=0.0), nn.Tanh(),
            nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 2, 2], eps=0.0), nn.GELU(),
            nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, outputs),
        ).double()  # fmt: skip
        x = torch.randn(24, 1, 6, 6, generator=generator, dtype=DOUBLE)
        y = (x[:, 0, :3].mean((1, 2)) > 0).long() + (x[:, 0, 3:].mean((1, 2)) > 0.1).long()
        x_test = torch.randn(5, 1, 6, 6, generator=generator, dtype=DOUBLE)
        train(net, lambda: nn.functional.cross_entropy(net(x), y % outputs), 60)
        tensors = len(list(net.parameters()))
        return Sample(net, x, y % outputs, x_test, _uniform(generator, tensors, 0.5, 1.5), 1.0)
