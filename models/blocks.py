"""The parts that decoder models share. What differs between families is a config field or an argument here.

x is (T, C): the tokens of a step, of any number of sequences, one after another.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError
from .config import Config
from .rope import rope

Norm = Callable[[int, float], Any]     # (channels, eps) to a module
ACTIVATIONS = {"silu": nn.silu, "gelu": nn.gelu, "gelu_pytorch_tanh": nn.gelu_approx, "gelu_new": nn.gelu_approx}


class OffsetNorm(nn.RMSNorm):
    """Gemma keeps a norm's weight as its distance from 1."""

    @property
    def scale(self) -> mx.Array:
        return 1.0 + self.weight.astype(mx.float32)  # near 1 a bfloat16 has few digits

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.fast.rms_norm(x, self.scale, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over pages; `layer` is its place in the context's caches. norm: of heads' q and k."""

    def __init__(self, config: Config, layer: int, rope: nn.Rope, *, window: int = 0, softcap: float = 0.0,
                 scale: float = 0.0, out_bias: bool | None = None, norm: Norm | None = None):
        channels, heads, kv_heads, dim = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.layer, self.head_dim, self.window, self.softcap = layer, dim, window, softcap
        self.scale, self.eps, self._rope = scale or dim**-0.5, config.rms_norm_eps, rope
        self.q_proj = nn.Linear(channels, heads * dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(channels, kv_heads * dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(channels, kv_heads * dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * dim, channels, bias=config.attention_bias if out_bias is None else out_bias)
        self.q_norm, self.k_norm = (norm(dim, config.rms_norm_eps) if norm else None for _ in "qk")

    def qkv(self, x: mx.Array) -> tuple[mx.Array, mx.Array, mx.Array]:
        """(T, C) to q (T, H, D), k and v (T, K, D)"""
        q, k, v = (p(x).reshape(x.shape[0], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def norms(self) -> list[mx.Array | None]:
        """The weights by which each head's q and k are normed."""
        weights = [None if n is None else n.scale if isinstance(n, OffsetNorm) else n.weight
                   for n in (self.q_norm, self.k_norm)]
        return [None if weight is None else weight.astype(mx.float32) for weight in weights]

    def attend(self, q: mx.Array, k: mx.Array, v: mx.Array, context: nn.Context, **options: Any) -> mx.Array:
        q_norm, k_norm = self.norms()
        return nn.attend(q, k, v, context, self.layer, self._rope, scale=self.scale, window=self.window,
                         softcap=self.softcap, q_norm=q_norm, k_norm=k_norm, eps=self.eps, **options)

    def __call__(self, x: mx.Array, context: nn.Context) -> mx.Array:
        return self.o_proj(self.attend(*self.qkv(x), context).reshape(x.shape[0], -1))


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


# Where a block has norms, and what checkpoints call them: before and after attention, before and after the MLP.
Norms = tuple[str, str, str, str]
BEFORE: Norms = ("input_layernorm", "", "post_attention_layernorm", "")
AFTER: Norms = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
AROUND: Norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                 "post_feedforward_layernorm")


class Block(nn.Module):
    """Attention, or what takes its place, and MLP, each with its norms, beside a residual. path: attention's name."""

    def __init__(self, config: Config, attention: nn.Module, mlp: nn.Module, *, norms: Norms = BEFORE,
                 norm: Norm = nn.RMSNorm, residual: float = 1.0, path: str = "self_attn"):
        self.mlp, self._norms, self.residual, self._path = mlp, norms, residual, path
        setattr(self, path, attention)
        for name in filter(None, norms):
            setattr(self, name, norm(config.hidden_size, config.rms_norm_eps))

    def __call__(self, x: mx.Array, context: nn.Context, lean: bool = False) -> mx.Array:
        """lean: what is between the MLP's input and its result is computed again for a gradient."""
        before, after, before_mlp, after_mlp = (getattr(self, name) if name else _same for name in self._norms)
        x = x + self._scaled(after(getattr(self, self._path)(before(x), context)))
        feed = lambda x: self._scaled(after_mlp(self.mlp(before_mlp(x))))  # noqa: E731
        return x + (mx.checkpoint(feed) if lean else feed)(x)

    def _scaled(self, x: mx.Array) -> mx.Array:
        return x if self.residual == 1.0 else x * self.residual


def _same(x: mx.Array) -> mx.Array:
    return x


class Trunk(nn.Module):
    """What checkpoints keep under `model.`: the embedding, the layers, the last norm."""

    def __init__(self, config: Config, layers: list[nn.Module], norm: nn.Module):
        self.embed_tokens: nn.Embedding | nn.QuantizedEmbedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers, self.norm = layers, norm


class Decoder(nn.Module):
    """Token ids to logits. A family overrides what differs: the class's fields and methods down to `sanitize`."""

    config_class: type[Config] = Config
    norms: Norms = BEFORE
    norm: Norm = nn.RMSNorm
    qk_norm = False
    softcap = 0.0                    # of the logits
    checkpointed = 0                 # so many MLPs are computed again for a gradient; beyond all of them, whole blocks

    def __init__(self, config: Config):
        self.config = config
        self._ropes = {kind: self.rope(kind) for kind in set(config.layer_types) or {""}}
        blocks: list[nn.Module] = [self.block(i) for i in range(config.num_hidden_layers)]
        self.model = Trunk(config, blocks, self.norm(config.hidden_size, config.rms_norm_eps))
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = None if config.tie_word_embeddings else head

    def rope(self, layer_type: str) -> nn.Rope:
        """The rotary table of layers of this kind."""
        return rope(self.config, layer_type)

    def kind(self, layer: int) -> str:
        return self.config.layer_types[layer] if self.config.layer_types else ""

    def window(self, layer: int) -> int:
        """Tokens that a layer looks back, 0 for all."""
        return self.config.sliding_window if self.kind(layer).endswith("sliding_attention") else 0

    def attention(self, layer: int, **options: Any) -> nn.Module:
        return Attention(self.config, layer, self._ropes[self.kind(layer)], window=self.window(layer),
                         norm=self.norm if self.qk_norm else None, **options)

    def mlp(self, layer: int) -> nn.Module:
        return MLP(self.config)

    def block(self, layer: int) -> nn.Module:
        return Block(self.config, self.attention(layer), self.mlp(layer), norms=self.norms, norm=self.norm)

    def embed(self, tokens: mx.Array, context: nn.Context) -> mx.Array:
        return self.model.embed_tokens(tokens).astype(mx.float32)

    @property
    def logit_scale(self) -> float:
        return 1.0

    def head(self, x: mx.Array) -> mx.Array:
        logits = self.model.embed_tokens.as_linear(x) if self.lm_head is None else self.lm_head(x)
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        """Checkpoint names and values to this tree's: what old checkpoints hold beyond it is left out."""
        beyond = re.compile(r".*rotary_emb\.inv_freq" + (r"|lm_head\..*" if self.lm_head is None else ""))
        return {name: weight for name, weight in weights.items() if not beyond.fullmatch(name)}

    @classmethod
    def as_mlx(cls, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        """Checkpoint tensors as MLX's folders have them, where Hugging Face's matrices do not have a row an output."""
        return weights

    def cache_spec(self) -> list[nn.PageSpec | nn.StateSpec]:
        """What each layer keeps of a sequence."""
        shape = self.config.num_key_value_heads, self.config.head_dim
        return [nn.PageSpec(*shape, self.window(i)) for i in range(self.config.num_hidden_layers)]

    def __call__(self, tokens: mx.Array, context: nn.Context | None = None, rows: mx.Array | None = None) -> mx.Array:
        """tokens (T) int32 to logits (T, V) float32, or (R, V) for the chosen rows (R).

        Without a context the tokens are one sequence from its start, and nothing is kept.
        """
        x = self.hidden(tokens, context or self._alone(tokens.shape[0]))
        x = self.model.norm(x if rows is None else mx.take(x, rows, axis=0))
        logits = self.head(x)
        return mx.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def hidden(self, tokens: mx.Array, context: nn.Context) -> mx.Array:
        """tokens (T) to what the last block returns (T, C)."""
        x = self.embed(tokens, context)
        whole = self.checkpointed - len(self.model.layers)
        for i, layer in enumerate(self.model.layers):
            block = partial(layer, context=context, lean=max(0, whole) <= i < self.checkpointed)
            x = mx.checkpoint(block)(x) if i < whole else block(x)
        return x

    def loss(self, tokens: mx.Array, targets: mx.Array, context: nn.Context) -> mx.Array:
        """-log p(targets) in float32 for each of the tokens (T), 0 where the target is -1."""
        x = self.model.norm(self.hidden(tokens, context))
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        x = x if self.logit_scale == 1.0 else x * self.logit_scale
        return nn.losses.linear_cross_entropy(head, x, targets, self.softcap)

    def _alone(self, tokens: int) -> nn.Context:
        return nn.Context.single(tokens, nn.caches(self.cache_spec(), math.ceil(tokens / nn.PAGE)))
