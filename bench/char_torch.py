"""The character-level transformer of docs/examples against the same one in PyTorch: same weights, batches and
arithmetic, ten steps of one and ten of the other in turn, so that both see the same neighbours.

    python bench/char_torch.py --steps 200 --threads 2 [--fused] [--compile]
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn as tnn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "examples"))
import char_transformer as ours  # noqa: E402

from lazulite.engine import array as mx  # noqa: E402
from lazulite.engine import cpu, nn  # noqa: E402

ROUND = 10


class Twin(tnn.Module):
    """The functions of ours.Transformer on a dict of its weights."""

    def __init__(self, weights: dict[str, np.ndarray], shape: ours.Shape):
        super().__init__()
        self.shape = shape
        named = {name.replace(".", "/"): tnn.Parameter(torch.tensor(w)) for name, w in weights.items()}
        self.w = tnn.ParameterDict(named)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c, w = *x.shape, self.shape.channels, self.w
        h = F.embedding(x, w["characters/weight"]) + w["places/weight"][:t]
        for i in range(self.shape.layers):
            at = f"layers/{i}"
            y = F.layer_norm(h, (c,), w[f"{at}/norm1/weight"])
            q, k, v = (F.linear(y, w[f"{at}/attention/{n}/weight"]).view(b, t, self.shape.heads, -1).transpose(1, 2)
                       for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
            h = h + F.linear(y, w[f"{at}/attention/out/weight"])
            y = F.gelu(F.linear(F.layer_norm(h, (c,), w[f"{at}/norm2/weight"]), w[f"{at}/up/weight"]))
            h = h + F.linear(y, w[f"{at}/down/weight"])
        return F.linear(F.layer_norm(h, (c,), w["norm/weight"]), w["characters/weight"])


class TorchTrainer:
    def __init__(self, twin: Twin, steps: int, warmup: int, fused: bool, compiled: bool):
        self.twin, self.forward = twin, torch.compile(twin) if compiled else twin
        parameters = list(twin.parameters())
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.1},
                                        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=fused)
        rise = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: i / warmup if i < warmup else 0.1 + 0.45 * (
            1 + np.cos(np.pi * min(1, (i - warmup) / (steps - warmup)))))
        self.schedule = rise

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        logits = self.forward(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))
        loss.backward()
        tnn.utils.clip_grad_norm_(self.twin.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ours.DATA)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="PyTorch's fused AdamW")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.runtime().set_threads(args.threads)
    text, shape, rng = ours.Text.of(args.data), ours.Shape(), np.random.default_rng(0)
    mx.random.seed(0)
    model = ours.Transformer(len(text.vocabulary), shape)
    weights = {name: np.array(w) for name, w in nn.tree_flatten(model.parameters())}
    warmup = max(1, args.steps // 20)
    peer = TorchTrainer(Twin(weights, shape), args.steps, warmup, args.fused, args.compile)
    own = ours.Trainer(model, ours.optimizer_for(args.steps, warmup))
    times: dict[str, list[float]] = {"lazulite": [], "torch": []}
    apart = 0.0
    for _ in range(args.steps // ROUND):
        batches = [text.batch(rng, args.batch, shape.block) for _ in range(ROUND)]
        losses = {"lazulite": [], "torch": []}
        for name in times:
            for x, y in batches:
                start = time.perf_counter()
                loss = float(own.step(mx.array(x), mx.array(y))) if name == "lazulite" else peer.step(
                    torch.from_numpy(x).long(), torch.from_numpy(y).long())
                times[name].append(time.perf_counter() - start)
                losses[name].append(loss)
        apart = max(apart, max(abs(a - b) for a, b in zip(*losses.values(), strict=True)))
    for name, found in times.items():
        ms = np.array(found[2 * ROUND:]) * 1e3
        print(f"{name:9s} {np.median(ms):7.2f} ms a step (median), {ms.min():6.2f} (minimum), {len(ms)} steps")
    ratio = np.median(times["lazulite"][2 * ROUND:]) / np.median(times["torch"][2 * ROUND:])
    print(f"ratio {ratio:.2f} of the medians; losses at most {apart:.1e} apart; last loss {losses['lazulite'][-1]:.3f}")


if __name__ == "__main__":
    main()
