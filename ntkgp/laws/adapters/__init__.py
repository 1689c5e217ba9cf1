"""Adapters: the dense reference, the models of this package, its comparators, and laplace-torch."""

from ntkgp.laws.adapters.baselines import BaselinesAdapter
from ntkgp.laws.adapters.dense import DenseAdapter
from ntkgp.laws.adapters.laplace_torch import LaplaceTorchAdapter
from ntkgp.laws.adapters.models import ModelsAdapter

__all__ = ["BaselinesAdapter", "DenseAdapter", "LaplaceTorchAdapter", "ModelsAdapter"]
