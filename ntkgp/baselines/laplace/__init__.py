"""The Laplace approximation in weight space, with five structures of its curvature."""

from ntkgp.baselines.laplace.model import Laplace

__all__ = ["Laplace"]
