# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bayesian optimisation with the network you have
#
# Bayesian optimisation asks a surrogate for a mean *and* a variance, which is why the surrogate is usually a Gaussian process and why a trained network usually is
# not. Its tangent model is one. This notebook plugs it into BoTorch (`pip install 'ntkgp[bo]'`), runs it against BoTorch's own `SingleTaskGP` and
# against points without any model on two standard problems, and says who wins.

# %%
# %matplotlib inline
import os
import warnings

import botorch
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.exceptions import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf, optimize_acqf_discrete
from botorch.test_functions import Branin, Hartmann
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn

import ntkgp
import ntkgp.botorch  # the models are BoTorch models from here on
from ntkgp.evaluation.plots import COLORS, new_figure
from ntkgp.evaluation.training import seeded, train

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # fewer seeds and evaluations where only the code is checked
SEEDS, STEPS = (1, 2) if SMOKE else (5, 12)

# %% [markdown]
# ## Two surrogates
#
# Both see inputs in the unit cube, standardised values, and are told that the values are exact. `SingleTaskGP` is BoTorch's default, with its priors and its fit. The network is
# an ordinary regression network with two hidden layers of 50; with every new observation it is trained a little further, linearised, and its prior precision is
# set by the evidence.
#
# Three things matter more here than elsewhere. *Standardise the inputs*: on raw $[0,1]$ inputs a fresh network is nearly linear, and so is its kernel. *Do not
# learn a noise that is not there*: from ten points the evidence may call the function noise. *Take `mean="posterior"`*, the mean of the tangent model given the
# data: the network's own output need not have learned the newest value yet, and an acquisition function would ask for the same point again. (Activation and one precision instead of one for
# each layer were chosen by held-out log density on two other functions, the six-hump camel and Levy's.)


# %%
EXACT = 1e-6  # variance of an exact value, of standardised ones


class Standardised(nn.Module):
    """Inputs uniform on [0, 1], to mean 0 and variance 1."""

    def forward(self, u):
        return (u - 0.5) * 12**0.5


class NetworkSurrogate:
    """Keeps one network over the whole run."""

    def __init__(self, dim, seed):
        with seeded(seed):
            layers = [Standardised(), nn.Linear(dim, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1)]
            self.net = nn.Sequential(*layers).double()
        self.training = {"steps": 200, "learning_rate": 1e-2}

    def __call__(self, x, y):
        train(self.net, x, y, **self.training)
        self.training = {"steps": 60, "learning_rate": 3e-3}
        lin = ntkgp.LinearizedNetwork(self.net, x, groups="single")
        likelihood = FixedNoiseGaussianLikelihood(torch.full((len(x),), EXACT))
        model = ntkgp.ExactNTKGP(x, y, likelihood, lin, mean="posterior")
        ntkgp.fit_evidence(model)
        return model.eval()


class GPSurrogate:
    def __init__(self, dim, seed):
        pass

    def __call__(self, x, y):
        model = SingleTaskGP(x, y, train_Yvar=torch.full_like(y, EXACT))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


# %% [markdown]
# ## One step
#
# Any acquisition function takes the model as it is, and `optimize_acqf` has gradients through the kernel. Here is one step on Branin's function, after ten
# evaluations.

# %%
branin, hartmann = Branin(negate=True), Hartmann(dim=6, negate=True)


def evaluate(problem, u):
    """Value (N, 1) at points of the unit cube."""
    low, high = problem.bounds.to(u)
    return problem(low + (high - low) * u).unsqueeze(-1)


def standardised(values):
    return (values - values.mean()) / values.std()


x = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(10, dtype=torch.float64)
y = standardised(evaluate(branin, x))
model = NetworkSurrogate(2, seed=0)(x, y)
assert isinstance(model, botorch.models.model.Model)
acquisition = LogExpectedImprovement(model, best_f=y.max())
unit_square = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
torch.manual_seed(0)
candidate, value = optimize_acqf(
    acquisition, unit_square, q=1, num_restarts=2, raw_samples=64, options={"maxiter": 5 if SMOKE else 30}
)
posterior = model.posterior(candidate)
print(f"next: {[round(v, 3) for v in candidate[0].tolist()]}, log EI {float(value.detach()):.2f}, ", end="")
print(
    f"predicted {float(posterior.mean.detach()):.2f} ± {float(posterior.variance.detach().sqrt()):.2f} (standardised)"
)
print(
    f"found there: {float((evaluate(branin, candidate) - evaluate(branin, x).mean()) / evaluate(branin, x).std()):.2f}"
)
assert candidate.shape == (1, 2)
assert (model.posterior(x).variance.squeeze(-1) < posterior.variance.squeeze(-1)).all()

# %% [markdown]
# ## The race
#
# From the same start both choose 12 points by the same rule: the largest log expected improvement among 300 scattered candidates and 150 around the best point
# so far. (A finite set keeps the race short and gives both the same optimiser. `optimize_acqf` would find better maxima of either acquisition function.) The third row is the
# Sobol sequence going on without a model. Five starts each; *regret* is the optimum less the best value so far.


# %%
def candidates(problem, best, seed):
    scattered = torch.quasirandom.SobolEngine(problem.dim, scramble=True, seed=seed).draw(300, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    near = best + 0.1 * torch.randn(150, problem.dim, generator=generator, dtype=torch.float64)
    return torch.cat([scattered, near.clamp(0, 1)])


def race(problem, surrogate, seed, start):
    sobol = torch.quasirandom.SobolEngine(problem.dim, scramble=True, seed=seed)
    x = sobol.draw(start if surrogate else start + STEPS, dtype=torch.float64)
    values = evaluate(problem, x)
    if surrogate:
        model_of = surrogate(problem.dim, seed)
        for step in range(STEPS):
            y = standardised(values)
            acquisition = LogExpectedImprovement(model_of(x, y), best_f=y.max())
            choices = candidates(problem, x[values.argmax()], 1000 * seed + step)
            with torch.no_grad():
                chosen, _ = optimize_acqf_discrete(acquisition, q=1, choices=choices)
            x, values = torch.cat([x, chosen]), torch.cat([values, evaluate(problem, chosen)])
    return x, problem.optimal_value - values.squeeze(-1).cummax(0).values[start - 1 :]


problems = {"Branin, 2 inputs": (branin, 6), "Hartmann, 6 inputs": (hartmann, 12)}
surrogates = {"SingleTaskGP": GPSurrogate, "NTK-GP": NetworkSurrogate, "Sobol": None}
regrets, visited = {}, {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", OptimizationWarning)
    for title, (problem, start) in problems.items():
        for name, surrogate in surrogates.items():
            runs = [race(problem, surrogate, seed, start) for seed in range(SEEDS)]
            regrets[title, name] = torch.stack([regret for _, regret in runs])
            visited[title, name] = runs[0][0]

# %%
figure, axes = new_figure(1, 2, (9.4, 3.6))
for ax, (title, (_, start)) in zip(axes, problems.items(), strict=True):
    for color, name in zip(COLORS, surrogates, strict=False):
        found = regrets[title, name]
        mean, error = found.mean(0), found.std(0, correction=min(1, SEEDS - 1)) / SEEDS**0.5
        evaluations = torch.arange(start, start + STEPS + 1)
        ax.plot(evaluations, mean, color=color, label=name)
        ax.fill_between(evaluations, (mean - error).clamp_min(mean / 10), mean + error, color=color, alpha=0.15, lw=0)
    ax.set(title=title, xlabel="evaluations", ylabel="regret (mean ± SE)", yscale="log")
    ax.legend(fontsize=8, frameon=False)
figure.set_dpi(100)
figure

# %%
print(f"{'regret at the end':<22}" + "".join(f"{name:>22}" for name in surrogates))
for title in problems:
    row = ""
    for name in surrogates:
        last = regrets[title, name][:, -1]
        row += f"{float(last.mean()):13.4f} ± {float(last.std(correction=min(1, SEEDS - 1))) / SEEDS**0.5:6.4f}"
    print(f"{title:<22}{row}")
for title in problems:
    better = (regrets[title, "NTK-GP"][:, -1] < regrets[title, "SingleTaskGP"][:, -1]).sum()
    print(f"{title}: the network ahead of the GP in {int(better)} of {SEEDS} runs")

# %%
if not SMOKE:
    ends = {key: float(found[:, -1].mean()) for key, found in regrets.items()}
    for title in problems:
        assert ends[title, "SingleTaskGP"] < ends[title, "NTK-GP"]
        assert ends[title, "SingleTaskGP"] < ends[title, "Sobol"]
    assert ends["Branin, 2 inputs", "NTK-GP"] < ends["Branin, 2 inputs", "Sobol"]
    assert abs(ends["Hartmann, 6 inputs", "NTK-GP"] - ends["Hartmann, 6 inputs", "Sobol"]) < 0.5

# %% [markdown]
# ## Who wins
#
# `SingleTaskGP`, on both problems. On Branin's function the network is clearly better than no model and ends behind the GP in four of five runs; on
# Hartmann's it ends behind in all five, and is no better than the Sobol points. Five runs of twelve steps are few: take the direction from them, not the size. (Regrets are
# of a search among 300 + 150 candidates in each step, for both models.)
#
# This is no surprise. A few dozen exact values of a smooth function of a few numbers are what a stationary kernel with a length scale for each input, and priors
# made for this use, is good at. The tangent kernel of a small network has neither length scales nor, with ReLUs, smoothness, and the network it comes
# from was trained on a dozen or two points.
#
# So: with a new problem, few inputs and few values, take the GP. The tangent model is for the case where a network is there already and is worth keeping, because it
# was trained on much more than this run will ever evaluate, or because its inputs (images, sequences, graphs) have no obvious kernel. Then
# `from_network` makes it a BoTorch model, and `condition_on_observations` takes new values in without any training
# ([the guide](../docs/guide/gpytorch.md)). Neither was tested here.
