"""`mx.fast`: fused ops, by MLX's names where MLX has them."""
from .attention import attention_lse, gated_delta_update, rope, rotate, scaled_dot_product_attention
from .experts import experts
from .fused import definition, fused, match, require, simple
from .norms import cross_entropy, layer_norm, rms_norm, softmax, softmax_axes
from .paged import paged_attention, rope_append, sample
from .quantized import dequantize, quantize, quantized_matmul, quantized_take

__all__ = [
    "attention_lse", "cross_entropy", "definition", "dequantize", "experts", "fused", "gated_delta_update",
    "layer_norm", "match", "paged_attention", "quantize", "quantized_matmul", "quantized_take", "require", "rms_norm",
    "rope", "rope_append", "rotate", "sample", "scaled_dot_product_attention", "simple", "softmax", "softmax_axes",
]
