"""What may be wrong with a fitted error map, in plain words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ntkgp.inverse.total_variation import collapse_warnings
from ntkgp.models.inverse import InverseNTKGP
from ntkgp.models.noise import has_fixed_noise

_GREY_LEVELS = 255 * math.sqrt(12)  # the rounding of an image to eight bits, as a part of its range


def group_image_sd(model: InverseNTKGP, num_probes: int = 4, seed: int = 0) -> Tensor:
    r"""Standard deviation of the image under the prior of each group of weights alone, shape (G,).

    :math:`\sqrt{\operatorname{tr}(J_gJ_g^\top)/(\lambda_g d)}`, estimated by random weights of each group.

    :param model: its precisions are those that count.
    :param num_probes: draws for each group, K; the relative standard error is below :math:`1/\sqrt{2K}`.
    :param seed: of the draws; the global random state is not touched.

    Cost: G·num_probes forward-mode passes of the network.
    """
    lin, generator = model.lin.base, torch.Generator().manual_seed(seed)
    x, groups = model.lin.shared.x, torch.arange(len(lin.groups)).to(lin.theta.device)
    squares = torch.zeros(len(groups), dtype=torch.float64, device=lin.theta.device)
    with torch.no_grad():
        for _ in range(num_probes):
            z = torch.randn(lin.num_parameters, generator=generator, dtype=lin.dtype).to(lin.theta.device)
            masked = torch.where(lin.groups.index.to(z.device) == groups.unsqueeze(-1), z, 0.0)
            moved = torch.cat([lin.jvp(x, part).to(torch.float64) for part in masked.split(8)])
            squares += moved.flatten(1).square().mean(1) / num_probes
    return (squares / model.kernel.precision.detach().to(squares)).sqrt()


def diagnose(model: InverseNTKGP, posterior_sd: Tensor | None = None, *, floor: float | None = None) -> tuple[str, ...]:
    """Warnings of :func:`~ntkgp.inverse.collapse_warnings` about a fitted model, one sentence each; empty if none.

    :param model: after :func:`~ntkgp.fit_evidence`.
    :param posterior_sd: its error map, where one was made.
    :param floor: the smallest standard deviation that the image can show; by default the rounding of an image with the
        reconstruction's range to eight bits.
    :raises TypeError: another model.

    Cost: four forward-mode passes of the network for each group.

    >>> import gpytorch, ntkgp
    >>> A = ntkgp.inverse.DenseOperator(torch.ones(3, 4), (2, 2))
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 4), torch.ones(1, 2), groups="single")
    >>> model = InverseNTKGP(torch.ones(3), A, gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> diagnose(model)
    ()
    >>> _ = model.set_hyperparameters(torch.tensor([1e12]))
    >>> diagnose(model)[0][:9]
    'collapsed'
    """
    if not isinstance(model, InverseNTKGP):
        raise TypeError(f"model: expected a ntkgp.InverseNTKGP, got {type(model).__name__}")
    image = model.lin.image
    if floor is None:
        floor = float(image.max() - image.min()) / _GREY_LEVELS
    options: dict[str, Any] = {}
    if not has_fixed_noise(model.likelihood):
        assert model.train_targets is not None
        residual = model.train_targets.to(torch.float64) - model.lin(model.lin.rows_of(0))[:, 0]
        options["residual_rms"] = float(residual.square().mean().sqrt())
        options["noise"] = float(model.likelihood.noise.detach().to(torch.float64).sqrt())
    names = model.lin.groups.names
    return collapse_warnings(group_image_sd(model), names=names, posterior_sd=posterior_sd, floor=floor, **options)
