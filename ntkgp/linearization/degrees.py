"""How every value of a traced forward pass scales when parameters are scaled.

With each parameter i multiplied by k_i > 0, a value of *degree* d is multiplied by Π_i k_i^d_i. Operations map degrees
to degrees (a product adds them, a ReLU keeps them) and demand linear relations between them (a sum needs equal ones,
tanh needs none at all). Together the relations describe every scaling under which the output stays what it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import scaling_rules as names
from ntkgp.linearization.tracing import Node, Ref, Trace

# Exponents by parameter. Keys below zero stand for values that nothing may scale (data, outputs of nonlinear
# functions): they show where an expression divides its own scale out, and drop out of every relation.
Exponents = dict[int, Fraction]


class _Special:
    """A value that has every degree at once."""


FREE = _Special()  # zero or infinite
UNWRITTEN = _Special()  # memory that nothing was written to yet
Degree = Exponents | _Special

SMALL = 1e-3


class UntraceableError(Exception):
    """The output depends on memory whose content the trace did not see being written."""


@dataclass
class Relations:
    """What scaling the parameters must satisfy, and what role each parameter plays.

    ``rows``: Σ_i row[i]·e_i = 0 must hold for exponents e; ``affine``: parameters that act on a normaliser's output;
    ``biases`` and ``ties``: biases, and (bias, weight) pairs of one layer; ``factors``: parameters that multiply
    elementwise; ``last_use``: position of the last operation that reads a parameter.
    """

    rows: list[Exponents] = field(default_factory=list)
    affine: set[int] = field(default_factory=set)
    biases: set[int] = field(default_factory=set)
    ties: list[tuple[int, int]] = field(default_factory=list)
    factors: set[int] = field(default_factory=set)
    last_use: dict[int, int] = field(default_factory=dict)


def propagate(trace: Trace) -> Relations:
    """Relations that hold exactly when the output of ``trace`` is left unchanged."""
    return _Propagation(trace).run()


def _combine(a: Degree, b: Degree, factor: int = 1) -> Degree:
    """Degree of a product (``factor`` 1) or quotient (−1)."""
    if isinstance(a, _Special) or isinstance(b, _Special):
        return FREE
    total = dict(a)
    for key, exponent in b.items():
        total[key] = total.get(key, Fraction(0)) + factor * exponent
    return {key: exponent for key, exponent in total.items() if exponent}


def _power(a: Degree, exponent: float | Fraction) -> Degree:
    """Degree of a power."""
    exponent = Fraction(exponent).limit_denominator(1 << 20)
    if exponent == 0:
        return {}
    return a if isinstance(a, _Special) else {key: exponent * value for key, value in a.items()}


class _Propagation:
    """One pass over the nodes of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.relations = Relations()
        self.degrees: dict[int, Degree] = {}
        self.carried: dict[int, int] = {}  # value -> the parameter of which it is a view or copy
        self.made_by: dict[int, Node] = {}
        self.constants: dict[int, float] = {}
        self.nonnegative: set[int] = set()
        self.normalised: set[int] = set()
        self.on_data: set[int] = set()
        self.consumers: dict[int, list[Node]] = defaultdict(list)
        self._anonymous = 0
        for node in trace.nodes:
            for ref in node.inputs():
                self.consumers[ref.index].append(node)

    def run(self) -> Relations:
        for index, value in enumerate(self.trace.values):
            if value.parameter is not None:
                self.degrees[index] = {value.parameter: Fraction(1)}
                self.carried[index] = value.parameter
            elif value.is_data:
                self._bind_data(index)
        for position, node in enumerate(self.trace.nodes):
            inputs = node.inputs()
            for ref in inputs:
                if ref.index in self.carried:
                    self.relations.last_use[self.carried[ref.index]] = position
            if node.name not in names.WRITES and any(self.degree(ref) is UNWRITTEN for ref in inputs):
                raise UntraceableError
            self._bind(node, self._apply(node))
        self.none([self.trace.output])
        return self.relations

    # ------------------------------------------------------------------------------------------------ bookkeeping

    def _bind_data(self, index: int) -> None:
        value = self.trace.values[index]
        self.on_data.add(index)
        self.degrees[index] = self._fresh() if value.is_floating else {}
        if value.constant is not None and not value.shape:
            self.constants[index] = value.constant
            self.degrees[index] = self.degree(value.constant)

    def _fresh(self) -> Exponents:
        """The degree of a value that nothing may scale."""
        self._anonymous -= 1
        return {self._anonymous: Fraction(1)}

    def _bind(self, node: Node, result: Degree | tuple[Degree, ...]) -> None:
        """Give the outputs of ``node`` their degrees and properties."""
        inputs = node.inputs()
        on_data = any(ref.index in self.on_data for ref in inputs)
        for position, index in enumerate(node.outputs):
            degree = result[position] if isinstance(result, tuple) else result
            self.made_by[index] = node
            if not self.trace.values[index].is_floating:
                if position == 0 and isinstance(degree, dict):
                    self._require(degree)
                degree = {} if isinstance(degree, dict) else degree
            elif degree == {} and on_data:
                degree = self._fresh()
            self.degrees[index] = degree
            if on_data:
                self.on_data.add(index)
            if self._is_nonnegative(node):
                self.nonnegative.add(index)
            if node.name in names.FILLS and not isinstance(node.arguments[names.FILLS[node.name]], Ref):
                self.constants[index] = node.arguments[names.FILLS[node.name]]
            if node.name in names.SHAPES and inputs:
                source = inputs[0].index
                if source in self.carried:
                    self.carried[index] = self.carried[source]
                if source in self.normalised:
                    self.normalised.add(index)
                if source in self.constants:
                    self.constants[index] = self.constants[source]

    def degree(self, item: Any) -> Degree:
        """Degree of a tensor or a number."""
        if isinstance(item, Ref):
            return self.degrees[item.index]
        return FREE if item in (0, math.inf, -math.inf) else {}

    def constant(self, item: Any) -> float | None:
        """A number, or a tensor that holds one."""
        return self.constants.get(item.index) if isinstance(item, Ref) else item

    def _require(self, row: Exponents) -> None:
        row = {key: exponent for key, exponent in row.items() if key >= 0}
        if row:
            self.relations.rows.append(row)

    def none(self, items: Iterable[Any]) -> None:
        """Demand that the items do not scale."""
        for item in items:
            degree = self.degree(item)
            if isinstance(degree, dict):
                self._require(degree)

    def equal(self, degrees: Sequence[Degree]) -> Degree:
        """Demand that all degrees agree, and return the simplest form of it."""
        plain = [degree for degree in degrees if isinstance(degree, dict)]
        if not plain:
            return UNWRITTEN if all(degree is UNWRITTEN for degree in degrees) else FREE
        first = min(plain, key=lambda degree: (sum(key >= 0 for key in degree), len(degree)))
        for other in plain:
            difference = _combine(other, first, -1)
            assert isinstance(difference, dict)
            self._require(difference)
        return first

    def _is_nonnegative(self, node: Node) -> bool:
        arguments = node.arguments
        if node.name in names.NONNEGATIVE:
            return True
        if node.name == "pow":
            exponent = self.constant(arguments["exponent"])
            return exponent is not None and exponent % 2 == 0
        if node.name == "mul" and arguments["self"] == arguments["other"]:
            return True
        if node.name == "clamp_min" or node.name == "clamp":
            minimum = self.constant(arguments["min"])
            return minimum is not None and minimum >= 0
        if node.name in names.SHAPES | {"sum", "mean", "amax", "amin", "add", "mul", "div", "maximum"}:
            operands = [arguments[key] for key in ("self", "other") if key in arguments]
            return all(
                operand.index in self.nonnegative if isinstance(operand, Ref) else operand >= 0 for operand in operands
            )
        return False

    # ------------------------------------------------------------------------------------------------------ rules

    def _apply(self, node: Node) -> Degree | tuple[Degree, ...]:
        """Degree of the outputs of one operation."""
        name, arguments = node.name, node.arguments
        rule = getattr(self, f"_rule_{names.RULES[name]}", None) if name in names.RULES else None
        if rule is not None:
            return rule(node)
        if name in names.PRODUCTS:
            return self._product([arguments[key] for key in names.PRODUCTS[name]], node)
        if name in names.EQUALS and arguments.get("reduce") is None:
            items: list[Any] = []
            for key in names.EQUALS[name]:
                item = arguments.get(key)
                items += item if isinstance(item, list | tuple) else [] if item is None else [item]
            self.none(ref for ref in node.inputs() if ref not in items)
            return self.equal([self.degree(item) for item in items])
        if name in names.POWERS:
            self.none(node.inputs()[1:])
            return _power(self.degree(node.inputs()[0]), names.POWERS[name])
        if name not in names.WITHOUT_DEGREE:
            self.none(node.inputs())
        return {}

    def _product(self, items: Sequence[Any], node: Node) -> Degree:
        self.none(ref for ref in node.inputs() if ref not in items)
        total: Degree = {}
        for item in items:
            total = _combine(total, self.degree(item))
        return total

    def _weights(self, items: Iterable[Any]) -> list[int]:
        """Parameters among the operands of a linear operation."""
        return [self.carried[item.index] for item in items if isinstance(item, Ref) and item.index in self.carried]

    def _with_bias(self, degree: Degree, bias: Ref, output: int, weights: list[int], shape: Sequence[int]) -> Degree:
        """Degree of a linear operation plus bias."""
        parameter = self.carried.get(bias.index)
        if parameter is None:
            return self.equal([degree, self.degree(bias)])
        self.relations.biases.add(parameter)
        self.relations.ties += [(parameter, weight) for weight in weights]
        pattern = torch.arange(math.prod(shape), device="cpu").reshape(tuple(shape))
        if self._is_subtracted(output, pattern.expand(self.trace.values[output].shape).contiguous()):
            return degree
        return self.equal([degree, self.degree(bias)])

    def _is_subtracted(self, index: int, pattern: Tensor) -> bool:
        """Whether only batch normalisation reads a value, with ``pattern`` constant within each of its channels."""
        readers = self.consumers[index]
        for node in readers:
            if node.name in names.BATCH_NORMS and node.arguments["input"] == Ref(index):
                channels = pattern.movedim(1, 0).flatten(1)
                if not torch.equal(channels, channels[:, :1].expand_as(channels)):
                    return False
            elif node.name in names.REPLAYABLE and node.function is not None and len(node.inputs()) == 1:
                moved = node.function(**{**node.arguments, "self": pattern})
                if not self._is_subtracted(node.outputs[0], moved.contiguous()):
                    return False
            else:
                return False
        return bool(readers) and index != self.trace.output.index

    def _divides(self, index: int) -> bool:
        """Whether a value is only ever used below a root or in a denominator."""
        for node in self.consumers[index]:
            if node.name in ("sqrt", "rsqrt", "reciprocal"):
                continue
            if node.name == "pow":
                exponent = self.constant(node.arguments["exponent"])
                if exponent is not None and (exponent < 0 or exponent == 0.5):
                    continue
            if node.name == "div" and node.arguments["other"] == Ref(index) != node.arguments["self"]:
                continue
            if node.name not in names.SHAPES or not self._divides(node.outputs[0]):
                return False
        return bool(self.consumers[index])

    def _rule_keep(self, node: Node) -> Degree:
        first, *others = node.inputs()
        self.none(others)
        if node.name not in names.KEEPS_GIVEN and any(self.trace.values[ref.index].is_floating for ref in others):
            self.none([first])
            return {}
        return self.degree(first)

    def _rule_convolution(self, node: Node) -> Degree:
        data, weight, bias = (node.arguments[key] for key in ("input", "weight", "bias"))
        degree = _combine(self.degree(data), self.degree(weight))
        if bias is None:
            return degree
        shape = self.trace.values[bias.index].shape
        if node.name != "linear":
            shape = torch.Size([*shape, *[1] * (len(self.trace.values[node.outputs[0]].shape) - 2)])
        return self._with_bias(degree, bias, node.outputs[0], self._weights([weight]), shape)

    def _rule_product_plus(self, node: Node) -> Degree:
        items = [node.arguments[key] for key in names.PRODUCTS_PLUS[node.name]]
        degree = _combine(self.degree(items[0]), self.degree(items[1]))
        bias = node.arguments["self"]
        if node.arguments["beta"] == 0:
            return degree
        return self._with_bias(degree, bias, node.outputs[0], self._weights(items), self.trace.values[bias.index].shape)

    def _rule_normalise(self, node: Node) -> tuple[Degree, ...]:
        weight, bias = node.arguments.get("weight"), node.arguments.get("bias")
        self.relations.affine.update(self._weights([weight, bias]))
        self.normalised.add(node.outputs[0])
        scaled: Degree = {} if weight is None else self.degree(weight)
        if bias is not None:
            scaled = self.equal([scaled, self.degree(bias)])
        statistics = self.degree(node.arguments["input"])
        return scaled, statistics, _power(statistics, -1)

    def _rule_mul(self, node: Node) -> Degree:
        a, b = node.arguments["self"], node.arguments["other"]
        result = _combine(self.degree(a), self.degree(b))
        self.relations.factors.update(self._weights([a, b]))
        for value, factor in ((a, b), (b, a)):
            if isinstance(value, Ref) and value.index in self.normalised:
                self.relations.affine.update(self._weights([factor]))
        self._mark_normalised(node, a, b, result)
        return result

    def _rule_div(self, node: Node) -> Degree:
        a, b = node.arguments["self"], node.arguments["other"]
        if node.arguments.get("rounding_mode") is not None:
            self.none(item for item in (a, b) if isinstance(item, Ref))
            return {}
        divisor = self.degree(b)
        result = _combine(self.degree(a), {} if isinstance(divisor, _Special) else divisor, -1)
        self._mark_normalised(node, a, b, result)
        return result

    def _mark_normalised(self, node: Node, a: Any, b: Any, result: Degree) -> None:
        """A product of data in which a scale cancelled, or of a normalised value, is normalised."""
        degrees = [d for d in (self.degree(a), self.degree(b)) if isinstance(d, dict)]
        cancelled = isinstance(result, dict) and any(key not in result for degree in degrees for key in degree)
        refs = [item.index for item in (a, b) if isinstance(item, Ref)]
        on_data = any(index in self.on_data for index in refs)
        if (cancelled and on_data) or any(index in self.normalised for index in refs):
            self.normalised.add(node.outputs[0])

    def _rule_add(self, node: Node) -> Degree:
        a, b = node.arguments["self"], node.arguments["other"]
        for value, shift in ((a, b), (b, a)):
            if not isinstance(value, Ref):
                continue
            eps = self.constant(shift)
            if eps is not None and node.name == "add" and 0 < eps <= SMALL:
                if value.index in self.nonnegative and self._divides(node.outputs[0]):
                    return self.degree(value)
            if isinstance(shift, Ref) and shift.index in self.carried:
                weights = self._weights_behind(value)
                shape = self.trace.values[shift.index].shape
                if weights and len(shape) == 1 and node.name == "add":
                    return self._with_bias(self.degree(value), shift, node.outputs[0], weights, shape)
        return self.equal([self.degree(a), self.degree(b)])

    def _weights_behind(self, value: Ref) -> list[int]:
        """Weight of the plain matrix product of which ``value`` is a view."""
        node = self.made_by.get(value.index)
        while node is not None and node.name in names.REPLAYABLE:
            node = self.made_by.get(node.inputs()[0].index)
        return self._weights(node.inputs()) if node is not None and node.name in ("mm", "bmm", "mv") else []

    def _rule_clamp(self, node: Node) -> Degree:
        value, bounds = node.arguments["self"], [node.arguments.get("min"), node.arguments.get("max")]
        low = self.constant(bounds[0]) if bounds[0] is not None else None
        is_small = low is not None and 0 < low <= SMALL
        if is_small and value.index in self.nonnegative and self._divides(node.outputs[0]):
            bounds[0] = None
        return self.equal([self.degree(value), *(self.degree(bound) for bound in bounds if bound is not None)])

    def _rule_pow(self, node: Node) -> Degree:
        base, exponent = node.arguments["self"], self.constant(node.arguments["exponent"])
        if exponent is None or not isinstance(base, Ref):
            self.none(node.inputs())
            return {}
        return _power(self.degree(base), exponent)

    def _rule_compare(self, node: Node) -> Degree:
        self.equal([self.degree(node.arguments["self"]), self.degree(node.arguments["other"])])
        return {}

    def _rule_norm(self, node: Node) -> Degree:
        order = node.arguments.get("ord", node.arguments.get("p"))
        if order == 0:
            self.none(node.inputs())
            return {}
        return self._rule_keep(node)

    def _rule_var_mean(self, node: Node) -> tuple[Degree, ...]:
        degree = self.degree(node.inputs()[0])
        return (_power(degree, 2) if node.name == "var_mean" else degree), degree

    def _rule_weight_norm(self, node: Node) -> tuple[Degree, ...]:
        return self.degree(node.arguments["g"]), self.degree(node.arguments["v"])

    def _rule_addcmul(self, node: Node) -> Degree:
        base, one, two = (self.degree(node.arguments[key]) for key in ("self", "tensor1", "tensor2"))
        return self.equal([base, _combine(one, two, 1 if node.name == "addcmul" else -1)])

    def _rule_fill(self, node: Node) -> Degree:
        return self.degree(node.arguments[names.FILLS[node.name]])

    def _rule_zeros(self, node: Node) -> Degree:
        return FREE

    def _rule_empty(self, node: Node) -> Degree:
        return UNWRITTEN

    def _rule_unseen(self, node: Node) -> Degree:
        raise UntraceableError
