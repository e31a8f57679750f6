"""The default model learns as torch and PEFT do in float32: the same first A and B, rows, optimizer, losses."""
from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch
from peft import LoraConfig, get_peft_model

from lazulite import lora
from lazulite.engine import optimizers
from lazulite.lora import data
from lazulite.lora.layers import adapted
from lazulite.lora.trainer import Trainer
from lazulite.models import load

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
RATE, BATCH = 2e-4, 4


def reference(ours, batches: list[list[data.Row]]) -> list[float]:
    """torch's losses, padded batches of the same rows, from the adapter of our model."""
    paths = [path for path, _ in adapted(ours)]
    model = get_peft_model(smollm2.in_torch(), LoraConfig(r=8, lora_alpha=16, target_modules=paths, lora_dropout=0.0))
    parameters = dict(model.named_parameters())
    for path, layer in adapted(ours):
        for side, matrix in ("A", layer.lora_a), ("B", layer.lora_b):
            name = f"base_model.model.{path}.lora_{side}.default.weight"
            parameters[name].data = torch.from_numpy(np.array(matrix).T.copy())
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.01), []
    for rows in batches:
        longest = max(len(row.tokens) for row in rows)
        tokens, targets = (torch.full((len(rows), longest), fill) for fill in (0, -100))
        for i, row in enumerate(rows):
            tokens[i, :len(row.tokens)] = torch.from_numpy(row.tokens)
            targets[i, :len(row.tokens)] = torch.from_numpy(row.targets)
        seen = (torch.arange(longest) < torch.tensor([[len(row.tokens)] for row in rows])).long()
        logits = model(tokens, attention_mask=seen).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("steps", "layers"), [(2, "1"), pytest.param(20, "all", marks=pytest.mark.slow)])
def test_losses(steps: int, layers: str) -> None:
    model, tokenizer = load()
    lora.prepare(model, lora.Method(rank=8, alpha=16, layers=layers))
    encoder = data.Encoder(tokenizer, 2048)
    rows = encoder.rows(data.samples(DATA / "wikisql_train.jsonl")[:steps * BATCH])
    batches = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]
    sizes = data.rooms(sum(len(row.tokens) for row in batch) for batch in batches)
    first = {path: (layer.lora_a, layer.lora_b) for path, layer in adapted(model)}
    wanted = reference(model, batches)
    for precise, tolerance in (True, 1e-4), (False, 1e-2):
        for path, layer in adapted(model):
            layer.lora_a, layer.lora_b = (x + 0 for x in first[path])
        trainer = Trainer(model, optimizers.AdamW(RATE, bias_correction=True), precise=precise)
        found = [trainer.step([data.pack(batch, sizes, BATCH)]).loss for batch in batches]
        np.testing.assert_allclose(found, wanted, rtol=tolerance)
