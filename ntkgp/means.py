"""Prior means of the tangent model."""

from __future__ import annotations

from gpytorch.means import Mean
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.second_order import needs_graph
from ntkgp.operators import NetworkHandle
from ntkgp.operators.handle import ValueCache

__all__ = ["LinearizedMean", "NetworkMean"]

# Marginal likelihoods ask for the training inputs in every call, predictions for one more set.
_CACHED_INPUTS = 2


class NetworkMean(Mean):
    r"""
    The trained network itself, :math:`m(x) = f(x; \tilde\theta)`.

    As the prior mean of a Gaussian process this keeps the network's predictions. Do not fit an evidence with it on the
    data that the network was trained on: :class:`LinearizedMean` is the mean for that.

    :param lin: the linearised network; shared, not copied, by copies of the mean.
    :raises TypeError: ``lin`` is something else.

    Called on packed inputs ``(*batch, N, D)`` it returns ``(*batch, N)`` for C = 1 and ``(*batch, N, C)`` otherwise, in
    the dtype of the inputs. Differentiable with respect to the inputs.

    Cost: one forward pass per input; none for one of the last two sets of inputs, recognised by value. O(N·(D + C))
    memory.

    Example:
        >>> import torch, ntkgp
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), torch.randn(2, 3))
        >>> ntkgp.means.NetworkMean(lin)(torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, lin: LinearizedNetwork) -> None:
        if not isinstance(lin, LinearizedNetwork):
            raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
        super().__init__()
        self._handle = NetworkHandle(lin)
        self._values = ValueCache(_CACHED_INPUTS, self._handle.max_memory)

    @property
    def lin(self) -> LinearizedNetwork:
        """The linearised network."""
        return self._handle.lin

    def _value(self, x: Tensor) -> Tensor:  # (N, D) -> (N, C)
        return self.lin(x)

    def forward(self, x: Tensor) -> Tensor:  # (*batch, N, D) -> (*batch, N) or (*batch, N, C)
        """Evaluate the mean."""
        flat = x.reshape(-1, x.shape[-1])
        if needs_graph(x):
            value = self._value(flat)
        else:
            num_bytes = flat.shape[0] * self.lin.num_outputs * flat.element_size()
            value = self._values.fetch((flat,), num_bytes, lambda: self._value(flat))
        value = value.to(x.dtype).reshape(*x.shape[:-1], self.lin.num_outputs)
        # The stored value must survive whatever the caller does to the result in place.
        value = value if value.requires_grad else value.clone()
        return value.squeeze(-1) if self.lin.num_outputs == 1 else value


class LinearizedMean(NetworkMean):
    r"""
    The tangent model at :math:`\theta = 0`, :math:`m_0(x) = f(x; \tilde\theta) - J(x)\tilde\theta`.

    With this mean and the neural tangent kernel, :math:`y \sim \mathcal N(m_0, J\Lambda^{-1}J^\top + \sigma^2 I)`, and
    GPyTorch's ``ExactMarginalLogLikelihood`` times N·C is the evidence of the tangent model at its own optimum
    :math:`\theta_\star`, with all constants (Antorán et al. 2022, *Adapting the linearised Laplace model evidence*).

    :param lin: the linearised network; shared, not copied, by copies of the mean.
    :raises TypeError: ``lin`` is something else.

    Shapes, dtype and gradients as in :class:`NetworkMean`.

    Cost: one forward pass and one jvp per input; none for one of the last two sets of inputs. O(N·(D + C) + P) memory.

    Example:
        >>> import torch, ntkgp
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), torch.randn(2, 3))
        >>> ntkgp.means.LinearizedMean(lin)(torch.randn(5, 3)).abs().max() < 1e-6  # a linear network is Jθ̃
        tensor(True)
    """

    def _value(self, x: Tensor) -> Tensor:  # (N, D) -> (N, C)
        return self.lin(x) - self.lin.jvp(x, self.lin.theta.to(x.device))
