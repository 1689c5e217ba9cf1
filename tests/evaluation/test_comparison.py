"""compare(): scores against direct formulas, processes of their own, failures, resumption, tables and pictures."""

from __future__ import annotations

import math
import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.baselines import Laplace, Point
from ntkgp.evaluation import metrics
from ntkgp.evaluation.comparison import Comparison, Method, Row, compare, method_names
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evaluation.comparison.scores import Scale, collect, score
from tests import reference as ref

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


def test_each_method_has_a_process_of_its_own() -> None:
    x, y = data(20, 1)
    net = network(outputs=1)
    methods = {"gp": "gp", "holder": Holder, "breaks": breaks, "dies": dies, "leaves": leaves, "sleeps": sleeps}
    here = {"lambda": lambda net, data: Point(net).fit(data)}
    found = compare(net, (x, y), (x, y), {**methods, **here, "network": "network", "again": "gp"}, time_limit=3)
    assert len(found.notes) == 1
    assert "lambda ran in the calling process, memory not measured: it cannot be pickled" in found.notes[0]
    assert found["lambda"].scores == found["network"].scores
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
        "sleeps": "stopped after 3 s (time_limit)",
    }
    assert "failed: ValueError: no such luck" in str(found.table)


def test_a_network_that_cannot_be_sent_is_compared_here() -> None:
    x, y = data(20, 1)
    net = network(outputs=1)
    net.extra = lambda: None
    found = compare(net, (x, y), (x, y), "network")
    assert found["network"].scores
    assert "all methods ran in one process" in found.notes[0]


def test_a_second_call_takes_what_the_first_one_kept(tmp_path) -> None:
    x, y = data(20)
    net, calls = network(), []

    def counted(net, train_data):
        calls.append(1)
        return Point(net).fit(train_data)

    def once(net=net, x=x, y=y, **options):
        return compare(net, (x, y), (x, y), {"counted": counted}, isolate=False, folder=tmp_path, **options)["counted"]

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
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    assert once().scores == first.scores
    assert len(calls) == 5


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
        ({"ood_data": torch.zeros(3, 9).double()}, "input"),
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
    assert marks["b & c", "one"] == "°"  # 1.2 within 1.1 + 0.1
    assert marks["d|e", "one"].isdigit()
    assert marks["b & c", "two"] == "*"
    assert "d\\|e" in table.to_markdown()
    assert "b \\& c" in table.to_latex()
    assert table.to_latex().count(r"\\") == len(table) + 1
    assert table.to_csv().splitlines()[0].startswith("method,data,NLL")
    assert "failed: ValueError: why" in str(table)
    assert "- late on one/0: ValueError: why" in found.to_markdown()


def test_rows_survive_a_file(tmp_path) -> None:
    found = rows()
    found.to_csv(tmp_path / "rows.csv")
    again = Comparison.from_csv(tmp_path / "rows.csv", "regression")
    # nan is not equal to itself.
    assert [repr(row) for row in again.rows] == [repr(row) for row in found.rows]
    assert again.to_csv() == found.to_csv()
    joined = Comparison.joined([found, Comparison([Row("a", "three", {"nll": 1.0}, {"nll": 0.1})], "regression")])
    assert joined.datasets == ["one", "two", "three"]
    with pytest.raises(ValueError, match="one kind"):
        Comparison.joined([found, Comparison([], "classification")])
    with pytest.raises(KeyError, match="3 rows of 'a'"):
        found["a"]


def test_a_failure_ranks_last() -> None:
    found = rows()
    result = found.rank_test()
    assert result.names == ("a", "b & c", "d|e", "late") or list(result.names) == ["a", "b & c", "d|e", "late"]
    assert torch.allclose(result.average, torch.tensor([1.5, 1.5, 3.0, 4.0]).double())


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
