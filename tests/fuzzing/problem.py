"""A linearised case with data, hyper-parameters and what the dense oracle says of it."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gpytorch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import ntkgp
from tests import reference as ref
from tests.fuzzing.networks import Case
from tests.fuzzing.watch import Find

DOUBLE = torch.float64


def generator(*key: Any) -> torch.Generator:
    """A generator of torch from anything that prints."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(62))


@dataclass
class Problem:
    """Data of a case; everything is made when first asked for."""

    case: Case

    def rng(self, name: str) -> random.Random:
        """Numbers for one purpose: what is drawn must not depend on the order in which calls ask."""
        return random.Random(f"{name} {self.case.number}")

    @cached_property
    def lin(self) -> ntkgp.LinearizedNetwork:
        example = self.case.sample(self.rng("example").choice([1, 2, 5]), 3 * self.case.number + 2)
        return ntkgp.LinearizedNetwork(self.case.net, example, groups=self.case.groups)

    @cached_property
    def sizes(self) -> tuple[int, int]:
        rng = self.rng("sizes")
        return rng.choice([1, 2, 4, 6]), rng.choice([1, 2, 3])

    @cached_property
    def x(self) -> Any:
        return self.case.sample(self.sizes[0], 3 * self.case.number)

    @cached_property
    def x_test(self) -> Any:
        return self.case.sample(self.sizes[1], 3 * self.case.number + 1)

    @cached_property
    def f(self) -> Tensor:
        return ref.outputs(self.case.net, self.x)

    @cached_property
    def f_test(self) -> Tensor:
        return ref.outputs(self.case.net, self.x_test)

    @cached_property
    def j(self) -> Tensor:
        """(N·C, P)."""
        return ref.jacobian(self.case.net, self.x).flatten(0, 1)

    @cached_property
    def j_test(self) -> Tensor:
        return ref.jacobian(self.case.net, self.x_test).flatten(0, 1)

    @property
    def c(self) -> int:
        return self.f.shape[1]

    @cached_property
    def rounding(self) -> float:
        """Relative error that the network's own dtype leaves in its Jacobian, seen by one autograd pass in it."""
        return 1e-11 if self.case.dtype == DOUBLE else self.rounding_in_single

    @cached_property
    def rounding_in_single(self) -> float:
        """The same for a copy of the network in float32."""
        net = copy.deepcopy(self.case.net).eval().float()
        weights = [w for w in net.parameters() if w.requires_grad]
        out = ref._run(net, tree_map(lambda t: t.float() if t.is_floating_point() else t, self.x)).reshape(-1)
        rows = [torch.autograd.grad(o, weights, retain_graph=True, allow_unused=True) for o in out]
        zeros = [torch.zeros_like(w) for w in weights]
        own = torch.stack(
            [torch.cat([(z if g is None else g).flatten() for g, z in zip(row, zeros, strict=True)]) for row in rows]
        ).double()
        errors = [0.0]
        for g in range(len(self.lin.groups)):
            part = self.j[:, self.index == g]
            size = float(part.abs().max())
            errors.append(float((own[:, self.index == g] - part).abs().max()) / size if size > 0 else 0.0)
        return 1e-5 + 20 * max(errors)

    @cached_property
    def index(self) -> Tensor:
        names = [n for n, p in self.case.net.named_parameters() if p.requires_grad]
        return ref.index(self.case.net, [set(m) for m in self.lin.groups.members], names)

    @cached_property
    def precision(self) -> Tensor:
        """λ_g, (G,), in units in which every group matters."""
        scale = torch.stack([self.j[:, self.index == g].square().sum(-1).mean() for g in range(len(self.lin.groups))])
        rng = self.rng("precision")
        spread = torch.tensor([10 ** rng.uniform(-1, 1) for _ in scale], dtype=DOUBLE)
        return torch.where(scale > 1e-12 * scale.max().clamp_min(1e-30), scale * spread, torch.ones_like(scale))

    @cached_property
    def has_idle_groups(self) -> bool:
        """Whether the derivatives of some group are nothing but rounding, which a fitted precision then enlarges."""
        sizes = torch.stack([self.j[:, self.index == g].square().mean() for g in range(len(self.lin.groups))])
        return bool(((sizes > 0) & (sizes < 1e-20 * sizes.max())).any())

    def same(self, what: str, one: Tensor, two: Tensor, *others: ntkgp.LinearizedNetwork) -> None:
        """Bit by bit; up to rounding where a layer was found to break its rule, which is then computed otherwise."""
        trainable = set(self.lin.frozen.theta)
        if all(set(lin.engine.plan.shapes) == trainable for lin in (self.lin, *others)):
            if not torch.equal(one, two):
                raise Find(f"{what}: other bits")
            return
        self.close(what, one, two, factor=self.condition, scale=float(two.abs().max()))

    @cached_property
    def entries(self) -> Tensor:
        return self.precision[self.index]

    @cached_property
    def noise(self) -> float:
        return 10 ** self.rng("noise").uniform(-1.5, 0.5)

    @cached_property
    def k(self) -> Tensor:
        return ref.gram(self.j, self.entries)

    @cached_property
    def condition(self) -> float:
        """1 + ‖K‖/σ², by which conditioning may enlarge errors, times what makes 1e-9 of the rounding (B1)."""
        return max(1.0, 1e-9 / self.rounding) * (1 + float(torch.linalg.matrix_norm(self.k, 2)) / min(self.noise, 1.0))

    @cached_property
    def y(self) -> Tensor:
        """Targets, in the shapes that are taken: (N,) or (N, C) or (N, *output shape)."""
        g = generator("y", self.case.number)
        y = self.f + torch.randn(self.f.shape, generator=g, dtype=DOUBLE)
        shape = self.rng("shape").choice(["flat", "event", "matrix"])
        if shape == "flat" and self.c == 1:
            return y.squeeze(-1)
        return self.lin.restore(y) if shape == "event" else y

    @cached_property
    def labels(self) -> Tensor:
        return torch.randint(0, max(self.c, 2), (len(self.f),), generator=generator("labels", self.case.number))

    @cached_property
    def t(self) -> Tensor:
        """y − f + Jθ̃, flat."""
        return self.y.reshape(-1) - self.f.flatten() + self.j @ ref.theta(self.case.net)

    @cached_property
    def posterior(self) -> Tensor:
        """Latent covariance at the test inputs given the data, (T·C, T·C)."""
        noise = torch.full((len(self.k),), self.noise, dtype=DOUBLE)
        primal = ref.gaussian_primal(self.j, self.t, self.entries, noise, self.index)
        return self.j_test @ primal.covariance @ self.j_test.T

    def gaussian(self) -> gpytorch.likelihoods.Likelihood:
        """A Gaussian likelihood with the problem's noise."""
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = torch.tensor(self.noise, dtype=DOUBLE)
        return likelihood

    def categorical(self) -> gpytorch.likelihoods.Likelihood:
        """A softmax or logistic likelihood."""
        if self.c == 1:
            return ntkgp.likelihoods.BernoulliLikelihood()
        return ntkgp.CategoricalLikelihood(num_classes=self.c)

    def close(self, what: str, came: Tensor, expected: Tensor, *, factor: float = 1.0, scale: float = 0.0) -> None:
        """A find where a result differs from the oracle by more than rounding, relative to the largest entry."""
        if came.shape != expected.shape:
            raise Find(f"{what}: shape {tuple(came.shape)}, expected {tuple(expected.shape)}")
        if not torch.isfinite(came).all():
            raise Find(f"{what}: not finite")
        size = max(float(expected.abs().max()), scale, 1e-30)
        error, allowed = float((came.double() - expected).abs().max()) / size, factor * self.rounding
        if self.case.dtype == DOUBLE and error > allowed:
            # As much more than usual as float32 loses more than usual.
            allowed *= max(1.0, self.rounding_in_single / 1e-5 / 10)
        if not error <= allowed:
            raise Find(f"{what}: relative error {error:.2e}, allowed {allowed:.2e}")
