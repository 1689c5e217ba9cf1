"""The tangent model of an image seen through linear operators: a linearised network whose rows are measurements."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.checks import _another_row
from ntkgp.linearization.frozen import FrozenNetwork, pass_environment, pick_output
from ntkgp.linearization.grams.engine import Side
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.packing import InputPacking
from ntkgp.linearization.symmetric import SymmetricGrams

# Vectors of parameter space that a product of two sets of rows holds at a time.
_COLUMNS = 32
# No Gram of rows takes more than a fraction of the budget for the rows themselves, as images.
_ROWS_SHARE = 8


class Shared:
    """What copies of a network share: a holder that deep-copies as itself.

    :param lin: the network of the image.
    :param x: its one input, packed, shape (1, D).
    :param operators: what is measured, in the order of the rows; each with ``image_shape``, ``data_shape``,
        ``num_measurements``, a call and its ``adjoint``. The pixels themselves stand second.
    :param root_weights: √w of the rows of the first operator, shape (n,), or None.
    """

    def __init__(
        self, lin: LinearizedNetwork, x: Tensor, operators: Sequence[Any], root_weights: Tensor | None = None
    ) -> None:
        self.lin, self.x, self.operators, self.root_weights = lin, x, tuple(operators), root_weights
        sizes = [int(operators[0].num_measurements), lin.num_outputs]
        sizes += [int(operator.num_measurements) for operator in operators[1:]]
        self.sizes = tuple(sizes)
        self.starts = tuple(sum(sizes[:slot]) for slot in range(len(sizes)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def operator(self, slot: int) -> Any:
        """The operator of a slot; None for the pixels."""
        return None if slot == 1 else self.operators[slot - (slot > 1)]

    def rows_of(self, slot: int) -> Tensor:
        """Indices of all rows of an operator, as packed inputs, shape (n, 1)."""
        start = self.starts[slot]
        return torch.arange(start, start + self.sizes[slot], dtype=torch.float64, device=self.x.device).unsqueeze(-1)

    def _forward(self, slot: int, images: Tensor) -> Tensor:
        """All rows of a slot: (K, pixels) -> (K, n)."""
        operator = self.operator(slot)
        if operator is None:
            return images
        data = operator(images.reshape(len(images), *operator.image_shape)).reshape(len(images), -1)
        return data * self.root_weights.to(data) if slot == 0 and self.root_weights is not None else data

    def _adjoint(self, slot: int, data: Tensor) -> Tensor:
        """The transpose of :meth:`_forward`: (K, n) -> (K, pixels)."""
        operator = self.operator(slot)
        if operator is None:
            return data
        data = data * self.root_weights.to(data) if slot == 0 and self.root_weights is not None else data
        return operator.adjoint(data.reshape(len(data), *operator.data_shape)).reshape(len(data), -1)

    def _places(self, index: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """For every slot that occurs: where in the index, and which of its rows."""
        found = []
        for slot, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            at = ((index >= start) & (index < start + size)).nonzero()[:, 0]
            if len(at):
                found.append((slot, at, index[at] - start))
        return found

    def measure(self, images: Tensor, index: Tensor) -> Tensor:
        """Chosen rows of images: (K, pixels) and (N,) -> (K, N)."""
        out = images.new_zeros(len(images), len(index))
        for slot, at, rows in self._places(index):
            out[:, at] = self._forward(slot, images)[:, rows]
        return out

    def spread(self, values: Tensor, index: Tensor) -> Tensor:
        """The transpose of :meth:`measure`: (K, N) -> (K, pixels); rows that repeat add up."""
        out = values.new_zeros(len(values), self.lin.num_outputs)
        for slot, at, rows in self._places(index):
            data = values.new_zeros(len(values), self.sizes[slot]).index_add(1, rows, values[:, at])
            out += self._adjoint(slot, data)
        return out


class _Image(nn.Module):
    """A copy of the network, run as the linearised network runs it."""

    def __init__(self, net: nn.Module, shared: Shared) -> None:
        super().__init__()
        self.net, self.shared = net, shared


class _ByIndex(_Image):
    """Row i of the image, for a batch of indices: each row has a forward pass of its own."""

    def forward(self, index: Tensor) -> Tensor:
        """(N, 1) -> (N, 1)."""
        shared = self.shared
        leaves = shared.lin.packing.leaves(shared.x.to(index.device))
        many = [leaf.expand(len(index), *leaf.shape[1:]) for leaf in leaves]
        image = shared.lin.frozen.run(self.net, many).reshape(len(index), -1)
        with torch.no_grad():
            units = torch.eye(len(index), dtype=torch.float64, device=image.device)
            rows = shared.spread(units, index[:, 0].long()).to(image.dtype)
        return (image * rows).sum(-1, keepdim=True)


class _Together(_Image):
    """Chosen rows of the image as outputs of one input.

    :param rows: the functionals, shape (n, pixels); None for the pixels themselves.
    """

    def __init__(self, net: nn.Module, shared: Shared, rows: Tensor | None) -> None:
        super().__init__(net, shared)
        self.register_buffer("rows", rows)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the network, (N, ...) -> (N, n)."""
        output = pick_output(self.net(*args, **kwargs), self.shared.lin.frozen._select)
        image = output.reshape(len(output), -1)
        rows: Any = self.rows
        return image if rows is None else image @ rows.mT.to(image.dtype)


class DerivedNetwork(LinearizedNetwork):
    """A linearised network made of another one: nothing is checked or found out again.

    :param module: wraps a copy of the network's module as ``net``.
    :param packing: of its inputs.
    :param probe: packed rows on which layer rules are checked.
    :param shape: of its output for one row.
    """

    def __init__(
        self, lin: LinearizedNetwork, module: nn.Module, packing: InputPacking, probe: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.packing, self._probe_rows, self._max_memory = packing, probe, lin._max_memory
        self.output_shape = torch.Size(shape)
        self.num_outputs = self.output_shape.numel()
        with torch.inference_mode(False):
            self.frozen = FrozenNetwork(module, packing.tree, None, packing.dtypes)
            if packing is lin.packing:
                self.frozen._convention = lin.frozen._convention
            for flag in ("functional", "forward_mode", "vectorized", "twice_differentiable"):
                setattr(self.frozen, flag, getattr(lin.frozen, flag))
            with pass_environment(probe.device):
                self.activation_bytes = self.frozen.activation_bytes(packing.leaves(probe[:2]))
            names = {group: [f"net.{name}" for name in members] for group, members in _partition(lin).items()}
            self.groups = ParameterGroups(names).bind(self, self.frozen.theta, {})
        self.base = lin

    @property
    def normalized(self) -> list[tuple[str, tuple[str, ...]]]:
        """The normalised sets of the network that this one was made of."""
        return [(label, tuple(f"net.{name}" for name in members)) for label, members in self.base.normalized]


def _partition(lin: LinearizedNetwork) -> dict[str, tuple[str, ...]]:
    return dict(zip(lin.groups.names, lin.groups.members, strict=True))


class MeasuredNetwork(DerivedNetwork):
    r"""A linearised network whose rows are linear functionals of one image: measurements and pixels.

    Row i is :math:`a_i^\top h(\theta)`, h the tangent model of an image network at its one input. Inputs are indices,
    shape (N, 1): first the measurements of the first operator (times √w where they are weighted), then the pixels, then
    those of further operators. To everything that works with a :class:`~ntkgp.LinearizedNetwork` of one output this is
    one: evidence, posterior, bounds, sampling, Nyström and variational models of measurements are those of any data.

    Products share one pass of the network, whatever the number of rows:
    :math:`A J v` is the operator after one forward-mode pass, :math:`J^\top A^\top u` one backward pass after its
    adjoint. Grams are those of the layer-wise engine with the rows as outputs of one input, or where that does not fit,
    row by row; where the Grams of the pixels are kept (:meth:`keep_pixels`) they are :math:`A K_g A^\top`.

    :param lin: the network, of one input, whose C outputs are the pixels.
    :param x: the input, packed, shape (1, D).
    :param operators: see :class:`Shared`.
    :param root_weights: √w of the rows of the first operator.
    """

    def __init__(
        self, lin: LinearizedNetwork, x: Tensor, operators: Sequence[Any], root_weights: Tensor | None = None
    ) -> None:
        shared = Shared(lin, x.detach(), operators, root_weights)
        example = torch.tensor([[_visible(shared)], [shared.starts[1] + lin.num_outputs // 2]])
        module = _ByIndex(copy.deepcopy(lin.frozen.module(lin.frozen.device)), shared)
        packing = InputPacking(example)
        super().__init__(lin, module, packing, packing.pack(example), (1,))
        self.frozen.vectorized = False  # an index that vmap hides cannot be looked up
        self.shared = shared
        self._image: Tensor | None = None
        self.pixel_grams: SymmetricGrams | None = None

    def with_operators(self, *operators: Any) -> MeasuredNetwork:
        """The same with further operators, whose rows come last."""
        shared = self.shared
        found = MeasuredNetwork(self.base, shared.x, (*shared.operators, *operators), shared.root_weights)
        found._image, found.pixel_grams = self._image, self.pixel_grams
        return found

    def rows_of(self, slot: int) -> Tensor:
        """Packed indices of the measurements (0), of the pixels (1), or of a further operator (2, ...)."""
        return self.shared.rows_of(slot)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_image": None, "pixel_grams": None}

    def _index(self, x: Any) -> Tensor:
        """Packed indices as integers, shape (N,)."""
        index = self.pack(x).detach()[:, 0].round().long()
        total = self.shared.starts[-1] + self.shared.sizes[-1]
        if bool(((index < 0) | (index >= total)).any()):
            raise ValueError(f"inputs: expected indices of rows from 0 to {total - 1}, got {index.tolist()[:8]}")
        return index

    @property
    def image(self) -> Tensor:
        """f(θ̃), the network's image, shape (pixels,), float64."""
        if self._image is None:
            with torch.inference_mode(False):
                self._image = self.base(self.shared.x).detach().reshape(-1).to(torch.float64)
        return self._image

    def __call__(self, x: Any) -> Tensor:
        """a_iᵀf, shape (N, 1), float64."""
        return self.shared.measure(self.image.unsqueeze(0), self._index(x)).reshape(-1, 1)

    def jvp(self, x: Any, v: Tensor) -> Tensor:
        """a_iᵀJv: (P,) or (K, P) -> (N, 1) or (K, N, 1), float64; K forward-mode passes."""
        self._expect(v, "v", (self.num_parameters,))
        index = self._index(x)
        images = self.base.jvp(self.shared.x, v).to(torch.float64)
        found = self.shared.measure(images.reshape(-1, images.shape[-1]), index)
        return found.reshape(*v.shape[:-1], len(index), 1)

    def vjp(self, x: Any, u: Tensor) -> Tensor:
        """Σ_i u_i Jᵀa_i: (N, 1) or (K, N, 1) -> (P,) or (K, P); one forward and K backward passes."""
        index = self._index(x)
        self._expect(u, "u", (len(index), 1))
        values = u.detach().reshape(-1, len(index)).to(torch.float64)
        images = self.shared.spread(values, index)
        found = self.base.vjp(self.shared.x, images.unsqueeze(1).to(self.dtype))
        return found.reshape(*u.shape[:-2], -1)

    def features(self, x: Any, v: Tensor, max_memory: str | int | float = "2GiB", per_group: bool = False) -> Tensor:
        """a_iᵀJV, shape (N, 1, K), or (G, N, 1, K) by groups: K passes, or G·K."""
        if not per_group:
            return self.jvp(x, v).permute(1, 2, 0)
        index = self.groups.index.to(v.device)
        return torch.stack([self.jvp(x, v * (index == g)).permute(1, 2, 0) for g in range(len(self.groups))])

    def gram_diagonals(
        self,
        x: Any,
        x2: Any = None,
        max_memory: str | int | float = "2GiB",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """a_iᵀJ_gJ_gᵀb_i, shape (G, N, 1, 1); a backward pass per row and side."""
        self._check_products(dtype)
        one = self.pack(x).detach()
        two = one if x2 is None else self.pack(x2).detach()
        if len(one) != len(two):
            raise ValueError(f"x2: expected one input for each of the {len(one)} of x, got {len(two)}")
        parts = []
        for a, b in zip(one.split(_COLUMNS), two.split(_COLUMNS), strict=True):
            units = torch.eye(len(a), dtype=torch.float64, device=a.device).unsqueeze(-1)
            left = self.vjp(a, units).to(torch.float64)
            right = left if x2 is None else self.vjp(b, units).to(torch.float64)
            parts.append(self.groups.sum_per_group(left * right))
        return torch.cat(parts).mT[:, :, None, None].to(dtype)

    def diagonals_memory(self, num_rows: int, pairs: bool = False) -> int:
        """Nothing is asked of a budget: a few rows are pulled back at a time."""
        return 1

    def factors_memory(self, num_rows: int) -> int:
        """More than any budget: rows share their forward pass, and kept factors would repeat it for each."""
        return 2**62

    def _together(self, index: Tensor) -> DerivedNetwork:
        """The rows as outputs of one input."""
        lin, shared = self.base, self.shared
        rows = None
        if not torch.equal(index, shared.rows_of(1)[:, 0].long()):
            units = torch.eye(len(index), dtype=torch.float64, device=index.device)
            rows = torch.cat([shared.spread(part, index).to(lin.dtype) for part in units.split(_COLUMNS)])
        module = _Together(copy.deepcopy(lin.frozen.module(lin.frozen.device)), shared, rows)
        probe = torch.cat([shared.x, _second_row(shared)]).to(lin._probe_rows)
        return DerivedNetwork(lin, module, lin.packing, probe, (len(index),))

    def _rows_fit(self, index: Tensor, budget: int) -> bool:
        item = torch.finfo(self.dtype).bits // 8
        return item * len(index) * self.base.num_outputs <= budget // _ROWS_SHARE

    def _fits_together(self, index: Tensor, budget: int) -> DerivedNetwork | None:
        """The rows as outputs of one input, where their passes and Grams of the rest of the budget fit."""
        if not self._rows_fit(index, budget):
            return None
        lin = self._together(index)
        smallest = lin.engine.smallest_budget(Side(self.shared.x), None)
        return lin if smallest + 8 * len(index) ** 2 <= budget else None

    def symmetric_grams(
        self,
        x: Any,
        max_memory: str | int | float = "2GiB",
        progress: bool = False,
        storage: str = "auto",
        dtype: torch.dtype = torch.float64,
        directory: str | None = None,
    ) -> SymmetricGrams:
        """As of any network; see the class for how."""
        index, budget = self._index(x), parse_memory(max_memory)
        if self.pixel_grams is not None:
            return self._projected(index, dtype, storage, directory)
        held = SymmetricGrams.size_of(len(self.groups), len(index), dtype) if storage == "memory" else 0
        lin = self._fits_together(index, budget - held)
        if lin is None:
            return super().symmetric_grams(x, max_memory, progress, storage, dtype, directory)
        return lin.symmetric_grams(self.shared.x, max_memory, progress, storage, dtype, directory)

    def _projected(self, index: Tensor, dtype: torch.dtype, storage: str, directory: str | None) -> SymmetricGrams:
        """A K_g Aᵀ from the kept Grams of the pixels (law D8)."""
        assert self.pixel_grams is not None
        storage = "memory" if storage == "auto" else storage
        stack = SymmetricGrams(
            len(self.groups), len(index), dtype=dtype, device=self.pixel_grams.device, storage=storage,
            directory=directory,
        )  # fmt: skip
        for g in range(len(self.groups)):
            gram = self.project(self.pixel_grams.dense(g), index, index)
            gram = 0.5 * (gram + gram.mT)
            for k, (a, b) in enumerate(stack.bounds):
                stack.strip(g, k).copy_(gram[a:b, :b])
        return stack

    def project(self, matrix: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """A M Bᵀ of a matrix of pixels for rows (N1,) and columns (N2,) as indices; A M without columns."""
        left = self.shared.measure(matrix.mT, rows).mT  # shape: (N1, pixels)
        return left if columns is None else self.shared.measure(left, columns)

    def keep_pixels(self, max_memory: str | int | float = "2GiB", progress: bool = False) -> SymmetricGrams:
        """The Grams of the pixels, kept: every other Gram then follows from them."""
        if self.pixel_grams is None:
            self.pixel_grams = self.symmetric_grams(self.rows_of(1), max_memory, progress, storage="memory")
        return self.pixel_grams

    def grams(
        self,
        x1: Any,
        x2: Any = None,
        max_memory: str | int | float = "2GiB",
        progress: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """As of any network."""
        self._check_products(dtype)
        one = self._index(x1)
        two = one if x2 is None else self._index(x2)
        budget = parse_memory(max_memory)
        if self.pixel_grams is not None:
            kept = self.pixel_grams
            return torch.stack([self.project(kept.dense(g), one, two) for g in range(len(self.groups))]).to(dtype)
        lin = self._fits_together(one, budget - 8 * len(self.groups) * len(one) ** 2) if x2 is None else None
        if lin is not None:
            return lin.grams(self.shared.x, None, max_memory, progress, dtype)
        return super().grams(x1, x2, max_memory, progress, dtype)

    def weighted_gram(self, x1: Any, x2: Any, variance: Tensor, max_memory: str | int | float = "2GiB") -> Tensor:
        """As of any network; between two sets of rows by products, a backward and a forward pass per row of one."""
        self._check_variance(variance)
        variance = variance.detach().to(torch.float64)
        one = self._index(x1)
        two = one if x2 is None else self._index(x2)
        if self.pixel_grams is not None:
            return self.project(self.pixel_grams.weighted_sum(variance), one, two)
        if x2 is None or torch.equal(one, two):
            lin = self._fits_together(one, parse_memory(max_memory))
            if lin is not None:
                return lin.weighted_gram(self.shared.x, None, variance, max_memory)
        if len(two) <= len(one):
            return self._columns(one, two, variance)
        return self._columns(two, one, variance).mT

    def _columns(self, one: Tensor, two: Tensor, variance: Tensor) -> Tensor:
        """K(one, two), shape (N1, N2), by the columns."""
        scale = self.groups.expand(variance).to(self.dtype)
        parts = []
        for chunk in two.split(_COLUMNS):
            units = torch.eye(len(chunk), dtype=torch.float64, device=chunk.device).unsqueeze(-1)
            pulled = self.vjp(chunk.unsqueeze(-1).to(torch.float64), units)
            parts.append(self.jvp(one.unsqueeze(-1).to(torch.float64), pulled * scale)[..., 0].mT)
        return torch.cat(parts, -1)


def _visible(shared: Shared) -> int:
    """The measurement that a constant image shows most in: rules are not checked on a row of zeros."""
    image = torch.ones(1, shared.lin.num_outputs, dtype=torch.float64, device=shared.x.device)
    with torch.no_grad():
        return int(shared._forward(0, image)[0].abs().argmax())


def _second_row(shared: Shared) -> Tensor:
    """Another input, packed, that the network takes."""
    leaves = shared.lin.packing.leaves(shared.x)
    return torch.cat([_another_row(leaf).reshape(1, -1).to(shared.x.dtype) for leaf in leaves], -1)
