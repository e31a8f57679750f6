"""What every contestant's process shares: load once, then answer requests until stdin ends.

A request is a JSON line, `{"prompt": 512}` or `{"new": 128, "depth": 0, "batch": 1}`, of llama.cpp both at once; the
answer is a JSON line, `{"rate": tokens/s over all sequences, prompts counted}` or `{"error": sentence}`. The first line
out is `{"about": …}`. With --once the process prints `{"load": seconds from the imports to the first token, "memory":
peak resident bytes}` instead.
"""
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., float]  # run(prompt=0, new=0, depth=0, batch=1) -> tokens/s, from an empty cache, not warmed up


def peak_memory() -> int:
    """Peak resident bytes of this process (VmHWM; ru_maxrss would begin with the parent's)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def serve(load: Callable[..., tuple[Run, str]]) -> None:
    """`load(model, threads, **settings)` gives the peer's `run` and a line about the peer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the peer's own library prints is no answer
    model, threads, settings, *once = sys.argv[1:]
    start = time.perf_counter()
    run, about = load(model, int(threads), **json.loads(settings))
    if once:
        run(new=1)
        seconds = time.perf_counter() - start
        run(prompt=512)
        print(json.dumps({"load": seconds, "memory": peak_memory()}), file=answers)
        return
    print(json.dumps({"about": about}), file=answers)
    warm = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, float | str]
        try:
            if line not in warm and not request.get("depth"):  # what fills a deep cache warms up
                run(**request)
            warm.add(line)
            answer = {"rate": run(**request)}
        except Exception as error:  # a test that a peer cannot run is a dash in the table, not the end
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)
