"""Execute the notebooks from their .py twins and write the .ipynb files with outputs.

    python scripts/build_notebooks.py [notebooks/01_quickstart.py ...]

Pictures are kept in 128 colours, which line plots and maps cannot be told from, and are three times smaller.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COLORS, LIMIT = 128, 1800  # seconds for a cell


def smaller(picture: str) -> str:
    """A base64 PNG with a palette, if that is smaller."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return min(picture, base64.b64encode(file.getvalue()).decode(), key=len)


def main() -> None:
    sources = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.py"))
    for source in sources:
        start = time.perf_counter()
        notebook = jupytext.read(source)
        NotebookClient(
            notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(source.parent)}}
        ).execute()
        for cell in notebook.cells:
            # Times of execution would make every build a change.
            cell.metadata.pop("execution", None)
            # Warnings name folders of the machine that built it.
            outputs = cell.get("outputs", [])
            outputs[:] = [output for output in outputs if output.get("name") != "stderr"]
            for output in outputs:
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = smaller(output["data"]["image/png"])
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb').name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
