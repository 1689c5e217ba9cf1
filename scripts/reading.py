"""What people wrote under "Reading" on a page of results stays when its script writes the page again."""

from __future__ import annotations

import re
from pathlib import Path


def kept(page: Path) -> str:
    """The section "## Reading" of a page, without blank lines around it; empty where there is none."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = re.search(r"^## Reading\n.*?(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def write(page: Path, text: str) -> None:
    """Write a page of results, and after it what people had written of it."""
    reading = kept(page)
    page.write_text(text.rstrip("\n") + (f"\n\n{reading}" if reading else "") + "\n", encoding="utf-8")
