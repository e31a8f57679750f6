"""The parts that decoder models share. What differs between families is a config field or an argument here.

x is (T, C): the tokens of a step, of any number of sequences, one after another.
"""
from __future__ import annotations

import math
import re

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError
from .config import Config
from .rope import rope

ACTIVATIONS = {"silu": nn.silu, "gelu": nn.gelu, "gelu_pytorch_tanh": nn.gelu_approx, "gelu_new": nn.gelu_approx}


class Attention(nn.Module):
    """Grouped-query attention over pages; `layer` is its place in the context's caches."""

    def __init__(self, config: Config, layer: int, rope: nn.Rope, *, window: int = 0, softcap: float = 0.0,
                 qk_norm: bool = False):
        channels, heads, kv_heads, dim = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.layer, self.head_dim, self.window, self.softcap = layer, dim, window, softcap
        self.scale, self.eps, self._rope = dim**-0.5, config.rms_norm_eps, rope
        self.q_proj = nn.Linear(channels, heads * dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(channels, kv_heads * dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(channels, kv_heads * dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * dim, channels, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim, config.rms_norm_eps) if qk_norm else None

    def __call__(self, x: mx.Array, context: nn.Context) -> mx.Array:
        tokens = x.shape[0]
        q, k, v = (p(x).reshape(tokens, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        y = nn.attend(q, k, v, context, self.layer, self._rope, scale=self.scale, window=self.window,
                      softcap=self.softcap, q_norm=q_norm, k_norm=k_norm, eps=self.eps)
        return self.o_proj(y.reshape(tokens, -1))


class MLP(nn.Module):
    """down(act(gate(x)) · up(x))"""

    def __init__(self, config: Config):
        channels, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"[config] hidden_act is {config.hidden_act!r}, wanted one of {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(channels, hidden, bias=bias)
        self.up_proj = nn.Linear(channels, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, channels, bias=bias)

    def __call__(self, x: mx.Array) -> mx.Array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: Config, self_attn: nn.Module, mlp: nn.Module):
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.Array, context: nn.Context) -> mx.Array:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """What checkpoints keep under `model.`: the embedding, the layers, the last norm."""

    def __init__(self, config: Config, layers: list[nn.Module]):
        self.embed_tokens: nn.Embedding | nn.QuantizedEmbedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Token ids to logits. A family overrides what differs: `config_class`, `window`, `block`, `sanitize`."""

    config_class: type[Config] = Config

    def __init__(self, config: Config):
        self.config, self._rope = config, rope(config)
        self.model = Trunk(config, [self.block(i) for i in range(config.num_hidden_layers)])
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = None if config.tie_word_embeddings else head

    def window(self, layer: int) -> int:
        """Tokens that a layer looks back, 0 for all."""
        sliding = self.config.layer_types and self.config.layer_types[layer] == "sliding_attention"
        return self.config.sliding_window if sliding else 0

    def block(self, layer: int) -> nn.Module:
        attention = Attention(self.config, layer, self._rope, window=self.window(layer))
        return Block(self.config, attention, MLP(self.config))

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        """Checkpoint names and values to this tree's: what old checkpoints hold beyond it is left out."""
        beyond = re.compile(r".*rotary_emb\.inv_freq" + (r"|lm_head\..*" if self.lm_head is None else ""))
        return {name: weight for name, weight in weights.items() if not beyond.fullmatch(name)}

    def cache_spec(self) -> list[tuple[int, int, int]]:
        """(kv_heads, head_dim, window) of each layer."""
        shape = self.config.num_key_value_heads, self.config.head_dim
        return [(*shape, self.window(i)) for i in range(self.config.num_hidden_layers)]

    def __call__(self, tokens: mx.Array, context: nn.Context | None = None, rows: mx.Array | None = None) -> mx.Array:
        """tokens (T) int32 to logits (T, V) float32, or (R, V) for the chosen rows (R).

        Without a context the tokens are one sequence from its start, and nothing is kept.
        """
        context = context or self._alone(tokens.shape[0])
        x = self.model.embed_tokens(tokens).astype(mx.float32)
        for layer in self.model.layers:
            x = layer(x, context)
        x = self.model.norm(x if rows is None else mx.take(x, rows, axis=0))
        return self.model.embed_tokens.as_linear(x) if self.lm_head is None else self.lm_head(x)

    def _alone(self, tokens: int) -> nn.Context:
        pages = math.ceil(tokens / nn.PAGE)
        layers = [nn.LayerCache.empty(pages, heads, dim) for heads, dim, _ in self.cache_spec()]
        return nn.Context.single(tokens, layers)
