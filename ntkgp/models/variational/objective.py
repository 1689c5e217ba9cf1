"""Objectives of a variational fit, point by point."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkgp.models.variational.expectations import curvature_term, gaussian_term, noise_block, probit_term, sampled_term

if TYPE_CHECKING:
    from ntkgp.models.variational import VariationalNTKGP

_EXPECTATIONS = ("ggn", "mc")
_DRAWS = 32


class Objective:
    r"""What one data point contributes: an expected log-likelihood (ELBO), or its black-box α form
    :math:`\tfrac1\alpha\log\mathbb E_q\,p(y \mid f)^\alpha`.

    :param name: ``"elbo"``, or α in (0, 1].
    :param expectation: ``"ggn"`` or ``"mc"``, of the ELBO of a classification.
    :param classification: whether the likelihood is discrete.
    """

    def __init__(self, name: str | float, expectation: str, classification: bool) -> None:
        if isinstance(name, str):
            if name != "elbo":
                raise ValueError(f"objective: expected 'elbo' or a number in (0, 1], got {name!r}")
            power = 0.0
        elif isinstance(name, bool) or not isinstance(name, int | float):
            raise TypeError(f"objective: expected 'elbo' or a number in (0, 1], got {type(name).__name__}")
        else:
            power = float(name)
            if not (math.isfinite(power) and 0 < power <= 1):
                raise ValueError(f"objective: expected α in (0, 1] ('elbo' is its limit α -> 0), got {name!r}")
        if expectation not in _EXPECTATIONS:
            raise ValueError(f"expectation: expected one of {_EXPECTATIONS}, got {expectation!r}")
        self.power, self.expectation, self.classification = power, expectation, classification
        self.generator: torch.Generator | None = None
        # First row and number of rows of the batch that the given rows are of, where they are not all of it.
        self.share: tuple[int, int] | None = None

    @property
    def is_closed_form(self) -> bool:
        """Whether the optimum of L for given inducing inputs is known."""
        return self.power == 0 and (not self.classification or self.expectation == "ggn")

    def terms(
        self, model: VariationalNTKGP, x: Tensor, y: Tensor, root: Tensor, mean: Tensor | None, elbo: bool = False
    ) -> Tensor:
        """Contributions of the points of a batch, (B,).

        :param root: K(x, Z) R, (B·C, r).
        :param mean: predictive means (B, C), or None for the network's outputs.
        :param elbo: the ELBO, whatever the objective.
        """
        outputs = model.network_outputs(x)
        rows = root.reshape(len(x), model.num_outputs, -1)
        covariance = model.products.blocks(x) - rows @ rows.mT
        power = 0.0 if elbo else self.power
        centre = outputs if mean is None else mean
        if not self.classification:
            noise = noise_block(model.likelihood, model.num_outputs)
            return gaussian_term(y.reshape(centre.shape) - centre, covariance, noise, power)
        if power == 1:
            return probit_term(centre, y, covariance)
        if power == 0 and self.expectation == "ggn":
            return curvature_term(outputs, y, covariance, None if mean is None else mean - outputs)
        generator = self.generator or torch.Generator(x.device).manual_seed(0)
        first, whole = self.share or (0, len(x))
        shape = _DRAWS, whole, outputs.shape[-1]
        # Drawn for the whole batch: the numbers of a row are the same whoever has it.
        draws = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=x.device)[:, first : first + len(x)]
        return sampled_term(centre, y, covariance, power, draws)
