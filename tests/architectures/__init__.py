"""A zoo of small deep networks with their normalised parameter groups written down by hand.

Every builder returns a fresh ``Case``. Networks are float64, hold no zero bias and no unit norm weight, and are built
from their own seed without touching the global random state. ``CASES`` maps names to builders; the builders that need
``transformers`` are listed only where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import ntkgp
from tests import reference
from tests.architectures import convolutional, dense, pretrained, sequence
from tests.architectures.base import DTYPE, Case, N, Residual
from tests.architectures.sequence import SwiGLU

__all__ = ["CASES", "DTYPE", "NORMALIZED", "Case", "Linearized", "N", "Residual", "SwiGLU", "linearized"]

CASES: dict[str, Callable[[], Case]] = {
    builder.__name__: builder for module in (dense, convolutional, sequence) for builder in module.BUILDERS
}
if importlib.util.find_spec("transformers") is not None:
    CASES |= {builder.__name__: builder for builder in pretrained.BUILDERS}

NORMALIZED = [name for name, build in CASES.items() if build().groups]


@dataclass(frozen=True)
class Linearized:
    """A case with its linearised network, some rows as they come and packed, and their Jacobian, (N, C, P)."""

    case: Case
    lin: ntkgp.LinearizedNetwork
    raw: Any
    x: Tensor
    jacobian: Tensor


@functools.cache
def linearized(name: str) -> Linearized:
    """Shared by all tests that change nothing of it; two rows where there are more than a hundred outputs."""
    case = CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    x, raw = lin.pack(case.example), case.example
    if lin.num_outputs > 100:
        x = x[:2]
        raw = lin.unpack(x)
    return Linearized(case, lin, raw, x, reference.jacobian(case.net, raw))
