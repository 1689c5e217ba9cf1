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
# # Methods side by side
#
# There are many ways from a trained network to error bars. `ntkgp.compare` fits any of them to *one* network and its training data, and scores their
# predictions of the same test data: one call, one table. This notebook does it for a regression, a classification and several data sets, adds a method
# of its own, and ends with what such a table does not say.

# %%
# %matplotlib inline
import os
import tempfile
import time

import torch
from sklearn.datasets import make_friedman1, make_friedman2, make_friedman3
from torch import nn

import ntkgp
from ntkgp.evaluation.datasets import corrupt, diabetes, digits, toy_gap
from ntkgp.evaluation.training import seeded, train

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # fewer methods and data where only the code is checked

# %% [markdown]
# ## One network, one call
#
# Diabetes: 331 patients with ten measurements to train on, 111 to test on. The network knows its training data rather well.

# %%
data = diabetes(seed=0)
patients, held_out = (data.x_train, data.y_train), (data.x_test, data.y_test)
with seeded(0):
    net = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
print(f"training MSE {train(net, *patients, steps=150):.3f}, of standardised targets")

# %% [markdown]
# Methods go by name; `ntkgp.evaluation.comparison.method_names()` has all, and without a list every one runs that needs no more than network and data.
# `ood_data` are inputs from elsewhere, here patients who do not exist, each measurement taken from another one of the test patients.

# %%
generator = torch.Generator().manual_seed(0)
nobody = torch.stack([column[torch.randperm(len(column), generator=generator)] for column in data.x_test.T], dim=-1)
methods = ["network", "gp", "laplace-full", "laplace-kfac", "laplace-last-layer", "prior-only"]
original_units = (data.target_mean, data.target_std)
found = ntkgp.compare(
    net, patients, held_out, methods[:3] if SMOKE else methods, ood_data=nobody, target_scale=original_units
)
found

# %% [markdown]
# How to read it:
#
# - **NLL** is per target and in the original units, smaller is better. `*` marks the best of a column, `°` what lies within the best one's standard error
#   of it. That error is over the test points, which all methods share: two rows with the same mean differ more surely than their errors suggest.
# - **RMSE** is the same for all that keep the network's own output as their mean. **CRPS** is in units of the target; **CQM** is the mean distance of the
#   coverage curve below from its diagonal.
# - **95 % cov.** should be 0.95. It has no `*`, for an interval that covers everything is no achievement.
# - **OOD-AUC** is the probability that a patient who does not exist has the larger variance. One noise for all: 0.5.
# - **seconds** and **MiB** are those of the method alone, in a process of its own that is forked from an interpreter with the network and the data.
#
# The network alone takes its noise from training residuals that are too small: its 95 % intervals cover too few. The Gaussian process keeps its predictions
# and widens the intervals where the data do not decide. At full structure, `laplace-full` is the same posterior computed by other code.

# %%
gp, alone = found["gp"], found["network"]
print(f"NLL {alone.scores['nll']:.2f} -> {gp.scores['nll']:.2f}", end=", ")
print(f"coverage {alone.scores['coverage']:.2f} -> {gp.scores['coverage']:.2f}", end=", ")
print(f"OOD-AUC {alone.scores['ood_auc']:.2f} -> {gp.scores['ood_auc']:.2f}")
assert not found.failures
assert not found.notes
assert gp.scores["nll"] < alone.scores["nll"] - 0.1
assert abs(gp.scores["coverage"] - 0.95) < 0.05 < 0.95 - alone.scores["coverage"]
assert gp.scores["ood_auc"] > 0.8 > alone.scores["ood_auc"] == 0.5
assert abs(gp.scores["nll"] - found["laplace-full"].scores["nll"]) < 1e-3
assert gp.memory > 0

# %%
found.plot(["nll", "cqm"])

# %% [markdown]
# `found.table_of(["nll", "width", "ood_fpr95"])` has other columns, `found.to_markdown()`, `to_latex()` and `to_csv(path)` are for papers and for later, and
# `found["gp"].predicted` holds the predictions themselves.
#
# ## Classification
#
# Integer targets are labels. A small CNN with BatchNorm on the 8 × 8 digits; its test images with noise on them are what it has never seen. `Method` gives a
# name options and a label: here the GP once around the network's logits, and once around the posterior mean. `validation` is for
# rows that calibrate on held-out data: `network-validated` finds its temperature there, `prior-only` the width of its prior. The others do not see it.

# %%
images = digits(seed=0, train_size=60 if SMOKE else 300)
with seeded(0):
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
train(cnn, images.x_train, images.labels_train, steps=50 if SMOKE else 300, batch_size=50, weight_decay=0.3)
x_test, labels_test = images.x_test[:400], images.labels_test[:400]
classified = ntkgp.compare(
    cnn,
    (images.x_train, images.labels_train),
    (x_test, labels_test),
    [
        "network",
        "network-validated",
        "gp",
        ntkgp.Method("gp", "gp, posterior mean", mean="posterior"),
        "laplace-last-layer",
        "prior-only",
    ],
    ood_data=corrupt(x_test, "noise"),
    validation=(images.x_test[400:500], images.labels_test[400:500]),
    isolate=not SMOKE,
)
classified

# %% [markdown]
# **OOD-AUC** is now by the entropy of the predicted classes, **(var.)** by the variance of the logits, where there is one.
# With few data the posterior is wide, and
# its probabilities around the network's logits are too cautious: a worse NLL and ECE. The same width tells noisy images from clean ones better than the softmax alone.
# The reliability diagram shows the caution: points above the diagonal are right more often than they say.

# %%
classified.plot(["nll", "ece"])

# %%
assert not classified.failures
if not SMOKE:
    gp, alone = classified["gp"].scores, classified["network"].scores
    print(f"OOD-AUC {alone['ood_auc']:.3f} -> {gp['ood_auc']:.3f}; NLL {alone['nll']:.3f} -> {gp['nll']:.3f}")
    assert gp["ood_auc"] > alone["ood_auc"] + 0.02
    assert gp["nll"] > alone["nll"]

# %% [markdown]
# ## Several data sets
#
# `name="set/split"` says where rows belong; `Comparison.joined` puts them together. Splits of one set are averaged (± is then the standard error over splits),
# and methods are ranked once per set. With `isolate=False` there are no extra processes, and no memory column to read.


# %%
def friedman(make, split):
    x, y = make(200, noise=0.0, random_state=split)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    y = y + 0.3 * y.std() * torch.randn(200, generator=torch.Generator().manual_seed(split))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return x[:100].float(), y[:100].float(), x[100:].float(), y[100:].float()


def patients_of(split):
    part = diabetes(seed=split)
    return part.x_train, part.y_train, part.x_test, part.y_test


sets = {
    "diabetes": patients_of,
    "friedman1": lambda split: friedman(make_friedman1, split),
    "friedman2": lambda split: friedman(make_friedman2, split),
    "friedman3": lambda split: friedman(make_friedman3, split),
    "toy": lambda split: (*toy_gap(60, seed=split), *toy_gap(200, seed=100 + split)),
}
shown = ["network", "gp", "laplace-last-layer", "laplace-diagonal", "prior-only"]
parts = []
for label, load in list(sets.items())[: 2 if SMOKE else None]:
    for split in range(1 if SMOKE else 2):
        x, y, x_new, y_new = load(split)
        with seeded(split):
            own = nn.Sequential(nn.Linear(x.shape[-1], 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
        train(own, x, y, steps=150)
        parts.append(ntkgp.compare(own, (x, y), (x_new, y_new), shown, isolate=False, name=f"{label}/{split}"))
joined = ntkgp.Comparison.joined(parts)
joined.table_of(["nll", "rmse", "coverage"])

# %%
joined.plot(["nll", "coverage"])

# %% [markdown]
# The last panel is a critical-difference diagram (Demšar, 2006): mean ranks on a line, 1 is best, and bars over methods that the data do not tell apart.
# Take its **CD** seriously. Among five methods mean ranks can differ by 4 at most, and on five data sets they must differ by 2.7 to mean
# something at the level 0.05. Five sets are too few for almost any claim; twenty make it 1.4. Splits do not count: they share their data.

# %%
test = joined.rank_test("nll")
print({name: round(rank, 2) for name, rank in zip(test.names, test.average.tolist(), strict=True)})
print(f"{test.num_sets} sets: critical difference {test.difference:.2f}; all equal: p = {test.f_p_value:.1g}")
for clique in test.cliques:
    print("not told apart:", ", ".join(clique))
assert SMOKE or (joined.datasets == list(sets) and min(test.average.tolist()) == test.average[shown.index("gp")])
assert SMOKE or 2.7 < test.difference < 2.8

# %% [markdown]
# ## A method of your own
#
# A method is a function of the network and the training data that returns something with `predict(x)`, which returns a `torch.distributions.Distribution` over y.
# This one takes the noise from the residuals of the twenty nearest patients. An ensemble needs to know how to train: `train(net, train_data)`.


# %%
class Neighbours:
    """The network, with the residuals of the nearest training inputs for its noise."""

    def __init__(self, net, train_data):
        self.net, (self.x, y) = net, train_data
        with torch.no_grad():
            self.squares = (net(self.x).squeeze(-1) - y).square()

    def predict(self, x):
        nearest = torch.cdist(x, self.x).topk(20, largest=False).indices
        with torch.no_grad():
            return torch.distributions.Normal(self.net(x).squeeze(-1), self.squares[nearest].mean(-1).sqrt())


def train_member(member, train_data):
    train(member, *train_data, steps=150)


mine = {
    "network": "network",
    "neighbours": Neighbours,
    "ensemble of 3": ntkgp.Method("ensemble", train=train_member, size=3),
    "gp, λ per layer": ntkgp.Method("gp", groups="layer"),
    "ensemble, untold": "ensemble",
}
folder = tempfile.TemporaryDirectory()  # yours would stay
options = {"ood_data": nobody, "target_scale": original_units, "isolate": not SMOKE, "folder": folder.name}
start = time.perf_counter()
first = ntkgp.compare(net, patients, held_out, mine, **options)
first_seconds = time.perf_counter() - start
first

# %% [markdown]
# What goes wrong is a row that says why; the others go on. And what is defined in a notebook cannot be found by another process: it runs here, without a
# figure for its memory, and a note says so. In a module of yours it would have a process like the others.
#
# `folder` keeps every row that succeeded, under a hash of network, data, options and method. The same call again takes the rows from there (and would try
# a failure once more). A function of yours counts by its code: change it, and its row is computed again.

# %%
start = time.perf_counter()
again = ntkgp.compare(net, patients, held_out, {k: m for k, m in mine.items() if not first[k].failure}, **options)
print(f"first {first_seconds:.1f} s, again {time.perf_counter() - start:.1f} s")
assert all(again[name].to_json() == first[name].to_json() for name in again.methods)
assert list(first.failures) == [("ensemble, untold", "")]
assert SMOKE or len(first.notes) == 2
folder.cleanup()

# %% [markdown]
# ## What the table does not say
#
# - **Whether this is a good network.** All rows share one trained network, so that they differ by their error bars only. A method that needs a training of its own
#   (ensemble, dropout) is compared with one that does not; its seconds include the trainings.
# - **Whether a posterior learned from the data**, unless there is the row `prior-only`: the covariance of the prior, with nothing taken off for the data. The GP
#   beats it by far in all that stands above.
# - **Whether an NLL is bad by its ranking or by its scale.** One number, a temperature, repairs the scale of a classification. The column `calibrated_nll`
#   has it repaired for every row: each half of the test points by the temperature that is best on the other half.
# - **What another seed would give.** One network and one split are one draw. Join several.

# %%
classified.table_of(["nll", "calibrated_nll", "adaptive_ece", "aurc"])

# %%
if not SMOKE:
    gains = [part["prior-only"].scores["nll"] - part["gp"].scores["nll"] for part in [found, *parts]]
    print(f"NLL of prior-only less that of the GP: {min(gains):.2f} to {max(gains):.2f}")
    assert found["gp"].scores["nll"] < found["prior-only"].scores["nll"] - 0.3
    gp, alone = classified["gp"].scores, classified["network"].scores
    print(f"after a temperature: network {alone['calibrated_nll']:.3f}, GP {gp['calibrated_nll']:.3f}")
    assert abs(gp["calibrated_nll"] - alone["calibrated_nll"]) < 0.02 < gp["nll"] - alone["nll"]
