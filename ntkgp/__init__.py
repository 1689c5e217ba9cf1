"""A trained network is a Gaussian process: error bars, evidence and GPyTorch models from any ``torch.nn.Module``."""

from ntkgp.linearization import LinearizedNetwork, ParameterGroups

__all__ = ["LinearizedNetwork", "ParameterGroups"]
