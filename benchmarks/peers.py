"""Other ways to compute the tangent kernel of a PyTorch network, behind one signature.

Every peer is ``kernel(net, x, budget) -> (N, C, N, C)``: the Gram of all C outputs over all parameters, in the
network's dtype. `budget` (bytes) bounds what a peer may hold beside the result where it can be told to work in pieces;
the pieces are then chosen as large as fits. Peers may leave hooks on the network: give each its own copy.

All but the two of ``torch.func`` need packages of their own, see :data:`PEERS`.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset

Kernel = Callable[[nn.Module, Tensor, int], Tensor]
Weights = dict[str, Tensor]

_GIB = 2**30


def flat(net: nn.Module, x: Tensor) -> nn.Module:
    """The network with its outputs flattened to (N, C), which most peers expect."""
    with torch.no_grad():
        return net if net(x[:1]).ndim == 2 else nn.Sequential(net, nn.Flatten()).eval()


def _per_sample(net: nn.Module) -> tuple[Callable[[Weights, Tensor], Tensor], Weights]:
    """f(θ, one input) -> (C,), and θ̃."""
    theta = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def function(weights: Weights, row: Tensor) -> Tensor:
        return functional_call(net, (weights, buffers), (row.unsqueeze(0),)).flatten()

    return function, theta


def _num_outputs(net: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return net(x[:1]).numel()


def _activation_bytes(net: nn.Module, x: Tensor) -> int:
    """What the modules of one sample's forward pass return, in bytes."""
    sizes: list[int] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    handles = [m.register_forward_hook(note) for m in net.modules() if not list(m.children())]
    with torch.no_grad():
        net(x[:1])
    for handle in handles:
        handle.remove()
    return max(1, sum(sizes))


def jacobian_rows(
    net: nn.Module, x: Tensor, budget: int = 2 * _GIB, outputs: Tensor | None = None
) -> dict[str, Tensor]:
    """Per-sample Jacobians by ``vmap(jacrev)``: {name: (N, C, number of entries)}; of some outputs if asked."""
    function, theta = _per_sample(net)

    def chosen(weights: Weights, row: Tensor) -> Tensor:
        return function(weights, row) if outputs is None else function(weights, row)[outputs]

    cotangents = max(1, budget // (4 * len(x) * _activation_bytes(net, x)))
    count = _num_outputs(net, x) if outputs is None else len(outputs)
    rows = vmap(jacrev(chosen, chunk_size=None if cotangents >= count else cotangents), (None, 0))(theta, x)
    return {name: tensor.flatten(2) for name, tensor in rows.items()}


def vmap_jacrev(net: nn.Module, x: Tensor, budget: int) -> Tensor:
    """``vmap(jacrev)`` and one contraction per parameter tensor (the NTK tutorial's Jacobian contraction).

    Whole Jacobians are held where they fit; else pairs of sample blocks, each pair once.
    """
    outputs, size = _num_outputs(net, x), sum(p.numel() for p in net.parameters())
    row = outputs * size * x.element_size()
    if len(x) * row <= budget:
        rows = jacobian_rows(net, x, budget)
        return contract(rows, rows)
    blocks = range(0, len(x), max(1, budget // (2 * row)))
    kernel = x.new_zeros(len(x), outputs, len(x), outputs)
    for i in blocks:
        left = jacobian_rows(net, x[i : i + blocks.step], budget // 2)
        for j in range(0, i + 1, blocks.step):
            right = left if i == j else jacobian_rows(net, x[j : j + blocks.step], budget // 2)
            block = contract(left, right)
            kernel[i : i + blocks.step, :, j : j + blocks.step] = block
            kernel[j : j + blocks.step, :, i : i + blocks.step] = block.permute(2, 3, 0, 1)
    return kernel


def contract(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Σ over tensors of J₁J₂ᵀ, (N1, C, N2, C)."""
    total: Tensor | None = None
    for name, rows in left.items():
        term = torch.einsum("ncp,mdp->ncmd", rows, right[name])
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def ntk_vps(net: nn.Module, x: Tensor, budget: int) -> Tensor:
    """The NTK tutorial's NTK-vector products: for every pair of inputs a vjp and a jvp per output."""
    function, theta = _per_sample(net)
    outputs = _num_outputs(net, x)
    basis = torch.eye(outputs, dtype=x.dtype, device=x.device)

    def pair(one: Tensor, other: Tensor) -> Tensor:  # shape: (C of `one`, C of `other`)
        pull = vjp(lambda weights: function(weights, one), theta)[1]

        def column(unit: Tensor) -> Tensor:
            return jvp(lambda weights: function(weights, other), (theta,), pull(unit))[1]

        return vmap(column)(basis)

    weights = sum(p.numel() for p in net.parameters()) * x.element_size()
    pairs = max(1, budget // (outputs * (weights + 3 * _activation_bytes(net, x))))
    inner = min(len(x), pairs)
    columns = vmap(pair, (None, 0), chunk_size=inner)
    return vmap(columns, (0, None), chunk_size=max(1, pairs // inner))(x, x).permute(0, 2, 1, 3)


def nngeometry(net: nn.Module, x: Tensor, budget: int) -> Tensor:
    """``GramMatrix`` of nngeometry with hooks, one batch."""
    from nngeometry import GramMatrix  # type: ignore[import-not-found]
    from nngeometry.layercollection import LayerCollection  # type: ignore[import-not-found]
    from nngeometry.object.fspace import FMatDense  # type: ignore[import-not-found]

    loader = DataLoader(TensorDataset(x.clone(), torch.zeros(len(x))), batch_size=len(x))
    collection = LayerCollection.from_model(net)
    if collection.numel() != sum(p.numel() for p in net.parameters()):
        raise NotImplementedError("some parameters have no rule")
    gram = GramMatrix(net, loader, lambda *d: net(d[0]), representation=FMatDense, layer_collection=collection)
    return gram.to_torch().detach().permute(1, 0, 3, 2)


def _laplace(backend_name: str) -> Kernel:
    """The Gram part of laplace-torch's ``FunctionalLaplace.fit`` with one of its backends.

    As there, the Jacobian of block j is computed again for every i; block sizes are what fits in the budget.
    """

    def kernel(net: nn.Module, x: Tensor, budget: int) -> Tensor:
        from laplace import curvature  # type: ignore[import-not-found]

        net = flat(net, x)
        outputs = _num_outputs(net, x)
        net.output_size = outputs  # type: ignore[assignment]
        backend = getattr(curvature, backend_name)(net, "regression")
        step = _laplace_block(backend_name, net, x, budget)
        result = x.new_zeros(len(x) * outputs, len(x) * outputs)
        blocks = [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]
        for i, rows in enumerate(blocks):
            left = backend.jacobians(x[rows])[0].detach()
            for columns in blocks[i:]:
                right = backend.jacobians(x[columns])[0].detach()
                block = torch.einsum("ap,bp->ab", left.reshape(-1, left.shape[-1]), right.reshape(-1, left.shape[-1]))
                r, c = (slice(s.start * outputs, s.stop * outputs) for s in (rows, columns))
                result[r, c] = block
                result[c, r] = block.mT
        return result.reshape(len(x), outputs, len(x), outputs)

    kernel.__doc__ = f"laplace-torch's functional Gram with {backend_name}."
    return kernel


def _laplace_block(backend_name: str, net: nn.Module, x: Tensor, budget: int) -> int:
    """Samples per block: two Jacobians and a copy; Curvlinops also sends b·C cotangents through the whole batch."""
    outputs, size = _num_outputs(net, x), sum(p.numel() for p in net.parameters())
    step = budget / (3 * outputs * size * x.element_size())
    if backend_name == "CurvlinopsGGN":
        step = min(step, math.sqrt(budget / (outputs * _activation_bytes(net, x))))
    return max(1, min(len(x), int(step)))


def curvlinops(net: nn.Module, x: Tensor, budget: int) -> Tensor:
    """J(JᵀE) with the linear operators of curvlinops, columns in blocks within the budget."""
    from curvlinops import JacobianLinearOperator  # type: ignore[import-not-found]

    net = flat(net, x)
    outputs = _num_outputs(net, x)
    data = [(x, x.new_zeros(len(x), outputs))]
    jacobian = JacobianLinearOperator(net, list(net.parameters()), data, check_deterministic=False, num_data=len(x))
    transposed = jacobian.adjoint()
    weights = sum(p.numel() for p in net.parameters()) * x.element_size()
    column = weights + 3 * len(x) * _activation_bytes(net, x)
    units = torch.eye(len(x) * outputs, dtype=x.dtype, device=x.device).split(max(1, budget // column), dim=1)
    columns = [(jacobian @ (transposed @ unit)).detach() for unit in units]
    return torch.cat(columns, 1).reshape(len(x), outputs, len(x), outputs)


@dataclass(frozen=True)
class Peer:
    """A peer's kernel function and the packages that it needs."""

    kernel: Kernel
    packages: tuple[str, ...] = ()

    def missing(self) -> tuple[str, ...]:
        """Needed packages that are not installed, by import name."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)


PEERS = {
    "vmap(jacrev)": Peer(vmap_jacrev),
    "ntk-vps": Peer(ntk_vps),
    "nngeometry": Peer(nngeometry, ("nngeometry",)),
    "laplace Curvlinops": Peer(_laplace("CurvlinopsGGN"), ("laplace", "curvlinops")),
    "laplace BackPACK": Peer(_laplace("BackPackGGN"), ("laplace", "backpack")),
    "laplace ASDL": Peer(_laplace("AsdlGGN"), ("laplace", "asdl")),
    "curvlinops": Peer(curvlinops, ("curvlinops",)),
}


def run_peer(name: str, net: nn.Module, x: Tensor, budget: int) -> Tensor:
    """The kernel of a peer, with its warnings silenced; the network's parameters must not be shared with others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PEERS[name].kernel(net, x, budget)
