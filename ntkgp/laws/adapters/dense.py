"""The dense reference as a library of its own: what the laws say of themselves, and a pattern for other adapters."""

from __future__ import annotations

from collections.abc import Mapping

from ntkgp.laws.oracle import Dense
from ntkgp.laws.protocol import Fitted, Structure, Task


class DenseAdapter:
    """Everything by dense algebra, from the definitions.

    >>> DenseAdapter().structures["kfac"].kind
    'kfac'
    """

    name = "dense reference"
    structures: Mapping[str, Structure] = {
        kind: Structure(kind)
        for kind in ("exact", "last_layer", "subnetwork", "diagonal", "kfac", "subset", "nystrom", "variational")
    }

    def fit(self, task: Task) -> Fitted:
        """Fit the task's kind."""
        return Dense(task)
