"""Execute the notebooks from their .py twins and write the .ipynb files with outputs.

python scripts/build_notebooks.py [notebooks/01_quickstart.py ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    sources = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.py"))
    for source in sources:
        start = time.perf_counter()
        notebook = jupytext.read(source)
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(source.parent)}}
        ).execute()
        for cell in notebook.cells:
            # Times of execution would make every build a change.
            cell.metadata.pop("execution", None)
            # Warnings name folders of the machine that built it.
            outputs = cell.get("outputs", [])
            outputs[:] = [output for output in outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb').name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
