"""Memory budgets such as ``"2GiB"``."""

from __future__ import annotations

import math
import re

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_memory(max_memory: str | int | float) -> int:
    """Bytes of a budget.

    :param max_memory: a positive number of bytes, or a string such as ``"512MiB"`` or ``"2 GB"``.
    :raises ValueError: anything else.

    >>> parse_memory("2GiB"), parse_memory("1.5 kB"), parse_memory(100)
    (2147483648, 1500, 100)
    """
    if isinstance(max_memory, int | float) and not isinstance(max_memory, bool) and 0 < max_memory < float("inf"):
        return int(max_memory)
    if isinstance(max_memory, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", max_memory)
        if match and match[2].lower() in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2].lower()])
    raise ValueError(f"max_memory: expected a positive number of bytes or a string like '2GiB', got {max_memory!r}")


def require(smallest: int, budget: int, what: str) -> None:
    """Refuse a budget that is too small.

    :param smallest: bytes that are enough.
    :param what: what does not fit, for people.
    :raises ValueError: ``budget < smallest``.

    >>> require(100, 2048, "two rows")
    >>> require(4096, 2048, "two rows")
    Traceback (most recent call last):
    ValueError: max_memory: 2 KiB is too small for two rows; the smallest possible is 4 KiB
    """
    if smallest > budget:
        raise ValueError(
            f"max_memory: {format_memory(budget)} is too small for {what}; "
            f"the smallest possible is {format_memory(smallest)}"
        )


def format_memory(num_bytes: float) -> str:
    """Bytes in the unit people read, rounded up: what is printed as the smallest possible budget is enough.

    >>> format_memory(3 * 2**30), format_memory(1536), format_memory(1025)
    ('3 GiB', '1.5 KiB', '1.01 KiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            value = num_bytes / size
            step = 10.0 ** (math.floor(math.log10(value)) - 2)
            return f"{math.ceil(value / step) * step:.6g} {unit}"
    return f"{math.ceil(num_bytes)} B"
