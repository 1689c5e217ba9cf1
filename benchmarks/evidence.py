"""Evidence value and gradient: cached per-group Grams against GPyTorch on an explicit Jacobian.

    python -m benchmarks.evidence [--rows 400] [--width 100]

Both compute log N(t; 0, Σ_g K_g/λ_g + σ²I) and its gradient in (log λ, log σ²) for one network, in the same process, in
turn; the printed figures are medians of 5 and the ratio, with the largest difference of the two gradients.
"""

from __future__ import annotations

import argparse

import gpytorch
import torch
from linear_operator.operators import RootLinearOperator
from torch import Tensor, nn

import ntkgp
from benchmarks.timing import alternate
from ntkgp.evaluation.training import seeded
from ntkgp.evidence import evidence_objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--width", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with seeded(0):
        w = arguments.width
        net = nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 1)).double()
        x = torch.randn(arguments.rows, 8, dtype=torch.float64)
        y = torch.sin(x.sum(-1))
    lin = ntkgp.LinearizedNetwork(net, x[:4], groups="layer")
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = ntkgp.ExactNTKGP(x, y, likelihood, lin)
    model.kernel.precision = torch.tensor([1.0, 2.0, 5.0])
    likelihood.noise = 0.1
    objective = evidence_objective(model.evidence_problem(), "theta_star")
    precision, noise = model.kernel.precision.detach(), torch.tensor([0.1], dtype=torch.float64)
    jacobian = lin.jacobian(x).flatten(0, 1)
    targets = model.evidence_problem().targets
    logs = torch.cat([precision, noise]).log().requires_grad_()

    def grams() -> Tensor:
        return objective.evaluate(precision, noise).gradient

    def root() -> Tensor:
        features = jacobian * lin.groups.expand((-0.5 * logs[:3]).exp())
        covariance = RootLinearOperator(features).add_diagonal(logs[3].exp().expand(len(targets)))
        with gpytorch.settings.fast_computations(False, False, False):
            value = gpytorch.distributions.MultivariateNormal(torch.zeros_like(targets), covariance).log_prob(targets)
        return torch.autograd.grad(value, logs)[0]

    error = float((grams() - root()).abs().max())
    medians = alternate({"cached Grams": grams, "Jacobian root": root})
    print(f"N = {arguments.rows}, P = {lin.num_parameters}, G = {len(lin.groups)}; gradients differ by {error:.1e}")
    for name, seconds in medians.items():
        print(f"{name:>14}: {1e3 * seconds:8.1f} ms CPU")
    print(f"ratio {medians['Jacobian root'] / medians['cached Grams']:.1f}")


if __name__ == "__main__":
    main()
