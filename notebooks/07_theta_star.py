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
# # θ⋆ and normalisation: what goes wrong, in pictures
#
# The evidence chooses the prior of a tangent model without a validation set. Two habits break it for modern networks: evaluating it at the trained
# weights $\tilde\theta$, and giving all weights one precision although some of them have no scale. This notebook shows what either does to the error
# bars of one small network with BatchNorm, and what the two recommendations of Antorán et al. (2022) repair: the evidence at
# $\theta_\star$, the mode of the tangent model, and a precision for each normalised group.

# %%
# %matplotlib inline
import copy
import os

import gpytorch
import torch
from torch import nn

import ntkgp
from ntkgp.evaluation.plots import COLORS, new_figure, predictive_bands
from ntkgp.evaluation.training import seeded, train
from ntkgp.evidence import evidence_objective

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # fewer steps and scales where only the code is checked

# %% [markdown]
# ## A network whose weights have no scale
#
# Three clusters of data, two hidden layers, and a BatchNorm behind each. (A tiny `eps`, so that what follows holds to many digits.)


# %%
def truth(x):
    return 0.5 * torch.sin(x) + 0.02 * x.square() - 0.4


generator = torch.Generator().manual_seed(0)
size = (20 if SMOKE else 50, 1)
x = torch.cat([start + 2.4 * torch.rand(size, generator=generator, dtype=torch.float64) for start in (-7.2, -1.2, 4.8)])
y = truth(x) + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
with seeded(0):
    net = nn.Sequential(
        nn.Linear(1, 50), nn.BatchNorm1d(50, eps=1e-12), nn.ReLU(),
        nn.Linear(50, 50), nn.BatchNorm1d(50, eps=1e-12), nn.ReLU(), nn.Linear(50, 1),
    ).double()  # fmt: skip
print(f"training MSE {train(net, x, y, steps=100 if SMOKE else 1500):.5f}, noise of the data 0.00250")

# %% [markdown]
# BatchNorm divides out any factor on the weights before it. `scaled(net, k)` multiplies them, and lets the running statistics follow:
# other weights, the same function.


# %%
def scaled(net, k):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for linear, norm in ((other[0], other[1]), (other[3], other[4])):
            linear.weight.mul_(k)
            linear.bias.mul_(k)
            norm.running_mean.mul_(k)
            norm.running_var.mul_(k**2)
    return other


grid = torch.linspace(-10, 10, 201, dtype=torch.float64).unsqueeze(-1)
for k in (0.01, 100):
    assert torch.allclose(scaled(net, k)(grid), net(grid), rtol=1e-6, atol=1e-6)

# %% [markdown]
# ## The same function, other error bars
#
# The factor $k$ is an accident of initialisation, learning rate and weight decay. A prediction should not depend on it. Here is what does:
# for each $k$ the evidence is fitted in the four ways that come from {one precision, one for each normalised group} × {at $\tilde\theta$, at $\theta_\star$}.


# %%
def fit(net, groups, at):
    lin = ntkgp.LinearizedNetwork(net, x[:8], groups=groups)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-8))
    model = ntkgp.ExactNTKGP(x, y, likelihood, lin)
    report = ntkgp.fit_evidence(model, at=at)
    assert report.converged
    with torch.no_grad():
        latent = model.eval()(grid)
    return model, report, latent


ways = {
    "one λ, θ̃": ("single", "theta_map"),
    "one λ, θ⋆": ("single", "theta_star"),
    "groups, θ̃": ("normalization", "theta_map"),
    "groups, θ⋆": ("normalization", "theta_star"),
}
scales = [0.1, 1.0, 10.0] if SMOKE else [0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
fits = {(way, k): fit(scaled(net, k), *ways[way]) for way in ways for k in scales}
in_gap = int((grid + 3).abs().argmin())
gap_sd = {key: float(latent.variance[in_gap].sqrt()) for key, (_, _, latent) in fits.items()}
print("latent standard deviation at x = -3, between two clusters")
print(" " * 12 + "".join(f"{f'k = {k:g}':>10}" for k in scales))
for way in ways:
    print(f"{way:<12}" + "".join(f"{gap_sd[way, k]:10.3f}" for k in scales))

# %%
figure, axes = new_figure(1, 3, (13.0, 3.6))
factors = torch.logspace(-3, 1, 41).tolist()
penalty = [float(sum(p.detach().square().sum() for p in scaled(net, k).parameters())) / 2 for k in factors]
axes[0].plot(factors, penalty, color=COLORS[0])
axes[0].axhline(penalty[0], color=COLORS[5], lw=1, ls="--")
axes[0].set(title="regularised loss: no minimum in k", xlabel="k", ylabel="½‖θ‖² (the data term is constant)")
axes[0].set(xscale="log", yscale="log")
for color, way in zip(COLORS, ways, strict=False):
    axes[1].plot(scales, [gap_sd[way, k] for k in scales], "o-", ms=3.5, color=color, label=way)
axes[1].set(title="one function, its error bar at x = −3", xlabel="k", ylabel="standard deviation")
axes[1].set(xscale="log", yscale="log")
axes[1].legend(fontsize=8, frameon=False)
names = fits["groups, θ⋆", 1.0][1].group_names
for g, name in enumerate(names):
    chosen = [float(fits["groups, θ⋆", k][1].precision[g]) for k in scales]
    axes[2].plot(scales, chosen, "o-", ms=3.5, color=COLORS[g], label=name)
axes[2].set(title="precisions of the groups, at θ⋆", xlabel="k", ylabel="λ", xscale="log", yscale="log")
axes[2].legend(title="group", fontsize=8, title_fontsize=8, frameon=False)
figure

# %% [markdown]
# Left: shrinking the scaled weights always lowers the regularised loss and never changes the fit. Trained weights of such a network are the minimum of no
# regularised loss, and a Laplace approximation "at the mode" has no mode to stand on. The dashed line is what the other weights cost, which is approached and never reached.
#
# Middle: with one precision at $\tilde\theta$ the error bar of one and the same function changes by orders of magnitude. For small $k$ the
# weights before the normalisers hardly count in $\|\tilde\theta\|^2$ while their derivatives grow as $1/k$; for large $k$ they are all that counts, and drag the common precision down.
# One precision at $\theta_\star$ is much better and still drifts. With a precision for each group both lines are flat.
#
# Right: why. $\theta_g\to k\theta_g$ makes $J_g\to J_g/k$; a precision $\lambda_g\to\lambda_g/k^2$ cancels it, and the evidence finds exactly that
# (Proposition 3 of the paper). The precision of the rest stays where it is.

# %%
drift = {way: max(gap_sd[way, k] for k in scales) / min(gap_sd[way, k] for k in scales) for way in ways}
print("largest over smallest error bar:", {way: round(ratio, 9) for way, ratio in drift.items()})
assert abs(drift["groups, θ⋆"] - 1) < 1e-5
assert abs(drift["groups, θ̃"] - 1) < 1e-5
assert SMOKE or (drift["one λ, θ̃"] > 20 and drift["one λ, θ⋆"] > 1.5)
first, last = fits["groups, θ⋆", scales[0]][1], fits["groups, θ⋆", scales[-1]][1]
slope = (last.precision / first.precision).log() / torch.tensor(scales[-1] / scales[0]).log()
print("slope of log λ over log k:", dict(zip(names, [round(value, 4) for value in slope.tolist()], strict=True)))
assert torch.allclose(slope, torch.tensor([-2.0, -2.0, 0.0], dtype=torch.float64), atol=1e-4)

# %%
figure, axes = new_figure(2, 3, (12.0, 5.4))
for row, way in enumerate(("one λ, θ̃", "groups, θ⋆")):
    for column, k in enumerate((0.1, 1.0, 10.0)):
        ax = axes[3 * row + column]
        _, report, latent = fits[way, k]
        predictive_bands(
            grid, latent.mean, latent.variance, float(report.noise),
            data=(x, y), truth=truth(grid), color=COLORS[3 * row], ax=ax,
        )  # fmt: skip
        ax.set(title=f"{way}, k = {k:g}", ylim=(-12, 12))
        if row or column:
            ax.get_legend().remove()
figure

# %% [markdown]
# Six times the same function, with the same data. All bands agree at the data, where the likelihood decides. Between them the prior decides,
# and the upper row has let the scale of the weights choose it.
#
# ## Which error bars are right?
#
# Invariant is not yet correct. These data have a known truth, so that the error of the network between the clusters can be held against its error bars. (Beyond the data this says little: a
# ReLU network's extrapolation is straight lines.)

# %%
between = ((grid.abs() > 1.2) & (grid.abs() < 4.8)).squeeze(-1)
print(f"{'k = 1':<12}{'rms of error/sd':>16}{'mean sd':>9}{'log density of the truth':>26}")
density = {}
for way in ways:
    _, _, latent = fits[way, 1.0]
    error = (truth(grid).squeeze(-1) - latent.mean)[between]
    variance = latent.variance[between]
    density[way] = float(torch.distributions.Normal(0.0, variance.sqrt()).log_prob(error).mean())
    z = float((error.square() / variance).mean().sqrt())
    print(f"{way:<12}{z:16.3f}{float(variance.sqrt().mean()):9.2f}{density[way]:26.2f}")
print(f"error of the network there: {float(error.square().mean().sqrt()):.2f} (rms)")
assert SMOKE or density["one λ, θ̃"] < density["one λ, θ⋆"]
assert SMOKE or density["groups, θ̃"] < density["groups, θ⋆"]

# %% [markdown]
# None of them. In the middle of the gaps all are wider than the error needs (an rms of 0.25 against mean standard deviations of 2 to 9), and at the very edges of the clusters, where
# the error sets in faster than the variance, too narrow: that is where the ratio above 1 comes from. The log density of the truth, which weighs both,
# prefers θ⋆ to θ̃, and here the groups to one precision.
#
# ## Why not at θ̃
#
# At $\theta_\star$ the expression $M(\theta)=\log p(y\,|\,h_\theta)-\tfrac12\|\theta\|_\Lambda^2-\tfrac12\log\det(I+\Lambda^{-1}H)$ *is* the marginal likelihood of the
# tangent model, $\log N(\tilde y;\,0,\,K_\Lambda+\sigma^2I)$. At any other weights it is smaller, by half a squared distance,
# $M(\theta_\star)-M(\tilde\theta)=\tfrac12\|\theta_\star-\tilde\theta\|^2_{H+\Lambda}$, and that distance depends on Λ: it drags the optimum to precisions that are too small.

# %%
model, report, _ = fits["one λ, θ⋆", 1.0]
noise, lin = report.noise, model.lin
problem = model.evidence_problem(at="theta_star", curvature="simple", targets="data")
star, at_map = evidence_objective(problem, "theta_star"), evidence_objective(problem, "theta_map")
precisions = torch.logspace(-3, 4, 71, dtype=torch.float64)
curve_star = torch.tensor([star.evaluate(value[None], noise).value for value in precisions])
curve_map = torch.tensor([at_map.evaluate(value[None], noise).value for value in precisions])

J = lin.jacobian(x).detach().flatten(0, 1)
shifted = y.flatten() - lin(x).flatten() + J @ lin.theta  # what the evidence explains: y minus its prior mean


def dense(target, value):
    covariance = J @ J.T / value + noise * torch.eye(len(target))
    return torch.distributions.MultivariateNormal(torch.zeros_like(target), covariance).log_prob(target)


index = int(curve_star.argmax())
value = precisions[index]
hessian = J.T @ J / noise + value * torch.eye(lin.num_parameters)
theta_star = torch.linalg.solve(hessian, J.T @ shifted / noise)
lost = float((theta_star - lin.theta) @ hessian @ (theta_star - lin.theta)) / 2
print(f"evidence at θ⋆ {curve_star[index]:.6f}, dense marginal likelihood {dense(shifted, value):.6f}")
print(f"less that at θ̃ {curve_star[index] - curve_map[index]:.6f}, half the squared distance {lost:.6f}")
assert abs(curve_star[index] - dense(shifted, value)) < 1e-6 * abs(curve_star[index])
assert abs(float(curve_star[index] - curve_map[index]) - lost) < 1e-6 * lost
assert (curve_star >= curve_map).all()
assert SMOKE or precisions[curve_map.argmax()] < precisions[curve_star.argmax()] / 5

# %% [markdown]
# A third objective looks natural and is worse than both: the network is the prior mean, so take the evidence of the residuals $y-f(x)$. The network has been fitted to these $y$. Its
# residuals want no prior variance at all, and the precision runs to infinity. `fit_evidence` refuses to.

# %%
residual = y.flatten() - lin(x).flatten()
wide = torch.logspace(-3, 9, 61, dtype=torch.float64)
curve_residual = torch.stack([dense(residual, value) for value in wide])
assert SMOKE or wide[curve_residual.argmax()] > 1e4 * precisions[curve_star.argmax()]
try:
    ntkgp.fit_evidence(model, targets="residual")
except ValueError as refusal:
    print(refusal)
else:
    raise AssertionError
figure, axes = new_figure(1, 2, (9.4, 3.4))
for color, name, curve in ((COLORS[1], "θ⋆", curve_star), (COLORS[0], "θ̃", curve_map)):
    axes[0].plot(precisions, curve, color=color, label=f"at {name}")
    axes[0].plot(precisions[curve.argmax()], curve.max(), "o", color=color)
axes[0].fill_between(precisions, curve_map, curve_star, color=COLORS[5], alpha=0.12, lw=0, label="½‖θ⋆ − θ̃‖²")
axes[0].set(xscale="log", xlabel="λ", ylabel="log evidence (nats)", title="one precision, k = 1")
axes[0].set(ylim=(float(curve_star.max()) - 250, float(curve_star.max()) + 20))
axes[0].legend(fontsize=8, frameon=False)
axes[1].plot(wide, curve_residual, color=COLORS[2])
axes[1].set(xscale="log", xlabel="λ", ylabel="log evidence (nats)", title="of the residuals: no optimum")
figure

# %% [markdown]
# ## How a group is recognised
#
# By Euler's identity: what does not change under $\theta_g\to k\theta_g$ has $J_g\theta_g=0$. `groups.verify` measures it. Mind BatchNorm: in
# evaluation mode its statistics are constants, $J_g\theta_g$ is *not* zero, and the invariance holds only with statistics that follow. A search for
# directions with $J_g\theta_g=0$ would miss these groups; and it is one reason (biases and the normaliser's own scale and shift are another) why the prior mean
# $f-J\tilde\theta$ must not be taken for zero. (Group 0 has no entry: behind a single input BatchNorm leaves only the signs of the first layer, its $J_g$ is zero on
# batch statistics, and a relative error would be 0/0.)

# %%
model, report, _ = fits["groups, θ⋆", 1.0]
lin = model.lin
print(lin.groups)
error = lin.groups.verify(x).tolist()
error[0] = float("nan")  # see above
print(f"\n{'group':<8}{'verify':>10}{'rms of J_g θ_g, evaluation mode':>34}")
for g, name in enumerate(lin.groups.names):
    part = torch.where(lin.groups.index == g, lin.theta, 0.0)
    print(f"{name:<8}{error[g]:10.1e}{float(lin.jvp(x, part).square().mean().sqrt()):34.3f}")
offset = lin(x) - lin.jvp(x, lin.theta)
sizes = [float(values.square().mean().sqrt()) for values in (offset, lin(x))]
print("\nprior mean f - Jθ̃: rms {:.3f}; f: rms {:.3f}".format(*sizes))
assert error[1] < 1e-8
assert error[2] > 1e-3
assert SMOKE or sizes[0] > sizes[1]

# %% [markdown]
# ## A scale that these groups do not know
#
# A plain ReLU network has no normalised groups, but an arbitrary scale all the same: multiply one layer's weight and bias by $a$ and divide the next weight by $a$.
# One precision changes its error bars. A precision for each tensor follows ($\lambda\to\lambda/a^2$ and $\lambda\to a^2\lambda$). It also gives the evidence
# six numbers to fit instead of one, which on small data costs more than it brings ([results/uci.md](../docs/results/uci.md)).

# %%
with seeded(1):
    plain = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1)).double()
train(plain, x, y, steps=100 if SMOKE else 1000)
rebalanced = copy.deepcopy(plain)
with torch.no_grad():
    rebalanced[0].weight.mul_(10)
    rebalanced[0].bias.mul_(10)
    rebalanced[2].weight.div_(10)
assert torch.allclose(rebalanced(grid), plain(grid), rtol=1e-9, atol=1e-9)
assert ntkgp.LinearizedNetwork(plain, x[:8]).groups.names == ("rest",)
changes = {}
for groups in ("normalization", "tensor"):
    before, after = (fit(network, groups, "theta_star")[2].variance[in_gap].sqrt() for network in (plain, rebalanced))
    changes[groups] = float(after / before)
    print(f"groups={groups!r}: error bar at x = -3 {float(before):.3f}, after rebalancing {float(after):.3f}")
assert abs(changes["tensor"] - 1) < 1e-5
assert SMOKE or abs(changes["normalization"] - 1) > 0.05

# %% [markdown]
# ## To take away
#
# - `at="theta_star"` is the default; `at="theta_map"` is there to compare with. $\theta_\star$ is never formed for it: the evidence is the marginal likelihood of
#   a Gaussian process whose prior mean is $f-J\tilde\theta$.
# - `groups="normalization"` is the default; the groups are found from the computation, whatever the modules are called.
# - Together they make error bars a property of the function and the data, not of the scale of its weights. They do not make them right: where
#   the network is wrong and the tangent model cannot know it, the error bars are too small.
