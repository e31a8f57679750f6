"""A random model of each kind, about 100 M parameters in bfloat16, against transformers on the CPU: tokens per second.

    python bench/models.py [--kinds dense moe hybrid] [--prompt 512] [--tokens 64] [--rounds 5] [--threads 2] [--log]

Both read the same folder and run the same tokens. Theirs runs in bfloat16 and in float32, the faster one counts. All
take turns within a round, so that they see the same neighbours; medians of the rounds. Logits are compared first.
"""
import argparse
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from lazulite.engine import array as mx
from lazulite.engine import cpu, nn
from lazulite.engine.generate import Engine, Sampling, Sequence
from lazulite.models import build, read

COMMON = dict(hidden_size=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64, num_hidden_layers=12,
              intermediate_size=2048, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True)
KINDS = {
    "dense": ("qwen3", COMMON),
    "moe": ("qwen3_moe", COMMON | dict(hidden_size=512, num_attention_heads=8, num_hidden_layers=8, num_experts=16,
                                       num_experts_per_tok=2, moe_intermediate_size=384, norm_topk_prob=True)),
    "hybrid": ("qwen3_5_text", COMMON | dict(intermediate_size=1536, linear_num_key_heads=6, linear_key_head_dim=64,
                                             linear_num_value_heads=12, linear_value_head_dim=64)),
}


class Theirs:
    def __init__(self, folder: Path, dtype: torch.dtype):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def __call__(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of the prompt up to its first token, and of the tokens after it."""
        begin = perf_counter()
        out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = perf_counter()
        for _ in range(tokens):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return first - begin, perf_counter() - first


class Ours:
    def __init__(self, folder: Path, context: int):
        self.engine = Engine(build(read(folder)), max_context=context)

    def __call__(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        sequence = Sequence(prompt, Sampling(temp=0.0, max_tokens=tokens + 1))
        self.engine.start(sequence)
        begin = perf_counter()
        while not sequence.generated:
            self.engine.step([sequence])
        first = perf_counter()
        while not sequence.finish_reason:
            self.engine.step([sequence])
        end = perf_counter()
        self.engine.release(sequence)
        return first - begin, end - first


def agree(folder: Path, ids: np.ndarray) -> float:
    """The largest error of a logit, in parts of the largest, of 64 tokens against transformers in float32. Our pages
    are float32 too, for rounding them sends a token to another expert now and then."""
    with torch.inference_mode():
        wanted = Theirs(folder, torch.float32).model(torch.tensor(ids[None, :64])).logits[0].numpy()
    model = build(read(folder))
    context = nn.Context.single(64, nn.caches(model.cache_spec(), 64 // nn.PAGE, 1, mx.float32))
    found = np.asarray(model(mx.array(ids[:64].astype(np.int32)), context))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def measure(kind: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    model_type, config = KINDS[kind]
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
        size = sum(p.numel() for p in model.parameters())
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        error = agree(folder, random.integers(0, config["vocab_size"], 64))
        if error > 1e-3:
            raise SystemExit(f"{kind}: a logit is off by {error:.1e} of the largest")
        runners = {"ours": Ours(folder, options.prompt + options.tokens + 32),
                   "bf16": Theirs(folder, torch.bfloat16), "f32": Theirs(folder, torch.float32)}
        seconds = {name: [] for name in runners}
        for turn in range(options.rounds + 1):
            prompt = random.integers(0, config["vocab_size"], options.prompt).tolist()   # new: no prefix is found again
            for name, runner in runners.items():
                spent = runner(prompt, options.tokens)
                if turn:                                                                 # the first warms up
                    seconds[name].append(spent)
    rates = {name: (options.prompt / median(p for p, _ in s), options.tokens / median(d for _, d in s))
             for name, s in seconds.items()}
    cells = [kind, model_type, f"{size / 1e6:.0f} M", f"{error:.0e}"]
    for i in range(2):
        best = max(rates["bf16"][i], rates["f32"][i])
        cells += [*(f"{rates[name][i]:.0f}" for name in runners), f"{rates['ours'][i] / best:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    for name, default in (("prompt", 512), ("tokens", 64), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--log", action="store_true", help="append the table to bench/LOG.md")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    cpu.runtime().set_threads(options.threads)
    names = [f"{part} {who}" for part in (f"pp{options.prompt}", f"tg{options.tokens}")
             for who in ("ours", "bf16", "f32", "ratio")]
    lines = [f"### {date.today()}, a model of each kind against transformers, {cpu.runtime().isa}, "
             f"{options.threads} threads, medians of {options.rounds}", "",
             "Tokens per second; bf16 and f32 are transformers'; ratio: ours to the faster of them.", "",
             "| " + " | ".join(["kind", "model_type", "parameters", "error", *names]) + " |", "|---" * 12 + "|"]
    print("\n".join(lines))
    for kind in options.kinds:
        lines.append(measure(kind, options))
        print(lines[-1], flush=True)
    if options.log:
        with (Path(__file__).parent / "LOG.md").open("a", encoding="utf-8") as log:
            log.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
