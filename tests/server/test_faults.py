"""What goes wrong around a server: clients that vanish, requests that poison, signals, an engine that hangs."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
TELL: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, "stream": True}


def deltas(stream: str) -> list[str]:
    """The events of a stream without what is drawn anew each time."""
    events = [event.removeprefix("data: ") for event in stream.split("\n\n") if event.startswith("data: ")]
    rows = [json.loads(event) for event in events if event != "[DONE]"]
    return [json.dumps(row.get("choices", row)) for row in rows] + events[-1:]


def idle(url: str, seconds: float = 20.0) -> dict[str, float]:
    """The gauges once nothing runs or waits."""
    until = time.monotonic() + seconds
    while True:
        lines = [line.split() for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
        found = {name: float(value) for name, value in lines}
        busy = ("requests_running", "requests_waiting", "kv_cache_pages_used")
        if not any(found[f"lazulite_{name}"] for name in busy):
            return found
        assert time.monotonic() < until, {name: found[f"lazulite_{name}"] for name in busy}
        time.sleep(0.05)


async def vanish(port: int, rng: random.Random) -> None:
    """A client that is killed at some moment: before its body is whole, in the queue, in prefill or in decode."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    words = " ".join(rng.choices(["once", "upon", "a", "time"], k=rng.randrange(1, 200)))
    body = json.dumps({**TELL, "messages": [{"role": "user", "content": words}], "stream": rng.random() < 0.7}).encode()
    kinds = f"content-type: application/json\r\ncontent-length: {len(body)}"
    sent = body[: rng.randrange(len(body))] if rng.random() < 0.1 else body
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{kinds}\r\n\r\n".encode() + sent)
    with suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
        await asyncio.wait_for(reader.readexactly(rng.randrange(1, 20_000)), rng.random() * 0.5)
    writer.transport.abort()


def test_killed_clients_leave_nothing(start: Callable[..., Any]) -> None:
    async def crowd(port: int) -> None:
        rng = random.Random(0)
        await asyncio.gather(*(vanish(port, random.Random(rng.random())) for _ in range(200)))

    with start("--max-queued", "256") as server:
        before = httpx.post(server.url + CHAT, json={**TELL, "max_tokens": 30}, timeout=60).text
        asyncio.run(crowd(server.port))  # warms up what is made once
        idle(server.url)
        memory = server.rss()
        asyncio.run(crowd(server.port))
        found = idle(server.url)
        assert found["lazulite_requests_total{reason=\"cancelled\"}"] > 20
        assert server.rss() - memory < 16 * 2**20
        assert deltas(httpx.post(server.url + CHAT, json={**TELL, "max_tokens": 30}, timeout=60).text) == deltas(before)


BOMB = "((a{1,1000}){1,1000}){1,1000}"
POISON: list[Any] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "hiccup"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "string", "pattern": "(?=" + BOMB + ")"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [
        f"{i}" * 20 for i in range(50_000)]}}}},
    b'{"messages": [{"role": "user", "content": "' + b"x" * 4_000_000 + b'"}]}',
    b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    {"messages": [{"role": "user", "content": "raise an exception"}]},
    {"messages": [{"role": "user", "content": "word " * 100_000}]},
    {"logit_bias": {"99999999": 1}},
    {"chat_template_kwargs": {"messages": "x"}},
]  # fmt: skip


def test_poisoned_requests_are_refused_and_their_neighbours_hear_nothing(start: Callable[..., Any]) -> None:
    async def neighbours(url: str, poison: list[Any]) -> tuple[list[list[str]], list[int]]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asked = [[{"role": "user", "content": f"Tell me story number {i}."}] for i in range(4)]
            bodies = [{**TELL, "max_tokens": 150, "messages": told} for told in asked]
            streams = [asyncio.create_task(client.post(CHAT, json=body)) for body in bodies]
            await asyncio.sleep(0.05)
            headers = {"content-type": "application/json"}
            raw = [p if isinstance(p, bytes) else json.dumps({**TELL, **p}).encode() for p in poison]
            answers = await asyncio.gather(*(client.post(CHAT, content=body, headers=headers) for body in raw))
            return [deltas((await stream).text) for stream in streams], [answer.status_code for answer in answers]

    with start() as server:
        undisturbed, _ = asyncio.run(neighbours(server.url, []))
        disturbed, statuses = asyncio.run(neighbours(server.url, POISON))
    assert statuses == [400] * len(POISON)
    assert disturbed == undisturbed and all(stream[-1] == "[DONE]" for stream in undisturbed)


@pytest.mark.parametrize(("patience", "last"), [("30", "finish_reason"), ("0", "shutting_down")])
def test_sigterm_under_load_ends_every_stream(start: Callable[..., Any], patience: str, last: str) -> None:
    async def load(server: Any) -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            streams = [asyncio.create_task(client.post(CHAT, json={**TELL, "ignore_eos": True})) for _ in range(8)]
            while "lazulite_requests_running 8.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return [(await stream).text for stream in streams]

    with start("--drain-seconds", patience) as server:
        texts = asyncio.run(load(server))
        assert server.process.wait(30) == 0
    ends = [deltas(text)[-2:] for text in texts]
    assert all(end[1] == "[DONE]" and last in end[0] for end in ends), ends
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_what_is_said_stays_out_of_the_log(start: Callable[..., Any]) -> None:
    secret = "Rumpelstiltskin"
    with start("-v") as server:
        for more in ({}, {"temperature": secret}, {"model": secret}, {"tools": [{"type": secret}]}):
            body = {**TELL, "messages": [{"role": "user", "content": f"exception {secret}"}], **more}
            assert httpx.post(server.url + CHAT, json=body).status_code in (400, 404)
        body = {**TELL, "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
        assert httpx.post(server.url + CHAT, json=body).status_code == 200
        server.stop()
        log = server.process.stderr.read()
    assert CHAT in log and secret not in log


@pytest.mark.parametrize("raw", [
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 30_000 + b"\r\n",
    b"\x16\x03\x01 this is TLS",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
])  # fmt: skip
def test_what_is_not_http_is_turned_away(default: Any, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", default.port), timeout=20) as connection:
        with suppress(ConnectionError):
            connection.sendall(raw)
        with suppress(ConnectionError):
            assert connection.recv(4096).startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{default.url}/health").status_code == 200


STUCK = """
import time
from lazulite.cli import main
from lazulite.engine.generate import Engine
step = Engine.step
def hang(self, *args, **kwargs):
    time.sleep(600)
Engine.step = hang
main()
"""


def test_a_stuck_engine_is_said_and_ends_the_server(folder: Path) -> None:
    arguments = ["serve", "--port", "0", "-m", str(folder), "--stuck-seconds", "1"]
    process = subprocess.Popen([sys.executable, "-c", STUCK, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        url = process.stderr.readline().split(" at ")[1].split("/v1")[0]
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        answer = httpx.post(url + CHAT, json={**TELL, "stream": False}, timeout=30)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "engine_stuck"
        assert process.wait(20) == 1
        assert "stuck" in process.stderr.read()
    finally:
        process.kill()


def soak(server: Any, requests: int) -> list[int]:
    """Many clients, most of them well-behaved; the memory that the server holds after each tenth of the requests."""
    memory: list[int] = []

    async def one(client: httpx.AsyncClient, i: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            words = f"Story {i} " + "of a time " * (i % 37)
            body = {**TELL, "messages": [{"role": "user", "content": words}], "max_tokens": 8, "stream": i % 2 == 0}
            answer = await client.post(CHAT, json={**body, "temperature": -1} if i % 10 == 9 else body)
            assert answer.status_code == (400 if i % 10 == 9 else 200), answer.text

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            gate = asyncio.Semaphore(16)
            for tenth in range(10):
                numbers = range(tenth * requests // 10, (tenth + 1) * requests // 10)
                await asyncio.gather(*(one(client, i, gate) for i in numbers))
                memory.append(server.rss())

    asyncio.run(all_of_them())
    idle(server.url)
    return memory


@pytest.mark.parametrize("requests", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_soak_leaves_memory_flat(start: Callable[..., Any], requests: int) -> None:
    with start() as server:
        soak(server, 64)
        memory = soak(server, requests)
    assert max(memory[5:]) - memory[4] < 8 * 2**20, memory


def test_a_full_queue_is_told_when_to_come_back(start: Callable[..., Any]) -> None:
    async def crowd(url: str, path: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            body = {**TELL, "max_tokens": 100, "stream": False}
            return await asyncio.gather(*(client.post(path, json=body) for _ in range(12)))

    with start("--max-running", "1", "--max-queued", "2") as server:
        for path, status, kind in ((CHAT, 429, "rate_limit_error"), ("/v1/messages", 529, "overloaded_error")):
            answers = asyncio.run(crowd(server.url, path))
            busy = [answer for answer in answers if answer.status_code == status]
            assert busy and all(answer.status_code in (200, status) for answer in answers)
            assert int(busy[0].headers["retry-after"]) >= 1 and busy[0].json()["error"]["type"] == kind


def test_a_request_that_takes_too_long_is_ended(start: Callable[..., Any]) -> None:
    with start("--timeout", "1", "--max-running", "1") as server:
        async def crowd() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {**TELL, "stream": False, "ignore_eos": True}
                return await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(24)))

        statuses = {answer.status_code: answer.json() for answer in asyncio.run(crowd())}
        assert set(statuses) == {200, 408} and statuses[408]["error"]["code"] == "timeout"
