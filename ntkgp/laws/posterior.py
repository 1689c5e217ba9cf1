"""Laws of the kernel and of the posterior."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ntkgp.laws.evidence import either_evidence
from ntkgp.laws.oracle import DOUBLE, Dense, loewner, point_blocks, rel
from ntkgp.laws.problems import head_scaled, permuted, relu_rescaled, rescaled
from ntkgp.laws.protocol import NotApplicableError
from ntkgp.laws.trial import ALL, DENSE, PROJECTED, Trial, law, learned, spread, spread_like, worst_of

TWO = ("normalised", "plain")
REGRESSIONS = ("normalised", "plain", "batchnorm")


@law("A1", "Prior covariance J⋆Λ⁻¹J⋆ᵀ.", kinds=("exact",), problems=(*REGRESSIONS, "softmax"))
def _prior(trial: Trial) -> float:
    x = trial.x_test
    return rel(trial.fitted.prior_covariance(x), trial.reference.prior_covariance(x))


@law("A4", "V(cΛ, σ²/c) = V(Λ, σ²)/c: precisions count relative to the noise.", kinds=(*DENSE, "subset", "nystrom"))
def _common_factor(trial: Trial) -> float:
    c, x = 3.0, trial.x_test
    scaled = trial.fit(precision=c * trial.precision, noise=trial.problem.noise / c)
    return rel(c * scaled.covariance(x), trial.fitted.covariance(x))


@law(
    "A5", "The order of hidden units does not matter.", kinds=("exact", "last_layer", "diagonal", "kfac"),
    problems=TWO, definition_free=True,
)  # fmt: skip
def _permutation(trial: Trial) -> float:
    x = trial.x_test
    return rel(trial.fit(permuted(trial.problem)).covariance(x), trial.fitted.covariance(x))


@law(
    "A9", "A prediction does not depend on the other inputs of its call.", kinds=ALL,
    problems=("normalised", "batchnorm"), tolerance=1e-10,
)  # fmt: skip
def _batch_of_one(trial: Trial) -> float:
    fitted, x = trial.fitted, trial.x_test
    alone = torch.cat([fitted.covariance(row.unsqueeze(0)) for row in x])
    means = torch.cat([fitted.mean(row.unsqueeze(0)) for row in x])
    return worst_of(rel(fitted.covariance(x), alone), rel(fitted.mean(x), means))


@law("B1", "Posterior covariance of each input, J⋆(H + Λ)⁻¹J⋆ᵀ.", problems=(*REGRESSIONS, "relu"))
@law("D1", "Softmax: posterior covariance with all of diag(p) − ppᵀ.", problems=("softmax",))
def _covariance(trial: Trial) -> float:
    x = trial.x_test
    return rel(trial.fitted.covariance(x), trial.reference.covariance(x))


@law("B1-joint", "The same between inputs.", problems=TWO)
def _joint_covariance(trial: Trial) -> float:
    x = trial.x_test
    return rel(trial.fitted.joint_covariance(x), trial.reference.joint_covariance(x))


@law("B2", "The mean of the tangent model given the data is h at θ⋆.", kinds=("exact",), problems=TWO)
def _posterior_mean(trial: Trial) -> float:
    x = trial.x_test
    return rel(trial.fitted.posterior_mean(x), trial.reference.posterior_mean(x))


@law("B2-mean", "The reported mean is the network's output.", kinds=ALL, problems=REGRESSIONS, tolerance=1e-12)
def _mean(trial: Trial) -> float:
    return rel(trial.fitted.mean(trial.x_test), trial.exact.mean(trial.x_test))


@law("B8", "0 ≼ V ≼ prior covariance, in the Loewner order.", kinds=ALL, problems=(*REGRESSIONS, "softmax"))
def _between_zero_and_prior(trial: Trial) -> float:
    fitted, x = trial.fitted, trial.x_test
    dense = trial.exact
    if trial.kind == "variational":
        dense = dense.at(*learned(fitted))
    v = spread(fitted, x)
    prior = spread_like(v, dense.prior_covariance(x), dense.num_outputs)
    return worst_of(loewner(v, torch.zeros_like(v)), loewner(prior, v))


@law("B9", "More data never raise the covariance.", kinds=(*PROJECTED, "diagonal", "subset"), problems=TWO)
def _more_data(trial: Trial) -> float:
    p, near = trial.problem, trial.x_test
    far = torch.cat([near, 100 * near[:2]])
    fewer = trial.fitted if trial.kind == "subset" else trial.fit(x=p.x[::2], y=p.y[::2])
    more = trial.exact if trial.kind == "subset" else trial.fitted
    wide = spread(fewer, near)
    narrow = (
        spread(more, near)
        if trial.kind != "subset"
        else spread_like(wide, trial.exact.joint_covariance(near), trial.exact.num_outputs)
    )
    # Inputs by themselves as well: far ones would hide what happens near the data.
    each = zip(fewer.covariance(far), more.covariance(far), strict=True)
    return worst_of(loewner(wide, narrow), *(loewner(a, b) for a, b in each))


@law("B10", "Conditioning in steps is conditioning on all data at once.", kinds=PROJECTED)
def _in_steps(trial: Trial) -> float:
    p, x, half = trial.problem, trial.x_test, len(trial.problem.x) // 2
    steps = trial.fit(x=p.x[:half], y=p.y[:half]).update(p.x[half:], p.y[half:])
    return rel(steps.covariance(x), trial.fitted.covariance(x))


@law("B11", "Duplicated data at 2σ² are the data at σ².")
def _duplicated(trial: Trial) -> float:
    p, x = trial.problem, trial.x_test
    twice = trial.fit(x=torch.cat([p.x, p.x]), y=torch.cat([p.y, p.y]), noise=2 * p.noise)
    return rel(twice.covariance(x), trial.fitted.covariance(x))


@law(
    "B12", "σ² → ∞ gives the prior, up to ‖K⋆X‖²/σ².", kinds=(*PROJECTED, "subset"), problems=TWO, tolerance=1e-6,
)  # fmt: skip
def _no_information(trial: Trial) -> float:
    x, noise = trial.x_test, 1e12
    dense = trial.exact if trial.kind == "subset" else trial.reference
    expected = point_blocks(dense.prior_covariance(x), dense.num_outputs)
    return rel(trial.fit(noise=noise).covariance(x), expected)


@law("B13", "0 ≼ V ≼ σ²I at the training inputs.", kinds=(*PROJECTED, "nystrom"), problems=TWO, tolerance=1e-6)
def _below_the_noise(trial: Trial) -> float:
    worst = 0.0
    for noise in (1e-3, 1e-1, 10.0):
        values = torch.linalg.eigvalsh(spread(trial.fit(noise=noise), trial.problem.x)) / noise
        worst = worst_of(worst, float(values.max()) - 1, -float(values.min()))
    return worst


@law("B14", "σ² → 0 gives what no training row reaches.", kinds=("exact",), tolerance=1e-3)
def _no_noise(trial: Trial) -> float:
    x, dense = trial.x_test, trial.dense(noise=1e-7)
    found = trial.fit(noise=1e-7).covariance(x)
    return rel(found, spread_like(found, dense.noiseless_covariance(x), dense.num_outputs))


@law(
    "B20", "Draws of functions have the posterior covariance between inputs (in standard errors).",
    kinds=(*PROJECTED, "diagonal", "kfac"), tolerance=5.0, strict=True,
)  # fmt: skip
def _samples(trial: Trial) -> float | tuple[float, str]:
    x, size = trial.x_test[:4], 1000
    draws = trial.fitted.samples(x, size, torch.Generator().manual_seed(0)).double().flatten(1)
    v, d = trial.reference.joint_covariance(x), trial.reference.covariance(x).diagonal(dim1=1, dim2=2).flatten()
    centred = draws - trial.reference.mean(x).flatten()
    error = (centred.T @ centred / size - v) / ((d * d.unsqueeze(-1) + v.square()) / size).sqrt()
    mean = (centred.mean(0) / (d / size).sqrt()).abs().max()
    c = trial.reference.num_outputs
    own = torch.block_diag(*[torch.ones(c, c)] * len(x)).bool()
    within, between = float(error[own].abs().max()), float(error[~own].abs().max())
    worst = worst_of(within, between, float(mean))
    return worst, f"within inputs {within:.1f}, between inputs {between:.1f} standard errors"


@law(
    "B26", "Normalised weights times k with λ/k²: the same predictions.", kinds=("exact", "diagonal", "kfac"),
    per_tensor=True,
)  # fmt: skip
def _scale_of_weights(trial: Trial) -> float:
    changed, k = rescaled(trial.problem)
    x = trial.x_test
    return rel(trial.fit(changed, precision=trial.precision / k.square()).covariance(x), trial.fitted.covariance(x))


@law(
    "B29", "(aW₁, ab₁, W₂/a) of a ReLU network with λ/a², λ/a², λa²: the same predictions.",
    kinds=("exact", "diagonal"), problems=("relu",), per_tensor=True,
)  # fmt: skip
def _relu_scale(trial: Trial) -> float:
    changed, k = relu_rescaled(trial.problem)
    x = trial.x_test
    return rel(trial.fit(changed, precision=trial.precision / k.square()).covariance(x), trial.fitted.covariance(x))


@law("C3", "A Nyström posterior (ELLA) lies below the exact one.", kinds=("nystrom",), problems=TWO)
@law("C7", "Fewer weights, less variance: V ≼ that of all weights.", kinds=("last_layer", "subnetwork"), problems=TWO)
def _below_the_exact(trial: Trial) -> float:
    x = trial.x_test
    found = spread(trial.fitted, x)
    return loewner(spread_like(found, trial.exact.joint_covariance(x), trial.exact.num_outputs), found)


@law(
    "C5", "With all data as landmarks it is exact at the training inputs.", kinds=("nystrom",), problems=TWO,
    tolerance=1e-6,
)  # fmt: skip
def _nystrom_at_landmarks(trial: Trial) -> tuple[float, str]:
    x = trial.problem.x
    found, exact = trial.fitted.covariance(x), trial.exact.covariance(x)
    ratio = found.diagonal(dim1=1, dim2=2) / exact.diagonal(dim1=1, dim2=2)
    return rel(found, exact), f"variances between {float(ratio.min()):.3g} and {float(ratio.max()):.3g} of the exact"


@law(
    "C9", "VaLLA with inducing points at all training inputs is the exact posterior of its hyper-parameters.",
    kinds=("variational",), tolerance=1e-3,
)  # fmt: skip
def _variational_at_the_data(trial: Trial) -> tuple[float, str]:
    x, fitted = trial.problem.x, trial.fit()
    precision, noise = learned(fitted)
    found, exact = fitted.covariance(x), trial.dense(kind="exact", precision=precision, noise=noise).covariance(x)
    ratio = found.diagonal(dim1=1, dim2=2) / exact.diagonal(dim1=1, dim2=2)
    return rel(found, exact), f"variances between {float(ratio.min()):.3g} and {float(ratio.max()):.3g} of the exact"


@law("D2", "Softmax: points whose curvature vanishes leave the prior.", kinds=("exact",), problems=("softmax",))
def _confident(trial: Trial) -> float:
    changed, _ = head_scaled(trial.problem, 1e4)
    x, dense = trial.x_test, trial.dense(changed)
    found = trial.fit(changed).covariance(x)
    return rel(found, dense.covariance(x))


@law(
    "D5", "Softmax: probit probabilities by V, and softmax(f) as Λ → ∞.",
    kinds=(*DENSE, "nystrom", "variational"), problems=("softmax",),
)  # fmt: skip
def _probabilities(trial: Trial) -> float:
    x, f = trial.x_test, trial.exact.mean(trial.x_test)
    certain = 0.0
    if trial.kind != "variational":
        certain = rel(trial.fit(precision=1e14 * trial.precision).probabilities(x), f.softmax(-1))
    fitted = trial.fitted
    variance = fitted.covariance(x).double().diagonal(dim1=1, dim2=2)
    expected = (f / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)
    return worst_of(certain, rel(fitted.probabilities(x), expected))


@law(
    "D9", "y → cy, head → c·head, λ_head/c², c²σ²: covariance c² times as large.",
    kinds=("exact", "last_layer", "diagonal", "kfac"), per_tensor=True,
)  # fmt: skip
def _units(trial: Trial) -> float:
    changed, k = head_scaled(trial.problem, 3.0)
    precision = trial.precision / k.square()
    x = trial.x_test
    return rel(trial.fit(changed, precision=precision).covariance(x) / 9, trial.fitted.covariance(x))


# --- promises to users ----------------------------------------------------------------------------


@law(
    "U1", "Nothing of the user's network changes: mode, weights, gradients, hooks, attributes.", kinds=ALL,
    problems=("plain",), tolerance=0.0, definition_free=True, strict=True,
)  # fmt: skip
def _network_untouched(trial: Trial) -> tuple[float, str]:
    task = trial.task()
    net = task.net.train()
    before = copy.deepcopy(net)
    names = {path: set(vars(m)) for path, m in net.named_modules()}
    hooks = {path: _hooks(m) for path, m in net.named_modules()}
    fitted = trial.adapter.fit(task)
    fitted.covariance(trial.x_test)
    changed = []
    if any(a.training != b.training for a, b in zip(net.modules(), before.modules(), strict=False)):
        changed.append("its mode")
    old, new = before.state_dict(), net.state_dict()
    if old.keys() != new.keys() or any(not torch.equal(old[key], new[key]) for key in old):
        changed.append("its state")
    if any(q.grad is not None or not q.requires_grad for q in net.parameters()):
        changed.append("gradients")
    if any(_hooks(m) != hooks.get(path) for path, m in net.named_modules()):
        changed.append("hooks")
    added = sorted({name for path, m in net.named_modules() for name in set(vars(m)) - names.get(path, set())})
    if added:
        changed.append("attributes " + ", ".join(added))
    return float(len(changed)), "changed: " + "; ".join(changed)


def _hooks(module: torch.nn.Module) -> tuple[int, int, int, int]:
    return tuple(  # type: ignore[return-value]
        len(getattr(module, name))
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


@law(
    "U2", "Global random state, default dtype and number of threads stay as they are.", kinds=ALL, tolerance=0.0,
    definition_free=True, strict=True,
)  # fmt: skip
def _globals(trial: Trial) -> tuple[float, str]:
    state, dtype, threads = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    trial.fit().covariance(trial.x_test)
    changed = []
    if not torch.equal(state, torch.random.get_rng_state()):
        changed.append("random state")
    if torch.get_default_dtype() != dtype:
        changed.append("default dtype")
    if torch.get_num_threads() != threads:
        changed.append("threads")
    return float(len(changed)), "changed: " + ", ".join(changed)


@law("U4", "A second fit of the same object to the same data gives the same covariance and evidence.", kinds=ALL)
def _refit(trial: Trial) -> tuple[float, str]:
    fitted, x = trial.fit(), trial.x_test
    first, value = fitted.covariance(x), either_evidence(fitted)
    fitted.refit()
    again = either_evidence(fitted)
    error = 0.0 if value is None or again is None else abs(again - value) / max(abs(value), 1.0)
    return worst_of(rel(fitted.covariance(x), first), error), f"log evidence {value}, then {again}"


@law("U5", "The batch size of the loader does not matter.")
def _batch_size(trial: Trial) -> float:
    x, n = trial.x_test, len(trial.problem.x)
    expected = trial.fit(batch_size=n).covariance(x)
    return worst_of(*(rel(trial.fit(batch_size=size).covariance(x), expected) for size in (1, 7)))


@law("U6", "Networks from images to images: covariance of the flattened output.", kinds=("exact", "diagonal"),
     problems=("images",))  # fmt: skip
def _images(trial: Trial) -> float:
    x = trial.x_test[:2]
    fitted, dense = trial.fitted, trial.reference
    return worst_of(rel(fitted.mean(x), dense.mean(x)), rel(fitted.covariance(x), dense.covariance(x)))


@law("U7", "The same generator, the same random numbers.", kinds=ALL, tolerance=0.0, strict=True)
def _generator(trial: Trial) -> tuple[float, str]:
    fitted, x = trial.fitted, trial.x_test[:2]
    worst, tried, reasons = 0.0, 0, []
    for name, draw in (
        ("samples", lambda g: fitted.samples(x, 4, g)),
        ("random_prediction", lambda g: fitted.random_prediction(x, g)),
    ):
        try:
            first, second = (draw(torch.Generator().manual_seed(5)) for _ in range(2))
        except NotApplicableError:
            continue
        tried += 1
        difference = float((first - second).abs().max())
        if not difference == 0:
            reasons.append(f"{name} differ")
        worst = worst_of(worst, difference)
    trial.require(tried > 0, "draws no random numbers")
    return worst, "; ".join(reasons)


@law("U8", "A float64 network is computed with in float64.", strict=True, problems=("plain",))
def _double(trial: Trial) -> float:
    x = trial.x_test
    task = replace(trial.task(), precision=torch.full_like(trial.precision, 2.0, dtype=DOUBLE))
    return rel(trial.adapter.fit(task).covariance(x).double(), Dense(task).covariance(x))
