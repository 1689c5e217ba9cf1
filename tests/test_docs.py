"""The Python blocks of the README and of the documentation run, in order, page by page; links lead somewhere.

A block opened with ``python needs: PACKAGE`` runs where the package is installed, one opened with ``python not run:
REASON`` does not. Nothing else is let off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if DOCS / "_build" not in page.parents)]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r" (needs|not run): (\S.*)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line number, code, package that it needs) of each Python block that is to run."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2))
        mark = MARK.fullmatch(match[1])
        assert mark or not match[1], f"{name(page)}:{line}: expected ' needs: PACKAGE' or ' not run: REASON'"
        if mark is None or mark[1] == "needs":
            found.append((line, match[2], mark[2] if mark else ""))
    return found


@contextlib.contextmanager
def lenient(package: str) -> Iterator[None]:
    """What an optional package has to say of its own future is not an error of the page."""
    with warnings.catch_warnings():
        if package:
            warnings.simplefilter("ignore", FutureWarning)
        yield


def readers_names(page: Path) -> dict[str, Any]:
    """What the README takes for granted: the reader's own network and data. Other pages define everything."""
    if page.name != "README.md":
        return {}
    x = torch.randn(30, 3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x_test = torch.randn(10, 3)
    return {
        "net": net, "x": x, "y": torch.sin(x[:, :1]), "x_new": torch.randn(4, 3), "x_test": x_test,
        "y_test": torch.sin(x_test[:, :1]), "x_ood": x_test + 5,
    }  # fmt: skip


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for optional in ("botorch", "transformers"):
        if f"import {optional}\n" in page.read_text(encoding="utf-8"):
            pytest.importorskip(optional)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__", **readers_names(page)}
    for line, code, package in blocks(page):
        if package and importlib.util.find_spec(package) is None:
            continue
        with lenient(package):
            # Blank lines before the code let a traceback name the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


def test_the_pages_have_code() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 20


def test_seconds_on_the_page_are_those_of_the_results() -> None:
    """Cells that both have differ by less than a half; ``python docs/which_tables.py`` writes them anew."""
    spec = importlib.util.spec_from_file_location("which_tables", DOCS / "which_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    number = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w,-])")
    compared = 0
    for row, anew in zip(page.splitlines(), tables.written(page).splitlines(), strict=True):
        cells, others = row.split(" | "), anew.split(" | ")
        assert cells[0] == others[0]
        for cell, other in zip(cells[1:], others[1:], strict=True):
            for old, new in zip(number.findall(cell), number.findall(other), strict=False):
                compared += 1
                assert float(new) / 1.5 <= float(old) <= 1.5 * float(new), (row, anew)
    assert compared > 100
