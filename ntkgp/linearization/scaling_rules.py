"""Which ATen operation scales how: the tables behind the propagation of degrees.

An operation in none of them is taken for one that does not allow its inputs to be scaled.
"""

from __future__ import annotations

from fractions import Fraction


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The elements of the one tensor input, in another order, shape or memory.
REPLAYABLE = _names(
    "view _unsafe_view _reshape_alias _reshape_copy transpose permute t squeeze unsqueeze alias detach clone contiguous"
)
# … or some of them, or several times, or in another dtype.
SHAPES = REPLAYABLE | _names(
    "expand slice select narrow unbind split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unfold "
    "as_strided lift_fresh lift_fresh_copy _to_copy repeat flip roll diagonal view_as_real view_as_complex real "
    "imag _conj _conj_physical resolve_conj resolve_neg diag_embed tril triu pixel_shuffle pixel_unshuffle "
    "channel_shuffle"
)
# Homogeneous of degree one in the first tensor, for fixed others.
KEEPS = SHAPES | _names(
    "im2col col2im gather index index_select take masked_select sort topk kthvalue median max min amax amin aminmax "
    "sum mean nansum nanmean cumsum cummax cummin trace relu leaky_relu _prelu_kernel abs neg positive avg_pool1d "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d native_dropout std "
    "_unsafe_index _fft_r2c _fft_c2r _fft_c2c"
)
# Those of them that read a second floating-point tensor.
KEEPS_GIVEN = _names("_prelu_kernel grid_sampler_2d grid_sampler_3d")
PRODUCTS = {
    "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "dot": ("self", "tensor"),
    "vdot": ("self", "other"), "matmul": ("self", "other"), "linalg_cross": ("self", "other"),
    "_trilinear": ("i1", "i2", "i3"), "embedding": ("weight",), "_embedding_bag": ("weight", "per_sample_weights"),
    "_embedding_bag_forward_only": ("weight", "per_sample_weights"),
}  # fmt: skip
PRODUCTS_PLUS = {
    "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addbmm": ("batch1", "batch2"), "addmv": ("mat", "vec"),
    "addr": ("vec1", "vec2"),
}  # fmt: skip
# Arguments that end up in one tensor together.
EQUALS = {
    "sub": ("self", "other"), "rsub": ("self", "other"), "cat": ("tensors",), "stack": ("tensors",),
    "maximum": ("self", "other"), "minimum": ("self", "other"), "fmax": ("self", "other"), "fmin": ("self", "other"),
    "where": ("self", "other"), "lerp": ("self", "end"), "scatter": ("self", "src", "value"),
    "scatter_add": ("self", "src"), "index_put": ("self", "values"), "_index_put_impl": ("self", "values"),
    "_unsafe_index_put": ("self", "values"), "index_add": ("self", "source"), "index_copy": ("self", "source"),
    "index_fill": ("self", "value"), "masked_fill": ("self", "value"), "masked_scatter": ("self", "source"),
    "slice_scatter": ("self", "src"), "select_scatter": ("self", "src"), "diagonal_scatter": ("self", "src"),
    "as_strided_scatter": ("self", "src"), "constant_pad_nd": ("self", "value"), "partial_write": ("tensors",),
}  # fmt: skip
POWERS = {
    "square": Fraction(2), "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "reciprocal": Fraction(-1),
    "var": Fraction(2),
}  # fmt: skip
COMPARISONS = _names("eq ne lt le gt ge")
BATCH_NORMS = _names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_with_update_functional "
    "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm"
)
NORMALISERS = BATCH_NORMS | _names("native_layer_norm native_group_norm _fused_rms_norm")
# The name of the argument that the result copies.
FILLS = {
    "copy": "src", "fill": "value", "full": "fill_value", "full_like": "fill_value", "new_full": "fill_value",
    "scalar_tensor": "s",
}  # fmt: skip
ZEROS = _names("zeros zeros_like new_zeros zero")
EMPTY = _names("empty empty_like new_empty empty_strided new_empty_strided empty_permuted")

# Results that do not change with the scale of the inputs, or do not read them.
WITHOUT_DEGREE = _names(
    "sign sgn signbit argmax argmin argsort isnan isinf isfinite logical_not any all nonzero count_nonzero "
    "is_nonzero ones ones_like new_ones rand_like randn_like randint_like rand randn randint randperm arange eye "
    "linspace"
)
NONNEGATIVE = _names(
    "abs relu square exp sigmoid var std linalg_vector_norm norm sqrt rsqrt _softmax _safe_softmax softplus"
)
# Operations that may be given memory which nothing was written to.
WRITES = SHAPES | EMPTY | ZEROS | frozenset(FILLS) | _names("partial_write ones_like new_ones rand_like randn_like")

RULES: dict[str, str] = {
    **dict.fromkeys(KEEPS, "keep"),
    **dict.fromkeys(PRODUCTS_PLUS, "product_plus"),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution", "linear"), "convolution"),
    **dict.fromkeys(NORMALISERS, "normalise"),
    **dict.fromkeys(COMPARISONS, "compare"),
    **dict.fromkeys(FILLS, "fill"),
    **dict.fromkeys(ZEROS, "zeros"),
    **dict.fromkeys(EMPTY, "empty"),
    **dict.fromkeys(("linalg_vector_norm", "norm"), "norm"),
    **dict.fromkeys(("var_mean", "std_mean"), "var_mean"),
    **dict.fromkeys(("addcmul", "addcdiv"), "addcmul"),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), "clamp"),
    "mul": "mul",
    "div": "div",
    "add": "add",
    "pow": "pow",
    "_weight_norm_interface": "weight_norm",
    "unreturned_write": "unseen",
}
