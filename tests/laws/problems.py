"""What the laws are tested on: the reference problems, and random deep networks drawn by Hypothesis."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import Positive
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ntkgp
from tests import reference as ref

DOUBLE = torch.float64
NORMALIZERS = ("none", "layer", "batch", "group", "rms")
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
REFERENCES = {
    "R": ref.problem_r, "C": ref.problem_c, "U": ref.problem_u, "BN": ref.batchnorm_net, "CNN": ref.layernorm_cnn
}  # fmt: skip


def rel(a: Tensor, b: Tensor | float) -> float:
    """max|a − b| / max|b|."""
    a, b = (torch.as_tensor(value, dtype=DOUBLE).detach() for value in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def violation(a: Tensor) -> float:
    """How far A is from A ≽ 0: max(0, −λ_min) / max|λ|."""
    values = torch.linalg.eigvalsh((a + a.mT) / 2)
    return max(0.0, float(-values[0] / values.abs().max()))


@dataclass(frozen=True)
class Spec:
    """A random network with random hyper-parameters; everything follows from these fields."""

    depth: int = 3
    outputs: int = 1
    normalizer: str = "layer"
    activation: str = "tanh"
    affine: bool = True
    dtype: torch.dtype = DOUBLE
    groups: str = "tensor"
    log_noise: float = -1.0
    spread: float = 4.0  # log10 λ_g runs over ± spread
    seed: int = 0
    classify: bool = False


def _normalizer(spec: Spec, width: int) -> list[nn.Module]:
    made = {
        "none": lambda: [],
        "layer": lambda: [nn.LayerNorm(width, eps=0.0, elementwise_affine=spec.affine)],
        "batch": lambda: [nn.BatchNorm1d(width, eps=1e-30, affine=spec.affine)],
        "group": lambda: [nn.GroupNorm(2, width, eps=0.0, affine=spec.affine)],
        "rms": lambda: [nn.RMSNorm(width, eps=0.0, elementwise_affine=spec.affine)],
    }
    return made[spec.normalizer]()


def build(spec: Spec) -> nn.Sequential:
    """Input 3, `depth` hidden layers of 8 with biases, a dense head; nothing is left at a special value."""
    with ref.seeded(spec.seed):
        layers: list[nn.Module] = []
        for width in [3] + [8] * (spec.depth - 1):
            layers += [nn.Linear(width, 8), *_normalizer(spec, 8), ACTIVATIONS[spec.activation]()]
        net = nn.Sequential(*layers, nn.Linear(8, spec.outputs)).double()
        with torch.no_grad():
            for module in net:
                if isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.GroupNorm | nn.RMSNorm) and spec.affine:
                    for p in module.parameters():
                        p.add_(0.3 * torch.randn_like(p))
            net.train()
            for _ in range(5):
                net(torch.randn(20, 3, dtype=DOUBLE))  # running statistics of BatchNorm
        return net.eval().to(spec.dtype)


@dataclass(frozen=True, eq=False)
class Problem:
    """A network, its data and hyper-parameters, with what the dense oracle says about them."""

    net: nn.Module
    x: Tensor
    y: Tensor  # (N, C), or labels (N,)
    x_test: Tensor
    groups: str
    raw_precision: Tensor  # (G,), before any common factor
    noise: float
    unit_scale: bool = False  # multiply the precisions so that the mean of diag K is one
    classify: bool = False

    @cached_property
    def lin(self) -> ntkgp.LinearizedNetwork:
        return ntkgp.LinearizedNetwork(self.net, self.x, groups=self.groups)

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    @cached_property
    def index(self) -> Tensor:
        return ref.index(self.net, [set(members) for members in self.lin.groups.members])

    @cached_property
    def theta(self) -> Tensor:
        return ref.theta(self.net)

    @cached_property
    def f(self) -> Tensor:  # (N, C)
        return ref.outputs(self.net, self.x)

    @cached_property
    def f_test(self) -> Tensor:
        return ref.outputs(self.net, self.x_test)

    @cached_property
    def j(self) -> Tensor:  # (NC, P)
        return ref.jacobian(self.net, self.x).flatten(0, 1)

    @cached_property
    def j_test(self) -> Tensor:
        return ref.jacobian(self.net, self.x_test).flatten(0, 1)

    @property
    def num_outputs(self) -> int:
        return self.f.shape[1]

    @cached_property
    def precision(self) -> Tensor:  # (G,)
        if not self.unit_scale:
            return self.raw_precision
        return self.raw_precision * ref.gram(self.j, self.raw_precision[self.index]).diagonal().mean()

    @cached_property
    def entries(self) -> Tensor:
        """λ of each entry of theta, (P,)."""
        return self.precision[self.index]

    @cached_property
    def noise_rows(self) -> Tensor:
        return torch.full((len(self.j),), self.noise, dtype=DOUBLE)

    @cached_property
    def offset(self) -> Tensor:
        """m0 = f − Jθ̃, (N, C)."""
        return self.f - (self.j @ self.theta).view_as(self.f)

    @cached_property
    def t(self) -> Tensor:
        """Targets of the evidence, (NC,)."""
        return (self.y.double() - self.offset).flatten()

    @cached_property
    def k(self) -> Tensor:
        return ref.gram(self.j, self.entries)

    @cached_property
    def cross(self) -> Tensor:  # (test, train)
        return ref.gram(self.j_test, self.entries, self.j)

    @cached_property
    def k_test(self) -> Tensor:
        return ref.gram(self.j_test, self.entries)

    @cached_property
    def primal(self) -> ref.Posterior:
        if self.classify:
            return ref.softmax_primal(self.j, self.offset, self.f, self.y, self.entries, self.index)
        return ref.gaussian_primal(self.j, self.t, self.entries, self.noise_rows, self.index)

    @cached_property
    def v(self) -> Tensor:
        """Exact posterior covariance of the test outputs, in weight space."""
        return self.j_test @ self.primal.covariance @ self.j_test.T

    @cached_property
    def condition(self) -> float:
        """Condition number of (K + σ²I)/σ², or of I + SᵀKS <= 1 + λ_max(K)/4."""
        return 1 + float(torch.linalg.eigvalsh(self.k)[-1]) / (4.0 if self.classify else self.noise)

    def tol(self, base: float, conditioned: bool = True) -> float:
        """The law's tolerance, scaled by rounding of the network's dtype and by the problem's condition."""
        unit = 2e-16 if self.dtype == DOUBLE else 2e-6
        return max(base, unit * (20 * self.condition if conditioned and self.dtype == DOUBLE else
                                 self.condition if conditioned else 10))  # fmt: skip

    def regroup(self, groups: str) -> Problem:
        """The same data with another partition, all precisions one."""
        count = len(ntkgp.LinearizedNetwork(self.net, self.x, groups=groups).groups)
        return replace(self, groups=groups, raw_precision=torch.ones(count, dtype=DOUBLE), unit_scale=False)

    # -- the package's objects --

    @cached_property
    def kernel(self) -> ntkgp.kernels.NeuralTangentKernel:
        kernel = ntkgp.kernels.NeuralTangentKernel(self.lin).double()
        kernel.precision = self.precision
        return kernel

    def model(self, mean: str = "network", **changes: Any) -> ntkgp.ExactNTKGP:
        """The exact model at the problem's hyper-parameters, in eval mode; `changes` replace data or noise."""
        p = replace(self, raw_precision=self.precision, unit_scale=False, **changes) if changes else self
        if p.classify:
            c = self.num_outputs
            likelihood = ntkgp.likelihoods.BernoulliLikelihood() if c == 1 else ntkgp.CategoricalLikelihood(c)
        else:
            likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log))
        y = p.y if p.classify or p.y.shape[1] > 1 else p.y[:, 0]
        model = ntkgp.ExactNTKGP(p.x, y, likelihood, self.lin, mean=mean)
        model.kernel.precision = p.precision
        if not p.classify:
            model.likelihood.noise = torch.tensor(p.noise, dtype=DOUBLE)
        return model.eval()

    def covariance(self, **changes: Any) -> Tensor:
        """Latent posterior covariance of the test outputs by the package."""
        model = self.model(**changes)
        with torch.no_grad():
            return model(changes.get("x_test", self.x_test)).covariance_matrix


def _from_sample(name: str) -> Problem:
    sample = REFERENCES[name]()
    classify = not sample.y.is_floating_point()
    y = sample.y if classify or sample.y.ndim == 2 else sample.y.unsqueeze(-1)
    return Problem(sample.net, sample.x, y, sample.x_test, "tensor", sample.precision, sample.noise, classify=classify)


def _from_spec(spec: Spec) -> Problem:
    net = build(spec)
    generator = torch.Generator().manual_seed(spec.seed + 1)
    n = {1: 16, 3: 8, 10: 6}[spec.outputs]
    x = torch.randn(n, 3, generator=generator, dtype=DOUBLE).to(spec.dtype)
    x_test = (2 * torch.randn(4, 3, generator=generator, dtype=DOUBLE)).to(spec.dtype)
    f = ref.outputs(net, x)
    if spec.classify:
        y = torch.randint(0, max(spec.outputs, 2), (n,), generator=generator)
    else:
        y = f + 0.5 * torch.randn(f.shape, generator=generator, dtype=DOUBLE)
    groups = ntkgp.LinearizedNetwork(net, x, groups=spec.groups).groups
    exponent = torch.rand(len(groups), generator=generator, dtype=DOUBLE) * 2 - 1
    if len(groups) > 1:  # use the whole range
        exponent[int(exponent.argmin())], exponent[int(exponent.argmax())] = -1.0, 1.0
    precision = 10 ** (spec.spread * exponent)
    noise = 10**spec.log_noise
    return Problem(net, x, y, x_test, spec.groups, precision, noise, unit_scale=True, classify=spec.classify)


@functools.lru_cache(maxsize=512)
def problem(key: str | Spec) -> Problem:
    """The problem of a name or a spec, built once."""
    return _from_sample(key) if isinstance(key, str) else _from_spec(key)


def specs(**fixed: Any) -> st.SearchStrategy[Spec]:
    """Random networks: depth >= 3, C in {1, 3, 10}, normaliser, activation, groups, λ over 10^8, σ², dtype.

    A fixed value is used as it is, a tuple is sampled from.
    """
    free: dict[str, Any] = {
        "depth": (3, 4),
        "outputs": (1, 3, 10),
        "normalizer": NORMALIZERS,
        "activation": tuple(ACTIVATIONS),
        "affine": (True, False),
        "dtype": (DOUBLE, torch.float32),
        "groups": ("tensor", "normalization", "layer"),
        "seed": tuple(range(8)),
        "log_noise": (-2.0, -1.0, 0.0),
    }
    free.update(fixed)
    options = {
        name: st.sampled_from(value) if isinstance(value, tuple) else st.just(value) for name, value in free.items()
    }

    def settle(spec: Spec) -> Spec:
        # Single precision cannot resolve a noise far below the kernel.
        return replace(spec, log_noise=max(spec.log_noise, -1.0)) if spec.dtype == torch.float32 else spec

    return st.builds(Spec, **options).map(settle)


def law(*references: str, examples: int = 4, **fixed: Any) -> Callable[[Callable[[Problem], None]], Callable[[], None]]:
    """Run a law on reference problems and on `examples` random ones, the same in every run."""

    def decorate(check: Callable[[Problem], None]) -> Callable[[], None]:
        def run(key):
            check(problem(key))

        run.__name__, run.__qualname__, run.__doc__, run.__module__ = (
            check.__name__, check.__qualname__, check.__doc__, check.__module__
        )  # fmt: skip
        test = given(key=specs(**fixed))(run)
        for name in references:
            test = example(key=name)(test)
        return settings(
            max_examples=examples, deadline=None, derandomize=True, database=None,
            phases=[Phase.explicit, Phase.generate],  # the specs are as simple as they get
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )(test)  # fmt: skip

    return decorate


# --- changes of a network that must not matter ----------------------------------------------------


def _blocks(net: nn.Sequential) -> list[tuple[nn.Module, nn.Module | None, nn.Module]]:
    """(layer, its normaliser, next layer) of every hidden layer of a sequential network."""
    weighted = [i for i, m in enumerate(net) if isinstance(m, nn.Linear | nn.Conv2d)]
    norms = (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm, nn.RMSNorm)
    return [
        (net[i], net[i + 1] if isinstance(net[i + 1], norms) else None, net[k]) for i, k in itertools.pairwise(weighted)
    ]


def permute_hidden(net: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """The same function with the units of the first hidden layer in another order (within the halves of GroupNorm)."""
    net = copy.deepcopy(net)
    layer, norm, following = _blocks(net)[0]
    width = layer.weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    half = width // 2
    order = torch.cat(
        [torch.randperm(half, generator=generator), half + torch.randperm(width - half, generator=generator)]
    )
    with torch.no_grad():
        for owner in (layer, norm):
            if owner is not None:
                tensors = [*owner.parameters(), *(b for b in owner.buffers() if b.ndim)]
                for tensor in tensors:
                    tensor.copy_(tensor[order].clone())
        following.weight.copy_(following.weight[:, order].clone())
    return net


def scale_normalized(net: nn.Sequential, factors: tuple[float, ...]) -> nn.Sequential:
    """Weight and bias of the layers before a normaliser times k; running statistics follow, so f is unchanged."""
    net = copy.deepcopy(net)
    normalized = [(layer, norm) for layer, norm, _ in _blocks(net) if norm is not None]
    with torch.no_grad():
        for number, (layer, norm) in enumerate(normalized):
            k = factors[number % len(factors)]
            for p in layer.parameters():
                p.mul_(k)
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.mul_(k)
                norm.running_var.mul_(k * k)
    return net


def scale_of(net: nn.Sequential, factors: tuple[float, ...]) -> dict[str, float]:
    """The factor k that `scale_normalized` applies to each parameter, by name."""
    names = {id(p): name for name, p in net.named_parameters()}
    factor = dict.fromkeys(names.values(), 1.0)
    normalized = [layer for layer, norm, _ in _blocks(net) if norm is not None]
    for number, layer in enumerate(normalized):
        for p in layer.parameters():
            factor[names[id(p)]] = factors[number % len(factors)]
    return factor


def group_factors(p: Problem, factor: dict[str, float]) -> Tensor:
    """Factor of each group, (G,); every group must have a single one."""
    per_group = []
    for members in p.lin.groups.members:
        values = {factor[name] for name in members}
        assert len(values) == 1, "a group mixes normalised and other parameters"
        per_group.append(values.pop())
    return torch.tensor(per_group, dtype=DOUBLE)
