"""Lazulite beside its peers: the same weights, the same threads, in turns, medians.

    python bench/compare.py             # what `make bench` runs: minutes, once the environments are made
    python bench/compare.py --dry-run   # the table alone: LOG.md and chart.svg stay as they are

Each contestant is a process of its own that keeps its model loaded (`peers/worker.py`). A first round tries every
setting of every peer and keeps the fastest for each test; then come the rounds that count, with the limits of the
machine measured in each. Environments and models are made under $LAZULITE_BENCH_DIR, by default `.bench`.
"""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from shlex import quote, split
from statistics import median
from threading import Timer
from typing import Any, NamedTuple

from chart import chart

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("LAZULITE_BENCH_DIR", HERE.parent / ".bench")).resolve()
PATIENCE = 180  # seconds for one answer
TESTS: dict[str, dict[str, int]] = {
    "pp512": {"prompt": 512},
    "tg128": {"new": 128},
    "tg64 @ d4096": {"new": 64, "depth": 4096},
    "tg128 b=8": {"new": 128, "batch": 8},
    "tg128 b=16": {"new": 128, "batch": 16},
}
COSTS = {"load": ("load to first token, s", 1.0), "memory": ("peak memory, MB", 1e6)}
CONFIG = ("num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers")
Results = dict[str, dict[str, float]]  # of a test or a cost: contestant -> median


class Peer(NamedTuple):
    """A contestant: its worker, its model, what pip installs for it ("": nothing, it runs here), its settings."""

    name: str
    script: str
    model: str
    packages: str = ""
    settings: tuple[dict[str, Any], ...] = ({},)

    @property
    def python(self) -> str:
        return str(CACHE / "env" / self.packages.split()[0] / "bin/python") if self.packages else sys.executable


LLAMA = "llama-cpp-python --no-cache-dir"  # a wheel of an earlier build may be without the header below
OPENVINO = "openvino-genai optimum-intel[openvino] nncf torch transformers accelerate gguf"
PRECISE, CLASSIC = {"INFERENCE_PRECISION_HINT": "f32"}, {"ATTENTION_BACKEND": "SDPA"}
PEERS = (
    Peer("Lazulite 4-bit", "run_lazulite.py", "lazulite-4bit"),
    Peer("llama.cpp Q4_0", "run_llama_cpp.py", "q4_0.gguf", LLAMA, ({"flash": True}, {"flash": False})),
    Peer("OpenVINO int4", "run_openvino.py", "openvino-int4", OPENVINO, ({}, PRECISE, CLASSIC)),
    Peer("transformers bf16", "run_transformers.py", "hf", OPENVINO),
)


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


def once(path: Path, *commands: str, **variables: str) -> None:
    """Runs commands that make `path`, unless it is there. What they print is kept beside it."""
    if path.exists():
        return
    say(f"making {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.log").open("w") as log:
        try:
            for command in commands:
                subprocess.run(split(command), stdout=log, stderr=log, env=os.environ | variables, check=True)
        except BaseException:  # Ctrl-C too: nothing half-made stays
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
            say(f"this failed, see {log.name}")
            raise


def prepare(peer: Peer) -> None:
    """Makes the peer's environment, and its model from the default model's GGUF or the folder unpacked from that."""
    from lazulite.models.hub import default

    home, dest = Path(peer.python).parent.parent, CACHE / "models" / peer.model
    script, parts = HERE / "peers" / peer.script, (peer.python, default(), CACHE / "models/hf", dest)
    python, gguf, hf, to = (quote(str(part)) for part in parts)
    worker = f"{python} {quote(str(script))}"
    if peer.packages:
        # OpenVINO's exporter pulls a torchvision that need not fit this torch.
        commands = f"{python} -m pip install {peer.packages}", f"{python} -m pip uninstall -y torchvision"
        fix = f"-DCMAKE_CXX_FLAGS='-include {HERE}/peers/amx_gcc.h'"
        once(home, f"{quote(sys.executable)} -m venv {quote(str(home))}", *commands, CMAKE_ARGS=fix)
    if peer.model == "openvino-int4":
        prepare(PEERS[-1])
    int4 = "--task text-generation-with-past --weight-format int4 --group-size 64 --ratio 1.0 --sym"
    recipes = {
        "lazulite-4bit": f"{python} -m lazulite.cli convert {gguf} {to} -q --bits 4 --group-size 64",
        "q4_0.gguf": f"{worker} --quantize {gguf} {to}",
        "openvino-int4": f"{python} -m optimum.commands.optimum_cli export openvino -m {hf} {int4} {to}",
        "hf": f"{worker} --unpack {gguf} {to}",
    }
    once(dest, recipes[peer.model])


class Worker:
    """A contestant's process with one of its settings: started when first asked, and again after a crash."""

    def __init__(self, peer: Peer, setting: dict[str, Any], threads: int):
        self.peer, self.setting, self.about = peer, setting, peer.name
        script, model = str(HERE / "peers" / peer.script), str(CACHE / "models" / peer.model)
        self.command = [peer.python, script, model, str(threads), json.dumps(setting)]
        self.errors = (CACHE / f"{peer.script}.log").open("w")
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, int]) -> float:
        """Tokens/s; 0, and a line on stderr, if there is no answer."""
        if not self.process:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
            self.about = self.answer().get("about", self.about)
        answer: dict[str, Any] = {"error": f"did not start, see {self.errors.name}"}
        if self.process:
            answer = self.answer(request)
        if "error" in answer:
            say(f"{self.peer.name} {self.setting} {request}: {answer['error']}")
        return float(answer.get("rate", 0))

    def answer(self, request: dict[str, int] | None = None) -> dict[str, Any]:
        process = self.process
        assert process and process.stdin and process.stdout
        timer = Timer(PATIENCE, process.kill)
        timer.start()
        with suppress(BrokenPipeError):
            if request:
                print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        self.process = None
        return {"error": f"ended with code {process.wait()}, see {self.errors.name}"}

    def costs(self) -> dict[str, float]:
        """Load time and peak memory of a fresh process."""
        with suppress(subprocess.TimeoutExpired, ValueError):
            command = [*self.command, "--once"]
            return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout)
        return {}

    def close(self) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()


def fastest(peer: Peer, threads: int) -> dict[str, Worker]:
    """The peer's fastest setting for each test that it can run; processes of the other settings end."""
    workers, best = [Worker(peer, setting, threads) for setting in peer.settings], {}
    for test, request in TESTS.items():
        rates = [worker.ask(request) for worker in workers]
        say(f"round 0  {test:13}{peer.name:18}", *(f"{rate:9.1f}" for rate in rates))
        if max(rates):
            best[test] = workers[rates.index(max(rates))]
    for worker in workers:
        if worker not in best.values():
            worker.close()
    return best


def measure(chosen: dict[str, dict[str, Worker]], rounds: int, limits: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """samples[test or cost][peer] and the limits, one of each a round; each round begins with another peer."""
    samples: Any = defaultdict(lambda: defaultdict(list))
    names, machine = list(chosen), []
    for r in range(rounds):
        turn = names[r % len(names) :] + names[: r % len(names)]
        for test, request in TESTS.items():
            for name in turn:
                time.sleep(0.2)  # until the threads of the one before are asleep
                if test in chosen[name] and (rate := chosen[name][test].ask(request)):
                    samples[test][name].append(rate)
            say(f"round {r + 1}  {test:13}", *(f"{name} {v[-1]:.1f}  " for name, v in samples[test].items()))
        for name in turn:
            for cost, value in next(iter(chosen[name].values())).costs().items():
                samples[cost][name].append(value)
        machine.append(json.loads(subprocess.run(limits, capture_output=True, check=True).stdout))
    return samples, machine


def weight_bytes(folder: Path) -> int:
    """All of them are read for a token, as the embedding is also the output head."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def ceilings(folder: Path, machine: dict[str, float]) -> dict[str, float]:
    """Tokens/s that the machine allows: a prompt is int8 operations; a decoded token reads weights and caches."""
    c = json.loads((folder / "config.json").read_text())
    heads, kv, hidden, layers = (c[k] for k in CONFIG)
    dim = c.get("head_dim") or hidden // heads
    linear = layers * (2 * hidden * dim * (heads + kv) + 3 * hidden * c["intermediate_size"])
    cache, weights = layers * kv * dim * 2 * 2, weight_bytes(folder)  # float16 keys and values of a token

    def ceiling(prompt: int = 0, new: int = 0, depth: int = 0, batch: int = 1) -> float:
        if prompt:
            return machine["int8"] / (2 * linear)
        return batch * machine["read_1GB"] / (weights + batch * (depth + new / 2) * cache)

    return {test: ceiling(**request) for test, request in TESTS.items()}


def table(results: Results, names: list[str], limits: dict[str, float]) -> str:
    """Markdown: medians, how many times better than each peer, percent of the limit."""
    ours, *peers = names
    head = ["tok/s", *names, *(f"× {peer}" for peer in peers), "limit", "of limit"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for test, values in results.items():
        title, unit = COSTS.get(test, (test, 1.0))
        own, power = values.get(ours, 0.0), -1 if test in COSTS else 1
        cells = [number(values.get(name, 0.0) / unit) for name in names]
        cells += [f"{(own / values[p]) ** power:.2f}" if own and p in values else "–" for p in peers]
        limit = limits.get(test, 0.0)
        rows.append([title, *cells, number(limit), f"{100 * own / limit:.0f} %" if limit else "–"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def number(x: float) -> str:
    return f"{x:,.{0 if x >= 100 else 1 if x >= 10 else 2}f}" if x else "–"


def cpu_name() -> str:
    """Its name and the vector extensions that matter here."""
    info = Path("/proc/cpuinfo")
    facts = info.read_text() if info.exists() else f"model name : {platform.processor() or platform.machine()}"
    name = re.search(r"model name\s*: (.*)", facts)
    found = [x for x in ("amx_int8", "avx512_vnni", "avx512_bf16", "avx2", "i8mm") if re.search(rf"\b{x}\b", facts)]
    return f"{name[1] if name else platform.machine()} ({' '.join(found)})"


def commit() -> str:
    """Short hash, with + when tracked files differ."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no commit"


def report(results: Results, chosen: dict[str, dict[str, Worker]], machine: dict[str, Any], args: Any) -> str:
    """A dated section for LOG.md."""
    used: dict[str, list[str]] = defaultdict(list)
    for workers in chosen.values():
        for test, worker in workers.items():
            used[worker.about + (f" {json.dumps(worker.setting)}" if worker.setting else "")].append(test)
    limits = ceilings(CACHE / "models" / PEERS[0].model, machine)
    return (
        f"## {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {commit()}\n\n"
        f"{cpu_name()}, {args.threads} threads, load {args.load:.1f} before, medians of {args.rounds}. Limits: "
        f"memory at {machine['read_1GB'] / 1e9:.1f} GB/s (as little as the weights: {machine['read'] / 1e9:.1f}), "
        f"int8 {machine['int8'] / 1e12:.2f} TOPS ({machine['int8_unit']}).\n\n"
        f"{table(results, list(chosen), limits)}\n\n"
        + "".join(f"* {about}: {', '.join(tests)}\n" for about, tests in used.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", action="append", default=[], metavar="PEER", help="part of a name; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="write neither LOG.md nor chart.svg")
    args, chosen = parser.parse_args(), {}
    args.load = os.getloadavg()[0]
    if args.load > 0.5:
        say(f"this machine is busy (load {args.load:.1f}): peers that spin or wait for all threads will look slow")
    for peer in PEERS:
        if any(word.lower() in peer.name.lower() for word in args.without):
            continue
        try:
            prepare(peer)
            chosen[peer.name] = fastest(peer, args.threads)
        except (OSError, subprocess.SubprocessError) as error:
            say(f"{peer.name} is left out: {error}")
    chosen = {name: workers for name, workers in chosen.items() if workers}
    if PEERS[0].name not in chosen:
        sys.exit(f"{PEERS[0].name} has to run to be compared")
    roofline = CACHE / "roofline"
    build = f"{os.environ.get('CXX', 'c++')} -O3 -march=native -pthread"
    once(roofline, f"{build} {quote(str(HERE / 'roofline.cpp'))} -o {quote(str(roofline))}")
    weights = weight_bytes(CACHE / "models" / PEERS[0].model)
    samples, machine = measure(chosen, args.rounds, [str(roofline), str(args.threads), str(weights)])
    (CACHE / "samples.json").write_text(json.dumps([samples, machine]))
    results = {test: {name: median(values) for name, values in by.items()} for test, by in samples.items()}
    middle = machine[0] | {key: median(m[key] for m in machine) for key in ("read_1GB", "read", "int8")}
    text = report(results, chosen, middle, args)
    print(text)
    if not args.dry_run:
        with (HERE / "LOG.md").open("a") as log:
            log.write("\n" + text)
        drawn = {test: {name: by.get(name, 0.0) for name in chosen} for test, by in results.items() if test in TESTS}
        where = f"SmolLM2-135M-Instruct, {args.threads} threads, {cpu_name()}, medians of {args.rounds}"
        (HERE / "chart.svg").write_text(chart("Tokens per second, Lazulite and its peers", where, drawn))
    for workers in chosen.values():
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
