"""What a user gets: PEFT's validation loss from three seeds, and a row that is recited by every form of the result."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch
from peft import LoraConfig, get_peft_model

from lazulite import lora
from lazulite.engine import array as mx
from lazulite.engine import optimizers
from lazulite.engine.generate import generate
from lazulite.lora import adapter as adapters
from lazulite.lora import data, evaluation, fusion
from lazulite.lora.layers import adapted
from lazulite.lora.trainer import Trainer
from lazulite.models import load
from lazulite.models.convert import convert

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STEPS, BATCH, RATE = 60, 4, 5e-4


def torch_run(seed: int, rows: list[data.Row], valid: list[data.Row]) -> tuple[float, float]:
    """PEFT's own start from the seed: the validation loss before and after."""
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(smollm2.in_torch(), config)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer, before = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.01), torch_loss(model, valid)
    order = data.Order(rows, seed)
    for _ in range(STEPS):
        batch = order.take(BATCH)
        (sum(torch_sum(model, row) for row in batch) / sum(row.supervised for row in batch)).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, torch_loss(model, valid)


def torch_sum(model, row: data.Row):
    logits = model(torch.from_numpy(row.tokens[None]).long()).logits[0]
    targets = torch.from_numpy(row.targets).long()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def torch_loss(model, rows: list[data.Row]) -> float:
    with torch.inference_mode():
        return sum(torch_sum(model, row).item() for row in rows) / sum(row.supervised for row in rows)


def our_run(seed: int, rows: list[data.Row], valid: list[data.Row]) -> tuple[float, float]:
    mx.random.seed(seed)
    model, _ = load()
    lora.prepare(model, lora.Method(rank=8, alpha=16))
    trainer, order = Trainer(model, optimizers.AdamW(RATE, bias_correction=True)), data.Order(rows, seed)
    before, batches = evaluation.score(model, valid).loss, [order.take(BATCH) for _ in range(STEPS)]
    sizes = data.rooms(sum(len(row.tokens) for row in batch) for batch in batches)
    for batch in batches:
        trainer.step([data.pack(batch, sizes, BATCH)])
    return before, evaluation.score(model, valid).loss


@pytest.mark.slow
def test_validation_falls_as_pefts_does() -> None:
    encoder = data.Encoder(load()[1], 2048)
    rows, valid = (encoder.rows(data.samples(DATA / f"wikisql_{name}.jsonl")) for name in ("train", "valid"))
    found = np.array([[run(seed, rows, valid) for run in (our_run, torch_run)] for seed in range(3)])
    falls = found[:, :, 0] - found[:, :, 1]
    assert (falls > 1).all()
    assert abs(falls[:, 0].mean() - falls[:, 1].mean()) < 0.01, falls


# one row by heart, answered by fresh processes

FRESH = {
    "adapter": """
model, tokenizer = load()
load_adapter(model, folder + "/adapter")
print(json.dumps(generate(model, tokenizer, ids, max_tokens=count, temp=0.0)))""",
    "fused": """
model, tokenizer = load(folder + "/fused")
print(json.dumps(generate(model, tokenizer, ids, max_tokens=count, temp=0.0)))""",
    "peft": """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
convert(None, folder + "/base", None, "float32", dequantize=True)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/peft")
out = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count,
                     do_sample=False)[0, len(ids):].tolist()
print(json.dumps(load()[1].decode(out)))""",
}
IMPORTS = """
import json, sys
from lazulite.engine.generate import generate
from lazulite.lora import load_adapter
from lazulite.models import load
from lazulite.models.convert import convert
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
"""


@pytest.mark.slow
def test_a_row_is_recited_by_every_form_of_the_result(tmp_path) -> None:
    model, tokenizer = load()
    base = adapters.stamp(model)
    encoder = data.Encoder(tokenizer, 2048)
    [row] = encoder.row(data.samples(DATA / "wikisql_train.jsonl")[0])
    lora.prepare(model, lora.Method(rank=8, alpha=16))
    trainer = Trainer(model, optimizers.AdamW(2e-3, bias_correction=True))
    losses = [trainer.step([data.pack([row])]).loss for _ in range(40)]
    assert losses[-1] < 0.05
    for format in ("mlx-lm", "peft"):
        lora.write(tmp_path / {"mlx-lm": "adapter"}.get(format, format), adapters.of(model, base=base), format)
    convert(None, tmp_path / "fused", fusion.Fused(lora.read(tmp_path / "adapter")), "float32", dequantize=True)
    start = len(row.tokens) // 4
    prompt, wanted = row.tokens[:start].tolist(), tokenizer.decode(row.targets[start - 1:].tolist())
    assert len(list(adapted(model))) == 210
    assert generate(model, tokenizer, prompt, max_tokens=len(row.tokens), temp=0.0) == wanted
    for name, code in FRESH.items():
        arguments = [str(tmp_path), json.dumps(prompt), str(len(row.tokens) - start + 1)]
        command = [sys.executable, "-c", IMPORTS + code, *arguments]
        found = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout.splitlines()[-1]) == wanted, name
