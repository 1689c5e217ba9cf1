"""Which rule a module goes by: registered by type, by one decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ntkgp.linearization.rules.terms import Term


class Rule(Protocol):
    r"""How a layer's Jacobian factors into what it saw and what came back.

    A rule sees rows that do not depend on one another: the engine has moved the batch to the front, and puts together
    what several rows of one sample, or several uses of one layer, contribute.
    """

    def inputs(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What is kept of a call ``layer(*args, **kwargs)``: one tensor with the rows where the output has them."""
        ...

    def terms(self, layer: Any, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """The Jacobian of the layer's own parameters.

        :param inputs: what :meth:`inputs` returned, rows first: shape (R, ...).
        :param cotangents: derivatives of K outputs with respect to the layer's output, shape (R, K, *output event).
        :return: one term per parameter name of the layer, e.g. ``{"weight": ..., "bias": ...}``; a parameter that is
            left out is computed by the fallback.
        """
        ...


R = TypeVar("R")
_RULES: dict[type[nn.Module], Rule] = {}
_EXPLICIT: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def register_rule(*types: type[nn.Module]) -> Callable[[type[R]], type[R]]:
    """Class decorator: an instance of the class is the :class:`Rule` of these module types.

    A subclass of a registered type goes by the rule as long as it does not define its own ``forward``. A rule that is
    wrong for a network is noticed when the network is first differentiated, and the fallback is used, with a warning.

    :raises TypeError: a type that is no ``torch.nn.Module``.

    >>> import torch
    >>> from ntkgp.linearization.rules import Rows, register_rule, unregister_rule
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(width))
    ...     def forward(self, x):
    ...         return x * self.weight
    >>> @register_rule(Scale)
    ... class ScaleRule:
    ...     def inputs(self, layer, x):
    ...         return x
    ...     def terms(self, layer, inputs, cotangents):
    ...         return {"weight": Rows(cotangents * inputs.unsqueeze(1))}
    >>> unregister_rule(Scale)
    """

    def decorate(rule: type[R]) -> type[R]:
        for module_type in types:
            if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
                raise TypeError(f"types: expected subclasses of torch.nn.Module, got {module_type!r}")
            _RULES[module_type] = rule()  # type: ignore[assignment]
        return rule

    return decorate


def unregister_rule(*types: type[nn.Module]) -> None:
    """Forget the rules of these module types; unknown ones are passed over."""
    for module_type in types:
        _RULES.pop(module_type, None)


def register_explicit(module_type: type[nn.Module]) -> Callable[[R], R]:
    """Decorator: a function that rewrites a module of this type with submodules that have rules, sharing parameters."""

    def decorate(build: R) -> R:
        _EXPLICIT[module_type] = build  # type: ignore[assignment]
        return build

    return decorate


def _lookup(table: dict[type[nn.Module], Any], module: nn.Module) -> Any:
    for ancestor in type(module).__mro__:
        if ancestor in table:
            unchanged = type(module).forward is ancestor.forward and "forward" not in module.__dict__
            return table[ancestor] if unchanged else None
    return None


def rule_of(module: nn.Module) -> Rule | None:
    """The rule that this module goes by."""
    return _lookup(_RULES, module)


def explicit_form(module: nn.Module) -> nn.Module | None:
    """The module written out with submodules that have rules, if it must be."""
    build = _lookup(_EXPLICIT, module)
    return None if build is None else build(module)
