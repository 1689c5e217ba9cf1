"""The laws of linearised Laplace and tangent-kernel Gaussian processes, as checks that any library can be put to.

A network linearised at its trained weights is a linear model, and a linear model leaves no room for opinion: its
posterior, its evidence and its invariances are identities that can be compared with dense algebra. :func:`check` does
so for a library behind an :class:`Adapter` on trained networks with three hidden layers, three outputs and
normalisation, where mistakes show that a single hidden layer with one output hides.

>>> from ntkgp import laws
>>> from ntkgp.laws.adapters import DenseAdapter
>>> print(laws.check(DenseAdapter(), ["B8"], ["exact"]))
dense reference: 1 holds, 0 fails, 0 raises, 0 not applicable

From the command line: ``python -m ntkgp.laws --adapter ntkgp``.
"""

from ntkgp.laws.checking import check
from ntkgp.laws.collection import LAWS
from ntkgp.laws.protocol import Adapter, Fitted, NotApplicableError, Optimum, Structure, Task
from ntkgp.laws.report import Report, Row
from ntkgp.laws.trial import Law

__all__ = [
    "LAWS",
    "Adapter",
    "Fitted",
    "Law",
    "NotApplicableError",
    "Optimum",
    "Report",
    "Row",
    "Structure",
    "Task",
    "check",
]
