"""Model evidence on per-group Grams: problems, objectives, optimisers and the report."""

from __future__ import annotations

from .ascent import Optimum
from .fit import fit_evidence, fit_problem
from .fixed_point import fixed_point
from .gradient import lbfgs
from .newton import DualMode, dual_mode
from .objective import Evaluation, EvidenceObjective, evidence_objective
from .problem import GaussianEvidence, NoiseModel, SoftmaxEvidence
from .report import EvidenceReport

__all__ = [
    "DualMode",
    "Evaluation",
    "EvidenceObjective",
    "EvidenceReport",
    "GaussianEvidence",
    "NoiseModel",
    "Optimum",
    "SoftmaxEvidence",
    "dual_mode",
    "evidence_objective",
    "fit_evidence",
    "fit_problem",
    "fixed_point",
    "lbfgs",
]
