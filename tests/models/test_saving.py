"""Models in files: the same predictions, no code, no training data unless asked, no other network."""

from __future__ import annotations

import copy
import os

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, Positive
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.checkpoint import UnreadableFile
from tests import killed_cases as cases
from tests.models.inverse_problems import problem, rays

AT = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2)


def fitted(kind, outputs=1, **options):
    """A model after a fit of its evidence."""
    x, y = cases.data(outputs, 40)
    lin, likelihood = cases.linearized(outputs), options.pop("likelihood", None) or cases.likelihood_of(outputs)
    if kind in ("dual", "primal"):
        model = ntkgp.ExactNTKGP(x, y, likelihood, lin, form=kind, **options)
    elif kind == "loader":
        loader = DataLoader(TensorDataset(x, y), batch_size=7)
        model = ntkgp.ExactNTKGP(loader, None, likelihood, lin, **options)
    elif kind == "nystrom":
        model = ntkgp.NystromNTKGP((x, y), likelihood, lin, 10, 5, **options).fit(progress=False)
    else:
        model = ntkgp.VariationalNTKGP(x[::8], likelihood, lin, len(x), **options)
        return model.fit((x, y), iterations=3, progress=False)
    ntkgp.fit_evidence(model)
    return model.eval()


def assert_same(a, b, x=AT):
    p, q = a(x), b(x)
    assert torch.equal(p.mean, q.mean)
    assert torch.equal(p.covariance_matrix, q.covariance_matrix)
    p, q = a.likelihood(p), b.likelihood(q)
    assert torch.equal(*(d.probs if hasattr(d, "probs") else d.mean for d in (p, q)))
    draws = [m.sample_functions(3, torch.Generator().manual_seed(0))(x) for m in (a, b)]
    assert torch.equal(*draws)


def tensors_in(path):
    found = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)

    walk(torch.load(path, weights_only=True))
    return found


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("mean", ["network", "posterior"])
@pytest.mark.parametrize("kind", ["dual", "primal", "loader", "nystrom", "variational"])
def test_a_loaded_model_predicts_the_same(kind, mean, outputs, tmp_path):
    model = fitted(kind, outputs, mean=mean)
    model.save(tmp_path / "model.pt", training_data=kind == "dual")
    again = ntkgp.load(tmp_path / "model.pt", copy.deepcopy(cases.network(outputs)))
    assert type(again) is type(model)
    assert not again.training
    assert again.mean == mean
    assert_same(model, again)
    # ... and so does a file of the loaded one.
    again.save(tmp_path / "again.pt", training_data=kind == "dual")
    assert_same(model, ntkgp.load(tmp_path / "again.pt", cases.network(outputs)))


@pytest.mark.parametrize("kind", ["primal", "loader", "nystrom", "variational"])
def test_no_training_data_are_in_the_file_but_what_predictions_need(kind, tmp_path):
    x, y = cases.data(1, 40)
    fitted(kind).save(tmp_path / "model.pt")
    rows = {tuple(row) for tensor in tensors_in(tmp_path / "model.pt") if tensor.shape[1:] == (2,)
            for row in tensor.double().tolist()}  # fmt: skip
    kept = sum(tuple(row) in rows for row in x.tolist())
    assert kept == {"primal": 0, "loader": 0, "nystrom": 10, "variational": 0}[kind]
    assert not any(t.numel() == 40 and torch.equal(t.double().flatten(), y) for t in tensors_in(tmp_path / "model.pt"))


@pytest.mark.parametrize("kind", ["dual", "primal", "nystrom", "variational"])
def test_with_training_data_a_loaded_model_can_be_fitted_again(kind, tmp_path):
    model = fitted(kind)
    model.save(tmp_path / "model.pt", training_data=True)
    again = ntkgp.load(tmp_path / "model.pt", cases.network())
    assert_same(model, again)
    a, b = (ntkgp.fit_evidence(m) for m in (model, again))
    assert torch.equal(a.precision, b.precision)
    assert a.log_evidence == b.log_evidence
    if kind == "nystrom":
        assert_same(model.fit(progress=False), again.fit(progress=False))


def test_data_space_says_that_it_needs_its_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"training_data: in data space .* need the training inputs.*form='primal'"):
        fitted("dual").save(tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
    for kind in ("loader",):
        with pytest.raises(ValueError, match="training_data: those of a DataLoader"):
            fitted(kind).save(tmp_path / "model.pt", training_data=True)


def test_without_data_the_hyperparameters_are_those_of_the_file(tmp_path):
    model = fitted("primal")
    model.save(tmp_path / "model.pt")
    again = ntkgp.load(tmp_path / "model.pt", cases.network())
    assert "primal" in repr(again)
    with pytest.raises(RuntimeError, match="loaded without its training data"):
        ntkgp.fit_evidence(again)
    precision = again.kernel.precision.detach()
    again.kernel.precision = 2 * precision
    with pytest.raises(RuntimeError, match="saved with; for others save it with training_data=True"):
        again(AT)
    again.kernel.load_state_dict(model.kernel.state_dict())
    assert_same(model, again)
    assert_same(model, copy.deepcopy(again).to("cpu"))
    fantasy = [m.get_fantasy_model(AT[:2], torch.zeros(2, dtype=torch.float64))(AT).variance for m in (model, again)]
    assert torch.equal(*fantasy)


def test_the_evidence_of_a_loaded_nystrom_model_needs_no_data(tmp_path):
    model = fitted("nystrom")
    model.save(tmp_path / "model.pt")
    again = ntkgp.load(tmp_path / "model.pt", cases.network())
    assert ntkgp.fit_evidence(again).log_evidence == ntkgp.fit_evidence(model).log_evidence
    with pytest.raises(ValueError, match="neither the model nor fit"):
        again.fit(progress=False)


# --- networks ---------------------------------------------------------------------------------------


def test_another_network_is_refused_by_name(tmp_path):
    fitted("primal").save(tmp_path / "model.pt")
    net = cases.network()
    with torch.no_grad():
        net[3].bias[0] += 1e-12
    with pytest.raises(ValueError, match=r"net: expected the network of .*model.pt.*different: 3.bias$"):
        ntkgp.load(tmp_path / "model.pt", net)
    with pytest.raises(ValueError, match=r"different: 0.weight, 0.bias, 1"):
        ntkgp.load(tmp_path / "model.pt", cases.network(seed=1).apply(_shake))
    with pytest.raises(ValueError, match="different: "):
        ntkgp.load(tmp_path / "model.pt", nn.Linear(2, 1))
    frozen = cases.network()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"net: requires_grad is not as in .* for 0.weight"):
        ntkgp.load(tmp_path / "model.pt", frozen)
    with pytest.raises(TypeError, match=r"net: expected a torch.nn.Module"):
        ntkgp.load(tmp_path / "model.pt", None)


def _shake(module):
    if isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight)


def test_running_statistics_are_part_of_the_network(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    x, y = cases.data()
    model = ntkgp.ExactNTKGP(x, y, cases.likelihood_of(1), ntkgp.LinearizedNetwork(net, x), form="primal").eval()
    model.save(tmp_path / "model.pt")
    assert_same(model, ntkgp.load(tmp_path / "model.pt", net))
    net[1].running_mean += 0.1
    with pytest.raises(ValueError, match=r"different: 1.running_mean"):
        ntkgp.load(tmp_path / "model.pt", net)


@pytest.mark.parametrize("kind", ["primal", "nystrom", "variational"])
def test_the_same_network_in_another_dtype(kind, tmp_path):
    model = fitted(kind)
    model.save(tmp_path / "model.pt")
    again = ntkgp.load(tmp_path / "model.pt", cases.network().float())
    assert again.lin.dtype == torch.float32
    assert again(AT).variance.dtype == torch.float64
    torch.testing.assert_close(again(AT).variance, model(AT).variance, rtol=1e-3, atol=1e-6)
    # There and back: a network in single precision has the same weights in double.
    again.save(tmp_path / "single.pt")
    third = ntkgp.load(tmp_path / "single.pt", cases.network().float().double())
    torch.testing.assert_close(third(AT).variance, model(AT).variance, rtol=1e-3, atol=1e-6)
    # Rounded to double no weights of a network in single precision are others; in single both are the same.
    net = cases.network().float()
    with torch.no_grad():
        net[0].weight[0, 0] *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"different: 0.weight$"):
        ntkgp.load(tmp_path / "single.pt", net)


class Dictionary(nn.Module):
    """Embedded tokens under a mask, and numbers."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(11, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, ids, mask, pair):
        weights = mask.unsqueeze(-1).to(self.head.weight.dtype)
        pooled = (self.embed(ids) * weights).sum(1) / weights.sum(1)
        return self.head(torch.tanh(pooled + self.linear(pair[0])))


def test_inputs_of_any_structure_need_no_example(tmp_path):
    torch.manual_seed(0)
    net = Dictionary()
    x = {
        "ids": torch.randint(0, 11, (30, 4)), "mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]] * 15),
        "pair": [torch.randn(30, 3)],
    }  # fmt: skip
    lin = ntkgp.LinearizedNetwork(net, x, groups="layer")
    model = ntkgp.NystromNTKGP((x, torch.randn(30, 2)), gpytorch.likelihoods.GaussianLikelihood(), lin, 8)
    model.fit(progress=False)
    model.save(tmp_path / "model.pt")
    again = ntkgp.load(tmp_path / "model.pt", net)
    assert again.lin.groups.names == lin.groups.names
    assert_same(model, again, {key: value[:4] if key != "pair" else [value[0][:4]] for key, value in x.items()})


def test_an_output_that_was_picked_is_picked_again(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    net, (x, y) = Two().double(), cases.data()
    lin = ntkgp.LinearizedNetwork(net, x, output=lambda out: out[0])
    model = ntkgp.ExactNTKGP(x, y, cases.likelihood_of(1), lin, form="primal").eval()
    model.save(tmp_path / "model.pt")
    assert_same(model, ntkgp.load(tmp_path / "model.pt", net, output=lambda out: out[0]))
    with pytest.raises(TypeError, match="output="):
        ntkgp.load(tmp_path / "model.pt", net)
    with pytest.raises(ValueError, match=r"output: .* has 1 outputs per input, the network returns 3"):
        ntkgp.load(tmp_path / "model.pt", net, output=lambda out: out[1])


# --- likelihoods ------------------------------------------------------------------------------------


def constrained(constraint):
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=constraint)
    likelihood.noise = 0.3
    return likelihood


@pytest.mark.parametrize(
    "likelihood",
    [
        constrained(GreaterThan(0.01)),
        constrained(Positive(torch.exp, torch.log)),
        constrained(Interval(0.1, 0.7)),
        gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.linspace(0.1, 1, 40).double()),
        gpytorch.likelihoods.FixedNoiseGaussianLikelihood(
            torch.linspace(0.1, 1, 40).double(), learn_additional_noise=True
        ),
        ntkgp.likelihoods.BernoulliLikelihood(link="mc", num_samples=7, seed=3),
    ],
    ids=["greater", "exp", "interval", "fixed", "fixed+learned", "bernoulli"],
)
def test_likelihoods_come_back_as_they_were(likelihood, tmp_path):
    x, y = cases.data(1, 40)
    y = (y > 0).long() if isinstance(likelihood, ntkgp.likelihoods.BernoulliLikelihood) else y
    model = ntkgp.ExactNTKGP(x, y, copy.deepcopy(likelihood), cases.linearized()).eval()
    model.save(tmp_path / "model.pt", training_data=True)
    again = ntkgp.load(tmp_path / "model.pt", cases.network())
    assert type(again.likelihood) is type(model.likelihood)
    assert_same(model, again, AT if not hasattr(likelihood, "noise_covar") else x)
    a, b = (ntkgp.fit_evidence(m) for m in (model, again))
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.precision, b.precision)


def test_one_noise_per_output_comes_back(tmp_path):
    x, _ = cases.data()
    y = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lin = ntkgp.LinearizedNetwork(cases.network(3), x)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, has_global_noise=False)
    for number, given in enumerate((likelihood, gpytorch.likelihoods.GaussianLikelihood())):
        model = ntkgp.ExactNTKGP(x, y, given, lin, form="primal")
        ntkgp.fit_evidence(model)
        model.eval().save(tmp_path / f"{number}.pt")
        assert_same(model, ntkgp.load(tmp_path / f"{number}.pt", cases.network(3)))


def test_a_likelihood_of_ones_own_is_asked_for(tmp_path):
    class Own(gpytorch.likelihoods.GaussianLikelihood):
        pass

    model = fitted("primal", likelihood=Own())
    model.save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"likelihood: that of .* give one like it"):
        ntkgp.load(tmp_path / "model.pt", cases.network())
    again = ntkgp.load(tmp_path / "model.pt", cases.network(), likelihood=Own())
    assert_same(model, again)


# --- files ------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    model = fitted("primal")
    model.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        model.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_broken_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    fitted("primal").save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UnreadableFile, match="truncated"):
        ntkgp.load(path, cases.network())
    torch.save({"format": "other"}, path)
    with pytest.raises(UnreadableFile, match="expected a file of the kind 'ntkgp model'"):
        ntkgp.load(path, cases.network())
    with pytest.raises(FileNotFoundError, match="no such file"):
        ntkgp.load(tmp_path / "none.pt", cases.network())
    with pytest.raises(IsADirectoryError, match="path: expected a file"):
        fitted("primal").save(tmp_path)


def test_models_without_a_format_say_so(tmp_path):
    x, _ = cases.data()
    kernel = gpytorch.kernels.RBFKernel()
    model = ntkgp.VariationalNTKGP(x[:5], cases.likelihood_of(1), cases.linearized(), 30, kernel=kernel)
    with pytest.raises(TypeError, match="kernel of the user's own"):
        model.save(tmp_path / "model.pt")

    class Own(ntkgp.ExactNTKGP):
        pass

    model = Own(*cases.data(), cases.likelihood_of(1), cases.linearized())
    with pytest.raises(TypeError, match="Own has no file format"):
        model.save(tmp_path / "model.pt", training_data=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["dual", "primal", "matrix_free"])
def test_the_model_of_an_image_needs_its_operator(form, tmp_path):
    p = problem("conv")
    weights = torch.linspace(0.5, 2.0, p.y.numel()).reshape(p.y.shape).double()
    model = p.model(mean="posterior", form=form, weights=weights)
    path = tmp_path / "model.pt"
    with pytest.raises(ValueError, match="training_data: a prediction needs the measurements"):
        model.save(path)
    model.save(path, training_data=True)
    again = ntkgp.load(path, p.net, operator=p.A)
    assert type(again) is ntkgp.InverseNTKGP
    assert again.form == form
    one, two = model.eval()(), again.eval()()
    torch.testing.assert_close(two.mean, one.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(two.variance, one.variance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(again.noise_variance, model.noise_variance, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"operator: .* expected the forward operator of its measurements"):
        ntkgp.load(path, p.net)
    with pytest.raises(ValueError, match=r"operator: it measures the image .* otherwise"):
        ntkgp.load(path, p.net, operator=rays(6, 5, seed=9))
    fitted("primal").save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds a model of class ExactNTKGP, expected none"):
        ntkgp.load(tmp_path / "other.pt", cases.network(), operator=p.A)


def test_priors_with_coordinates_of_their_own_are_in_no_file(tmp_path):
    p = problem("conv")
    model = ntkgp.InverseNTKGP(p.y, p.A, gpytorch.likelihoods.GaussianLikelihood(), ntkgp.inverse.g_prior(p.lin, p.A))
    with pytest.raises(TypeError, match=r"coordinates of its own \(g_prior, filter_prior\)"):
        model.save(tmp_path / "model.pt", training_data=True)


def test_nothing_of_the_model_or_of_the_global_state_changes(tmp_path):
    model = fitted("nystrom")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    net = cases.network().train()
    model.save(tmp_path / "model.pt")
    again = ntkgp.load(tmp_path / "model.pt", net)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert torch.get_default_dtype() == torch.float32
    assert str(before) == str(model.state_dict()) == str(again.state_dict())
