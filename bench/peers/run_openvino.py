"""OpenVINO GenAI on the CPU, by its own metrics: time to the first token, and from there to the last."""
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import worker


def load(folder: str, threads: int, **settings: Any) -> tuple[worker.Run, str]:
    pipe = genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads, **settings)
    random = np.random.default_rng()

    def run(prompt: int = 0, new: int = 1, depth: int = 0, batch: int = 1) -> float:
        ids = random.integers(100, 40000, (batch, prompt or depth or 1))  # never the same twice: no prefix is cached
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        n = new + 1
        config = genai.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
        metrics = pipe.generate(inputs, config).perf_metrics
        first, all_ = metrics.get_ttft().mean / 1e3, metrics.get_generate_duration().mean / 1e3
        return prompt / first if prompt else batch * new / (all_ - first)

    return run, f"OpenVINO GenAI {genai.__version__}"


if __name__ == "__main__":
    worker.serve(load)
