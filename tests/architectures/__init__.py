"""A zoo of small deep networks with their normalised parameter groups written down by hand.

Every builder returns a fresh ``Case``. Networks are float64, hold no zero bias and no unit norm weight, and are built
from their own seed without touching the global random state. ``CASES`` maps names to builders; the builders that need
``transformers`` are listed only where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from tests.architectures import convolutional, dense, pretrained, sequence
from tests.architectures.base import DTYPE, Case, N, Residual
from tests.architectures.sequence import SwiGLU

__all__ = ["CASES", "DTYPE", "Case", "N", "Residual", "SwiGLU"]

CASES: dict[str, Callable[[], Case]] = {
    builder.__name__: builder for module in (dense, convolutional, sequence) for builder in module.BUILDERS
}
if importlib.util.find_spec("transformers") is not None:
    CASES |= {builder.__name__: builder for builder in pretrained.BUILDERS}
