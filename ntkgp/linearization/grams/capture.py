"""One forward pass and K backward chains: what each layer saw, and what came back to it."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ntkgp.linearization.frozen import FrozenNetwork
from ntkgp.linearization.grams.moves import may_move
from ntkgp.linearization.rules.registry import Rule, explicit_form, rule_of
from ntkgp.linearization.rules.terms import Term, combine

logger = logging.getLogger("ntkgp")

LAYOUTS = ("first", "second", "minor")

# A place where a node of the graph reads a parameter.
Read = tuple[Any, int]


@dataclass(frozen=True)
class Site:
    """A module that goes by a rule.

    :param key: tells sites apart, the same on every device.
    :param names: the module's parameter name -> its name in the network.
    """

    key: str
    module: nn.Module
    rule: Rule
    names: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """One call of a site: what is kept of the forward pass, and where its output hangs in the graph.

    :param version: of the inputs when they were read.
    :param chained: the inputs depend on parameters, so that backward chains go on through them.
    """

    site: Site
    inputs: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size
    chained: bool
    dtype: torch.dtype
    reads: Mapping[str, set[Read]]


@dataclass
class Record:
    """What a forward pass left behind.

    :param output: f, shape (N, C), with its graph.
    :param reads: where each parameter enters the graph, by name.
    :param structure: tells graphs apart: how often each kind of node occurs, by the shapes of what it returned.
    :param moves_rows: the graph may hold rows in another order inside, by the values of the data.
    :param coarsest: of the dtypes in the graph.
    :param spoiled: parameters of layers that their rules do not describe here.
    """

    output: Tensor
    calls: list[Call] = field(default_factory=list)
    reads: dict[str, set[Read]] = field(default_factory=dict)
    structure: frozenset[Any] = frozenset()
    moves_rows: bool = False
    coarsest: torch.dtype = torch.float64
    spoiled: set[str] = field(default_factory=set)

    def described(self) -> set[str]:
        """Parameters that are read by calls of their sites only."""
        known: dict[str, set[Read]] = defaultdict(set)
        for call in self.calls:
            for name, reads in call.reads.items():
                known[name] |= reads
        return {name for name, reads in known.items() if self.reads.get(name, set()) <= reads} - self.spoiled


class Sites:
    """All modules of a network's private copy that go by rules; some of them written out."""

    def __init__(self, frozen: FrozenNetwork, device: torch.device) -> None:
        self.module = frozen.module(device)
        self._names = {id(p): name for name, p in self.module.named_parameters() if name in frozen.theta}
        self._explicit: list[tuple[nn.Module, nn.Module]] = []
        self.all: list[Site] = []
        for path, module in list(self.module.named_modules()):
            explicit = explicit_form(module)
            if explicit is not None:
                self._explicit.append((module, explicit))
                for inner, part in explicit.named_modules():
                    self._add(f"{path}:{inner}", part)
            else:
                self._add(path, module)

    def _add(self, key: str, module: nn.Module) -> None:
        rule = rule_of(module)
        own = {local: self._names[id(p)] for local, p in module._parameters.items() if id(p) in self._names}
        if rule is not None and own:
            self.all.append(Site(key, module, rule, own))

    @contextmanager
    def recording(self, record: Record, keep_graph: bool) -> Iterator[None]:
        """Hooks on every site while a forward pass runs; a checkpoint's second forward pass comes after it."""

        def remember(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            try:
                inputs = site.rule.inputs(site.module, *args, **kwargs)
                kept = inputs if keep_graph else inputs.detach()
            except Exception as reason:  # rules are open to users
                logger.warning("the rule of %s failed: %r", site.key, reason)
                record.spoiled.update(site.names.values())
                return None
            given = [t.grad_fn for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.grad_fn is not None]
            reads = self._walk(output.grad_fn, given)[0]
            # Writing into a view replaces its place in the graph; into anything else it does not.
            result = output.clone() if output._is_view() else output
            record.calls.append(
                Call(
                    site, kept, inputs._version, get_gradient_edge(result), result.shape,
                    inputs.requires_grad, result.dtype,
                    {name: reads.get(name, set()) for name in site.names.values()},
                )
            )  # fmt: skip
            return result

        handles = [
            site.module.register_forward_hook(
                lambda _module, args, kwargs, output, site=site: remember(site, args, kwargs, output),
                prepend=True,
                with_kwargs=True,
            )
            for site in self.all
        ]
        for module, explicit in self._explicit:
            module.__dict__["forward"] = explicit.forward
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, _ in self._explicit:
                module.__dict__.pop("forward", None)

    def inspect(self, record: Record) -> None:
        """Note where parameters are read in the graph of the output, and what else it consists of."""
        record.reads, nodes = self._walk(record.output.grad_fn, [])
        n = len(record.output)
        kinds = Counter((node.name(), *(tuple(m.shape) for m in node._input_metadata)) for node in nodes)
        record.structure = frozenset([(n, 0), *kinds.items()])
        dtypes = {m.dtype for node in nodes for m in node._input_metadata if m.dtype.is_floating_point}
        record.coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=record.coarsest)
        record.moves_rows = n > 1 and any(may_move(node, n) for node in nodes)

    def _walk(self, root: Any, ends: Sequence[Any]) -> tuple[dict[str, set[Read]], list[Any]]:
        """Reads of parameters in the graph from a node down to other nodes, and the nodes on the way."""
        reads: dict[str, set[Read]] = defaultdict(set)
        seen = {*ends, root}
        nodes: list[Any] = []
        pending = [root] if root is not None and root not in ends else []
        while pending:
            node = pending.pop()
            nodes.append(node)
            for i, (child, _) in enumerate(node.next_functions):
                if child is None:
                    continue
                variable = getattr(child, "variable", None)
                if variable is not None:
                    name = self._names.get(id(variable))
                    if name is not None:
                        reads[name].add((node, i))
                elif child not in seen:
                    seen.add(child)
                    pending.append(child)
        return dict(reads), nodes


def record(frozen: FrozenNetwork, sites: Sites, leaves: Sequence[Tensor], keep_graph: bool) -> Record:
    """Run the network once and remember every call of a site."""
    result = Record(torch.empty(0))
    with sites.recording(result, keep_graph):
        output = frozen.run(sites.module, leaves)
    result.output = output.reshape(leaves[0].shape[0], -1)
    for call in result.calls:
        if call.inputs._version != call.version:  # written to after the layer had read it
            result.spoiled.update(call.site.names.values())
    sites.inspect(result)
    return result


def rows_first(x: Tensor, layout: str, num_rows: int) -> Tensor:
    """Bring the rows to the front: (N·uses, ...), the uses of one sample side by side."""
    if layout == "second":
        return x.transpose(0, 1)
    if layout == "minor":
        return x.unflatten(0, (-1, num_rows)).transpose(0, 1).flatten(0, 1)
    return x


def fits(shape: torch.Size, layout: str, num_rows: int) -> bool:
    """Whether an output of this shape can have its rows there."""
    if layout == "second":
        return len(shape) > 2 and shape[1] == num_rows
    # Dimension 0 may hold several rows of one sample; which of them are neighbours tells the two layouts apart.
    return len(shape) > 1 and shape[0] % num_rows == 0 and (layout == "first" or shape[0] > num_rows)


def pull_back(
    result: Record, calls: Sequence[Call], cotangents: Tensor, *, keep_graph: bool, batched: bool
) -> list[Any]:
    """Derivatives of K combinations of the outputs with respect to each call's output.

    :param cotangents: shape (K, N, C).
    :param batched: run the K chains at once by vmap rather than one by one.
    :return: per call K tensors of the shape of its output, as a list, or as one tensor if batched.
    """
    if not calls:
        return []
    edges = [call.edge for call in calls]
    if batched:
        found = torch.autograd.grad(
            result.output, edges, cotangents, retain_graph=True, is_grads_batched=True, create_graph=keep_graph,
            allow_unused=True,
        )  # fmt: skip
        return [_or_zeros(g, call, len(cotangents)) for g, call in zip(found, calls, strict=True)]
    chains: list[list[Tensor]] = [[] for _ in calls]
    for cotangent in cotangents:
        single = torch.autograd.grad(
            result.output, edges, cotangent, retain_graph=True, create_graph=keep_graph, allow_unused=True
        )
        for chain, gradient, call in zip(chains, single, calls, strict=True):
            chain.append(_or_zeros(gradient, call))
    return [list(chain) for chain in chains]


def _or_zeros(gradient: Tensor | None, call: Call, *leading: int) -> Tensor:
    return call.inputs.new_zeros(*leading, *call.shape, dtype=call.dtype) if gradient is None else gradient


def misplaced(
    result: Record, calls: Sequence[Call], cotangents: Tensor, gradients: list[Any],
    layouts: Mapping[str, str],
) -> set[str]:  # fmt: skip
    """Parameters of calls whose rows are not where the layouts say: one more chain with a weight for every sample.

    What comes back at a row must carry the weight of the row's own sample.

    :param gradients: what the cotangents came back as.
    """
    num_outputs, num_rows = cotangents.shape[:2]
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(num_outputs, generator=generator).to(cotangents)
    weights = torch.randn(num_rows, generator=generator).to(cotangents)
    mixed = torch.einsum("k,n,knc->nc", mixture, weights, cotangents).unsqueeze(0)
    found: set[str] = set()
    for i, (call, (back,)) in enumerate(
        zip(calls, pull_back(result, calls, mixed, keep_graph=False, batched=False), strict=True)
    ):
        layout = layouts.get(call.site.key)
        if layout is None or not fits(call.shape, layout, num_rows) or not call.shape.numel():
            continue
        rows = rows_first(back, layout, num_rows)
        scale = weights.repeat_interleave(len(rows) // num_rows).view(-1, *[1] * (rows.dim() - 1)).to(rows)
        expected = sum(m * g.detach() for m, g in zip(mixture.to(rows), gradients[i], strict=True))
        error = (rows - rows_first(expected, layout, num_rows) * scale).abs().max()
        if not bool(error <= tolerance(result.coarsest) * rows.abs().max()):
            found.update(call.site.names.values())
    return found


def tolerance(dtype: torch.dtype) -> float:
    """Relative error of one pass that is no sign of a mistake."""
    return 1e-8 if dtype == torch.float64 else 1e-3 if dtype == torch.float32 else 5e-2


def terms_of(calls: Sequence[Call], gradients: list[Any], layouts: Mapping[str, str], num_rows: int) -> dict[str, Term]:
    """One term per parameter: rules applied, uses of one sample and of one parameter put together.

    A parameter is left out if one of its calls is not as the layouts say. ``gradients`` is emptied on the way.
    """
    found: dict[str, list[Term]] = defaultdict(list)
    lost: set[str] = set()
    for i, call in enumerate(calls):
        site, layout = call.site, layouts.get(call.site.key)
        if layout is None or not fits(call.shape, layout, num_rows):
            lost.update(site.names.values())
            continue
        gradient = gradients[i]
        if isinstance(gradient, Tensor) and layout == "first":
            back = gradient.transpose(0, 1)
        else:
            back = torch.stack([rows_first(g, layout, num_rows) for g in gradient], dim=1)
        gradients[i] = ()
        uses = back.shape[0] // num_rows
        inputs = rows_first(call.inputs, layout, num_rows)
        try:
            with nullcontext() if back.requires_grad or inputs.requires_grad else torch.no_grad():
                terms = site.rule.terms(site.module, inputs, back)
        except Exception as reason:  # rules are open to users
            logger.warning("the rule of %s failed: %r", site.key, reason)
            terms = {}
        for local, name in site.names.items():
            if local not in terms:
                lost.add(name)
            else:
                found[name].append(terms[local] if uses == 1 else terms[local].merge(uses))
    return {name: combine(terms) for name, terms in found.items() if name not in lost}
