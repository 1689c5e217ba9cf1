"""What ``import ntkgp`` does not import: it stays quick beside torch and GPyTorch."""

from __future__ import annotations

from tests.fresh import FreshInterpreter


def test_slow_libraries_are_imported_where_they_are_used(fresh: FreshInterpreter) -> None:
    found = fresh.run("import sys; print(*sys.modules)").split()
    assert "ntkgp" in found
    slow = ("sklearn", "matplotlib", "pandas", "botorch", "torchmetrics", "h5py", "pydicom", "ntkgp.laws", "ntkgp.cli")
    assert not {name for name in found if name.startswith(slow)}
    slow = ("scipy.stats", "scipy.optimize", "scipy.sparse", "scipy.linalg", "scipy.io", "scipy.special")
    assert not {name for name in found if name.startswith(slow)}
