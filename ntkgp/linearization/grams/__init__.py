"""Per-group Gram blocks K_g = J_g J_gᵀ, layer by layer and without the Jacobian."""

from ntkgp.linearization.grams.factors import Factors

__all__ = ["Factors"]
