"""from_network: one call from a trained network and its data to a fitted model."""

from __future__ import annotations

import copy
from functools import partial

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ntkgp
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.models import automatic
from ntkgp.models.variational import fit as variational_fit
from tests import reference as ref
from tests.architectures import CASES

S = ref.batchnorm_net(3)


def test_tensors_dataset_and_loader_give_the_same() -> None:
    data = TensorDataset(S.x, S.y)
    models = [
        ntkgp.from_network(S.net, source)
        for source in ((S.x, S.y), [S.x, S.y], data, DataLoader(data, batch_size=7), list_dataset())
    ]
    for model in models:
        assert not model.training
        assert model.report.log_evidence == models[0].report.log_evidence
        assert torch.equal(model(S.x_test).variance, models[0](S.x_test).variance)
        assert torch.equal(model(S.x_test).mean, model.lin(S.x_test))


def list_dataset() -> Dataset:
    class Rows(Dataset):
        def __len__(self) -> int:
            return len(S.x)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return S.x[i], S.y[i]

    return Rows()


def test_an_iterable_dataset() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(S.x, S.y, strict=True)

    assert len(ntkgp.from_network(S.net, Stream()).train_inputs[0]) == len(S.x)


def test_a_shuffled_loader_leaves_the_global_random_state_alone() -> None:
    random = torch.get_rng_state()
    model = ntkgp.from_network(S.net, DataLoader(TensorDataset(S.x, S.y), batch_size=7, shuffle=True))
    assert torch.equal(random, torch.get_rng_state())
    ordered = ntkgp.from_network(S.net, (S.x, S.y))
    assert model.report.log_evidence == pytest.approx(ordered.report.log_evidence, rel=1e-9)


def test_batches_of_dicts_with_labels() -> None:
    case = CASES["dict_inputs"]()
    labels = torch.arange(6) % 2

    class Rows(Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {key: value[i] for key, value in case.example.items()} | {"labels": labels[i]}

    n = ntkgp.LinearizedNetwork(case.net, case.example).num_outputs
    model = ntkgp.from_network(case.net, DataLoader(Rows(), batch_size=4), "classification")
    again = ntkgp.from_network(case.net, (case.example, labels), "classification")
    assert model.likelihood(model(case.example)).probs.shape == (6, n)
    assert torch.equal(model(case.example).variance, again(case.example).variance)


def test_pairs_of_inputs() -> None:
    case = CASES["tuple_inputs"]()
    y = torch.randn(6, 2, dtype=torch.float64)
    loader = DataLoader([((case.example[0][i], case.example[1][i]), y[i]) for i in range(6)], batch_size=4)
    model = ntkgp.from_network(case.net, loader)
    assert model(case.example).mean.shape == (6, 2)


def test_likelihoods() -> None:
    assert isinstance(ntkgp.from_network(S.net, (S.x, S.y)).likelihood, MultitaskGaussianLikelihood)
    r = ref.problem_r()
    for y in (r.y, r.y.unsqueeze(-1)):
        model = ntkgp.from_network(r.net, (r.x, y))
        assert isinstance(model.likelihood, GaussianLikelihood)
    cnn = ref.layernorm_cnn(3)
    assert isinstance(ntkgp.from_network(cnn.net, (cnn.x, cnn.y), "classification").likelihood, CategoricalLikelihood)
    binary = ntkgp.from_network(r.net, (r.x, (r.y > 0).long()), "classification")
    assert isinstance(binary.likelihood, BernoulliLikelihood)
    assert binary.likelihood(binary(r.x_test)).probs.shape == (15,)
    own = CategoricalLikelihood(num_classes=3, link="mc")
    assert ntkgp.from_network(cnn.net, (cnn.x, cnn.y), own).likelihood is own


def test_targets_in_tiny_units_are_not_stopped_by_a_noise_floor() -> None:
    net = copy.deepcopy(S.net)
    with torch.no_grad():
        net[-1].weight.mul_(1e-6)
        net[-1].bias.mul_(1e-6)
    small = ntkgp.from_network(net, (S.x, 1e-6 * S.y), groups="layer")
    model = ntkgp.from_network(S.net, (S.x, S.y), groups="layer")
    assert torch.allclose(small.report.noise * 1e12, model.report.noise, rtol=1e-2)


def test_options_are_passed_on() -> None:
    model = ntkgp.from_network(S.net, (S.x, S.y), groups="single", mean="posterior", method="lbfgs", at="theta_map")
    assert model.lin.groups.names == ("all",)
    assert (model.mean, model.report.method, model.report.at) == ("posterior", "lbfgs", "theta_map")
    plain = ntkgp.from_network(S.net, (S.x, S.y), fit=False)
    assert plain.report is None
    assert torch.equal(plain.kernel.precision, torch.ones_like(plain.kernel.precision))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = S.net

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.body(x), x

    assert ntkgp.from_network(Two(), (S.x, S.y), output=lambda out: out[0], fit=False).num_outputs == 3


def test_too_much_for_exact_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"train_data: .* N·C = 90 .* needs .*iB .* allows N·C up to \d+. Use"
    ) as caught:
        ntkgp.from_network(S.net, (S.x, S.y), inference="exact", max_memory="30KiB")
    assert "30 KiB" in str(caught.value)
    monkeypatch.setattr(automatic, "_EXACT_FLOPS", 1e4)
    with pytest.raises(ValueError, match=r"exact inference with N·C = 90, .* takes .* flops, more than 1e\+04"):
        ntkgp.from_network(S.net, (S.x, S.y), inference="exact")


def test_evidence_of_a_variational_model_keeps_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def sample(batches: object, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(count)
        return original(batches, count, seed)

    original = variational_fit._sample
    monkeypatch.setattr(variational_fit, "_sample", sample)
    for budget in ("1MiB", "200KiB"):
        ntkgp.from_network(S.net, (S.x, S.y), inference="variational", max_memory=budget, iterations=3)
    assert counts == [30, 15]  # 64·90² and 64·45² bytes


@pytest.mark.parametrize("inference", ["exact", "nystrom", "variational"])
@pytest.mark.parametrize("held", [True, False])
def test_every_inference(inference: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (S.x, S.y) if held else DataLoader(TensorDataset(S.x, S.y), batch_size=7, shuffle=True)
    if not held:
        monkeypatch.setattr(automatic, "collect_raw", partial(_nothing_held, automatic.collect_raw))
    model = ntkgp.from_network(S.net, source, inference=inference)
    kinds = {"exact": ntkgp.ExactNTKGP, "nystrom": ntkgp.NystromNTKGP, "variational": ntkgp.VariationalNTKGP}
    assert type(model) is kinds[inference]
    assert not model.training
    if inference == "exact":
        assert model.form == ("dual" if held else "primal") or held
    latent = model(S.x[:4])
    assert torch.equal(latent.mean, S.net(S.x[:4]).double())
    assert bool((latent.variance > 0).all())
    assert bool((model.likelihood(latent).variance > latent.variance).all())
    assert model.posterior(S.x[:2]).variance.shape == (2, 3)


def _nothing_held(collect, data, limit):
    return collect(data, limit=0)


def test_exact_forms_agree() -> None:
    loader = DataLoader(TensorDataset(S.x, S.y), batch_size=7)
    dual = ntkgp.ExactNTKGP(S.x, S.y, likelihood(), lin := ntkgp.LinearizedNetwork(S.net, S.x), form="dual")
    primal = ntkgp.ExactNTKGP(loader, None, likelihood(), lin)
    one, two = (ntkgp.fit_evidence(model).log_evidence for model in (dual, primal))
    assert one == pytest.approx(two, rel=1e-8)


def likelihood() -> gpytorch.likelihoods.MultitaskGaussianLikelihood:
    return gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=3, has_global_noise=False)


def test_the_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ntkgp"):
        model = ntkgp.from_network(S.net, (S.x, S.y), fit=False)
    assert type(model) is ntkgp.ExactNTKGP
    assert model.inference_reason.startswith("N·C = 90, P = ")
    assert f"exact inference: {model.inference_reason}" in caplog.messages
    monkeypatch.setattr(automatic, "_EXACT_FLOPS", 1e4)
    model = ntkgp.from_network(S.net, (S.x, S.y), fit=False)
    assert type(model) is ntkgp.NystromNTKGP
    assert "takes" in model.inference_reason
    assert "30 landmarks, 90 features" in model.inference_reason
    assert model.residual
    monkeypatch.setattr(automatic, "nystrom_sizes", lambda lin, n: (30, 10**6))
    model = ntkgp.from_network(S.net, (S.x, S.y), fit=False, max_memory="64MiB")
    assert type(model) is ntkgp.VariationalNTKGP
    assert "for a Nyström kernel" in model.inference_reason


def test_what_is_chosen_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with many weights, whose directions take the memory and not the statistics of their products."""
    with ref.seeded(0):
        net = nn.Sequential(nn.Linear(2, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 2)).double()
        x = torch.randn(30, 2, dtype=torch.float64)
    monkeypatch.setattr(automatic, "_EXACT_FLOPS", 1e4)
    monkeypatch.setattr(automatic, "nystrom_sizes", lambda lin, n: (20, 8))
    chosen = []
    for budget in (10, 14, 40):
        chosen.append(type(ntkgp.from_network(net, (x, torch.sin(x)), fit=False, max_memory=f"{budget}MiB")))
    assert set(chosen) == {ntkgp.NystromNTKGP, ntkgp.VariationalNTKGP}
    assert chosen[-1] is ntkgp.NystromNTKGP


def test_a_small_budget() -> None:
    """Where nothing else fits, few inducing points do."""
    model = ntkgp.from_network(S.net, (S.x, S.y), fit=False, max_memory="160KiB")
    assert type(model) is ntkgp.VariationalNTKGP
    assert len(model.inducing_points) < 20
    assert bool((model(S.x).variance > 0).all())


def test_noise_that_only_exact_inference_has(monkeypatch: pytest.MonkeyPatch) -> None:
    correlated = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=3, rank=1)
    fixed = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.full((30, 3), 0.1))
    for likelihood in (correlated, fixed):
        assert type(ntkgp.from_network(S.net, (S.x, S.y), likelihood, fit=False)) is ntkgp.ExactNTKGP
        for inference in ("nystrom", "variational"):
            with pytest.raises(ValueError, match="likelihood: the likelihood has a noise"):
                ntkgp.from_network(S.net, (S.x, S.y), likelihood, inference)
    monkeypatch.setattr(automatic, "_EXACT_FLOPS", 1e4)
    with pytest.raises(ValueError, match="noise covariance between outputs, which no other inference has"):
        ntkgp.from_network(S.net, (S.x, S.y), correlated)


def test_classification_by_each_inference() -> None:
    labels = S.y.argmax(-1)
    reference = ntkgp.from_network(S.net, (S.x, labels), "classification")
    for inference in ("nystrom", "variational"):
        model = ntkgp.from_network(S.net, (S.x, labels), "classification", inference)
        probabilities = model.likelihood(model(S.x)).probs
        assert torch.allclose(probabilities.sum(-1), torch.ones(len(S.x), dtype=torch.float64))
        expected = reference.likelihood(reference(S.x)).probs
        assert float((probabilities - expected).abs().max()) < 0.2


@pytest.mark.parametrize(
    ("data", "kwargs", "kind", "words"),
    [
        ((S.x, S.y), {"inference": "sparse"}, ValueError, "inference: expected one of .*'nystrom'.*, got 'sparse'"),
        ((S.x, S.y), {"likelihood": "poisson"}, ValueError, "likelihood: expected 'regression'.*got 'poisson'"),
        (S.x, {}, TypeError, "train_data: expected .* got Tensor"),
        ((S.x, S.y, S.y), {}, TypeError, "train_data: expected .* got tuple"),
        (TensorDataset(S.x), {}, TypeError, "train_data: batch 0: expected"),
        (TensorDataset(S.x[:0], S.y[:0]), {}, ValueError, "train_data has N = 0 rows"),
        (DataLoader(TensorDataset(S.x, S.y), batch_size=50, drop_last=True), {}, ValueError, "has no batches"),
        ((S.x * float("nan"), S.y), {}, ValueError, "NaN"),
        ((S.x, S.y * float("nan")), {}, ValueError, "train_y holds NaN"),
        ((S.x, S.y[:4]), {}, ValueError, "train_y: expected shape"),
        ((S.x, torch.full((30,), 7)), {"likelihood": "classification"}, ValueError, "labels"),
        ((S.x, S.y), {"method": "newton"}, ValueError, "method must be one of"),
        ((S.x, S.y), {"max_memory": 0}, ValueError, "max_memory: expected"),
    ],
)
def test_bad_input(data, kwargs: dict, kind, words: str) -> None:
    with pytest.raises(kind, match=words):
        ntkgp.from_network(S.net, data, **kwargs)
