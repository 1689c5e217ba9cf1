"""Run every notebook of the gallery from top to bottom; where a .py twin exists, its code must be the notebook's."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900


def code(path: Path) -> list[str]:
    """Source of the code cells."""
    return [cell.source.strip() for cell in jupytext.read(path).cells if cell.cell_type == "code"]


def run(path: Path) -> str | None:
    """What went wrong, or nothing."""
    twin = path.with_suffix(".py")
    if path.suffix == ".ipynb" and twin.exists() and code(path) != code(twin):
        return f"code differs from {twin.name}; run scripts/build_notebooks.py"
    notebook = jupytext.read(path)
    try:
        NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
        ).execute()
    except CellExecutionError as error:
        return str(error)
    return None


def main() -> int:
    """Run all, print one line each, return the number of failures."""
    folder = ROOT / "notebooks"
    books = sorted(folder.glob("*.ipynb"))
    books += [path for path in sorted(folder.glob("*.py")) if path.with_suffix(".ipynb") not in books]
    failures = 0
    for path in books:
        start = time.perf_counter()
        problem = run(path)
        failures += problem is not None
        print(f"{'FAILED' if problem else 'ok':6s} {path.name} {time.perf_counter() - start:.0f} s")
        if problem:
            print(problem)
    print(f"{len(books) - failures} notebooks ran, {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
