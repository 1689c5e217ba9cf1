"""Data space or weight space: which of the two an exact model works in, and why."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from gpytorch.likelihoods import Likelihood, MultitaskGaussianLikelihood

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import format_memory
from ntkgp.linearization.statistics import RowTriangle
from ntkgp.models.dual import matrices_of_fit, memory_of_fit
from ntkgp.models.noise import NoiseLink, check_fixed_noise, fits_fixed_noise, has_fixed_noise, is_classification

FORMS = ("auto", "dual", "primal")
# Factorisations of a typical fit, and passes for a Hessian of a classification.
_FACTORISATIONS = 10
_HESSIANS = 5
# Weight space must be this many times cheaper to be chosen: in data space later predictions need no rows of length P.
_MARGIN = 2.0


class Form(NamedTuple):
    """The form of an exact model.

    :ivar name: "dual" or "primal".
    :ivar rows: n, the size of its matrices (at most, in weight space).
    :ivar nbytes: bytes that it takes at its peak.
    :ivar reason: one line for people.
    """

    name: str
    rows: int
    nbytes: int
    reason: str


def dual_form(lin: LinearizedNetwork, num_data: int) -> Form:
    """Data space: N·C × N·C matrices. Grams may go to disk, what a factorisation or a pass needs may not."""
    rows = num_data * lin.num_outputs
    reason = f"N·C = {rows:,} rows"
    return Form("dual", rows, memory_of_fit(lin, num_data), reason)


def primal_form(lin: LinearizedNetwork, likelihood: Likelihood, num_data: int | None) -> Form:
    """Weight space: P × P triangles, and matrices of n <= P rows for every noise variance.

    :param num_data: N, or None where it is not known yet.
    :raises ValueError: a noise covariance between outputs, which no compression of rows survives.
    """
    p, c = lin.num_parameters, lin.num_outputs
    if isinstance(likelihood, MultitaskGaussianLikelihood) and likelihood.rank > 0:
        raise ValueError(
            f"likelihood: MultitaskGaussianLikelihood(rank={likelihood.rank}) has a noise covariance between outputs; "
            "weight space needs independent noise: use rank=0 or form='dual'"
        )
    kinds, kept = 1, 0
    if is_classification(likelihood):
        rows = p if num_data is None else min(p, num_data * max(c - 1, 1))
    elif has_fixed_noise(likelihood):
        if num_data is None:
            raise ValueError("likelihood: fixed noise belongs to rows in their order; pass tensors, not a DataLoader")
        check_fixed_noise(likelihood, num_data)
        noise = NoiseLink(likelihood, num_data, c).model()
        kinds_of_rows = Counter(zip(noise.fixed.tolist(), noise.component.tolist(), strict=True))
        counts = [num_data * c] if noise.num_learned == 0 else list(kinds_of_rows.values())
        rows, kinds = sum(min(p, n) for n in counts), sum(n > p for n in counts)
        kept = sum(n for n in counts if n <= p)
    else:
        kinds = max(NoiseLink(likelihood, 1, c).model().num_learned, 1)
        rows = p * kinds if num_data is None else min(p, num_data * c // kinds) * kinds
    gathered = RowTriangle.nbytes(p) * kinds + 8 * p * kept
    needed = max(gathered, 8 * rows * p + matrices_of_fit(rows))
    known = "" if num_data is None else f" of N·C = {num_data * c:,}"
    reason = f"{rows:,} compressed rows at most{known}, P = {p:,}"
    return Form("primal", rows, needed, reason)


def choose_form(
    form: str, lin: LinearizedNetwork, likelihood: Likelihood, num_data: int | None, max_memory: int
) -> Form:
    r"""The form of an exact model.

    ``"auto"`` takes weight space where its estimated flops, :math:`2 N C P^2 + 10 n^3` (with five passes rather than
    one for a classification), are less than half of those in data space, :math:`(NC)^2 P + 10 (NC)^3`, or where data
    space does not fit in the budget and weight space does. n is the number of compressed rows, the smaller of P and of
    the rows that share a noise variance, summed over the noise variances. Memory is :math:`64 (NC)^2` bytes in data
    space, or what the passes take where that is more; in weight space the larger of :math:`16 P^2` per noise variance
    and :math:`8 nP + 64 n^2`. The Grams come on top and may go to disk.

    :param num_data: N; None for a loader that does not know it.
    :raises ValueError: an unknown form, weight space that does not fit in the budget, or a likelihood that has none.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
    unknown_noise = form == "auto" and num_data is not None and not fits_fixed_noise(likelihood, num_data)
    if num_data is not None and (form == "dual" or unknown_noise):
        # Without the noise of these data no comparison can be made; predictions will ask for it.
        return dual_form(lin, num_data)
    if form == "primal" or num_data is None:
        return _checked(primal_form(lin, likelihood, num_data), lin, max_memory)
    dual = dual_form(lin, num_data)
    if isinstance(likelihood, MultitaskGaussianLikelihood) and likelihood.rank > 0:
        return dual
    primal = primal_form(lin, likelihood, num_data)
    if primal.rows >= dual.rows or primal.nbytes > max_memory:
        return dual
    p, n, r = lin.num_parameters, dual.rows, primal.rows
    passes = _HESSIANS if is_classification(likelihood) else 1
    cost = 2 * passes * n * p**2 + _FACTORISATIONS * r**3
    cheaper = _MARGIN * cost <= n**2 * p + _FACTORISATIONS * n**3
    return primal if cheaper or dual.nbytes > max_memory else dual


def _checked(form: Form, lin: LinearizedNetwork, max_memory: int) -> Form:
    if form.nbytes > max_memory:
        raise ValueError(
            f"max_memory: {format_memory(max_memory)} is too small for weight space with P = {lin.num_parameters:,} "
            f"({form.reason}); it needs {format_memory(form.nbytes)} beside the Grams, which may go to disk"
        )
    return form
