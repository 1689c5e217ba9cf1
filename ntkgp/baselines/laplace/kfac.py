"""Kronecker-factored curvature of Linear and Conv layers, with exact or diagonal blocks for all other weights."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from ntkgp.baselines.laplace.capture import Capture, own_module, owners, places
from ntkgp.baselines.laplace.rows import Pieces, add_products, row_pieces, smallest_room
from ntkgp.baselines.laplace.structures import Diagonal, Primal, Structure, draw, white_pieces
from ntkgp.baselines.laplace.tangent import Tangent, curvature_root
from ntkgp.linearization import LinearizedNetwork

logger = logging.getLogger("ntkgp")

_EXACT = 1000  # weights of other layers that share one exact block
_AGREES = 1e-3


class ExactBlock(Primal):
    """The whole H over some parameter tensors.

    :param names: theirs, in the order of `columns`.
    """

    def __init__(
        self, lin: LinearizedNetwork, columns: Tensor, classification: bool, max_memory: int, names: frozenset[str]
    ) -> None:
        super().__init__(lin, columns, classification, max_memory)
        self._names = names
        self._place = torch.zeros(lin.num_parameters, dtype=torch.long)
        self._place[columns] = torch.arange(len(columns))

    def _gathered(self, pieces: Pieces) -> Tensor:
        """Rows (B, ·, p)."""
        parts = [(self._place[b.columns], b.form(slice(0, pieces.num_rows))) for b in pieces.blocks(self._names)]
        first = parts[0][1]
        out = first.new_empty(*first.shape[:2], len(self.columns))
        for at, part in parts:
            out[..., at] = part
        return out

    def add_pieces(self, pieces: Pieces) -> None:
        """Add the moments of whitened rows."""
        rows = self._gathered(pieces)
        for k in range(self.num_channels):
            part = rows.flatten(0, 1) if self.classification else rows[:, k]
            self.moments[k].addmm_(part.mT, part)

    def add_covariance(self, out: Tensor, pieces: Pieces) -> None:
        """Add J Σ Jᵀ of its weights, (B, C, C)."""
        root = self.roots(self._gathered(pieces))
        out += root @ root.mT


_Other = TypeVar("_Other", ExactBlock, Diagonal)


class Layer:
    r"""One Linear or Conv layer's block :math:`G \otimes A`, weights row-major (O, I), a joint bias as last input.

    :math:`A` is the mean of :math:`aa^\top` over rows and positions, :math:`G_k` the sum of :math:`gg^\top`.
    """

    def __init__(self, name: str, module: nn.Module, names: tuple[str, ...], columns: Tensor, channels: int) -> None:
        self.name, self.module, self.names, self.columns = name, module, names, columns
        self.joint_bias, self.num_positions = len(names) == 2, 1
        o, i = columns.shape
        self.inputs = torch.zeros(i, i, dtype=torch.float64)
        self.outputs = torch.zeros(channels, o, o, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def positions(self, calls: list[Tensor]) -> Tensor:
        """Inputs at all positions of all calls, (·, I)."""
        return torch.cat([self._unfolded(a) for a in calls]) if len(calls) > 1 else self._unfolded(calls[0])

    def numbers(self) -> int:
        """Numbers that are held: A, G, their eigenvectors, two per weight."""
        o, i = self.columns.shape
        return 2 * i * i + (len(self.outputs) + 1) * o * o + 3 * o * i

    def numbers_on_the_way(self) -> int:
        """Numbers of an eigendecomposition, and of products with some vectors of weights."""
        o, i = self.columns.shape
        return max(4 * i * i, (len(self.outputs) + 3) * o * o, 4 * o * i)

    def pass_bytes(self) -> int:
        """Bytes of what is unfolded and cast for one input."""
        o, i = self.columns.shape
        return 8 * self.num_positions * (3 * i + 3 * o)

    def _unfolded(self, a: Tensor) -> Tensor:
        m = self.module
        if isinstance(m, nn.Conv1d):
            (k,), (d,), (s,), padding = m.kernel_size, m.dilation, m.stride, int(m.padding[0])
            a = unfold(a.unsqueeze(-2), (1, k), (1, d), (0, padding), (1, s)).mT
        elif isinstance(m, nn.Conv2d):
            assert not isinstance(m.padding, str)
            a = unfold(a, m.kernel_size, m.dilation, m.padding, m.stride).mT
        a = a.reshape(-1, a.shape[-1])
        if not self.joint_bias:
            return a.double()
        out = a.new_ones(len(a), a.shape[-1] + 1, dtype=torch.float64)
        out[:, :-1] = a
        return out

    def gradients(self, calls: list[Tensor]) -> Tensor:
        """Gradients at all positions of all calls, (·, O)."""
        channel_last = isinstance(self.module, nn.Linear)
        last = [g if channel_last else g.flatten(2).mT for g in calls]
        return torch.cat([g.reshape(-1, len(self.columns)) for g in last]).double()

    def prepare(self) -> None:
        """Eigenvectors of A, which depends on nothing."""
        values, self._qa = torch.linalg.eigh(self.inputs / self.count)
        self._la = values.clamp_min(0)

    def update(self, precision: float, weights: Tensor) -> None:
        """Take the prior precision of the block and the weights (K,) of the channels."""
        values, self._qg = torch.linalg.eigh(torch.einsum("k,kop->op", weights, self.outputs))
        self._h = values.clamp_min(0).unsqueeze(-1) * self._la
        self.precision, self._variance, self._weights = precision, 1 / (self._h + precision), weights

    def logdet(self) -> float:
        """The log-determinant of I + H/λ."""
        return float(torch.log1p(self._h / self.precision).sum())

    def gammas(self) -> tuple[float, Tensor]:
        """tr(HΣ), and its parts by channel."""
        diagonals = torch.einsum("oi,kop,pi->ki", self._qg, self.outputs, self._qg)
        return float((self._h * self._variance).sum()), self._weights * (diagonals @ (self._variance @ self._la))

    def solve(self, v: Tensor) -> Tensor:
        """Σ v for (O, I)."""
        return self._qg @ ((self._qg.T @ v @ self._qa) * self._variance) @ self._qa.T

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws, (S, O, I)."""
        noise = draw((num_samples, *self.columns.shape), generator)
        return self._qg @ (noise * self._variance.sqrt()) @ self._qa.T

    def roots(self, rows: Tensor) -> Tensor:
        """Rows (N, C, O, I) times a root of Σ."""
        return (self._qg.T @ rows @ self._qa).mul_(self._variance.sqrt())


class Kfac(Structure):
    """K-FAC with shared weights treated as more data ("expand", Eschenhagen et al. 2023).

    Layers it does not know, or whose weights reach the output by other ways than the layer's own call (tied weights,
    functional use), get one exact block together, up to 1000 weights, and the diagonal beyond.
    """

    def __init__(self, lin: LinearizedNetwork, x: Tensor, classification: bool, max_memory: int) -> None:
        super().__init__(lin, None, classification, max_memory)
        self.layers = self._known(x)
        known = torch.zeros(lin.num_parameters, dtype=torch.bool)
        for layer in self.layers:
            known[layer.columns.reshape(-1)] = True
        self.exact, self.diagonal = self._others(known)
        self.others: list[Structure] = [other for other in (self.exact, self.diagonal) if other is not None]
        self._capture = Capture(lin, [layer.name for layer in self.layers])

    def _known(self, x: Tensor) -> list[Layer]:
        """Layers whose gradients follow from their inputs and output gradients, checked on some rows."""
        lin, where = self.lin, places(self.lin)
        module = own_module(lin)
        found = []
        for name, names in owners(lin).items():
            layer = module.get_submodule(name)
            own = {n.rpartition(".")[2]: n for n in names}
            if not _is_plain(layer) or "weight" not in own:
                continue
            columns = where[own["weight"]].reshape(len(lin.frozen.theta[own["weight"]]), -1)
            index = lin.groups.index
            joint = "bias" in own and bool(index[where[own["bias"]][0]] == index[columns[0, 0]])
            if joint:
                columns = torch.cat([columns, where[own["bias"]].unsqueeze(-1)], -1)
            together = (own["weight"], own["bias"]) if joint else (own["weight"],)
            found.append(Layer(name, layer, together, columns, self.num_channels))
        if not found:
            return found
        x = x[:4]
        capture = Capture(lin, [layer.name for layer in found])
        f = capture.forward(x)
        u = draw(tuple(f.shape), torch.Generator().manual_seed(0))
        target = lin.vjp(x, u.to(lin.dtype)).double()
        gradients = capture.pull(f, u, retain=False)

        def agrees(layer: Layer) -> bool:
            inputs = capture.inputs.get(layer.name, [])
            if not inputs:
                return False
            positions = layer.positions(inputs)
            layer.num_positions = -(-len(positions) // len(x))
            product = layer.gradients(gradients[layer.name]).T @ positions
            wanted = target[layer.columns]
            return bool((product - wanted).norm() <= _AGREES * wanted.norm())

        return [layer for layer in found if agrees(layer)]

    def _others(self, known: Tensor) -> tuple[ExactBlock | None, Diagonal | None]:
        exact: dict[str, Tensor] = {}
        diagonal: dict[str, Tensor] = {}
        held = 0
        for name, place in places(self.lin).items():
            if known[place[0]]:
                continue
            small = held + len(place) <= _EXACT
            held += len(place) if small else 0
            (exact if small else diagonal)[name] = place
        for kind, chosen in (("an exact", exact), ("a diagonal", diagonal)):
            if chosen:
                logger.info("kfac: %s block for %s", kind, ", ".join(chosen))

        def make(kind: type[_Other], chosen: dict[str, Tensor]) -> _Other | None:
            names, columns = frozenset(chosen), torch.cat([*chosen.values(), known.new_zeros(0, dtype=torch.long)])
            return kind(self.lin, columns, self.classification, self.max_memory, names) if chosen else None

        return make(ExactBlock, exact), make(Diagonal, diagonal)

    def numbers(self) -> int:
        """Of the blocks, and of one layer on the way."""
        others = sum(other.numbers() for other in self.others)
        on_the_way = max((layer.numbers_on_the_way() for layer in self.layers), default=0)
        return others + sum(layer.numbers() for layer in self.layers) + on_the_way

    def describe(self) -> str:
        """How many layers."""
        return f"the Kronecker factors of {len(self.layers)} layers and their passes"

    def _input_bytes(self) -> int:
        """Bytes of one input's pass with a graph, and of what the largest layer makes of it."""
        return 4 * self.lin.activation_bytes + max((layer.pass_bytes() for layer in self.layers), default=0)

    def _rows_of_others(self) -> int:
        """Bytes of one input's rows of the exact block: they, whitened, and on the way."""
        return 0 if self.exact is None else 4 * 8 * self.lin.num_outputs * len(self.exact.columns)

    def smallest_room(self) -> int:
        """Of one input."""
        return max(self._input_bytes(), smallest_room(self.lin) + self._rows_of_others())

    def begin(self) -> None:
        """Start to gather."""
        for other in self.others:
            other.begin()

    def collect(self, tangent: Tangent) -> None:
        """Gather A and G_k of each layer, and the other blocks: one forward and C backward passes."""
        self.begin()
        step = max(1, self.room // 2 // self._input_bytes())
        for view in tangent:
            for x in view.x.split(step):
                self._add_layers(x)
            if self.others:
                for rows, pieces in white_pieces(self, view.x, view.f, self._rows_of_others()):
                    self._add_others(rows, pieces)
        for layer in self.layers:
            layer.prepare()

    def _add_layers(self, x: Tensor) -> None:
        if not self.layers:
            return
        f = self._capture.forward(x)
        c = f.shape[1]
        for layer in self.layers:
            a = layer.positions(self._capture.inputs[layer.name])
            layer.inputs.addmm_(a.T, a)
            layer.count += len(a)
        root = curvature_root(f.detach().double()) if self.classification else None
        for r in range(c):
            cotangent = torch.zeros(len(x), c, dtype=torch.float64) if root is None else root[:, :, r]
            if root is None:
                cotangent[:, r] = 1
            gradients = self._capture.pull(f, cotangent, retain=r + 1 < c)
            for layer in self.layers:
                g = layer.gradients(gradients[layer.name])
                layer.outputs[0 if self.classification else r].addmm_(g.T, g)

    def _add_others(self, step: int, pieces: Pieces) -> None:
        if self.exact is not None:
            self.exact.add_pieces(pieces)
        if self.diagonal is not None:
            self.diagonal.add_pieces(step, pieces)

    def _factorise(self) -> None:
        for layer in self.layers:
            layer.update(float(self.group_precision[self.index[layer.columns[0, 0]]]), self.weights)
        for other in self.others:
            other.update(self.group_precision, self.weights)

    def logdet(self) -> float:
        """Sum over the blocks."""
        return sum(layer.logdet() for layer in self.layers) + sum(other.logdet() for other in self.others)

    def gammas(self) -> tuple[Tensor, Tensor]:
        """tr(HΣ) by group and channel."""
        groups = torch.zeros(len(self.lin.groups), dtype=torch.float64)
        channels = torch.zeros(self.num_channels, dtype=torch.float64)
        for layer in self.layers:
            total, parts = layer.gammas()
            groups[self.index[layer.columns[0, 0]]] += total
            channels += parts
        for other in self.others:
            by_group, by_channel = other.gammas()
            groups, channels = groups + by_group, channels + by_channel
        return groups, channels

    def solve(self, v: Tensor) -> Tensor:
        """Σ v, block by block."""
        out = torch.zeros_like(v)
        for layer in self.layers:
            out[layer.columns] = layer.solve(v[layer.columns])
        for other in self.others:
            out[other.columns] = other.solve(v[other.columns])
        return out

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of N(0, Σ), block by block."""
        out = torch.zeros(num_samples, len(self.columns), dtype=torch.float64)
        for layer in self.layers:
            out[:, layer.columns] = layer.sample(num_samples, generator)
        for other in self.others:
            out[:, other.columns] = other.sample(num_samples, generator)
        return out

    def covariance(self, x: Tensor) -> Tensor:
        """J Σ Jᵀ at single inputs, (N, C, C), block by block."""
        c = self.lin.num_outputs
        out = torch.zeros(len(x), c, c, dtype=torch.float64)
        for rows, step, pieces in row_pieces(self.lin, x, self.room, extra=self._rows_of_others()):
            for layer in self.layers:

                def root(outputs: slice, layer: Layer = layer, pieces: Pieces = pieces) -> Tensor:
                    formed = pieces.of_layer(layer.names, outputs).unflatten(-1, layer.columns.shape)
                    return layer.roots(formed).flatten(2)

                add_products(out[rows], c, step, root)
            if self.exact is not None:
                self.exact.add_covariance(out[rows], pieces)
            if self.diagonal is not None:
                self.diagonal.add_covariance(out[rows], step, pieces)
        return out

    def state(self) -> dict[str, Tensor]:
        """Factors of the layers and the other blocks."""
        found: dict[str, Tensor] = {}
        for k, layer in enumerate(self.layers):
            found |= {f"inputs.{k}": layer.inputs, f"outputs.{k}": layer.outputs, f"count.{k}": layer.count}
        for k, other in enumerate(self.others):
            found |= {f"other.{k}.{key}": value for key, value in other.state().items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back :meth:`state`."""
        for k, layer in enumerate(self.layers):
            layer.inputs, layer.outputs = state[f"inputs.{k}"], state[f"outputs.{k}"]
            layer.count = state[f"count.{k}"]
            layer.prepare()
        for k, other in enumerate(self.others):
            other.load({key: state[f"other.{k}.{key}"] for key in ("moments",)})


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        return True
    if type(layer) not in (nn.Conv1d, nn.Conv2d):
        return False
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
