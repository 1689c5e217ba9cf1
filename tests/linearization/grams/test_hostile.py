"""Networks for which layer-wise Grams could go wrong: the result is exact, whatever way is taken."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import ntkgp
from ntkgp.linearization.grams import factors
from tests import reference as ref
from tests.linearization.grams.helper import (
    DOUBLE,
    NETS,
    TOLERANCE,
    Net,
    apart,
    dense,
    diagonals,
    error,
    forced,
    linear,
    noise,
    smallest,
)

# (net, example, inputs, parameters that must be left to the fallback in the end; None: any)
Hostile = tuple[nn.Module, Any, list[Any], set[str] | None]
CASES: dict[str, Callable[[], Hostile]] = {}


def case(build: Callable[[], Hostile]) -> Callable[[], Hostile]:
    CASES[build.__name__] = build
    return build


def both(*layers: str) -> set[str]:
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def standard(forward: Callable[..., Any], fallback: set[str] | None = None, **more: Any) -> Hostile:
    net = Net(forward, **{"a": linear(3, 4), "b": linear(4, 4), "head": linear(4, 2), **more})
    return net, noise(0, 2, 3), [noise(1, 5, 3), noise(2, 1, 3), noise(3, 2, 3)], fallback


# --- parameters without a rule


@case
def bare_parameters() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head((net.a(x) * net.scale + net.shift).tanh() @ net.matrix)

    parts = {"scale": noise(5, 4), "shift": noise(6, 4), "matrix": noise(7, 4, 4)}
    return standard(forward, {*parts, *both("b")}, **{k: nn.Parameter(v) for k, v in parts.items()})


@case
def activations_with_weights() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.prelu(net.pair(net.a(x), net.b(net.a(x).tanh()))))

    more = {"prelu": nn.PReLU(4, dtype=DOUBLE), "pair": nn.Bilinear(4, 4, 4, dtype=DOUBLE)}
    return standard(forward, {"prelu.weight", *both("pair")}, **more)


@case
def recurrent() -> Hostile:
    net = Net(lambda net, x: net.head(net.lstm(net.gru(x)[0])[0][:, -1]),
              gru=nn.GRU(3, 4, batch_first=True, dtype=DOUBLE), lstm=nn.LSTM(4, 4, batch_first=True, dtype=DOUBLE),
              head=linear(4, 2))  # fmt: skip
    names = {f"{m}.{kind}_l0" for m in ("gru", "lstm") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    return net, noise(0, 2, 4, 3), [noise(1, 4, 4, 3)], names


@case
def reparametrized() -> Hostile:
    class Square(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.square()

    net = nn.Sequential(parametrizations.weight_norm(linear(3, 4)), nn.Tanh(),
                        parametrizations.spectral_norm(linear(4, 4)), nn.Tanh(), linear(4, 2))  # fmt: skip
    parametrize.register_parametrization(net[4], "weight", Square())
    return net, noise(0, 2, 3), [noise(1, 5, 3)], {n for n, _ in net.named_parameters() if "parametrizations" in n}


@case
def complex_inside() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.fft.rfft(net.a(x)) * torch.view_as_complex(net.w)
        return net.head(torch.fft.irfft(h, n=4).tanh())

    return standard(forward, {"w", *both("b")}, w=nn.Parameter(noise(5, 3, 2)))


# --- weights that are read otherwise, or several times


@case
def functional_use() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x).tanh()
        return net.head(net.b(h).tanh() + F.linear(h, net.b.weight))

    return standard(forward, both("b"))


@case
def functional_use_where_it_is_dead_in_the_example() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.head(torch.where(x[:, :1] > 0, net.b(h), F.linear(h.sin(), net.b.weight)).tanh())

    net, example, inputs, _ = standard(forward)
    example[:, 0] = 1
    return net, example, inputs, both("b")


@case
def functional_use_for_more_rows() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        y = net.b(h)  # called, and not used below
        return net.head((F.linear(h, net.b.weight, net.b.bias) if len(x) > 2 else y).tanh())

    return standard(forward, both("b"))


@case
def tied_embedding() -> Hostile:
    net = Net(lambda net, x: net.out(net.a(net.embed(x).mean(1)).tanh()), embed=nn.Embedding(7, 4, dtype=DOUBLE),
              a=linear(4, 4), out=linear(4, 7, bias=False))  # fmt: skip
    net.out.weight = net.embed.weight
    return net, torch.tensor([[0, 1, 2], [3, 4, 5]]), [torch.tensor([[6, 0, 0], [1, 2, 3], [4, 4, 4]])], set()


@case
def tied_linear() -> Hostile:
    net, example, inputs, _ = standard(lambda net, x: net.head(net.c(net.b(net.a(x).tanh()).sin()).tanh()),
                                       c=linear(4, 4))  # fmt: skip
    net.c.weight = net.b.weight
    return net, example, inputs, set()


@case
def tied_transposed() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.b(F.linear(net.a(x).tanh(), net.a.weight.T) @ x.new_ones(3, 4)).tanh())

    return standard(forward, both("a"))


@case
def used_three_times() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.b(net.a(x).tanh()).tanh()
        with torch.no_grad():
            shift = net.b(h)
        return net.head(net.b(net.b(h + shift).tanh()) + net.b(h).detach())

    return standard(forward, set())


@case
def one_module_two_names() -> Hostile:
    net, *rest = standard(lambda net, x: net.head(net.other(net.b(net.a(x).tanh()).tanh())))
    net.other = net.b
    return net, rest[0], rest[1], set()


@case
def as_many_steps_as_a_row_asks_for() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        steps, h = (2 * x[:, 0].abs()).long(), net.a(x).tanh()
        for i in range(int(steps.max()) + 1):
            h = torch.where((i <= steps)[:, None], net.b(h).tanh(), h)
        return net.head(h)

    net, example, inputs, _ = standard(forward)
    example[:, 0] = 0.1
    inputs[0][:, 0] = torch.tensor([0.1, 1.2, 0.6, 1.9, 0.3])
    return net, example, inputs, None


@case
def weights_in_a_branch() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x).tanh()
        positive = x[:, 0] > 0
        if bool(positive.any()):
            h = torch.where(positive[:, None], net.b(h), h)
        return net.head(h)

    net, example, inputs, _ = standard(forward)
    example[:, 0] = -1
    return net, example, inputs, None


# --- rows in other places


@case
def experts() -> Hostile:
    """The example sends one row to each; other inputs send them otherwise."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        first = x[:, 0] > 0
        out = torch.zeros_like(h).index_put((first,), net.b(h[first]))
        return net.head(out.index_put((~first,), net.c(h[~first])).tanh())

    return standard(forward, None, c=linear(4, 4))


@case
def experts_of_positions() -> Hostile:
    """Each expert sees as many positions as there are rows, but not one of each row."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x.flatten(0, 1))
        first = x.flatten(0, 1)[:, 0] > 0
        out = torch.zeros_like(h).index_put((first,), net.b(h[first]))
        return net.head(out.index_put((~first,), net.c(h[~first])).tanh().unflatten(0, x.shape[:2]).sum(1))

    net = Net(forward, a=linear(3, 4), b=linear(4, 4), c=linear(4, 4), head=linear(4, 2))
    example, x, z = noise(0, 2, 2, 3), noise(1, 2, 2, 3), noise(2, 4, 2, 3)
    example[..., 0] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    x[..., 0] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    z[..., 0] = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    return net, example, [x, z], both("b", "c")


@case
def sorted_rows() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = net.b(net.a(x[order]).tanh())
        return net.head(h[order.argsort()].tanh())

    net, example, inputs, _ = standard(forward)
    return net, example[example[:, 0].argsort()], inputs, both("a", "b")


@case
def reversed_for_more_rows() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head((net.a(x.flip(0)).flip(0) if len(x) > 2 else net.a(x)).tanh())

    return standard(forward, both("a", "b"))


@case
def pieces_of_a_batch() -> Hostile:
    net, example, inputs, _ = standard(lambda net, x: net.head(torch.cat([net.a(c) for c in x.split(2)]).tanh()))
    return net, example, [noise(1, 4, 3), *inputs], both("a", "b")


@case
def row_after_row() -> Hostile:
    net, *rest, _ = standard(lambda net, x: torch.stack([net.head(net.a(row).tanh()) for row in x]))
    return net, *rest, both("a", "b", "head")


@case
def squeezed() -> Hostile:
    net = Net(lambda net, x: net.head(net.a(x.squeeze()).tanh()).reshape(len(x), 2), a=linear(3, 4), head=linear(4, 2))
    return net, noise(0, 2, 1, 3), [noise(1, 5, 1, 3), noise(2, 1, 1, 3)], None


@case
def cut_to_the_longest() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        lengths = x[:, 0, 0].abs().long().clamp(1, 4)
        longest = int(lengths.max())
        h = net.b(net.a(x[:, :longest]).tanh()).tanh()
        return net.head((h * (torch.arange(longest) < lengths[:, None])[..., None]).sum(1))

    net, example, x = standard(forward)[0], noise(0, 2, 4, 3), noise(1, 6, 4, 3)
    example[:, 0, 0] = 1
    x[:, 0, 0] = torch.tensor([1.0, 1.0, 2.0, 4.0, 3.0, 1.0])
    return net, example, [x], None


@case
def learned_queries() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head((net.a(x).tanh()[:, None] * net.q(net.queries)).sum(1))

    names = {"queries", *both("q", "b")}
    return standard(forward, names, queries=nn.Parameter(noise(7, 2, 3)), q=linear(3, 4))


@case
def positions_by_table() -> Hostile:
    """A table that is read without rows, by as many positions as there are rows, and a batch that repeats it."""
    net = Net(lambda net, x: net.head((net.a(x) + net.table(torch.arange(2))).tanh().sum(1)), a=linear(3, 4),
              table=nn.Embedding(2, 4, dtype=DOUBLE), head=linear(4, 2))  # fmt: skip
    return net, noise(0, 2, 2, 3), [noise(1, 4, 2, 3), noise(2, 2, 2, 3)], {"table.weight"}


# --- rows moved by other means than an index: the example is in order, other inputs are not


def ordered(move: Callable[[Tensor, Tensor], Tensor]) -> Hostile:
    """Rows are sorted before the second layer and put back behind it."""

    def forward(net: Net, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return net.head(move(net.b(move(net.a(x), order).tanh()), order.argsort()).tanh())

    net, example, inputs, _ = standard(forward)
    return net, example[example[:, 0].argsort()], inputs, both("b")


@case
def sorted_by_a_matrix() -> Hostile:
    return ordered(lambda h, order: F.one_hot(order, len(h)).to(h) @ h)


@case
def sorted_by_sums() -> Hostile:
    return ordered(lambda h, order: (F.one_hot(order, len(h)).to(h)[..., None] * h).sum(1))


@case
def sorted_by_a_convolution() -> Hostile:
    return ordered(lambda h, order: F.conv1d(h[None], F.one_hot(order, len(h)).to(h)[..., None])[0])


@case
def sorted_by_a_table() -> Hostile:
    return ordered(lambda h, order: F.embedding(order, h))


@case
def sorted_by_pieces() -> Hostile:
    return ordered(lambda h, order: torch.stack([h.select(0, int(i)) for i in order]))


@case
def sorted_by_a_function() -> Hostile:
    class Permute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, order: Tensor) -> Tensor:
            ctx.save_for_backward(order)
            return h[order]

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None]:
            return torch.empty_like(g[0]).index_copy(0, ctx.saved_tensors[0], g[0]), None

    return ordered(Permute.apply)


@case
def rotated() -> Hostile:
    def turn(h: Tensor, k: int) -> Tensor:
        return torch.cat([h.narrow(0, k, len(h) - k), h.narrow(0, 0, k)])

    def forward(net: Net, x: Tensor) -> Tensor:
        k = int(10 * x[0, 0].abs()) % len(x)
        return net.head(turn(net.b(turn(net.a(x), k).tanh()), len(x) - k).tanh())

    net, example, inputs, _ = standard(forward)
    example[0, 0], inputs[0][0, 0] = 0.01, 0.25
    return net, example, inputs[:1], both("b")


@case
def experts_by_matrices() -> Hostile:
    """Rows go to places in each expert's buffer; the example sends all to the first expert."""

    def forward(net: Net, x: Tensor) -> Tensor:
        chosen = F.one_hot((x[:, 0] > 0).long(), 2).to(x)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(1).long()
        dispatch = torch.einsum("ne,nc->nec", chosen, F.one_hot(place, len(x)).to(x))
        buffers = torch.einsum("nec,nd->ecd", dispatch, net.a(x))
        out = torch.stack([net.b(buffers[0]).tanh(), net.c(buffers[1]).tanh()])
        return net.head(torch.einsum("nec,ecd->nd", dispatch, out))

    net, example, inputs, _ = standard(forward, c=linear(4, 4))
    example[:, 0] = 1
    return net, example, inputs, None


@case
def interleaved_halves() -> Hostile:
    """For two rows nothing is moved, for more it is, by the same operations."""

    def forward(net: Net, x: Tensor) -> Tensor:
        n, h = len(x), net.a(x)
        if n % 2:
            return net.head(net.b(h.tanh()).tanh())
        h = net.b(h.view(2, n // 2, 4).transpose(0, 1).reshape(n, 4).tanh())
        return net.head(h.view(n // 2, 2, 4).transpose(0, 1).reshape(n, 4).tanh())

    net, *_ = standard(forward)
    return net, noise(0, 2, 3), [noise(1, 6, 3)], both("b")


# --- gradients that vanish at the example


@case
def dead_row_of_the_example() -> Hostile:
    """With the first row dead and the last step read alone, wrong rows agree with autograd on the example."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.b(net.a(x.transpose(0, 1)).tanh())[-1].relu())

    net, example = standard(forward)[0], noise(0, 2, 4, 3).abs()
    with torch.no_grad():
        for layer in (net.a, net.b):
            layer.weight.abs_()
            layer.bias.zero_()
    example[0] *= -1
    return net, example, [noise(1, 5, 4, 3), noise(2, 4, 4, 3)], None


@case
def zero_last_layer() -> Hostile:
    net = nn.Sequential(linear(3, 4), nn.Tanh(), linear(4, 4), nn.Tanh(), linear(4, 2))
    with torch.no_grad():
        net[4].weight.zero_()
    return net, noise(0, 2, 3), [noise(1, 5, 3)], both("0", "2")


@case
def unused_and_partly_used() -> Hostile:
    """An embedding that nothing comes back to, and one that only some outputs see."""

    def forward(net: Net, x: Tensor) -> Tensor:
        i = (3 * x[:, 0].abs()).long().clamp(0, 4)
        net.unused(i)
        return torch.cat([net.head(net.a(x).tanh()), net.b(net.table(i).tanh())], dim=1)

    tables = {name: nn.Embedding(5, 4, dtype=DOUBLE) for name in ("unused", "table")}
    return standard(forward, {"unused.weight"}, **tables)


# --- writing in place, views, hooks, checkpoints


@case
def in_place() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.b(F.relu(net.a(x), inplace=True))
        h += 1
        y = net.c(h.tanh_().view(len(x), 2, 2))
        y[:, 0] += y[:, 1].clone()
        y *= 2
        return net.head(y.flatten(1).sin_())

    return standard(forward, set(), c=linear(2, 2))


@case
def input_overwritten() -> Hostile:
    """With frozen weights autograd does not need the inputs of the layers; the layer is asked for them all the same."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.a(x) + 1
        y = net.b(h)
        if len(x) > 2:
            h += 1
        else:
            h = h + 1
        return net.head((y + h).tanh())

    net, *rest, _ = standard(forward)
    net.b.weight.requires_grad_(False)
    return net, *rest, None


@case
def returns_a_view() -> Hostile:
    net = Net(lambda net, x: net.a(x).view(len(x), 2, 3)[:, :, ::2].transpose(1, 2), a=linear(3, 6))
    return net, noise(0, 2, 3), [noise(1, 5, 3)], set()


@case
def hooks() -> Hostile:
    net = nn.Sequential(linear(3, 4), nn.Tanh(), linear(4, 4), nn.Tanh(), linear(4, 2))
    net[0].register_forward_hook(lambda layer, args, out: 2 * out + out.sin())
    net[2].register_forward_pre_hook(lambda layer, args: (args[0].square(),))
    net[2].register_forward_hook(lambda layer, args, out: out[:, torch.arange(3, -1, -1)])
    return net, noise(0, 2, 3), [noise(1, 5, 3)], set()


@case
def checkpoints() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(checkpoint(net.block, net.a(x), use_reentrant=False))

    block = nn.Sequential(linear(4, 4), nn.Tanh(), nn.LayerNorm(4, dtype=DOUBLE), linear(4, 4), nn.Tanh())
    return standard(forward, both("b"), block=block)


@case
def checkpointed_attention() -> Hostile:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True, dtype=DOUBLE)
    net = Net(lambda net, x: net.head(checkpoint(net.layer, net.a(x), use_reentrant=False).mean(1)), a=linear(3, 4),
              layer=layer, head=linear(4, 2))  # fmt: skip
    return net, noise(0, 2, 3, 3), [noise(1, 4, 3, 3)], None


@case
def dropout() -> Hostile:
    return standard(lambda net, x: net.head(net.drop(net.a(x).relu())), None, drop=nn.Dropout(0.5))


@case
def attributes_and_buffers_by_size() -> Hostile:
    def forward(net: Net, x: Tensor) -> Tensor:
        if net.ones.shape[0] != len(x):
            net.ones = torch.ones(len(x), 1, dtype=DOUBLE)
        net.last = net.a(x)
        return net.head((net.last + net.ones).tanh())

    net, *rest, _ = standard(forward)
    net.register_buffer("ones", torch.ones(2, 1, dtype=DOUBLE))
    return net, *rest, both("b")


# --- inputs


@case
def integers_in_a_dict() -> Hostile:
    def forward(net: Net, ids: Tensor, x: Tensor) -> Tensor:
        return net.head(net.b(net.table(ids).mean(1) + net.a(x)).tanh())

    net = standard(lambda net, **kw: forward(net, **kw), table=nn.Embedding(5, 4, padding_idx=0, dtype=DOUBLE))[0]

    def inputs(seed: int, n: int) -> dict[str, Tensor]:
        return {"ids": torch.randint(0, 5, (n, 3), generator=torch.Generator().manual_seed(seed)),
                "x": noise(seed, n, 3)}  # fmt: skip

    return net, inputs(0, 2), [inputs(1, 5)], set()


@case
def a_tuple() -> Hostile:
    net, *_ = standard(lambda net, x, y: net.head((net.a(x) * net.b(y)).tanh()))
    return net, (noise(0, 2, 3), noise(1, 2, 4)), [(noise(2, 5, 3), noise(3, 5, 4))], set()


def fresh(net: nn.Module, example: Any) -> ntkgp.LinearizedNetwork:
    """Nothing is known yet of how the network treats other inputs."""
    return ntkgp.LinearizedNetwork(net, copy.deepcopy(example), groups="tensor")


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ref.seeded(0):
        net, example, inputs, expected = CASES[name]()
    net.eval()
    for number, x in enumerate(inputs):
        lin = fresh(net, example)
        rows, j = lin.pack(x), ref.jacobian(net, x)
        wanted = dense(lin, j)
        for way in (None, "rows", "positions", "product")[: None if number == 0 else 1]:
            assert error(forced(fresh(net, example), rows, None, way), wanted) < TOLERANCE
        late = fresh(net, example)
        kept = late.factors(rows[:1])
        assert error(late.grams(rows, kept), dense(lin, j, j[:1])) < TOLERANCE
        assert error(late.grams(kept, late.factors(rows)), dense(lin, j[:1], j)) < TOLERANCE
        assert error(fresh(net, example).gram_diagonals(rows), diagonals(lin, j)) < TOLERANCE
        v = noise(9, 3, lin.num_parameters)
        assert error(lin.features(rows, v, per_group=True).sum(0), j @ v.T) < TOLERANCE
    if expected is not None:
        lin = fresh(net, example)
        for x in inputs:
            lin.grams(x)
        given_up = set(lin.frozen.theta) - set(lin.engine.plan.shapes)
        # Biases are kept as rows: which of them are formed by the fallback is decided anew for every chunk.
        assert {name for name in expected if not name.endswith("bias")} <= given_up <= expected
    # Row after row, and in blocks.
    monkeypatch.setattr(factors, "_PASS_BYTES", 1)
    lin = fresh(net, example)
    rows, wanted = lin.pack(inputs[0]), dense(lin, ref.jacobian(net, inputs[0]))
    assert error(lin.grams(rows), wanted) < TOLERANCE
    late = fresh(net, example)
    size, least = smallest(late, rows)
    assert error(late.grams(rows, max_memory=size + least), wanted) < TOLERANCE
    assert error(late.grams(late.factors(rows)), wanted) < TOLERANCE


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("checkpoints", "checkpointed_attention", "recurrent")])
def test_exact_with_a_graph(name: str) -> None:
    with ref.seeded(0):
        net, example, inputs, _ = CASES[name]()
    net.eval()
    for x in inputs:
        lin = ntkgp.LinearizedNetwork(net, copy.deepcopy(example), groups="tensor")
        if not lin.pack(x).is_floating_point():
            continue
        kept = lin.factors(lin.pack(x)[:1])
        rows = lin.pack(x).clone().requires_grad_(True)
        j = ref.jacobian(net, x)
        assert error(lin.grams(rows), dense(lin, j)) < TOLERANCE
        assert error(lin.grams(rows, kept), dense(lin, j, j[:1])) < TOLERANCE
        assert error(lin.gram_diagonals(rows), diagonals(lin, j)) < TOLERANCE


def test_given_up_while_factors_are_kept() -> None:
    """Train factors from before a parameter was found not to go by rules meet test inputs after that."""
    with ref.seeded(0):
        net, example, _, _ = sorted_rows()
    lin = ntkgp.LinearizedNetwork(net, example, groups="single")
    # Already in order, so that rules hold.
    x = noise(4, 6, 3)
    x = x[x[:, 0].argsort()]
    z = noise(5, 5, 3)
    j, k = ref.jacobian(net, x), ref.jacobian(net, z)
    kept = lin.factors(x)
    assert len(lin.engine.plan.shapes) == 4 + 2
    variance = torch.ones(1)
    assert error(lin.weighted_gram(z, kept, variance), dense(lin, k, j)[0]) < TOLERANCE
    assert len(lin.engine.plan.shapes) == 2
    new, second = lin.factors(z), lin.factors(z, outputs=torch.ones(5).long())
    for left, right, a, b in (
        (z, kept, k, j), (kept, z, j, k), (new, kept, k, j), (kept, new, j, k), (kept, None, j, j),
        (kept, second, j, k[:, 1:]),
    ):  # fmt: skip
        assert error(lin.grams(left, right), dense(lin, a, b)) < TOLERANCE


def per_row(net: nn.Module, x: Tensor) -> Tensor:
    """Jacobian rows in the net's own dtypes."""
    found = []
    parameters = list(net.parameters())
    for row in x:
        for f in net(row[None]).flatten():
            grads = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
            found.append(torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten()
                                    for g, p in zip(grads, parameters, strict=True)]))  # fmt: skip
    return torch.stack(found).view(len(x), -1, found[0].numel())


def test_two_dtypes() -> None:
    with ref.seeded(0):
        net = Net(lambda net, x: net.head(net.b(net.a(x.to(net.a.bias)).tanh()).double().tanh()), a=nn.Linear(3, 4),
                  b=nn.Linear(4, 4), head=linear(4, 2))  # fmt: skip
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 3))
    x = noise(1, 5, 3)
    assert error(lin.grams(x), dense(lin, per_row(net, x))) < 1e-6
    assert error(lin.grams(x, lin.factors(x)), dense(lin, per_row(net, x))) < 1e-6


def test_automatic_casts() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = net.b(net.b(net.a(x).relu()).relu())
        return net.head(h.to(net.head.bias).tanh())

    with ref.seeded(0):
        net = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 2))
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 3).float())
    x = noise(1, 5, 3).float()
    found, expected = lin.grams(x), dense(lin, per_row(net, x))
    assert error(found, expected) < 3e-2
    assert all(len(part) for part in apart(lin, per_row(net, x)))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "no_grad", "autocast"],
)  # fmt: skip
def test_what_is_switched_on_outside_does_not_matter(context: Callable[[], Any], single: bool) -> None:
    for build, inputs in NETS.values():
        net, x, z = build(), inputs(1, 5), inputs(2, 3)
        if single:
            net, x, z = net.float(), *(t.float() if t.is_floating_point() else t for t in (x, z))
        lin = ntkgp.LinearizedNetwork(net, x[:2])
        v, variance = noise(3, 2, lin.num_parameters).to(lin.dtype), torch.ones(len(lin.groups))

        def everything(lin: ntkgp.LinearizedNetwork, x: Tensor, z: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
            kept = lin.factors(x)
            return [lin.grams(x), lin.grams(z, kept), lin.weighted_gram(x, z, w), lin.gram_diagonals(x),
                    lin.features(x, v), lin.symmetric_grams(x).dense(0), lin.grams(x, dtype=torch.float32), lin(x),
                    lin.jvp(x, v[0]), lin.jacobian(x)]  # fmt: skip

        expected = everything(lin, x, z, v, variance)
        with context():
            inside = [t.clone() for t in (x, z, v, variance)]
            for found in (everything(lin, *inside), everything(ntkgp.LinearizedNetwork(net, inside[0][:2]), *inside)):
                for a, b in zip(found, expected, strict=True):
                    assert a.dtype == b.dtype
                    assert error(a, b) < (1e-6 if b.dtype == torch.float32 else 1e-12)


def test_several_threads() -> None:
    build, inputs = NETS["words"]
    net = build()
    lin = ntkgp.LinearizedNetwork(net, inputs(0, 2))
    wanted = {n: dense(lin, ref.jacobian(net, inputs(n, n))) for n in (3, 4, 5)}
    found: list[float | Exception] = []

    def work(n: int) -> None:
        try:
            found.extend(error(lin.grams(inputs(n, n)), wanted[n]) for _ in range(8))
        except Exception as reason:
            found.append(reason)

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert max(found) < TOLERANCE
    assert set(lin.engine.plan.shapes) == set(lin.frozen.theta) - {"position"}


def test_rules_stay_where_a_network_computes_in_lower_precision() -> None:
    """Rounding inside is no sign of rows in other places."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.b(net.a(x).float().sin().double()).tanh()[torch.arange(len(x))])

    with ref.seeded(0):
        net, *_ = standard(forward)
    lin, x = ntkgp.LinearizedNetwork(net, noise(0, 2, 3)), noise(1, 40, 3)
    assert error(lin.grams(x), dense(lin, ref.jacobian(net, x))) < 1e-6
    assert set(lin.engine.plan.shapes) == set(lin.frozen.theta)


def test_symmetric_grams_keep_no_graph() -> None:
    with ref.seeded(0):
        net = nn.Sequential(linear(3, 4), nn.PReLU(dtype=DOUBLE), linear(4, 2))
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 3))
    stack = lin.symmetric_grams(noise(1, 5, 3).requires_grad_())
    assert not stack.dense(0).requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_chosen_outputs_of_any_integer_type(dtype: torch.dtype) -> None:
    build, inputs = NETS["mlp"]
    net, x = build(), inputs(1, 6)
    lin, chosen = ntkgp.LinearizedNetwork(net, inputs(0, 2)), torch.tensor([2, 2, 0, 1, 0, 2])
    j = ref.jacobian(net, x)[torch.arange(6), chosen].unsqueeze(1)
    kept = lin.factors(x, outputs=chosen.to(dtype))
    assert error(lin.grams(kept), dense(lin, j)) < TOLERANCE
    assert error(lin.symmetric_grams(kept).weighted_sum(torch.ones(len(lin.groups))), dense(lin, j).sum(0)) < TOLERANCE
    with pytest.raises(ValueError, match="x: expected inputs or factors of all outputs"):
        lin.gram_diagonals(kept)


def test_more_wrong_arguments_are_named() -> None:
    build, inputs = NETS["mlp"]
    lin, x = ntkgp.LinearizedNetwork(build(), inputs(0, 2)), inputs(1, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.int32, torch.complex64, "float64", None):
        for call in (lin.grams, lin.gram_diagonals):
            with pytest.raises(ValueError, match=r"dtype: expected torch.float64 or torch.float32, got"):
                call(x, dtype=dtype)
    with pytest.raises(ValueError, match=r"outputs: expected one index per input, shape \(4,\), got list"):
        lin.factors(x, outputs=[0, 1, 2, 0])
    for variance in (torch.ones(3, 1), torch.ones(2), [1.0, 1.0, 1.0]):
        for z in (x, x.clone().requires_grad_()):
            with pytest.raises(ValueError, match=r"variance: expected shape \(3,\), got"):
                lin.weighted_gram(z, None, variance)
