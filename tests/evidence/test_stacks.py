"""The evidence on stored triangles, in memory and on disk, against whole matrices; memory of a fit out of core."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from ntkgp.evidence import GaussianEvidence, NoiseModel, SoftmaxEvidence, evidence_objective, fit_problem
from ntkgp.evidence.blocks import expand
from ntkgp.evidence.stack import DenseGrams, gram_stack
from ntkgp.likelihoods import curvature_factor
from ntkgp.linearization.symmetric import SymmetricGrams
from tests.evidence import dense

ROWS = 60


def close(a, b, tolerance: float) -> None:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-300), (a, b)


def regression(sizes=(20, 40, 30)) -> GaussianEvidence:
    model = dense.linear_model(2, ROWS, sizes, 6.0)
    noise = NoiseModel.per_output(ROWS, torch.tensor([0.1, 0.2, 0.4]))
    return dense.gaussian_problem(model, dense.targets_of(model, 2), noise, 3)


def classification(classes: int, variant: str = "simple", sizes=(10, 15)) -> SoftmaxEvidence:
    return dense.softmax_problem(4, ROWS // max(classes, 2), classes, variant, sizes=sizes)[1]


PROBLEMS = {
    "regression": regression,
    "one_group": lambda: regression((40,)),
    "softmax": lambda: classification(3),
    "logistic": lambda: classification(1),
    "quadratic": lambda: classification(3, "quadratic"),
    "one_group_softmax": lambda: classification(3, sizes=(25,)),
}


def stored(problem, directory=None, dtype=torch.float64):
    storage = "memory" if directory is None else "disk"
    grams = SymmetricGrams.from_dense(problem.grams, storage=storage, directory=directory, dtype=dtype, strip_height=16)
    return replace(problem, grams=grams)


def test_dense_view_is_a_view_and_agrees_with_stored_triangles():
    grams = regression().grams
    whole, half = gram_stack(grams), gram_stack(SymmetricGrams.from_dense(grams, strip_height=16))
    assert isinstance(whole, DenseGrams)
    assert whole.grams.data_ptr() == grams.data_ptr()
    g = dense.generator(0)
    matrix, vector = dense.randn(g, ROWS, ROWS), dense.randn(g, ROWS)
    matrix = matrix + matrix.T
    weights = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    for name, arguments in (
        ("weighted_sum", (weights,)), ("diagonal", ()), ("traces", ()), ("inner", (matrix,)), ("quadratic", (vector,)),
        ("matvec", (vector,)),
    ):  # fmt: skip
        close(getattr(half, name)(*arguments), getattr(whole, name)(*arguments), 1e-12)
    assert whole.shape == half.shape
    assert whole.device == half.device


def test_a_problem_does_not_copy_its_grams():
    grams = regression().grams
    noise = NoiseModel.homoscedastic(ROWS)
    assert GaussianEvidence(grams, torch.ones(ROWS), noise).grams.data_ptr() == grams.data_ptr()
    stack = SymmetricGrams.from_dense(grams)
    assert GaussianEvidence(stack, torch.ones(ROWS), noise).stack is stack


def test_expand_is_the_adjoint_of_the_projection():
    factor = curvature_factor(dense.randn(dense.generator(0), 5, 4))
    full = torch.block_diag(*factor)
    reduced = dense.randn(dense.generator(1), 15, 15)
    reduced = reduced + reduced.T
    close(expand(reduced, factor), full @ reduced @ full.T, 1e-14)


@pytest.mark.parametrize("where", ["theta_star", "theta_map"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_evaluation_is_that_of_whole_matrices(name, where):
    problem = PROBLEMS[name]()
    one, two = evidence_objective(problem, where), evidence_objective(stored(problem), where)
    for seed in range(3):
        x = one.start() + dense.randn(dense.generator(seed), len(one.start()))
        found, reference = two(x), one(x)
        for field in ("value", "pull", "push", "effective_dimension", "squared_norms"):
            close(getattr(found, field), getattr(reference, field), 1e-11)
    star_one, star_two = getattr(one, "star", one), getattr(two, "star", two)
    for a, b in zip(star_two.squared_shift(x), star_one.squared_shift(x), strict=True):
        close(a, b, 1e-10)
    for a, b in zip(two.limits(), one.limits(), strict=True):
        close(a, b, 1e-14)


@pytest.mark.parametrize("method", ["mackay", "lbfgs"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_fit_on_disk_is_that_in_memory(name, method, tmp_path):
    """Storage on disk changes no number; float32 storage rounds the Grams, and nothing else."""
    problem = PROBLEMS[name]()
    memory, disk = (fit_problem(stored(problem, place), method) for place in (None, tmp_path))
    single = fit_problem(stored(problem, tmp_path, torch.float32), method)
    whole = fit_problem(problem, method)
    assert memory.converged
    assert disk.warnings == memory.warnings
    live = torch.tensor([group not in whole.pruned for group in whole.group_names])
    assert bool(live.any())

    def numbers(report) -> torch.Tensor:
        """Everything fitted; logarithms, since groups differ in scale."""
        logs = torch.cat([report.precision[live], report.noise, report.theta_star_norm[live]]).log()
        return torch.cat([logs, torch.tensor([report.log_evidence], dtype=torch.float64)])

    assert float((numbers(disk) - numbers(memory)).abs().max()) <= 1e-12
    assert float((numbers(memory) - numbers(whole)).abs().max()) <= 1e-6
    assert 0 < float((numbers(single) - numbers(whole)).abs().max()) <= 2e-5


def test_values_from_float32_storage():
    problem = regression()
    one, two = evidence_objective(problem), evidence_objective(stored(problem, dtype=torch.float32))
    found, reference = two(one.start()), one(one.start())
    assert found.value != reference.value
    for field in ("value", "pull", "push"):
        close(getattr(found, field), getattr(reference, field), 1e-5)


def test_bad_stacks_are_refused():
    noise, t = NoiseModel.homoscedastic(4), torch.ones(4)
    with pytest.raises(TypeError, match=r"grams must be a torch.Tensor or SymmetricGrams, got list"):
        GaussianEvidence([[1.0]], t, noise)
    for value, message in ((float("nan"), "grams contains NaN or infinite values"), (-1.0, "negative diagonal entry")):
        stack = SymmetricGrams.from_dense(torch.eye(4)[None])
        stack.strip(0, 0)[2, 2] = value
        with pytest.raises(ValueError, match=message):
            GaussianEvidence(stack, t, noise)
    with pytest.raises(ValueError, match=r"targets must have shape \(5,\), got \(4,\)"):
        GaussianEvidence(SymmetricGrams(2, 5), t, NoiseModel.homoscedastic(5))


_SCRIPT = """
import json, sys, threading, time, torch
torch.set_num_threads(1)
from ntkgp.evidence import GaussianEvidence, NoiseModel, SoftmaxEvidence, fit_problem
from ntkgp.linearization.symmetric import SymmetricGrams

storage, directory, kind = sys.argv[1:]
G, n = 24, 1200
g = torch.Generator().manual_seed(0)
stack = SymmetricGrams(G, n, storage=storage, directory=directory)
root = torch.randn(n, 8, generator=g, dtype=torch.float64)
for k, (a, b) in enumerate(stack.bounds):
    for i in range(G):
        scale = 1.0 + (torch.arange(8, dtype=torch.float64) + i) % 8
        stack.strip(i, k).copy_((root[a:b] * scale) @ root[:b].T)

def anonymous():
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

t = root @ torch.ones(8, dtype=torch.float64) + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
if kind == "regression":
    problem = GaussianEvidence(stack, t, NoiseModel.homoscedastic(n, 1.0))
else:
    zeros = torch.zeros(n // 3, 3, dtype=torch.float64)
    problem = SoftmaxEvidence(stack, zeros, zeros, t.reshape(-1, 3).argmax(-1))
# One small product first: what BLAS keeps for itself is not the fit's.
torch.linalg.cholesky(torch.eye(64, dtype=torch.float64))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
report = fit_problem(problem, max_evaluations=4)
done = True
thread.join()
print(json.dumps({"before": before, "peak": peak, "value": report.log_evidence, "matrix": 8 * n * n,
                  "dense": 8 * G * n * n}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["regression", "softmax"])
def test_memory_of_a_fit_out_of_core(kind, tmp_path, fresh):
    """Anonymous memory (RssAnon: the page cache of the file is not the process's own) of 276 MB of Grams on disk."""

    def run(storage: str) -> dict:
        return json.loads(fresh.run(_SCRIPT, storage, tmp_path, kind))

    disk, memory = run("disk"), run("memory")
    assert disk["value"] == pytest.approx(memory["value"], rel=1e-12)
    # A handful of n x n matrices, whatever G; the same run in memory holds half of the whole stack besides.
    assert disk["peak"] - disk["before"] < 8 * disk["matrix"]
    assert disk["peak"] - disk["before"] < disk["dense"] / 3
    assert memory["before"] - disk["before"] > 0.4 * memory["dense"]
