"""transformers on PyTorch, bfloat16. `run_transformers.py --unpack MODEL.gguf DEST` writes the Hugging Face folder
that it reads and that OpenVINO's exporter starts from: the GGUF's weights in bfloat16."""
import sys
import time
from pathlib import Path

import torch
import transformers
import worker
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack(source: str, dest: str) -> None:
    path = Path(source)
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        options = {"dtype": torch.bfloat16} if kind is AutoModelForCausalLM else {}
        kind.from_pretrained(path.parent, gguf_file=path.name, **options).save_pretrained(dest)


def load(folder: str, threads: int) -> tuple[worker.Run, str]:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompt: int = 0, new: int = 0, depth: int = 0, batch: int = 1) -> float:
        def step(n: int, past: object = None) -> object:
            ids = torch.randint(100, 40000, (batch, n))
            return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values

        past = step(depth) if depth else None
        start = time.perf_counter()
        for n in [prompt] if prompt else [1] * new:
            past = step(n, past)
        return (prompt + new * batch) / (time.perf_counter() - start)

    return run, f"transformers {transformers.__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    unpack(*sys.argv[2:]) if sys.argv[1] == "--unpack" else worker.serve(load)
