"""The commands: what they write, what the numbers are, and what they say about mistakes."""

from __future__ import annotations

import math
import sys

import gpytorch
import numpy as np
import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.cli import main
from ntkgp.cli.demo import METHODS
from ntkgp.evaluation import datasets, metrics
from ntkgp.evaluation.comparison import Comparison
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evaluation.training import seeded, train
from ntkgp.models import ExactNTKGP

NETWORKS = """
import torch
from torch import nn


def regression():
    return nn.Sequential(nn.Linear(1, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))


def pair():
    return nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def classes():
    return nn.Sequential(nn.Linear(2, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def binary():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


def wrong():
    return 3


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = regression()

    def forward(self, x):
        return self.inner(x)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module of networks, as the current folder."""
    name = "networks_of_the_cli_tests"
    (tmp_path / f"{name}.py").write_text(NETWORKS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path, name
    sys.modules.pop(name, None)


def _network(name, factory, seed=0):
    sys.path.insert(0, ".")
    try:
        with seeded(seed):
            return getattr(__import__(name), factory)()
    finally:
        sys.path.remove(".")


def _fit(place, factory, arrays, *extra, steps=150, command="fit"):
    folder, name = place
    net = _network(name, factory)
    x, y = torch.as_tensor(arrays["x"]), torch.as_tensor(arrays["y"])
    if factory == "binary":
        net.eval()
    else:
        train(net, x, y, steps=steps)
    torch.save(net.state_dict(), folder / "w.pt")
    np.savez(folder / "data.npz", **arrays)
    common = ["--weights", "w.pt", "--data", "data.npz", "--out", "out"]
    return main([command, "--network", f"{name}:{factory}", *common, *extra]), net.eval()


def _regression_arrays():
    x, y = datasets.toy_gap(30, seed=1)
    x_test, y_test = datasets.toy_gap(12, seed=2)
    return {"x": x.numpy(), "y": y.numpy(), "x_test": x_test.numpy(), "y_test": y_test.numpy()}


def _classification_arrays(classes=3):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(36) % classes
    x = torch.randn(36, 2, generator=g) * 0.6 + torch.stack([labels - 1.0, (labels == 1).float()], dim=-1)
    test = slice(24, None)
    x, y = x.numpy(), labels.numpy()
    return {"x": x[:24], "y": y[:24], "x_test": x[test], "y_test": y[test]}


def test_fit_regression_writes_what_the_library_computes(place, capsys):
    arrays = _regression_arrays()
    state = torch.get_rng_state()
    status, net = _fit(place, "regression", arrays)
    assert status == 0
    out = place[0] / "out"
    assert {p.name for p in out.iterdir()} == {"report.txt", "posterior.pt", "predictions.npz", "figure.png"}
    report = (out / "report.txt").read_text(encoding="utf-8")
    assert report.strip() in capsys.readouterr().out
    assert "30 points, regression" in report
    assert torch.equal(state, torch.get_rng_state())

    predictions = {key: torch.as_tensor(value) for key, value in np.load(out / "predictions.npz").items()}
    x_test = torch.as_tensor(arrays["x_test"])
    torch.testing.assert_close(predictions["mean"].float(), net(x_test).detach().squeeze(-1))
    variance = predictions["latent_variance"] + predictions["noise_variance"]
    nll = metrics.gaussian_nll(predictions["mean"], variance, torch.as_tensor(arrays["y_test"]))
    assert f"{'test NLL':20s} {float(nll):.5g}" in report

    # The stored state makes the same posterior again, in a model that has seen no evidence.
    lin = ntkgp.LinearizedNetwork(net, torch.as_tensor(arrays["x"])[:8])
    x, y = lin.pack(torch.as_tensor(arrays["x"])), torch.as_tensor(arrays["y"])
    model = ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), lin)
    state_dict = torch.load(out / "posterior.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state_dict.values())
    model.load_state_dict(state_dict)
    latent = GaussianProcess(model).predict(x_test).latent
    torch.testing.assert_close(latent.mean, predictions["mean"])
    torch.testing.assert_close(latent.variance, predictions["latent_variance"], rtol=1e-6, atol=1e-9)


def test_fit_regression_with_two_outputs_and_no_test_targets(place):
    x, y = datasets.toy_gap(20, seed=1)
    arrays = {"x": x.numpy(), "y": torch.stack([y, 1 - y], dim=-1).numpy(), "x_test": x.numpy()[:5]}
    status, _ = _fit(place, "pair", arrays, "--groups", "layer", "--mean", "posterior", "--method", "lbfgs")
    assert status == 0
    predictions = np.load(place[0] / "out" / "predictions.npz")
    assert predictions["mean"].shape == (5, 2)
    assert (predictions["latent_variance"] > 0).all()
    assert "test NLL" not in (place[0] / "out" / "report.txt").read_text(encoding="utf-8")


def test_fit_classification(place):
    arrays = _classification_arrays()
    status, _ = _fit(place, "classes", arrays, "--at", "theta_map")
    assert status == 0
    p = torch.as_tensor(np.load(place[0] / "out" / "predictions.npz")["probabilities"])
    torch.testing.assert_close(p.sum(-1), torch.ones(12).double())
    report = (place[0] / "out" / "report.txt").read_text(encoding="utf-8")
    accuracy = metrics.accuracy(p, torch.as_tensor(arrays["y_test"]))
    assert f"{'accuracy':20s} {float(accuracy):.5g}" in report
    assert "24 points, classification" in report


def test_fit_binary_with_one_logit(place):
    status, _ = _fit(place, "binary", _classification_arrays(classes=2))
    assert status == 0
    predictions = {k: torch.as_tensor(v) for k, v in np.load(place[0] / "out" / "predictions.npz").items()}
    scale = torch.sqrt(1 + math.pi / 8 * predictions["latent_variance"])
    expected = torch.sigmoid(predictions["latent_mean"] / scale)
    torch.testing.assert_close(predictions["probabilities"][:, 1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--network": "nothing"}, "--network: expected package.module:factory, got 'nothing'"),
        ({"--network": "no_such_module_here:f"}, "--network: cannot import 'no_such_module_here'"),
        ({"--network": "networks_of_the_cli_tests:absent"}, "has no function 'absent'"),
        ({"--network": "networks_of_the_cli_tests:wrong"}, "returned int, expected a torch.nn.Module"),
        ({"--network": "networks_of_the_cli_tests:pair"}, "w.pt does not fit the network"),
        ({"--weights": "absent.pt"}, "--weights: no file absent.pt"),
        ({"--weights": "data.npz"}, "--weights: data.npz is not a file of tensors only"),
        ({"--weights": "module.pt"}, "--weights: module.pt is not a file of tensors only"),
        ({"--weights": "tensor.pt"}, "--weights: tensor.pt holds Tensor, expected a state dict"),
        ({"--data": "absent.npz"}, "--data: no file absent.npz"),
        ({"--data": "w.pt"}, "--data: w.pt"),
        ({"--data": "no_y.npz"}, "needs arrays x and y (and may have x_test, y_test), got ['x']"),
        ({"--data": "short.npz"}, "--data: 30 rows in x, 29 in y"),
        ({"--data": "objects.npz"}, "--data: objects.npz is not an .npz file of plain arrays"),
        ({"--data": "text.npz"}, "--data: x holds <U1, expected numbers"),
        ({"--data": "empty.npz"}, "--data: x has shape (0, 1), expected at least one row"),
        ({"--data": "nan.npz"}, "NaN or infinite values (first in row 15)"),
        ({"--likelihood": "classification"}, "--data: classification needs integer labels in y, got float32"),
    ],
)
def test_fit_names_the_mistake(place, capsys, change, message):
    folder, name = place
    x, y = datasets.toy_gap(30)
    net = _network(name, "regression")
    torch.save(net.state_dict(), folder / "w.pt")
    torch.save(nn.Linear(1, 1), folder / "module.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    x, y = x.numpy(), y.numpy()
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "no_y.npz", x=x)
    np.savez(folder / "short.npz", x=x, y=y[:29])
    np.savez(folder / "objects.npz", x=np.array([{}, None], dtype=object), y=y[:2])
    np.savez(folder / "text.npz", x=np.array(["a", "b"]), y=y[:2])
    np.savez(folder / "empty.npz", x=x[:0], y=y[:0])
    np.savez(folder / "nan.npz", x=np.where(x > 0, np.nan, x).astype(np.float32), y=y)
    arguments = {"--network": f"{name}:regression", "--weights": "w.pt", "--data": "data.npz", "--out": "out", **change}
    status = main(["fit", *(word for pair in arguments.items() for word in pair)])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("ntkgp: error: ")
    assert message in error
    assert not (folder / "out").exists()


def test_unknown_commands_and_choices_are_refused(capsys):
    for arguments in ([], ["train"], ["fit"], ["demo", "--seed", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert "ntkgp" in capsys.readouterr().out


def test_demo_quick(tmp_path, capsys):
    state = torch.get_rng_state()
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert torch.equal(state, torch.get_rng_state())
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 50_000
    table = (tmp_path / "demo" / "table.txt").read_text(encoding="utf-8")
    assert table.strip() in out
    first, second, _ = table.split("\n\n")
    for data, part in (("diabetes", first), ("digits", second)):
        rows = [line for line in part.splitlines() if f"  {data}  " in line]
        assert [row.split("  ")[0] for row in rows] == list(METHODS)
    assert "failed" not in table
    assert not any(word in table for word in ("nan", "inf"))


def test_compare_writes_what_the_library_computes(place, capsys):
    arrays = _regression_arrays()
    folder, _ = place
    status, net = _fit(place, "Own", arrays, "--methods", "network", "gp", "laplace-diagonal", command="compare")
    assert status == 0
    out = capsys.readouterr().out
    found = Comparison.from_csv(folder / "out" / "scores.csv", "regression")
    x, y, x_test, y_test = (torch.as_tensor(arrays[name]) for name in ("x", "y", "x_test", "y_test"))
    expected = ntkgp.compare(net, (x, y), (x_test, y_test), ["network", "gp"], isolate=False)
    for method in ("network", "gp"):
        assert found[method].scores == pytest.approx(expected[method].scores, rel=1e-5)
        assert found[method].memory > 0  # in a process that found the network's class
    assert (folder / "out" / "figure.png").stat().st_size > 10_000
    assert "laplace-diagonal" in (folder / "out" / "table.md").read_text(encoding="utf-8")
    assert "\\toprule" in (folder / "out" / "table.tex").read_text(encoding="utf-8")
    assert "table.md" in out
    without = {name: arrays[name] for name in ("x", "y")}
    assert _fit(place, "Own", without, command="compare", steps=1)[0] == 2
    assert "needs arrays x_test and y_test" in capsys.readouterr().err
