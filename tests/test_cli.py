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
from ntkgp.cli.comparison import METHODS, Row, format_rows, latent_moments, regression_row
from ntkgp.evaluation import datasets, metrics
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


def _fit(place, factory, arrays, *extra, steps=150):
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
    return main(["fit", "--network", f"{name}:{factory}", *common, *extra]), net.eval()


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
    mean, latent = latent_moments(model.eval(), x_test)
    torch.testing.assert_close(mean, predictions["mean"])
    torch.testing.assert_close(latent, predictions["latent_variance"], rtol=1e-6, atol=1e-9)


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
    rows = [line for line in table.splitlines() if line.startswith(("diabetes ", "digits "))]
    for data in ("diabetes", "digits"):
        assert [any(row.startswith(data) and method.name in row for row in rows) for method in METHODS] == [True] * 4
    assert len(rows) == 8
    assert not any("nan" in row for row in rows)
    assert not any("inf" in row for row in rows)


def test_network_alone_uses_its_training_residual():
    data = datasets.diabetes(0)
    with seeded(0):
        net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).eval()
    row = regression_row(net, data, METHODS[0]).row
    with torch.no_grad():
        prediction = net(data.x_test).squeeze(-1).double()
        mse = (net(data.x_train).squeeze(-1).double() - data.y_train.double()).square().mean()
    scale = data.target_std
    normal = torch.distributions.Normal(prediction * scale, mse.sqrt() * scale)
    assert row.nll == pytest.approx(-float(normal.log_prob(data.y_test.double() * scale).mean()), rel=1e-9)
    assert row.error == pytest.approx(scale * float((prediction - data.y_test).square().mean().sqrt()), rel=1e-6)
    assert row.ood_auc == 0.5


def test_gp_row_is_the_model_in_original_units():
    data = datasets.diabetes(0, test_size=400)
    with seeded(0):
        net = nn.Sequential(nn.Linear(10, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))
    train(net, data.x_train, data.y_train, steps=50)
    result = regression_row(net, data, METHODS[3])
    lin = ntkgp.LinearizedNetwork(net, data.x_train[:8])
    j, j_test = lin.jacobian(data.x_train).squeeze(1).double(), lin.jacobian(data.x_test).squeeze(1).double()
    precision = lin.groups.expand(result.report.precision)
    noise = float(result.report.noise)
    weights = torch.linalg.inv(j.T @ j / noise + torch.diag(precision))
    variance = ((j_test @ weights * j_test).sum(-1) + noise) * data.target_std**2
    torch.testing.assert_close(result.variance, variance, rtol=1e-5, atol=0)
    mean = net(data.x_test).detach().double().squeeze(-1) * data.target_std + data.target_mean
    torch.testing.assert_close(result.mean, mean)


def test_table_aligns_and_marks_what_does_not_apply():
    rows = [
        Row("diabetes", "single λ at θ̃", 5.5, 54.3, None, 0.95, 0.5, 1.2),
        Row("digits", "groups at θ⋆", 0.25, 0.9312, 0.02, None, 0.9, 100.0),
    ]
    header, rule, first, blank, second = format_rows(rows).splitlines()
    assert blank == ""
    assert first.replace("\u0303", "").index("5.500") == second.index("0.250")
    assert len(first.replace("\u0303", "")) == len(second) == len(rule) == len(header)
    assert "–" in first
    assert "0.931" in second
