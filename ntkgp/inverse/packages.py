"""Packages that are imported only where they are asked for."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, package: str) -> Any:
    """A module of a package that may not be installed.

    :raises ImportError: it is not; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        raise ImportError(f"{module}: {reason}; it comes with `pip install {package}`") from reason
