"""Inputs that once gave a wrong number or a raw error, and are refused or reported by name."""

import logging

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.cli import main
from ntkgp.evaluation.training import seeded


class Stopped(nn.Module):
    """Half of its weights are hidden from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).detach().tanh())


def network() -> nn.Sequential:
    with seeded(0):
        layers = [
            nn.Linear(3, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Linear(8, 3),
        ]
        return nn.Sequential(*layers).double()


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_stopped_gradients_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with seeded(0), caplog.at_level(logging.WARNING, logger="ntkgp"):
        ntkgp.LinearizedNetwork(Stopped(), torch.randn(4, 3), groups="single")
    assert "differs from finite differences" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ntkgp"):
        ntkgp.LinearizedNetwork(network(), inputs(4))
    assert caplog.text == ""


def test_curvature_travels_with_the_state_dict() -> None:
    lin, x = ntkgp.LinearizedNetwork(network(), inputs(4)), inputs(20)
    labels = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(2))
    models = [ntkgp.ExactNTKGP(x, labels, ntkgp.CategoricalLikelihood(num_classes=3), lin).eval() for _ in range(2)]
    ntkgp.fit_evidence(models[0], curvature="full", tolerance=1e-5)
    models[1].load_state_dict(models[0].state_dict())
    assert models[1].curvature == "full"
    test = inputs(5) + 0.5
    torch.testing.assert_close(models[1](test).variance, models[0](test).variance, rtol=1e-12, atol=0)


def test_residual_targets_with_the_posterior_mean_are_refused() -> None:
    lin, x = ntkgp.LinearizedNetwork(network(), inputs(4)), inputs(20)
    model = ntkgp.ExactNTKGP(x, torch.sin(x), gpytorch.likelihoods.GaussianLikelihood(), lin, mean="posterior")
    with pytest.raises(ValueError, match="mean='posterior'"):
        ntkgp.fit_evidence(model, targets="residual", held_out=True)


def test_a_loader_without_batches_is_refused() -> None:
    data = TensorDataset(inputs(6), inputs(6)[:, :2])
    with pytest.raises(ValueError, match="train_data: batch 0"):
        ntkgp.from_network(network(), DataLoader(data, batch_size=None))


def test_an_example_that_does_not_run_is_named() -> None:
    with pytest.raises(ValueError, match="example: the network does not run on it"):
        ntkgp.LinearizedNetwork(network(), torch.zeros(4, 5, dtype=torch.float64))


def test_a_text_file_is_no_weights(tmp_path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "w.pt").write_text("not weights at all\n")
    (tmp_path / "d.npz").write_bytes(b"")
    given = ["fit", "--network", "torch.nn:Identity", "--weights", str(tmp_path / "w.pt")]
    assert main([*given, "--data", str(tmp_path / "d.npz"), "--out", str(tmp_path)]) == 2
    assert "--weights" in capsys.readouterr().err
