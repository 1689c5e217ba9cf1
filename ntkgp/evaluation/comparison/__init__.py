"""Methods side by side: one call, one table."""

from ntkgp.evaluation.comparison.compare import compare
from ntkgp.evaluation.comparison.methods import Method, method_names
from ntkgp.evaluation.comparison.results import Comparison, Row
from ntkgp.evaluation.comparison.tables import Table

__all__ = ["Comparison", "Method", "Row", "Table", "compare", "method_names"]
