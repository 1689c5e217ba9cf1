"""Model evidence on per-group Grams: problems, objectives, optimisers and the report."""

from __future__ import annotations

from ntkgp.evidence.ascent import Optimum
from ntkgp.evidence.bounds import evidence_bounds
from ntkgp.evidence.factory import evidence_objective
from ntkgp.evidence.fit import fit_evidence, fit_problem
from ntkgp.evidence.fixed_point import fixed_point
from ntkgp.evidence.gradient import lbfgs
from ntkgp.evidence.newton import DualMode, dual_mode
from ntkgp.evidence.objective import Evaluation, EvidenceObjective
from ntkgp.evidence.problem import GaussianEvidence, NoiseModel, SoftmaxEvidence
from ntkgp.evidence.report import EvidenceReport
from ntkgp.evidence.sampled import SampledEvidence, sampled_evidence
from ntkgp.evidence.single_pass import OnePassEvidence, one_pass
from ntkgp.evidence.streaming import StreamedEvidence, StreamStatistics

__all__ = [
    "DualMode",
    "Evaluation",
    "EvidenceObjective",
    "EvidenceReport",
    "GaussianEvidence",
    "NoiseModel",
    "OnePassEvidence",
    "Optimum",
    "SampledEvidence",
    "SoftmaxEvidence",
    "StreamStatistics",
    "StreamedEvidence",
    "dual_mode",
    "evidence_bounds",
    "evidence_objective",
    "fit_evidence",
    "fit_problem",
    "fixed_point",
    "lbfgs",
    "one_pass",
    "sampled_evidence",
]
