"""All laws, in the order of their ids."""

from __future__ import annotations

import re

# Entering them is what these two modules do when they are imported.
from ntkgp.laws import evidence, posterior
from ntkgp.laws.trial import ENTERED, Law

__all__ = ["LAWS", "evidence", "posterior"]


def _place(name: str) -> tuple[str, int, str]:
    letter, number, rest = re.fullmatch(r"([A-Z])(\d+)(.*)", name).groups()  # type: ignore[union-attr]
    return letter, int(number), rest


LAWS: dict[str, Law] = {name: ENTERED[name] for name in sorted(ENTERED, key=_place)}
