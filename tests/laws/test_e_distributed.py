"""Laws E1, E2 and E4: the same results by 1, 2 and 4 processes, and states that any number of them can go on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import distributed_cases as cases
from tests.elsewhere import FOLDER, Elsewhere

MANY = (2, 4)
Found = dict[tuple[str, int, int], dict[str, Any]]


CASES = Elsewhere("tests.distributed_cases", FOLDER)


@pytest.fixture(scope="module")
def found() -> Found:
    """Results by (case, number of processes, rank)."""
    folder, _ = CASES.finished()
    files = {tuple(file.stem.split("-")): file for file in folder.glob("*-*-*.pt")}
    return {(name, int(w), int(r)): torch.load(file, weights_only=True) for (name, w, r), file in files.items()}


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of entries that are not the same bit by bit."""
    same = {n: torch.equal(v, b[n]) if isinstance(v, torch.Tensor) else v == b[n] for n, v in a.items() if n in b}
    return sorted({*a, *b} - {name for name, equal in same.items() if equal})


def of(found: Found, case: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Results of one case by (number of processes, rank)."""
    return {(w, r): value for (name, w, r), value in found.items() if name == case}


@pytest.mark.parametrize("name", ["accumulator", "gram", "dual", "primal"])
def test_E1_ordered_reductions_are_bitwise_equal_for_any_number_of_processes(name, found):
    """The R × R accumulator, the tiled Gram, and 60 steps of CG with three right-hand sides."""
    results = of(found, "reductions")
    assert sorted(results) == [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    one = results[1, 0][name]
    assert one.abs().max() > 0
    assert all(torch.equal(one, other[name]) for other in results.values())


@pytest.mark.parametrize("case", ["one_pass", "ella", "sampled"])
def test_E1_passes_are_bitwise_equal_for_any_number_of_processes(case, found):
    """Behind the usual calls, also without a process group (0): a shuffled loader, a classifier, EM in weight space."""
    results = of(found, case)
    assert sorted(results) == [(0, 0), (1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert {key: different(results[0, 0], other) for key, other in results.items()} == {key: [] for key in results}


def test_E1_the_sampled_evidence_by_rows_is_bitwise_equal_for_any_number_of_processes(found):
    """In data space: precisions, noise, mode, draws and standard errors, by kept rows of the Gram and by passes."""
    results = of(found, "dual")
    del results[0, 0]
    assert sorted(results) == [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert all(float(value.abs().max()) > 0 for value in results[1, 0].values())
    assert {key: different(results[1, 0], other) for key, other in results.items()} == {key: [] for key in results}


def test_E1_the_sampled_evidence_by_rows_is_right(found):
    """That of one process without a group, but for other rounding of the same steps."""
    results = of(found, "dual")
    shared = results[4, 3]
    for name, value in results[0, 0].items():
        torch.testing.assert_close(shared[name], value, rtol=1e-8, atol=1e-8 * float(value.abs().max()))


def test_E1_the_sums_of_a_shared_pass_are_right(found):
    """Against the Jacobian: ψ = J Dᵀ with the directions D that the landmarks span, group by group."""
    lin, x, y = cases.deep(2, dtype=torch.float64)
    one = of(found, "one_pass")[4, 3]
    jacobian = lin.jacobian(x)  # shape: (N, C, P)
    squares = torch.stack([lin.groups.sum_per_group(jacobian[:, c].square()).sum(0) for c in range(2)])
    torch.testing.assert_close(one["traces"], squares, rtol=1e-11, atol=0)
    assert one["num_data"] == len(x)
    for c in range(2):
        psi = jacobian[:, c] @ one["directions"].mT
        targets = y[:, c] - lin(x)[:, c] + jacobian[:, c] @ lin.theta
        torch.testing.assert_close(one["second"][c].tril(), (psi.mT @ psi).tril(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(one["cross"][c][:, 0], psi.mT @ targets, rtol=1e-9, atol=1e-9)
    assert torch.equal(one["low"], y.double().amin(0))
    assert torch.equal(one["high"], y.double().amax(0))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_E1_the_panels_of_a_gram_are_right_and_the_same(world, found):
    """Behind ``lin.grams`` and in symmetric storage, against the Jacobian."""
    results = of(found, "gram")
    one = results[1, 0]
    lin, x, _ = cases.deep(2, 600)
    jacobian = lin.jacobian(x).double().flatten(0, 1)
    for g in range(len(lin.groups)):
        part = jacobian[:, lin.groups.index == g]
        torch.testing.assert_close(one["corner"][g], part[-70:] @ part[:70].mT, rtol=1e-4, atol=1e-4)
    for rank in range(world):
        assert results[world, rank]["same"]
        assert different(one, results[world, rank]) == []


def test_E1n_all_reduce_differs(found):
    """Rounding of a sum in another order, amplified by CG that has not converged."""
    results = of(found, "reductions")
    one = results[1, 0]["fast"]
    assert torch.equal(one, results[1, 0]["primal"])
    for world in MANY:
        assert float((results[world, 0]["fast"] - one).abs().max() / one.abs().max()) > 1e-4


def test_E1_the_parts_are_right(found):
    lin, x, _ = cases.problem()
    jacobian, landmarks = (lin.jacobian(rows).flatten(0, 1) for rows in (x, x[::32]))
    features = jacobian @ landmarks.mT
    one = of(found, "reductions")[1, 0]
    torch.testing.assert_close(one["accumulator"], features.mT @ features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one["gram"], jacobian @ jacobian.mT, rtol=1e-11, atol=1e-11)


def furthest(found: Found, label: str) -> dict[tuple[int, int], float]:
    """Largest difference of the parameters after five steps to those of one process; they are of the order of one."""
    results = of(found, "ddp")
    one = {name: value for name, value in results[1, 0].items() if name.startswith(label)}
    assert any(name.endswith("inducing_points") for name in one)
    return {
        key: max(float((other[name] - value).abs().max()) for name, value in one.items())
        for key, other in results.items()
    }


@pytest.mark.parametrize("label", ["own", "stock"])
def test_E2_ddp_is_one_process_with_the_same_global_batch(label, found):
    """Five steps of Adam, 16 inducing inputs; by GPyTorch's strategy too, where it was initialised before wrapping."""
    assert max(furthest(found, label).values()) <= 1e-12


def test_E2n_ddp_without_initialisation_lets_ranks_diverge(found):
    """GPyTorch's strategy draws its start at the first forward pass, after DDP has made the ranks equal."""
    results = of(found, "ddp")
    for world in MANY:
        first = results[world, 0]
        gaps = [
            float((value - first[name]).abs().max())
            for (w, r), other in results.items() if w == world and r
            for name, value in other.items() if name.startswith("raw")
        ]  # fmt: skip
        assert max(gaps) > 1e-4


def test_E2_fit_by_many_processes_is_that_of_one(found):
    """``VariationalNTKGP.fit``: minibatches shared by rows, Monte Carlo on the likelihood; ranks equal bit by bit."""
    results = of(found, "variational")
    for name, value in results[1, 0].items():
        for (world, _), other in results.items():
            torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12 * float(value.abs().max()))
            assert torch.equal(other[name], results[world, 0][name])


def test_E4_a_gram_saved_by_two_processes_is_loaded_by_any_number(found):
    """Sharded by rows with torch's distributed checkpoint; bit by bit."""
    results = of(found, "stored")
    gram = results[2, 0]["gram"]
    assert gram.shape == (512, 512)
    torch.testing.assert_close(gram, of(found, "reductions")[1, 0]["gram"], rtol=1e-11, atol=1e-11)
    assert {world for world, _ in results} == {1, 2, 4}
    assert all(torch.equal(other["gram"], gram) and int(other["step"]) == 7 for other in results.values())


@pytest.mark.parametrize("origin", [1, 2, 4])
def test_E4_a_pass_goes_on_by_any_number_of_processes(origin, found):
    """From the middle of what others had kept, to the very same sums."""
    whole = of(found, "one_pass")[1, 0]
    results = of(found, "resumed")
    assert {world for world, _ in results} == {1, 2, 4}
    for (_, number), other in results.items():
        assert different(whole, {name: other[f"{name}-{origin}"] for name in whole}) == []
        if number == 0:
            assert 20 < int(other[f"seen-{origin}"]) < 60


def test_ranks_with_different_data_are_refused(found):
    results = of(found, "refused")
    assert set(results[1, 0].values()) == {""}
    for key, said in results.items():
        if key[0] > 1:
            assert "train_data: the processes were given different data" in said["data"]
            assert "train_data: the processes were given different data" in said["order"]
            assert "lin: the processes have different networks" in said["network"]
            assert "lin: the processes have different networks" in said["sampled"]
            assert "checkpoint: the processes differ in folder" in said["folder"]


def test_the_command_says_the_same_for_any_number_of_processes(found):
    results = of(found, "command")
    assert {value["code"] for value in results.values()} == {0}
    states = {value["state"] for value in results.values()}
    assert len(states) == 1
    assert len(states.pop()) == 64


def test_compare_over_ranks_is_compare_in_one_process(found):
    """The whole table on every rank, each method fitted once, a failure among them."""
    results = of(found, "compare")
    one = results[1, 0]
    assert one["methods"] == ["network", "diagonal", "broken", "gp"]
    assert one["failure"] == "RuntimeError: this one fails"
    assert one["files"] == 3
    assert {key: different(one, other) for key, other in results.items()} == {key: [] for key in results}
