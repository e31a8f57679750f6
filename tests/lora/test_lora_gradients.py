"""The loss and the gradient of every adapter leaf, against torch and PEFT on the same random weights."""
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lazulite import lora
from lazulite.engine import array as mx
from lazulite.engine import optimizers
from lazulite.lora import data
from lazulite.lora.layers import adapted
from lazulite.lora.trainer import Trainer

FAMILIES = {
    "llama": dict(tie_word_embeddings=True), "qwen2": {}, "qwen3": dict(head_dim=32), "mistral": dict(sliding_window=8),
    "gemma2": dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                   final_logit_softcapping=3.0, tie_word_embeddings=True),
    "granite": dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=4.0),
    "olmo2": {},
}


def with_adapter(model, seed: int = 0, **method) -> None:
    """Random A and B: with B = 0 no gradient would reach A."""
    lora.prepare(model, lora.Method(**{"rank": 4, "alpha": 8, **method}))
    rng = np.random.default_rng(seed)
    for _, layer in adapted(model):
        layer.lora_a, layer.lora_b = (mx.array(rng.normal(0, 0.1, x.shape), mx.float32)
                                      for x in (layer.lora_a, layer.lora_b))


def in_peft(base, model):
    """The torch model with the same adapter."""
    leaves = sorted({path.rpartition(".")[2] for path, _ in adapted(model)})
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=leaves, lora_dropout=0.0))
    parameters = dict(theirs.named_parameters())
    for path, layer in adapted(model):
        for side, matrix in ("A", layer.lora_a), ("B", layer.lora_b):
            name = f"base_model.model.{path}.lora_{side}.default.weight"
            parameters[name].data = torch.from_numpy(np.array(matrix).T.copy())
    return theirs


def torch_loss(model, rows: list[data.Row]):
    """The mean over the supervised tokens of all rows, each row run alone."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.from_numpy(row.tokens[None]).long()).logits[0].float()
        targets = torch.from_numpy(row.targets).long()
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        count += row.supervised
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf(family, pairs, rows) -> None:
    folder = pairs.save(family, **FAMILIES[family])
    model = pairs.ours(folder)
    with_adapter(model)
    theirs = in_peft(pairs.theirs(folder), model)
    loss, gradients = Trainer(model, optimizers.SGD(0.0)).gradients(data.pack(rows[:5], [160], 7))
    wanted = torch_loss(theirs, rows[:5])
    wanted.backward()
    assert abs(loss.item() - wanted.item()) < 1e-5 * wanted.item()
    found = dict(theirs.named_parameters())
    assert len(gradients) == 2 * 7 * 3
    for path, gradient in gradients.items():
        layer, _, side = path.rpartition(".lora_")
        expected = found[f"base_model.model.{layer}.lora_{side.upper()}.default.weight"].grad.numpy().T
        error = np.abs(np.asarray(gradient) - expected).max()
        assert error < 1e-4 * np.abs(expected).max(), path
