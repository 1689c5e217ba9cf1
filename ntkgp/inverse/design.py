"""What to measure next: the information that further measurements would bring, exactly and before they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.models.inverse import InverseNTKGP
from ntkgp.models.inverse.checks import check_operator
from ntkgp.models.noise import has_fixed_noise

CRITERIA = ("information", "variance")


class Design(NamedTuple):
    """Measurements chosen one after the other.

    :ivar chosen: indices of the candidates, in the order of choice.
    :ivar gains: what each brought when it was chosen, shape (number chosen,).
    :ivar covariance: of the pixels once all of them were measured, shape (d, d).
    """

    chosen: tuple[int, ...]
    gains: Tensor
    covariance: Tensor


def expected_information_gain(
    model: InverseNTKGP, candidates: Any, *, noise: float | Tensor | None = None, criterion: str = "information"
) -> Tensor:
    r"""What each of several candidate measurements would tell about the image, given those of the model.

    For a candidate operator B with noise variances D, and C the posterior covariance of the pixels,

    .. math:: \text{information} = \tfrac12 \log\det(I + D^{-1/2} B C B^\top D^{-1/2}), \qquad
        \text{variance} = \mathrm{tr}\, C B^\top (B C B^\top + D)^{-1} B C,

    the mutual information of image and measurement in nats (D-optimal), and the total variance of the pixels that it
    would remove (A-optimal). In a Gaussian model both are the same whatever will be measured: nothing is sampled.

    :param model: the fitted model, in any mode.
    :param candidates: a sequence of forward operators; or one operator, of which each entry of the first dimension of
        ``data_shape`` is a candidate: ``RayTransform(ParallelBeam(shape, many_angles, n))`` for the next angle.
    :param noise: variance of a new measurement: a number, or a tensor of all candidates' measurements, flat in their
        order. By default the learned noise of the model.
    :param criterion: "information" or "variance".
    :return: shape (number of candidates,), float64.
    :raises ValueError: no candidate, operators of other images, a noise that is not positive, or no learned noise and
        none given; too many pixels for their covariance in the model's `max_memory`.

    Cost: with d pixels and m measurements of each of K candidates: the covariance of the pixels once,
    d + K·m applications of an operator, and O(K·m³). Barbano et al. 2022, *Bayesian experimental design for computed
    tomography with the linearised deep image prior*, whose estimate from samples this replaces.

    >>> import gpytorch, ntkgp
    >>> class Pixels(torch.nn.Module):  # each pixel is a candidate
    ...     image_shape, data_shape, num_measurements = (6,), (6,), 6
    ...     def forward(self, image):
    ...         return image
    ...     adjoint = forward
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 6), torch.ones(1, 2))
    >>> model = InverseNTKGP(torch.ones(6), Pixels(), gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> expected_information_gain(model, Pixels()).shape
    torch.Size([6])
    """
    parts = _candidates(model, candidates, noise, criterion)
    all_seen = _seen(parts, model.pixel_covariance())
    with torch.no_grad():
        return torch.stack([_score(*seen, part.noise, criterion) for part, seen in zip(parts, all_seen, strict=True)])


def greedy_design(
    model: InverseNTKGP,
    candidates: Any,
    number: int,
    *,
    noise: float | Tensor | None = None,
    criterion: str = "information",
    progress: bool = False,
) -> Design:
    r"""Choose measurements one after the other, each the best given those chosen before.

    After each choice :math:`C \leftarrow C - CB^\top(BCB^\top + D)^{-1}BC`; a candidate is chosen once. The information
    of greedy choices is at least 1 − 1/e of that of the best set of as many (the gain is submodular; Nemhauser, Wolsey
    & Fisher 1978).

    :param number: of choices, at most as many as there are candidates.
    :param progress: show a progress bar. An interrupt keeps the choices so far.
    :return: the choices, their gains, which for the information add up to that of the set, and the covariance left.
    :raises ValueError: as :func:`expected_information_gain`, or another number.

    Other parameters are those of :func:`expected_information_gain`. Cost: `number` times that of it, and O(m·d²) each.

    >>> import gpytorch, ntkgp
    >>> class Pixels(torch.nn.Module):
    ...     image_shape, data_shape, num_measurements = (6,), (6,), 6
    ...     def forward(self, image):
    ...         return image
    ...     adjoint = forward
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 6), torch.ones(1, 2))
    >>> model = InverseNTKGP(torch.ones(6), Pixels(), gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> len(greedy_design(model, Pixels(), 3).chosen)
    3
    """
    parts = _candidates(model, candidates, noise, criterion)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= len(parts):
        raise ValueError(
            f"number: expected an integer from 1 to {len(parts)}, the number of candidates, got {number!r}"
        )
    covariance = model.pixel_covariance().clone()
    chosen: list[int] = []
    gains: list[float] = []
    with torch.no_grad(), tqdm(total=number, desc="design", disable=not progress) as bar:
        try:
            for _ in range(number):
                left = [k for k in range(len(parts)) if k not in chosen]
                seen = _seen([parts[k] for k in left], covariance)
                scores = [float(_score(*s, parts[k].noise, criterion)) for k, s in zip(left, seen, strict=True)]
                best = left[scores.index(max(scores))]
                ((cross, inner),) = _seen([parts[best]], covariance)
                taken = torch.linalg.solve_triangular(_root(inner, parts[best].noise), cross.mT, upper=False)
                covariance = covariance - taken.mT @ taken
                chosen.append(best)
                gains.append(max(scores))
                bar.update()
        except KeyboardInterrupt:
            if not chosen:
                raise
    return Design(tuple(chosen), torch.tensor(gains, dtype=torch.float64), covariance)


class _Candidate(NamedTuple):
    """Measurements of an operator that are made together.

    :ivar rows: which of its measurements, flat.
    :ivar noise: their variances, shape (m,).
    """

    operator: Any
    rows: slice
    noise: Tensor


def _candidates(model: Any, candidates: Any, noise: float | Tensor | None, criterion: str) -> list[_Candidate]:
    """Checked candidates with their noise."""
    if not isinstance(model, InverseNTKGP):
        raise TypeError(f"model: expected a ntkgp.InverseNTKGP, got {type(model).__name__}")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {CRITERIA}, got {criterion!r}")
    if isinstance(candidates, Sequence):
        found = [(operator, slice(0, operator.num_measurements)) for operator in _checked(candidates, model)]
    else:
        check_operator(candidates, model.lin.base, "candidates")
        count = candidates.data_shape[0]
        each = candidates.num_measurements // count
        found = [(candidates, slice(k * each, (k + 1) * each)) for k in range(count)]
    sizes = [rows.stop - rows.start for _, rows in found]
    variances = _noise(model, noise, sum(sizes)).split(sizes)
    return [_Candidate(operator, rows, part) for (operator, rows), part in zip(found, variances, strict=True)]


def _checked(candidates: Sequence[Any], model: InverseNTKGP) -> Sequence[Any]:
    if not candidates:
        raise ValueError("candidates: expected at least one operator, got none")
    for k, operator in enumerate(candidates):
        check_operator(operator, model.lin.base, f"candidates[{k}]")
    return candidates


def _noise(model: InverseNTKGP, noise: float | Tensor | None, size: int) -> Tensor:
    """Variances of all candidate measurements, (size,)."""
    device = model.lin.shared.x.device
    if noise is None:
        if has_fixed_noise(model.likelihood):
            raise ValueError("noise: the model's noise is known for its own measurements only; give that of new ones")
        noise = model.likelihood.noise.detach()
    value = torch.as_tensor(noise, dtype=torch.float64, device=device).reshape(-1)
    if value.numel() not in (1, size):
        raise ValueError(f"noise: expected a number or {size} variances, got shape {tuple(value.shape)}")
    if not bool((value > 0).all()) or not bool(torch.isfinite(value).all()):
        raise ValueError("noise: expected positive finite variances")
    return value.expand(size)


def _apply(operator: Any, images: Tensor) -> Tensor:
    """All measurements of images: (K, d) -> (K, n)."""
    return operator(images.reshape(len(images), *operator.image_shape)).reshape(len(images), -1)


def _seen(parts: Sequence[_Candidate], covariance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """C Bᵀ, shape (d, m), and B C Bᵀ, shape (m, m), of every candidate; of one operator C Bᵀ is made once."""
    last: tuple[Any, Tensor] | None = None
    for operator, rows, _ in parts:
        # Not around the yield: a generator that is dropped there would leave gradients off for everything after it.
        with torch.no_grad():
            if last is None or last[0] is not operator:
                last = operator, _apply(operator, covariance)
            cross = last[1][:, rows]
            inner = _apply(operator, cross.mT)[:, rows]
        yield cross, 0.5 * (inner + inner.mT)


def _root(seen: Tensor, noise: Tensor) -> Tensor:
    """Cholesky factor of B C Bᵀ + D."""
    return torch.linalg.cholesky(seen + noise.diag())


def _score(cross: Tensor, seen: Tensor, noise: Tensor, criterion: str) -> Tensor:
    """The criterion of one candidate."""
    root = _root(seen, noise)
    if criterion == "information":
        return root.diagonal().log().sum() - 0.5 * noise.log().sum()
    return torch.linalg.solve_triangular(root, cross.mT, upper=False).square().sum()
