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
# # More data than a Cholesky takes
#
# Exact inference with the tangent kernel factorises an N·C × N·C matrix. When that is too large the same kernel, the same mean and the
# same evidence go on in four ways, and a fifth tells how far one is from exact:
#
# 1. **exact in weight space**: P × P sums instead of N·C × N·C Grams, any N;
# 2. **one-pass evidence**: sums over the data, after which every precision and noise can be tried without touching them again;
# 3. **ELLA** (Nyström features) and 4. **VaLLA** (variational inducing points);
# 5. **certificates**: intervals for the exact variance from a few products with the kernel matrix.

# %%
# %matplotlib inline
import os
import time

import gpytorch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.evaluation.datasets import toy_gap, toy_gap_function
from ntkgp.evaluation.divergence import gaussian_kl
from ntkgp.evaluation.plots import new_figure, predictive_bands
from ntkgp.evaluation.training import seeded, train
from ntkgp.evidence import one_pass
from ntkgp.models.variational import kmeans_inducing_points

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # fewer data where only the code is checked


def gaussian() -> gpytorch.likelihoods.GaussianLikelihood:
    return gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-6))


# %% [markdown]
# ## A small problem, where the exact answer is known

# %%
x, y = toy_gap(120 if SMOKE else 400, seed=0)
with seeded(0):
    net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
train(net, x, y, steps=200 if SMOKE else 1500, learning_rate=1e-2)
lin = ntkgp.LinearizedNetwork(net, x[:8], groups="layer")
exact = ntkgp.ExactNTKGP(x, y, gaussian(), lin, form="dual")
report = ntkgp.fit_evidence(exact)
exact.eval()
print(report)

# %% [markdown]
# ## Exact, in weight space
#
# With `form="primal"` (or automatically, where P is small beside N·C) one pass gathers the P × P sums $J^\top WJ$ and $J^\top Wt$. They are
# turned into at most P rows that stand for all N·C, and everything goes on as before: same calls, same numbers. The data may come from a
# `DataLoader` and are never held.

# %%
loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
primal = ntkgp.ExactNTKGP(loader, None, gaussian(), lin)
primal_report = ntkgp.fit_evidence(primal)
print(f"{primal.form} form, log evidence {primal_report.log_evidence:.9f}; dual {report.log_evidence:.9f}")
# A float32 network rounds at 1e-7, differently in batches of another size; for a float64 one the two agree to 1e-8.
assert abs(primal_report.log_evidence - report.log_evidence) < 1e-5 * abs(report.log_evidence)

# %% [markdown]
# ## ELLA and VaLLA beside it
#
# Both replace the kernel matrix by one of low rank. ELLA projects the prior on the gradients at M landmarks: its variance is never larger than the
# exact one, and falls to zero far from the landmarks (`residual=True` adds what is missing at every point). VaLLA keeps the prior and learns where its
# M inducing points are. Precisions and noise are those of the exact evidence here, so that only the approximation differs.

# %%
precision, noise = exact.kernel.precision.detach(), exact.likelihood.noise.detach()
count = 20
ella = ntkgp.NystromNTKGP((x, y), gaussian(), lin, num_landmarks=count, num_features=None)
ella.set_hyperparameters(precision, noise)
ella.fit(progress=False)

start = time.perf_counter()
valla = ntkgp.VariationalNTKGP(kmeans_inducing_points(lin.pack(x), count)[0], gaussian(), lin, num_data=len(x))
valla.set_hyperparameters(precision, noise)
valla.fit((x, y), progress=False, evidence=None, iterations=10 if SMOKE else None)
print(f"VaLLA with {count} learned inducing points: {time.perf_counter() - start:.1f} s")

grid = torch.linspace(float(x.min()) - 1.5, float(x.max()) + 1.5, 200).unsqueeze(-1)
figure, axes = new_figure(1, 3, (13.0, 3.6))
covariances = {}
for ax, (name, model) in zip(axes, {"exact": exact, "ELLA": ella, "VaLLA": valla}.items(), strict=True):
    with torch.no_grad():
        latent = model(grid)
        covariances[name] = latent.covariance_matrix + noise * torch.eye(len(grid))
    predictive_bands(grid, latent.mean, latent.variance, float(noise), data=(x, y), truth=toy_gap_function(grid), ax=ax)
    ax.set_title(name)
figure

# %% [markdown]
# How far are they from exact, as distributions over the 200 predictions together? Kullback–Leibler divergences in both directions, because each method
# wins in one: ELLA is over-confident, VaLLA errs on both sides.

# %%
divergences = {name: gaussian_kl(covariances["exact"], covariances[name]) for name in ("ELLA", "VaLLA")}
for name, found in divergences.items():
    print(f"{name:>5}: {found}")
assert SMOKE or float(divergences["VaLLA"][0]) < float(divergences["ELLA"][0])

# %% [markdown]
# ## The evidence from one pass
#
# `one_pass` keeps sums of size (features of all groups)². From them follow a lower bound of the evidence, its gradient and the posterior, at any
# precisions and noise. The report also holds an interval that the exact evidence lies in.

# %%
n = 2000 if SMOKE else 100_000
with seeded(1):
    many_x = 4 * torch.rand(n, 2) - 2
    many_y = torch.sin(2 * many_x[:, :1]) * many_x[:, 1:] + 0.1 * torch.randn(n, 1)
    wide = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
train(wide, many_x[:5000], many_y[:5000], steps=100 if SMOKE else 600, batch_size=500, learning_rate=1e-2)
many = ntkgp.LinearizedNetwork(wide, many_x[:8], groups="tensor")
start = time.perf_counter()
evidence = one_pass(many, (many_x, many_y), gaussian(), num_landmarks=100)
passed = time.perf_counter() - start
found = ntkgp.fit_evidence(evidence)
print(
    f"N = {n:,}: one pass {passed:.1f} s, the fit of {len(many.groups)} precisions and the noise {found.seconds:.1f} s"
)
low, high = found.evidence_bounds
print(f"noise {float(found.noise):.5f} (true 0.01); log evidence per point between {low / n:.3f} and {high / n:.3f}")
assert abs(float(found.noise) - 0.01) < 0.01

# %% [markdown]
# ## Certificates
#
# Any iterate of a solver gives an interval for the exact variance. No factorisation of the N·C × N·C matrix is needed; more iterations make the
# interval narrower, none makes it wrong.

# %%
points = torch.linspace(-4, 4, 9).unsqueeze(-1)
with torch.no_grad():
    truth = exact(points).variance
for iterations in (0, 2, 5, 10, 20):
    lower, upper = exact.posterior_bounds(points, max_iterations=iterations, preconditioner=30)
    width = float(((upper - lower) / truth).median())
    inside = bool(((lower <= truth * (1 + 1e-9)) & (truth <= upper * (1 + 1e-9))).all())
    print(f"{iterations:>2} products: median relative width {width:.1e}, exact variance inside: {inside}")
    assert inside

# %% [markdown]
# ## Or let it choose
#
# `from_network` takes the exact model where its matrices and its work are affordable, else the Nyström model, else the variational one, and says why.

# %%
model = ntkgp.from_network(wide, (many_x, many_y), likelihood="regression", max_memory="1GiB")
print(type(model).__name__, "-", model.inference_reason)
predictive = model.likelihood(model(many_x[:2000]))
covered = ((many_y[:2000, 0] - predictive.mean).abs() < 1.96 * predictive.stddev).double().mean()
print(f"95 % intervals cover {float(covered):.3f}")
assert SMOKE or 0.9 < float(covered) <= 1.0
