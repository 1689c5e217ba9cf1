"""Variational inference with inducing inputs and the network as fixed mean (VaLLA, fixed-mean GPs)."""

from ntkgp.models.variational.inducing import kmeans_inducing_points
from ntkgp.models.variational.model import VariationalNTKGP

__all__ = ["VariationalNTKGP", "kmeans_inducing_points"]
