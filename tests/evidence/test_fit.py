"""fit_evidence and fit_problem: arguments, protocol with a model, report, warnings, the full curvature, plots."""

from __future__ import annotations

import builtins
import dataclasses
import math

import pytest
import torch

from ntkgp.evidence import GaussianEvidence, NoiseModel, evidence_objective, fit_evidence, fit_problem
from ntkgp.evidence.softmax import SoftmaxObjective
from tests.evidence import dense

ROWS = 48


class Model:
    """The smallest model of the protocol; stores what it is given, rounded to `dtype` and clamped."""

    def __init__(self, problem, dtype=torch.float64, largest_precision=math.inf):
        self.problem, self.dtype, self.largest = problem, dtype, largest_precision
        self.asked: dict = {}

    def evidence_problem(self, *, at, curvature, targets):
        self.asked = {"at": at, "curvature": curvature, "targets": targets}
        if curvature != "simple" and hasattr(self.problem, "variant"):
            return dense.softmax_evidence_like(self.problem, curvature)
        return self.problem

    def set_hyperparameters(self, precision, noise):
        self.precision = precision.clamp_max(self.largest).to(self.dtype)
        self.noise = None if noise is None else noise.to(self.dtype)
        return self.precision, self.noise


@pytest.fixture
def regression():
    model = dense.linear_model(2, ROWS, (10, 8, 12), decay=5.0)
    return model, dense.gaussian_problem(model, dense.targets_of(model, 2))


@pytest.mark.parametrize("method", ["mackay", "lbfgs"])
@pytest.mark.parametrize("where", ["theta_star", "theta_map"])
def test_report_of_a_regression(regression, method, where):
    linear, problem = regression
    model = Model(problem)
    report = fit_evidence(model, method=method, at=where)
    assert model.asked == {"at": where, "curvature": "simple", "targets": "data"}
    assert torch.equal(model.precision, report.precision)
    assert torch.equal(model.noise, report.noise)
    assert (report.method, report.at, report.converged) == (method, where, True)
    variance = report.noise.expand(ROWS)
    primal = dense.primal_gaussian(linear, problem.targets, report.precision, variance)
    theta = primal["star"] if where == "theta_star" else linear.weights
    value = dense.gaussian_joint(linear, problem.targets, report.precision, variance, theta)
    assert report.log_evidence == pytest.approx(float(value), rel=1e-9)
    assert report.trace[-1] == report.log_evidence
    assert report.iterations == len(report.trace) - 1
    assert report.evaluations >= report.iterations
    assert torch.allclose(report.effective_dimension, primal["gamma"], rtol=1e-8)
    assert torch.allclose(report.theta_star_norm, primal["norms"].sqrt(), rtol=1e-8)
    difference = primal["star"] - linear.weights
    metric = primal["hessian"] + torch.diag(linear.expand(report.precision))
    assert report.theta_shift == pytest.approx(float((difference @ metric @ difference).sqrt()), rel=1e-8)
    assert report.residual_noise is not None
    assert float(report.residual_noise) == pytest.approx(float(problem.residual.square().mean()))
    assert report.group_names == ("layer0", "layer1", "layer2")
    assert report.group_sizes == (10, 8, 12)
    # The MacKay fixed point holds at the optimum.
    norms = primal["norms"] if where == "theta_star" else linear.theta_norms
    assert torch.allclose(report.precision, primal["gamma"] / norms, rtol=1e-5)


def test_the_two_objectives_have_different_optima(regression):
    _, problem = regression
    star, classic = fit_problem(problem), fit_problem(problem, at="theta_map")
    assert float((star.precision / classic.precision).log().abs().max()) > 0.1


@pytest.mark.parametrize("curvature", ["simple", "quadratic", "full"])
@pytest.mark.parametrize("classes", [1, 3])
def test_report_of_a_classification(curvature, classes):
    linear, problem = dense.softmax_problem(4, 24, classes, sizes=(10, 15))
    report = fit_evidence(Model(problem), curvature=curvature)
    assert report.converged, report.warnings
    assert report.noise.numel() == 0
    assert report.residual_noise is None
    logits = problem.logits
    star = dense.softmax_mode(linear, problem.labels, classes, report.precision)
    if curvature == "quadratic":
        value, star = dense.quadratic_joint(linear, problem.labels, classes, report.precision)
    else:
        if curvature == "full":
            logits = (linear.offset + linear.jacobian @ star).reshape(-1, classes)
        value = dense.softmax_joint(linear, problem.labels, classes, report.precision, star, logits)
    assert report.log_evidence == pytest.approx(float(value), rel=1e-8)
    parts = star.split(list(linear.sizes))
    assert torch.allclose(report.theta_star_norm, torch.stack([part.norm() for part in parts]), rtol=1e-6, atol=1e-9)
    hessian = linear.jacobian.T @ dense.curvature(logits) @ linear.jacobian
    metric = hessian + torch.diag(linear.expand(report.precision))
    difference = star - linear.weights
    assert report.theta_shift == pytest.approx(float((difference @ metric @ difference).sqrt()), rel=1e-7)
    if curvature != "full":
        assert all(b >= a - 1e-11 * abs(a) for a, b in zip(report.trace, report.trace[1:], strict=False))


def test_full_curvature_is_a_fixed_point_of_the_frozen_problem():
    linear, problem = dense.softmax_problem(4, 24, 3, "full", sizes=(10, 15))
    report = fit_problem(problem)
    assert report.converged, report.warnings
    star = dense.softmax_mode(linear, problem.labels, 3, report.precision)
    logits = (linear.offset + linear.jacobian @ star).reshape(-1, 3)
    frozen = SoftmaxObjective(problem, curvature_at=logits).evaluate(report.precision)
    live = torch.tensor([name not in report.pruned for name in report.group_names])
    assert bool(live.any())
    assert float(frozen.gradient[live].abs().max()) <= 1e-5
    simple = fit_problem(dense.softmax_evidence_like(problem, "simple"))
    assert float((report.precision / simple.precision)[live].log().abs().max()) > 1e-3


def test_full_curvature_that_does_not_settle_in_time_says_so():
    _, problem = dense.softmax_problem(4, 24, 3, "full", sizes=(10, 15))
    report = fit_problem(problem, max_evaluations=6)
    assert not report.converged
    assert any("max_evaluations" in text or "did not settle" in text for text in report.warnings)
    assert report.evaluations <= 7


def test_float32_storage_is_not_taken_for_a_constraint(regression):
    _, problem = regression
    exact, stored = fit_evidence(Model(problem)), fit_evidence(Model(problem, torch.float32))
    assert stored.log_evidence == pytest.approx(exact.log_evidence, rel=1e-10)
    assert not any("constraints" in text for text in stored.warnings)
    assert float((stored.precision / exact.precision - 1).abs().max()) < 1e-6


def test_constraints_of_the_model_are_reported(regression):
    linear, problem = regression
    report = fit_evidence(Model(problem, largest_precision=0.05))
    assert any("constraints changed" in text for text in report.warnings)
    assert float(report.precision.max()) == pytest.approx(0.05)
    value = dense.marginal(linear, problem.targets, report.precision, report.noise.expand(ROWS))
    assert report.log_evidence == pytest.approx(float(value), rel=1e-9)


def test_residual_targets_need_a_declaration(regression):
    _, problem = regression
    with pytest.raises(ValueError, match=r"targets='residual' is refused.*fitted to that y.*infinity.*held_out=True"):
        fit_evidence(Model(problem), targets="residual")
    bare = GaussianEvidence(problem.grams, problem.residual, problem.noise)
    model = Model(bare)
    report = fit_evidence(model, targets="residual", held_out=True)
    assert model.asked["targets"] == "residual"
    assert math.isnan(report.theta_shift)
    assert report.residual_noise is None


def test_b4n_negative_control_the_residual_of_the_training_data_collapses():
    """A network fitted to its data leaves a residual that no group explains: every precision runs to its bound."""
    linear = dense.linear_model(3, ROWS, (4, 5), decay=1.0)
    noisy = linear.network + 0.1 * dense.randn(dense.generator(0), ROWS)
    basis = torch.linalg.qr(linear.jacobian)[0]
    residual = noisy - linear.network
    residual = residual - basis @ (basis.T @ residual)
    bare = GaussianEvidence(linear.grams, residual, NoiseModel.homoscedastic(ROWS, 1.0))
    report = fit_evidence(Model(bare), targets="residual", held_out=True)
    assert set(report.pruned) == {"group 0", "group 1"}
    assert float(report.noise) == pytest.approx(float(residual.square().mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "adam"}, "method must be one of 'mackay', 'lbfgs', got 'adam'"),
        ({"at": "map"}, "at must be one of"),
        ({"curvature": "exact"}, "curvature must be one of"),
        ({"targets": "labels"}, "targets must be one of"),
        ({"at": "theta_map", "curvature": "full"}, "curvature='full' evaluates H at theta_star"),
        ({"curvature": "full"}, "curvature='full' applies to classification"),
        ({"targets": "residual", "held_out": True, "at": "theta_map"}, "needs targets='data'"),
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1"),
        ({"bounds": (2.0, 1.0)}, r"bounds must be \(low, high\)"),
    ],
)
def test_bad_arguments(regression, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_evidence(Model(regression[1]), **arguments)


def test_a_model_that_stores_the_wrong_shapes_is_refused(regression):
    model = Model(regression[1])
    model.set_hyperparameters = lambda precision, noise: (precision[:1], noise)
    with pytest.raises(ValueError, match="must return 3 precisions and 1 noise variances, got 1 and 1"):
        fit_evidence(model)


def text_of(report) -> str:
    return " | ".join(report.warnings)


def test_warnings_constant_targets_and_repeated_inputs():
    linear = dense.linear_model(5, 20, (6, 5))
    blocks = [torch.cat([block, block[:4]]) for block in linear.blocks]
    repeated = dense.Linear(blocks, linear.theta, torch.cat([linear.network, linear.network[:4]]))
    problem = dense.gaussian_problem(repeated, torch.full((24,), 2.0, dtype=torch.float64))
    report = fit_problem(problem)
    assert "constant targets" in text_of(report)
    assert "4 training inputs repeat another one" in text_of(report)
    two_outputs = dataclasses.replace(problem, outputs=2)
    assert "2 training inputs repeat" in text_of(fit_problem(two_outputs))
    plain = dense.gaussian_problem(linear, dense.targets_of(linear, 5))
    assert "constant" not in text_of(fit_problem(plain))
    assert "repeat" not in text_of(fit_problem(plain))


def test_warning_one_class_only():
    _, problem = dense.softmax_problem(4, 12, 3)
    one = dataclasses.replace(problem, labels=torch.ones(12, dtype=torch.long))
    assert "constant targets" in text_of(fit_problem(one))


def test_warning_pruned_and_not_a_failure():
    linear = dense.linear_model(6, ROWS, (6, 6))
    t = linear.blocks[0] @ linear.theta[0] + 0.1 * dense.randn(dense.generator(1), ROWS)
    grams = torch.cat([linear.grams[:1], torch.zeros(1, ROWS, ROWS, dtype=torch.float64)])
    problem = GaussianEvidence(grams, t, NoiseModel.homoscedastic(ROWS, 1.0), group_names=("used", "dead"))
    report = fit_problem(problem)
    assert report.converged
    assert report.pruned == ("dead",)
    assert "pruned: the data ask for no variance from dead" in text_of(report)


def test_warning_over_fitting_and_noise_at_its_bound():
    linear = dense.linear_model(0, 12, (60,), decay=6.0)
    noise_free = linear.offset + linear.jacobian @ dense.randn(dense.generator(4), 60)
    problem = dense.gaussian_problem(linear, noise_free)
    text = text_of(fit_problem(problem))
    assert "over-fitting: effective dimension 12.0 out of 12" in text
    assert "noise variance at its lower bound" in text


def test_warning_theta_far_from_theta_star(regression):
    linear, _ = regression
    # Weights that explain nothing: large, and the targets do not come from them.
    lost = dense.Linear(linear.blocks, [30.0 * theta for theta in linear.theta], linear.network)
    y = linear.network + 0.1 * dense.randn(dense.generator(2), ROWS)
    grams_targets = dense.gaussian_problem(lost, y)
    shifted = dataclasses.replace(grams_targets, targets=y - linear.offset)
    assert "far from theta_star" in text_of(fit_problem(shifted))


def test_warning_not_converged(regression):
    report = fit_problem(regression[1], max_evaluations=3)
    assert not report.converged
    assert report.warnings[0].startswith("not converged: stopped after max_evaluations=3")
    assert "NOT converged" in str(report)


def test_warning_precision_at_its_lower_bound(regression):
    report = fit_problem(regression[1], bounds=(1e-10, 1e-3))
    assert "precision at its lower bound" in text_of(report)


def test_jitter_is_reported_for_grams_that_rounding_made_indefinite():
    linear = dense.linear_model(8, 30, (3, 3))
    dent = 1e-9 * torch.linalg.qr(dense.randn(dense.generator(3), 30, 30))[0][:, :1]
    grams = linear.grams - dent @ dent.T * linear.grams.diagonal(dim1=-2, dim2=-1).mean() * 1e8
    known = NoiseModel.known(torch.full((30,), 1e-13, dtype=torch.float64))
    problem = GaussianEvidence(grams.clone(), linear.network, known)
    report = evidence_objective(problem).evaluate(torch.ones(2))
    assert report.jitter > 0


def test_eigenvalues_cut_is_reported():
    linear = dense.linear_model(9, 30, (7,))
    assert fit_problem(dense.gaussian_problem(linear, dense.targets_of(linear, 9))).eigenvalues_cut == 23


def test_single_row_and_zero_targets():
    one = GaussianEvidence(torch.full((1, 1, 1), 2.0), torch.tensor([3.0]), NoiseModel.homoscedastic(1))
    assert fit_problem(one).converged
    linear = dense.linear_model(10, 20, (5, 5))
    zero = GaussianEvidence(linear.grams, torch.zeros(20), NoiseModel.homoscedastic(20))
    report = fit_problem(zero)
    assert math.isfinite(report.log_evidence)
    assert any("bound" in text or "pruned" in text for text in report.warnings)


def test_nothing_of_the_callers_changes(regression):
    _, problem = regression
    before = {name: value.clone() for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    state, noise = torch.get_rng_state(), problem.noise.values.clone()
    fit_problem(problem)
    fit_problem(problem, method="lbfgs", at="theta_map")
    assert all(torch.equal(getattr(problem, name), value) for name, value in before.items())
    assert torch.equal(problem.noise.values, noise)
    assert torch.equal(torch.get_rng_state(), state)


def test_report_prints_a_table(regression):
    _, problem = regression
    shown = str(fit_problem(problem))
    for part in ("nats", "converged", "noise variance", "training MSE", "layer2", "precision", "effective"):
        assert part in shown
    long = dataclasses.replace(problem, group_names=("a" * 100, "b", "c"))
    assert max(map(len, str(fit_problem(long)).split("warning")[0].splitlines())) < 130
    many = NoiseModel.per_output(ROWS, torch.ones(16))
    assert "..." in str(fit_problem(dataclasses.replace(problem, noise=many, outputs=16), max_evaluations=5))


def test_plots(regression, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    report = fit_problem(regression[1])
    ax = report.plot()
    assert list(ax.lines[0].get_ydata()) == report.trace
    figure = Figure()
    own = figure.subplots()
    assert report.plot(own) is own
    bars = report.plot_groups()
    assert [bar.get_width() for bar in bars.patches] == report.effective_dimension.tolist()
    (upper,) = (other for other in bars.figure.axes if other is not bars)
    assert upper.get_xscale() == "log"
    assert upper.collections[0].get_offsets()[:, 0].tolist() == report.precision.tolist()
    assert [label.get_text() for label in bars.get_yticklabels()] == list(report.group_names)
    bars.figure.savefig(tmp_path / "groups.png")
    ax.figure.savefig(tmp_path / "trace.png")


def test_plots_without_matplotlib(regression, monkeypatch):
    report = fit_problem(regression[1], max_evaluations=2)
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="plots need matplotlib"):
        report.plot()
