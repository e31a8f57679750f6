"""llama.cpp through its C API, counted as llama-bench counts: logits are waited for, nothing is sampled.

`run_llama_cpp.py --quantize SOURCE.gguf DEST.gguf` writes Q4_0, its fastest 4-bit type on CPUs (repacked at load).
"""
import ctypes
import random
import sys
import time

import llama_cpp as lc
import worker

SILENT = lc.llama_log_callback(lambda level, text, data: None)  # a global, as the C side holds only its address


def quantize(source: str, dest: str) -> None:
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = lc.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if lc.llama_model_quantize(source.encode(), dest.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source}")


class Context:
    """`batch` sequences with room for `length` tokens each; float16 cache."""

    def __init__(self, model: int, threads: int, flash: bool, length: int, batch: int):
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = length * batch, batch, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.ctx, self.batch = lc.llama_init_from_model(model, params), lc.llama_batch_init(512, 0, 1)

    def step(self, positions: range, sequences: int = 1) -> None:
        """Runs random tokens at these positions of each sequence and waits for the last one's logits."""
        b, n = self.batch, len(positions) * sequences
        b.n_tokens = n
        for i in range(n):
            b.token[i], b.n_seq_id[i], b.pos[i] = random.randrange(100, 40000), 1, positions[i // sequences]
            b.seq_id[i][0], b.logits[i] = i % sequences, i >= n - sequences
        if lc.llama_decode(self.ctx, b):
            raise RuntimeError(f"llama_decode failed on {n} tokens")
        lc.llama_get_logits(self.ctx)


def load(path: str, threads: int, flash: bool) -> tuple[worker.Run, str]:
    lc.llama_log_set(SILENT, None)
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    contexts: dict[tuple[int, int], Context] = {}

    def run(prompt: int = 0, new: int = 0, depth: int = 0, batch: int = 1) -> float:
        shape = (-(-(prompt + new + depth) // 512) * 512, batch)
        c = contexts.get(shape) or contexts.setdefault(shape, Context(model, threads, flash, *shape))
        lc.llama_memory_clear(lc.llama_get_memory(c.ctx), True)
        for position in range(0, depth, 512):
            c.step(range(position, min(depth, position + 512)))
        start = time.perf_counter()
        part = 512 // batch  # of each prompt, in one step
        for position in range(0, prompt, part):
            c.step(range(position, min(prompt, position + part)), batch)
        for position in range(prompt + depth, prompt + depth + new):
            c.step(range(position, position + 1), batch)
        return (prompt + new) * batch / (time.perf_counter() - start)

    system = lc.llama_print_system_info().decode()
    found = [x for x in ("AMX_INT8", "AVX512_VNNI", "AVX2", "NEON", "CPU") if x in system]
    return run, f"llama-cpp-python {lc.__version__}, {found[0]}"


if __name__ == "__main__":
    quantize(*sys.argv[2:]) if sys.argv[1] == "--quantize" else worker.serve(load)
