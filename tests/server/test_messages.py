"""Inputs of the three APIs become template messages; every family's template gets them in a way that it takes."""

import json
import re

import pytest
from dialects import FAMILIES, tokenizer

from lazulite.engine.errors import UserError
from lazulite.models import read
from lazulite.server import messages, tools
from lazulite.server.prompts import render

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
SENT = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
RESULT = {"role": "tool", "content": "7 °C", "tool_call_id": "call_1", "name": "weather"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "strict": False,
                                         "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
USER = {"role": "user", "content": "Hi"}
ROWS = [  # function, its arguments, template messages
    (messages.chat, [[USER]], [USER]),
    (messages.chat, [[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]],
     [{"role": "user", "content": "ab"}]),
    (messages.chat, [[{"role": "developer", "content": "Be kind."}]], [{"role": "developer", "content": "Be kind."}]),
    (messages.chat, [[USER, {"role": "assistant", "content": None, "tool_calls": [SENT]},
                      {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "7 °C"}]}]],
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]),
    (messages.chat, [[{"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}]],
     [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}]),
    (messages.chat, [[{"role": "assistant", "content": "Yes", "reasoning": "Hm"}]],
     [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}]),
    (messages.chat, [[{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]],
     [{"role": "assistant", "content": "No."}]),
    (messages.anthropic, [[USER], "Be kind."], [{"role": "system", "content": "Be kind."}, USER]),
    (messages.anthropic, [[USER], [{"type": "text", "text": "x-anthropic-billing-header: cch=1"},
                                   {"type": "text", "text": "A"}, {"type": "text", "text": "B"}]],
     [{"role": "system", "content": "A\n\nB"}, USER]),
    (messages.anthropic, [[{"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Hm", "signature": ""}, {"type": "text", "text": "See"},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Zürich"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "7 °C"}]},
            {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}]}]],
     [{"role": "assistant", "content": "See", "reasoning_content": "Hm", "tool_calls": [CALL]}, RESULT,
      {"role": "user", "content": "And?"}]),
    (messages.anthropic, [[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]],
     [{"role": "tool", "content": "", "tool_call_id": "x", "name": ""}]),
    (messages.anthropic, [[USER, {"role": "system", "content": "Now French."}]],
     [USER, {"role": "system", "content": "Now French."}]),
    (messages.responses, ["Hi", "Be kind."], [{"role": "system", "content": "Be kind."}, USER]),
    (messages.responses, [[
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}], "encrypted_content": None},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Zürich"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "7 °C"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "7", "annotations": []}]}]],
     [USER, {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": [CALL]}, RESULT,
      {"role": "assistant", "content": "7"}]),
    (messages.tools_chat, [[{"type": "function", "function": {"name": "weather", "description": "of a city"}}]],
     [TOOL]),
    (messages.tools_anthropic, [[{"name": "weather", "description": "of a city", "input_schema": None}]], [TOOL]),
    (messages.tools_responses, [[{"type": "function", "name": "weather", "description": "of a city"},
                                 {"type": "web_search"}, {"type": "namespace", "tools": []}]], [TOOL]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "wanted"), ROWS, ids=lambda value: getattr(value, "__name__", ""))
def test_inputs_become_template_messages(function, given, wanted) -> None:
    assert function(*given) == wanted


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    broken = {**SENT, "function": {"name": "weather", "arguments": "{oops"}}
    told = messages.chat([{"role": "assistant", "tool_calls": [broken]}])
    assert told[0]["tool_calls"][0]["function"]["arguments"] == "{oops"


IMAGE = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
BAD = [  # function, its arguments, what the error names
    (messages.chat, [[USER, {"role": "user", "content": IMAGE}]], "messages[1].content[1]: image_url is not supported"),
    (messages.chat, [[{"role": "user", "content": [{"type": "input_audio"}]}]], "messages[0].content[0]: input_audio"),
    (messages.chat, [[{"role": "user", "content": ["a"]}]], "messages[0].content[0]: str"),
    (messages.chat, [[{"role": "user", "content": [{"type": "text", "text": 1}]}]], "messages[0].content[0].text"),
    (messages.chat, [[{"role": "user", "content": 7}]], "messages[0].content: found a int"),
    (messages.chat, [[{"role": "user"}]], "messages[0].content: missing"),
    (messages.chat, [[{"role": "owner", "content": ""}]], "messages[0].role: found 'owner'"),
    (messages.chat, [[{"content": ""}]], "messages[0].role: found None"),
    (messages.chat, [[{"role": "assistant", "tool_calls": "x"}]], "messages[0].tool_calls: found a str"),
    (messages.chat, [[{"role": "assistant", "tool_calls": [{"id": "x"}]}]],
     "messages[0].tool_calls[0]: wanted a function with a name"),
    (messages.anthropic, [[{"role": "user", "content": [{"type": "image"}]}]], "messages[0].content[0]: image"),
    (messages.anthropic, [[{"role": "user", "content": [{"type": "document"}]}]], "messages[0].content[0]: document"),
    (messages.anthropic, [[{"role": "tool", "content": "x"}]], "messages[0].role: found 'tool'"),
    (messages.anthropic, [[{"role": "user"}]], "messages[0].content: found a NoneType"),
    (messages.anthropic, [[USER], 7], "system: found a int"),
    (messages.responses, [[{"type": "item_reference", "id": "x"}]], "input[0]: type 'item_reference'"),
    (messages.responses, [[{"role": "user", "content": [{"type": "input_image"}]}]],
     "input[0].content[0]: input_image"),
    (messages.responses, [["x"]], "input[0]: it is not supported"),
    (messages.tools_chat, [[{"type": "custom", "custom": {}}]], "tools[0].type: 'custom' is not supported"),
    (messages.tools_chat, [["x"]], "tools[0]: found a str"),
    (messages.tools_chat, [[{"type": "function"}]], "tools[0].function.name: found None"),
    (messages.tools_chat, [[{"type": "function", "function": {"name": 'a"b'}}]],
     "tools[0].function.name: found 'a\"b'"),
    (messages.tools_chat, [[{"type": "function", "function": {"name": "f", "parameters": "x"}}]],
     "tools[0].function.parameters: found a str"),
    (messages.tools_anthropic, [[{"type": "web_search_20250305", "name": "web_search"}]],
     "tools[0].type: 'web_search_"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "named"), BAD)
def test_what_is_wrong_is_named(function, given, named) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        function(*given)


# -- prompts ---------------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "RULES"}
LATER = {"role": "system", "content": "LATER"}
ANSWER = {"role": "assistant", "content": "ANSWER"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TALKS = {
    "plain": [USER],
    "system": [SYSTEM, USER, ANSWER, USER],
    "developer": [{"role": "developer", "content": "RULES"}, USER],
    "two systems": [SYSTEM, LATER, USER],
    "system in the middle": [SYSTEM, USER, ANSWER, LATER, USER],
    "system at the end": [USER, LATER],
    "users in a row": [USER, USER, ANSWER],
    "tools": [SYSTEM, USER, CALLED, RESULT, ANSWER, USER],
    "thoughts": [USER, {**ANSWER, "reasoning_content": "THOUGHT"}, USER],
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_template_takes_every_conversation(family: str, talk: str) -> None:
    prompt = render(tokenizer(family), TALKS[talk], [TOOL] if talk == "tools" else None)
    said = [message["content"] for message in TALKS[talk] if message["role"] != "tool"]
    assert all(text in prompt for text in said), "something is lost"
    if talk == "tools":
        assert "weather" in prompt and "7 °C" in prompt
    assert "strict" not in prompt


def test_a_template_without_tools_is_taught_them() -> None:
    own = read().tokenizer()
    assert tools.detect(own).name == "smollm"
    prompt = render(own, TALKS["tools"], [TOOL])
    assert prompt.index("RULES") < prompt.index('"description": "of a city"') < prompt.index("Hi")
    assert '<tool_call>[{"name": "weather", "arguments": {"city": "Zürich"}}]</tool_call>' in prompt
    assert "<tool_response>7 °C</tool_response>" in prompt and "assistant named SmolLM" not in prompt
    assert render(own, [USER], [TOOL]).count("<tools>") == 1 and "<tools>" not in render(own, [USER])


def test_what_no_repair_helps_is_refused_with_the_templates_words() -> None:
    never = {**CALL, "function": {"name": "never", "arguments": {}}}
    with pytest.raises(UserError, match="not this one"):
        render(tokenizer("llama"), [USER, {**CALLED, "tool_calls": [never]}, RESULT], [TOOL])


def test_a_template_that_reads_one_call_gets_them_one_by_one() -> None:
    other = {**CALL, "id": "call_2", "function": {"name": "now", "arguments": {}}}
    noon = {"role": "tool", "content": "NOON", "tool_call_id": "call_2", "name": "now"}
    prompt = render(tokenizer("llama"), [USER, {**CALLED, "tool_calls": [CALL, other]}, RESULT, noon, ANSWER], [TOOL])
    places = [prompt.index(text) for text in ('weather{"city"', "7 °C", "now{}", "NOON", "ANSWER")]
    assert places == sorted(places) and prompt.count("7 °C") == prompt.count("NOON") == 1


def test_smollm3_gets_tools_by_its_own_name() -> None:
    own = tokenizer("hermes")
    wants = "{{ xml_tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    own = type(own)(own.backend, own.config, wants, [])
    assert '"description": "of a city"' in render(own, [USER], [TOOL])


def test_thoughts_that_a_template_refuses_are_left_out() -> None:
    own = tokenizer("hermes")
    refuses = "{% for m in messages %}{{ raise_exception('no') if m.reasoning_content else m.content }}{% endfor %}"
    own = type(own)(own.backend, own.config, refuses, [])
    assert render(own, [USER, {**ANSWER, "reasoning_content": "Hm"}, USER]) == "HiANSWERHi"


def test_nesting_that_nobody_can_follow_is_refused() -> None:
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    call = {**CALL, "function": {"name": "weather", "arguments": deep}}
    for family in ("hermes", "smollm"):
        with pytest.raises(UserError):
            render(tokenizer(family), [USER, {**CALLED, "tool_calls": [call]}, RESULT], [TOOL])


def test_thinking_of_earlier_turns_has_the_templates_name() -> None:
    assert "<think>THOUGHT</think>" in render(tokenizer("hermes"), TALKS["thoughts"])
    assert "<|channel|>THOUGHT" in render(tokenizer("harmony"), TALKS["thoughts"])


def test_arguments_reach_templates_that_want_a_string() -> None:
    own = tokenizer("hermes")
    wants = "{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
    own = type(own)(own.backend, own.config, wants + "{{ c.function.arguments + '' }}{% endfor %}{% endfor %}", [])
    assert json.dumps(CALL["function"]["arguments"], ensure_ascii=False) in render(own, [USER, CALLED, RESULT], [TOOL])
