"""Laplace against dense float64 oracles, and at full structure against the exact Gaussian process."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.baselines.laplace import Laplace
from ntkgp.baselines.laplace.structures import factor_with_identity
from tests import reference

DOUBLE = torch.float64
NOISE = torch.tensor([0.04, 0.09, 0.02], dtype=DOUBLE)


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=DOUBLE), torch.as_tensor(b, dtype=DOUBLE), rtol=tolerance, atol=tolerance
    )


@functools.cache
def regression():
    """Three outputs, BatchNorm, precisions of four groups."""
    sample = reference.batchnorm_net()
    return sample, torch.tensor([0.7, 1.6, 0.4, 2.2], dtype=DOUBLE)


@functools.cache
def images():
    """Three classes, convolutions, LayerNorm, precisions of three groups."""
    return reference.layernorm_cnn(), torch.tensor([0.8, 1.3, 0.6], dtype=DOUBLE)


@functools.cache
def binary():
    sample = reference.problem_u()
    return sample, (sample.y > 0).long()


@functools.cache
def dense(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J (N, C, P), f (N, C), J at the test inputs, θ̃."""
    sample = regression()[0] if kind == "regression" else images()[0] if kind == "images" else binary()[0]
    net = sample.net
    return (
        reference.jacobian(net, sample.x), reference.outputs(net, sample.x),
        reference.jacobian(net, sample.x_test), reference.theta(net),
    )  # fmt: skip


def fit_regression(**options) -> Laplace:
    sample, precision = regression()
    options = {"evidence": None, "precision": precision, "noise": NOISE, **options}
    return Laplace(sample.net, **options).fit((sample.x, sample.y))


def fit_images(**options) -> Laplace:
    sample, precision = images()
    options = {"evidence": None, "precision": precision, **options}
    return Laplace(sample.net, "classification", **options).fit((sample.x, sample.y))


class Oracle:
    """A structure's curvature written as one dense matrix over chosen columns."""

    def __init__(self, kind: str, columns: Tensor | None, structured) -> None:
        j, f, j_test, theta = dense(kind)
        sample, precision = regression() if kind == "regression" else images()
        lin = ntkgp.LinearizedNetwork(sample.net, sample.x)
        columns = torch.arange(j.shape[-1]) if columns is None else columns
        self.precision = precision[lin.groups.index[columns]]
        self.j, self.j_test, self.theta = j[..., columns], j_test[..., columns], theta[columns]
        n, c, _ = j.shape
        b = (1 / NOISE).repeat(n).diag() if kind == "regression" else reference.curvature(f)
        rows = self.j.reshape(n * c, -1)
        self.h = structured(rows.T @ b @ rows)
        self.covariance = torch.linalg.inv(self.h + self.precision.diag())
        ratio = torch.eye(
            len(columns), dtype=DOUBLE
        ) + self.h / self.precision.sqrt() / self.precision.sqrt().unsqueeze(-1)
        self.logdet = torch.linalg.slogdet(ratio)[1]
        offset = f - self.j @ self.theta
        if kind == "regression":
            t, noise = (sample.y - offset).flatten(), NOISE.repeat(n)
            a = rows.T @ b @ rows + self.precision.diag()
            self.star = torch.linalg.solve(a, rows.T @ (t / noise))
            fits = [reference.gaussian_log_likelihood(t, rows @ v, noise) for v in (self.theta, self.star)]
        else:
            self.star = reference.softmax_theta_star(rows, offset, sample.y, self.precision)
            fits = [reference.label_log_likelihood(offset + self.j @ v, sample.y) for v in (self.theta, self.star)]
        self.evidences = [
            float(fit - (self.precision * v.square()).sum() / 2 - self.logdet / 2)
            for fit, v in zip(fits, (self.theta, self.star), strict=True)
        ]

    def check(self, la: Laplace, x: Tensor, tolerance: float = 1e-9) -> None:
        close(la.curvature.covariance(la.lin.pack(x)), self.j_test @ self.covariance @ self.j_test.mT, tolerance)
        close([la.log_evidences["theta"], la.log_evidences["theta_star"]], self.evidences, tolerance)
        gammas, channels = la.curvature.gammas()
        close(gammas.sum(), (self.h @ self.covariance).trace(), tolerance)
        close(channels.sum(), gammas.sum(), tolerance)


# --- full: the exact Gaussian process -------------------------------------------------------------


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("mean", ["network", "posterior"])
def test_full_regression_is_the_exact_gaussian_process(form: str, mean: str) -> None:
    sample, precision = regression()
    la = fit_regression(form=form, mean=mean)
    likelihood = MultitaskGaussianLikelihood(num_tasks=3, has_global_noise=False, rank=0)
    model = ntkgp.ExactNTKGP(sample.x, sample.y, likelihood, la.lin, mean)
    model.kernel.precision = precision
    model.likelihood.task_noises = NOISE
    model.eval()
    model.likelihood.eval()
    with torch.no_grad():
        latent, predictive = model(sample.x_test), model.likelihood(model(sample.x_test))
    found = la.predict(sample.x_test)
    close(found.mean, latent.mean)
    close(found.latent.covariance_matrix, ntkgp.likelihoods.point_covariances(latent))
    close(found.covariance_matrix, ntkgp.likelihoods.point_covariances(predictive))


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_full_classification_is_the_exact_gaussian_process(form: str) -> None:
    sample, precision = images()
    la = fit_images(form=form, mean="posterior", link="bridge")
    model = ntkgp.ExactNTKGP(sample.x, sample.y, ntkgp.CategoricalLikelihood(3, link="bridge"), la.lin, "posterior")
    model.kernel.precision = precision
    model.eval()
    with torch.no_grad():
        latent, predictive = model(sample.x_test), model.likelihood(model(sample.x_test))
    found = la.predict(sample.x_test)
    close(found.latent.mean, latent.mean)
    close(found.latent.covariance_matrix, ntkgp.likelihoods.point_covariances(latent))
    close(found.probs, predictive.probs)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_full_structure_against_dense_algebra(form: str) -> None:
    Oracle("regression", None, lambda h: h).check(fit_regression(form=form), regression()[0].x_test)
    Oracle("images", None, lambda h: h).check(fit_images(form=form), images()[0].x_test)


def test_auto_takes_the_smaller_form() -> None:
    sample, _ = regression()
    assert type(fit_regression().curvature).__name__ == "Dual"  # 90 rows, 343 weights
    x, y = sample.x.repeat(5, 1), sample.y.repeat(5, 1)
    la = Laplace(sample.net, evidence=None, noise=0.1).fit(DataLoader(TensorDataset(x, y), batch_size=64))
    assert type(la.curvature).__name__ == "Primal"


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_binary_classification(form: str) -> None:
    sample, labels = binary()
    j, f, j_test, theta = dense("binary")
    la = Laplace(sample.net, "classification", form=form, evidence=None, precision=0.5).fit((sample.x, labels))
    j, j_test = j[:, 0], j_test[:, 0]
    h = j.T @ reference.curvature(f) @ j
    covariance = torch.linalg.inv(h + 0.5 * torch.eye(len(h), dtype=DOUBLE))
    variance = ((j_test @ covariance) * j_test).sum(-1)
    mean = reference.outputs(sample.net, sample.x_test)[:, 0]
    found = la.predict(sample.x_test)
    close(found.latent.variance, variance)
    close(found.probs, torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt()))
    lam = torch.full_like(theta, 0.5)
    star = reference.softmax_theta_star(j, f - (j @ theta).unsqueeze(-1), labels, lam)
    close(la.theta_star, star, 1e-7)


# --- the other structures -------------------------------------------------------------------------


def test_diagonal_and_its_streaming() -> None:
    diagonal = lambda h: h.diagonal().diag()  # noqa: E731
    la = fit_regression(structure="diagonal")
    Oracle("regression", None, diagonal).check(la, regression()[0].x_test)
    Oracle("images", None, diagonal).check(fit_images(structure="diagonal"), images()[0].x_test)
    sample, precision = regression()
    loader = DataLoader(TensorDataset(sample.x, sample.y), batch_size=7, shuffle=True)
    options = {"structure": "diagonal", "evidence": None, "precision": precision, "noise": NOISE}
    streamed = Laplace(sample.net, max_memory=200_000, **options).fit(loader)
    close(streamed.curvature.variance, la.curvature.variance)
    assert set(streamed.log_evidences) == {"theta"}  # the rows do not fit in memory, and nobody asks for θ⋆
    close(streamed.log_evidence, la.log_evidences["theta"])
    with pytest.raises(RuntimeError, match="theta_star"):
        _ = streamed.theta_star


def test_theta_star_by_passes() -> None:
    sample, labels = binary()
    x, labels = sample.x.repeat(10, 1), labels.repeat(10)
    loader = DataLoader(TensorDataset(x, labels), batch_size=100, shuffle=True)
    options = {"structure": "last_layer", "layer": "2", "evidence": None, "mean": "posterior"}
    kept = Laplace(sample.net, "classification", **options).fit((x, labels))
    passed = Laplace(sample.net, "classification", max_memory=2_900_000, **options).fit(loader)
    close(passed.log_evidence, kept.log_evidence)
    close(passed.theta_star, kept.theta_star, 1e-4)


def head_columns(lin: ntkgp.LinearizedNetwork, c: int) -> Tensor:
    """The last layer's (C, F + 1) weights in the order of θ: the weight, then the bias."""
    last = [p for name, p in lin.frozen.theta.items()][-2:]
    size = sum(p.numel() for p in last)
    return torch.arange(lin.num_parameters - size, lin.num_parameters)


def test_last_layer_without_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("rows were formed")

    for module in ("structures", "tangent"):
        monkeypatch.setattr(f"ntkgp.baselines.laplace.{module}.jacobian_rows", refuse)
    for kind, fit, problem in (("regression", fit_regression, regression), ("images", fit_images, images)):
        la = fit(structure="last_layer")
        assert type(la.curvature).__name__ == "LastLayer"
        columns = head_columns(la.lin, 3)
        assert sorted(la.curvature.columns.tolist()) == columns.tolist()
        Oracle(kind, columns, lambda h: h).check(la, problem()[0].x_test)


def test_last_layer_with_many_outputs() -> None:
    """A thousand outputs of 64 features: rows would take 64 GB, CF × CF matrices 34 GB."""
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1000))
    x, y = torch.randn(100, 4), torch.randn(100, 1000)
    la = Laplace(net, structure="last_layer", evidence=None, noise=0.5, max_memory="256MiB").fit((x, y))
    phi = torch.cat([net[:2](x), torch.ones(100, 1)], -1).detach().double()
    inverse = torch.linalg.inv(phi.T @ phi / 0.5 + torch.eye(65, dtype=DOUBLE))
    close(la.curvature.covariance(la.lin.pack(x[:1]))[0, 7, 7], phi[0] @ inverse @ phi[0], 1e-6)
    with pytest.raises(ValueError, match=r"curvature of 1000 × 65 weights; the smallest possible is .*GiB"):
        Laplace(net, "classification", structure="last_layer").fit((x, torch.arange(100)))


def test_last_layer_that_is_no_head() -> None:
    sample, _ = regression()
    net = nn.Sequential(*copy.deepcopy(sample.net), nn.Tanh())
    la = Laplace(net, structure="last_layer", evidence=None, noise=NOISE, precision=1.5).fit((sample.x, sample.y))
    j = reference.jacobian(net, sample.x)[..., -33:].reshape(-1, 33)
    j_test = reference.jacobian(net, sample.x_test)[..., -33:]
    h = j.T @ (1 / NOISE).repeat(len(sample.x)).diag() @ j + 1.5 * torch.eye(33, dtype=DOUBLE)
    close(la.curvature.covariance(la.lin.pack(sample.x_test)), j_test @ torch.linalg.inv(h) @ j_test.mT)
    middle = Laplace(net, structure="last_layer", layer="6", evidence=None, noise=1.0).fit((sample.x, sample.y))
    assert middle.curvature.columns.numel() == 110


def test_subnetwork_by_mask_and_its_order() -> None:
    columns = torch.arange(3, 300, 7)
    la = fit_regression(structure="subnetwork", mask=columns)
    Oracle("regression", columns, lambda h: h).check(la, regression()[0].x_test)
    mask = torch.zeros(la.lin.num_parameters, dtype=torch.bool)
    mask[columns] = True
    other = fit_images(structure="subnetwork", mask=torch.arange(0, 200, 5))
    Oracle("images", torch.arange(0, 200, 5), lambda h: h).check(other, images()[0].x_test)
    assert torch.equal(fit_regression(structure="subnetwork", mask=mask).curvature.columns, columns)
    x = la.lin.pack(regression()[0].x_test)
    left = fit_regression().curvature.covariance(x) - la.curvature.covariance(x)
    assert torch.linalg.eigvalsh(left).min() > -1e-11  # law C7


def test_subnetwork_of_largest_marginal_variances() -> None:
    """Weights that no output depends on have variance 1/λ, the largest of all, and are left out."""
    with reference.seeded(3) as generator:
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        x = torch.randn(20, 3, generator=generator, dtype=DOUBLE)
    with torch.no_grad():
        net[0].bias[:2] = -100.0  # dead units
    y = torch.sin(x[:, :2])
    la = Laplace(net, structure="subnetwork", size=20, evidence=None, noise=0.1).fit((x, y))
    h = (reference.jacobian(net, x).square() / 0.1).sum((0, 1))
    alive = torch.where(h > 0)[0]
    expected = alive[(1 / (h[alive] + 1)).argsort(descending=True)[:20]]
    assert set(la.curvature.columns.tolist()) == set(expected.tolist())
    before = copy.deepcopy(net.state_dict())
    swag = Laplace(net, structure="subnetwork", size=20, score="swag", swag_lr=0.05, swag_snapshots=8).fit((x, y))
    assert set(swag.curvature.columns.tolist()) <= set(alive.tolist()) | set(torch.where(h == 0)[0].tolist())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    random = [
        Laplace(net, structure="subnetwork", size=20, score="random", seed=s, evidence=None).fit((x, y))
        for s in (1, 1, 2)
    ]
    first, again, other = (r.curvature.columns for r in random)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- precisions, noise, draws ---------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer", "kfac"])
@pytest.mark.parametrize("evidence", ["theta", "theta_star"])
def test_evidence_is_at_its_maximum(structure: str, evidence: str) -> None:
    """Refits with fixed precisions and noise, each moved both ways, have no larger evidence."""
    sample = reference.problem_r()
    data = (sample.x, sample.y)
    options = {"structure": structure, "groups": "single"}
    best = Laplace(sample.net, evidence=evidence, **options).fit(data)
    for name in ("precision", "noise"):
        for factor in (0.97, 1.03):
            values = {"precision": best.precision, "noise": best.noise}
            values[name] = values[name] * factor
            moved = Laplace(sample.net, evidence=None, **values, **options).fit(data)
            assert moved.log_evidences[evidence] <= best.log_evidences[evidence] + 1e-9


@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer", "kfac"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_slopes_are_those_of_the_value(structure: str, kind: str) -> None:
    """Per-group precisions and per-output noise, by central differences of the value."""
    from ntkgp.baselines.laplace.evidence import Evidence

    sample, precision = regression() if kind == "regression" else images()
    la = Laplace(sample.net, kind, structure=structure, evidence=None, precision=precision)
    seen = []
    la._finish = lambda structure, tangent, *_: seen.append((structure, tangent))  # type: ignore[method-assign]
    la.fit((sample.x, sample.y))
    noise = NOISE * 3 if kind == "regression" else torch.ones(1, dtype=DOUBLE)
    for at in ("theta", "theta_star"):
        evidence = Evidence(*seen[0], at)
        with torch.no_grad():
            found = evidence.evaluate(precision, noise)
            step = 1e-4
            for values, slopes, where in ((precision, found.precision, 0), (noise, found.noise, 1)):
                if where and kind == "classification":
                    continue
                for i in range(len(values)):
                    if where == 0 and not evidence.active[i]:
                        continue
                    both = []
                    for sign in (1, -1):
                        moved = values.clone()
                        moved[i] *= math.exp(sign * step)
                        both.append(evidence.evaluate(*((moved, noise) if where == 0 else (precision, moved))).value)
                    assert (both[0] - both[1]) / (2 * step) == pytest.approx(float(slopes[i]), rel=2e-4, abs=2e-4)


def test_full_evidence_is_that_of_the_gaussian_process() -> None:
    sample = reference.problem_r()
    la = Laplace(sample.net).fit((sample.x, sample.y))
    j, theta = reference.jacobian(sample.net, sample.x)[:, 0], reference.theta(sample.net)
    target = sample.y - reference.outputs(sample.net, sample.x)[:, 0] + j @ theta
    lam = la.precision[la.lin.groups.index]
    value = reference.gaussian_log_evidence(reference.gram(j, lam), target, la.noise.expand(len(j)))
    assert la.log_evidence == pytest.approx(value, abs=1e-7)


STRUCTURES = [
    {"structure": "full", "form": "primal"}, {"structure": "full", "form": "dual"}, {"structure": "diagonal"},
    {"structure": "last_layer"}, {"structure": "subnetwork", "mask": torch.arange(0, 340, 9)}, {"structure": "kfac"},
]  # fmt: skip


@pytest.mark.parametrize(
    "options", STRUCTURES, ids=lambda o: "-".join(str(v) for v in o.values() if isinstance(v, str))
)
def test_draws_have_the_posterior_covariance(options) -> None:
    la = fit_regression(**options)
    # At the data the variance is mostly what their noise leaves, elsewhere what the prior does.
    sample = regression()[0]
    x = la.lin.pack(torch.cat([sample.x_test, sample.x]))
    draws = la.sample_weights(4000, seed=5) - la.lin.theta
    rows = torch.cat([dense("regression")[2], dense("regression")[0]])
    pushed = torch.einsum("ncp,sp->snc", rows, draws)
    expected = la.curvature.covariance(x)
    error = torch.einsum("snc,snd->ncd", pushed, pushed) / len(draws) - expected
    scale = expected.diagonal(dim1=-2, dim2=-1)
    # Standard deviation of an empirical second moment; 6 of them for 324 entries.
    sd = ((scale.unsqueeze(-1) * scale.unsqueeze(-2) + expected.square()) / len(draws)).sqrt()
    assert (error.abs() / sd).max() < 6
    assert torch.equal(la.sample_weights(3), la.sample_weights(3, seed=0))
    assert not torch.equal(la.sample_weights(3), la.sample_weights(3, seed=1))


def test_draws_by_passes_are_those_by_rows() -> None:
    la = fit_regression(form="dual")
    draws = la.sample_weights(2)
    la.curvature.max_memory = 100_000
    close(la.sample_weights(2), draws)


def test_weights_prediction_runs_the_network() -> None:
    sample, _ = regression()
    la = fit_regression(structure="last_layer", prediction="weights", num_samples=4000)
    glm = fit_regression(structure="last_layer").predict(sample.x_test)  # the network is linear in these weights
    found = la.predict(sample.x_test)
    sd = glm.latent.stddev
    assert ((found.latent.mean - glm.latent.mean).abs() / sd).max() < 5 / math.sqrt(4000)
    assert (found.latent.variance / glm.latent.variance - 1).abs().max() < 5 * math.sqrt(2 / 4000)
    labels = fit_images(structure="diagonal", prediction="weights", num_samples=5)
    net, x = copy.deepcopy(images()[0].net), images()[0].x_test
    total = torch.zeros(len(x), 3, dtype=DOUBLE)
    for theta in labels.sample_weights(5):
        nn.utils.vector_to_parameters(theta, net.parameters())
        total += net(x).detach().softmax(-1) / 5
    close(labels.predict(x).probs, total)


# --- manners --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", STRUCTURES, ids=lambda o: "-".join(str(v) for v in o.values() if isinstance(v, str))
)
def test_state_of_a_fit(options) -> None:
    sample, _ = regression()
    la = fit_regression(mean="posterior", **options)
    state = la.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    other = Laplace(sample.net, mean="posterior", **options).load_state_dict(state)
    a, b = la.predict(sample.x_test), other.predict(sample.x_test)
    close(a.mean, b.mean, 1e-14)
    close(a.covariance_matrix, b.covariance_matrix, 1e-14)
    assert other.log_evidences == la.log_evidences
    labels = fit_images(**(options | {"mask": torch.arange(50)} if "mask" in options else options))
    again = Laplace(images()[0].net, "classification", **options).load_state_dict(labels.state_dict())
    close(again.predict(images()[0].x_test).probs, labels.predict(images()[0].x_test).probs, 1e-14)
    with pytest.raises(ValueError, match="other weights"):
        Laplace(reference.batchnorm_net(seed=1).net, **options).load_state_dict(state)


@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal", "last_layer"])
def test_nothing_of_the_user_changes(structure: str) -> None:
    sample, _ = images()
    net = copy.deepcopy(sample.net).float().train()
    net[0].bias.requires_grad_(False)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    la = Laplace(net, "classification", structure=structure, prediction="weights", num_samples=3)
    found = la.fit((sample.x.float(), sample.y)).predict(sample.x_test.float())
    assert found.probs.isfinite().all()
    assert net.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [name != "0.bias" for name, _ in net.named_parameters()]
    assert all(p.grad is None for p in net.parameters())


def test_bad_options_are_named() -> None:
    sample, _ = regression()
    cases = [
        ({"structure": "kron"}, "structure"), ({"evidence": "map"}, "evidence"), ({"size": 4}, "size"),
        ({"structure": "subnetwork"}, "size"), ({"layer": "0"}, "layer"), ({"num_samples": 1}, "num_samples"),
        ({"structure": "subnetwork", "size": 0}, "size"), ({"form": "both"}, "form"),
    ]  # fmt: skip
    for options, named in cases:
        with pytest.raises(ValueError, match=named):
            Laplace(sample.net, **options)
    late = [
        ({"precision": -1.0}, "precision"), ({"noise": torch.ones(2)}, "noise"),
        ({"structure": "subnetwork", "size": 10_000}, "size"),
        ({"structure": "subnetwork", "mask": torch.ones(3, dtype=torch.bool)}, "mask"),
        ({"structure": "subnetwork", "mask": torch.tensor([1, 1])}, "mask"),
        ({"structure": "last_layer", "layer": "1.weight"}, "layer"),
        ({"form": "primal", "max_memory": "3MB"}, "max_memory"),
    ]  # fmt: skip
    for options, named in late:
        with pytest.raises(ValueError, match=named):
            Laplace(sample.net, **options).fit((sample.x, sample.y))
    with pytest.raises(RuntimeError, match="fit"):
        Laplace(sample.net).curvature  # noqa: B018


@pytest.mark.parametrize("shape", [(), (2,)])
def test_curvature_beyond_the_precision_of_its_identity_has_a_factor(shape: tuple[int, ...]) -> None:
    """Nearly noise-free data: rounding of H/σ² outweighs the prior and makes it indefinite."""
    with reference.seeded(0) as generator:
        rows = torch.randn(*shape, 5, 12, generator=generator, dtype=torch.float64)
    small = rows.mT @ rows
    exact = torch.eye(12, dtype=torch.float64) + small
    torch.testing.assert_close(factor_with_identity(small), torch.linalg.cholesky(exact))
    large = 1e20 * small
    large = large - 1e4 * torch.eye(12, dtype=torch.float64)  # what rounding of that size may do
    assert bool((torch.linalg.cholesky_ex(large + torch.eye(12)).info != 0).any())
    factor = factor_with_identity(large)
    assert torch.equal(factor, factor.tril())
    # The five directions that the data see; the others keep the prior, up to the rounding of the eigenvalues.
    assert bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all())
    expected = torch.linalg.eigvalsh(1e20 * rows @ rows.mT).log().sum(-1)
    found = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    assert bool((found >= expected * (1 - 1e-9)).all())
    assert bool((found <= expected + 7 * math.log(1e6)).all())
