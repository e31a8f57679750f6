"""Fine-tuning SmolLM2-135M, rank 8 on all linear layers: tokens a second and peak memory, beside PEFT.

    python bench/lora.py [--rounds 5] [--steps 3] [--groups 6] [--threads 2] [--arms speed memory packing] [--log]

speed    4 rows of 256 tokens a step: ours on the 4-bit base, PEFT in bfloat16 on the same weights, in turns
memory   the largest resident size of a process that does nothing else but such steps; and with rows of 2,048 tokens,
         every block computed again for the gradient
packing  supervised tokens a second on alpaca_en_demo: rows of some batches of 1,536 tokens (`--batch-tokens 1536`), and
         the same rows by four in file order, padded to the longest of the four, rounded up to 32, as other trainers do

Every arm is a process of its own. The arms of one table wait for each other and take turns, a few steps each, so that
they see the same neighbours; medians of the rounds. What is compiled is compiled before the first turn.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TOKENS = 1536                          # of a packed batch: four padded rows are 1,600
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Turn = Callable[[], tuple[int, int]]   # trains some steps: tokens, supervised tokens
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (table, options)
    "Lazulite, 4-bit base": ("speed", dict(kind="ours", rows=4, length=256)),
    "the same, MLPs computed again": ("speed", dict(kind="ours", rows=4, length=256, checkpoint=30)),
    "PEFT, bfloat16": ("speed", dict(kind="peft", rows=4, length=256)),
    "4 × 256": ("memory", dict(kind="ours", rows=4, length=256)),
    "4 × 256, MLPs computed again": ("memory", dict(kind="ours", rows=4, length=256, checkpoint=30)),
    "4 × 256, blocks computed again": ("memory", dict(kind="ours", rows=4, length=256, checkpoint=60)),
    "1 × 2,048, blocks computed again": ("memory", dict(kind="ours", rows=1, length=2048, checkpoint=60)),
    "4 × 256, PEFT, bfloat16": ("memory", dict(kind="peft", rows=4, length=256)),
    "packed": ("packing", dict(kind="alpaca", padded=False)),
    "padded": ("packing", dict(kind="alpaca", padded=True)),
}


# an arm, in its own process

def trainer(checkpoint: int = 0) -> tuple[Any, Any]:
    from lazulite import lora
    from lazulite.engine import array as mx
    from lazulite.engine import optimizers
    from lazulite.lora.trainer import Trainer
    from lazulite.models import load

    mx.random.seed(0)
    model, tokenizer = load()
    lora.prepare(model, lora.Method(rank=8, alpha=16))
    model.checkpointed = checkpoint
    return Trainer(model, optimizers.AdamW(2e-4, bias_correction=True)), tokenizer


def ours(rows: int, length: int, steps: int, checkpoint: int = 0, **_: Any) -> Turn:
    import numpy as np

    from lazulite.lora import data

    it, _tokenizer = trainer(checkpoint)
    rng = np.random.default_rng(0)
    batches = []
    for _step in range(steps):
        ids = [rng.integers(3, 40000, length + 1).astype(np.int32) for _row in range(rows)]
        batches.append(data.pack([data.Row("", i[:-1], i[1:]) for i in ids]))

    def turn() -> tuple[int, int]:
        found = [it.step([batch]) for batch in batches]
        return rows * length * steps, sum(step.supervised for step in found)

    return turn


def peft(rows: int, length: int, steps: int, folder: str, threads: int, **_: Any) -> Turn:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
                           LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0))
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer, rng = torch.optim.AdamW(learnt, lr=2e-4), np.random.default_rng(0)
    batches = [torch.from_numpy(rng.integers(3, 40000, (rows, length + 1))) for _step in range(steps)]

    def turn() -> tuple[int, int]:
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return rows * length * steps, rows * length * steps

    return turn


def alpaca(padded: bool, groups: int, **_: Any) -> Turn:
    """The rows of the first groups that are full, packed or by four in file order."""
    import numpy as np

    from lazulite.lora import data

    it, tokenizer = trainer()
    found = data.Encoder(tokenizer, 2048).rows(data.samples(DATA / "alpaca_en_demo.json"))
    places = data.groups([len(row.tokens) for row in found], TOKENS)[:groups]
    if padded:
        ordered = sorted(place for group in places for place in group)
        places = [ordered[i:i + 4] for i in range(0, len(ordered), 4)]
    rows = [[found[place] for place in group] for group in places]
    if padded:
        rows = [[pad(row, -(-max(len(r.tokens) for r in group) // 32) * 32) for row in group] for group in rows]
    sizes = data.rooms((sum(len(row.tokens) for row in group) for group in rows), cost=0 if padded else 4000)
    most = 4 if padded else TOKENS // data.SHORT
    batches = [data.pack(group, sizes, most) for group in rows]
    for size in sizes:
        lengths = np.array([size] + [0] * (most - 1), np.int32)
        it.plan(data.Batch(np.zeros(size, np.int32), np.full(size, -1, np.int32), lengths, ()))

    def turn() -> tuple[int, int]:
        steps = [it.step([batch]) for batch in batches]
        return sum(batch.size for batch in batches), sum(step.supervised for step in steps)

    return turn


def pad(row: Any, length: int) -> Any:
    import numpy as np

    fill = (0, length - len(row.tokens))
    return row._replace(tokens=np.pad(row.tokens, fill), targets=np.pad(row.targets, fill, constant_values=-1))


def serve(options: dict[str, Any]) -> None:
    """Answers each line of stdin with a turn, as a line of JSON."""
    from lazulite.engine import cpu

    if options["kind"] != "peft":
        cpu.runtime().set_threads(options["threads"])
    turn = {"ours": ours, "peft": peft, "alpaca": alpaca}[options["kind"]](**options)
    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = perf_counter()
        tokens, supervised = turn()
        answer = {"seconds": perf_counter() - begin, "tokens": tokens, "supervised": supervised,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


# the parent

class Arm:
    def __init__(self, name: str, options: dict[str, Any]):
        command = [sys.executable, __file__, "--serve", json.dumps(options)]
        self.name = name
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        self.results: list[dict[str, float]] = []
        assert self.child.stdout and self.child.stdout.readline() == "ready\n", f"{name} did not start"

    def turn(self) -> None:
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write("go\n")
        self.child.stdin.flush()
        self.results.append(json.loads(self.child.stdout.readline()))

    def rate(self, what: str) -> float:
        return median(result[what] / result["seconds"] for result in self.results)

    def stop(self) -> None:
        self.child.communicate()


def measure(table: str, rounds: int, common: dict[str, Any]) -> Iterator[str]:
    """The rows of a table in Markdown."""
    chosen = {name: {**common, **options} for name, (of, options) in ARMS.items() if of == table}
    if table == "memory":
        yield "| memory | peak, MB | tok/s |\n|---|---:|---:|"
        for name, options in chosen.items():               # one after another: each has the machine's memory
            arm = Arm(name, options)
            arm.turn()
            arm.stop()
            yield f"| {name} | {arm.results[-1]['peak'] / 1e6:,.0f} | {arm.rate('tokens'):,.0f} |"
        return
    what = "supervised" if table == "packing" else "tokens"
    arms = [Arm(name, options) for name, options in chosen.items()]
    for _ in range(rounds):
        for arm in arms:
            arm.turn()
    for arm in arms:
        arm.stop()
    unit = "supervised tok/s" if table == "packing" else "tok/s"
    yield f"| {table} | {unit} | × {arms[-1].name} | peak, MB |\n|---|---:|---:|---:|"
    for arm in arms:
        ratio, peak = arm.rate(what) / arms[-1].rate(what), arm.results[-1]["peak"] / 1e6
        yield f"| {arm.name} | {arm.rate(what):,.0f} | {ratio:.2f} | {peak:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--groups", type=int, default=6, help="batches of alpaca_en_demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="*", default=["speed", "memory", "packing"])
    parser.add_argument("--log", action="store_true", help="append the tables to bench/LOG.md")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    with tempfile.TemporaryDirectory() as folder:
        from lazulite.models.convert import convert

        convert(None, f"{folder}/model", None, "bfloat16", dequantize=True)
        common = {"folder": f"{folder}/model", "steps": args.steps, "threads": args.threads}
        lines = []
        for table in args.arms:
            for line in [*measure(table, args.rounds, {**common, "groups": args.groups}), ""]:
                print(line, flush=True)
                lines.append(line)
    if args.log:
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        head = f"\n## {when}, `bench/lora.py`, {args.threads} threads, {args.rounds} rounds of {args.steps} steps\n\n"
        with (ROOT / "bench" / "LOG.md").open("a", encoding="utf-8") as file:
            file.write(head + "\n".join(lines))


if __name__ == "__main__":
    main()
