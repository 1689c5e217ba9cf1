"""What is refused where no test of a room says so: each message names what came and what was expected."""

from __future__ import annotations

import copy
import gc
import io
import os
import runpy
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp import checkpoint, distributed, laws
from ntkgp.baselines import L2M, HessianFreeLaplace, Point, VariationalLaplace
from ntkgp.baselines.regularised import RegularisedLoss
from ntkgp.checkpoint import Checkpoint
from ntkgp.cli import main
from ntkgp.cli.ct import CTOptions, run_ct
from ntkgp.cli.inputs import CommandError
from ntkgp.evaluation.comparison import isolation
from ntkgp.evaluation.metrics import images
from ntkgp.evaluation.training import seeded
from ntkgp.evidence import evidence_bounds, one_pass
from ntkgp.evidence.gaussian import GaussianObjective
from ntkgp.evidence.hyperprior import PenalisedObjective
from ntkgp.evidence.recorded import RecordedObjective
from ntkgp.inverse import design, estimate_noise, load_dicom
from ntkgp.inverse.measured import AttenuationImage
from ntkgp.kernels import NystromKernel
from ntkgp.laws.adapters import BaselinesAdapter, DenseAdapter, LaplaceTorchAdapter
from ntkgp.laws.oracle import Dense
from ntkgp.laws.problems import problem
from ntkgp.laws.protocol import Fitted, NotApplicableError, Structure, Task
from ntkgp.likelihoods import MultioutputGaussianLikelihood
from ntkgp.solvers import TangentGram

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
        ).double()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


@pytest.fixture(scope="module")
def lin(net: nn.Module, x: Tensor) -> ntkgp.LinearizedNetwork:
    return ntkgp.LinearizedNetwork(net, x)


@pytest.fixture
def model(lin: ntkgp.LinearizedNetwork, x: Tensor) -> ntkgp.ExactNTKGP:
    return ntkgp.ExactNTKGP(x, x, GaussianLikelihood(), lin)


# --- linearised networks ---


def test_factors_of_another_linearised_network(net: nn.Module, lin: ntkgp.LinearizedNetwork, x: Tensor) -> None:
    other = ntkgp.LinearizedNetwork(net, x, groups="single").factors(x)
    for products in (lin.grams, lin.gram_diagonals):
        for pair in ((x, other), (other, x)):
            with pytest.raises(ValueError, match="factors: made by another network, or with other groups"):
                products(*pair)


class InPlaceOfAList(nn.Module):
    """Doubles by an operation that writes to its argument and returns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        torch._foreach_mul_([x], 2.0)
        return x


def test_writes_that_return_nothing_are_no_proof_of_invariance(x: Tensor) -> None:
    for layer, normalised in ((nn.Identity(), True), (InPlaceOfAList(), False)):
        net = nn.Sequential(nn.Linear(2, 4), layer, nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
        assert any(ntkgp.LinearizedNetwork(net, x).groups.is_normalized) == normalised


def test_grams_of_other_inputs(lin: ntkgp.LinearizedNetwork, x: Tensor) -> None:
    with pytest.raises(ValueError, match="grams: expected 16 rows, N·C of the inputs, got 6"):
        TangentGram(lin, x, grams=lin.symmetric_grams(x[:3]))


def test_kernels_have_no_kernel_per_input_column(lin: ntkgp.LinearizedNetwork, x: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="NystromKernel does not support last_dim_is_batch"):
        NystromKernel(lin, x[:3]).forward(x, x, last_dim_is_batch=True)


def test_values_without_an_output_dimension() -> None:
    with pytest.raises(ValueError, match=r"values: expected shape \(\*batch, N, C\), got \(8,\)"):
        MultioutputGaussianLikelihood(GaussianLikelihood())(torch.zeros(8))
    assert not hasattr(MultioutputGaussianLikelihood(FixedNoiseGaussianLikelihood(torch.ones(8, 2))), "raw_noise")


# --- models and evidence ---


def test_bounds_of_a_model_at_other_precisions(model: ntkgp.ExactNTKGP) -> None:
    with pytest.raises(ValueError, match="precision, noise: a model has its own; expected None"):
        evidence_bounds(model.eval(), torch.ones(2))


def test_statistics_beyond_the_budget() -> None:
    with seeded(0):
        data, net = torch.randn(40, 2), nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 2))
    lin, likelihood = ntkgp.LinearizedNetwork(net, data, groups="single"), MultitaskGaussianLikelihood(2, rank=0)
    # Features that differ, and one noise for each output: the sums are larger than the Grams of the landmarks.
    message = r"max_memory: 500 KiB is too small for the statistics of \d+ features .* smallest possible is 5\d\d KiB"
    with pytest.raises(ValueError, match=message):
        one_pass(lin, (data, data), likelihood, num_landmarks=40, tolerance=0.0, max_memory=500 * 2**10)


@pytest.mark.parametrize("size", [0, -3])
def test_one_pass_in_batches_of_nothing(lin: ntkgp.LinearizedNetwork, x: Tensor, size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: expected a positive number, got {size}"):
        one_pass(lin, (x, x), GaussianLikelihood(), num_landmarks=4, batch_size=size)


def test_an_interrupt_before_the_first_evidence(model: ntkgp.ExactNTKGP, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(GaussianObjective, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted before the first evaluation of the evidence"):
        ntkgp.fit_evidence(model)


@pytest.mark.parametrize("kind", [PenalisedObjective, RecordedObjective])
def test_objectives_are_copied_without_what_they_stand_for(kind: Callable[[Any, Any], Any]) -> None:
    inner = types.SimpleNamespace(size=7)
    assert copy.copy(kind(inner, None)).size == 7
    with pytest.raises(AttributeError):
        _ = kind.__new__(kind).size  # type: ignore[attr-defined]


def test_training_data_of_a_loader_are_not_saved(lin: ntkgp.LinearizedNetwork, x: Tensor, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(x, x), batch_size=4)
    found = ntkgp.NystromNTKGP(loader, GaussianLikelihood(), lin, num_landmarks=3).fit(progress=False)
    with pytest.raises(ValueError, match=r"training_data: those of a loader .* expected False"):
        found.save(tmp_path / "model.pt", training_data=True)


Pair = namedtuple("Pair", "a b")


class OfAPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, pair: Pair) -> Tensor:
        return torch.tanh(self.one(pair.a) + self.two(pair.b))


def test_inputs_of_a_class_of_the_user_need_an_example(x: Tensor, tmp_path: Path) -> None:
    net, pair = OfAPair(), Pair(x.float(), x.float())
    lin = ntkgp.LinearizedNetwork(net, pair)
    found = ntkgp.NystromNTKGP((pair, torch.randn(8, 3)), GaussianLikelihood(), lin, 3).fit(progress=False)
    found.save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="example: the network's inputs are of classes that no file holds; give some"):
        ntkgp.load(tmp_path / "model.pt", net)
    assert ntkgp.load(tmp_path / "model.pt", net, example=pair).lin.num_outputs == 3


# --- comparators ---


def test_a_failed_fit_leaves_no_half_of_one(net: nn.Module, x: Tensor) -> None:
    method = HessianFreeLaplace(net, precision=torch.ones(7))
    with pytest.raises(ValueError, match=r"precision: expected a number or shape \(2,\), got \(7,\)"):
        method.fit((x, x))
    with pytest.raises(RuntimeError, match=r"HessianFreeLaplace: call fit\(train_data\) first"):
        method.predict(x)


def test_layers_without_the_derivatives_that_a_method_needs(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * (1 - ctx.saved_tensors[0].tanh().square())

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    custom = nn.Sequential(nn.Linear(2, 3), Layer(), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match="net: cannot be differentiated twice; variational Laplace needs the gradient"):
        VariationalLaplace(custom, epochs=1).fit((x, x))

    def missing(*_: Any) -> Any:
        raise NotImplementedError("the derivative of a layer is not implemented")

    # torch implements such a derivative of one layer after the other.
    monkeypatch.setattr(RegularisedLoss, "output_gradient_norms", missing)
    with pytest.raises(ValueError, match=r"net: model='tangent' needs derivatives .* \(the derivative of a layer"):
        HessianFreeLaplace(net, precision=1.0, noise=0.1, model="tangent").fit((x, x))


@pytest.fixture(scope="module")
def optimizer(net: nn.Module, x: Tensor) -> torch.optim.Optimizer:
    own = copy.deepcopy(net)
    found = torch.optim.Adam(own.parameters(), weight_decay=1e-2)
    nn.functional.mse_loss(own(x), x).backward()
    found.step()
    return found


def test_optimisers_that_say_too_little(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"noise: expected the σ² of the Gaussian likelihood .* \(loss='nll'\)"):
        L2M(net, optimizer=state, loss="nll", batch_size=4, variant="corrected").fit((x, x))
    state["state"][0]["exp_avg_sq"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"optimizer: second moments of '0\.weight' are negative, NaN or infinite"):
        L2M(net, optimizer=state, variant="paper").fit((x, x))


def test_states_of_nothing(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="state: none of a Point with these options: missing 'method'"):
        Point(net).load_state_dict({}, x)


# --- many processes ---


def test_fast_sums_of_fewer_shards_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="shards: 2 are fewer than the 3 processes, which fast=True needs"):
        distributed.ordered_sum({0: torch.ones(2)}, distributed.Shards(8, 2), fast=True)


def test_a_process_lost_at_the_start_frees_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Any) -> Any:
        raise distributed.LostProcess("gone")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "world_size", lambda: 2)
        patch.setattr(checkpoint, "broadcast_object", lost)
        with pytest.raises(distributed.LostProcess, match="gone"), Checkpoint(tmp_path).run():
            pass
    with Checkpoint(tmp_path).run() as run:
        assert run.state is None


# --- comparisons ---


def test_methods_run_here_where_no_process_can_be_forked(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "fork")
    found = ntkgp.compare(net, (x, x), (x, x), ["network"])
    assert found["network"].scores
    assert "all methods ran in one process" in found.notes[0]
    assert "this system cannot fork processes" in found.notes[0]


class OnlyHere:
    """Can be pickled, and be read where the module is that it names."""

    def __reduce__(self) -> Any:
        return __import__, ("there_is_no_such_module",)


class Here:
    """In place of the other interpreter: what that would do, in this one."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.stdin = io.BytesIO()
        isolation.serve(command[2].split("'")[1])

    def wait(self, timeout: float) -> int:
        return 0


def test_data_that_no_other_process_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.subprocess, "Popen", Here)
    with pytest.raises(isolation.Unsendable, match="cannot be read in another process: ModuleNotFoundError"):
        isolation.Workplace(print, OnlyHere(), int)


def test_more_pixels_than_a_dense_factor_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_LARGEST_DENSE", 3)
    image = torch.ones(2, 2)
    with pytest.raises(ValueError, match="covariance: 4 pixels are too many for a dense factor; give variance or samp"):
        images.score_image(image, image, torch.eye(4), data_range=1.0)


# --- inverse problems ---


def test_measurements_that_no_pixel_reaches() -> None:
    with pytest.raises(ValueError, match="A: its adjoint is zero on the measurements"):
        estimate_noise(torch.ones(3), ntkgp.inverse.DenseOperator(torch.zeros(3, 4), (2, 2)))


def test_an_interrupt_before_the_first_choice_of_a_design(monkeypatch: pytest.MonkeyPatch) -> None:
    A = ntkgp.inverse.DenseOperator(torch.ones(3, 4), (2, 2))
    lin = ntkgp.LinearizedNetwork(nn.Linear(2, 4), torch.ones(1, 2), groups="single")
    model = ntkgp.InverseNTKGP(torch.ones(3), A, GaussianLikelihood(), lin).eval()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(design, "_score", interrupted)
    for choose in (lambda: design.greedy_design(model, [A], 1), lambda: design.expected_information_gain(model, [A])):
        with pytest.raises(KeyboardInterrupt) as kept:
            choose()
        # The traceback keeps generators alive, whose end comes when it goes.
        assert torch.is_grad_enabled()
        del kept
        gc.collect()
        assert torch.is_grad_enabled()


def test_a_file_that_is_not_dicom(monkeypatch: pytest.MonkeyPatch) -> None:
    class InvalidDicomError(Exception):
        pass

    def dcmread(_: Any) -> Any:
        raise InvalidDicomError

    module = types.ModuleType("pydicom")
    vars(module).update(dcmread=dcmread, errors=types.SimpleNamespace(InvalidDicomError=InvalidDicomError))
    monkeypatch.setitem(sys.modules, "pydicom", module)
    with pytest.raises(ValueError, match=r"path: scan\.dcm is not a DICOM file"):
        load_dicom("scan.dcm")


# --- commands ---


def test_a_tomogram_of_nothing() -> None:
    with pytest.raises(CommandError, match="--data, --example: expected one of the two"):
        run_ct(CTOptions(None, Path("out")))


def test_a_simulated_scan_without_noise_or_finer_than_its_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(b"")
    found = AttenuationImage(*torch.ones(2, 12, 10, dtype=DOUBLE), pixel_size=1.0)
    monkeypatch.setattr("ntkgp.cli.ct.load_dicom", lambda _: found)
    for option, message in (
        (["--noise", "0"], "--noise: expected a positive part of the mean line integral, got 0"),
        (["--size", "16"], "--size: the slice has 12 pixels, fewer than 16"),
    ):
        assert main(["ct", "--data", str(path), "--out", str(tmp_path / "out"), *option]) == 2
        assert message in capsys.readouterr().err


def test_targets_without_their_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 2)), y=np.zeros(3), y_test=np.zeros(3))
    given = ["--network", "torch.nn:Identity", "--weights", str(tmp_path / "weights.pt")]
    given += ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out")]
    torch.save({}, tmp_path / "weights.pt")
    assert main(["fit", *given]) == 2
    assert "data.npz has y_test but no x_test" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "fit", "evidence", "compare", "ct"])
def test_results_cannot_be_written_into_a_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    others = {"demo": [], "ct": ["--data", "d.npz"], "evidence": ["--example", "5"]}
    given = others.get(command, ["--network", "a:b", "--weights", "w.pt", "--data", "d.npz"])
    assert main([command, *given, "--out", str(file / "below")]) == 2
    assert f"--out: {file} is a file, expected a folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ntkgp.cli.inputs.os.access", lambda path, mode: False)  # root may write anywhere
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert f"--out: the folder {tmp_path} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "argument"), [("ntkgp", "--version"), ("ntkgp.laws", "--list")])
def test_modules_that_are_commands(module: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", [module, argument])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0


# --- laws ---


def task(name: str = "normalised", **changes: Any) -> Task:
    p = problem(name)
    return Task(copy.deepcopy(p.net), p.x, p.y, p.likelihood, p.precision, p.noise, **changes)


def test_what_the_comparators_do_not_claim() -> None:
    adapter = BaselinesAdapter()
    with pytest.raises(NotApplicableError, match="fits a noise for each output, tasks have one"):
        adapter.fit(task(structure="last layer", kind="last_layer")).optimum()
    hessian_free = task(structure="Hessian-free")
    with pytest.raises(NotApplicableError, match="do not end at such a condition number"):
        adapter.fit(replace(hessian_free, noise=1e-7))
    with pytest.raises(NotApplicableError, match="its mean is at the control's weights"):
        adapter.fit(replace(hessian_free, x=hessian_free.x[:5], y=hessian_free.y[:5])).mean(hessian_free.x)


def test_what_the_reference_does_not_define() -> None:
    dense = DenseAdapter().fit(task("softmax"))
    with pytest.raises(NotApplicableError, match="θ⋆ of a classification is a convention"):
        dense.posterior_mean(problem("softmax").x)
    with pytest.raises(NotApplicableError, match="no marginal likelihood in closed form"):
        dense.log_evidence()


class Library:
    """Fits by a function."""

    name = "library"

    def __init__(self, kind: str, fit: Callable[[Task], Fitted]) -> None:
        self.structures, self.fit = {"only": Structure(kind)}, fit


class Vague(Dense):
    """Learns no number."""

    def hyperparameters(self) -> tuple[Tensor, float]:
        return self.task.precision, float("nan")


def test_laws_that_say_nothing_and_numbers_that_are_none() -> None:
    silent = laws.check(Library("exact", lambda task: Fitted()), ["U7"])
    assert [(row.outcome, row.reason) for row in silent] == [("not applicable", "draws no random numbers")]
    broken = laws.check(Library("variational", Vague), ["C9"])
    assert [row.outcome for row in broken] == ["raises"]
    assert "learned precision" in broken[0].reason


def test_mistakes_of_the_reference_are_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(self: Dense, x: Tensor) -> Tensor:
        raise RuntimeError("of the reference")

    fitted = Fitted()
    monkeypatch.setattr(fitted, "covariance", lambda x: torch.eye(3).expand(len(x), 3, 3))
    monkeypatch.setattr(Dense, "covariance", mistaken)
    with pytest.raises(RuntimeError, match="of the reference"):
        laws.check(Library("exact", lambda task: fitted), ["B1"])


def test_laplace_torch_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise laws.adapters.laplace_torch.PackageNotFoundError(name)

    monkeypatch.setattr("ntkgp.laws.adapters.laplace_torch.version", missing)
    with pytest.raises(ImportError, match=r"laplace-torch is not installed: pip install laplace-torch==0\.3"):
        LaplaceTorchAdapter()
