"""A trained network is a Gaussian process: error bars, evidence and GPyTorch models from any ``torch.nn.Module``."""

from ntkgp import baselines, checkpoint, inverse, kernels, likelihoods, means
from ntkgp.evaluation.comparison import Comparison, Method, compare
from ntkgp.evidence import fit_evidence
from ntkgp.likelihoods import CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.models import ExactNTKGP, InverseNTKGP, NystromNTKGP, VariationalNTKGP, from_network
from ntkgp.models.saving import load

__all__ = [
    "CategoricalLikelihood",
    "Comparison",
    "ExactNTKGP",
    "InverseNTKGP",
    "LinearizedNetwork",
    "Method",
    "NystromNTKGP",
    "ParameterGroups",
    "VariationalNTKGP",
    "baselines",
    "checkpoint",
    "compare",
    "fit_evidence",
    "from_network",
    "inverse",
    "kernels",
    "likelihoods",
    "load",
    "means",
]
