"""The conformance suite: the package obeys it, and for each law a library that is wrong in one way does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ntkgp
from ntkgp import laws
from ntkgp.laws.__main__ import main
from ntkgp.laws.adapters import BaselinesAdapter, DenseAdapter, ModelsAdapter
from ntkgp.laws.oracle import Dense, outputs_and_jacobian, point_blocks, rel
from ntkgp.laws.problems import NAMES, problem
from ntkgp.laws.protocol import Fitted, Optimum, Structure, Task
from tests import reference as ref

DOUBLE = torch.float64


# --- the package ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["exact, dual", "exact, primal", "Nyström", "variational"])
def test_models_obey_the_laws(structure):
    # The two forms of the exact model share what is left out here, and tests/laws has it for both.
    chosen = ["B1", "B4", "B8", "B14", "D1", "U1"] if structure == "exact, primal" else None
    report = laws.check(ModelsAdapter(), chosen, [structure])
    assert report.ok, str(report)
    assert report.counts()["holds"] >= {"exact, dual": 30, "exact, primal": 6}.get(structure, 8)


@pytest.mark.parametrize("structure", ["full", "last layer", "subnetwork", "diagonal", "KFAC"])
def test_comparators_obey_the_laws(structure):
    report = laws.check(BaselinesAdapter(), ["B1", "B17", "D3", "U1", "U5"], [structure])
    assert report.ok, str(report)
    assert report.counts()["holds"] == 5


def test_hessian_free_obeys_what_it_claims():
    report = laws.check(BaselinesAdapter(), ["B1-joint", "B11", "D1"], ["Hessian-free"])
    assert report.ok, str(report)
    assert [report.outcome(name) for name in ("B1-joint", "B11", "D1")] == ["not applicable", "holds", "not applicable"]


# --- the reference itself -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_references_written_apart_agree(name):
    """One by vmapped jacrev and dense algebra in scaled weights, one row by row by backward passes."""
    p = problem(name)
    f, j = outputs_and_jacobian(p.net, p.x)
    own = ref.jacobian(p.net, p.x)
    assert rel(f, ref.outputs(p.net, p.x)) < 1e-12
    assert rel(j, own) < 1e-12
    task = Task(copy.deepcopy(p.net), p.x, p.y, p.likelihood, p.precision, p.noise)
    dense, index = Dense(task), torch.cat([torch.full((q.numel(),), i) for i, q in enumerate(p.net.parameters())])
    entries = p.precision[index]
    test = ref.jacobian(p.net, p.x_test).flatten(0, 1)
    if p.likelihood == "classification":
        h = own.flatten(0, 1).T @ ref.curvature(f) @ own.flatten(0, 1) + entries.diag()
        assert rel(dense.joint_covariance(p.x_test), test @ torch.linalg.solve(h, test.T)) < 1e-9
        return
    targets = p.y.reshape(f.shape) - f + (j @ dense.theta)
    noise = torch.full((targets.numel(),), p.noise, dtype=DOUBLE)
    posterior = ref.gaussian_primal(own.flatten(0, 1), targets.flatten(), entries, noise, index)
    assert rel(dense.joint_covariance(p.x_test), test @ posterior.covariance @ test.T) < 1e-9
    assert rel(dense.effective_dimension(), posterior.gamma) < 1e-9
    assert dense.log_evidence() == pytest.approx(posterior.log_evidence, rel=1e-10)
    at_map = ref.map_log_evidence(own.flatten(0, 1), targets.flatten(), dense.theta, entries, noise, index)
    assert dense.log_evidence_map() == pytest.approx(at_map, rel=1e-10)


@pytest.mark.parametrize("at", ["theta_star", "theta_map"])
def test_optimum_of_the_reference_has_no_gradient(at):
    p = problem("normalised")
    dense = Dense(Task(copy.deepcopy(p.net), p.x, p.y, p.likelihood, p.precision, p.noise))
    best = dense.optimum(at, fit_noise=True)
    value = dense.log_evidence if at == "theta_star" else dense.log_evidence_map
    top = value(best.precision, best.noise)
    assert top > value()
    for i in range(len(best.precision) + 1):
        for step in (0.9, 1.1):
            precision, noise = best.precision.clone(), best.noise
            if i < len(precision):
                if precision[i] > 1e7:  # of a tensor without use the evidence rises for ever
                    continue
                precision[i] *= step
            else:
                noise *= step
            assert value(precision, noise) <= top + 1e-7


# --- negative controls ----------------------------------------------------------------------------


class Mutant(Dense):
    """The reference with methods replaced: ``Mutant(task, covariance=lambda dense, x: ...)``."""

    def __init__(self, task: Task, **methods: Callable) -> None:
        super().__init__(task)
        for name, method in methods.items():
            setattr(self, name, lambda *args, _m=method, **kwargs: _m(Dense(self.task), *args, **kwargs))


class Library:
    """A library with one mistake."""

    name = "wrong"

    def __init__(self, kind: str, fit: Callable[[Task], Fitted]) -> None:
        self.structures = {kind: Structure(kind)}
        self.fit = fit


def mutant(**methods: Callable) -> Callable[[Task], Fitted]:
    return lambda task: Mutant(task, **methods)


def given(**changes: Callable[[Task], object]) -> Callable[[Task], Fitted]:
    """The reference on a task that was misread."""
    return lambda task: Dense(replace(task, **{name: change(task) for name, change in changes.items()}))


def one_precision(task: Task) -> Tensor:
    return torch.full_like(task.precision, float(task.precision.mean()))


class Curvature(Dense):
    """The diagonal of diag(p) − ppᵀ, or a floor below it."""

    floor = 0.0

    @property
    def curvature(self) -> Tensor:
        b = Dense.curvature.func(self)
        return torch.diag_embed(b.diagonal(dim1=1, dim2=2)) if self.floor == 0 else b + self.floor * torch.eye(3)

    def at(self, precision=None, noise=None, kind=None):
        changes = {} if precision is None else {"precision": precision}
        return type(self)(replace(self.task, **changes))


class Floored(Curvature):
    floor = 0.1


class Unsteady(Dense):
    """Order of the weights matters."""

    def __init__(self, task: Task, _shared=None) -> None:
        super().__init__(task, _shared)
        self.entries = self.entries * torch.linspace(1, 2, len(self.entries), dtype=DOUBLE)


class Truncated(Dense):
    """Fewer features than landmarks."""

    @property
    def projection(self) -> Tensor:
        return Dense.projection.func(self)[:10]


class Careless(Fitted):
    """Remembers what it was asked, and its data twice over after a second fit."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def covariance(self, x: Tensor) -> Tensor:
        return Dense(self.task).covariance(x)

    def log_evidence_map(self, precision=None, noise=None) -> float:
        self.task = replace(self.task, precision=self.task.precision if precision is None else precision)
        return Dense(self.task).log_evidence_map()

    def refit(self) -> None:
        self.task = replace(self.task, x=torch.cat([self.task.x] * 2), y=torch.cat([self.task.y] * 2))


def evaluating(task: Task) -> Fitted:
    task.net.eval()
    task.net.output_size = 3
    return Dense(task)


def drawing(task: Task) -> Fitted:
    torch.rand(1)
    return Dense(task)


def shared_draws(dense: Dense, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Right for each input, perfectly correlated between them."""
    root = torch.linalg.cholesky(dense.covariance(x))
    return dense.mean(x) + torch.randn(size, 1, root.shape[-1], generator=generator, dtype=DOUBLE) @ root.mT[0] * 1.0


def transposed_root(dense: Dense, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draws by LᵀL in place of LLᵀ."""
    root = torch.linalg.cholesky(dense.joint_covariance(x))
    draws = torch.randn(size, len(root), generator=generator, dtype=DOUBLE) @ root
    return dense.mean(x) + draws.reshape(size, len(x), -1)


def of_last_inputs(dense: Dense, x: Tensor) -> Tensor:
    """The outputs of the test input and of the training input exchanged, as in laplace-torch 0.3."""
    c, n = dense.num_outputs, len(dense.f)
    cross = dense._features(x) @ dense.phi.T
    exchanged = cross.reshape(len(x), c, n, c).transpose(1, 3).reshape(len(x), c, n * c)
    a = dense.phi @ dense.phi.T + dense.task.noise * torch.eye(n * c, dtype=DOUBLE)
    reduction = exchanged @ torch.linalg.solve(a, exchanged.mT)
    return point_blocks(dense.prior_covariance(x), c) - reduction


def rows_of(task: Task) -> int:
    return len(task.x)


CONTROLS: dict[str, tuple[str, Callable[[Task], Fitted]]] = {
    "A1": ("exact", mutant(prior_covariance=lambda d, x: 1.001 * d.prior_covariance(x))),
    "A4": ("exact", given(noise=lambda t: 0.09)),
    "A5": ("exact", Unsteady),
    "A9": ("exact", mutant(covariance=lambda d, x: d.covariance(x) * (1 + 1e-6 * len(x)))),
    "B1": ("exact", mutant(covariance=of_last_inputs)),
    "B1-joint": ("exact", mutant(joint_covariance=lambda d, x: torch.block_diag(*d.covariance(x)))),
    "B2": ("exact", mutant(posterior_mean=lambda d, x: d.mean(x))),
    "B2-mean": ("exact", mutant(mean=lambda d, x: d.posterior_mean(x))),
    "B4": ("exact", mutant(log_evidence=lambda d, p=None, s=None: d.log_evidence_map(p, s))),
    "B8": ("exact", mutant(joint_covariance=lambda d, x: 1.001 * d.prior_covariance(x))),
    "B9": ("subset", given(precision=lambda t: t.precision * rows_of(t) / t.subset)),
    "B10": ("exact", mutant(update=lambda d, x, y: Dense(replace(d.task, x=x, y=y)))),
    "B11": ("exact", given(noise=lambda t: t.noise * rows_of(t) / 20)),
    "B12": ("exact", given(precision=lambda t: 1.01 * t.precision)),
    "B13": (
        "exact",
        mutant(joint_covariance=lambda d, x: d.joint_covariance(x) + d.task.noise * torch.eye(3 * len(x))),
    ),
    "B14": ("exact", given(noise=lambda t: max(t.noise, 1e-2))),
    "B15": ("exact", mutant(effective_dimension=lambda d: torch.tensor(d.sizes).double())),
    "B16": ("exact", mutant(optimum=lambda d: Optimum(d.task.precision))),
    "B17": ("exact", mutant(log_evidence_map=lambda d, p=None, s=None: d.at(p, s)._log_likelihood(d.f))),
    "B18": ("exact", mutant(log_evidence_map=lambda d, p=None, s=None: float(p.square().sum()))),
    "B20": ("exact", mutant(samples=transposed_root)),
    "B25": ("exact", mutant(optimum=lambda d: Optimum(d.task.precision))),
    "B26": ("exact", given(precision=one_precision)),
    "B29": ("exact", given(precision=one_precision)),
    "C3": ("nystrom", mutant(joint_covariance=lambda d, x: d.prior_covariance(x))),
    "C5": ("nystrom", Truncated),
    "C7": ("last_layer", mutant(joint_covariance=lambda d, x: d.at(kind="exact").prior_covariance(x))),
    "C9": ("variational", mutant(covariance=lambda d, x: 1.1 * d.covariance(x))),
    "C14": ("diagonal", mutant(log_evidence_map=lambda d, p=None, s=None: d.log_evidence_map(p, s) + d.logdet)),
    "D1": ("exact", Curvature),
    "D2": ("exact", Floored),
    "D3": ("exact", Curvature),
    "D5": ("exact", mutant(probabilities=lambda d, x: d.mean(x).softmax(-1))),
    "D9": ("exact", given(precision=one_precision)),
    "U1": ("exact", evaluating),
    "U2": ("exact", drawing),
    "U3": ("exact", Careless),
    "U4": ("exact", Careless),
    "U5": ("exact", given(noise=lambda t: t.noise * t.batch_size)),
    "U6": ("exact", mutant(covariance=lambda d, x: torch.diag_embed(d.covariance(x).diagonal(dim1=1, dim2=2)))),
    "U7": ("exact", mutant(samples=lambda d, x, size, g: d.samples(x, size, torch.default_generator))),
    "U8": ("exact", mutant(covariance=lambda d, x: d.covariance(x).float())),
}


def test_every_law_has_a_control():
    assert list(CONTROLS) == list(laws.LAWS)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_wrong_library_fails(name):
    kind, wrong = CONTROLS[name]
    report = laws.check(Library(kind, wrong), [name])
    assert report.outcome(name) == "fails", str(report)
    right = laws.check(Library(kind, Dense), [name])
    assert right.outcome(name) == "holds", str(right)


def test_draws_shared_by_inputs_fail():
    draws = mutant(samples=shared_draws)
    report = laws.check(Library("exact", draws), ["B20"])
    assert report.outcome("B20") == "fails"


# --- the suite ------------------------------------------------------------------------------------


class Silent:
    """Has a covariance and nothing else, not even the base class."""

    name = "silent"
    structures = {"only": Structure("exact")}  # noqa: RUF012

    def fit(self, task: Task) -> object:
        class Only:
            def covariance(self, x: Tensor) -> Tensor:
                return Dense(task).covariance(x)

        return Only()


def test_a_missing_method_is_not_applicable():
    report = laws.check(Silent(), ["B1", "B4", "B8", "U3"])
    assert [report.outcome(name) for name in ("B1", "B4", "B8", "U3")] == [
        "holds", "not applicable", "holds", "not applicable",
    ]  # fmt: skip
    assert "log_evidence" in next(row.reason for row in report if row.law == "B4")


def test_errors_are_rows():
    def broken(task: Task) -> Fitted:
        raise RuntimeError("einsum | nonsense\nand more")

    report = laws.check(Library("exact", broken), ["B1"])
    assert not report.ok
    assert {row.outcome for row in report} == {"raises"}
    assert report.counts() == {"holds": 0, "fails": 0, "raises": 1, "not applicable": 0}
    table = report.to_markdown()
    assert "RuntimeError: einsum \\| nonsense" in table
    assert "and more" not in table
    assert report.to_markdown(details=False).count("\n") == 2


def test_arguments_are_checked():
    with pytest.raises(KeyError, match="laws: unknown"):
        laws.check(DenseAdapter(), ["Z1"])
    with pytest.raises(KeyError, match="structures: unknown"):
        laws.check(DenseAdapter(), ["B1"], ["everything"])
    with pytest.raises(TypeError, match="adapter"):
        laws.check("laplace")
    with pytest.raises(ValueError, match="kind"):
        Structure("dense")
    with pytest.raises(ValueError, match="name"):
        problem("linear")


def test_nothing_global_changes():
    state = torch.random.get_rng_state()
    laws.check(Library("exact", drawing), ["B1"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_command_line(capsys):
    assert main(["--adapter", "dense", "--laws", "C14", "--structures", "diagonal", "--markdown"]) == 0
    assert "| C14 |" in capsys.readouterr().out
    assert main(["--adapter", "dense", "--laws", "Z9"]) == 2
    assert "unknown" in capsys.readouterr().err
    assert main(["--list"]) == 0
    assert "B1-joint" in capsys.readouterr().out


def test_the_package_does_not_load_the_suite():
    root = Path(ntkgp.__file__).parent
    importing = [
        path
        for path in root.rglob("*.py")
        if "laws" not in path.relative_to(root).parts and "ntkgp.laws" in path.read_text()
    ]
    assert importing == []
