"""Gaussian processes whose kernel is the tangent kernel of a trained network."""

from ntkgp.models.automatic import from_network
from ntkgp.models.exact import ExactNTKGP
from ntkgp.models.paths import FunctionSamples

__all__ = ["ExactNTKGP", "FunctionSamples", "from_network"]
