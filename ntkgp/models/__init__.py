"""Gaussian processes whose kernel is the tangent kernel of a trained network."""

from ntkgp.models.automatic import from_network
from ntkgp.models.exact import ExactNTKGP
from ntkgp.models.inverse import InverseNTKGP
from ntkgp.models.nystrom import NystromNTKGP
from ntkgp.models.paths import FunctionSamples
from ntkgp.models.variational import VariationalNTKGP

__all__ = ["ExactNTKGP", "FunctionSamples", "InverseNTKGP", "NystromNTKGP", "VariationalNTKGP", "from_network"]
