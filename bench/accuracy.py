"""How far Lazulite's logits are from float32 activations on the same weights: KL divergence and top-1 agreement.

    python bench/accuracy.py [-m MODEL] [--text FILE] [--tokens 2000]

The reference is transformers in float32 on the weights that the codes stand for, over the same text. Prefill runs
chunks of 512 tokens, decode one token at a time; both through one plan and a float16 cache.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.models import build, read

CHUNK = 512  # tokens a prefill step


class Logits:
    """One sequence through one plan: called with its next tokens, gives their logits (T, V)."""

    def __init__(self, model, tokens: int):
        pages = -(-tokens // nn.PAGE)
        cache = [nn.LayerCache.empty(pages, heads, dim) for heads, dim, _ in model.cache_spec()]
        axis = mx.Dim("T", CHUNK)
        shapes = {"tokens": (axis,), "positions": (axis,), "slots": (axis,)}
        shapes |= {"starts": (1,), "counts": (1,), "lengths": (1,), "page_table": (1, pages)}
        self.arrays = {name: np.zeros([int(n) for n in shape], np.int32) for name, shape in shapes.items()}
        self.arrays["page_table"][0] = np.arange(pages)
        self.logits = np.zeros((CHUNK, model.config.vocab_size), np.float32)
        inputs = {name: mx.placeholder(shape, mx.int32) for name, shape in shapes.items()}
        layers = [nn.LayerCache(*(mx.placeholder(a.shape, a.dtype) for a in layer if a is not None)) for layer in cache]
        flat = lambda layers: [a for layer in layers for a in layer if a is not None]  # noqa: E731
        context = nn.Context(**{name: a for name, a in inputs.items() if name != "tokens"}, layers=list(layers))
        outputs = [model(inputs["tokens"], context), *flat(context.layers)]
        mx.eval(flat(cache))
        self.run = mx.lower(outputs, [*inputs.values(), *flat(layers)], donate=flat(layers)).load()
        for i, array in enumerate([*self.arrays.values(), *flat(cache)]):
            self.run.set_input(i, array)
        self.run.set_output(0, self.logits)
        self.past = 0

    def __call__(self, tokens: list[int]) -> np.ndarray:
        size = len(tokens)
        self.arrays["tokens"][:size] = tokens
        self.arrays["positions"][:size] = self.arrays["slots"][:size] = np.arange(self.past, self.past + size)
        self.past += size
        self.arrays["counts"][0], self.arrays["lengths"][0] = size, self.past
        self.run.run(T=size)
        return self.logits[:size]


def reference(model, config: dict) -> torch.nn.Module:
    """The model of transformers with the weights that ours stands for, in float32."""
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
            weights[f"{path}.weight"] = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
    weights = dict(model.named_parameters()) | weights
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    tensors = {name: torch.tensor(np.asarray(weights[name])) for name in theirs.state_dict() if name in weights}
    theirs.load_state_dict(tensors, strict=not model.config.tie_word_embeddings)
    return theirs.eval()


def divergence(wanted: torch.Tensor, found: np.ndarray) -> np.ndarray:
    """KL(wanted ‖ found) of each row in nats, and whether the likeliest token is the same: (2, T)."""
    p, q = wanted.double().log_softmax(-1), torch.tensor(found).double().log_softmax(-1)
    return torch.stack([(p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()]).numpy()


def measure(files, ids: list[int]) -> dict[str, float]:
    """Mean KL and top-1 agreement of prefill and of decode."""
    model = build(files)
    with torch.inference_mode():
        wanted = reference(model, files.config)(torch.tensor([ids])).logits[0]
    found = {}
    for name, size in ("prefill", CHUNK), ("decode", 1):
        logits = Logits(model, len(ids))
        starts = range(0, len(ids), size)
        kl, same = np.concatenate([divergence(wanted[i : i + size], logits(ids[i : i + size])) for i in starts], 1)
        found |= {f"{name}_kl": kl.mean(), f"{name}_kl_max": kl.max(), f"{name}_top1": same.mean()}
    return found


def sample_text() -> str:
    """English that every Python has: the manual behind `help()`."""
    from pydoc_data.topics import topics

    return topics["compound"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("--text", help="a file; default: a part of Python's manual")
    parser.add_argument("--tokens", type=int, default=2000)
    options = parser.parse_args()
    files = read(options.model)
    text = Path(options.text).read_text() if options.text else sample_text()
    ids = files.tokenizer().encode(text[: 8 * options.tokens])[: options.tokens]
    print(json.dumps({"model": str(files.path), "tokens": len(ids), **measure(files, ids)}, indent=1))


if __name__ == "__main__":
    main()
