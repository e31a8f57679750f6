"""What clients should not send: each input with the status and the code that it gets. In process, on a tiny model."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from lazulite.server.app import create_app
from lazulite.server.safety import Guard
from lazulite.server.service import Service

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 1},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    RESPONSES: {"input": "Hi", "max_output_tokens": 1},
    MESSAGES: {"messages": HI, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HI},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": HI},
}
NAN, INF = float("nan"), float("inf")
BAD, UNSUPPORTED, MISSING = "invalid_value", "unsupported_parameter", "missing_required_parameter"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
NUMBERS = ("1", True, [], {}, NAN, INF, -INF)  # none of them a number
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(80):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
BOMB = "((a{1,1000}){1,1000}){1,1000}"


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value, **more}}


SAMPLED = {  # field: values outside its limits, for both of OpenAI's completion endpoints
    "temperature": (*NUMBERS, -0.1, 2.1, 1e308),
    "top_p": (*NUMBERS, -0.1, 1.1),
    "min_p": (*NUMBERS, -1, 2),
    "top_k": ("1", True, 1.5, -2, 2**31, 2**64),
    "repetition_penalty": ("1", 0, -1, 11),
    "presence_penalty": ("1", 2.5, -2.5),
    "frequency_penalty": ("1", 3, NAN),
    "n": ("1", True, 0, -1, 17, 10**9, 2**70, 1.5),
    "seed": ("1", True, 1.5, 2**63, 2**100, -(2**63) - 1),
    "max_tokens": ("1", True, 0, -1, 1.5, 2**31, 2**100),
    "stop": ("", [""], ["a"] * 17, 5, [5], [None], "x" * 1025, {"a": 1}),
    "logit_bias": ([], "x", {"x": 1}, {"-1": 1}, {"1": 101}, {"1": -101}, {"1": "1"}, {"1": NAN}, {"49152": 1},
                   {str(2**31): 1}, {"1.5": 1}, {str(i): 1 for i in range(1025)}),
    "stream": ("true", 1, []),
    "stream_options": ({}, {"include_usage": True}, [], "x"),
    "ignore_eos": ("yes", 1),
    "model": (5, [], {}, "x" * 257),
    "user": (5, []),
}  # fmt: skip
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    CHAT: SAMPLED | {
        "messages": ([], None, "Hi", {}, 5, [5], ["Hi"], [None], [[]], [{}], [{"role": "user"}], [{"content": "Hi"}],
                     [{"role": "wizard", "content": "Hi"}], [{"role": 5, "content": "Hi"}],
                     [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
                     [{"role": "user", "content": [{"type": "text"}]}],
                     [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}]}],
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
                     [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}],
                     [{"role": "user", "content": [{"type": "file", "file": {"file_id": "../../x"}}]}],
                     [{"role": "tool", "content": "x"}] * 10_001),
        "logprobs": ("true", 5, 1),
        "top_logprobs": ("1", -1, 21, 2**64, 5),
        "max_completion_tokens": (0, -1, "1", 2**40),
        "reasoning_effort": ("extreme", 5, ""),
        "chat_template_kwargs": ([], "x", {"messages": "x"}, {"tokenize": True}, {"chat_template": "{{ 1 }}"},
                                 {"tools": "x"}, {"a": {"b": 1}}, {"a": [1]}, {"a": "x" * 1025},
                                 {str(i): 1 for i in range(33)}),
        "tools": ("x", {}, 5, [5], [{}], [{"type": "function"}], [{"type": "function", "function": {}}],
                  [{"type": "function", "function": {"name": 5}}], [{"type": "function", "function": {"name": ""}}],
                  [{"type": "function", "function": {"name": "f", "parameters": []}}], [TOOL] * 257),
        "tool_choice": ("sometimes", 5, [], "required", {"type": "function", "function": {"name": "g"}}, {},
                        {"type": "f"}),
        "parallel_tool_calls": ("yes", 1),
        "response_format": ("json", 5, [], {"type": "xml"}, {}, {"type": "json_schema"},
                            {"type": "json_schema", "json_schema": {}}, schema(5), schema([]), schema({"type": 5}),
                            schema({"type": "hiccup"}), schema({"$ref": "http://169.254.169.254/x"}),
                            schema({"$ref": "file:///etc/passwd"}),
                            schema({"type": "integer", "minimum": 5, "maximum": 4}),
                            schema({"type": "string", "pattern": "(?=a)b"}), schema({"type": "string", "pattern": "("}),
                            schema(DEEP), schema({"enum": [f"{i}" * 9 for i in range(60_000)]})),
        "metadata": ("x", 5),
        "service_tier": ("priority", 5),
        "modalities": (["audio"], "text"),
        "store": (True, "no"),
    },
    COMPLETIONS: SAMPLED | {
        "prompt": ([], 5, {}, [[]], [5.5], [-1], [2**31], [49152], [["a"]], [[1], [2**40]], ["a"] * 65, [None], True,
                   ""),
        "logprobs": ("1", -1, 21, True),
        "echo": ("yes", 1),
        "best_of": (2, "1", 0),
    },
    RESPONSES: {
        "input": (5, [], {}, [5], [{}], [{"role": "wizard", "content": "x"}], [{"type": "item_reference"}],
                  [{"role": "user", "content": [{"type": "input_image", "image_url": "http://10.0.0.1/"}]}],
                  [{"role": "user", "content": [{"type": "input_file", "file_id": "/etc/passwd"}]}]),
        "instructions": (5, []),
        "max_output_tokens": (0, "1", 2**40),
        "temperature": ("1", 3, NAN),
        "top_p": (2, True),
        "top_logprobs": (21, "x"),
        "tool_choice": ("any", "required", {"type": "function", "name": "g"}),
        "truncation": ("auto", 5),
        "background": (True, "x"),
        "include": ("x", [5]),
        "metadata": (5,),
        "text": ({"verbosity": "low"}, {"verbosity": 5}, 5),
    },
    MESSAGES: {
        "messages": ([], "Hi", [5], [{}], [{"role": "user"}], [{"role": "wizard", "content": "x"}],
                     [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://10.0.0.1"}}]}],
                     [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "file:///x"}}]}]),
        "max_tokens": (0, -1, "1", True, None, 1.5, 2**40),
        "system": (5, {}, [5], [{"type": "image"}]),
        "temperature": (1.1, -1, "1", NAN),
        "top_p": (2, "x"),
        "top_k": (-1, 1.5),
        "stop_sequences": ("x", [""], [5], ["a"] * 17),
        "tools": ("x", [5], [{}], [{"name": 5}], [{"type": "web_search_20250305", "name": "web_search"}]),
        "tool_choice": ("any", {"type": "any"}, {"type": "tool", "name": "g"}, {"type": "x"}, {}),
        "thinking": ("on", {"type": "x"}, {"type": "enabled", "budget_tokens": -1}),
        "service_tier": ("fast",),
    },
    "/tokenize": {"content": (5, [], None), "with_pieces": ("x",)},
    "/detokenize": {"tokens": (5, "x", [-1], [49152], ["a"], [1.5], [None], [2**40])},
    "/apply-template": {"messages": ([], [5], "x"), "chat_template_kwargs": ({"tools": 1},)},
}  # fmt: skip
REFUSED = {  # parameters that we do not serve
    CHAT: ("audio", "prediction", "web_search_options", "functions", "function_call", "chat_template"),
    COMPLETIONS: ("suffix",),
    RESPONSES: ("previous_response_id", "conversation", "prompt", "max_tool_calls"),
    MESSAGES: ("container", "mcp_servers"),
}
REQUIRED = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input", MESSAGES: "max_tokens",
            "/detokenize": "tokens"}  # fmt: skip
RAW = [b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000, b'{"a":' * 5000, b"\x00",
       b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"a": 1} {"b": 2}', b'{"a": 01}',
       b"{" + b" " * 100_000, b"\xef\xbb\xbf{}x"]  # fmt: skip
NAMES = ("gpt-4", "TINY", "tiny ", "../tiny", "/etc/passwd", "./tiny", "tiny/../tiny", "C:\\tiny", "file:///tiny",
         "tiny\x00",
         "~/tiny", "https://example.com/tiny", "tiny:", "tiny:x", ":tiny", "HuggingFaceTB/SmolLM2-135M-Instruct",
         "tiny\r\nx: y", "", "%2e%2e%2ftiny", "{{7*7}}")  # fmt: skip


class Row(NamedTuple):
    name: str
    path: str
    body: Any  # an object to send as JSON, or bytes as they are
    status: int
    code: str
    param: str | None = None
    method: str = "POST"
    headers: dict[str, str] = {}
    guard: Guard = Guard()


def field_rows() -> Iterator[Row]:
    for path, fields in FIELDS.items():
        for field, values in fields.items():
            for i, value in enumerate(values):
                yield Row(f"{path} {field} {i}", path, {**BASES[path], field: value}, 400, "", field)
    for path, names in REFUSED.items():
        for field in names:
            yield Row(f"{path} {field}", path, {**BASES[path], field: {"a": 1}}, 400, UNSUPPORTED, field)
    for path, field in REQUIRED.items():
        body = {name: value for name, value in BASES[path].items() if name != field}
        yield Row(f"{path} without {field}", path, body, 400, MISSING, field)


KEYED = Guard(keys=("secret", "other"))
OPEN = Guard(host="0.0.0.0", keys=("secret",))
REMOTE = Guard(host="192.168.1.5", keys=("secret",), hosts=("llm.example",))
LISTED = Guard(origins=("http://localhost:3000",))
HOST, ORIGIN, KEY = "host_not_allowed", "origin_not_allowed", "invalid_api_key"
DOORS = [  # headers, guard, status, code
    *(({"host": host}, Guard(), 403, HOST) for host in (
        "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:8080", "0.0.0.0", "10.0.0.1",
        "[::2]", "", "127.0.0.1@evil.example", "localhost:99999999", "169.254.169.254", "evil.localhost.example")),
    ({"host": "evil.example"}, Guard(host="127.0.0.2"), 403, HOST),
    ({"host": "127.0.0.2"}, Guard(host="127.0.0.2"), 200, ""),
    ({"host": "192.168.1.5", "authorization": "Bearer secret"}, REMOTE, 200, ""),
    ({"host": "llm.example", "authorization": "Bearer secret"}, REMOTE, 200, ""),
    ({"host": "evil.example", "authorization": "Bearer secret"}, REMOTE, 403, HOST),
    ({"host": "any.example", "authorization": "Bearer secret"}, OPEN, 200, ""),
    *(({"origin": origin}, Guard(), 403, ORIGIN) for origin in (
        "http://evil.example", "https://127.0.0.1.evil.example", "null", "file://", "http://localhost:3000", "http://127.0.0.1:1",
        "chrome-extension://abc", "javascript:alert(1)")),
    ({"origin": "http://127.0.0.1"}, Guard(), 200, ""),
    ({"origin": "http://localhost:3000"}, LISTED, 200, ""),
    ({"origin": "http://localhost:3001"}, LISTED, 403, ORIGIN),
    *((headers, KEYED, 401, KEY) for headers in (
        {}, {"authorization": "secret"}, {"authorization": "Basic secret"}, {"authorization": "Bearer"},
        {"authorization": "Bearer "}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer secretx"},
        {"authorization": "Bearer secre"}, {"authorization": "Bearer SECRET"}, {"x-api-key": ""},
        {"x-api-key": "wrong"},
        {"x-api-key": "Bearer secret"}, {"api-key": "secret"}, {"cookie": "key=secret"})),
    *((headers, KEYED, 200, "") for headers in (
        {"authorization": "Bearer secret"}, {"authorization": "bearer other"}, {"x-api-key": "secret"},
        {"authorization": "Bearer wrong", "x-api-key": "other"})),
    *(({"content-type": kind}, Guard(), 415, "unsupported_media_type") for kind in (
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx",
        "text/plain; application/json", "application/xml")),
    ({"content-type": "application/json; charset=utf-8"}, Guard(), 200, ""),
    ({"content-type": "Application/JSON"}, Guard(), 200, ""),
    ({"content-length": "99999999999999999999"}, Guard(), 400, "invalid_header"),
    ({"content-length": "-1"}, Guard(), 400, "invalid_header"),
    ({"content-length": str(33 * 2**20)}, Guard(), 413, "request_too_large"),
]  # fmt: skip
PAGES = [  # method, path, status, code
    *((method, path, 404, "not_found") for method, path in (
        ("GET", "/"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/etc/passwd"), ("GET", "/v1"), ("GET", "/v1/files"),
        ("POST", "/v1/embeddings"), ("POST", "/v1/load_lora_adapter"), ("GET", "/static/../../etc/passwd"),
        ("GET", "/v1/models/../tiny"),
        ("GET", "/props"), ("GET", "/slots"), ("POST", "/v1/chat/completions/x"))),
    *((method, path, 405, "method_not_allowed") for method, path in (
        ("GET", CHAT), ("PUT", CHAT), ("DELETE", "/v1/models"), ("POST", "/v1/models"), ("POST", "/health"),
        ("GET", MESSAGES))),
    *(("GET", f"/v1/models/{name}", 404, "model_not_found") for name in (
        "gpt-4", "..%2ftiny", "..%2f..%2fetc%2fpasswd", "tiny/x", "%00", "tiny:x", "tiny%5cx")),
]  # fmt: skip


def other_rows() -> Iterator[Row]:
    for i, raw in enumerate(RAW):
        kind = BAD if raw in (b"[]", b"5", b'"x"', b"null") else "invalid_json"
        yield Row(f"raw {i}", (CHAT, COMPLETIONS, RESPONSES)[i % 3], raw, 400, kind)
    for name in NAMES:
        for path in (CHAT, MESSAGES):
            yield Row(f"{path} model {name!r}", path, {**BASES[path], "model": name}, 404, "model_not_found", "model")
    for i, (headers, guard, status, code) in enumerate(DOORS):
        yield Row(f"door {i} {headers}", CHAT, BASES[CHAT], status, code, None, "POST", headers, guard)
    for method, path, status, code in PAGES:
        yield Row(f"{method} {path}", path, {}, status, code, None, method)
    for path, field, limit in ((CHAT, "messages", "max_tokens"), (RESPONSES, "input", "max_output_tokens")):
        long = "word " * 600
        told = {field: long if path == RESPONSES else [{"role": "user", "content": long}]}
        yield Row(f"{path} long", path, {**BASES[path], **told}, 400, "context_length_exceeded", "messages")
        yield Row(f"{path} far", path, {**BASES[path], limit: 512}, 400, "context_length_exceeded", limit)
    yield Row("long prompt", COMPLETIONS, {"prompt": "x " * 600}, 400, "context_length_exceeded", "prompt")
    yield Row("longer prompt", COMPLETIONS, {"prompt": "x" * 5_000_000}, 400, "context_length_exceeded", "prompt")
    yield Row("ids", COMPLETIONS, {"prompt": [1] * 600}, 400, "context_length_exceeded", "prompt")


ROWS = [*field_rows(), *other_rows()]
ANTHROPIC = {400: "invalid_request_error", 405: "invalid_request_error",
             401: "authentication_error", 403: "permission_error", 404: "not_found_error"}  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(ROWS) >= 300


@pytest.fixture(scope="module")
def answers(service: Service) -> dict[str, httpx.Response]:
    """All rows, asked four at a time."""
    apps = {guard: create_app(service, guard) for guard in {row.guard for row in ROWS}}

    async def ask(row: Row, gate: asyncio.Semaphore) -> httpx.Response:
        raw = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
        headers = {"content-type": "application/json", **row.headers}
        transport = httpx.ASGITransport(apps[row.guard], raise_app_exceptions=True)
        async with gate, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            request = client.build_request(row.method, row.path, content=raw, headers=headers)
            return await client.send(request)

    async def all_of_them() -> list[httpx.Response]:
        gate = asyncio.Semaphore(4)
        return await asyncio.gather(*(ask(row, gate) for row in ROWS))

    return {row.name: response for row, response in zip(ROWS, asyncio.run(all_of_them()), strict=True)}


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_hostile(row: Row, answers: dict[str, httpx.Response]) -> None:
    response = answers[row.name]
    assert response.status_code == row.status, response.text[:500]
    assert response.headers["request-id"].startswith("req_")
    if row.status == 200:
        return
    said = response.json()
    if row.path.startswith(MESSAGES):
        assert said["type"] == "error" and said["error"]["type"] == ANTHROPIC[row.status] and said["request_id"]
    else:
        assert set(said["error"]) >= {"message", "type", "param", "code"}
        assert said["error"]["code"] == row.code or (not row.code and said["error"]["code"] in (BAD, UNSUPPORTED))
        assert row.param is None or (said["error"]["param"] or "").startswith(row.param), said
    assert "/work" not in response.text and "site-packages" not in response.text and "Traceback" not in response.text


def test_nothing_of_it_leaves_a_trace(service: Service, answers: dict[str, httpx.Response]) -> None:
    stats = service.scheduler.stats()
    assert stats.running == stats.waiting == stats.pages_used == service.preparing == 0 and service.scheduler.alive
