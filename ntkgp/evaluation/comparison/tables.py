"""Rows of strings under titles, in the format that is asked for."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

_LATEX = {
    **{symbol: "\\" + symbol for symbol in "&%_#${}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "×": r"$\times$", "°": r"$^\circ$", "…": r"\dots{}", "–": "--",
    "θ⋆": r"$\theta_\star$", "θ̃": r"$\tilde\theta$", "⋆": r"$\star$", "²": "$^2$", "³": "$^3$", "∞": r"$\infty$",
    **{chr(code): f"$\\{name}$" for code, name in zip(
        (*range(0x3B1, 0x3BF), *range(0x3C0, 0x3C2), *range(0x3C3, 0x3CA)),
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho "
        "sigma tau upsilon phi chi psi omega".split(), strict=True)},
}  # fmt: skip


class Table(Sequence[dict[str, Any]]):
    """Rows of strings under titles, in the format that is asked for; ``print`` gives plain text.

    :param titles: of the columns.
    :param cells: rows of texts.
    :param values: the same rows as dicts of numbers: what indexing gives.
    """

    def __init__(self, titles: Sequence[str], cells: Sequence[Sequence[str]], values: Sequence[dict[str, Any]]) -> None:
        self.titles, self.cells, self._values = list(titles), [list(row) for row in cells], list(values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._values)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def to_text(self) -> str:
        """Columns of fixed width, for a terminal."""
        lines = [self.titles, *self.cells]
        widths = [max(text_width(line[i]) for line in lines) for i in range(len(self.titles))]
        padded = [[pad(cell, width, left=not i) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
                  for line in lines]  # fmt: skip
        rows = ["  ".join(line).rstrip() for line in padded]
        return "\n".join([rows[0], "  ".join("-" * width for width in widths), *rows[1:]])

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [self.titles, ["---"] + ["--:"] * (len(self.titles) - 1), *self.cells]
        return "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)

    def to_latex(self) -> str:
        r"""A ``tabular`` with booktabs' rules (``\usepackage{booktabs}``)."""
        columns = "l" + "r" * (len(self.titles) - 1)
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.titles, *self.cells)]
        inner = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *inner, r"\end{tabular}"])

    def to_csv(self) -> str:
        """Comma-separated texts with a header."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.titles, *self.cells])
        return out.getvalue()


def _markdown(text: str) -> str:
    """A cell that is one line, and no markup of HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _latex(text: str) -> str:
    return re.sub("θ⋆|θ̃|.", lambda found: _LATEX.get(found[0], found[0]), " ".join(text.split()))


def text_width(text: str) -> int:
    """Columns that a text takes in a terminal: combining marks take none."""
    return sum(not "\u0300" <= letter <= "\u036f" for letter in text)


def pad(text: str, width: int, left: bool) -> str:
    """Filled up with spaces behind the text, or before it."""
    space = " " * (width - text_width(text))
    return text + space if left else space + text
