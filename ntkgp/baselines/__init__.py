"""Weight-space and other comparators of the Gaussian processes, all with ``fit`` and ``predict``."""

from ntkgp.baselines.ensembles import SWAG, DeepEnsemble, MCDropout
from ntkgp.baselines.hessian_free import HessianFreeLaplace
from ntkgp.baselines.l2m import L2M, L2MEnsemble
from ntkgp.baselines.laplace import Laplace
from ntkgp.baselines.point import Point, PriorOnly
from ntkgp.baselines.protocol import Baseline
from ntkgp.baselines.variational_laplace import VariationalLaplace

__all__ = [
    "L2M",
    "SWAG",
    "Baseline",
    "DeepEnsemble",
    "HessianFreeLaplace",
    "L2MEnsemble",
    "Laplace",
    "MCDropout",
    "Point",
    "PriorOnly",
    "VariationalLaplace",
]
