"""Kronecker-factored curvature of Linear and Conv layers, with exact or diagonal blocks for all other weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from ntkgp.baselines.laplace.capture import Capture, own_module, owners, places
from ntkgp.baselines.laplace.structures import Diagonal, Primal, Structure, draw
from ntkgp.baselines.laplace.tangent import Tangent, curvature_root
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.statistics import jacobian_rows

logger = logging.getLogger("ntkgp")

_EXACT = 1000  # weights of other layers that share one exact block
_AGREES = 1e-3


class Layer:
    r"""One Linear or Conv layer's block :math:`G \otimes A`, weights row-major (O, I), a joint bias as last input.

    :math:`A` is the mean of :math:`aa^\top` over rows and positions, :math:`G_k` the sum of :math:`gg^\top`.
    """

    def __init__(self, name: str, module: nn.Module, columns: Tensor, joint_bias: bool, channels: int) -> None:
        self.name, self.module, self.columns, self.joint_bias = name, module, columns, joint_bias
        o, i = columns.shape
        self.inputs = torch.zeros(i, i, dtype=torch.float64)
        self.outputs = torch.zeros(channels, o, o, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def positions(self, calls: list[Tensor]) -> Tensor:
        """Inputs at all positions of all calls, (·, I)."""
        return torch.cat([self._unfolded(a) for a in calls])

    def _unfolded(self, a: Tensor) -> Tensor:
        m = self.module
        if isinstance(m, nn.Conv1d):
            (k,), (d,), (s,), padding = m.kernel_size, m.dilation, m.stride, int(m.padding[0])
            a = unfold(a.unsqueeze(-2), (1, k), (1, d), (0, padding), (1, s)).mT
        elif isinstance(m, nn.Conv2d):
            assert not isinstance(m.padding, str)
            a = unfold(a, m.kernel_size, m.dilation, m.padding, m.stride).mT
        a = a.reshape(-1, a.shape[-1]).double()
        return torch.cat([a, a.new_ones(len(a), 1)], -1) if self.joint_bias else a

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
        return (self._qg.T @ rows @ self._qa) * self._variance.sqrt()


class Kfac(Structure):
    """K-FAC with shared weights treated as more data ("expand", Eschenhagen et al. 2023).

    Layers it does not know, or whose weights reach the output by other ways than the layer's own call (tied weights,
    functional use), get one exact block together, up to 1000 weights, and the diagonal beyond.
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        x: Tensor,
        output: Callable[[Any], Tensor] | None,
        classification: bool,
        max_memory: int,
    ) -> None:
        super().__init__(lin, None, classification, max_memory)
        self.layers = self._known(x)
        known = torch.zeros(lin.num_parameters, dtype=torch.bool)
        for layer in self.layers:
            known[layer.columns.reshape(-1)] = True
        exact, diagonal = self._others(known)
        self.others: list[Structure] = []
        if exact:
            self.others.append(Primal(lin, torch.cat(exact), classification, max_memory))
        if diagonal:
            self.others.append(Diagonal(lin, torch.cat(diagonal), classification, max_memory))
        self._capture = Capture(lin, [layer.name for layer in self.layers])
        self._rest = self._restricted(x, known, output) if self.others else None

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
            found.append(Layer(name, layer, columns, joint, self.num_channels))
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
            product = layer.gradients(gradients[layer.name]).T @ layer.positions(inputs)
            wanted = target[layer.columns]
            return bool((product - wanted).norm() <= _AGREES * wanted.norm())

        return [layer for layer in found if agrees(layer)]

    def _others(self, known: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        exact: list[Tensor] = []
        diagonal: list[Tensor] = []
        names: tuple[list[str], list[str]] = ([], [])
        held = 0
        for name, place in places(self.lin).items():
            if known[place[0]]:
                continue
            small = held + len(place) <= _EXACT
            held += len(place) if small else 0
            (exact if small else diagonal).append(place)
            names[0 if small else 1].append(name)
        for kind, chosen in zip(("an exact", "a diagonal"), names, strict=True):
            if chosen:
                logger.info("kfac: %s block for %s", kind, ", ".join(chosen))
        return exact, diagonal

    def _restricted(self, x: Tensor, known: Tensor, output: Callable[[Any], Tensor] | None) -> LinearizedNetwork:
        """The network linearised in the other weights alone, for their rows."""
        frozen = self.lin.frozen
        module = copy.deepcopy(frozen.module(frozen.device))
        where = places(self.lin)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in where and not bool(known[where[name][0]]))
        return LinearizedNetwork(module, self.lin.unpack(x[:2]), groups="single", output=output)

    def begin(self) -> None:
        """Start to gather."""
        for other in self.others:
            other.begin()

    def collect(self, tangent: Tangent) -> None:
        """Gather A and G_k of each layer, and the other blocks: one forward and C backward passes."""
        self.begin()
        step = max(1, self.max_memory // (16 * self.lin.activation_bytes))
        for view in tangent:
            for x in view.x.split(step):
                self._add_layers(x)
                self._add_others(x)
        for layer in self.layers:
            layer.prepare()

    def _add_layers(self, x: Tensor) -> None:
        if not self.layers:
            return
        f = self._capture.forward(x)
        c = f.shape[1]
        for layer in self.layers:
            a = layer.positions(self._capture.inputs[layer.name])
            layer.inputs += a.T @ a
            layer.count += len(a)
        root = curvature_root(f.detach().double()) if self.classification else None
        for r in range(c):
            cotangent = torch.zeros(len(x), c, dtype=torch.float64) if root is None else root[:, :, r]
            if root is None:
                cotangent[:, r] = 1
            gradients = self._capture.pull(f, cotangent, retain=r + 1 < c)
            for layer in self.layers:
                g = layer.gradients(gradients[layer.name])
                layer.outputs[0 if self.classification else r] += g.T @ g

    def _add_others(self, x: Tensor) -> None:
        if self._rest is None:
            return
        f, rows = self.lin(x).double(), jacobian_rows(self._rest, x, self.max_memory)
        for other in self.others:
            other.add(f, rows[..., self._places_in_rest(other)])

    def _places_in_rest(self, other: Structure) -> Tensor:
        everything = torch.cat([o.columns for o in self.others]).sort().values
        return torch.searchsorted(everything, other.columns)

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

    def roots(self, rows: Tensor) -> Tensor:
        """Rows times a root of Σ."""
        out = torch.empty_like(rows)
        for layer in self.layers:
            out[..., layer.columns] = layer.roots(rows[..., layer.columns])
        for other in self.others:
            out[..., other.columns] = other.roots(rows[..., other.columns])
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
