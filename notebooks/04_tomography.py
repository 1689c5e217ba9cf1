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
# # Tomography with an error map that can be checked
#
# A scanner measures line integrals $y = A x + \varepsilon$ of an image $x$, often too few of them. A *deep image prior* fits an untrained U-Net to these
# measurements alone, $x \approx f(\tilde\theta)$. Its tangent model $h(\theta) = f(\tilde\theta) + J(\theta - \tilde\theta)$ with
# $\theta \sim N(0, \Lambda^{-1})$ is a Gaussian process of the image: conditioned on the measurements it says how far off each pixel may be. Nothing below is
# specific to tomography: $A$ is any linear operator.

# %%
# %matplotlib inline
import math
import os
import warnings

import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import GaussianLikelihood

import ntkgp
from ntkgp.evaluation.metrics.images import psnr, score_image
from ntkgp.evaluation.plots import new_figure
from ntkgp.evaluation.plots_images import image_report
from ntkgp.inverse import Blur, DeepImagePrior, ParallelBeam, RayTransform, ScalePrior, diagnose

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # smaller images and fewer iterations where only the code is checked
size, views = (14, 6) if SMOKE else (28, 10)
unet = {"norm": "group", "output": "sigmoid"} | ({"channels": (8, 8), "skip_channels": (2,)} if SMOKE else {})
limit = {"max_iterations": 60} if SMOKE else {}
if SMOKE:
    warnings.filterwarnings("ignore", message="DeepImagePrior")  # not met in 60 iterations, of course

# %% [markdown]
# ## A phantom, a scanner, noise
#
# Row 0 of an image is its top; at an angle of 0 the rays run down the columns. Angles are in radians unless one says `degrees=True`.

# %%
row, column = torch.meshgrid(torch.linspace(1, -1, size), torch.linspace(-1, 1, size), indexing="ij")
truth = 0.6 * ((row / 0.85).square() + (column / 0.7).square() < 1).double()
truth += 0.4 * (((row - 0.3) / 0.25).square() + ((column + 0.2) / 0.3).square() < 1)
truth -= 0.5 * (((row + 0.35) / 0.3).square() + ((column - 0.15) / 0.2).square() < 1)

geometry = ParallelBeam((size, size), torch.arange(views) * math.pi / views)
A = RayTransform(geometry)
clean = A(truth)
sigma = 0.05 * float(clean.abs().mean())
y = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
print(geometry)
print(f"{A.num_measurements} measurements of {A.num_pixels} pixels; adjoint exact to {A.dot_test():.0e}")

# %% [markdown]
# ## The deep image prior
#
# It starts from the filtered backprojection and stops where its residuals are as large as the noise (the discrepancy principle); the noise level itself is
# estimated from the measurements before. No truth is looked at, and no number of iterations is tuned.

# %%
pictures = []
dip = DeepImagePrior(A, unet=unet, callback=lambda fit: pictures.append((fit.iteration, fit.current)), **limit).fit(y)
print(f"stopped by {dip.stopped_by} at {dip.best_iteration}; noise {dip.noise:.3f} estimated, {sigma:.3f} true")
shown = [("truth", truth), ("FBP", A.fbp(y)), *[(f"iteration {k}", image) for k, image in pictures[:1]]]
shown.append((f"kept: {psnr(dip.reconstruction, truth):.1f} dB", dip.reconstruction))
figure, axes = new_figure(1, 4, (11.0, 2.9))
for ax, (title, image) in zip(axes, shown, strict=False):
    ax.imshow(image.reshape(size, size).numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])
figure

# %%
assert SMOKE or dip.stopped_by == "discrepancy"
assert SMOKE or abs(dip.noise / sigma - 1) < 0.3
assert SMOKE or psnr(dip.reconstruction, truth) > psnr(A.fbp(y), truth) + 3

# %% [markdown]
# ## The Gaussian process of the image
#
# Training space is the sinogram, test space the image. The evidence chooses the prior precision and the noise. Its target is that of the tangent model,
# $y - Af(\tilde\theta) + AJ\tilde\theta$; on the residuals $y - Af(\tilde\theta)$, to which the network was fitted, it would find that there is nothing left to be
# uncertain about. That is refused:

# %%
model = ntkgp.InverseNTKGP(y, A, GaussianLikelihood(noise_constraint=Positive()).double(), dip.linearize("single"))
try:
    ntkgp.fit_evidence(model, targets="residual")
except ValueError as refusal:
    print("refused:", refusal)
report = ntkgp.fit_evidence(model)
print(report)

# %%
posterior = model.eval()()  # a GPyTorch MultivariateNormal over the pixels
scores = score_image(truth, posterior, data_range=1.0)
print(scores)
image_report(model.reconstruction, posterior.variance.reshape(size, size), truth, data_range=1.0)

# %% [markdown]
# How to read it: *z sd* is the size of the errors in units of their error bars (one is ideal, larger is over-confident), the last columns are the coverage of
# 68 % and 95 % intervals, Spearman's correlation says whether errors are where the map says. The log-likelihood of an image depends on the variance that one
# adds to all pixels before, so it is given at two stated *floors*, beside the *oracle*: the best that a constant error bar could do, if it knew the truth.

# %%
assert SMOKE or scores.rank_correlation > 0.5
assert SMOKE or scores.likelihoods[0].full > scores.oracle
assert SMOKE or 0.4 < scores.calibrations[0].z_sd < 1.6

# %% [markdown]
# ## Which prior?
#
# One precision for all weights, or one for each block of the U-Net? More freedom always finds more evidence, and can be over-confident: blocks are pruned,
# and the pixels that only they could move lose their variance. A prior that pools the blocks (`ScalePrior`) prevents it. `diagnose` tells when something collapsed.
# `scripts/ct_kmnist.py` settles on 30 images what a single one cannot; see docs/results/ct_kmnist.md.

# %%
blocks = ntkgp.InverseNTKGP(y, A, GaussianLikelihood(noise_constraint=Positive()).double(), dip.linearize("block"))
print(f"{'':24} evidence  z sd   95 %  Spearman")
for name, subject, options in (
    ("single λ, θ⋆", model, {}),
    ("single λ, θ̃", model, {"at": "theta_map"}),
    ("block, θ⋆", blocks, {}),
    ("block, θ⋆, pooled", blocks, {"prior": ScalePrior(0.3)}),
    ("block, θ⋆, TV-PredCP", blocks, {"prior": dip.predcp(blocks.lin.base)}),
):
    found = ntkgp.fit_evidence(subject.train(), **options)
    checked = score_image(truth, subject.eval()(), data_range=1.0)
    here = checked.calibrations[0]
    print(
        f"{name:24} {found.log_evidence:8.1f}  {here.z_sd:.2f}  {here.coverage_95:.3f}  {checked.rank_correlation:.2f}"
    )
    for warning in diagnose(subject, subject.standard_deviation()):
        print("    ", warning[:110])

# %% [markdown]
# ## Which angle next?
#
# The information that a further view would bring follows from the posterior covariance, exactly and before it is measured. Here only half of the half turn was
# scanned: the gains are largest in the wedge that is missing.

# %%
half = geometry[: views // 2]
A_half, y_half = RayTransform(half), y[: views // 2]
dip_half = DeepImagePrior(A_half, unet=unet, noise=sigma, **limit).fit(y_half)
limited = ntkgp.InverseNTKGP(
    y_half, A_half, GaussianLikelihood(noise_constraint=Positive()).double(), dip_half.linearize("single")
)
ntkgp.fit_evidence(limited)
limited.eval()
candidates = torch.arange(0, 180, 10 if SMOKE else 5)
gains = ntkgp.inverse.expected_information_gain(
    limited, RayTransform(ParallelBeam((size, size), candidates, degrees=True))
)
last = math.degrees(float(half.angles[-1]))
figure, axes = new_figure(1, 2, (9.0, 3.3))
axes[0].imshow(limited.standard_deviation().numpy(), cmap="magma")
axes[0].set(title=f"sd after views from 0° to {last:.0f}°", xticks=[], yticks=[])
axes[1].plot(candidates.numpy(), gains.numpy(), ".-")
axes[1].axvspan(0, last, color="0.9", lw=0)
axes[1].set(xlabel="angle of the next view, degrees (grey: measured)", ylabel="expected information, nats")
figure

# %%
inside = candidates <= last
print(f"mean gain inside the measured range {gains[inside].mean():.1f} nats, outside {gains[~inside].mean():.1f}")
assert SMOKE or gains[~inside].mean() > gains[inside].mean()

# %% [markdown]
# ## Another operator
#
# Deblurring: the same calls, with a blur for $A$. Any matrix (`from_matrix`), any pair of functions (`from_callables`, which refuses a wrong adjoint) and the physics of
# deepinv or ASTRA can take its place.

# %%
B = Blur.gaussian((size, size), 1.5)
blurred = B(truth)
blurred = blurred + 0.02 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
sharp = DeepImagePrior(B, unet=unet, noise=0.02, **limit).fit(blurred)
deblurring = ntkgp.InverseNTKGP(
    blurred, B, GaussianLikelihood(noise_constraint=Positive()).double(), sharp.linearize("single")
)
ntkgp.fit_evidence(deblurring)
figure, axes = new_figure(1, 3, (8.6, 2.9))
for ax, (title, image, cmap) in zip(
    axes,
    (
        (f"blurred, {psnr(blurred, truth):.1f} dB", blurred, "gray"),
        (f"deep image prior, {psnr(sharp.reconstruction, truth):.1f} dB", sharp.reconstruction, "gray"),
        ("standard deviation", deblurring.eval().standard_deviation(), "magma"),
    ),
    strict=True,
):
    ax.imshow(image.numpy(), cmap=cmap)
    ax.set(title=title, xticks=[], yticks=[])
figure

# %%
assert SMOKE or psnr(sharp.reconstruction, truth) > psnr(blurred, truth) + 1

# %% [markdown]
# ## Your own scan
#
# `ntkgp ct --data scan.npz --size 128 --out result` reads a sinogram with its angles (or raw counts with white and dark fields, or the structures of the Helsinki
# challenge) and writes image, error map, figure and a report; `ntkgp ct --example` scans a CT slice that comes with pydicom.
# docs/guide/tomography.md has the rest: orientation, noise, memory and time.
