"""The Python blocks of the README and of the documentation run, in order, page by page; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line number, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


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
    for line, code in blocks(page):
        # Blank lines before the code let a traceback name the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]
    assert not missing


def test_the_pages_have_code() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 20
