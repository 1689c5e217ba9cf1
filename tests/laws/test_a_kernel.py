"""Laws A1–A9: the kernel."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import ntkgp
from tests import reference as ref
from tests.laws.problems import (
    DOUBLE,
    Problem,
    Spec,
    build,
    group_factors,
    law,
    permute_hidden,
    problem,
    rel,
    scale_normalized,
    scale_of,
)

K_FACTORS = (5.0, 0.2)


def joint_kernel(p: Problem) -> torch.Tensor:
    x = torch.cat([p.lin.pack(p.x), p.lin.pack(p.x_test)]).double()
    return p.kernel(x).to_dense().detach()


def smallest_budget(lin: ntkgp.LinearizedNetwork, x1: torch.Tensor, x2: torch.Tensor) -> int:
    """The least memory that grams accepts, to a tenth: the Grams then come block by block."""
    budget = 8 * len(lin.groups) * len(x1) * len(x2) * lin.num_outputs**2
    while True:
        try:
            lin.grams(x1, x2, max_memory=budget)
        except ValueError:
            budget = int(1.1 * budget)
        else:
            return budget


@law("R", "U", "C", "BN", "CNN")
def test_A1_gram_by_products_is_the_explicit_one(p):
    """Gram by jvp∘Λ⁻¹∘vjp = explicit JΛ⁻¹Jᵀ = the kernel; chunked = unchunked."""
    tol = p.tol(1e-12, conditioned=False)
    assert rel(p.lin.jacobian(p.x).flatten(0, 1), p.j) < tol
    rows, n = len(p.j), len(p.x)
    basis = torch.eye(rows, dtype=p.dtype).reshape(rows, n, -1)
    rows_by_vjp = p.lin.vjp(p.x, basis)
    assert rel(rows_by_vjp, p.j) < tol
    columns = p.lin.jvp(p.x_test, (rows_by_vjp.double() / p.entries).to(p.dtype)).flatten(1)
    assert rel(columns.T, p.cross) < tol
    assert rel(p.kernel(p.lin.pack(p.x_test).double(), p.lin.pack(p.x).double()).to_dense(), p.cross) < tol
    assert rel(p.kernel(p.lin.pack(p.x).double()).to_dense(), p.k) < tol
    grams = p.lin.grams(p.x, p.x_test)
    assert grams.dtype == DOUBLE
    for g in range(len(p.lin.groups)):
        mask = p.index == g
        scale = (p.j[:, mask].norm(dim=1).max() * p.j_test[:, mask].norm(dim=1).max()).clamp_min(1e-300)
        assert float((grams[g] - p.j[:, mask] @ p.j_test[:, mask].T).abs().max() / scale) < tol
    few, some = p.x[:5], p.x_test[:3]
    chunked = p.lin.grams(few, some, max_memory=smallest_budget(p.lin, few, some))
    assert rel(chunked, p.lin.grams(few, some)) < tol
    diagonals = p.lin.gram_diagonals(p.x)
    blocks = p.lin.grams(p.x).unflatten(1, (n, -1)).unflatten(3, (n, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    assert rel(diagonals, blocks) < tol


@law("R", "U", "C", "BN", "CNN")
def test_A2_kernel_is_symmetric_and_psd(p):
    k = joint_kernel(p)
    assert rel(k.T, k) < 1e-13
    values = torch.linalg.eigvalsh(k)
    assert values[0] >= -1e-13 * values[-1]
    if p.dtype == DOUBLE:
        joint = torch.cat([p.j, p.j_test])
        assert rel(k, ref.gram(joint, p.entries)) < 1e-12


@law("R", "U", "C", "BN", "CNN")
def test_A3_kernel_is_the_weighted_sum_of_the_group_grams(p):
    x = p.lin.pack(p.x).double()
    grams = p.lin.grams(x)
    explicit = torch.stack([k / lam for k, lam in zip(grams, p.precision, strict=True)]).sum(0)
    assert rel(p.kernel(x).to_dense(), explicit) < 1e-13
    assert rel(p.k, explicit) < p.tol(1e-12, conditioned=False)


@law("R", "U", "C", "BN", "CNN")
def test_A4_kernel_is_homogeneous_in_the_precision(p):
    x = p.lin.pack(p.x).double()
    kernel = ntkgp.kernels.NeuralTangentKernel(p.lin).double()
    for c in (1e-4, 3.0, 1e4):
        kernel.precision = c * p.precision
        assert rel(kernel(x).to_dense(), p.kernel(x).to_dense() / c) < 1e-13


@law("R", "U", "C", "BN", examples=5, groups=("tensor", "layer"))
def test_A5_order_of_hidden_units_does_not_matter(p):
    q = replace(p, net=permute_hidden(p.net), raw_precision=p.precision, unit_scale=False)
    assert rel(q.f, p.f) < 1e-12 if p.dtype == DOUBLE else 1e-5
    assert not torch.equal(q.theta, p.theta)
    a, b = joint_kernel(q), joint_kernel(p)
    assert rel(a, b) < p.tol(1e-12, conditioned=False)


@law("R", "C", normalizer=("layer", "group", "rms"), groups="normalization", dtype=DOUBLE)
def test_A6_euler_identity_of_normalised_groups(p):
    q = p.regroup("normalization")
    normalized = q.lin.groups.is_normalized
    assert sum(normalized) >= 2
    error = q.lin.groups.verify(q.x)
    for g, flag in enumerate(normalized):
        part = torch.where(q.index == g, q.lin.theta, 0.0)
        size = q.j[:, q.index == g].norm() * part.norm()
        direct = float(q.lin.jvp(q.x, part).norm() / size)
        if flag:
            assert direct < 1e-12
            assert error[g] < 1e-12


def test_A6n_other_groups_do_not_satisfy_it():
    """The head, the groups of problem U, and BatchNorm in eval mode (although scale invariant) have J_gθ_g ≠ 0."""
    for name in ("R", "U"):
        p = problem(name)
        skip = {0, 1} if name == "R" else set()
        for g in set(range(len(p.lin.groups))) - skip:
            part = torch.where(p.index == g, p.lin.theta, 0.0)
            assert p.lin.jvp(p.x, part).square().mean().sqrt() > 1e-3
            assert p.lin.groups.verify(p.x)[g] > 1e-3
    p = problem("BN")
    q = p.regroup("normalization")
    assert q.lin.groups.is_normalized == (True, True, True, False)
    for g in range(3):
        part = torch.where(q.index == g, q.lin.theta, 0.0)
        assert q.lin.jvp(q.x, part).square().mean().sqrt() > 1e-2
    assert q.lin.groups.verify(q.x)[:3].max() < 1e-12
    assert rel(ntkgp.LinearizedNetwork(scale_normalized(p.net, K_FACTORS), p.x)(p.x), p.f) < 1e-12


@law("R", "C", normalizer=("layer", "group", "rms"), affine=False, dtype=DOUBLE)
def test_A7_network_without_affine_parameters_is_linear_in_its_weights(p):
    assert rel(p.lin.jvp(p.x, p.lin.theta), p.lin(p.x)) < 1e-11
    mean = ntkgp.means.LinearizedMean(p.lin)(p.lin.pack(p.x))
    assert float(mean.abs().max() / p.f.abs().max()) < 1e-11


@law("BN", normalizer=("layer", "batch", "group"), affine=True, dtype=DOUBLE)
def test_A7n_affine_parameters_break_it(p):
    mean = ntkgp.means.LinearizedMean(p.lin)(p.lin.pack(p.x)).reshape(p.f.shape)
    assert float(mean.abs().max() / p.f.abs().max()) > 1e-3
    assert rel(mean, p.offset) < 1e-11


@law("R", "C", "BN", normalizer=("layer", "group", "rms", "batch"), groups="tensor", dtype=DOUBLE)
def test_A8_scaled_weights_have_scaled_jacobians(p):
    net = scale_normalized(p.net, K_FACTORS)
    q = replace(p, net=net)
    k = group_factors(p, scale_of(p.net, K_FACTORS))[p.index]
    assert {5.0, 0.2} <= set(k.tolist())
    assert rel(q.lin(p.x), p.f) < 1e-11
    assert rel(q.lin.jacobian(p.x).flatten(0, 1) * k, p.j) < 1e-11
    kernel = ntkgp.kernels.NeuralTangentKernel(q.lin).double()
    kernel.precision = p.precision / group_factors(p, scale_of(p.net, K_FACTORS)) ** 2
    assert rel(kernel(p.x).to_dense(), p.k) < 1e-11


@pytest.mark.parametrize("outputs", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_A9_rows_of_a_batch_do_not_depend_on_each_other(outputs, dtype):
    """Eval-mode BatchNorm and no dropout, although the user's network is left in train mode."""
    base = build(Spec(depth=3, outputs=outputs, normalizer="batch", dtype=dtype))
    layers = [
        part for module in base for part in ((module, nn.Dropout(0.5)) if isinstance(module, nn.Tanh) else (module,))
    ]
    net = nn.Sequential(*layers).train()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(dtype)
    lin = ntkgp.LinearizedNetwork(net, x)
    tol = 1e-13 if dtype == DOUBLE else 1e-5
    singles = [x[n : n + 1] for n in range(7)]
    assert rel(lin(x), torch.cat([lin(row) for row in singles]).double()) < tol
    assert rel(lin(x), ref.outputs(net, x)) < tol
    jacobian = lin.jacobian(x)
    assert rel(jacobian, torch.cat([lin.jacobian(row) for row in singles]).double()) < tol
    assert rel(jacobian, ref.jacobian(net, x)) < (1e-12 if dtype == DOUBLE else 1e-5)
    v = torch.randn(lin.num_parameters, generator=torch.Generator().manual_seed(2), dtype=DOUBLE).to(dtype)
    assert rel(lin.jvp(x, v), torch.cat([lin.jvp(row, v) for row in singles]).double()) < tol
    grams = torch.cat([torch.cat([lin.grams(a, b) for b in singles], 2) for a in singles], 1)
    assert rel(lin.grams(x), grams) < tol
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
