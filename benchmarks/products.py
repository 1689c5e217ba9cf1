"""What is built on Grams, against the direct way through Jacobians.

    python -m benchmarks.products [--only gradient diagonal features prediction strategy] [--quick] [--write]

gradient    of Σ W∘K(Z, Z) in M = 50 inputs Z, against autograd through vmap(jacrev)
diagonal    K(x, x) alone, against vmap(jacrev) and batched products in chunks of 32
features    J(x)V for 20 directions, against vmap(jvp)
prediction  posterior variance of 1000 points after the fit (N = 500, C = 10, P = 50 410), against laplace-torch
strategy    the automatic choice per layer, against each way forced on all layers where it is open

Float32 networks; all ways of a line run in turn in one process, the figure is the median of CPU seconds / threads, and
the error is against float64 Jacobians on a few samples.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import gpytorch
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

import ntkgp
from benchmarks import peers, report
from benchmarks.cells import SHORT, describe, repeats_for
from benchmarks.contenders import Cell, Reference, Unavailable
from benchmarks.gram import PAGE
from benchmarks.nets import NETS, make, mlp
from benchmarks.timing import Cost, alternate_costs, measure
from ntkgp.evaluation.training import seeded
from ntkgp.linearization.grams import products

Way = Callable[[], Tensor]
Ways = dict[str, Way]

CHECKED, CHECKED_PAIR = 4, 2
CHUNK = 32
WAYS = ("product", "rows", "positions")
PRECISION, NOISE = 1.0, 0.1


@dataclass
class Line:
    """One comparison: ntkgp's way first, the others after it.

    :param ways: what is clocked.
    :param errors: by way, against the float64 reference of a small instance.
    :param asked: how many times slower the others are asked to be; for a strategy, how much slower ours may be.
    """

    title: str
    ways: Ways
    errors: dict[str, float] = field(default_factory=dict)
    asked: float | None = None
    at_most: bool = False


def error(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


def checked(small: Ways, error_of: Callable[[Tensor], float]) -> dict[str, float]:
    """Errors of ways on a small instance; nan for one that fails, which shows when it is clocked."""
    errors = {}
    for name, way in small.items():
        try:
            errors[name] = error_of(way())
        except Exception:
            errors[name] = math.nan
    return errors


def linearized(net: nn.Module, x: Tensor) -> ntkgp.LinearizedNetwork:
    return ntkgp.LinearizedNetwork(copy.deepcopy(net), x[:2], groups="single")


def gradient_ways(net: nn.Module, z: Tensor) -> Ways:
    """Gradient of Σ W∘K(Z, Z) in Z."""
    lin = linearized(net, z)
    n = len(z) * lin.num_outputs
    weights = torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def of(kernel: Callable[[Tensor], Tensor]) -> Tensor:
        inputs = z.clone().requires_grad_()
        gram = kernel(inputs)
        return torch.autograd.grad((weights.to(gram.dtype) * gram.reshape(n, n)).sum(), inputs)[0]

    def dense(inputs: Tensor) -> Tensor:
        rows = peers.jacobian_rows(net, inputs)
        return peers.contract(rows, rows)

    return {
        "ntkgp": lambda: of(lambda inputs: lin.grams(inputs, dtype=torch.float32)[0]),
        "vmap(jacrev)": lambda: of(dense),
    }


def diagonal_ways(net: nn.Module, x: Tensor) -> Ways:
    """K(x_n, x_n), (N, C, C)."""
    lin = linearized(net, x)

    def dense() -> Tensor:
        blocks = []
        for chunk in x.split(CHUNK):
            rows = peers.jacobian_rows(net, chunk)
            blocks.append(torch.stack([tensor @ tensor.mT for tensor in rows.values()]).sum(0))
        return torch.cat(blocks)

    return {"ntkgp": lambda: lin.gram_diagonals(x, dtype=torch.float32)[0], "vmap(jacrev) + bmm": dense}


def feature_ways(net: nn.Module, x: Tensor, directions: int = 20) -> Ways:
    """J(x)V, (N, C, K)."""
    lin = linearized(net, x)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(directions, lin.num_parameters, generator=generator, dtype=torch.float64).to(x.dtype)
    theta = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in theta.values()]

    def push(direction: Tensor) -> Tensor:
        parts = zip(theta.items(), direction.split(sizes), strict=True)
        tangent = {name: part.reshape(p.shape) for (name, p), part in parts}
        return jvp(lambda weights: functional_call(net, weights, (x,)), (theta,), (tangent,))[1].flatten(1)

    return {"ntkgp": lambda: lin.features(x, v), "vmap(jvp)": lambda: vmap(push, out_dims=-1)(v)}


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    inducing: int = 50
    diagonal: tuple[tuple[str, int], ...] = (("b", 256), ("c", 256), ("d", 64), ("e", 256))
    features: tuple[tuple[str, int], ...] = (("b", 128), ("c", 128), ("d", 32), ("e", 128))
    train: int = 500
    test: int = 1000
    widths: tuple[int, ...] = (40, 200, 200, 10)
    strategy: tuple[int, ...] = (64, 256)
    strategy_unet: tuple[int, ...] = (1, 4)


QUICK = Scale(
    8, (("b", 32), ("c", 32), ("d", 4), ("e", 16)), (("b", 16), ("c", 16), ("d", 2), ("e", 8)),
    40, 40, (10, 20, 20, 3), (4,), (1,),
)  # fmt: skip


def _line(title: str, build: Callable[[nn.Module, Tensor], Ways], net: str, samples: int, **options: object) -> Line:
    """A line whose reference is the last way on a float64 copy of the network, on a few samples."""
    constructor = (lambda: mlp([784, 512, 512, 10], nn.Tanh)) if net == "b" and title == "gradient" else None
    large = make(net, samples, build=constructor)
    small = make(net, min(CHECKED, samples), build=constructor)
    exact = list(build(*make(net, min(CHECKED, samples), torch.float64, constructor)).values())[-1]()
    name = f"{title}, {net}{' with tanh' if constructor else ''}, {samples}"
    return Line(name, build(*large), checked(build(*small), partial(error, exact)), **options)  # type: ignore[arg-type]


def gradients(scale: Scale, nets: str) -> Iterator[Line]:
    for net, asked in (("b", 300.0), ("c", 10.0)):
        if net in nets:
            yield _line("gradient", gradient_ways, net, scale.inducing, asked=asked)


def diagonals(scale: Scale, nets: str) -> Iterator[Line]:
    asked = {"b": 250.0, "c": 5.0}
    for net, samples in scale.diagonal:
        if net in nets:
            yield _line("diagonal", diagonal_ways, net, samples, asked=asked.get(net))


def features(scale: Scale, nets: str) -> Iterator[Line]:
    for net, samples in scale.features:
        if net in nets:
            yield _line("features", feature_ways, net, samples)


def prediction_data(scale: Scale, train: int, test: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network of the asked size with training data and test inputs."""
    with seeded(0):
        net = mlp(list(scale.widths), nn.Tanh)
        x, y = torch.randn(train, scale.widths[0]), torch.randn(train, scale.widths[-1])
        return net.eval(), x, y, torch.randn(test, scale.widths[0])


def prediction_ways(net: nn.Module, x: Tensor, y: Tensor, x_test: Tensor, batch: int = 100) -> Ways:
    """Posterior variances of the outputs at test inputs, (T, C), each model fitted before the clock starts.

    laplace-torch is imported on the way; where it is missing, its lines say so.
    """
    model = ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), linearized(net, x))
    model.set_hyperparameters(
        torch.tensor([PRECISION], dtype=torch.float64), torch.tensor([NOISE], dtype=torch.float64)
    )
    model.eval()

    def ours() -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            _ = model(x_test[:1]).variance  # keeps what the training data give

        def variances(rows: Tensor) -> Tensor:
            with torch.no_grad():
                return model(rows).variance.reshape(len(rows), -1)

        return variances

    def theirs(structure: str) -> Callable[[], Callable[[Tensor], Tensor]]:
        return lambda: _laplace(structure, net, x, y, batch)

    fits = {"ntkgp": ours, "laplace-torch KFAC (approximate)": theirs("kron"), "laplace-torch GP": theirs("gp")}
    return {name: Prediction(fit, x_test.split(batch)) for name, fit in fits.items()}


class Prediction:
    """Variances of a model that is fitted before the clock starts."""

    def __init__(self, fit: Callable[[], Callable[[Tensor], Tensor]], batches: Sequence[Tensor]) -> None:
        self._fit, self._batches = fit, batches
        self._predict: Callable[[Tensor], Tensor] | None = None

    def prepare(self) -> None:
        """Fit, once."""
        if self._predict is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._predict = self._fit()

    def __call__(self) -> Tensor:
        """Predict all batches."""
        self.prepare()
        assert self._predict is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.cat([self._predict(rows).detach() for rows in self._batches])


def _laplace(structure: str, net: nn.Module, x: Tensor, y: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """The variance function of laplace-torch fitted to the data."""
    try:
        import laplace  # type: ignore[import-not-found]
    except ImportError as reason:
        raise Unavailable(f"not installed: {reason.name}") from reason

    options = {"n_subset": len(x)} if structure == "gp" else {}
    model = laplace.Laplace(
        copy.deepcopy(net), "regression", "all", structure, sigma_noise=NOISE**0.5, prior_precision=PRECISION, **options
    )
    data = torch.utils.data.TensorDataset(x, y)
    model.fit(torch.utils.data.DataLoader(data, batch_size=min(batch, len(x))))
    return lambda rows: model(rows)[1].detach().diagonal(dim1=-2, dim2=-1)


def exact_variances(net: nn.Module, x: Tensor, x_test: Tensor) -> Tensor:
    """The same from float64 Jacobians and a dense inverse, (T, C)."""
    net = copy.deepcopy(net).double()
    train, test = peers.jacobian_rows(net, x.double()), peers.jacobian_rows(net, x_test.double())
    outputs = peers.contract(test, test).shape[1]
    gram = peers.contract(train, train).reshape(len(x) * outputs, -1) / PRECISION
    cross = peers.contract(test, train).reshape(len(x_test) * outputs, -1) / PRECISION
    prior = peers.contract(test, test).reshape(len(x_test) * outputs, -1).diagonal() / PRECISION
    inverse = torch.linalg.inv(gram + NOISE * torch.eye(len(gram), dtype=gram.dtype))
    return (prior - ((cross @ inverse) * cross).sum(-1)).reshape(len(x_test), outputs)


def predictions(scale: Scale, nets: str) -> Iterator[Line]:
    small = prediction_data(scale, 20, 5)
    errors = checked(prediction_ways(*small), partial(error, exact_variances(small[0], small[1], small[3])))
    net, x, y, x_test = prediction_data(scale, scale.train, scale.test)
    size = sum(p.numel() for p in net.parameters())
    title = f"prediction of {scale.test} points, P = {size}, N = {scale.train}"
    yield Line(title, prediction_ways(net, x, y, x_test), errors, asked=20.0)


def strategy_ways(net: nn.Module, x: Tensor) -> Ways:
    """Float32 Grams with the automatic choice, and with each way forced."""
    lin = linearized(net, x)
    forces = {"automatic": None, **{f"forced {way}": way for way in WAYS}}
    return {name: partial(forced_grams, lin, x, force) for name, force in forces.items()}


def forced_grams(lin: ntkgp.LinearizedNetwork, x: Tensor, force: str | None) -> Tensor:
    """Float32 Grams, each layer by the way `force` where that is open to it, or by its own choice."""
    return products.grams(lin, lin._side(x), None, "2GiB", False, torch.float32, force)


def _reference_error(reference: Reference, grams: Tensor) -> float:
    outputs = grams.shape[-1] // CHECKED_PAIR
    return reference.error(grams[0].reshape(CHECKED_PAIR, outputs, CHECKED_PAIR, outputs))


def strategies(scale: Scale, nets: str) -> Iterator[Line]:
    for net in nets:
        for samples in scale.strategy_unet if net == "f" else scale.strategy:
            reference = Reference.of(Cell(net, CHECKED_PAIR))
            errors = checked(strategy_ways(*make(net, CHECKED_PAIR)), partial(_reference_error, reference))
            title = f"strategy, {net}, {samples}"
            yield Line(title, strategy_ways(*make(net, samples)), errors, asked=1.3, at_most=True)


PARTS: dict[str, Callable[[Scale, str], Iterator[Line]]] = {
    "gradient": gradients,
    "diagonal": diagonals,
    "features": features,
    "prediction": predictions,
    "strategy": strategies,
}

HEADINGS = ("what", "way", "CPU s", "wall s", "runs", "ratio", "error")


def run(line: Line, threads: int, repeats: int) -> list[tuple[str, ...]]:
    """Clock the ways of a line in turn; its rows for the table."""
    left: dict[str, int] = {}
    costs: dict[str, list[Cost]] = {}
    failures: dict[str, str] = {}
    for name, way in line.ways.items():
        try:
            if isinstance(way, Prediction):
                way.prepare()
            first = measure(way)[0]
            if first.wall < SHORT:
                first = measure(way)[0]
        except Exception as reason:
            failures[name] = describe(reason)
            continue
        left[name] = repeats_for(first.wall, repeats) - (first.wall >= SHORT)
        costs[name] = [first] if first.wall >= SHORT else []
    more = alternate_costs({name: partial(_cost, line.ways[name]) for name in left}, left)
    costs = {name: costs[name] + more[name] for name in left}
    return _rows(line, costs, failures, threads)


def _cost(way: Way) -> Cost:
    return measure(way)[0]


def _rows(line: Line, costs: dict[str, list[Cost]], failures: dict[str, str], threads: int) -> list[tuple[str, ...]]:
    seconds = {name: statistics.median(cost.cpu for cost in runs) / threads for name, runs in costs.items()}
    ours = next(iter(line.ways))
    asked = "" if line.asked is None else f" ({'≤' if line.at_most else '≥'} {line.asked:g})"
    rows: list[tuple[str, ...]] = []
    for name in line.ways:
        title = line.title if name == ours else ""
        if name in failures:
            rows.append((title, name, failures[name]))
            continue
        ratio = ""
        if line.at_most and name == ours:
            ratio = report.number(seconds[name] / min(seconds.values())) + asked
        elif not line.at_most and name != ours and ours in seconds:
            ratio = report.number(seconds[name] / seconds[ours]) + asked
        wall = statistics.median(cost.wall for cost in costs[name])
        found = report.number(line.errors.get(name, math.nan), 1)
        times = (report.number(seconds[name]), report.number(wall), str(len(costs[name])))
        rows.append((title, name, *times, ratio, found))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--nets", default="".join(NETS), help="letters of the networks (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way that takes under 2 s (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows: list[tuple[str, ...]] = []
    for part in chosen.only:
        for line in PARTS[part](QUICK if chosen.quick else Scale(), chosen.nets):
            new = run(line, chosen.threads, chosen.repeats)
            print(report.text_table(HEADINGS, new) + "\n", flush=True)
            rows += new
    if chosen.write:
        report.insert(PAGE, "products", report.markdown_table(HEADINGS, rows))


if __name__ == "__main__":
    main()
