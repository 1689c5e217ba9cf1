"""Docstrings as they are written: shapes like (*batch, N) and bars like |x| are text, not markup."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`[^`]+`)")
_STAR = re.compile(r"(?<=[(\s])\*(?=[A-Za-z_ ]+[,)])")
_BAR = re.compile(r"(?<!\\)\|")


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape stars of shapes and bars outside of code, equations and examples."""
    directive = -1
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= directive:
            directive = -1
        if line.lstrip().startswith(".. "):
            directive = indent
        elif directive < 0 and not line.lstrip().startswith((">>>", "...")):
            parts = _CODE.split(line)
            parts[::2] = [_BAR.sub(r"\\|", _STAR.sub(r"\\*", part)) for part in parts[::2]]
            lines[number] = "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc."""
    app.connect("autodoc-process-docstring", escape)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
