"""Joint log loss of several targets at once, and the draws and tuples that it needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkgp.evaluation.checks import as_float64, same_shape
from ntkgp.evaluation.metrics.inputs import classes, positive_int

_NUMBERS = 2**24
"""Numbers in memory at once for a block of tuples: 128 MiB."""


def dyadic_tuples(num_data: int, num_tuples: int, *, size: int = 10, anchors: int = 2, seed: int = 0) -> Tensor:
    """
    Indices of tuples of test points, each drawn with replacement from a few anchors (dyadic sampling).

    Ten points at random are nearly independent under any model, so their joint loss says what the marginal one does.
    Repeats of two points are not: the loss then sees whether the model knows how its errors go together. Repeated
    points stand for repeated observations, independent given the function.

    :param num_data: N, number of test points.
    :param num_tuples: B.
    :param size: τ, points per tuple.
    :param anchors: κ, different points that each tuple is drawn from.
    :param seed: of the draw.
    :return: ``(B, τ)``, int64, entries 0 … N−1.
    :raises ValueError: numbers that are not positive, more anchors than points.

    Cost: O(B·(N + τ)) time, in blocks of at most 128 MiB. Source: Osband et al., UAI 2022 (κ = 2, τ = 10).

    Example:
        >>> tuples = dyadic_tuples(100, 5)
        >>> tuples.shape, max(len(row.unique()) for row in tuples)
        (torch.Size([5, 10]), 2)
    """
    for name, value in (("num_data", num_data), ("num_tuples", num_tuples), ("size", size), ("anchors", anchors)):
        positive_int(name, value)
    if anchors > num_data:
        raise ValueError(f"anchors: expected at most the {num_data} points there are, got {anchors}")
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _NUMBERS // num_data)
    chosen = []
    for start in range(0, num_tuples, step):
        keys = torch.rand(min(step, num_tuples - start), num_data, generator=generator, dtype=torch.float64)
        chosen.append(keys.topk(anchors, dim=-1).indices)
    pick = torch.randint(anchors, (num_tuples, size), generator=generator)
    return torch.cat(chosen).gather(-1, pick)


def gaussian_samples(mean: Tensor, covariance: Tensor, num_samples: int, *, seed: int = 0) -> Tensor:
    r"""
    Draws :math:`m + R\varepsilon` of multivariate normals with :math:`R R^\top = \Sigma`.

    R is the symmetric root, so singular covariances are drawn from as they are, without jitter, and a factor applied
    from the wrong side, which gives draws with covariance :math:`R^\top R`, gives the same.

    :param mean: m, ``(*batch, n)``.
    :param covariance: Σ, ``(*batch, n, n)``, symmetric, positive semidefinite up to 1e-6 of its largest eigenvalue.
    :param num_samples: S.
    :param seed: of the draws; the global generator is not touched.
    :return: ``(S, *batch, n)``, float64.
    :raises ValueError: shapes that do not fit, values that are not finite, a matrix that is no covariance.

    Cost: O(n³ + S·n²) per matrix.

    Example:
        >>> draws = gaussian_samples(torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 3)
        >>> bool((draws[:, 0] - draws[:, 1]).abs().max() < 1e-12)
        True
    """
    positive_int("num_samples", num_samples)
    (centre,) = same_shape(mean=mean)
    matrix = as_float64("covariance", covariance)
    if centre.dim() < 1 or matrix.shape != (*centre.shape, centre.shape[-1]):
        expected = (*centre.shape, *centre.shape[-1:])
        raise ValueError(f"covariance: expected shape {expected}, got {tuple(matrix.shape)}")
    if float((matrix - matrix.mT).abs().max()) > 1e-6 * float(matrix.abs().max()):
        raise ValueError("covariance: expected symmetric matrices")
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    if bool((values[..., 0] < -1e-6 * values[..., -1].abs()).any()):
        raise ValueError(f"covariance: not positive semidefinite, eigenvalue {float(values[..., 0].min()):.3g}")
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_samples, *centre.shape, generator=generator, dtype=torch.float64)
    return centre + torch.einsum("...ij,s...j->s...i", root, noise)


def sampled_joint_nll(log_likelihood: Tensor, tuples: Tensor | None = None) -> Tensor:
    r"""
    Joint negative log-likelihood of tuples of targets from S joint draws of the function, per target,

    .. math:: -\frac{1}{B\tau} \sum_b \log \frac1S \sum_s \prod_{t=1}^{\tau} p(y_{bt} \mid f_s(x_{bt})).

    One draw of the function is one network: its likelihoods multiply over the tuple *before* the mean over draws. Few
    draws bias the loss upwards (Jensen); τ = 1 gives the loss of the mean likelihood.

    :param log_likelihood: log p(y_n | f_s(x_n)) of each draw and target, ``(S, N)``; ``-inf`` is allowed.
    :param tuples: indices into the N targets, ``(B, τ)``, as from :func:`dyadic_tuples`; default: all N as one tuple.
    :return: a float64 scalar, in nats per target.
    :raises ValueError: another shape, ``nan`` or ``+inf``, indices out of range.
    :raises TypeError: indices that are not integers.

    Cost: O(S·B·τ). Source: Osband et al., UAI 2022 (joint log-loss).

    Example:
        >>> log_p = torch.tensor([[0.9, 0.9], [0.1, 0.1]]).log()  # two draws, each sure about both targets
        >>> sampled_joint_nll(log_p), sampled_joint_nll(log_p, torch.tensor([[0], [1]]))
        (tensor(0.4458, dtype=torch.float64), tensor(0.6931, dtype=torch.float64))
    """
    table = as_float64("log_likelihood", log_likelihood, finite=False)
    if table.dim() != 2 or table.numel() == 0:
        raise ValueError(f"log_likelihood: expected shape (S, N), got {tuple(table.shape)}")
    if bool((table.isnan() | (table == math.inf)).any()):
        raise ValueError("log_likelihood: expected finite numbers or -inf, got nan or +inf")
    num_samples, num_data = table.shape
    indices = _indices(tuples, num_data)
    step = max(1, _NUMBERS // (num_samples * indices.shape[1]))
    losses = [table[:, part].sum(-1).logsumexp(0) - math.log(num_samples) for part in indices.split(step)]
    return -torch.cat(losses).mean() / indices.shape[1]


def categorical_joint_nll(logits: Tensor, labels: Tensor, tuples: Tensor | None = None) -> Tensor:
    r"""
    Joint negative log-likelihood of tuples of labels from S joint draws of the logits, per label: the equation of
    :func:`sampled_joint_nll` with p(y | f) = softmax(f)_y.

    :param logits: draws f_s(x_n), ``(S, N, C)``, joint over the points: from :func:`gaussian_samples` of the latent
        covariance, from weights, or one per member of an ensemble. For a binary model stack ``[0, f]``.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param tuples: indices into the N points, ``(B, τ)``, as from :func:`dyadic_tuples`; default: all N as one tuple.
    :return: a float64 scalar, in nats per label.
    :raises ValueError: shapes that do not fit, logits that are not finite, labels or indices out of range.
    :raises TypeError: labels or indices that are not integers.

    Cost: O(S·(N·C + B·τ)).

    Example:
        >>> logits = torch.tensor([0.9, 0.1]).log().expand(1, 3, 2)  # one draw: the marginal loss
        >>> categorical_joint_nll(logits, torch.tensor([0, 0, 0]))
        tensor(0.1054, dtype=torch.float64)
    """
    converted = as_float64("logits", logits)
    if converted.dim() != 3 or converted.numel() == 0:
        raise ValueError(f"logits: expected shape (S, N, C), got {tuple(converted.shape)}")
    labels = classes(labels, *converted.shape[1:])
    table = converted.log_softmax(-1)
    return sampled_joint_nll(table.gather(-1, labels.expand(len(table), -1).unsqueeze(-1)).squeeze(-1), tuples)


def gaussian_joint_nll(
    mean: Tensor,
    covariance: Tensor,
    target: Tensor,
    *,
    noise: Tensor | float = 0.0,
    tuples: Tensor | None = None,
) -> Tensor:
    r"""
    Joint negative log-likelihood of tuples of targets under a joint Gaussian, per number,

    .. math:: \frac{1}{Bn} \sum_b \tfrac12\left[n \log 2\pi + \log\det S_b + r_b^\top S_b^{-1} r_b\right], \qquad
        S_b = \Sigma_b + D, \quad r_b = y_b - m_b, \quad n = \tau C.

    :param mean: m, ``(N,)`` or ``(N, C)``.
    :param covariance: Σ of the *latent* function, ``(N·C, N·C)``, points first: entry (n·C + c, n'·C + c').
    :param target: y, shape of the mean.
    :param noise: variance of each observation, the diagonal of D: a number or one per output ``(C,)``, not negative.
        It is added after the points are repeated; repeats of a point share the function, not the noise.
    :param tuples: indices into the N points, ``(B, τ)``, as from :func:`dyadic_tuples`; default: all N as one tuple.
    :return: a float64 scalar, in nats per number; :func:`gaussian_nll` for a diagonal Σ and different points.
    :raises ValueError: shapes that do not fit, values that are not finite, indices out of range, a covariance that is
        not positive definite with the noise.
    :raises TypeError: indices that are not integers.

    Cost: O(B·(τC)³) time, blocks of at most 128 MiB.

    Example:
        >>> gaussian_joint_nll(torch.zeros(2), torch.eye(2), torch.zeros(2))
        tensor(0.9189, dtype=torch.float64)
    """
    centre, target = same_shape(mean=mean, target=target)
    if centre.dim() not in (1, 2):
        raise ValueError(f"mean: expected shape (N,) or (N, C), got {tuple(centre.shape)}")
    residual = (target - centre).reshape(len(centre), -1)
    num_data, num_outputs = residual.shape
    matrix = as_float64("covariance", covariance)
    if matrix.shape != (residual.numel(), residual.numel()):
        expected = (residual.numel(), residual.numel())
        raise ValueError(f"covariance: expected shape {expected}, got {tuple(matrix.shape)}")
    diagonal = _noise(noise, num_outputs)
    indices = _indices(tuples, num_data)
    size = indices.shape[1] * num_outputs
    total = 0.0
    for part in indices.split(max(1, _NUMBERS // size**2)):
        flat = (part.unsqueeze(-1) * num_outputs + torch.arange(num_outputs)).flatten(1)  # shape: (B, n)
        block = matrix[flat.unsqueeze(-1), flat.unsqueeze(-2)]  # shape: (B, n, n)
        block.diagonal(dim1=-2, dim2=-1).add_(diagonal.repeat(indices.shape[1]))
        factor, info = torch.linalg.cholesky_ex(block)
        if bool((info != 0).any()):
            raise ValueError("covariance: not positive definite with the noise; repeated points need positive noise")
        white = torch.linalg.solve_triangular(factor, residual.flatten()[flat].unsqueeze(-1), upper=False)
        total += float(0.5 * white.square().sum() + factor.diagonal(dim1=-2, dim2=-1).log().sum())
    return torch.tensor(0.5 * math.log(2 * math.pi) + total / (len(indices) * size), dtype=torch.float64)


def _indices(tuples: Tensor | None, num_data: int) -> Tensor:
    """Indices of the tuples, refused unless they point at data."""
    if tuples is None:
        return torch.arange(num_data).unsqueeze(0)
    if not isinstance(tuples, Tensor) or tuples.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        kind = tuples.dtype if isinstance(tuples, Tensor) else type(tuples).__name__
        raise TypeError(f"tuples: expected a tensor of integers, got {kind}")
    indices = tuples.detach().to("cpu", torch.long)
    if indices.dim() != 2 or indices.numel() == 0:
        raise ValueError(f"tuples: expected shape (B, τ), got {tuple(indices.shape)}")
    if int(indices.min()) < 0 or int(indices.max()) >= num_data:
        raise ValueError(
            f"tuples: expected indices 0 to {num_data - 1}, got {int(indices.min())} to {int(indices.max())}"
        )
    return indices


def _noise(noise: Tensor | float, num_outputs: int) -> Tensor:
    """Variance of the noise of each output, ``(C,)``."""
    values = as_float64("noise", torch.as_tensor(noise, dtype=torch.float64)).flatten()
    if len(values) not in (1, num_outputs) or bool((values < 0).any()):
        raise ValueError(f"noise: expected a non-negative number or one per output ({num_outputs}), got {noise}")
    return values.expand(num_outputs)
