"""Random networks times every public call: equal to the dense oracle, or a clear error; nothing else changes."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field

from tests.fuzzing import streams  # noqa: F401 -- registers its calls
from tests.fuzzing.calls import CALLS
from tests.fuzzing.hostile import HOSTILE
from tests.fuzzing.networks import draw
from tests.fuzzing.problem import Problem
from tests.fuzzing.watch import Find, is_clear, untouched, where

__all__ = ["NAMES", "Outcome", "run"]

# Each network meets so many calls one after the other: the oracle's Jacobian is made once.
CALLS_PER_NETWORK = 8
NAMES = (*CALLS, *HOSTILE)


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    :ivar kind: "equal" (or refused as it must be), "refused" (a clear error) or "find".
    :ivar error: what was raised, for its traceback.
    """

    number: int
    call: str
    kind: str
    text: str = ""
    network: str = ""
    error: Exception | None = field(default=None, repr=False, compare=False)


@functools.lru_cache(8)
def _problem(network: int) -> Problem:
    return Problem(draw(network))


def run(number: int, call: str | None = None) -> Outcome:
    """Case `number`: a network and a call, always the same ones; or another call on that network."""
    network = number // CALLS_PER_NETWORK
    order = random.Random(f"order {number // len(NAMES)}").sample(NAMES, len(NAMES))
    chosen = call or order[number % len(NAMES)]
    rng = random.Random(f"case {number}")
    problem = _problem(network)
    text = problem.case.description
    try:
        with untouched(problem.case.net):
            (CALLS | HOSTILE)[chosen](problem, rng)
    except Find as find:
        return Outcome(number, chosen, "find", str(find), text, find)
    except Exception as error:
        kind = "refused" if is_clear(error) else "find"
        said = " ".join(str(error).split())[:300]
        return Outcome(number, chosen, kind, f"{type(error).__name__} at {where(error)}: {said}", text, error)
    return Outcome(number, chosen, "equal", network=text)
