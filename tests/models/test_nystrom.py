"""NystromNTKGP against dense formulas, its protocol, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.linearization import nystrom as directions
from ntkgp.models.nystrom import NystromNTKGP
from tests import nystrom_oracle as oracle
from tests import reference as ref

DOUBLE = torch.float64
N, N_TEST = 40, 6


def network(outputs: int, seed: int = 0) -> nn.Sequential:
    with ref.seeded(seed):
        net = nn.Sequential(
            nn.Linear(3, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 7),
            nn.Tanh(), nn.Linear(7, outputs),
        ).double()  # fmt: skip
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return net


class Case:
    """A problem with everything dense about it."""

    def __init__(self, kind: str, groups: str = "layer") -> None:
        self.kind, self.c = kind, {"single": 1, "shared": 3, "per_output": 3, "softmax": 4, "bernoulli": 1}[kind]
        self.net = network(self.c)
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(N, 3, generator=generator, dtype=DOUBLE)
        self.x_test = 1.5 * torch.randn(N_TEST, 3, generator=generator, dtype=DOUBLE)
        self.lin = ntkgp.LinearizedNetwork(self.net, self.x, groups=groups)
        self.j = ref.jacobian(self.net, self.x).flatten(0, 1)
        self.j_test = ref.jacobian(self.net, self.x_test).flatten(0, 1)
        self.f, self.f_test = ref.outputs(self.net, self.x), ref.outputs(self.net, self.x_test)
        self.index = ref.index(self.net, [set(members) for members in self.lin.groups.members])
        self.precision = 0.5 + 3.0 * torch.rand(len(self.lin.groups), generator=generator, dtype=DOUBLE)
        self.entries = self.precision[self.index]
        self.classify = kind in ("softmax", "bernoulli")
        if self.classify:
            self.y = torch.randint(0, max(self.c, 2), (N,), generator=generator)
        else:
            y = self.f + 0.3 * torch.randn(self.f.shape, generator=generator, dtype=DOUBLE)
            self.y = y[:, 0] if self.c == 1 else y
        self.noise = torch.tensor([0.05, 0.2, 0.4][: self.c] if kind == "per_output" else [0.1], dtype=DOUBLE)
        self.rows_noise = self.noise.repeat(N) if kind == "per_output" else self.noise.expand(N * self.c)

    def likelihood(self) -> Any:
        if self.kind == "softmax":
            return ntkgp.CategoricalLikelihood(self.c)
        if self.kind == "bernoulli":
            return ntkgp.likelihoods.BernoulliLikelihood()
        if self.kind == "per_output":
            made = MultitaskGaussianLikelihood(self.c, has_global_noise=False).double()
            made.task_noises = self.noise
            return made
        made = GaussianLikelihood().double()
        made.noise = self.noise[0]
        return made

    def model(self, data: Any = None, fit: bool = True, **options: Any) -> NystromNTKGP:
        made = NystromNTKGP((self.x, self.y) if data is None else data, self.likelihood(), self.lin, **options)
        made.kernel.precision = self.precision
        return made.fit(progress=False) if fit else made

    def posterior(self, rows: Tensor, entries: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Covariance at the test inputs and mean shift φ E[w] of a Nyström model from weight-space rows."""
        approximate = oracle.Nystrom(rows, self.entries if entries is None else entries)
        phi, phi_test = approximate.phi(self.j), approximate.phi(self.j_test)
        if self.classify:
            return oracle.classification_posterior(phi, phi_test, self.f), torch.empty(0)
        weighted = phi / self.rows_noise[:, None]
        precision = torch.eye(phi.shape[1], dtype=DOUBLE) + phi.T @ weighted
        t = self.y.reshape(-1) - self.f.flatten() + self.j @ ref.theta(self.net)
        return phi_test @ torch.linalg.solve(precision, phi_test.T), phi_test @ torch.linalg.solve(
            precision, weighted.T @ t
        )

    def leading(self, j_z: Tensor, count: int) -> Tensor:
        """The paper's directions, unscaled: qᵀ J_Z of the leading eigenvectors of K_Λ(Z, Z)."""
        vectors = torch.linalg.eigh(ref.gram(j_z, self.entries))[1]
        return vectors[:, -count:].T @ j_z


KINDS = ("single", "shared", "per_output", "softmax", "bernoulli")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def landmark_rows(case: Case, model: NystromNTKGP) -> Tensor:
    return ref.jacobian(case.net, model.features.landmarks).flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [6, None])
def test_posterior_is_the_dense_formula(kind: str, features: int | None) -> None:
    case = Case(kind)
    model = case.model(num_landmarks=12, num_features=features, tolerance=0.0)
    j_z = landmark_rows(case, model)
    expected, _ = case.posterior(j_z if features is None else case.leading(j_z, features))
    with torch.no_grad():
        latent = model(case.x_test)
    close(latent.covariance_matrix, expected)
    assert torch.equal(latent.mean.reshape(-1), case.lin(case.x_test).reshape(-1))
    close(latent.variance.reshape(-1), expected.diagonal())
    if case.c > 1:
        blocks = expected.view(N_TEST, case.c, N_TEST, case.c).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        close(ntkgp.likelihoods.point_covariances(latent), blocks)


@pytest.mark.parametrize("kind", ["shared", "softmax"])
def test_paper_setting(kind: str) -> None:
    """One group, one random output per landmark: φ(ΣφᵀBφ + I/σ0²)⁻¹φᵀ with φ = J V, V orthonormal."""
    case = Case(kind, groups="single")
    prior_variance = 0.3
    model = NystromNTKGP(
        (case.x, case.y), case.likelihood(), case.lin, num_landmarks=15, num_features=5, output_selection="random"
    )
    model.kernel.precision = 1.0 / prior_variance
    model.fit(progress=False)
    outputs = model.features.outputs
    assert len(set(outputs.tolist())) > 1
    j_z = ref.jacobian(case.net, model.features.landmarks)[torch.arange(15), outputs]
    values, vectors = torch.linalg.eigh(j_z @ j_z.T)
    v = j_z.T @ vectors[:, -5:] / values[-5:].sqrt()
    phi, phi_test = case.j @ v, case.j_test @ v
    if case.classify:
        root = oracle.whitening(case.f)
        total = phi.T @ root @ root @ phi
    else:
        total = phi.T @ phi / case.noise[0]
    expected = phi_test @ torch.linalg.solve(total + torch.eye(5, dtype=DOUBLE) / prior_variance, phi_test.T)
    with torch.no_grad():
        close(model(case.x_test).covariance_matrix, expected)


@pytest.mark.parametrize("kind", ["single", "shared", "softmax"])
def test_residual_adds_blocks_at_single_inputs(kind: str) -> None:
    case = Case(kind)
    plain = case.model(num_landmarks=12, num_features=6)
    with torch.no_grad():
        low = plain(case.x_test).covariance_matrix
        plain.residual = True
        latent = plain(case.x_test)
        with gpytorch.settings.prior_mode(True):
            prior = plain(case.x_test).covariance_matrix
    rows = case.leading(landmark_rows(case, plain), 6)
    q, k = oracle.Nystrom(rows, case.entries).gram(case.j_test), ref.gram(case.j_test, case.entries)
    mask = torch.block_diag(*[torch.ones(case.c, case.c, dtype=DOUBLE)] * N_TEST)
    close(latent.covariance_matrix, low + mask * (k - q))
    close(prior, q + mask * (k - q))
    close(latent.variance.reshape(-1), (low + k - q).diagonal())
    if case.c > 1:
        expected = (low + mask * (k - q)).view(N_TEST, case.c, N_TEST, case.c).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        close(ntkgp.likelihoods.point_covariances(latent), expected)


@pytest.mark.parametrize("kind", ["single", "per_output"])
def test_posterior_mean(kind: str) -> None:
    case = Case(kind)
    model = case.model(num_landmarks=12, num_features=6, mean="posterior")
    _, shift = case.posterior(case.leading(landmark_rows(case, model), 6))
    offset = case.f_test.flatten() - case.j_test @ ref.theta(case.net)
    with torch.no_grad():
        close(model(case.x_test).mean.reshape(-1), offset + shift)


@pytest.mark.parametrize("features", [6, None])
def test_new_precisions_give_the_posterior_of_the_kept_sums(features: int | None) -> None:
    case = Case("shared")
    model = case.model(num_landmarks=8, num_features=features, tolerance=0.0)
    rows = landmark_rows(case, model)
    rows = rows if features is None else case.leading(rows, features)
    with torch.no_grad():
        before = model(case.x_test).covariance_matrix
        model.kernel.precision = case.precision.flip(0) * 2.0
        model.likelihood.noise = 0.5
        after = model(case.x_test).covariance_matrix
    case.rows_noise = torch.full_like(case.rows_noise, 0.5)
    expected, _ = case.posterior(rows, (case.precision.flip(0) * 2.0)[case.index])
    close(after, expected)
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_all_ways_to_the_eigenvectors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("shared")
    with torch.no_grad():
        expected = case.model(num_landmarks=30, num_features=5)(case.x_test).covariance_matrix
        monkeypatch.setattr(directions, "_DENSE_ROWS", 0)
        close(case.model(num_landmarks=30, num_features=5)(case.x_test).covariance_matrix, expected)
        monkeypatch.setattr(directions, "_applications", lambda lin: {"": 0.0})
        primal = case.model(num_landmarks=30, num_features=5)
        assert primal.features.directions is not None
        close(primal(case.x_test).covariance_matrix, expected)
        monkeypatch.setattr(directions, "_applications", lambda lin: {"": 1e30})
        dual = case.model(num_landmarks=30, num_features=5)
        assert dual.features.directions is None
        close(dual(case.x_test).covariance_matrix, expected)
        # A budget in which the Gram of the landmarks (90 rows) has no place: products with J and its transpose.
        small = case.model(num_landmarks=30, num_features=5, max_memory=4 * 8 * 90**2 - 1)
        close(small(case.x_test).covariance_matrix, expected)


def test_loader_and_tensors_agree_whatever_the_batches() -> None:
    case = Case("shared")
    z = case.x[::4]
    options = {"landmarks": z, "num_features": 6}
    with torch.no_grad():
        expected = case.model(**options)(case.x_test).covariance_matrix
        for batch_size, shuffle in ((7, False), (40, False), (13, True)):
            loader = DataLoader(TensorDataset(case.x, case.y), batch_size=batch_size, shuffle=shuffle)
            close(case.model(loader, **options)(case.x_test).covariance_matrix, expected, 1e-10)


def test_landmarks_beyond_the_data_and_duplicates() -> None:
    case = Case("single")
    with torch.no_grad():
        everything = case.model(landmarks=case.x, num_features=None)(case.x_test).covariance_matrix
        many = case.model(num_landmarks=500, num_features=None)
        assert len(many.features.landmarks) == N
        close(many(case.x_test).covariance_matrix, everything, 1e-6)
        twice = case.model(landmarks=torch.cat([case.x[:9], case.x[:9]]), num_features=None)
        once = case.model(landmarks=case.x[:9], num_features=None)
        close(twice(case.x_test).covariance_matrix, once(case.x_test).covariance_matrix, 1e-6)
        copies = case.model(landmarks=case.x[:1].expand(5, -1), num_features=4)
        assert copies.collapsed().basis.shape[1] == 1


def test_early_stopping_keeps_the_best_sums() -> None:
    case = Case("single")
    # From row 16 on the data say the opposite: the best posterior is one of the first part.
    y = torch.cat([case.y[:16], case.y[16:] + 50.0])
    options = {"landmarks": case.x[:10], "num_features": 5, "batch_size": 4, "mean": "posterior"}
    model = case.model((case.x, y), fit=False, **options)
    model.fit(progress=False, validation=(case.x[:16], case.y[:16]), search_frequency=4)
    seen = model.statistics.num_data
    assert 0 < seen < N
    scale = seen / N
    part = case.model((case.x[:seen], y[:seen]), **options)
    with torch.no_grad():
        found = model(case.x_test).covariance_matrix
        part.kernel.precision = case.precision * scale
        close(found, part(case.x_test).covariance_matrix)
    with pytest.raises(ValueError, match="stopped early"):
        ntkgp.fit_evidence(model)
    whole = case.model((case.x, case.y), **options)
    assert whole.fit(progress=False).statistics.num_data == N


def test_early_stopping_looks_at_the_reported_predictive() -> None:
    """The NLL that decides is that of the network's own mean, as in the paper: checked against every prefix."""
    case = Case("softmax")
    options = {"landmarks": case.x[:10], "num_features": 5, "batch_size": 10}
    labels = case.lin(case.x_test).argmax(-1)
    model = case.model(fit=False, **options)
    model.fit(progress=False, validation=(case.x_test, labels), search_frequency=10)
    losses = {}
    for seen in (10, 20, 30, 40):
        part = case.model((case.x[:seen], case.y[:seen]), **options)
        part.kernel.precision = case.precision * (seen / N)
        with torch.no_grad():
            losses[seen] = -float(part.likelihood.log_marginal(labels, part(case.x_test)).mean())
    assert model.statistics.num_data == min(losses, key=losses.get)


@pytest.mark.parametrize("kind", ["per_output", "softmax"])
def test_state_dict_pickle_and_copies(kind: str) -> None:
    case = Case(kind)
    model = case.model(num_landmarks=12, num_features=6)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = NystromNTKGP(None, case.likelihood(), case.lin, num_landmarks=12, num_features=6)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        expected = model(case.x_test).covariance_matrix
        for other in (loaded.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(case.x_test).covariance_matrix, expected)
        moved = copy.deepcopy(model).to("cpu").float()
        assert torch.equal(moved(case.x_test).covariance_matrix, expected)
    assert NystromNTKGP(None, case.likelihood(), case.lin).state_dict()["_extra_state"] is None


def test_nothing_of_the_callers_changes_and_no_cache_is_poisoned() -> None:
    case = Case("single")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=7, shuffle=True)
    model = case.model(loader, fit=False, num_landmarks=12, num_features=6)
    with torch.inference_mode():
        first = model.fit(progress=False)(case.x_test).variance.clone()
    assert torch.equal(torch.get_rng_state(), before)
    x = case.x_test.clone().requires_grad_()
    variance = model(x).variance
    close(variance.detach(), first, 1e-10)
    variance.sum().backward()
    step = torch.zeros_like(case.x_test)
    step[2, 1] = 1e-5
    with torch.no_grad():
        slope = (model(case.x_test + step).variance.sum() - model(case.x_test - step).variance.sum()) / 2e-5
    assert abs(float(x.grad[2, 1] - slope)) < 1e-5 * (1 + abs(float(slope)))


@pytest.mark.parametrize("features", [None, 5])
def test_inference_mode_as_the_first_call_of_a_copy(features: int | None) -> None:
    case = Case("shared")
    model = case.model(num_landmarks=10, num_features=features)
    loaded = NystromNTKGP(None, case.likelihood(), case.lin)
    loaded.load_state_dict(model.state_dict())
    for other in (loaded.eval(), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with torch.inference_mode():
            other(case.x_test)
        x = case.x_test.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(other(x).variance.sum(), x)
        assert float(gradient.abs().max()) > 0


def test_pickle_leaves_the_loader_of_a_fitted_model_behind() -> None:
    case = Case("shared")
    collate = lambda rows: tuple(map(torch.stack, zip(*rows, strict=True)))  # noqa: E731
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=8, collate_fn=collate)
    for given, passed in ((loader, None), (None, loader)):
        model = NystromNTKGP(given, case.likelihood(), case.lin, 10, 6).fit(passed, progress=False)
        with torch.no_grad():
            expected = model(case.x_test).covariance_matrix
            assert torch.equal(pickle.loads(pickle.dumps(model))(case.x_test).covariance_matrix, expected)


def test_bounds_are_those_of_the_data_of_the_last_fit() -> None:
    case = Case("single")
    for first in (None, (case.x, case.y)):
        model = NystromNTKGP(first, case.likelihood(), case.lin, 10, None).fit((case.x + 3.0, case.y), progress=False)
        exact = ntkgp.ExactNTKGP(case.x + 3.0, case.y, case.likelihood(), case.lin).eval()
        with torch.no_grad():
            low, high = model.posterior_bounds(case.x_test)
            variance = exact(case.x_test).variance
        assert bool(((low <= variance * (1 + 1e-6)) & (variance <= high * (1 + 1e-6))).all())


def test_batches_predictive_and_botorch() -> None:
    pytest.importorskip("botorch")
    case = Case("shared")
    model = case.model(num_landmarks=12, num_features=6, residual=True)
    x = torch.stack([case.x_test, case.x_test.flip(0)])
    with torch.no_grad():
        whole, single = model(x), model(case.x_test)
        assert whole.mean.shape == (2, N_TEST, 3)
        close(whole.covariance_matrix[0], single.covariance_matrix)
        predictive = model.likelihood(single)
        close(predictive.variance, single.variance + 0.1)
        assert model.posterior(case.x_test).mean.shape == (N_TEST, 3)
        conditioned = model.condition_on_observations(case.x_test[:1], torch.zeros(1, 3, dtype=DOUBLE))
        assert bool((conditioned(case.x_test).variance <= single.variance + 1e-9).all())


def test_draws_have_the_posterior_covariance() -> None:
    case = Case("shared")
    model = case.model(num_landmarks=12, num_features=6, mean="posterior")
    draws = model.sample_functions(600, torch.Generator().manual_seed(0))
    with torch.no_grad():
        values, latent = draws(case.x_test).flatten(1), model(case.x_test)
    covariance = latent.covariance_matrix
    error = (values.T.cov() - covariance).abs()
    scale = (covariance.square() + torch.outer(covariance.diagonal(), covariance.diagonal())).sqrt() / 600**0.5
    assert float((error / scale).max()) < 5.0
    assert float(((values.mean(0) - latent.mean.reshape(-1)).abs() / (covariance.diagonal() / 600).sqrt()).max()) < 5.0
    weights = torch.randn(2, model.features.size, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    pushed = case.j_test @ model.features.pull(weights).T
    close(pushed.T, (model.features(case.x_test).flatten(0, 1) @ weights.T).T.detach())
    model.residual = True
    with pytest.raises(ValueError, match="residual"):
        model.sample_functions(2)


def test_single_precision_network() -> None:
    case = Case("shared")
    with torch.no_grad():
        expected = case.model(landmarks=case.x[:12], num_features=6)(case.x_test).covariance_matrix
        lin = ntkgp.LinearizedNetwork(copy.deepcopy(case.net).float(), case.x.float(), groups="layer")
        model = NystromNTKGP(
            (case.x.float(), case.y), case.likelihood(), lin, landmarks=case.x[:12].float(), num_features=6
        )
        model.kernel.precision = case.precision
        found = model.fit(progress=False)(case.x_test.float())
    close(found.covariance_matrix, expected, 1e-3)
    assert torch.equal(found.mean, lin(case.x_test.float()).double())


def test_residual_of_a_single_precision_network_is_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Almost all rows of the landmarks as features: K − Q is rounding there, and so is what the data leave."""
    monkeypatch.setattr(directions, "_applications", lambda lin: {"": 0.0})
    case = Case("shared")
    lin = ntkgp.LinearizedNetwork(copy.deepcopy(case.net).float(), case.x.float(), groups="layer")
    likelihood = GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive()).double()
    likelihood.noise = torch.tensor(1e-9, dtype=DOUBLE)
    data = case.x.float(), case.y
    model = NystromNTKGP(data, likelihood, lin, num_landmarks=20, num_features=59, residual=True).fit(progress=False)
    assert model.features.directions is not None
    with torch.no_grad():
        latent = model(model.features.landmarks)
        blocks, own = ntkgp.likelihoods.point_covariances(latent), lin.gram_diagonals(model.features.landmarks).sum(0)
        raw = own - (phi := model._phi(model.features.landmarks).view(20, 3, -1)) @ phi.mT
    assert float(torch.linalg.eigvalsh(raw).min()) < 0
    assert float(torch.linalg.eigvalsh(blocks).min()) > -1e-12 * float(own.max())
    assert float(latent.variance.min()) >= 0


def test_bad_data_is_named() -> None:
    case = Case("shared")
    y = case.y.clone()
    y[33] = torch.nan
    loader = DataLoader(TensorDataset(case.x, y), batch_size=10)
    with pytest.raises(ValueError, match="batch 3"):
        case.model(loader, landmarks=case.x[:5])

    class Shrinking(torch.utils.data.IterableDataset):
        passes = 0

        def __iter__(self):
            Shrinking.passes += 1
            yield from zip(case.x[: N // Shrinking.passes], case.y, strict=False)

    with pytest.raises(ValueError, match="20 rows"):
        case.model(DataLoader(Shrinking(), batch_size=8), num_landmarks=5)
    batches = [(case.x[:9], case.y[:9]), (case.x[:0], case.y[:0]), (case.x[9:], case.y[9:])]
    ragged = DataLoader(batches, batch_size=None)
    with torch.no_grad():
        expected = case.model(landmarks=case.x[:9])(case.x_test).covariance_matrix
        close(case.model(ragged, landmarks=case.x[:9])(case.x_test).covariance_matrix, expected, 1e-10)


def test_interrupt_leaves_the_model_as_it_was() -> None:
    case = Case("shared")
    model = case.model(landmarks=case.x[:9])
    with torch.no_grad():
        expected = model(case.x_test).covariance_matrix

    class Interrupted(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 30:
                raise KeyboardInterrupt
            return case.x[index], case.y[index]

    with pytest.raises(KeyboardInterrupt):
        model.fit(DataLoader(Interrupted(), batch_size=10), progress=False)
    with torch.no_grad():
        assert torch.equal(model(case.x_test).covariance_matrix, expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_landmarks": 0}, "num_landmarks"),
        ({"num_features": 0}, "num_features"),
        ({"num_features": 2.5}, "num_features"),
        ({"landmarks": "balanced"}, "balanced"),
        ({"landmarks": "nearest"}, "landmarks"),
        ({"landmarks": torch.full((3, 3), torch.nan)}, "landmarks"),
        ({"output_selection": "true"}, "output_selection"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"mean": "map"}, "mean"),
        ({"bound": "elbo"}, "bound"),
        ({"num_landmarks": 40, "num_features": None, "max_memory": "200KiB"}, "max_memory"),
    ],
)
def test_bad_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Case("shared").model(**options)


def test_refused_likelihoods_and_missing_data() -> None:
    case = Case("shared")
    with pytest.raises(ValueError, match="input by input"):
        NystromNTKGP((case.x, case.y), FixedNoiseGaussianLikelihood(torch.ones(N)), case.lin)
    with pytest.raises(ValueError, match="rank=0"):
        NystromNTKGP((case.x, case.y), MultitaskGaussianLikelihood(3, rank=1), case.lin)
    with pytest.raises(TypeError, match="LinearizedNetwork"):
        NystromNTKGP((case.x, case.y), GaussianLikelihood(), case.net)
    with pytest.raises(ValueError, match="train_data"):
        NystromNTKGP(None, GaussianLikelihood(), case.lin).fit()
    with torch.no_grad():
        lazy = NystromNTKGP((case.x, case.y), GaussianLikelihood(), case.lin, num_landmarks=5).eval()
        assert lazy(case.x_test).variance.shape == (N_TEST, 3)
