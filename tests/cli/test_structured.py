"""`llm generate --json-schema`, `--regex`, `--adapter` as people run them; `llm chat` shows what a model thinks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from lazulite.cli.chat import show
from lazulite.server.parser import Piece

LLM = [sys.executable, "-m", "lazulite.cli"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def llm(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*LLM, *args], capture_output=True, encoding="utf-8", timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_a_schema_is_obeyed(tmp_path: Path) -> None:
    (tmp_path / "city.json").write_text(json.dumps(SCHEMA))
    options = ["--json-schema", str(tmp_path / "city.json"), "--temp", "1", "--seed", "3", "--json"]
    found = json.loads(llm("generate", "-p", "Describe Rome as JSON.", *options).stdout)
    jsonschema.validate(json.loads(found["text"]), SCHEMA)
    assert found["finish_reason"] == "stop"


def test_a_regex_is_obeyed_without_a_template_too() -> None:
    done = llm("generate", "--raw", "-p", "One plus one is", "--regex", " [0-9]{1,2}[.]")
    assert re.fullmatch(r" [0-9]{1,2}[.]\n", done.stdout)


BAD = [  # what is in the file, the options, exit code, what stderr says
    (None, [], 1, "schema.json: No such file or directory"),
    ("{oops", [], 1, "schema.json: not JSON: Expecting property name"),
    ("[" * 100_000, [], 1, "schema.json: not JSON"),
    ('["x"]', [], 1, "[json_schema] found a list, wanted an object"),
    ('{"type": "object", "if": {}}', [], 1, '[json_schema] keyword "if" is not supported'),
    ("{}", ["--regex", "a"], 2, "--json-schema and --regex exclude each other"),
    ("{}", ["--adapter", "no-such-folder"], 1, "no-such-folder"),
]


@pytest.mark.parametrize(("text", "options", "code", "message"), BAD)
def test_what_is_wrong_is_said_in_two_lines(tmp_path: Path, text, options, code, message) -> None:
    if text is not None:
        (tmp_path / "schema.json").write_text(text)
    done = llm("generate", "-p", "Hi", "--json-schema", str(tmp_path / "schema.json"), *options, code=code)
    assert message in done.stderr and not done.stdout and len(done.stderr.splitlines()) == 2


def test_an_adapter_changes_what_is_said(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    rng, path = np.random.default_rng(0), "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = rng.standard_normal((2, 576)), rng.standard_normal((576, 2))
    weights = {f"{path}.lora_A.weight": a.astype(np.float32), f"{path}.lora_B.weight": b.astype(np.float32)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    asked = ["generate", "-p", "What is the capital of France?", "--max-tokens", "8"]
    assert llm(*asked).stdout != llm(*asked, "--adapter", str(tmp_path)).stdout != ""


def test_thinking_is_set_apart(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"text": "", "reasoning": ""}
    show([Piece("reasoning", "Hm"), Piece("reasoning", "."), Piece("text", "Yes"), Piece("text", "!")], said)
    out, err = capsys.readouterr()
    assert said == {"text": "Yes!", "reasoning": "Hm."} and (out.strip(), err) == ("Yes!", "Hm.")
