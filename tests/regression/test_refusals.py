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
from ntkgp.evidence import sampled_evidence


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


class Padded(nn.Module):
    """Whole numbers and float32 inside, and a padding row that is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=1)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
        with torch.no_grad():
            self.table.weight[1] = 3.0

    def forward(self, x: Tensor) -> Tensor:
        scale = nn.functional.one_hot(x[:, 0].long(), 4).float()
        return self.head(self.norm(self.table(x.int()).mean(1) + scale.mean(1, keepdim=True)).tanh())


def test_a_kink_beside_the_inputs_is_no_stopped_gradient(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for p, value in zip(net.parameters(), (1.0, -1.0, 1.0, 1.0), strict=True):
            p.fill_(value)
    with caplog.at_level("WARNING", logger="ntkgp"):
        ntkgp.LinearizedNetwork(net, torch.tensor([[1.0003], [0.2]], dtype=torch.float64))
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_rows_are_no_stopped_gradients(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.tensor([[0, 1, 1], [2, 1, 3], [1, 1, 1]])
    with seeded(0), caplog.at_level(logging.WARNING, logger="ntkgp"):
        lin = ntkgp.LinearizedNetwork(Padded().to(dtype), x)
    assert "differs from finite differences" not in caplog.text
    assert lin.grams(x).isfinite().all()


def test_single_precision_inside_is_no_error() -> None:
    """``.float()`` in front of a layer, which the float64 copies of the network cannot take as it is."""

    class Pixels(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    with seeded(0):
        net = Pixels(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    lin = ntkgp.LinearizedNetwork(net, torch.tensor([[0, 10, 200], [255, 3, 7]], dtype=torch.uint8))
    assert lin.groups.names == ("0", "rest")
    assert lin.groups.verify(torch.tensor([[0, 10, 200], [255, 3, 7]], dtype=torch.uint8))[0] < 1e-5


def test_frequencies_do_not_scale_the_jacobian() -> None:
    x = torch.tensor([[0, 0, 2], [3, 3, 3]])
    with seeded(0):
        plain = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(9, 2)).double()
    scaled = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(9, 2)).double()
    scaled.load_state_dict(plain.state_dict())
    grams = [ntkgp.LinearizedNetwork(net, x).grams(x) for net in (plain, scaled)]
    assert torch.equal(*grams)
    assert scaled[0].scale_grad_by_freq


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


def complex_targets() -> None:
    ntkgp.from_network(network(), (inputs(4), inputs(4).to(torch.complex128)))


def one_byte_of_diagonals() -> None:
    ntkgp.LinearizedNetwork(network(), inputs(4)).gram_diagonals(inputs(4), max_memory=1)


def an_output_that_is_none() -> None:
    ntkgp.LinearizedNetwork(network(), inputs(4)).factors(inputs(2), outputs=torch.tensor([0, 3]))


def complex_vector() -> None:
    lin = ntkgp.LinearizedNetwork(network(), inputs(4))
    lin.jvp(inputs(4), lin.theta.to(torch.complex128))


def an_example_of_another_kind() -> None:
    class Pair(nn.Linear):
        def forward(self, ids: Tensor | None = None, x: Tensor | None = None) -> Tensor:
            return super().forward(nn.functional.embedding(x, self.weight))

    ntkgp.LinearizedNetwork(Pair(3, 3), inputs(4))


def half_a_sample() -> None:
    data = inputs(6)
    lin = ntkgp.LinearizedNetwork(network(), data)
    model = ntkgp.NystromNTKGP((data, torch.sin(data)), gpytorch.likelihoods.GaussianLikelihood(), lin, 3)
    model.fit(progress=False).sample_functions(1.5)  # type: ignore[arg-type]


def no_landmarks() -> None:
    lin = ntkgp.LinearizedNetwork(network(), inputs(4))
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    sampled_evidence(lin, (inputs(6), torch.sin(inputs(6))), likelihood, num_landmarks=0)


def no_model() -> None:
    ntkgp.fit_evidence(ntkgp.LinearizedNetwork(network(), inputs(4)))  # type: ignore[arg-type]


def fitted(**options: object) -> None:
    lin = ntkgp.LinearizedNetwork(network(), inputs(4))
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    ntkgp.fit_evidence(ntkgp.ExactNTKGP(inputs(4), torch.sin(inputs(4)), likelihood, lin), **options)  # type: ignore[arg-type]


class Tripled(torch.autograd.Function):
    """What torch.func cannot take apart."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Opaque(nn.Module):
    """A layer of its own kind."""

    def forward(self, x: Tensor) -> Tensor:
        return Tripled.apply(x)


def without_a_second_derivative() -> None:
    net = nn.Sequential(nn.Linear(3, 4), Opaque(), nn.Tanh(), nn.Linear(4, 1)).double()
    ntkgp.baselines.HessianFreeLaplace(net, model="tangent", noise=0.1).fit((inputs(4), inputs(4)[:, :1]))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (complex_targets, TypeError, "train_data: expected targets that are real"),
        (one_byte_of_diagonals, ValueError, "max_memory: 1 B cannot hold .* smallest possible is"),
        (an_output_that_is_none, ValueError, "outputs: expected indices from 0 to 2"),
        (complex_vector, TypeError, "v: expected real numbers"),
        (an_example_of_another_kind, ValueError, "example: the network does not run on it"),
        (half_a_sample, ValueError, "num_samples: expected an integer"),
        (no_landmarks, ValueError, "num_landmarks: expected an integer"),
        (no_model, TypeError, "model: expected a model with evidence_problem"),
        (lambda: fitted(bounds=3), ValueError, "bounds must be two numbers"),
        (lambda: fitted(bounds=None), ValueError, "bounds must be two numbers"),
        (lambda: fitted(max_evaluations="many"), ValueError, "max_evaluations must be"),
        (lambda: fitted(tolerance="small"), ValueError, "tolerance must be"),
        (without_a_second_derivative, ValueError, "net: model='tangent' needs derivatives"),
    ],
)
def test_found_by_fuzzing(call, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("bad", ["one", torch.ones(4, dtype=torch.complex128), [1.0, "2"]])
def test_precisions_that_are_no_numbers(bad: object) -> None:
    net, data = network(), (inputs(4), torch.sin(inputs(4)))
    lin = ntkgp.LinearizedNetwork(net, inputs(4), groups="tensor")
    with pytest.raises(TypeError, match="precision: expected"):
        ntkgp.kernels.NeuralTangentKernel(lin, precision=bad)  # type: ignore[arg-type]
    for method in (ntkgp.baselines.Laplace, ntkgp.baselines.PriorOnly, ntkgp.baselines.HessianFreeLaplace):
        with pytest.raises(TypeError, match="precision: expected"):
            method(net, precision=bad).fit(data)
