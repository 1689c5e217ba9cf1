"""The benchmark of the ray transform at a tiny size: it runs, and measures what it says."""

from __future__ import annotations

import pytest

from benchmarks import projector


def test_the_projector_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    projector.main(["--quick", "--threads", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["pixels", "views"]
    assert lines[1].split()[:5] == ["24²", "6", "×", "35", "ntkgp"]
    assert float(lines[1].split()[-2]) < 1e-6
    assert float(lines[2].split()[-2]) < 1e-12
