"""The commands where only the core is installed: tables as ever, and what to install for the rest."""

from __future__ import annotations

import functools
import runpy
import sys

import numpy as np
import pytest
import torch

import ntkgp
from ntkgp.cli import main

NETWORK = "network_without_extras"
SOURCE = """
from torch import nn


def build():
    return nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a network, its weights and its data, without matplotlib."""
    (tmp_path / f"{NETWORK}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    net = __import__(NETWORK).build()
    torch.save(net.state_dict(), "w.pt")
    x = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    np.savez("d.npz", x=x, y=np.sin(x.sum(1)), x_test=x[:8], y_test=np.sin(x[:8].sum(1)))
    yield tmp_path
    sys.modules.pop(NETWORK, None)


@pytest.fixture
def core_only(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "pydicom", "pydicom.data"):
        monkeypatch.setitem(sys.modules, name, None)


COMMON = ["--network", f"{NETWORK}:build", "--weights", "w.pt", "--data", "d.npz", "--out", "out"]
WANTED = "no figure: plots need matplotlib: pip install 'ntkgp[plots]'"


@pytest.mark.usefixtures("core_only")
def test_fit_and_compare_say_what_a_figure_needs(place, capsys, monkeypatch):
    monkeypatch.setattr("ntkgp.cli.compare.compare", functools.partial(ntkgp.compare, isolate=False))
    assert main(["fit", *COMMON]) == 0
    assert WANTED in capsys.readouterr().out
    assert {path.name for path in (place / "out").iterdir()} == {"report.txt", "posterior.pt", "predictions.npz"}
    assert main(["compare", *COMMON, "--methods", "network"]) == 0
    assert WANTED in capsys.readouterr().out
    assert {"table.md", "table.tex", "scores.csv"} <= {path.name for path in (place / "out").iterdir()}


@pytest.mark.usefixtures("core_only")
def test_a_tomogram_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ct", "--example"]) == 2
    assert "it comes with `pip install ntkgp[ct]`" in capsys.readouterr().err
    np.savez("s.npz", sinogram=np.random.default_rng(0).random((6, 12)) + 1, angles=np.linspace(0, 3, 6))
    assert main(["ct", "--data", "s.npz", "--size", "8", "--iterations", "5", "--out", "ct"]) == 0
    assert WANTED in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "ct").iterdir()} == {"report.txt", "result.npz"}


@pytest.mark.usefixtures("place")
def test_inputs_of_two_numbers_are_drawn_by_coverage():
    pytest.importorskip("matplotlib")
    assert main(["fit", *COMMON]) == 0


def test_evidence_of_files(place, capsys):
    assert main(["evidence", *COMMON, "--landmarks", "4"]) == 0
    assert (place / "out" / "evidence.pt").is_file()
    np.savez("d.npz", x=np.zeros((3, 2), np.float32), y=np.zeros(3), y_test=np.zeros(2))
    assert main(["evidence", *COMMON]) == 2
    assert "has y_test but no x_test" in capsys.readouterr().err


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ntkgp", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ntkgp", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("ntkgp ")
