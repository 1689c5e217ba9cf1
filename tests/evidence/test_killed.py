"""Fits that are killed at random times and go on: what they find is what an undisturbed fit finds, bit by bit."""

from __future__ import annotations

import logging

import gpytorch
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.checkpoint import Checkpoint, CheckpointMismatch
from ntkgp.evidence import GaussianEvidence, one_pass, sampled_evidence
from ntkgp.evidence.objective import EvidenceObjective
from tests import killed_cases as cases
from tests.killing import _equal, killed_again_and_again, what_was_found


def differences(a, b):
    return [name for name in a if not _equal(a[name], b[name])]


class Killed(BaseException):
    """In the place of a SIGKILL: nothing that runs may catch it."""


def killed(monkeypatch, offers, run):
    """Run until the process is ended, so to say, at an offer."""
    from ntkgp.checkpoint import Run

    left, offer = [offers], Run.offer

    def counting(self, *args, **kwargs):
        found = offer(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Run, "offer", counting)
        with pytest.raises(Killed):
            run()


TWENTY = killed_again_and_again("mackay", kills=20)


@pytest.mark.timeout(600)
def test_twenty_kills_leave_no_trace_in_an_evidence_fit():
    found = what_was_found(TWENTY)
    assert found["kills"] == 20
    assert found["finished"] >= 1
    assert found["different"] == []
    assert "log_evidence" in found["names"]
    assert max(found["states"][:-1]) > 1


@pytest.mark.parametrize(
    "case",
    [
        "lbfgs", "with_prior", "softmax", "softmax_full", "softmax_primal", "at_map", "sampled", "sampled_weights",
        "passes", "variational_collapsed", "variational_minibatches", "image_prior",
    ],
)  # fmt: skip
def test_wherever_a_fit_is_killed_it_goes_on_as_if_nothing_had_happened(case, tmp_path, monkeypatch):
    run = getattr(cases, case)
    whole = run(None)
    for offers in (1, 4, 7):
        killed(monkeypatch, offers, lambda: run(tmp_path))
    assert differences(whole, run(tmp_path)) == []
    # A run that is finished is not repeated, and says the same again.
    states = Checkpoint(tmp_path).files()
    with monkeypatch.context() as patch:
        patch.setattr(EvidenceObjective, "solution", None)
        if case in ("lbfgs", "with_prior"):
            assert differences(whole, run(tmp_path)) == []
    assert differences(whole, run(tmp_path)) == []
    assert len(Checkpoint(tmp_path).files()) == len(states) <= 2


@pytest.mark.parametrize("stage", ["collapsed", "minibatches"])
def test_inducing_inputs_go_on_where_they_were(stage, tmp_path, monkeypatch):
    """Beyond the evidence fit that comes first, which has a checkpoint of its own."""
    run = getattr(cases, f"variational_{stage}")
    whole = run(None)
    for offers in (30, 3):
        killed(monkeypatch, offers, lambda: run(tmp_path))
        assert torch.load(Checkpoint(tmp_path).files()[-1], weights_only=True)["state"]["stage"] == stage
    assert differences(whole, run(tmp_path)) == []


def test_a_fit_is_refused_the_checkpoint_of_another_by_name(tmp_path):
    ntkgp.fit_evidence(cases.exact(), checkpoint=tmp_path)
    x, y = cases.data()
    lin = cases.linearized()

    def refused(match, model, **options):
        with pytest.raises(CheckpointMismatch, match=match):
            ntkgp.fit_evidence(model, checkpoint=tmp_path, **options)

    refused("different: method .'mackay' there, 'lbfgs' here", cases.exact(), method="lbfgs")
    refused("different: tolerance .1e-08 there, 1e-07 here", cases.exact(), tolerance=1e-7)
    refused("different: prior", cases.exact(), prior=cases.Pull())
    refused("different: at .'theta_star' there, 'theta_map' here", cases.exact(), at="theta_map")
    other = ntkgp.ExactNTKGP(x, y + 1e-9, cases.likelihood_of(1), lin)
    refused("different: data. Give", other)
    moved = ntkgp.ExactNTKGP(x + 1e-9, y, cases.likelihood_of(1), lin)
    refused("different: data. Give", moved)
    net = cases.network(seed=1)
    another = ntkgp.ExactNTKGP(x, y, cases.likelihood_of(1), ntkgp.LinearizedNetwork(net, x, groups="tensor"))
    refused("different: network. Give", another)
    regrouped = ntkgp.ExactNTKGP(x, y, cases.likelihood_of(1), ntkgp.LinearizedNetwork(cases.network(), x))
    refused("different: groups", regrouped)
    # More evaluations are no other run.
    assert ntkgp.fit_evidence(cases.exact(), checkpoint=tmp_path, max_evaluations=600).converged


def test_a_fit_that_ran_out_of_evaluations_goes_on_with_more(tmp_path):
    whole = ntkgp.fit_evidence(cases.exact())
    first = ntkgp.fit_evidence(cases.exact(), checkpoint=tmp_path, max_evaluations=5)
    assert not first.converged
    found = ntkgp.fit_evidence(cases.exact(), checkpoint=tmp_path)
    assert differences(cases.report_of(whole), cases.report_of(found)) == []


def test_answers_of_another_search_are_dropped_with_a_line_in_the_log(tmp_path, caplog):
    whole = ntkgp.fit_evidence(cases.exact(), checkpoint=tmp_path)
    (file,) = Checkpoint(tmp_path).files()
    content = torch.load(file, weights_only=True)
    content["state"]["answers"][3]["at"][0] += 1e-3
    from ntkgp.checkpoint import write_file
    from ntkgp.fingerprint import digest

    write_file(file, {**content, "digest": digest(content["state"])})
    with caplog.at_level(logging.WARNING, "ntkgp"):
        found = ntkgp.fit_evidence(cases.exact(), checkpoint=tmp_path)
    assert "another way after 3 answers" in caplog.text
    assert differences(cases.report_of(whole), cases.report_of(found)) == []


def test_an_interrupted_fit_goes_on(tmp_path, monkeypatch):
    whole = cases.report_of(ntkgp.fit_evidence(cases.exact(3)))
    from ntkgp.evidence.softmax import SoftmaxObjective

    call, left = SoftmaxObjective.__call__, [4]

    def interrupted(self, x):
        left[0] -= 1
        found = call(self, x)
        if left[0] == 0:
            raise KeyboardInterrupt  # after its own memory has changed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SoftmaxObjective, "__call__", interrupted)
        assert not ntkgp.fit_evidence(cases.exact(3), checkpoint=tmp_path).converged
    found = ntkgp.fit_evidence(cases.exact(3), checkpoint=tmp_path)
    assert differences(whole, cases.report_of(found)) == []


def test_a_model_of_ones_own_has_checkpoints_too(tmp_path, monkeypatch):
    class Line:
        def __init__(self, slope):
            self.slope = slope

        def evidence_problem(self, at, curvature, targets):
            x = torch.linspace(-1, 1, 20, dtype=torch.float64)
            y = self.slope * x + 0.1 * torch.sin(37 * x)
            from ntkgp.evidence import NoiseModel

            return GaussianEvidence(torch.outer(x, x)[None], y, NoiseModel.homoscedastic(20, 1.0))

        def set_hyperparameters(self, precision, noise):
            return precision, noise

    whole = ntkgp.fit_evidence(Line(2.0))
    checkpoint = Checkpoint(tmp_path, every=0)
    killed(monkeypatch, 3, lambda: ntkgp.fit_evidence(Line(2.0), checkpoint=checkpoint))
    found = ntkgp.fit_evidence(Line(2.0), checkpoint=checkpoint)
    assert differences(cases.report_of(whole), cases.report_of(found)) == []
    with pytest.raises(CheckpointMismatch, match="different: data"):
        ntkgp.fit_evidence(Line(3.0), checkpoint=checkpoint)


# --- passes over loaders ----------------------------------------------------------------------------


def shuffling(generator=False):
    x, y = cases.data(rows=40)
    own = torch.Generator().manual_seed(9) if generator else None
    return DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True, generator=own)


@pytest.mark.parametrize("generator", [False, True])
def test_a_killed_pass_over_a_shuffling_loader_counts_no_row_twice(generator, tmp_path, monkeypatch):
    def run(checkpoint=None, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return one_pass(
                cases.linearized(), shuffling(generator), gpytorch.likelihoods.GaussianLikelihood(), num_landmarks=5,
                checkpoint=checkpoint,
            )  # fmt: skip

    whole, checkpoint = run(), Checkpoint(tmp_path, every=0)
    killed(monkeypatch, 3, lambda: run(checkpoint))
    # Another process has another random state.
    found = run(checkpoint, seed=5)
    assert found.statistics.num_data == 40
    assert differences(vars(whole.statistics), vars(found.statistics)) == []
    assert torch.equal(whole.features.landmarks, found.features.landmarks)
    seen = torch.load(checkpoint.files()[-1], weights_only=True)["state"]["seen"]
    assert seen.tolist() == [True] * 7


def test_a_killed_sampled_fit_over_a_shuffling_loader(tmp_path, monkeypatch):
    def run(checkpoint=None, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return sampled_evidence(
                cases.linearized(), shuffling(), gpytorch.likelihoods.GaussianLikelihood(), 2, form="weights",
                max_steps=6, solver_tolerance=1e-2, max_memory=60_000, checkpoint=checkpoint,
            )  # fmt: skip

    whole, checkpoint = run(), Checkpoint(tmp_path, every=0)
    killed(monkeypatch, 3, lambda: run(checkpoint))
    found = run(checkpoint, seed=5)
    names = ("precision", "noise", "samples", "theta_star", "log_precision_error")
    assert [name for name in names if not torch.equal(getattr(whole, name), getattr(found, name))] == []


@pytest.mark.parametrize("validated", [False, True])
def test_a_killed_nystrom_fit(validated, tmp_path, monkeypatch):
    x, y = cases.data(3, 40)
    validation = cases.data(3, 10) if validated else None

    def run(checkpoint=None, **options):
        model = ntkgp.NystromNTKGP(
            (x, y), cases.likelihood_of(3), cases.linearized(3), 6, 4, output_selection="random", batch_size=5,
            **options,
        )  # fmt: skip
        return model.fit(validation=validation, search_frequency=10, progress=False, checkpoint=checkpoint)

    whole, checkpoint = run(), Checkpoint(tmp_path, every=0)
    killed(monkeypatch, 5, lambda: run(checkpoint))
    found = run(checkpoint)
    assert differences(vars(whole.statistics), vars(found.statistics)) == []
    assert whole._prior_scale == found._prior_scale
    at = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    assert torch.equal(whole(at).covariance_matrix, found(at).covariance_matrix)
    with pytest.raises(CheckpointMismatch, match=r"different: seed .0 there, 1 here"):
        run(checkpoint, seed=1)
