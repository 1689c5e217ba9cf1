"""Layer by layer, how Jacobians factor: one file per kind of layer, and the decorator that adds more."""

from ntkgp.linearization.rules import (  # noqa: F401
    attention,
    batch_norm,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
    transposed_convolution,
)
from ntkgp.linearization.rules.registry import Rule, register_rule, unregister_rule
from ntkgp.linearization.rules.terms import Lookup, Outer, Rows, Summed, Term

__all__ = ["Lookup", "Outer", "Rows", "Rule", "Summed", "Term", "register_rule", "unregister_rule"]
