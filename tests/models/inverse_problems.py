"""Small inverse problems with everything that is known about them in dense float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import gpytorch
import torch
from gpytorch.constraints import Positive
from torch import Tensor, nn

import ntkgp
from ntkgp.models.inverse import InverseNTKGP
from tests import reference as ref

DOUBLE = torch.float64


class Matrix(nn.Module):
    """A forward operator given by its matrix."""

    def __init__(self, matrix: Tensor, image_shape: tuple[int, ...], data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("rows", matrix)
        self.image_shape, self.data_shape = image_shape, data_shape
        self.num_measurements, self.num_pixels = matrix.shape

    def forward(self, image: Tensor) -> Tensor:
        batch = image.shape[: image.ndim - len(self.image_shape)]
        return (image.reshape(*batch, -1) @ self.rows.mT.to(image)).reshape(*batch, *self.data_shape)

    def adjoint(self, data: Tensor) -> Tensor:
        batch = data.shape[: data.ndim - len(self.data_shape)]
        return (data.reshape(*batch, -1) @ self.rows.to(data)).reshape(*batch, *self.image_shape)


def blur(size: int) -> Matrix:
    """Means over 3 × 3 neighbours, zero outside."""
    unit = torch.eye(size**2, dtype=DOUBLE).reshape(-1, 1, size, size)
    rows = nn.functional.conv2d(unit, torch.full((1, 1, 3, 3), 1 / 9, dtype=DOUBLE), padding=1)
    return Matrix(rows.flatten(1).mT, (size, size), (size, size))


def mask(size: int, seed: int = 0) -> Matrix:
    """Half of the pixels (inpainting)."""
    kept = torch.randperm(size**2, generator=torch.Generator().manual_seed(seed))[: size**2 // 2].sort().values
    return Matrix(torch.eye(size**2, dtype=DOUBLE)[kept], (size, size), (len(kept),))


def rays(size: int, count: int, seed: int = 0) -> Matrix:
    """Random sparse positive rows: `count` views of three rays."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(3 * count, size**2, generator=generator, dtype=DOUBLE)
    return Matrix(rows * (rows > 0.7), (size, size), (count, 3))


def conv_net() -> nn.Module:
    """3 convolutions with affine GroupNorm (eps = 0 so that groups are exactly invariant), a sigmoid at the end."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4, eps=0.0), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4, eps=0.0), nn.Tanh(),
        nn.Conv2d(4, 1, 1), nn.Sigmoid(),
    )  # fmt: skip


def mlp() -> nn.Module:
    """From three numbers to 25 pixels."""
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 25))


@dataclass(frozen=True, eq=False)
class InverseProblem:
    """A network fitted to measurements, with its dense Jacobian."""

    net: nn.Module
    x: Tensor
    A: Matrix
    y: Tensor
    groups: str
    noise: float = 0.03

    @cached_property
    def lin(self) -> ntkgp.LinearizedNetwork:
        return ntkgp.LinearizedNetwork(self.net, self.x, groups=self.groups)

    @cached_property
    def precision(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return 10 ** (2 * torch.rand(len(self.lin.groups), generator=generator, dtype=DOUBLE))

    @cached_property
    def index(self) -> Tensor:
        return ref.index(self.net, [set(members) for members in self.lin.groups.members])

    @cached_property
    def theta(self) -> Tensor:
        return ref.theta(self.net)

    @cached_property
    def image(self) -> Tensor:
        return ref.outputs(self.net, self.x)[0]

    @cached_property
    def j(self) -> Tensor:
        """Of the pixels, (d, P)."""
        return ref.jacobian(self.net, self.x)[0]

    @cached_property
    def aj(self) -> Tensor:
        return self.A.rows @ self.j

    @cached_property
    def targets(self) -> Tensor:
        """r⋆ = y − A f + A J θ̃."""
        return self.y.reshape(-1) - self.A.rows @ self.image + self.aj @ self.theta

    @property
    def weights(self) -> Tensor:
        """λ of every parameter, (P,)."""
        return self.precision[self.index]

    def model(self, noise: float | None = None, **options) -> InverseNTKGP:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive())
        found = InverseNTKGP(self.y, self.A, likelihood, self.lin, **options)
        found.set_hyperparameters(self.precision, torch.tensor([self.noise if noise is None else noise], dtype=DOUBLE))
        return found


@functools.cache
def problem(kind: str, groups: str = "layer", dtype: torch.dtype = DOUBLE, count: int = 5) -> InverseProblem:
    """ "conv": 6 × 6 pixels; "mlp": 5 × 5; each with 3·count rays, or "deblur" and "inpaint" with the conv net."""
    with ref.seeded(3) as generator:
        net, size = (mlp(), 5) if kind == "mlp" else (conv_net(), 6)
        net = net.double()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
        shape = (1, 3) if kind == "mlp" else (1, 1, size, size)
        x = torch.rand(shape, generator=generator, dtype=DOUBLE)
        A = {"deblur": blur, "inpaint": mask}.get(kind, lambda s: rays(s, count))(size)
        truth = torch.rand(size, size, generator=generator, dtype=DOUBLE)
        y = A(truth) + 0.1 * torch.randn(A.data_shape, generator=generator, dtype=DOUBLE)
        ref.train(net, lambda: (A(net(x).reshape(size, size)) - y).square().mean(), 40)
    return InverseProblem(net.to(dtype), x.to(dtype), A, y, groups)


def dense(p: InverseProblem, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """θ⋆, h(θ⋆) and the covariance of the pixels, all in weight space."""
    rows = torch.full((len(p.aj),), p.noise, dtype=DOUBLE) if noise is None else noise
    found = ref.gaussian_primal(p.aj, p.targets, p.weights, rows, p.index)
    mean = p.image + p.j @ (found.theta_star - p.theta)
    return found.theta_star, mean, p.j @ found.covariance @ p.j.T
