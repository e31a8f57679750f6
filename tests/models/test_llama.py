"""Config, rotary table, tree and errors of the Llama family; several sequences in one step."""
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.models import build
from lazulite.models.config import Config
from lazulite.models.load import available_memory, family
from lazulite.models.rope import rope
from lazulite.models.weights import Weights

TINY = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2)


def weights(seed: int = 0, **config) -> Weights:
    """What `read` gives, of a random model."""
    raw = {**TINY, **config}
    model = family(raw["model_type"])(Config.from_dict(raw))
    random = np.random.default_rng(seed)
    draw = lambda shape: mx.array((0.3 * random.standard_normal(shape)).astype(np.float32))  # noqa: E731
    tensors = {name: draw(w.shape) for name, w in model.named_parameters()}
    return Weights(Path("tiny"), raw, {}, [lambda: tensors], 0, lambda: None)


def tokens(n: int, seed: int = 0) -> mx.Array:
    return mx.array(np.random.default_rng(seed).integers(0, TINY["vocab_size"], n).astype(np.int32))


def test_config_reads_old_and_new_spellings() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    old = Config.from_dict({**TINY, "rope_theta": 5e5, "rope_scaling": scaling, "eos_token_id": 7})
    new = Config.from_dict({**TINY, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}})
    assert (old.rope_parameters["rope_type"], old.rope_parameters["rope_theta"]) == ("linear", 5e5)
    assert np.array_equal(np.asarray(rope(old).inv_freq), np.asarray(rope(new).inv_freq))
    assert (old.eos_token_id, new.eos_token_id, old.head_dim) == ([7], [], 8)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1, wanted a whole number above 0"),
    ({"vocab_size": "64"}, "vocab_size is '64'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, wanted a divisor of num_attention_heads = 4"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"hidden_act": "swish7"}, "hidden_act is 'swish7', wanted one of silu"),
    ({"rope_scaling": {"type": "spiral"}}, "rope_type 'spiral' is not known; known are default"),
    ({"rope_scaling": {"type": "llama3"}}, "rope_type 'llama3' needs 'low_freq_factor'"),
    ({"model_type": "mistrel"}, "'mistrel' is not supported, the nearest that is: 'mistral'\nsupported: cohere2, g"),
])
def test_bad_config(change: dict, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        build(Weights(Path("tiny"), {**TINY, **change}, {}, [], 0, lambda: None))


@pytest.mark.parametrize("parameters", [
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=8192),
], ids=lambda p: p["rope_type"])
def test_rope(parameters: dict) -> None:
    raw = {**TINY, "head_dim": 128, "rope_parameters": {"rope_theta": 5e5, **parameters}}
    ours = rope(Config.from_dict(raw))
    theirs, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](AutoConfig.for_model(**raw), "cpu")
    assert ours.scale == scale
    np.testing.assert_allclose(np.asarray(ours.inv_freq), theirs.numpy(), rtol=3e-6)


def test_names_are_the_checkpoints() -> None:
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, attention_bias=True, mlp_bias=True))
    ours = weights(attention_bias=True, mlp_bias=True).tensors
    wanted = {name: tuple(w.shape) for name, w in theirs.state_dict().items()}
    assert {name: w.shape for name, w in ours.items()} == wanted


def test_what_old_checkpoints_carry_is_left_out() -> None:
    tied = weights(tie_word_embeddings=True)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tied.tensors |= {"lm_head.weight": mx.zeros((64, 32)), table: mx.zeros((4,))}
    assert build(tied).lm_head is None


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
    (lambda t: t.update({"model.extra": mx.zeros((1,))}), "1 unexpected: model.extra"),
    (lambda t: t.update({"lm_head.weight": mx.zeros((64, 33))}), r"lm_head.weight \(64, 33\), wanted \(64, 32\)"),
    (lambda t: t.update({f"lm_head.{x}": mx.zeros((64, 1)) for x in ("scales", "biases")}), "lm_head has 32 bits"),
    (lambda t: t.update({"lm_head.scales": mx.zeros((64, 1))}), "without biases"),
])
def test_weights_that_do_not_fit(change, message: str) -> None:
    w = weights()
    change(w.tensors)
    with pytest.raises((UserError, ValueError), match=message):
        build(w)


def test_memory_is_foreseen() -> None:
    w = weights()
    w.nbytes, w.parts = available_memory() * 2, []
    with pytest.raises(UserError, match=r"tiny: weights and a cache of 2048 tokens take .* GB of memory, .* GB are"):
        build(w)


def test_sequences_in_one_step_do_not_see_one_another() -> None:
    model, counts, pages = build(weights()), [5, 40, 1], [[2], [4, 0], [3]]
    starts = np.cumsum([0, *counts[:-1]])
    alone = [np.asarray(model(tokens(n, seed=n))) for n in counts]
    rows = [(position, row[position // nn.PAGE] * nn.PAGE + position % nn.PAGE)
            for n, row in zip(counts, pages, strict=True) for position in range(n)]
    ints = lambda values: mx.array(np.array(values, dtype=np.int32))  # noqa: E731
    context = nn.Context(
        positions=ints([p for p, _ in rows]), slots=ints([s for _, s in rows]), starts=ints(starts),
        counts=ints(counts), lengths=ints(counts), page_table=ints([[2, 0], [4, 0], [3, 0]]),
        layers=[nn.LayerCache.empty(6, heads, dim) for heads, dim, _ in model.cache_spec()],
    )
    flat = mx.array(np.concatenate([np.asarray(tokens(n, seed=n)) for n in counts]))
    last = ints([start + n - 1 for start, n in zip(starts, counts, strict=True)])
    together = np.asarray(model(flat, context, rows=last))
    np.testing.assert_allclose(together, [logits[-1] for logits in alone], atol=0.02 * np.abs(together).max())




@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_six_steps(bias: bool) -> None:
    model = build(weights(attention_bias=bias, mlp_bias=bias))
    t, b, r = mx.Dim("T", 64), mx.Dim("B", 4), mx.Dim("R", 4)
    shapes = {"positions": (t,), "slots": (t,), "starts": (b,), "counts": (b,), "lengths": (b,), "page_table": (b, 2)}
    inputs = {name: mx.placeholder(shape, mx.int32) for name, shape in shapes.items()}
    layers = [nn.LayerCache(*(mx.placeholder(a.shape, a.dtype) for a in nn.LayerCache.empty(8, heads, dim)[:2]))
              for heads, dim, _ in model.cache_spec()]
    context = nn.Context(**inputs, layers=list(layers))
    tokens, rows = (mx.placeholder((d,), mx.int32) for d in (t, r))
    pages = [a for cache in layers for a in cache[:2]]
    outputs = [model(tokens, context, rows), *(a for cache in context.layers for a in cache[:2])]
    plan = mx.lower(outputs, [tokens, rows, *inputs.values(), *pages], donate=pages)
    layer = ["linear", "rope_append", "paged_attention", "linear", "linear", "linear"]
    assert [step.kernel for step in plan.steps] == ["take", *layer * 2, "take", "linear"]
