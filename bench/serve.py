"""`llm serve` under load, through HTTP, beside the bare scheduler and llama.cpp's batched decode, in turns, medians.

    python bench/serve.py [--rounds 5] [--log]       # --log appends the table to LOG.md

* streams: N clients at once, 128 tokens in, 64 out, streamed chat; tokens/s over all, from the first request to the
  last token (prompts included), and decode alone, from when every stream has its first token to the first end.
* bare: the same requests given to the Scheduler in a process of its own; what HTTP and JSON cost is the difference.
* llama.cpp: compare.py's worker, no HTTP. Decode: 64 tokens of N sequences in one batch each step, from empty caches
  (ours are 128 tokens deep). All: 128 tokens in and 64 out of N sequences, counted as `streams` counts.
* gap: time between two arrivals at 8 streams while a prompt of 4,000 tokens comes in, 99th percentile.
* prefix: time to the first token of a prompt of 2,000 tokens, and of another with the same beginning.
"""
import argparse
import json
import random
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from compare import CACHE, HERE, PEERS, Worker, commit, cpu_name, prepare, say

OURS, LLAMA = PEERS[0], PEERS[1]
MODEL = str(CACHE / "models" / OURS.model)
STREAMS, IN, OUT = (8, 16), 128, 64
DELTA = b'"delta":{"content":'
PATH = "/v1/chat/completions"


class Stream:
    """One streamed answer: when each of its tokens came. Bytes are only searched: a client must not cost much."""

    def __init__(self, port: int, messages: list[dict[str, str]], tokens: int, seed: int, **more: Any):
        asked = {"messages": messages, "max_tokens": tokens, "seed": seed, "temperature": 0.8, "stream": True, **more}
        body = json.dumps({**asked, "ignore_eos": True}).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.begun, self.times, self.done, self.head = time.perf_counter(), list[float](), False, b""
        self.socket.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n".encode() + body)

    def read(self) -> None:
        data, now = self.socket.recv(1 << 16), time.perf_counter()
        self.head = self.head or data
        if not self.head.startswith(b"HTTP/1.1 200"):
            sys.exit(f"the server says {data[:500]!r}")
        self.times += [now] * data.count(DELTA)
        self.done = not data or b"[DONE]" in data

    @property
    def first(self) -> float:
        return self.times[0]


def drive(streams: list[Stream], until: Any = None) -> None:
    """Reads all streams until they are done, or `until()` holds."""
    with selectors.DefaultSelector() as ready:
        for stream in streams:
            ready.register(stream.socket, selectors.EVENT_READ, stream)
        while ready.get_map() and not (until and until()):
            for key, _ in ready.select():
                key.data.read()
                if key.data.done:
                    ready.unregister(key.data.socket)


class Server:
    def __init__(self, port: int):
        self.port = port

    def post(self, path: str, body: dict[str, Any]) -> Any:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), head)
        return json.load(urllib.request.urlopen(request))

    def prompt(self, tokens: int, beginning: str = "") -> list[dict[str, str]]:
        """Messages that make this many tokens, of random words after `beginning`."""
        text = beginning
        while (missing := tokens - self.post("/tokenize", {"messages": said(text)})["count"]) > 0:
            text += " " + " ".join(random.choices(WORDS, k=missing))
        return said(text)

    def throughput(self, prompts: list[Any]) -> tuple[float, float]:
        """Tokens/s over all, and of decode alone."""
        streams = [Stream(self.port, prompt, OUT, i) for i, prompt in enumerate(prompts)]
        drive(streams)
        begin, end = min(s.begun for s in streams), max(s.times[-1] for s in streams)
        return len(streams) * OUT / (end - begin), decode([s.times for s in streams])

    def gaps(self) -> list[float]:
        """Milliseconds between arrivals at 8 streams while a long prompt is read. With logprobs a token is told of
        even if it is part of a character, which has no text yet: a stream of emoji would show three steps as a gap."""
        streams = [Stream(self.port, self.prompt(IN), 2000, i, logprobs=True) for i in range(8)]
        prompt = self.prompt(4000)
        drive(streams, until=lambda: all(len(s.times) > 8 for s in streams))
        long = Stream(self.port, prompt, 1, 0)
        drive([*streams, long], until=lambda: long.done)
        for stream in [*streams, long]:
            stream.socket.close()
        pairs = [pair for s in streams for pair in zip(s.times, s.times[1:], strict=False)]
        return [1e3 * (b - a) for a, b in pairs if b > long.begun and b > a]  # tokens that came together are one

    def prefix(self) -> tuple[float, float]:
        """Seconds to the first token: of a long prompt, and of another that begins as it does."""
        shared = self.prompt(2000)[0]["content"]
        seconds = []
        for question in ("Who is this?", "Where was it?"):
            stream = Stream(self.port, said(f"{shared} {question}"), 2, 0)
            drive([stream])
            seconds.append(stream.first - stream.begun)
        return seconds[0], seconds[1]


WORDS = ("river", "stone", "garden", "music", "winter", "paper", "silver", "window", "letter", "market", "candle")


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def decode(times: list[list[float]]) -> float:
    """Tokens/s while every stream decodes; 0 if the first ended before the last began."""
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    return sum(begin < t <= end for stream in times for t in stream) / (end - begin) if end > begin else 0.0


def cost(http: list[float], alone: list[float]) -> str:
    """By rounds, as machines change: in percent of what the scheduler does alone."""
    rounds = [1 - a / b for a, b in zip(http, alone, strict=True) if b]
    return f"{100 * median(rounds):.1f} %" if rounds else "–"


@contextmanager
def server(*arguments: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "lazulite.cli", "serve", "--port", "0", "-m", MODEL, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = process.stderr.readline()
    if "serving" not in line:
        sys.exit(line + process.stderr.read())
    try:
        yield Server(int(line.split("127.0.0.1:")[1].split("/")[0]))
    finally:
        process.terminate()
        process.wait()


class Bare:
    """This file again with --bare: the scheduler without HTTP, one line of token ids in, one line of rates out."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__, "--bare"], stdin=pipe, stdout=pipe, text=True)

    def throughput(self, prompts: list[list[int]]) -> tuple[float, float]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(prompts), file=self.process.stdin, flush=True)
        whole, alone = json.loads(self.process.stdout.readline())
        return whole, alone

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def bare() -> None:
    from threading import Semaphore

    from lazulite.engine.generate import Finish, Request, Sampling, Scheduler
    from lazulite.models import load

    model, _ = load(MODEL)
    scheduler = Scheduler(model)
    for line in sys.stdin:
        prompts, ended = json.loads(line), Semaphore(0)
        times: list[list[float]] = [[] for _ in prompts]

        def emit(event: Any, mine: list[float], ended: Semaphore = ended) -> None:
            ended.release() if isinstance(event, Finish) else mine.append(time.perf_counter())

        begin = time.perf_counter()
        for i, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=OUT, seed=i, temp=0.8, ignore_eos=True)
            scheduler.submit(Request(prompt, sampling, (), lambda event, mine=times[i]: emit(event, mine)))
        for _ in prompts:
            ended.acquire()
        end = max(t[-1] for t in times)
        print(json.dumps([len(prompts) * OUT / (end - begin), decode(times)]), flush=True)


def measure(rounds: int, threads: int) -> dict[str, list[float]]:
    """name -> one number a round."""
    found: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        say(f"{name:28}{value:10.3f}")

    alone, peers = Bare(), [Worker(LLAMA, setting, threads) for setting in LLAMA.settings]
    with server() as http:
        for turn in range(rounds + 1):  # the first warms up
            if turn == 1:
                found.clear()
            for n in STREAMS:
                prompts = [http.prompt(IN) for _ in range(n)]
                ids = [http.post("/tokenize", {"messages": p})["tokens"] for p in (http.prompt(IN) for _ in range(n))]
                for name, (whole, decoding) in (("HTTP", http.throughput(prompts)), ("bare", alone.throughput(ids))):
                    keep(f"{name} {n}", whole)
                    keep(f"{name} {n} decode", decoding)
                keep(f"llama.cpp {n} decode", max(peer.ask({"new": OUT, "batch": n}) for peer in peers))
                both = max(peer.ask({"prompt": IN, "new": OUT, "batch": n}) for peer in peers)
                keep(f"llama.cpp {n}", both * OUT / (IN + OUT))
            gaps = sorted(http.gaps())
            keep("gap p99 ms", gaps[int(0.99 * len(gaps))])
            first, second = http.prefix()
            keep("prefix first s", first)
            keep("prefix second s", second)
    for peer in peers:
        peer.close()
    alone.close()
    return found


def table(found: dict[str, list[float]]) -> str:
    m = {name: median(values) for name, values in found.items()}
    rows = [["streams", "HTTP tok/s", "bare", "cost", "llama.cpp", "× llama.cpp"], ["---:"] * 6]
    for kind in ("", " decode"):
        for n in STREAMS:
            http, bare, peer = (m[f"{who} {n}{kind}"] for who in ("HTTP", "bare", "llama.cpp"))
            ratio = f"{http / peer:.2f}" if peer else "–"
            lost = cost(found[f"HTTP {n}{kind}"], found[f"bare {n}{kind}"])
            rows.append([f"{n}{kind}", f"{http:.0f}", f"{bare:.0f}", lost, f"{peer:.0f}", ratio])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    ratio = 100 * median(b / a for a, b in zip(found["prefix first s"], found["prefix second s"], strict=True))
    return (
        f"{lines}\n\n* gap between arrivals at 8 streams while 4,000 tokens come in, p99: {m['gap p99 ms']:.0f} ms\n"
        f"* first token of 2,000: {m['prefix first s']:.3f} s; with the same beginning {m['prefix second s']:.3f} s "
        f"({ratio:.1f} %)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp; Lazulite takes all there are")
    parser.add_argument("--log", action="store_true", help="append the table to LOG.md")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        return bare()
    for peer in (OURS, LLAMA):
        prepare(peer)
    title = f"## {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {commit()}, `llm serve`\n\n"
    about = f"{cpu_name()}, {args.threads} threads, medians of {args.rounds}; {IN} tokens in, {OUT} out.\n\n"
    text = title + about + table(measure(args.rounds, args.threads))
    print(text)
    if args.log:
        with (HERE / "LOG.md").open("a") as log:
            log.write("\n" + text)


if __name__ == "__main__":
    main()
