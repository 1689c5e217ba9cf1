"""compare(): scores against direct formulas, processes of their own, failures, resumption, tables and pictures."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.baselines import Laplace, Point
from ntkgp.cli.inputs import CommandError, load_data
from ntkgp.evaluation import metrics
from ntkgp.evaluation.comparison import Comparison, Method, Row, compare, isolation, method_names, results
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evaluation.comparison.scores import Scale, collect, score
from ntkgp.fingerprint import Unknowable, fingerprint
from tests import reference as ref

comparing = sys.modules["ntkgp.evaluation.comparison.compare"]  # the package has a function of this name
SLOW = ("ensemble", "hfl", "dropout", "gp-exact", "network-validated")


def network(inputs: int = 3, outputs: int = 2) -> nn.Sequential:
    with ref.seeded(0):
        net = nn.Sequential(
            nn.Linear(inputs, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, outputs)
        )
        return net.double().eval()


def data(n: int, outputs: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], -1)[:, :outputs] + noise


def labels(n: int, classes: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data(n, 2, seed)
    return x, (y[:, 0] > 0).long() + ((y[:, 1] > 0).long() if classes == 3 else 0)


class Given:
    """A method that predicts what it is told."""

    def __init__(self, predict) -> None:
        self._predict = predict

    def fit(self, train_data):
        return self

    def predict(self, x):
        return self._predict(x)


def correlated(x):
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64) * (1 + x[:, :1, None].square())
    return MultivariateNormal(x[:, :2], covariance)


class Holder:
    """Holds 200 MB while it predicts."""

    def __init__(self, net, train_data) -> None:
        self.net = net
        self.numbers = torch.ones(25_000_000, dtype=torch.float64)

    def predict(self, x):
        return Normal(self.net(x)[:, 0].detach(), torch.ones(len(x), dtype=torch.float64))


def breaks(net, train_data):
    raise ValueError("no\nsuch luck")


def dies(net, train_data):
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(net, train_data):
    os._exit(7)


def sleeps(net, train_data):
    time.sleep(60)


def reads(net, train_data):
    """Prints, asks, and leaves a process behind that would take what the other interpreter is told."""
    print("PRINTED", flush=False)
    if os.fork() == 0:
        os.read(0, 1)
        time.sleep(60)
        os._exit(0)
    return input()


def kills(net, train_data):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def quits(net, train_data):
    sys.exit("enough")


def waits(path, argument):
    path.write_text(f"{os.getpid()}")
    time.sleep(60)


def is_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_regression_scores_are_those_of_the_formulas_in_original_units() -> None:
    x, y = data(40)
    mean, std = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([2.0, 5.0], dtype=torch.float64)
    row = compare(network(), (x, y), (x, y), {"given": Given(correlated)}, target_scale=(mean, std), isolate=False)[
        "given"
    ]
    found = correlated(x)
    original = MultivariateNormal(found.mean * std + mean, found.covariance_matrix * std[:, None] * std)
    target = y * std + mean
    density = -original.log_prob(target) / 2
    assert row.scores["nll"] == pytest.approx(float(density.mean()), rel=1e-12)
    assert row.errors["nll"] == pytest.approx(float(density.std() / math.sqrt(40)), rel=1e-12)
    for name, expected in (
        ("rmse", metrics.rmse(original.mean, target)),
        ("crps", metrics.gaussian_crps(original.mean, original.variance, target)),
        ("cqm", metrics.centered_quantile_metric(original.mean, original.variance, target)),
        ("coverage", metrics.coverage(original.mean, original.variance, target).fraction),
        ("width", metrics.coverage(original.mean, original.variance, target).width),
    ):
        assert row.scores[name] == pytest.approx(float(expected), rel=1e-12), name


def test_classification_scores_are_those_of_the_formulas() -> None:
    _, y = labels(50, 3)
    p = torch.softmax(3 * torch.randn(50, 3, dtype=torch.float64), -1)
    found = collect(Categorical(p))
    scores = {name: value for name, (value, _) in score(found, y, None, Scale()).items()}
    picked = p.gather(-1, y[:, None]).log().squeeze(-1)
    assert scores["nll"] == pytest.approx(-float(picked.mean()), rel=1e-12)
    assert scores["accuracy"] == pytest.approx(float(metrics.accuracy(p, y)), rel=1e-12)
    assert scores["brier"] == pytest.approx(float(metrics.brier_score(p, y)), rel=1e-12)
    assert scores["ece"] == pytest.approx(float(metrics.expected_calibration_error(p, y)), rel=1e-12)
    # Each half by the temperature of the other: by a fine grid.
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64).exp()
    losses = []
    for half in (0, 1):
        fit, held = torch.arange(50) % 2 != half, torch.arange(50) % 2 == half
        by = torch.stack([nn.functional.cross_entropy(p[fit].log() / t, y[fit]) for t in grid])
        losses.append(nn.functional.cross_entropy(p[held].log() / grid[by.argmin()], y[held]))
    assert scores["calibrated_nll"] == pytest.approx(float(sum(losses)) / 2, rel=1e-3)


def test_a_binary_network_has_two_columns() -> None:
    p = torch.tensor([0.2, 0.9], dtype=torch.float64)
    found = collect(Bernoulli(probs=p))
    assert torch.equal(found.probabilities, torch.stack([1 - p, p], -1))


def test_inputs_from_elsewhere_are_told_by_variance_and_entropy() -> None:
    x, y = data(30)
    outside = torch.randn(20, 3, dtype=torch.float64) + 3
    for scale in (None, (0.0, 7.0)):
        row = compare(
            network(), (x, y), (x, y), {"given": Given(correlated)}, ood_data=outside, target_scale=scale, isolate=False
        )["given"]
        inner, outer = (correlated(part).variance.sum(-1) for part in (x, outside))
        assert row.scores["ood_auc"] == pytest.approx(float(metrics.ood_auc(inner, outer)), rel=1e-12)
    x, y = labels(30, 3)
    net = network(outputs=3)
    for given in (outside, (outside, torch.zeros(20)), TensorDataset(outside, torch.zeros(20))):
        row = compare(net, (x, y), (x, y), ["laplace-full"], given, isolate=False)["laplace-full"]
        fitted = Laplace(net, "classification").fit((x, y))
        found = [fitted.predict(part) for part in (x, outside)]
        entropies = [metrics.predictive_entropy(part.probs) for part in found]
        spreads = [metrics.total_variance(part.latent.covariance_matrix, contrasts=True) for part in found]
        assert row.scores["ood_auc"] == pytest.approx(float(metrics.ood_auc(*entropies)), rel=1e-6)
        assert row.scores["ood_auc_variance"] == pytest.approx(float(metrics.ood_auc(*spreads)), rel=1e-6)


@pytest.mark.parametrize(("kind", "outputs"), [("regression", 2), ("binary", 1), ("softmax", 3)])
def test_every_name_works_on_every_likelihood(kind, outputs) -> None:
    train = data(16, outputs) if kind == "regression" else labels(16, 3 if kind == "softmax" else 2)
    test = data(10, outputs, 5) if kind == "regression" else labels(10, 3 if kind == "softmax" else 2, 5)
    net = network(outputs=outputs)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    quick = {"vl": {"epochs": 3}, "swag": {"num_snapshots": 3, "rank": 2, "num_samples": 4}}
    methods = [Method(name, **quick.get(name, {})) for name in method_names() if name not in SLOW]
    found = compare(net, train, test, methods, isolate=False)
    assert found.failures == {}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    # Full Laplace at θ⋆ is the Gaussian process; what is prior only is not.
    gp = found["gp"].scores
    assert found["laplace-full"].scores["nll"] == pytest.approx(gp["nll"], rel=1e-5)
    assert found["prior-only"].scores["nll"] != pytest.approx(gp["nll"], rel=1e-3)


def test_the_gaussian_process_predicts_as_its_likelihood_does() -> None:
    x, y = data(20)
    model = ntkgp.from_network(network(), (x, y))
    far = torch.randn(300, 3, dtype=torch.float64)  # more than a chunk
    found = GaussianProcess(model).predict(far)
    with torch.no_grad():
        expected = model.likelihood(model(far[250:]))
    blocks = expected.covariance_matrix.reshape(50, 2, 50, 2).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert torch.allclose(found.mean[250:], expected.mean, atol=1e-10)
    assert torch.allclose(found.covariance_matrix[250:], blocks, atol=1e-10)
    row = compare(network(), (x, y), (x, y), {"fitted": model}, isolate=False)["fitted"]
    again = compare(network(), (x, y), (x, y), "gp", isolate=False)["gp"]
    assert row.scores == pytest.approx(again.scores, rel=1e-9)


def test_methods_may_be_names_comparators_models_functions_and_predictors() -> None:
    x, y = data(20)
    net = network()
    given = ["MAP", Method("Laplace KFAC", "mine", evidence="theta"), Point(net), Given(correlated)]
    found = compare(net, (x, y), (x, y), given, isolate=False)
    assert found.methods == ["MAP", "mine", "Point", "Given"]
    assert found["MAP"].scores == found["Point"].scores
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    assert compare(net, loader, loader, "network", isolate=False)["network"].scores == pytest.approx(
        found["MAP"].scores, rel=1e-12
    )


class OnlyHere:
    """A method that can be pickled, and read where the module is that it names."""

    def __reduce__(self):
        return __import__, ("no_such_module",)

    def __call__(self, net, train_data):
        return Point(net).fit(train_data)


def test_each_method_has_a_process_of_its_own(capfd) -> None:
    x, y = data(20, 1)
    net = network(outputs=1)
    methods = {"gp": "gp", "holder": Holder, "breaks": breaks, "dies": dies, "leaves": leaves, "sleeps": sleeps}
    methods |= {"reads": reads, "quits": quits}
    here = {"lambda": lambda net, data: Point(net).fit(data), "unreadable": OnlyHere()}
    last = {"network": "network", "kills": kills, "again": "gp"}
    found = compare(net, (x, y), (x, y), {**methods, **here, **last}, time_limit=4)
    assert "PRINTED" in capfd.readouterr().out
    assert len(found.notes) == 2
    assert "lambda ran in the calling process, memory not measured: it cannot be pickled" in found.notes[0]
    assert "unreadable ran in the calling process" in found.notes[1]
    assert "no_such_module" in found.notes[1]
    assert found["lambda"].scores == found["unreadable"].scores == found["network"].scores
    assert math.isnan(found["lambda"].memory)
    alone = compare(net, (x, y), (x, y), "gp", isolate=False)["gp"]
    assert found["gp"].scores == found["again"].scores == alone.scores
    assert 190 < found["holder"].memory < 260
    assert found["gp"].memory > 0
    assert math.isnan(alone.memory)
    assert {method: why for (method, _), why in found.failures.items()} == {
        "breaks": "ValueError: no such luck",
        "dies": f"its process was ended by signal {int(signal.SIGSEGV)}",
        "leaves": "its process ended with status 7",
        "sleeps": "stopped after 4 s (time_limit)",
        "reads": "EOFError: EOF when reading a line",
        "quits": "SystemExit: enough",
        "kills": "the other interpreter ended with status -9",
    }
    assert "failed: ValueError: no such luck" in str(found.table)


def test_an_interrupted_method_leaves_no_process_behind(tmp_path) -> None:
    pid = tmp_path / "pid"

    def interrupt(number, frame):
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    place = isolation.Workplace(waits, pid, int)
    own = place._process.pid
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(KeyboardInterrupt):
            place.run(None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        place.close()
    assert is_gone(own)
    assert is_gone(int(pid.read_text()))


def test_a_network_on_an_accelerator_is_compared_here() -> None:
    x, y = data(12, 1)
    net = network(outputs=1)
    net.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    with pytest.raises(isolation.Unsendable, match="on meta"):
        comparing._on_cpu(comparing.Problem(net, (x, y), x, y, None, Scale(), {}))


def test_a_network_that_cannot_be_sent_is_compared_here() -> None:
    x, y = data(20, 1)
    net = network(outputs=1)
    net.extra = lambda: None
    found = compare(net, (x, y), (x, y), "network")
    assert found["network"].scores
    assert "all methods ran in one process" in found.notes[0]


def point(net, train_data):
    return Point(net).fit(train_data)


def constant(width):
    return lambda net, data: Given(lambda x: MultivariateNormal(net(x).detach(), width * torch.eye(2).double()))


def test_a_second_call_takes_what_the_first_one_kept(tmp_path, monkeypatch) -> None:
    x, y = data(20)
    net, calls, evaluate = network(), [], comparing.evaluate

    def counted(problem, method):
        calls.append(1)
        return evaluate(problem, method)

    monkeypatch.setattr(comparing, "evaluate", counted)

    def once(net=net, x=x, y=y, method=point, **options):
        return compare(net, (x, y), (x, y), {"m / é": method}, isolate=False, folder=tmp_path, **options)["m / é"]

    first = once()
    second = once()
    assert len(calls) == 1
    assert second.to_json() == first.to_json()
    assert torch.equal(second.predicted.mean, first.predicted.mean)
    once(y=y + 1e-9)
    once(target_scale=(0.0, 2.0))
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-12
    once(net=other)
    assert len(calls) == 4
    for layer in (0, 3):
        other[layer].weight.requires_grad_(False)
        once(net=other)
    assert len(calls) == 6
    for width in (1.0, 2.0, 1.0):
        once(method=constant(width))
    assert len(calls) == 8
    for name in ("Point", "Point", "Laplace"):
        once(method=Point(net) if name == "Point" else Laplace(net, evidence=None))
    assert len(calls) == 10
    shuffled = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, generator=torch.Generator())
    for _ in range(2):
        compare(net, shuffled, (x, y), {"m": point}, isolate=False, folder=tmp_path)
    assert len(calls) == 11
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    assert once().scores == first.scores
    assert len(calls) == 12
    lock = threading.Lock()
    found = compare(
        net, (x, y), (x, y), {"m": lambda *_: lock and Point(net).fit((x, y))}, isolate=False, folder=tmp_path
    )
    assert found["m"].scores == first.scores
    assert found.notes == [
        "the result of m is not kept: a lock has no state that can be read: cannot pickle '_thread.lock' object"
    ]


def tied(same: bool) -> nn.Sequential:
    one = nn.Linear(2, 2)
    other = one if same else nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
        for parameter in other.parameters():
            parameter.zero_()
    return nn.Sequential(one, nn.Tanh(), other)


def scaled(factor: float) -> nn.Module:
    net = nn.Linear(2, 2)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    net.factor = factor
    return net


def hooked(width: float) -> nn.Module:
    net = scaled(1.0)
    net.register_forward_hook(lambda module, x, y: width * y)
    return net


def selfish(value: int) -> list:
    found: list = [value]
    found.append(found)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda i: lambda x: x + i,
        lambda i: eval(f"lambda x: x + {i}", {"__name__": "__main__"}),
        lambda i: eval("lambda x: x + width", {"__name__": "__main__", "width": i}),
        lambda i: functools.partial(int, base=i),
        lambda i: functools.cache(lambda x: x + i),
        lambda i: Given(functools.partial(int, base=i)),
        lambda i: [float(i)].append,
        lambda i: torch.full((2,), float(i)).numpy(),
        lambda i: torch.full((2,), float(i), dtype=torch.bfloat16),
        lambda i: torch.ones(3, i),
        lambda i: torch.ones(6).reshape(i, -1).to_sparse(),
        lambda i: ntkgp.ParameterGroups({"a": ["0.*"], "b": ["2.*" if i == 2 else "3.*"]}),
        lambda i: Method("network", groups="layer" if i == 2 else "single"),
        lambda i: tied(i == 2),
        lambda i: scaled(float(i)),
        lambda i: hooked(float(i)),
        lambda i: {("a", i), "b", "c"},
        lambda i: [torch.float32, torch.float64][i - 2],
        lambda i: TensorDataset(torch.arange(4), torch.arange(4) * i),
        lambda i: torch.Generator().manual_seed(i),
        lambda i: torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=i),
        selfish,
        lambda i: ["a", "bc"] if i == 2 else ["ab", "c"],
    ],
)
def test_a_fingerprint_is_of_values_and_not_of_names_or_addresses(make) -> None:
    assert fingerprint(make(2)) == fingerprint(make(2))
    assert fingerprint(make(2)) != fingerprint(make(3))


def test_a_fingerprint_is_the_same_in_another_process(capsys) -> None:
    code = (
        "import torch; from torch import nn; from ntkgp.fingerprint import fingerprint\n"
        "from ntkgp.evaluation.comparison import Method\n"
        "net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))\n"
        "for p in net.parameters(): nn.init.ones_(p)\n"
        "print(fingerprint(net, {'b', 'a', 'c'}, Method('gp', groups='layer'), lambda x: x + 1, nn.Linear, torch.tanh))"
    )
    # Seeds of hashes by which the words of the set stand in another order than here: abc by one, cab by the other.
    seed = "0" if "".join({"b", "a", "c"}) == "abc" else "1"
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True, text=True, check=True, cwd=os.path.dirname(os.path.dirname(ntkgp.__file__)),
    ).stdout  # fmt: skip
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == there
    with pytest.raises(Unknowable, match="generator"):
        fingerprint(x for x in ())


def test_failures_are_tried_again(tmp_path) -> None:
    x, y = data(20)
    calls = []

    def fails_once(net, train_data):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not yet")
        return Point(net).fit(train_data)

    for expected in ({("m", ""): "RuntimeError: not yet"}, {}):
        found = compare(network(), (x, y), (x, y), {"m": fails_once}, isolate=False, folder=tmp_path)
        assert found.failures == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["gp", "nonsense"]}, "methods: expected one of network, .* got 'nonsense'"),
        ({"methods": ["gp", "GP"]}, None),
        ({"methods": ["gp", "gp"]}, "methods: gp more than once"),
        ({"methods": []}, "methods: expected at least one"),
        ({"methods": [3]}, "methods: expected a name, a Method, a model or a function, got int"),
        ({"test_data": (torch.zeros(4, 3).double(), torch.zeros(4, 5).double())}, "test_data: y: expected shape"),
        ({"test_data": (torch.zeros(4, 3).double(), torch.full((4, 2), torch.nan).double())}, "test_data"),
        ({"train_data": torch.zeros(3)}, "train_data: expected \\(x, y\\)"),
        ({"likelihood": "poisson"}, "likelihood: expected one of"),
        ({"target_scale": (0.0, 0.0)}, "target_scale: expected finite numbers and a positive std"),
        ({"target_scale": 3}, "target_scale: expected a pair"),
        ({"target_scale": ([0.0] * 3, [1.0] * 3)}, "target_scale: expected one number or 2 each, got 3"),
        ({"ood_data": torch.zeros(3, 9).double()}, "ood_data: expected"),
        ({"time_limit": 0}, "time_limit: expected a positive number"),
        ({"methods": {1: "gp"}}, "methods: expected labels of printable characters, got 1"),
        ({"methods": {"a\nb": "gp"}}, "methods: expected labels of printable characters"),
    ],
)
def test_mistakes_are_named(change, message) -> None:
    x, y = data(12)
    given = {"train_data": (x, y), "test_data": (x, y), "methods": ["network"], "isolate": False, **change}
    if message is None:
        assert compare(network(), **given).methods == ["gp", "GP"]
        return
    with pytest.raises((ValueError, TypeError), match=message):
        compare(network(), **given)


def test_a_prediction_of_the_wrong_kind_is_a_failure() -> None:
    x, y = labels(20, 3)
    found = compare(network(outputs=3), (x, y), (x, y), {"m": Given(correlated)}, isolate=False)
    assert "MultivariateNormal is no prediction for classification" in found["m"].failure
    needs = compare(network(outputs=3), (x, y), (x, y), ["ensemble", "network-validated"], isolate=False)
    assert "train: expected a function" in needs["ensemble"].failure
    assert "validation: expected for Point" in needs["network-validated"].failure
    odd = compare(network(outputs=3), (x, y), (x, y), Method("laplace-full", nonsense=3), isolate=False)
    assert "nonsense" in odd["laplace-full"].failure


def test_rows_of_a_shuffled_loader_stay_together() -> None:
    x, y = data(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0))
    given = {"m": Given(lambda x: MultivariateNormal(x[:, :2], torch.eye(2).double()))}
    found = compare(network(), (x, y), loader, given, isolate=False)["m"]
    expected = compare(network(), (x, y), (x, y), given, isolate=False)["m"]
    assert found.scores == pytest.approx(expected.scores, rel=1e-12)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, a, b):
        return self.inner(a + b)


def test_inputs_from_elsewhere_of_a_network_of_two_inputs() -> None:
    x, y = data(20)
    outside = (x + 3, x)
    pairs = [
        compare(Sum(), ((x, x), y), ((x, x), y), "gp", given, isolate=False)["gp"].scores["ood_auc"]
        for given in (outside, (outside, y))
    ]
    assert pairs[0] == pairs[1]


def test_a_function_gets_a_network_of_its_own() -> None:
    x, y = data(20)
    net = network()
    before = [p.clone() for p in net.parameters()]

    def spoils(net, train_data):
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        return Point(net).fit(train_data)

    found = compare(net, (x, y), (x, y), {"spoils": spoils, "quits": quits}, isolate=False)
    assert found["quits"].failure == "SystemExit: enough"
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_distributions_that_are_not_one_per_input() -> None:
    _, y = data(12)
    mean, deviation = torch.zeros(12, 2, dtype=torch.float64), torch.full((12, 2), 0.5, dtype=torch.float64)
    apart = collect(Normal(mean, deviation), y, Scale(torch.tensor(1.0), torch.tensor(3.0)))
    together = collect(
        MultivariateNormal(mean, torch.eye(2, dtype=torch.float64) * 0.25),
        y,
        Scale(torch.tensor(1.0), torch.tensor(3.0)),
    )
    assert torch.allclose(apart.log_density, together.log_density, rtol=1e-12)
    with pytest.raises(ValueError, match=r"batch shape \(N,\), got one of shape \(\) over \(12,\)"):
        collect(MultivariateNormal(mean[:, 0], torch.eye(12).double()), y[:, 0])
    for given in (Categorical(torch.ones(20, 3)), Bernoulli(torch.ones(20) / 2)):
        with pytest.raises(ValueError, match=r"a distribution of 12 labels, got batch shape \(20,\)"):
            collect(given, torch.zeros(12, dtype=torch.long))
    two = collect(Categorical(torch.ones(3, 2)))
    with pytest.raises(ValueError, match="a probability of label 2, got 2 classes"):
        score(two, torch.tensor([0, 1, 2]), None, Scale())
    # The square underflows in float32.
    sharp = collect(Normal(torch.zeros(12), torch.full((12,), 1e-30)), y[:, 0].float())
    assert bool((sharp.variance > 0).all())


def rows() -> Comparison:
    scores = {"a": [1.0, 1.2, 3.0], "b & c": [1.15, 1.25, 2.0], "d|e": [5.0, 5.0, 9.0]}
    found = [
        Row(method, name, {"nll": value, "rmse": 2 * value}, {"nll": 0.2, "rmse": 0.1}, 1.0, 0.5, 30.0)
        for method, values in scores.items()
        for name, value in zip(("one/0", "one/1", "two"), values, strict=True)
    ]
    return Comparison([*found, Row("late", "one/0", failure="ValueError: why")], "regression")


def test_tables() -> None:
    found = rows()
    mean, error, count = found.summary("nll", "a", "one")
    assert (mean, count) == (pytest.approx(1.1), 2)
    assert error == pytest.approx(0.1)  # over the splits: |1.2 − 1.0| / 2
    assert found.summary("nll", "a", "two") == (3.0, 0.2, 1)  # over the test points
    table = found.table
    assert table[0]["nll"] == pytest.approx(1.1)
    text = str(table).splitlines()
    assert len({line.index("one") for line in text[2:6]}) == 1
    marks = {(row[0], row[1]): row[2][-1] for row in table.cells}
    assert marks["a", "one"] == "*"
    assert marks["b & c", "one"].isdigit()  # worse by 0.1 ± 0.05 on the same splits, though 1.2 is within 1.1 + 0.1
    assert marks["d|e", "one"].isdigit()
    assert marks["b & c", "two"] == "*"
    assert "d\\|e" in table.to_markdown()
    assert "b \\& c" in table.to_latex()
    assert table.to_latex().count(r"\\") == len(table) + 1
    assert table.to_csv().splitlines()[0].startswith("method,data,NLL")
    assert "failed: ValueError: why" in str(table)
    assert "- late on one/0: ValueError: why" in found.to_markdown()


@pytest.mark.parametrize(("column", "sign"), [("nll", 1.0), ("accuracy", -1.0)])
def test_marks_compare_split_by_split(column, sign) -> None:
    hard = torch.tensor([0.0, 5.0, 9.0], dtype=torch.float64)  # what the splits have in common
    worse = {"best": [0.0, 0.0, 0.0], "same": [1e-13, -1e-13, 0.0], "late": [0.02, 0.03, 0.02],
             "near": [0.3, -0.2, 0.1], "far": [4.0, 4.0, 4.0]}  # fmt: skip
    found = Comparison(
        [Row(method, f"s/{i}", {column: sign * float(value)}, {column: 9.0})
         for method, by in worse.items() for i, value in enumerate(hard + torch.tensor(by))], "classification"
    )  # fmt: skip
    assert {method: found.mark(column, method, "s") for method in worse} == {
        "best": "*", "same": "*", "late": "", "near": "°", "far": "",
    }  # fmt: skip
    assert found.mark("seconds", "best", "s") == ""
    # One split: by the best one's error over the test points.
    rows = [
        Row(m, "t", {column: sign * v}, {column: e}) for m, v, e in (("a", 1.0, 0.2), ("b", 1.1, 0.0), ("c", 1.3, 9.0))
    ]
    alone = Comparison(rows, "classification")
    assert [alone.mark(column, method, "t") for method in "abc"] == ["*", "°", ""]


def test_panels_are_cut_only_where_differences_would_be_hidden() -> None:
    def limits(*values, error=0.01):
        return results._limits([(value, error) for value in values])

    low, high = limits(1.0, 1.1, 1.2, 1.3, 500.0)
    assert low < 1.0
    assert 1.3 < high < 500
    assert limits(1.0, 1.1, 1.2, 1.3, 1.9) is None
    # Most of them tie: the others are what there is to see.
    assert limits(1.0, 1.0, 1.0, 1.0, 1.4) is None
    assert limits(1.0, 1.0, 1.0, 1.001, 1.4) is None
    assert limits(1.0, 1.0, 1.0, 1.4, 1.5, error=math.nan) is None
    assert limits(1.0, 500.0) is None
    assert limits(1.0, 1.1, 500.0, error=math.nan)[1] == pytest.approx(1.9)


def test_a_mean_over_some_of_the_splits_has_no_mark() -> None:
    found = [Row("a", f"one/{i}", {"nll": 1.0}, {"nll": 0.2}) for i in range(3)]
    found += [Row("b", "one/0", {"nll": math.nan}, {"nll": 9.0}), Row("b", "one/1", {"nll": 0.5}, {"nll": 0.3})]
    found += [Row("b", "one/2", failure="ValueError: why"), Row("c", "one/0", {"nll": 2.0}, {"nll": 0.1})]
    found += [Row(m, "two", {"nll": v}, {"nll": 0.1}) for m, v in (("a", math.inf), ("b", 3.0))]
    one = Comparison(found, "regression")
    assert one.summary("nll", "b", "one") == (0.5, 0.3, 1)  # the error of the row with the score
    cells = {tuple(cell[:2]): cell[2] for cell in one.table.cells}
    assert cells["b", "one"] == "0.500 ± 0.300 (1 of 3)"
    assert cells["a", "one"] == "1.000 ± 0.000"  # nobody to be better than
    result = one.rank_test()
    assert list(result.names) == ["a", "b"]  # c was not asked on all sets
    assert result.average.tolist() == [1.5, 1.5]
    with pytest.raises(ValueError, match="two or more data sets"):
        Comparison(found[:3], "regression").rank_test()


def test_signs_of_the_formats() -> None:
    label = r"a\b {θ⋆} θ̃ σ² <lambda> 5 % ~|^$"
    table = Comparison([Row(label, scores={"nll": -math.inf}), Row("b", scores={"nll": 1.0})], "regression").table
    assert table.cells[0][1] == "-inf"  # no score of quality
    written = table.to_latex().splitlines()[4]
    expected = (
        r"a\textbackslash{}b \{$\theta_\star$\} $\tilde\theta$ $\sigma$$^2$ $<$lambda$>$ 5 \% \textasciitilde{}$|$"
        r"\textasciicircum{}\$"
    )
    assert written.startswith(expected)
    assert r"<" not in table.to_markdown()
    broken = Comparison([Row("x", failure="why " * 500)], "regression")
    assert max(map(len, str(broken.table).splitlines())) < 110
    assert "\n" not in broken.table.to_markdown().splitlines()[2]


def test_comparisons_of_the_same_name_are_not_joined() -> None:
    y = torch.zeros(3, 1)
    first, second = (Comparison([Row("a", "s")], "regression", {"s": y + i}) for i in (0, 1))
    with pytest.raises(ValueError, match="'a' on 's' more than once"):
        Comparison.joined([first, first])
    with pytest.raises(ValueError, match="other test targets under the same name 's'"):
        Comparison.joined([first, Comparison([Row("b", "s")], "regression", second.targets)])
    assert len(Comparison.joined([first, Comparison([Row("b", "s")], "regression", first.targets)]).rows) == 2


def test_rows_survive_a_file(tmp_path) -> None:
    found = rows()
    found.to_csv(tmp_path / "rows.csv")
    again = Comparison.from_csv(tmp_path / "rows.csv", "regression")
    # nan is not equal to itself.
    assert [repr(row) for row in again.rows] == [repr(row) for row in found.rows]
    assert again.to_csv() == found.to_csv()
    odd = Comparison(
        [Row('a, "b"', "x\ny", {"nll": math.inf}, {"nll": math.nan}, failure='no, "why"\nat all')], "regression"
    )
    odd.to_csv(tmp_path / "odd.csv")
    assert repr(Comparison.from_csv(tmp_path / "odd.csv", "regression").rows) == repr(odd.rows)
    joined = Comparison.joined([found, Comparison([Row("a", "three", {"nll": 1.0}, {"nll": 0.1})], "regression")])
    assert joined.datasets == ["one", "two", "three"]
    with pytest.raises(ValueError, match="one kind"):
        Comparison.joined([found, Comparison([], "classification")])
    with pytest.raises(KeyError, match="3 rows of 'a'"):
        found["a"]


def test_a_failure_ranks_last() -> None:
    found = rows()
    assert list(found.rank_test().names) == ["a", "b & c", "d|e"]  # late was not asked on set two
    found.rows.append(Row("late", "two", {"nll": 0.1}, {"nll": 0.1}))
    result = found.rank_test()
    assert list(result.names) == ["a", "b & c", "d|e", "late"]
    assert torch.allclose(result.average, torch.tensor([2.0, 2.0, 3.5, 2.5]).double())


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_pictures(kind, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    train = data(24) if kind == "regression" else labels(24, 3)
    net = network(outputs=2 if kind == "regression" else 3)
    found = compare(net, train, train, ["network", "gp"], isolate=False, name="one")
    figure = found.plot()
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert titles[:2] == ["NLL", "RMSE" if kind == "regression" else "accuracy"]
    assert len(titles) == len([ax for ax in figure.axes if ax.get_visible()]) == 5  # four scores and a curve
    other = compare(net, train, train, ["network", "gp"], isolate=False, name="two")
    several = Comparison.joined([found, other]).plot(["nll"])
    assert len([ax for ax in several.axes if ax.get_visible()]) == 2  # NLL and mean ranks
    several.savefig(tmp_path / "several.png")


def test_pictures_of_what_failed(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    failed = [Row(name, data, failure="ValueError: why") for name in ("a", "b") for data in ("one", "two")]
    for part in (failed, failed[:1]):
        with pytest.raises(ValueError, match="columns: expected scores that some method has"):
            Comparison(part, "regression").plot()
    with pytest.raises(ValueError, match="columns"):
        rows().plot(["nonsense"])
    some = Comparison([*failed, Row("c", "one", {"nll": 1.0}, {"nll": 0.1})], "regression")
    some.plot().savefig(tmp_path / "some.png")
    x, y = data(12)
    nans = Given(lambda x: Normal(x[:, :2] * math.nan, torch.ones(len(x), 2).double(), validate_args=False))
    found = compare(network(), (x, y), (x, y), {"nan": nans, "given": Given(correlated)}, isolate=False)
    assert found["nan"].failure
    kept = found["given"].predicted
    found.rows.append(Row("kept", scores={"nll": math.nan}, predicted=replace(kept, mean=kept.mean * math.nan)))
    figure = found.plot()
    figure.savefig(tmp_path / "nan.png")
    assert any("given" in text.get_text() for text in figure.axes[4].get_legend().get_texts())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": numpy.array([0.0, 1.9])}, "classification needs integer labels in y_test"),
        ({"x": numpy.array([[1], [2]])}, "x holds integers, x_test float64"),
        ({"y": numpy.array(3)}, r"y has shape \(\), expected at least one row"),
        ({"x": numpy.ones((2, 1), dtype=">f8")}, None),
        ({"x_ood": numpy.ones((2, 1), dtype=numpy.uint8)}, None),
    ],
)
def test_arrays_of_one_kind(change, message, tmp_path) -> None:
    arrays = {
        "x": numpy.ones((2, 1)),
        "y": numpy.array([0, 1]),
        "x_test": numpy.ones((2, 1)),
        "y_test": numpy.array([1, 0]),
    }
    numpy.savez(tmp_path / "data.npz", **{**arrays, **change})
    if message is None:
        found = load_data(tmp_path / "data.npz", "auto", torch.float32)
        assert {part.dtype for part in (found.x, found.x_test, found.x_ood) if part is not None} == {torch.float32}
        return
    with pytest.raises(CommandError, match=message):
        load_data(tmp_path / "data.npz", "auto", torch.float32)


def test_an_array_alone_is_no_data(tmp_path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        numpy.save(file, numpy.ones(3))
    with pytest.raises(CommandError, match=r"is not an \.npz file"):
        load_data(tmp_path / "x.npz", "auto", torch.float32)


def test_strides_do_not_change_a_fingerprint() -> None:
    wide = torch.arange(8, dtype=torch.float64)
    assert fingerprint(wide[::4][:1]) == fingerprint(torch.zeros(1, dtype=torch.float64))
    assert fingerprint(wide[::2]) == fingerprint(torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64))
    assert fingerprint(wide.reshape(2, 4).T) == fingerprint(wide.reshape(2, 4).T.contiguous())
