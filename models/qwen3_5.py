"""Qwen 3.5: three layers of four are gated delta nets, which keep states instead of pages; attention has a gate."""
import re
from dataclasses import dataclass
from typing import Any

from ..engine import array as mx
from ..engine import nn
from .blocks import Attention, Block, Decoder, OffsetNorm
from .config import Config


@dataclass
class Qwen3_5Config(Config):
    head_dim: int = 256
    partial_rotary_factor: float = 0.25
    full_attention_interval: int = 4
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    def __post_init__(self) -> None:
        if not self.layer_types:
            full = [(i + 1) % self.full_attention_interval == 0 for i in range(self.num_hidden_layers)]
            self.layer_types = ["full_attention" if f else "linear_attention" for f in full]
        super().__post_init__()
        shared = self.linear_num_value_heads % max(1, self.linear_num_key_heads) == 0
        self._need("linear_num_key_heads", shared, f"a divisor of linear_num_value_heads {self.linear_num_value_heads}")


    def states(self) -> nn.StateSpec:
        """Of a delta net: the last inputs of its convolution, a matrix for each head."""
        heads, keys, values = self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim
        channels = 2 * self.linear_num_key_heads * keys + heads * values
        return nn.StateSpec(((self.linear_conv_kernel_dim - 1, channels), (heads, keys, values)))


class GatedAttention(Attention):
    """Half of q_proj's heads are gates, one after each head of q."""

    def __init__(self, config: Config, *arguments: Any, **options: Any):
        super().__init__(config, *arguments, **options)
        self.q_proj = nn.Linear(config.hidden_size, 2 * self.o_proj.weight.shape[1], bias=config.attention_bias)

    def attend(self, q: mx.Array, *arguments: Any, **options: Any) -> mx.Array:
        return super().attend(q[:, ::2], *arguments, **options) * mx.sigmoid(q[:, 1::2])


class ShortConv(nn.Module):
    def __init__(self, channels: int, width: int):
        self.weight = mx.zeros((channels, 1, width))


class DeltaNet(nn.Module):
    """The gated delta rule (arXiv:2412.06464) on q, k and v that a short convolution has mixed along the sequence."""

    def __init__(self, config: Qwen3_5Config, layer: int):
        c, self.layer, self._spec = config, layer, config.states()
        self.key_heads, self.key_dim = c.linear_num_key_heads, c.linear_key_head_dim
        self.heads, self.dim = c.linear_num_value_heads, c.linear_value_head_dim
        (_, channels), _ = self._spec.shapes
        values = self.heads * self.dim
        self.in_proj_qkv = nn.Linear(c.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(c.hidden_size, values, bias=False)
        self.in_proj_b, self.in_proj_a = (nn.Linear(c.hidden_size, self.heads, bias=False) for _ in "ba")
        self.conv1d = ShortConv(channels, c.linear_conv_kernel_dim)
        self.dt_bias, self.A_log = mx.ones((self.heads,)), mx.zeros((self.heads,))
        self.norm = nn.RMSNorm(self.dim, c.rms_norm_eps)
        self.out_proj = nn.Linear(values, c.hidden_size, bias=False)

    def __call__(self, x: mx.Array, context: nn.Context) -> mx.Array:
        (conv, state), sequences = context.recurrent(self.layer, self._spec)
        weight = mx.squeeze(self.conv1d.weight, 1).astype(mx.float32)
        mixed, conv = mx.fast.short_conv(self.in_proj_qkv(x), weight, conv, *sequences)
        keys = self.key_heads * self.key_dim
        q, k, v = (part.reshape(x.shape[0], -1, dim) for part, dim in zip(
            mx.split(mixed, (keys, 2 * keys), axis=1), (self.key_dim, self.key_dim, self.dim), strict=True))
        decay = -mx.exp(self.A_log.astype(mx.float32)) * nn.softplus(self.in_proj_a(x) + self.dt_bias)
        y, state = mx.fast.gated_delta(q, k, v, decay, mx.sigmoid(self.in_proj_b(x)), state, *sequences,
                                       scale=self.key_dim**-0.5)
        context.keep(self.layer, conv, state)
        y = self.norm(y).reshape(x.shape[0], -1) * nn.silu(self.in_proj_z(x))
        return self.out_proj(y)


class Model(Decoder):
    config_class: type[Config] = Qwen3_5Config
    config: Qwen3_5Config
    norm = OffsetNorm
    qk_norm = True

    def attention(self, layer: int, **options: Any) -> nn.Module:
        if self.kind(layer) == "linear_attention":
            return DeltaNet(self.config, layer)
        return GatedAttention(self.config, layer, self._ropes[self.kind(layer)], norm=self.norm)

    def block(self, layer: int) -> nn.Module:
        path = "linear_attn" if self.kind(layer) == "linear_attention" else "self_attn"
        return Block(self.config, self.attention(layer), self.mlp(layer), norm=self.norm, path=path)

    def cache_spec(self) -> list[nn.PageSpec | nn.StateSpec]:
        specs = super().cache_spec()
        return [self.config.states() if self.kind(i) == "linear_attention" else specs[i] for i in range(len(specs))]

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        """MLX's folders have the convolution's axes swapped and 1 added to the norms about 1."""
        weights = {name: w for name, w in super().sanitize(weights).items() if not name.startswith("mtp.")}
        swapped = {name for name, w in weights.items() if name.endswith("conv1d.weight") and w.shape[-1] == 1}
        offset = re.compile(r".*(layernorm|[qk]_norm|model\.norm)\.weight" if swapped else "")
        return {name: mx.swapaxes(w, 1, 2) if name in swapped else w.astype(mx.float32) - 1 if offset.fullmatch(name)
                else w for name, w in weights.items()}
