"""GPyTorch kernels of the tangent model and their sums and products with ordinary kernels."""

from ntkgp.kernels.composition import SharedKernel
from ntkgp.kernels.neural_tangent import NeuralTangentKernel
from ntkgp.kernels.nystrom import NystromKernel
from ntkgp.kernels.priors import FlatLogPrior

__all__ = ["FlatLogPrior", "NeuralTangentKernel", "NystromKernel", "SharedKernel"]
