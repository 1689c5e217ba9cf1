"""The Gram by rows, in one process, against the Jacobian; law E1 has the other processes."""

import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.evidence.newton_cg import iterative_mode
from ntkgp.likelihoods import curvature_factor
from ntkgp.solvers import TangentGram, sharded
from ntkgp.solvers.sharded import SharedGram, tangent_gram

DOUBLE = torch.float64
ENOUGH, TOO_LITTLE = 2**28, 96 * 2**10


@pytest.fixture(scope="module")
def problem():
    """37 inputs, three normalised layers, two outputs: linearisation, inputs and Jacobian (74, P)."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = []
        for width in (3, 5, 5):
            layers += [nn.Linear(width, 5), nn.LayerNorm(5), nn.Tanh()]
        net, x = nn.Sequential(*layers, nn.Linear(5, 2)).double(), torch.randn(37, 3, dtype=DOUBLE)
    lin = ntkgp.LinearizedNetwork(net, x, groups="normalization")
    return lin, lin.pack(x), lin.jacobian(x).flatten(0, 1)


def kernel(lin, jacobian, variance):
    return (jacobian * lin.groups.expand(variance)) @ jacobian.mT


@pytest.mark.parametrize("budget", [ENOUGH, TOO_LITTLE])
def test_products_columns_and_blocks_are_those_of_the_jacobian(budget, problem):
    lin, x, jacobian = problem
    gram = SharedGram(lin, x, budget)
    assert gram.is_kept == (budget == ENOUGH)
    v = torch.randn(len(jacobian), 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for factor in (1.0, 3.0):  # weighted panels are held, but not beyond their variance
        variance = factor * torch.linspace(0.5, 2.0, len(lin.groups), dtype=DOUBLE)
        dense = kernel(lin, jacobian, variance)
        torch.testing.assert_close(gram.product(variance)(v), dense @ v, rtol=1e-11, atol=1e-11)
        points = torch.tensor([0, 5, 20, 36])
        columns = dense.reshape(len(dense), -1, 2)[:, points].flatten(1)
        torch.testing.assert_close(gram.columns(points, variance), columns, rtol=1e-11, atol=1e-11)
        blocks = torch.stack([dense[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] for n in range(37)])
        torch.testing.assert_close(gram.blocks(variance), blocks, rtol=1e-11, atol=1e-11)
    w = torch.randn(4, lin.num_parameters, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    torch.testing.assert_close(gram.push(w), jacobian @ w.mT, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gram.pull(v), v.mT @ jacobian, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gram.traces(), lin.groups.sum_per_group(jacobian.square()).sum(0), rtol=1e-11, atol=0)
    plain = TangentGram(lin, x)
    torch.testing.assert_close(plain.push(w), gram.push(w), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plain.pull(v), gram.pull(v), rtol=1e-11, atol=1e-11)


def test_kept_kernel_is_symmetric_to_the_last_bit(problem):
    lin, x, jacobian = problem
    gram = SharedGram(lin, x, ENOUGH)
    dense = gram.product(torch.ones(len(lin.groups)))(torch.eye(len(jacobian), dtype=DOUBLE))
    assert torch.equal(dense, dense.mT)


def test_rounding_is_that_of_the_passes_where_nothing_is_kept(problem):
    lin, x, _ = problem
    single = ntkgp.LinearizedNetwork(nn.Linear(3, 2), x.float(), groups="single")
    packed = single.pack(x.float())
    assert SharedGram(single, packed, ENOUGH).precision == 2.0**-52
    assert SharedGram(single, packed, TOO_LITTLE).precision == 2.0**-23
    assert SharedGram(lin, x, TOO_LITTLE).precision == 2.0**-52


@pytest.mark.parametrize("noise", [1.0, 1e-4])
def test_preconditioner_is_the_inverse_of_the_nystrom_approximation(noise, problem):
    lin, x, jacobian = problem
    factor = torch.eye(2, dtype=DOUBLE).expand(37, 2, 2) * noise**-0.5
    system = SharedGram(lin, x, ENOUGH).system(torch.ones(len(lin.groups), dtype=DOUBLE), factor)
    points = system.landmarks(6, 0)
    v = torch.randn(len(jacobian), 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    torch.testing.assert_close(system.preconditioner(points)(v), system.nystrom(points)(v), rtol=1e-7, atol=1e-9)
    rows = jacobian.reshape(37, 2, -1)[points].flatten(0, 1)
    cross = jacobian @ rows.mT / noise
    dense = torch.eye(len(v), dtype=DOUBLE) + cross @ torch.linalg.solve(rows @ rows.mT / noise, cross.mT)
    torch.testing.assert_close(dense @ system.preconditioner(points)(v), v, rtol=1e-4, atol=1e-4)


def test_the_mode_of_a_classification_by_shared_rows(problem):
    lin, x, jacobian = problem
    variance = torch.full((len(lin.groups),), 0.3, dtype=DOUBLE)
    labels = (x[:, 0] > 0).long()
    offset = lin(x) - (jacobian @ lin.theta).reshape(37, 2)
    system = SharedGram(lin, x, ENOUGH).system(variance, curvature_factor(offset))
    mode = iterative_mode(system, offset, labels, nystrom_points=6)
    logits = offset + (kernel(lin, jacobian, variance) @ mode.alpha).reshape(37, 2)
    onehot = nn.functional.one_hot(labels, 2)
    torch.testing.assert_close(mode.alpha.reshape(37, 2), onehot - logits.softmax(-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 37, 300])
def test_the_shares_are_even_and_cover_the_triangle(count, problem, monkeypatch):
    lin, x, _ = problem
    x = x[torch.arange(count) % 37]
    n = 2 * count
    for world in (1, 2, 4, 8, 16):
        monkeypatch.setattr(sharded, "world_size", lambda world=world: world)
        gram = SharedGram(lin, x, 1)
        owned = [gram._own(process) for process in range(world)]
        assert sorted(s for own in owned for s in own) == list(range(min(count, 32)))
        if count == 300:
            assert 1.0 <= gram._largest_share() * 2 * world / n**2 < 1.1


def test_a_budget_is_that_of_one_process(problem, monkeypatch):
    """What is too much for one is kept by four."""
    lin, x, _ = problem
    x = x[torch.arange(300) % 37]
    budget = 8 * (len(lin.groups) + 1) * 600**2 // 4
    assert lin.gram_memory(1, 300) <= budget // 4
    assert not SharedGram(lin, x, budget).is_kept
    monkeypatch.setattr(sharded, "world_size", lambda: 4)
    gram = SharedGram(lin, x, budget)
    assert gram.is_kept
    held = sum(panel.numel() for panel in gram._panels.values()) * 8
    assert held * (len(lin.groups) + 1) / len(lin.groups) <= 0.75 * budget
    assert not SharedGram(lin, x, budget, num_columns=600).is_kept
    assert not SharedGram(lin, x, budget, num_sides=600).is_kept


def test_without_a_group_nothing_is_shared(problem):
    lin, x, _ = problem
    assert type(tangent_gram(lin, x[torch.arange(1100) % 37], 1, 10, 3)) is TangentGram
