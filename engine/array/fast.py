"""`mx.fast`: fused ops, by MLX's names where MLX has them."""
from .attention import attention_lse, gated_delta_update, rope, rotate, scaled_dot_product_attention
from .experts import experts
from .fused import definition, fused, match, require, simple
from .linear_cross_entropy import linear_cross_entropy
from .norms import cross_entropy, layer_norm, rms_norm, softmax, softmax_axes
from .paged import paged_attention, rope_append, sample
from .quantized import dequantize, precise, qqmm, quantize, quantized_matmul, quantized_take
from .ragged import ragged_attention
from .recurrent import gated_delta, short_conv

__all__ = [
    "attention_lse", "cross_entropy", "definition", "dequantize", "experts", "fused", "gated_delta",
    "gated_delta_update", "layer_norm", "linear_cross_entropy", "match", "paged_attention", "precise", "qqmm",
    "quantize", "quantized_matmul", "quantized_take", "ragged_attention", "require", "rms_norm", "rope",
    "rope_append", "rotate", "sample", "scaled_dot_product_attention", "short_conv", "simple", "softmax",
    "softmax_axes",
]
