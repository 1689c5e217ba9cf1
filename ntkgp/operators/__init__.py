"""Linear operators of the tangent model: matrix-free kernel products and weighted sums of per-group Grams."""

from ntkgp.operators.grouped_gram import GroupedGramOperator
from ntkgp.operators.handle import NetworkHandle
from ntkgp.operators.neural_tangent import NeuralTangentOperator

__all__ = ["GroupedGramOperator", "NetworkHandle", "NeuralTangentOperator"]
