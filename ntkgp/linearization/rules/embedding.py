"""Tables of which a layer reads rows."""

from __future__ import annotations

from torch import Tensor, nn

from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Lookup, Term


@register_rule(nn.Embedding)
class EmbeddingRule:
    """J_W = Σ_t e_(i_t) ⊗ g_t; the row ``padding_idx`` is not trained."""

    def inputs(self, layer: nn.Embedding, input: Tensor) -> Tensor:
        """The indices."""
        return input

    def terms(self, layer: nn.Embedding, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the dimensions of the indices after the rows."""
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            # The first writes to the table as it reads it; the second's gradient depends on the other rows.
            return {}
        n, k = cotangents.shape[:2]
        indices = inputs.reshape(n, -1).long()
        if layer.padding_idx is not None:
            indices = indices.masked_fill(indices == layer.padding_idx, -1)
        return {"weight": Lookup(indices, cotangents.reshape(n, k, -1, layer.embedding_dim), layer.num_embeddings)}
