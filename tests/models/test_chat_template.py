"""Chat templates render as transformers renders them, and cannot reach out of the sandbox."""

import pytest

from lazulite.engine.errors import UserError
from lazulite.models import chat_template

CHAT = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Ça va?\n"},
    {"role": "assistant", "content": "Yes.", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "  {%- for m in messages %}\n  {% if m.role == 'user' %}\n U: {{ m.content | trim }}\n {% endif %}\n"
    "{% endfor %}",
    "json": "{{ tools | tojson }} {{ messages[2] | tojson(indent=2) }} {{ messages | tojson(sort_keys=true) }}",
    "loop-controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "generation-set": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}",
    "concatenation": "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ 1 + 1 ~ missing ~ none }}{% endfor %}",
    "arithmetic": "{{ 'ab' * 3 + 'c' }}{{ 2 ** 10 % 7 }}{{ '%s-%03d' % ('x', 7) }}{{ [1] + [2] }}"
    "{{ '{:>6}'.format(3) }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') | upper | center(40) | replace('U', 'u') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[0].content | indent(2) }}",
    "recursive": "{% for m in [[1, [2]], [3]] recursive %}{{ loop.depth }}"
    "{% if m is iterable %}{{ loop(m) }}{% endif %}{% endfor %}",
    "call-block": "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}x{% endcall %}",
    "else": "{% for m in [] %}x{% else %}none{% endfor %}",
    "macro": "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
    "thinking": "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}",
    "undefined": "{{ missing }}{% if tools is defined and tools is not none %}tools{% endif %}{{ bos_token }}",
    "methods": "{{ messages[1].content.strip().upper().split('A')[0] }}{{ messages[0].items() | list | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_equals_transformers(name: str, tools: list | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"tools": tools, "add_generation_prompt": True, "bos_token": "<s>", "enable_thinking": False}
    want = render_jinja_template([CHAT], chat_template=TEMPLATES[name], **options)[0][0]
    assert chat_template.render(TEMPLATES[name], CHAT, documents=None, **options) == want


DOUBLING = "{% set n = namespace(x='ab') %}{% for a in range(99) %}"
REFUSED = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{% for m in %}": "line 1: ",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{{ missing.field }}": "'missing' is undefined",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ messages.append(1) }}": "not safely callable|is not safely|unsafe",
    "{{ (''|attr('__class__')).__mro__ }}": "unsafe|undefined",
    "{{ range(10000000) | list }}": "range|Range",
    "{% include 'x' %}": "no loader",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "does not end",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "does not end|RecursionError",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": "does not end",
    DOUBLING + "{% set n.x = n.x ~ n.x %}{% endfor %}": "does not end",
    DOUBLING + "{% set n.x = n.x + n.x %}{% endfor %}": "does not end",
    DOUBLING + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}": "does not end",
    "{% for a in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}": "does not end",
    "{{ 'x' * 999999999999 }}": "more than 67,108,864 characters",
    "{{ [0] * 9999999999 }}": "more than 67,108,864 characters",
    "{{ 9 ** 9 ** 9 }}": "more than 67,108,864 characters",
    "{{ 'x'.ljust(9999999999) }}": "more than 67,108,864 characters",
    "{{ 'x' | center(9999999999) }}": "more than 67,108,864 characters",
    "{{ '%9999999999d' % 1 }}": "more than 67,108,864 characters",
    "{{ '{:9999999999}'.format(1) }}": "more than 67,108,864 characters",
    "{{ range(99999) | join('x' * 99999) }}": "more than 67,108,864 characters",
    "{{ ('x' * 99999).replace('x', 'y' * 99999) }}": "more than 67,108,864 characters",
    "{{ messages | tojson(indent=99999999999) }}": "more than 67,108,864 characters",
}


@pytest.mark.parametrize("template", REFUSED)
def test_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    chat_template.environment()  # Jinja is imported before the clock runs
    with pytest.raises(UserError, match=REFUSED[template]) as error:
        chat_template.render(template, CHAT)
    assert "--raw" in error.value.hint


def test_messages_stay_as_they_are() -> None:
    before = repr(CHAT)
    chat_template.render(TEMPLATES["chatml"], CHAT, add_generation_prompt=False)
    assert repr(CHAT) == before
