"""Which laws hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HOLDS, FAILS, RAISES, NOT_APPLICABLE = "holds", "fails", "raises", "not applicable"
# Worst first: what a cell of the table shows of several problems.
OUTCOMES = (FAILS, RAISES, HOLDS, NOT_APPLICABLE)


@dataclass(frozen=True)
class Row:
    """A law on one structure and one problem.

    :ivar law: its id.
    :ivar statement: what it says.
    :ivar structure: name of the structure.
    :ivar problem: name of the problem.
    :ivar outcome: ``"holds"``, ``"fails"``, ``"raises"`` (an error in place of a number) or ``"not applicable"``.
    :ivar error: what was measured; infinite for what is no number, None where nothing was.
    :ivar tolerance: what it is compared with.
    :ivar reason: in words, where it does not hold.
    """

    law: str
    statement: str
    structure: str
    problem: str
    outcome: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """One line."""
        figures = "" if self.error is None else f" {self.error:.1e} (tolerance {self.tolerance:.1e})"
        return f"{self.law:9} {self.structure} on {self.problem}: {self.outcome}{figures}{self.because}"

    @property
    def because(self) -> str:
        """The reason after a separator, if there is one."""
        return f"; {self.reason}" if self.reason else ""


@dataclass(frozen=True)
class Report(Sequence[Row]):
    """The outcome of :func:`ntkgp.laws.check`: a sequence of :class:`Row`.

    :ivar library: name of the adapter.
    :ivar rows: in the order of the laws.
    """

    library: str
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def ok(self) -> bool:
        """Whether no law fails or raises."""
        return not self.broken

    @property
    def broken(self) -> tuple[Row, ...]:
        """The rows that fail or raise."""
        return tuple(row for row in self.rows if row.outcome in (FAILS, RAISES))

    @property
    def structures(self) -> tuple[str, ...]:
        """Names of the structures, in the order of the adapter."""
        return tuple(dict.fromkeys(row.structure for row in self.rows))

    def outcome(self, law: str, structure: str | None = None) -> str:
        """The worst outcome of a law, of one structure or of all.

        :raises KeyError: no such row.
        """
        found = {
            row.outcome for row in self.rows if row.law == law and (structure is None or row.structure == structure)
        }
        for outcome in OUTCOMES:
            if outcome in found:
                return outcome
        raise KeyError(f"no law {law!r} of structure {structure!r} in this report")

    def counts(self) -> dict[str, int]:
        """How many cells (law × structure) have each outcome."""
        cells = dict.fromkeys((row.law, row.structure) for row in self.rows)
        counted = Counter(self.outcome(*cell) for cell in cells)
        return {outcome: counted[outcome] for outcome in (HOLDS, FAILS, RAISES, NOT_APPLICABLE)}

    def to_markdown(self, details: bool = True) -> str:
        """A table of laws by structures, and one of all that does not hold.

        :param details: with the second table.
        """
        laws = dict.fromkeys((row.law, row.statement) for row in self.rows)
        cells = {(row.law, row.structure) for row in self.rows}
        lines = [
            "| law | statement | " + " | ".join(self.structures) + " |",
            "| --- | --- |" + " :-: |" * len(self.structures),
        ]
        signs = {HOLDS: "✓", FAILS: "**✗**", RAISES: "error", NOT_APPLICABLE: ""}
        for law, statement in laws:
            own = [signs[self.outcome(law, s)] if (law, s) in cells else "" for s in self.structures]
            lines.append(f"| {law} | {_escaped(statement)} | " + " | ".join(own) + " |")
        if details and self.broken:
            lines += ["", "| law | structure | problem | outcome | error | tolerance | |", "| --- " * 7 + "|"]
            for row in self.broken:
                figures = ("", "") if row.error is None else (f"{row.error:.1e}", f"{row.tolerance:.1e}")
                cells_of_row = (row.law, row.structure, row.problem, row.outcome, *figures, _escaped(row.reason))
                lines.append("| " + " | ".join(cells_of_row) + " |")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Counts, and a line for each law that does not hold."""
        counted = ", ".join(f"{number} {outcome}" for outcome, number in self.counts().items())
        return "\n".join([f"{self.library}: {counted}", *(f"  {row}" for row in self.broken)])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
