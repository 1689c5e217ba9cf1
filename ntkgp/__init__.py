"""A trained network is a Gaussian process: error bars, evidence and GPyTorch models from any ``torch.nn.Module``."""

from ntkgp import baselines, kernels, likelihoods, means
from ntkgp.evidence import fit_evidence
from ntkgp.likelihoods import CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.models import ExactNTKGP, NystromNTKGP, VariationalNTKGP, from_network

__all__ = [
    "CategoricalLikelihood",
    "ExactNTKGP",
    "LinearizedNetwork",
    "NystromNTKGP",
    "ParameterGroups",
    "VariationalNTKGP",
    "baselines",
    "fit_evidence",
    "from_network",
    "kernels",
    "likelihoods",
    "means",
]
