"""The benchmarks at tiny sizes: their networks, their peers, and that they measure and report what they say."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ntkgp
from benchmarks import cells, contenders, gram, jax_peer, products, report, timing
from benchmarks.contenders import Cell, Reference
from benchmarks.nets import NETS, make
from benchmarks.peers import PEERS, run_peer
from tests.fresh import FreshInterpreter

DOUBLE = torch.float64
# f(x)[0, 0]; K[0, 0, 63, 0]; the sum and the largest entry of K at rows R and columns R reversed; P.
CHECK_VALUES = {
    "a": (0.2973115611, 6.724948699, 87.9212861, 19.15676904, 2701),
    "b": (0.2181887216, 10.30863677, 3687.903088, 65.10340692, 669706),
    "c": (-0.0643537153, 2.922882174, 570.1033661, 5.94859314, 61706),
    "d": (0.1921725836, 11.83522909, 1823.181868, 12.76220762, 701466),
    "e": (-0.0157782078, 25.26654144, 2387.701821, 44.41060107, 45010),
}
ROWS = [0, 21, 42, 63]
# What a peer does not do, or does wrong (more than a relative 1e-5).
UNSUPPORTED = {
    ("nngeometry", "e"),
    ("laplace BackPACK", "e"),
    ("laplace ASDL", "e"),
    ("laplace BackPACK", "f"),
    ("laplace ASDL", "f"),
}


def dense(net: str, samples: int) -> Tensor:
    """The float64 kernel from the package's own Jacobians, (N, C, N, C)."""
    module, x = make(net, samples, DOUBLE)
    rows = ntkgp.LinearizedNetwork(module, x[:2]).jacobian(x)
    return torch.einsum("ncp,mdp->ncmd", rows, rows)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("net", CHECK_VALUES)
def test_networks_are_the_published_ones(net: str) -> None:
    module, x = make(net, 64, DOUBLE)
    lin = ntkgp.LinearizedNetwork(module, x[:2], groups="single")
    kernel = lin.grams(x[ROWS], x[ROWS[::-1]])[0].reshape(4, lin.num_outputs, 4, lin.num_outputs)
    found = (lin(x[:1])[0, 0], kernel[0, 0, 0, 0], kernel.sum(), kernel.abs().max(), lin.num_parameters)
    assert [float(value) for value in found] == pytest.approx(CHECK_VALUES[net], rel=2e-9)


def test_unet_maps_images_to_images() -> None:
    module, x = make("f", 2)
    assert module(x).shape == x.shape == (2, 1, 28, 28)
    assert sum(p.numel() for p in module.parameters()) == 117393


def test_make_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, second = make("d", 2)[0], make("d", 2)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("net", ["a", "c", "e"])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_the_kernel(peer: str, net: str) -> None:
    missing = PEERS[peer].missing()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    module, x = make(net, 5)
    if (peer, net) in UNSUPPORTED:
        with pytest.raises(Exception, match=r"layer Position|grad_batch|Sizes of tensors"):
            run_peer(peer, module, x, 2**30)
        return
    # One piece, and one sample or column at a time.
    for budget in (2**30, 1):
        assert error(run_peer(peer, copy.deepcopy(module), x, budget), dense(net, 5)) < 1e-5


@pytest.mark.skipif("JAX_PYTHON" not in os.environ, reason="JAX_PYTHON names no Python with neural-tangents")
@pytest.mark.parametrize("net", NETS)
def test_neural_tangents_computes_the_kernel(net: str) -> None:
    samples = 1 if net == "f" else 3
    cell = Cell(net, samples, jax_python=os.environ["JAX_PYTHON"])
    entrant = contenders.contender(jax_peer.NAME, cell)
    try:
        cost, peak = entrant.run_with_peak()
        assert cost.cpu > 0
        assert peak is not None
        assert Reference.of(cell).error(entrant.kernel()) < 1e-5
    finally:
        entrant.close()


def test_neural_tangents_reports_a_worker_that_fails(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="status 3"):
        jax_peer.NeuralTangents(str(python), "a", *make("a", 2), threads=1)


@pytest.mark.parametrize("method", contenders.OURS)
def test_contenders_are_right_and_wrong_kernels_are_seen(method: str) -> None:
    cell = Cell("c", 6)
    entrant = contenders.contender(method, cell)
    assert entrant.run().wall > 0
    kernel = entrant.kernel()
    assert kernel.dtype == (torch.float32 if "float32" in method else DOUBLE)
    reference = Reference.of(cell)
    assert error(reference.values, dense("c", 6)[reference.rows][:, :, reference.rows]) < 1e-12
    assert reference.error(kernel) < 1e-6
    assert reference.error(kernel.transpose(1, 3)) > 1e-2


def test_reference_of_many_outputs_takes_some_of_them() -> None:
    reference = Reference.of(Cell("f", 1))
    assert reference.values.shape == (1, 16, 1, 16)
    kernel = run_peer("vmap(jacrev)", *make("f", 1), 2**30)
    assert reference.error(kernel) < 1e-5


def test_unavailable_methods_say_why() -> None:
    with pytest.raises(contenders.Unavailable, match="jax-python"):
        contenders.contender(jax_peer.NAME, Cell("a", 2))
    with pytest.raises(ValueError, match="method: expected one of"):
        contenders.contender("magic", Cell("a", 2))


def test_runs_alternate() -> None:
    order: list[str] = []

    def way(name: str) -> timing.Cost:
        order.append(name)
        return timing.Cost(len(order), 0.0)

    costs = timing.alternate_costs({"a": lambda: way("a"), "b": lambda: way("b")}, {"a": 3, "b": 2})
    assert order == ["a", "b", "b", "a", "a"]
    assert [cost.cpu for cost in costs["b"]] == [2, 3]
    assert [cells.repeats_for(wall, 5) for wall in (0.001, 1, 5, 50)] == [25, 5, 3, 1]


def test_clocks_and_memory() -> None:
    cost, value = timing.measure(lambda: time.sleep(0.05))
    assert value is None
    assert cost.cpu < 0.04 < cost.wall
    assert timing.percentile([3.0, 1.0, 2.0], 0.9) == 3.0
    assert math.isnan(timing.percentile([], 0.9))


def test_peak_memory(fresh: FreshInterpreter) -> None:
    if timing.reset_peak() is None:
        pytest.skip("the peak of a process cannot be read here")
    # In a process of its own: elsewhere the allocation may land in memory that was free already.
    code = "import torch; from benchmarks import timing; before = timing.reset_peak(); torch.ones(25_000_000).add_(1)"
    code += "; print(timing.peak_memory() - before)"
    assert 95e6 < float(fresh.run(code)) < 150e6


def test_limits_end_a_run() -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match="over 0 s"), cells.within(0.05):
        spin()
    with cells.within(60):
        pass
    request = {"cell": asdict(Cell("a", 2)), "methods": ["ntkgp"], "repeats": 1, "limit": 9}
    assert cells.launch("race", request, 0.2, None) == ([], "over 0 s")


def row(method: str, seconds: float, **values: object) -> report.Row:
    result = report.Row("b", 256, method, 2, "cpu", **values)  # type: ignore[arg-type]
    if seconds:
        result.set_costs([timing.Cost(2 * seconds * k, 1.0) for k in (1, 1, 9)])
    return result


def test_summary_takes_the_best_right_peer() -> None:
    rows = [
        row("ntkgp float32", 0.1, error=1e-7),
        row("ntkgp", 0.2, error=1e-8),
        row("vmap(jacrev)", 40.0, error=1e-7),
        row("nngeometry", 2.0, error=1e-7),
        row("laplace ASDL", 1.0, error=0.2),
        row("neural-tangents", 0, failure="over 9 s"),
    ]
    for each in rows:
        report.set_limit(each, {"passes": 1e9, "limit": 11e9, "chosen": 22e9}, {"float32": 1e11, "float64": 5e10})
    assert [each.seconds for each in rows[:2]] == [0.1, 0.2]
    assert [each.limit for each in rows[:2]] == pytest.approx([0.11, 0.21])
    assert rows[0].rate == pytest.approx(22e10)
    assert math.isnan(rows[2].rate)
    assert report.summary(rows) == [
        ("b", "256", "400 (≥ 280)", "20 nngeometry (≥ 10)", "over 9 s (≥ 1)", "0.909 (≤ 2)")
    ]
    lines = report.grid(rows)
    assert lines[4][-1] == "0.2 WRONG"
    assert lines[5] == ("b", "256", "neural-tangents", "over 9 s")
    markdown = report.markdown_table(report.HEADINGS, lines).splitlines()
    assert {line.count("|") for line in markdown} == {len(report.HEADINGS) + 1}
    assert len(report.text_table(report.HEADINGS, lines).splitlines()) == 7


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n", encoding="utf-8")
    for content in ("first", "second"):
        report.insert(page, "x", content)
        expected = f"before\n<!-- x:begin -->\n\n{content}\n\n<!-- x:end -->\nafter\n"
        assert page.read_text(encoding="utf-8") == expected
    with pytest.raises(ValueError, match="expected one line <!-- y:begin -->"):
        report.insert(page, "y", "nothing")
    for marker in ("gram", "products"):
        assert f"<!-- {marker}:begin -->" in gram.PAGE.read_text(encoding="utf-8")


def test_gram_measures_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = gram.launch

    def launched(task: str, request: dict, seconds: float, space: int | None) -> tuple[list[dict], str]:
        """A probe in a process of its own; a race, whose peak nobody asks for, in this one."""
        if task == "probe":
            return launch(task, request, seconds, space)
        monkeypatch.setattr(sys, "argv", ["cells", json.dumps({"task": task, "address_space": None, **request})])
        cells.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()], ""

    monkeypatch.setattr(gram, "launch", launched)
    monkeypatch.setattr(cells, "gemm_rates", partial(cells.gemm_rates, seconds=0.01, size=64))
    results, table = tmp_path / "results.jsonl", tmp_path / "table.csv"
    arguments = ["--nets", "a", "--samples", "4", "--repeats", "1", "--threads", "1", "--limit", "60"]
    arguments += ["--methods", "ntkgp float32", "neural-tangents"]
    arguments += ["--results", str(results), "--csv", str(table)]
    gram.main(arguments)
    assert "no --jax-python given" in capsys.readouterr().out
    with table.open(encoding="utf-8") as file:
        ours, other = csv.DictReader(file)
    assert (other["failure"], other["repeats"]) == ("no --jax-python given", "0")
    (race,) = (json.loads(line)["value"] for line in results.read_text("utf-8").splitlines() if '"race ' in line)
    clocked = [event["wall"] for event in race[0] if "wall" in event]
    assert (ours["failure"], ours["repeats"]) == ("", str(len(clocked)))
    assert len(clocked) in (5, 1)  # one where the machine was so busy that the first run took long
    assert float(ours["error"]) < 1e-6
    assert float(ours["seconds"]) == float(ours["cpu"]) > 0
    assert float(ours["peak"]) >= 0
    assert float(ours["limit"]) > 0

    def refuse(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(gram, "launch", refuse)
    results.write_text(results.read_text(encoding="utf-8") + '{"key": "cut o', encoding="utf-8")
    first = table.read_text(encoding="utf-8")
    gram.main(arguments)
    assert table.read_text(encoding="utf-8") == first


def test_a_race_takes_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cells, "gemm_rates", partial(cells.gemm_rates, seconds=0.01, size=64))
    monkeypatch.setattr(cells, "repeats_for", lambda wall, repeats: repeats)
    methods = ["ntkgp float32", "vmap(jacrev)"]
    cells.race(Cell("a", 4), methods, repeats=2, limit=60)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = {event["method"]: event["error"] for event in events if "error" in event}
    assert errors.keys() == set(methods)
    assert max(errors.values()) < 1e-6
    assert [event["method"] for event in events if "cpu" in event] == [*methods, *methods[::-1]]


def test_a_crash_costs_the_race_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(task: str, request: dict, seconds: float, space: int | None) -> tuple[list[dict], str]:
        events: list[dict] = []
        for method in request["methods"]:
            events.append({"starting": method})
            if method == "ntk-vps":
                return events, "ended with status -9"
            events.append({"method": method, "cpu": 1.0, "wall": 1.0})
        return events, ""

    monkeypatch.setattr(gram, "launch", launch)
    methods = ("ntkgp", "ntk-vps", "vmap(jacrev)")
    comparison = gram.Comparison(methods, gram.Results(None), repeats=1, limit=1, address_space=None)
    rows = {each.method: each for each in comparison.run(Cell("a", 2), probes=False)}
    assert rows["ntk-vps"].failure == "race: ended with status -9"
    assert rows["ntkgp"].counts
    assert rows["vmap(jacrev)"].counts


def test_hopeless_peers_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def launch(task: str, request: dict, seconds: float, space: int | None) -> tuple[list[dict], str]:
        method = request["method"]
        asked.append((request["cell"]["samples"], method))
        fails = method == "ntk-vps"
        return [{"method": method, **({"failure": "out of memory"} if fails else {"wall": 4.0, "peak": 0})}], ""

    monkeypatch.setattr(gram, "launch", launch)
    comparison = gram.Comparison((), gram.Results(None), repeats=1, limit=10.0, address_space=2**30)
    for samples in (64, 256):
        found = [comparison.probe(Cell("a", samples), method) for method in ("ntk-vps", "vmap(jacrev)")]
    assert [event["failure"] for event in found] == ["out of memory (N = 64)", "over 10 s (by N = 64, linearly)"]
    assert asked == [(64, "ntk-vps"), (64, "vmap(jacrev)")]
    assert "the Grams take" in comparison.probe(Cell("a", 20_000), "ntkgp")["failure"]


SMALL = products.Scale(3, (("c", 5),), (("c", 4),), 12, 6, (4, 8, 8, 2), (3,), (1,))


@pytest.mark.parametrize("part", products.PARTS)
def test_products_are_right_and_clocked(part: str) -> None:
    (line,) = products.PARTS[part](SMALL, "c")
    rows = products.run(line, threads=1, repeats=1)
    assert [entry[1] for entry in rows] == list(line.ways)
    found = dict(zip(line.ways, rows, strict=True))
    for name, entries in found.items():
        if "laplace" in name:
            assert len(entries) == len(products.HEADINGS) or entries[-1] == "not installed: laplace"
        else:
            assert float(entries[2]) > 0
            assert line.errors[name] < 1e-5


def test_quick_scale_covers_every_network() -> None:
    assert {net for net, _ in products.QUICK.diagonal} == {net for net, _ in products.Scale().diagonal} == set("bcde")
    assert gram.QUICK_SAMPLES.keys() == NETS.keys() == report.ASKED.keys()
