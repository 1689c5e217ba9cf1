"""The network as a linear model in its weights; this room knows no Gaussian process."""

from ntkgp.linearization.groups import ParameterGroups
from ntkgp.linearization.network import LinearizedNetwork

__all__ = ["LinearizedNetwork", "ParameterGroups"]
