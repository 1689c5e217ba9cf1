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
# # From a trained network to a Gaussian process
#
# You have a trained PyTorch network. Linearise it at its weights $\tilde\theta$,
# $h(x;\theta) = f(x;\tilde\theta) + J(x)(\theta-\tilde\theta)$, put a prior $\theta \sim N(0, \Lambda^{-1})$ on the weights, and it is
# a Gaussian process with kernel $J(x)\Lambda^{-1}J(x')^\top$. This notebook does it for a regression and a classification
# network: error bars that keep the network's predictions, the model evidence that sets prior and noise without a validation
# set, samples, and the GPyTorch objects underneath.

# %%
# %matplotlib inline
import os

import gpytorch
import torch
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn

import ntkgp
from ntkgp.evaluation.datasets import digits, toy_gap, toy_gap_function
from ntkgp.evaluation.metrics import accuracy, categorical_nll, expected_calibration_error
from ntkgp.evaluation.plots import new_figure, predictive_bands, reliability_diagram
from ntkgp.evaluation.training import seeded, train

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # fewer steps where only the code is checked

# %% [markdown]
# ## A network, trained as usual
#
# One input, two hidden layers, LayerNorm, and data with a gap in the middle.

# %%
x, y = toy_gap(120, seed=0)
with seeded(0):
    net = nn.Sequential(
        nn.Linear(1, 50), nn.LayerNorm(50), nn.Tanh(), nn.Linear(50, 50), nn.LayerNorm(50), nn.Tanh(), nn.Linear(50, 1)
    )
loss = train(net, x, y, steps=200 if SMOKE else 1500, learning_rate=1e-2)
print(f"{sum(p.numel() for p in net.parameters())} weights, training MSE {loss:.4f}")

# %% [markdown]
# ## Its tangent model
#
# `LinearizedNetwork` copies the module (yours is never touched) and finds its normalisation groups from the computation itself: the
# weight and bias that feed a LayerNorm can be scaled together without changing the output. They get a prior precision
# of their own. `verify` measures Euler's identity $J_g\theta_g = 0$.

# %%
lin = ntkgp.LinearizedNetwork(net, x)
print(lin.groups)
for name, error in zip(lin.groups.names, lin.groups.verify(x).tolist(), strict=True):
    print(f"{name:>6}: relative error of the invariance {error:.1e}")

# %% [markdown]
# ## The Gaussian process and its evidence
#
# `fit_evidence` sets all precisions and the noise by maximising the evidence at $\theta_\star$, the mode of the tangent model.

# %%
model = ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), lin)
report = ntkgp.fit_evidence(model)
print(report)

# %%
grid = torch.linspace(float(x.min()) - 1.5, float(x.max()) + 1.5, 300).unsqueeze(-1)
model = model.eval()
with torch.no_grad():
    latent = model(grid)  # a gpytorch MultivariateNormal
    predictive = model.likelihood(latent)
assert torch.equal(latent.mean, net(grid).detach().squeeze(-1).double())  # the mean is exactly the network
figure, axes = new_figure(1, 3, (13.0, 3.6))
predictive_bands(
    grid, latent.mean, latent.variance, float(report.noise), data=(x, y), truth=toy_gap_function(grid), ax=axes[0]
)
draws = model.sample_functions(8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    axes[1].plot(grid, draws(grid).T, lw=1)
axes[1].set_title("functions drawn from the posterior")
report.plot(ax=axes[2])
figure

# %% [markdown]
# The evidence is GPyTorch's own marginal likelihood, because the prior mean of the model is $f - J\tilde\theta$:

# %%
model.train()
mll = ExactMarginalLogLikelihood(model.likelihood, model)
stock = float(mll(model(*model.train_inputs), model.train_targets).detach()) * len(x)
print(f"report {report.log_evidence:.9f}, gpytorch {stock:.9f}")
assert abs(stock - report.log_evidence) < 1e-9 * abs(stock)
model = model.eval()

# %% [markdown]
# Where the data are missing, the error bars grow; where they are, they shrink to the noise.

# %%
gap = model(torch.zeros(1, 1)).variance.sqrt().item()
data = model(x[:1]).variance.sqrt().item()
print(f"latent sd in the gap {gap:.3f}, at a data point {data:.3f}")
assert SMOKE or gap > 3 * data

# %% [markdown]
# ## Classification in one call
#
# A small CNN with BatchNorm on 120 digits of 8×8 pixels, trained with weight decay. `from_network` linearises it, builds the GP with the
# full softmax curvature and fits the evidence.

# %%
cls = digits(seed=0, train_size=60 if SMOKE else 120)
with seeded(0):
    cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
train(
    cnn, cls.x_train, cls.labels_train, steps=50 if SMOKE else 300, batch_size=40, learning_rate=1e-2, weight_decay=3.0
)
classifier = ntkgp.from_network(cnn, (cls.x_train, cls.labels_train), likelihood="classification")
print(classifier.report)

# %% [markdown]
# Two predictive means are on offer: the network's own output (`mean="network"`, the default), and the mode of the tangent model
# (`mean="posterior"`). With so few data the posterior is wide. Around the network's own logits that makes the probabilities too
# cautious; the posterior mean, which belongs to the same model as the variance, is better calibrated here than either.

# %%
count = 100 if SMOKE else 500
x_test, labels_test = cls.x_test[:count], cls.labels_test[:count]
probabilities = {}
with torch.no_grad():
    probabilities["network alone"] = cnn(x_test).softmax(-1)
    for mean in ("network", "posterior"):
        classifier.mean = mean
        probabilities[f"GP, mean {mean}"] = classifier.likelihood(classifier(x_test)).probs
scores = {name: float(categorical_nll(p, labels_test)) for name, p in probabilities.items()}
for name, p in probabilities.items():
    print(
        f"{name:>18}: accuracy {accuracy(p, labels_test):.3f}, NLL {scores[name]:.3f}, "
        f"ECE {expected_calibration_error(p, labels_test):.3f}"
    )
assert SMOKE or scores["GP, mean posterior"] < scores["network alone"]

# %%
figure, axes = new_figure(1, 2, (9.0, 3.6))
reliability_diagram(probabilities, labels_test, ax=axes[0])
classifier.report.plot_groups(ax=axes[1])
figure
