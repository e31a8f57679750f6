"""The command, its refusals, its promises; a stream adds up to the whole; the OpenAPI document against itself."""

import asyncio
import json
from typing import Any

import httpx
import pytest
import schemathesis
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazulite.cli.serve import command
from lazulite.engine.errors import UserError
from lazulite.server.app import BODIES, create_app
from lazulite.server.errors import ApiError, refused
from lazulite.server.safety import Guard
from lazulite.server.service import Service

REFUSED = [  # arguments, environment, what is said
    (["--host", "0.0.0.0"], {}, "needs --api-key"),
    (["--host", "::"], {}, "needs --api-key"),
    (["--host", "192.168.1.5"], {}, "needs --api-key"),
    (["--host", "example.com"], {}, "needs --api-key"),
    (["--host", "0.0.0.0", "--api-key", ""], {}, "API key is empty"),
    (["--adapter", "nothing"], {}, "'nothing' is not NAME=DIR"),
    (["--adapter", "=x"], {}, "'=x' is not NAME=DIR"),
    (["--adapter", "a=x", "--adapter", "a=y"], {}, "two adapters have one name"),
    (["--port", "70000"], {}, "70000"),
    (["--max-running", "0"], {}, "0 is not in the range"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "environment", "said"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_an_open_door_is_refused(arguments: list[str], environment: dict[str, str], said: str) -> None:
    done = CliRunner().invoke(command, arguments, env={"LAZULITE_API_KEY": None, **environment})
    assert done.exit_code == 2 and said in " ".join(done.output.split())


def test_help_says_each_default() -> None:
    told = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for option in command.params:
        if option.name not in ("name", "verbose", "adapters", "help"):
            after = told.split(option.opts[0])[1]
            assert "[default:" in after.split(" --")[0] or "[default:" in after.split("  --")[0][:400], option.name


def ask(service: Service, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(send())


def events(text: str) -> list[dict[str, Any]]:
    data = [event.partition("data: ")[2] for event in text.split("\n\n")]
    return [json.loads(event) for event in data if event and event != "[DONE]"]


MIXES = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 24), "temperature": st.sampled_from([0, 0.7, 1.5]), "seed": st.integers(0, 9)},
    optional={
        "n": st.integers(1, 3),
        "stop": st.lists(st.sampled_from(["a", "e", " the", "ing", "\n", "zzz", "o"]), min_size=1, max_size=3),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(1, 50),
        "min_p": st.floats(0, 0.5),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.integers(-100, 20), max_size=5),
        "logprobs": st.just(True),
        "ignore_eos": st.booleans(),
    },
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(MIXES)
def test_a_stream_adds_up_to_the_whole(service: Service, mix: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **mix}
    whole = ask(service, "/v1/chat/completions", body).json()
    told = ask(service, "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    chunks = events(told.text)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["delta"].get("content") or "" for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if mix.get("logprobs"):
            rows = [row for part in parts if part["logprobs"] for row in part["logprobs"]["content"]]
            assert [row["token"] for row in rows] == [row["token"] for row in choice["logprobs"]["content"]]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [chunks[-1]["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    assert [c["index"] for c in whole["choices"]] == list(range(mix.get("n", 1)))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(MIXES, min_size=2, max_size=5))
def test_a_crowd_hears_what_each_hears_alone(service: Service, mixes: list[dict[str, Any]]) -> None:
    shared = "What we all begin with, which is longer than a page of the cache. " * 3
    asked = [[{"role": "user", "content": shared + str(i)}] for i in range(len(mixes))]
    # Greedy: random weights make 49,152 tokens nearly alike, so that a draw would hang on the last bits of a sum.
    bodies = [{**mix, "messages": told, "temperature": 0} for told, mix in zip(asked, mixes, strict=True)]

    async def together() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    for body, answer in zip(bodies, asyncio.run(together()), strict=True):
        alone = ask(service, "/v1/chat/completions", body).json()
        heard = [choice["message"] for choice in answer.json()["choices"]]
        assert heard == [choice["message"] for choice in alone["choices"]]


def test_cors_only_for_the_origins_that_were_named(service: Service) -> None:
    async def preflight(guard: Guard, origin: str) -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service, guard))
        headers = {"origin": origin, "access-control-request-method": "POST"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.options("/v1/chat/completions", headers=headers)

    named = asyncio.run(preflight(Guard(origins=("http://app.example",)), "http://app.example"))
    assert named.status_code == 204 and named.headers["access-control-allow-origin"] == "http://app.example"
    other = asyncio.run(preflight(Guard(), "http://app.example"))
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_a_body_without_a_length_is_counted_as_it_comes(service: Service) -> None:
    async def send() -> httpx.Response:
        async def endless() -> Any:
            for _ in range(100):
                yield b" " * 1000

        transport = httpx.ASGITransport(create_app(service, Guard(max_body=20_000)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/tokenize", content=endless(), headers={"content-type": "application/json"})

    answer = asyncio.run(send())
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


LEAKS = ["[load] /home/me/models/x.gguf: bad", "see ~/models/a/b.json", "in /etc/passwd", "../../secret/file is wrong"]


@pytest.mark.parametrize("text", LEAKS)
def test_errors_have_no_paths(text: str) -> None:
    message = refused(UserError(text)).message
    assert "…" in message and not any(word in message for word in ("home", "models", "passwd", "secret"))


def test_both_apis_have_a_shape_for_every_failure() -> None:
    busy = ApiError(429, "busy", retry_after=2.4)
    openai, anthropic = (busy.response(path, "x") for path in ("/v1/chat/completions", "/v1/messages"))
    assert (openai.status_code, anthropic.status_code) == (429, 529)
    assert openai.headers["retry-after"] == anthropic.headers["retry-after"] == "2"


@pytest.mark.parametrize("path", [*BODIES, "/health", "/metrics", "/v1/models", "/v1/models/{model}"])
def test_whatever_the_document_allows_is_no_failure_of_ours(service: Service, path: str) -> None:
    app = create_app(service, Guard(hosts=("testserver",)))
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path]["POST" if path in BODIES else "GET"]

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(operation.as_strategy())
    def check(case: Any) -> None:
        response = case.call()
        assert response.status_code in (200, 400, 404), response.text

    check()


def test_the_openapi_document_names_every_body(service: Service) -> None:
    async def fetch() -> Any:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/openapi.json")).json()

    document = asyncio.run(fetch())
    for path, model in BODIES.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["$ref"].rsplit("/", 1)[1] == model.__name__ in document["components"]["schemas"]
