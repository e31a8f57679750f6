"""The clients that people have, on the default model: every answer is read by types that we did not write."""

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

NAME = "SmolLM2-135M-Instruct"
FRANCE = [{"role": "user", "content": "Name the capital of France."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]},
}
TOOL: Any = {"type": "function", "function": WEATHER}
ANTHROPIC_TOOL: Any = {"name": WEATHER["name"], "input_schema": WEATHER["parameters"]}
STRICT: dict[str, Any] = {  # path: the published shapes of an answer, and of an event of its stream
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
    "/v1/completions": (Completion, Completion),
    "/v1/responses": (Response, ResponseStreamEvent),
    "/v1/messages": (Message, RawMessageStreamEvent),
}
GREEDY = {"temperature": 0}
OPEN, ENDED = '"finish_reason":null', '"finish_reason":"stop"'


class City(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    large: bool


@pytest.fixture(scope="module")
def client(default: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{default.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(default: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=default.url, api_key="none", max_retries=0)


# -- published shapes


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    chat = {"messages": FRANCE, "temperature": 0, "max_tokens": 8}
    yield "/v1/chat/completions", chat
    yield "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 3, "n": 2, "seed": 1, "temperature": 1}
    yield "/v1/chat/completions", {**chat, "tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
    yield "/v1/completions", {"prompt": ["One, two,", "Once"], "max_tokens": 6, "logprobs": 2, "temperature": 0}
    yield "/v1/completions", {"prompt": [504, 28, 827], "max_tokens": 6, "echo": True, "stop": "five"}
    yield "/v1/responses", {"input": "Hello", "max_output_tokens": 16, "temperature": 0}
    listed = {"input": FRANCE, "tools": [{"type": "function", **WEATHER}], "include": ["message.output_text.logprobs"]}
    yield "/v1/responses", {**listed, "max_output_tokens": 60, "tool_choice": "required", "top_logprobs": 2}
    yield "/v1/responses", {**listed, "max_output_tokens": 8, "tool_choice": "none"}
    yield "/v1/messages", {"messages": FRANCE, "max_tokens": 8, "temperature": 0, "stop_sequences": ["France"]}
    called = {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}}
    yield "/v1/messages", {"messages": FRANCE, "max_tokens": 60, **called}


@pytest.mark.parametrize(("path", "body"), list(bodies()))
def test_answers_and_events_have_the_published_shapes(default: Any, path: str, body: dict[str, Any]) -> None:
    whole, part = (TypeAdapter(shape) for shape in STRICT[path])
    answer = httpx.post(default.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    whole.validate_json(answer.text, strict=True)
    options = {} if "messages" in path or "responses" in path else {"stream_options": {"include_usage": True}}
    events = httpx.post(default.url + path, json={**body, "stream": True, **options}, timeout=60).text.split("\n\n")
    assert len(events) > 4
    for event in events:
        data = event.partition("data: ")[2]
        if data and data != "[DONE]":  # the SDK's type knows no unfinished choice of a completion; the API does
            part.validate_json(data.replace(OPEN, ENDED) if path == "/v1/completions" else data, strict=True)


def test_models_tell_the_context_in_every_spelling(client: openai.OpenAI, default: Any) -> None:
    row = client.models.list().data[0]
    TypeAdapter(Model).validate_python(row.model_dump(), strict=True)
    found = httpx.get(f"{default.url}/v1/models/{NAME}").json()
    assert row.id == found["id"] == NAME
    assert found["max_model_len"] == found["context_length"] == found["context_window"] == 8192
    assert found["meta"]["n_ctx_train"] == 8192


# -- openai


def test_openai_chat_streams_what_it_says_whole(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "messages": FRANCE, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    assert "Paris" in whole.choices[0].message.content and whole.usage.completion_tokens <= 24
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_parses_a_structure(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "Describe Paris as JSON."}]
    found = client.chat.completions.parse(
        model=NAME, messages=asked, response_format=City, temperature=0, max_tokens=200
    )
    assert isinstance(found.choices[0].message.parsed, City)
    as_response = client.responses.parse(model=NAME, input=asked, text_format=City, max_output_tokens=200)
    assert isinstance(as_response.output_parsed, City)


def test_openai_tools_go_round(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    options: Any = {"model": NAME, "tools": [TOOL], "temperature": 0, "max_tokens": 80}
    first = client.chat.completions.create(messages=messages, tool_choice=named, **options).choices[0]
    assert first.finish_reason == "tool_calls"
    call = first.message.tool_calls[0]
    assert call.function.name == "get_weather" and isinstance(json.loads(call.function.arguments)["city"], str)
    with client.chat.completions.stream(messages=messages, tool_choice=named, **options) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments and streamed.id
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}]
    answer = client.chat.completions.create(messages=messages, **options)
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_openai_responses(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "input": FRANCE[0]["content"], "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(**options)
    assert "Paris" in whole.output_text and whole.usage.total_tokens > 30 and whole.store is False
    events = list(client.responses.create(**options, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type.startswith("response.")
    assert events[-1].response.output_text == whole.output_text


def test_openai_completions_with_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 6, "logprobs": 3}
    whole = client.completions.create(**options).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text and "four" in whole.text
    assert all(max(top.values()) <= 0 and len(top) == 3 for top in whole.logprobs.top_logprobs)
    parts = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    rows = [part.logprobs for part in parts if part.logprobs]
    assert [token for row in rows for token in row.tokens] == whole.logprobs.tokens
    assert [offset for row in rows for offset in row.text_offset] == whole.logprobs.text_offset


def test_the_prompt_s_logprobs_come_with_its_echo(client: openai.OpenAI) -> None:
    """As lm-evaluation-harness asks for the likelihood of a text."""
    options: Any = {"model": NAME, "prompt": "The capital of France is Paris", "echo": True, "logprobs": 1}
    whole = client.completions.create(**options, max_tokens=1, temperature=0).choices[0]
    rows = whole.logprobs
    assert "".join(rows.tokens) == whole.text and rows.token_logprobs[0] is None
    paris = rows.tokens.index(" Paris")
    assert rows.token_logprobs[paris] == max(rows.top_logprobs[paris].values()) and rows.token_logprobs[1] < 0
    assert [whole.text[at:].startswith(token) for at, token in zip(rows.text_offset, rows.tokens, strict=True)]
    parts = [c.choices[0] for c in client.completions.create(**options, max_tokens=1, temperature=0, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    assert [lp for part in parts if part.logprobs for lp in part.logprobs.token_logprobs] == rows.token_logprobs


def test_an_error_is_the_sdk_s_own(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=FRANCE)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    long: Any = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(openai.BadRequestError) as overflow:
        client.chat.completions.create(model=NAME, messages=long)
    assert overflow.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(model=NAME, max_tokens=5, messages=long)


# -- anthropic


def test_anthropic_messages_stream_what_they_say_whole(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": NAME, "messages": FRANCE, "max_tokens": 24, "extra_body": GREEDY, "system": "Be brief."}
    whole = claude.messages.create(**options)
    assert "Paris" in whole.content[0].text and whole.stop_reason in ("max_tokens", "end_turn")
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        last = stream.get_final_message()
    assert last.stop_reason == whole.stop_reason and last.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model=NAME, messages=FRANCE, system="Be brief.")
    assert isinstance(counted, MessageTokensCount)
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_anthropic_tools_go_round(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    options: Any = {"model": NAME, "max_tokens": 80, "tools": [ANTHROPIC_TOOL], "extra_body": GREEDY}
    choice: Any = {"type": "tool", "name": "get_weather"}
    first = claude.messages.create(messages=messages, tool_choice=choice, **options)
    use = first.content[-1]
    assert first.stop_reason == "tool_use" and use.type == "tool_use" and isinstance(use.input["city"], str)
    with claude.messages.stream(messages=messages, tool_choice=choice, **options) as stream:
        assert stream.get_final_message().content[-1].input == use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny, 21 degrees."}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(messages=messages, **options).content


def test_anthropic_says_which_stop_sequence(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": NAME, "messages": FRANCE, "max_tokens": 24, "extra_body": GREEDY}
    said = claude.messages.create(**options, stop_sequences=["zzz", " is"])
    assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", " is") and " is" not in said.content[0].text


# -- those that stand on them


def test_langchain(default: Any) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=NAME, base_url=f"{default.url}/v1", api_key="none", temperature=0, max_tokens=24)
    whole = model.invoke("Name the capital of France.").content
    assert "Paris" in whole
    assert "".join(str(chunk.content) for chunk in model.stream("Name the capital of France.")) == whole
    called = model.bind_tools([TOOL], tool_choice="get_weather").bind(max_tokens=80).invoke("The weather in Paris?")
    assert called.tool_calls[0]["name"] == "get_weather" and isinstance(called.tool_calls[0]["args"]["city"], str)
    structured = model.with_structured_output(City, method="json_schema").bind(max_tokens=200)
    assert isinstance(structured.invoke("Describe Paris as JSON."), City)


def test_litellm(default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    import litellm

    options: Any = {"model": f"openai/{NAME}", "api_base": f"{default.url}/v1", "api_key": "none", "temperature": 0}
    whole = litellm.completion(messages=FRANCE, max_tokens=24, **options).choices[0].message.content
    assert "Paris" in whole
    parts = litellm.completion(messages=FRANCE, max_tokens=24, stream=True, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **options)


# -- text, templates, metrics


def test_tokens_there_and_back(default: Any) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(default.url + path, json=body).json()

    text = "Zwölf Boxkämpfer 🥊"
    found = post("/tokenize", content=text)
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 8192
    assert post("/detokenize", tokens=found["tokens"])["content"] == text
    pieces = post("/tokenize", prompt=text, with_pieces=True)["tokens"]
    spelled = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(spelled).decode() == text
    prompt = post("/apply-template", messages=FRANCE)["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n") and FRANCE[0]["content"] in prompt
    assert post("/tokenize", messages=FRANCE)["tokens"] == post("/tokenize", content=prompt)["tokens"]


def test_metrics_count(default: Any, client: openai.OpenAI) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{default.url}/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    before = read()
    prompt = "The history of the city of Paris begins long before the Romans. " * 8
    for _ in range(2):
        client.completions.create(model=NAME, prompt=prompt, max_tokens=4)
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["lazulite_generation_tokens_total"] == 8 and grown["lazulite_prefix_cache_hits_total"] >= 64
    assert grown["lazulite_time_to_first_token_seconds_count"] == 2
    assert grown["lazulite_inter_token_latency_seconds_count"] == 6
    assert after["lazulite_requests_running"] == after["lazulite_requests_waiting"] == 0


SAME = [  # parameter, value, what it does to a greedy answer
    ("logit_bias", {"7042": 100}, lambda text, plain: text != plain),
    ("logit_bias", {}, lambda text, plain: text == plain),
    ("top_k", 1, lambda text, plain: text == plain),
    ("stop", ["ne"], lambda text, plain: text == plain.split("ne")[0]),
    ("seed", 5, lambda text, plain: text == plain),
    ("frequency_penalty", 2, lambda text, plain: text != plain),
    ("repetition_penalty", 3, lambda text, plain: text != plain),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "holds"), SAME, ids=[row[0] for row in SAME])
def test_parameters_do_something(
    client: openai.OpenAI, name: str, value: Any, holds: Callable[[str, str], bool]
) -> None:
    def ask(**body: Any) -> str:
        options: Any = {"model": NAME, "prompt": "one two one two one two one", "temperature": 0, "max_tokens": 16}
        return client.completions.create(**options, extra_body=body).choices[0].text

    assert holds(ask(**{name: value}), ask())
