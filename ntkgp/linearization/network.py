"""The network as a linear model in its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ntkgp.linearization.checks import check_rows, check_weights
from ntkgp.linearization.frozen import FrozenNetwork, Weights, pass_environment
from ntkgp.linearization.grams import products
from ntkgp.linearization.grams.engine import Engine, Side
from ntkgp.linearization.grams.explain import Explanation, explain
from ntkgp.linearization.grams.factors import Factors
from ntkgp.linearization.groups import ParameterGroups, layer_partition, normalization_partition
from ntkgp.linearization.invariance import euler_error, normalized_sets, warn_of_stopped_gradients
from ntkgp.linearization.memory import format_memory, parse_memory
from ntkgp.linearization.packing import InputPacking
from ntkgp.linearization.second_order import second_order
from ntkgp.linearization.symmetric import SymmetricGrams

GROUPS = ("normalization", "layer", "tensor", "single")


class LinearizedNetwork:
    r"""The tangent model of a trained network at its weights :math:`\tilde\theta`,

    .. math:: h(x; \theta) = f(x; \tilde\theta) + J(x)(\theta - \tilde\theta),
        \qquad J(x) = \partial f(x; \theta)/\partial\theta\,|_{\tilde\theta},

    with its products, Jacobian rows, per-group Grams and parameter groups. The module is copied: nothing of the user's
    module (mode, buffers, hooks, ``requires_grad``, parameters) or of the global random state ever changes, and later
    changes of the module do not reach this object. The copy runs in evaluation mode. Parameters with
    ``requires_grad=False`` are constants.

    Inputs are given as to the network (a tensor, or a dict, tuple or list of tensors, N rows each) or packed as the
    ``(N, D)`` matrix that GPyTorch wants (:meth:`pack`). Outputs of any shape are flattened to C numbers per row.

    :param net: the trained network. A dict input is passed by keyword and a tuple by position where the signature of
        ``forward`` allows it, else as one argument.
    :param example: inputs as the network takes them; two or more rows let the row-by-row check be exact.
    :param groups: ``"normalization"`` (one group per normalised set of weights, one for the rest), ``"layer"``,
        ``"tensor"``, ``"single"``, or a :class:`~ntkgp.ParameterGroups`.
    :param output: picks the output tensor from what the network returns; not needed for a tensor or an object with
        ``logits``.
    :param max_memory: budget for a single pass (:meth:`jvp`, :meth:`vjp`, calls); rows are cut into chunks to fit.
    :raises ValueError: no trainable parameter, non-finite weights, inputs or outputs, an output whose rows depend on
        other rows of the batch, or a partition that is none.
    :raises TypeError: an output that is not one floating-point tensor.

    Cost: one copy of the weights; a call is one forward pass, :meth:`jvp` and :meth:`vjp` about three, per vector.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> lin = LinearizedNetwork(net, torch.randn(2, 3))
    >>> lin.num_parameters, lin.num_outputs, lin.groups.names
    (66, 2, ('0', 'rest'))
    >>> x = torch.randn(5, 3)
    >>> lin.jvp(x, lin.theta).shape, lin.grams(x).shape
    (torch.Size([5, 2]), torch.Size([2, 10, 10]))
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        groups: str | ParameterGroups = "normalization",
        *,
        output: Callable[[Any], Tensor] | None = None,
        max_memory: str | int | float = "2GiB",
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
        if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
            raise TypeError("net: holds a TorchScript module; expected the ordinary module that it was made from")
        self.packing = InputPacking(example)
        self._max_memory = parse_memory(max_memory)
        check_weights(net)
        packed = _ordinary(self.packing.pack(example, "example"))
        # Tensors made in inference mode could never enter a graph.
        with torch.inference_mode(False):
            self.frozen = FrozenNetwork(net, self.packing.tree, output, self.packing.dtypes)
            with pass_environment(packed.device):
                self._probe_rows, self.output_shape = check_rows(self.frozen, self.packing, packed[:4])
                leaves = self.packing.leaves(self._probe_rows[:2])
                self.activation_bytes = self.frozen.activation_bytes(leaves)
                self.frozen.probe(leaves)
                warn_of_stopped_gradients(self.frozen, leaves)
            # The matrix is (N, C) inside; what the network returned per row is kept to restore it.
            self.num_outputs = math.prod(self.output_shape)
            self.groups = self._make_groups(groups, {id(p): name for name, p in net.named_parameters()})

    def _make_groups(self, groups: str | ParameterGroups, identities: dict[int, str]) -> ParameterGroups:
        names = list(self.frozen.theta)
        if isinstance(groups, ParameterGroups):
            spec = groups
        elif groups == "normalization":
            spec = ParameterGroups(normalization_partition(names, self.normalized))
        elif groups == "layer":
            spec = ParameterGroups(layer_partition(names))
        elif groups == "tensor":
            spec = ParameterGroups({name: [name] for name in names})
        elif groups == "single":
            spec = ParameterGroups({"all": names})
        else:
            raise ValueError(f"groups: expected one of {GROUPS} or a ntkgp.ParameterGroups, got {groups!r}")
        return spec.bind(self, self.frozen.theta, identities)

    @cached_property
    def normalized(self) -> list[tuple[str, tuple[str, ...]]]:
        """The normalised sets of weights found in the computation: (label, parameter names) of each."""
        return normalized_sets(self.frozen, self.packing.leaves(self._probe_rows))

    def euler_error(self, groups: ParameterGroups, x: Any) -> Tensor:
        """See :meth:`ntkgp.ParameterGroups.verify`."""
        return euler_error(self.frozen, groups, self.packing.leaves(self.pack(x).detach()))

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearizedNetwork:
        # Nothing in it ever changes: copies of a model share the network.
        return self

    @property
    def theta(self) -> Tensor:
        """θ̃, the trained weights, shape (P,), in the order of ``net.named_parameters()``."""
        return torch.cat([p.reshape(-1) for p in self.frozen.theta.values()])

    @property
    def num_parameters(self) -> int:
        """P, the number of trainable parameters."""
        return sum(p.numel() for p in self.frozen.theta.values())

    @property
    def dtype(self) -> torch.dtype:
        """The network's own dtype, in which its passes run."""
        return self.frozen.dtype

    @property
    def input_width(self) -> int:
        """D, the number of columns of packed inputs."""
        return self.packing.width

    def pack(self, inputs: Any) -> Tensor:
        """Inputs as the network takes them -> the (N, D) tensor of GPyTorch; packed tensors pass through.

        Exact: integers and booleans come back unchanged from :meth:`unpack`. See
        :class:`~ntkgp.linearization.packing.InputPacking` for dtypes and errors.
        """
        return self.packing.pack(inputs)

    def unpack(self, x: Tensor) -> Any:
        """Packed (N, D) inputs -> what the network takes."""
        return self.packing.unpack(x)

    def restore(self, outputs: Tensor) -> Tensor:
        """Flattened outputs (..., C) -> (..., *output_shape)."""
        return outputs.reshape(*outputs.shape[:-1], *self.output_shape)

    def _unflatten(self, v: Tensor) -> Weights:
        parts = _ordinary(v).split([p.numel() for p in self.frozen.theta.values()])
        with torch.inference_mode(False):
            return {
                name: part.reshape(p.shape).to(p.dtype)
                for (name, p), part in zip(self.frozen.theta.items(), parts, strict=True)
            }

    def _chunks(self, x: Tensor, passes: int) -> list[Tensor]:
        rows = self._max_memory // (passes * self.activation_bytes)
        if rows < 1:
            raise ValueError(
                f"max_memory: {format_memory(self._max_memory)} is too small for one row; "
                f"the smallest possible is {format_memory(passes * self.activation_bytes)}"
            )
        return list(x.split(rows))

    def _map(self, x: Any, compute: Callable[[list[Tensor]], Tensor], passes: int, dim: int = 0) -> Tensor:
        """Run over chunks of rows; the graph to x is kept only if x asks for it."""
        packed, keep = self._input(x)
        with pass_environment(packed.device), second_order(packed):
            parts = [compute(self.packing.leaves(chunk)) for chunk in self._chunks(packed, passes)]
            return torch.cat(parts if keep else [part.detach() for part in parts], dim=dim)

    def _input(self, x: Any) -> tuple[Tensor, bool]:
        """Packed inputs, and whether results must carry a graph to them."""
        packed = _ordinary(self.pack(x))
        keep = torch.is_grad_enabled() and packed.requires_grad
        return (packed if keep else packed.detach()), keep

    def __call__(self, x: Any) -> Tensor:
        """f(x; θ̃), the network's output with its event flattened.

        :param x: raw or packed inputs, N rows.
        :return: shape (N, C), in the network's dtype; differentiable with respect to x.
        """
        return self._map(x, self.frozen.forward, passes=1)

    def jvp(self, x: Any, v: Tensor) -> Tensor:
        """J(x) v, one or K vectors of parameter space pushed to the outputs.

        :param v: shape (P,) or (K, P).
        :return: shape (N, C) or (K, N, C). Cost: K forward-mode passes (a double vjp where forward mode is missing).
        :raises ValueError: another shape of v.
        """
        self._expect(v, "v", (self.num_parameters,))
        if v.ndim == 2 and len(v) == 0:
            return self(x).new_zeros(0, len(self.pack(x)), self.num_outputs)
        if v.ndim == 1:
            tangent = self._unflatten(v)
            return self._map(x, lambda leaves: self.frozen.jvp(leaves, tangent), passes=3)
        tangents = [self._unflatten(row) for row in v]
        return self._map(x, lambda leaves: torch.stack([self.frozen.jvp(leaves, t) for t in tangents]), passes=3, dim=1)

    def vjp(self, x: Any, u: Tensor) -> Tensor:
        """Jᵀu, one or K vectors of output space pulled back to the parameters and summed over the rows.

        :param u: shape (N, C) or (K, N, C).
        :return: shape (P,) or (K, P). Cost: one forward and K backward passes.
        :raises ValueError: another shape of u.
        """
        packed, keep = self._input(x)
        self._expect(u, "u", (len(packed), self.num_outputs))
        many = _ordinary(u).reshape(-1, len(packed), self.num_outputs)
        keep = keep or (torch.is_grad_enabled() and u.requires_grad)
        many = many if keep else many.detach()
        total = torch.zeros(len(many), self.num_parameters, dtype=self.dtype, device=packed.device)
        start = 0
        with pass_environment(packed.device), second_order(packed):
            for chunk in self._chunks(packed, passes=3):
                pull = self.frozen.pullback(self.packing.leaves(chunk))
                rows = [self._flatten(pull(row)) for row in many[:, start : start + len(chunk)]]
                if rows:
                    total = total + torch.stack(rows if keep else [row.detach() for row in rows])
                start += len(chunk)
        return total.reshape(*u.shape[:-2], self.num_parameters)

    @staticmethod
    def _flatten(tree: Weights) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tree.values()])

    @staticmethod
    def _expect(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
        if not isinstance(value, Tensor) or value.shape[-len(shape) :] != shape or value.ndim > len(shape) + 1:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected shape {shape} or (K, {', '.join(map(str, shape))}), got {came}")
        if value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")

    def jacobian_by_tensor(self, x: Any) -> Weights:
        """Jacobian rows of each parameter tensor: {name: (N, C, *parameter shape)}; all N rows at once."""
        packed, keep = self._input(x)
        with pass_environment(packed.device), second_order(packed):
            rows = self.frozen.jacobian(self.packing.leaves(packed))
        return rows if keep else {name: tensor.detach() for name, tensor in rows.items()}

    def jacobian(self, x: Any) -> Tensor:
        """J(x), shape (N, C, P), for small problems and tests: everything else works without it.

        Cost: C backward passes per row; N·C·P numbers.
        """
        rows = self.jacobian_by_tensor(x).values()
        return torch.cat([tensor.reshape(*tensor.shape[:2], -1) for tensor in rows], dim=-1)

    @cached_property
    def engine(self) -> Engine:
        """What computes Gram blocks layer by layer; which layers go by rules is found out when it is first used."""
        return Engine(self)

    def _side(self, x: Any, outputs: Tensor | None = None) -> Side:
        if isinstance(x, Factors):
            self.engine.kept_slots(x)
            return Side(x.x, x.outputs, x)
        packed = self.pack(x)
        if outputs is not None:
            if not isinstance(outputs, Tensor) or outputs.shape != packed.shape[:1] or outputs.is_floating_point():
                came = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise ValueError(f"outputs: expected one index per input, shape ({len(packed)},), got {came}")
            if bool(((outputs < 0) | (outputs >= self.num_outputs)).any()):
                raise ValueError(f"outputs: expected indices from 0 to {self.num_outputs - 1}, got {outputs.tolist()}")
            outputs = outputs if outputs.dtype == torch.bool else outputs.to(packed.device, torch.long)
        return Side(packed, outputs)

    @staticmethod
    def _check_products(dtype: torch.dtype) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype!r}")

    def _check_variance(self, variance: Tensor) -> None:
        if not isinstance(variance, Tensor) or variance.shape != (len(self.groups),):
            came = tuple(variance.shape) if isinstance(variance, Tensor) else type(variance).__name__
            raise ValueError(f"variance: expected shape ({len(self.groups)},), got {came}")

    def grams(
        self,
        x1: Any,
        x2: Any = None,
        max_memory: str | int | float = "2GiB",
        progress: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        r"""Per-group Grams :math:`K_g = J_g(x_1) J_g(x_2)^\top`, rows input-major, without the Jacobian.

        One forward pass and C backward chains per row give what every layer saw and what came back to it; each layer
        contributes by the cheapest order of summation (:meth:`explain`). Passes run in the network's dtype, products in
        ``dtype``: in float64 the result is the exact Gram of a rounded Jacobian, with the rank and the smallest
        eigenvalues of a Gram, which float32 products would drown at 1e-7 of the largest.

        :param x1: raw or packed inputs, or :meth:`factors` kept from before.
        :param x2: likewise; None for the symmetric Gram of x1.
        :param max_memory: budget for the result and everything held on the way; rows are cut into blocks to fit.
        :param dtype: of products and result, float64 or float32.
        :return: shape (G, N1·C, N2·C); differentiable with respect to inputs that require gradients (all layers'
            factors are then held at once).
        :raises ValueError: the budget cannot hold the result; the message gives the smallest possible one.

        Cost: per row one forward pass and C backward chains without weight gradients; per layer the flops that
        :meth:`explain` prints, at most N1·N2·C²·P (half of it if symmetric). `Novak et al. 2022
        <https://arxiv.org/abs/2206.08720>`_.
        """
        self._check_products(dtype)
        left, right = self._side(x1), None if x2 is None else self._side(x2)
        if left.needs_graph or (right is not None and right.needs_graph):
            totals = self.engine.graph(left, right, dtype)
            sizes = [len(s) * s.num_outputs(self) for s in (left, left if right is None else right)]
            return products.stack(totals, tuple(sizes), left.x, dtype)
        return products.grams(self, left, right, max_memory, progress, dtype)

    def gram_memory(self, n1: int, n2: int, *, graph: bool = False) -> int:
        """Smallest budget of :meth:`grams` between so many inputs, the result included.

        :param graph: with a graph to the inputs, which holds all layers' factors at once.
        """
        return self.engine.gram_memory(n1, n2, graph)

    def weighted_gram(self, x1: Any, x2: Any, variance: Tensor, max_memory: str | int | float = "2GiB") -> Tensor:
        r"""The kernel matrix :math:`\sum_g v_g J_g(x_1) J_g(x_2)^\top` without its per-group blocks.

        :param x2: inputs, or the :meth:`factors` of inputs kept from before: then no pass over them is made; None for
            the symmetric matrix of x1.
        :param variance: :math:`v_g = 1/\lambda_g`, shape (G,); no gradient is returned for it.
        :return: shape (N1·C, N2·C), float64; differentiable with respect to inputs that require gradients.

        Cost: as :meth:`grams`, with one N1·C × N2·C result.
        """
        self._check_variance(variance)
        left, right = self._side(x1), None if x2 is None else self._side(x2)
        if left.needs_graph or (right is not None and right.needs_graph):
            totals = self.engine.graph(left, right, torch.float64)
            return torch.stack(
                [v * t for v, t in zip(variance.detach().to(torch.float64), totals, strict=True) if t is not None]
            ).sum(0)
        return products.weighted_gram(self, left, right, variance, max_memory)

    def factors(self, x: Any, max_memory: str | int | float = "2GiB", outputs: Tensor | None = None) -> Factors:
        """What the layers saw and what came back to them at x, kept so that products need no pass over x again.

        :param outputs: index of one output per input, shape (N,); then only that output's rows are kept, from a single
            backward chain. All C outputs by default.
        :raises ValueError: they do not fit in the budget (see :meth:`factors_memory`), or another shape of outputs.

        Cost: the passes; per layer the smaller of its inputs and cotangents, I + C·O numbers per position, and its
        Jacobian rows, C·O·I.
        """
        side = self._side(x, outputs)
        return self.engine.factors(side.x.detach(), side.outputs, parse_memory(max_memory))

    def factors_memory(self, num_rows: int) -> int:
        """Smallest budget of :meth:`factors` for so many inputs: they, and one input at a time on the way."""
        return self.engine.factors_memory(num_rows)

    def symmetric_grams(
        self,
        x: Any,
        max_memory: str | int | float = "2GiB",
        progress: bool = False,
        storage: str = "auto",
        dtype: torch.dtype = torch.float64,
        directory: str | None = None,
    ) -> SymmetricGrams:
        """The symmetric per-group Grams of x with half of their entries stored, out of core where they do not fit.

        :param storage: "memory", "disk" (a temporary file without a name), or "auto": memory within the budget.
        :param dtype: of the storage, float64 or float32; sums are made in float64.
        :param directory: of the file.
        :return: see :class:`~ntkgp.linearization.symmetric.SymmetricGrams`.
        :raises ValueError: the budget cannot hold one n × n matrix beside the storage; the message gives the smallest.

        Cost: as :meth:`grams`; G·(N·C)²/2 stored numbers.
        """
        side = self._side(x)
        side = Side(side.x.detach(), side.outputs, side.factors)
        return products.symmetric_grams(self, side, max_memory, progress, storage, dtype, directory)

    def features(self, x: Any, v: Tensor, max_memory: str | int | float = "2GiB", per_group: bool = False) -> Tensor:
        r"""Features :math:`\varphi(x) = J(x) V` of K directions, from the layers' activations and cotangents.

        :param v: shape (K, P).
        :param per_group: keep the groups apart: :math:`J_g(x) V_g`, so that a precision may be put on each later.
        :param max_memory: budget for the result and everything held on the way.
        :return: shape (N, C, K), or (G, N, C, K), in the network's dtype; no graph is kept.
        :raises ValueError: another shape of v, or a budget that cannot hold the result; the message gives the smallest.

        Cost: the passes of a Gram and, per layer and input, the cheaper of 2·T·K·O·(I + C) and 2·C·O·I·(T + K) flops;
        :meth:`jvp` takes 2·K forward passes.
        """
        self._expect(v, "v", (self.num_parameters,))
        if v.ndim != 2:
            raise ValueError(f"v: expected shape (K, {self.num_parameters}), got {tuple(v.shape)}")
        return self.engine.features(self.pack(x).detach(), v.detach(), parse_memory(max_memory), per_group)

    def explain(self, n1: int, n2: int | None = None) -> Explanation:
        """How :meth:`grams` of so many inputs is computed, layer by layer: shapes, order of summation, flops, bytes.

        :param n2: inputs of the other side; None for a symmetric Gram.
        :return: prints as a table; ``flops`` and ``flop_limit`` are totals.

        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> print(LinearizedNetwork(net, torch.randn(2, 3), groups="single").explain(100))
        parameters        group  T  I  O  way      Gflop     of all ways                      kept per input
        0.weight, 0.bias  all    1  3  8  product  0.000404  rows 0.00131, product 0.000404   80 B
        2.weight, 2.bias  all    1  8  2  product  0.000212  rows 0.000734, product 0.000212  52 B
        Gram block 100·2 x 100·2, symmetric: passes 1.44e-05 Gflop, all 0.00063 Gflop
        """
        return explain(self, n1, n2)

    def gram_diagonals(
        self,
        x: Any,
        x2: Any = None,
        max_memory: str | int | float = "2GiB",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        r"""Per-group blocks :math:`J_g(x_n) J_g(x_n)^\top` at single inputs: shape (G, N, C, C).

        :param x2: inputs of the other side, row by row: :math:`J_g(x_n) J_g(x_{2,n})^\top`.
        :param max_memory: budget for the result and everything held on the way; inputs are visited one at a time if
            need be.
        :param dtype: of products and result.
        :raises ValueError: a budget that cannot hold the result and one input; the message gives the smallest (see
            :meth:`diagonals_memory`).

        Cost: the passes and, per layer and row, C²·O + I flops where it is applied once, else C²·O·I at most; no N × N
        block is formed. Differentiable with respect to inputs.
        """
        self._check_products(dtype)
        left, right = self._side(x), None if x2 is None else self._side(x2)
        for name, side in (("x", left), ("x2", right)):
            if side is not None and side.outputs is not None:
                raise ValueError(f"{name}: expected inputs or factors of all outputs, got factors of chosen outputs")
        c, n = self.num_outputs, len(left)
        if left.needs_graph or (right is not None and right.needs_graph):
            return products.stack(self.engine.pointwise_graph(left, right, dtype), (n, c, c), left.x, dtype)
        budget, visited = (
            parse_memory(max_memory),
            left.factors is None or (right is not None and right.factors is None),
        )
        smallest = self.engine.diagonals_memory(n, 1 if right is None else 2, dtype) if visited else 0
        if budget < smallest:
            raise ValueError(
                f"max_memory: {format_memory(budget)} cannot hold the blocks of {n} inputs and one input on the way; "
                f"the smallest possible is {format_memory(smallest)}"
            )
        out = torch.zeros(len(self.groups), n, c, c, dtype=dtype, device=left.x.device)
        self.engine.pointwise(left, right, budget, out)
        return out

    def diagonals_memory(self, num_rows: int, pairs: bool = False) -> int:
        """Smallest budget of :meth:`gram_diagonals` for so many inputs, or pairs of them.

        What can do no less calls it with ``max(budget, lin.diagonals_memory(n))``.
        """
        return self.engine.diagonals_memory(num_rows, 2 if pairs else 1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "engine"}

    def __repr__(self) -> str:
        return (
            f"LinearizedNetwork(P={self.num_parameters:,}, C={self.num_outputs}, "
            f"output_shape={tuple(self.output_shape)}, dtype={str(self.dtype).removeprefix('torch.')}, "
            f"groups={list(self.groups.names)})"
        )


def _ordinary(x: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode and cannot enter a graph."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x
