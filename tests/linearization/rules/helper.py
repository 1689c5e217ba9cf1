"""Terms of a network's parameters by the rules, and the same Jacobian rows by ``torch.func`` for every row alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import ntkgp.linearization.rules  # noqa: F401 -- registers the rules
from ntkgp.linearization.rules.registry import explicit_form, rule_of
from ntkgp.linearization.rules.terms import Term, combine

DOUBLE = torch.float64
OUTPUTS = 3
TOLERANCE = 1e-12


class Within(nn.Module):
    """A layer inside a network: a nonlinearity before it, two dense layers and nonlinearities after it.

    :param layer: the layer in question.
    :param x: inputs; integers reach the layer as they are.
    """

    def __init__(self, layer: nn.Module, x: Tensor, **kwargs: object) -> None:
        super().__init__()
        self.layer = layer.to(x.dtype if x.is_floating_point() else DOUBLE)
        self.kwargs = kwargs
        self.eval()
        with torch.no_grad():
            width = self.respond(x[:1]).numel()
        self.register_buffer("first", torch.randn(5, width, dtype=DOUBLE) / width**0.5)
        self.register_buffer("second", torch.randn(OUTPUTS, 5, dtype=DOUBLE))

    def respond(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return self.layer(x + 0.5 * torch.sin(2 * x) if x.is_floating_point() else x, **self.kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, OUTPUTS)."""
        y = self.respond(x).flatten(1)
        return (y + y.tanh()).matmul(self.first.to(y).mT).tanh().matmul(self.second.to(y).mT).sin()


class Folded(nn.Module):
    """A layer whose rows are the samples' leading positions: (N, uses, ...) -> (N·uses, ...) -> (N, uses, ...)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer, row by row."""
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def perturb(layer: nn.Module) -> nn.Module:
    """Draw parameters and running statistics, so that no normalization is trivial."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return layer


def written_out(net: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """A copy of the network that runs the explicit forms of its modules, and the modules that go by rules."""
    net = copy.deepcopy(net)
    sites = []
    for module in list(net.modules()):
        explicit = explicit_form(module)
        if explicit is not None:
            module.__dict__["forward"] = explicit.forward
            sites += list(explicit.modules())
        else:
            sites.append(module)
    return net, [module for module in sites if rule_of(module) is not None]


def uses_by_rule(net: nn.Module, x: Tensor, create_graph: bool = False) -> dict[str, list[Term]]:
    """Each parameter's terms, one per use, rows of one sample merged; those of modules that rules leave out miss."""
    net, sites = written_out(net)
    names = {id(p): name for name, p in net.named_parameters()}
    calls = []

    def remember(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        # A view's place in the graph is replaced when it is written to.
        output = output.clone()
        calls.append((module, rule_of(module).inputs(module, *args, **kwargs), output))
        return output

    for module in sites:
        module.register_forward_hook(remember, with_kwargs=True)
    out = net(x)
    back = [
        torch.autograd.grad(f.sum(), [y for _, _, y in calls], retain_graph=True, create_graph=create_graph)
        for f in out.unbind(1)
    ]
    found = defaultdict(list)
    for i, (module, inputs, output) in enumerate(calls):
        uses = len(output) // len(x)
        terms = rule_of(module).terms(module, inputs, torch.stack([g[i] for g in back], dim=1))
        for local, p in module._parameters.items():
            if p is not None and local in terms:
                found[names[id(p)]].append(terms[local] if uses == 1 else terms[local].merge(uses))
    return dict(found)


def by_rule(net: nn.Module, x: Tensor, create_graph: bool = False) -> dict[str, Term]:
    """One term per parameter."""
    return {name: combine(terms) for name, terms in uses_by_rule(net, x, create_graph).items()}


def by_autograd(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Jacobian rows of each parameter, (N, OUTPUTS, p), from the network itself, one sample after the other."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    rows = []
    for n in range(len(x)):

        def run(p: dict[str, Tensor], n: int = n) -> Tensor:
            return torch.func.functional_call(net, p, (x[n : n + 1],))[0]

        # One output at a time: some of torch's attention kernels have no rule for several.
        jacobian = torch.func.jacrev(run, chunk_size=1)(params)
        rows.append({name: j.detach().flatten(1) for name, j in jacobian.items()})
    return {name: torch.stack([row[name] for row in rows]) for name in params}


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).detach())


def check(
    net: nn.Module, x: Tensor, names: Iterable[str] | None = None, may_vanish: bool = False
) -> dict[str, Term]:  # fmt: skip
    """The rules' rows of these parameters (of all, if not told) are those of autograd."""
    net = net.eval()
    expected = by_autograd(net, x)
    found = by_rule(net, x)
    assert set(found) == set(expected if names is None else names)
    for name, term in found.items():
        scale = expected[name].abs().max()
        assert scale > 1e-6 or (may_vanish and scale == 0), f"{name}: a vanishing Jacobian tests nothing"
        assert error(term.dense(), expected[name]) < TOLERANCE, name
    return found


def check_layer(
    layer: nn.Module, x: Tensor, arguments: dict[str, object] | None = None, may_vanish: bool = False
) -> dict[str, Term]:  # fmt: skip
    """As :func:`check`, for one layer within a network; names are those of the layer."""
    found = check(Within(perturb(layer), x, **(arguments or {})), x, may_vanish=may_vanish)
    return {name.removeprefix("layer."): term for name, term in found.items()}


def check_gradient(net: nn.Module, x: Tensor) -> None:
    """The dense rows can be differentiated in the inputs, twice."""
    net = net.eval()

    def rows(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(term.dense() for term in by_rule(net, z, create_graph=True).values())

    def energy(z: Tensor) -> Tensor:
        return torch.stack([(r**2).sum() for r in rows(z)]).sum()

    z = x.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(rows, (z,), fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, (z,), fast_mode=True)


def gram(rows: Tensor) -> Tensor:
    """J Jᵀ, input-major."""
    flat = rows.flatten(0, 1)
    return flat @ flat.mT
