"""The curvature of a linear head, from its features: C blocks of F × F (regression) or one of CF × CF (softmax)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ntkgp.baselines.laplace.capture import Capture, owners, places
from ntkgp.baselines.laplace.structures import Structure, draw, factor_with_identity
from ntkgp.baselines.laplace.tangent import HeadView, Tangent, curvature
from ntkgp.linearization import LinearizedNetwork

logger = logging.getLogger("ntkgp")


class Head:
    """The last layer and its features.

    :param name: of the module; None for the last one that has trainable parameters.
    :ivar columns: of its weights in ``lin.theta``: order (C, F) with the bias as last feature, where it is a linear
        head whose output is the network's; else their own order.
    :ivar is_linear: whether it is such a head.
    :raises ValueError: no such module.
    """

    def __init__(self, lin: LinearizedNetwork, x: Tensor, name: str | None) -> None:
        owned = owners(lin)
        if name is not None and name not in owned:
            raise ValueError(f"layer: expected one of {tuple(owned)}, got {name!r}")
        self.name = list(owned)[-1] if name is None else name
        self._capture = Capture(lin, [self.name])
        self._bias = False
        where = places(lin)
        self.columns = torch.cat([where[n] for n in owned[self.name]])
        self.is_linear = self._is_head(lin, x, owned[self.name])
        if self.is_linear:
            weight = where[f"{self.name}.weight".lstrip(".")].reshape(lin.num_outputs, -1)
            if self._bias:
                weight = torch.cat([weight, where[f"{self.name}.bias".lstrip(".")].unsqueeze(-1)], -1)
            self.columns = weight.reshape(-1)
        else:
            logger.info("last layer %r is no linear head: its Jacobian rows are formed", self.name)

    def _is_head(self, lin: LinearizedNetwork, x: Tensor, names: list[str]) -> bool:
        layer = self._capture.module.get_submodule(self.name)
        if type(layer) is not nn.Linear or not layer.weight.requires_grad or layer.out_features != lin.num_outputs:
            return False
        self._bias = layer.bias is not None and layer.bias.requires_grad
        if len(names) != 1 + self._bias:
            return False
        f = self._capture.forward(x)
        inputs, outputs = self._capture.inputs.get(self.name, []), self._capture.outputs.get(self.name, [])
        return len(outputs) == 1 and inputs[0].ndim == 2 and len(inputs[0]) == len(x) and torch.equal(outputs[0], f)

    def features(self, x: Tensor) -> Tensor:
        """φ(x), float64 (N, F), a last column of ones for the bias."""
        self._capture.forward(x)
        phi = self._capture.inputs[self.name][0].double()
        return torch.cat([phi, phi.new_ones(len(phi), 1)], -1) if self._bias else phi


class LastLayer(Structure):
    """The whole H of a linear head. The rows φᵀ ⊗ I, mostly zeros, are never formed."""

    def __init__(self, lin: LinearizedNetwork, head: Head, classification: bool, max_memory: int) -> None:
        super().__init__(lin, head.columns, classification, max_memory)
        self._head = head
        c = lin.num_outputs
        self._shape = (c, len(self.columns) // c)

    def numbers(self) -> int:
        """The moments, scaled, their factor, its inverse and two on the way."""
        c, width = self._shape
        return 6 * (c * width) ** 2 if self.classification else (5 * c + 1) * width**2

    def describe(self) -> str:
        """How many weights."""
        return "the curvature of {} × {} weights".format(*self._shape)

    def smallest_room(self) -> int:
        """Of one input: its activations, and its features."""
        return 4 * self.lin.activation_bytes + 32 * self._shape[1]

    def collect(self, tangent: Tangent) -> None:
        """Gather ΦᵀΦ (F, F), or Σ B_n ⊗ φφᵀ (CF, CF)."""
        c, width = self._shape
        if self.classification:
            moments = torch.zeros(c, c, width, width, dtype=torch.float64)
        else:
            moments = torch.zeros(width, width, dtype=torch.float64)
        for view in tangent:
            assert isinstance(view, HeadView)
            phi = view.features
            if not self.classification:
                moments.addmm_(phi.T, phi)
                continue
            b = curvature(view.f)
            for i in range(c):
                for j in range(i + 1):
                    moments[i, j].addmm_((phi * b[:, i, j].unsqueeze(-1)).T, phi)
        if self.classification:
            for i in range(c):
                for j in range(i):
                    moments[j, i] = moments[i, j]
            moments = moments.transpose(1, 2).reshape(c * width, c * width)
        self.moments = moments

    def _factorise(self) -> None:
        """Blocks: (C, F, F) for regression, (1, CF, CF) for classification."""
        blocks = 1 if self.classification else self._shape[0]
        self._scale = self.precision.rsqrt().reshape(blocks, -1)
        curvatures = self.moments * self.weights.reshape(-1, 1, 1)
        self._scaled = curvatures * self._scale.unsqueeze(-1) * self._scale.unsqueeze(-2)
        self._factor = factor_with_identity(self._scaled)

    def logdet(self) -> float:
        """The log-determinant of I + Λ⁻¹H."""
        return 2 * float(self._factor.diagonal(dim1=-2, dim2=-1).log().sum())

    def gammas(self) -> tuple[Tensor, Tensor]:
        """tr(HΣ) by group and channel."""
        each = (torch.cholesky_inverse(self._factor) * self._scaled).sum(-1)
        return self.per_group(each.reshape(-1)), each.sum(-1)

    def solve(self, v: Tensor) -> Tensor:
        """Σ v."""
        scaled = (v.reshape(self._scale.shape) * self._scale).unsqueeze(-1)
        return (torch.cholesky_solve(scaled, self._factor).squeeze(-1) * self._scale).reshape(-1)

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of N(0, Σ)."""
        noise = draw((*self._scale.shape, num_samples), generator)
        found = torch.linalg.solve_triangular(self._factor.mT, noise, upper=True) * self._scale.unsqueeze(-1)
        return found.permute(2, 0, 1).reshape(num_samples, -1)

    def covariance(self, x: Tensor) -> Tensor:
        """φᵀ Σ_cc' φ, (N, C, C)."""
        c, width = self._shape
        phi = self._head.features(x)
        inverse = torch.cholesky_inverse(self._factor) * self._scale.unsqueeze(-1) * self._scale.unsqueeze(-2)
        if not self.classification:
            return torch.diag_embed(torch.einsum("nf,cfg,ng->nc", phi, inverse, phi))
        blocks = inverse.reshape(c, width, c, width)
        out = torch.zeros(len(phi), c, c, dtype=torch.float64)
        for i in range(c):
            for j in range(i + 1):
                out[:, i, j] = out[:, j, i] = ((phi @ blocks[i, :, j]) * phi).sum(-1)
        return out

    def state(self) -> dict[str, Tensor]:
        """The moments."""
        return {"moments": self.moments}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back the moments."""
        self.moments = state["moments"]
