"""Rows: what is supervised, exactly; where a bad row is; how rows are packed."""
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lazulite.engine.errors import UserError
from lazulite.lora import data
from lazulite.models import read

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."}]
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def smol():
    return read().tokenizer()


def row_of(tokenizer, limit: int = 500, everything: bool = False, **fields) -> data.Row:
    [row] = data.Encoder(tokenizer, limit, everything).row(data.Sample("here:1", fields))
    return row


def learnt(tokenizer, row: data.Row) -> str:
    """What is supervised, its pieces with | between."""
    return "|".join(tokenizer.decode(ids, skip_special_tokens=False) for ids, is_learnt in data.runs(row) if is_learnt)


CASES = {
    "chat": (dict(messages=CHAT), "Hello!<|im_end|>|See you.<|im_end|>"),
    "chat as JSON": (dict(messages=json.dumps(CHAT)), "Hello!<|im_end|>|See you.<|im_end|>"),
    "tools": (dict(messages=CHAT, tools=WEATHER), "Hello!<|im_end|>|See you.<|im_end|>"),
    "sharegpt": (dict(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]),
                 "Yes<|im_end|>"),
    "completion": (dict(prompt="2 + 2 =", completion="4"), "4<|im_end|>"),
    "alpaca": (dict(instruction="Add.", input="2, 2", output="4"), "4<|im_end|>"),
    "text": (dict(text="To be"), " be<|im_end|>"),
    "text with its end": (dict(text="To be<|im_end|>"), " be<|im_end|>"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_learnt(name, smol) -> None:
    fields, wanted = CASES[name]
    row = row_of(smol, **fields)
    assert learnt(smol, row) == wanted
    assert len(row.tokens) == len(row.targets) and row.targets[-1] in smol.eos_token_ids
    assert list(row.tokens[1:][row.targets[:-1] >= 0]) == list(row.targets[:-1][row.targets[:-1] >= 0])


def test_the_answer_is_tokenized_as_at_inference(smol) -> None:
    row = row_of(smol, messages=CHAT)
    prompt = smol.encode(smol.apply_chat_template(CHAT[:4]), add_special_tokens=False)
    assert row.tokens[:len(prompt)].tolist() == prompt and row.targets[len(prompt) - 1] == smol.encode("See")[0]


def test_tools_are_in_the_prompt(letters) -> None:
    assert "weather" in letters.decode(row_of(letters, messages=CHAT, tools=WEATHER).tokens.tolist())


def test_everything(smol) -> None:
    row = row_of(smol, everything=True, messages=CHAT)
    assert (row.targets >= 0).all() and row.targets[-1] in smol.eos_token_ids


def test_one_bos(letters) -> None:
    """Byte 1 begins a text: the template writes it, or encode, never both."""
    for fields in (dict(messages=CHAT), dict(text="abc"), dict(text="\x01abc"), dict(prompt="a", completion="b")):
        tokens = row_of(letters, **fields).tokens.tolist()
        assert tokens[0] == 1 and 1 not in tokens[1:], fields
    letters.template = None
    row = row_of(letters, prompt="ab", completion="cd")
    assert row.tokens.tolist() == [1, *b"abcd"] and row.targets.tolist() == [-1, -1, *b"cd", 2]


def test_a_template_that_rewrites_the_past_is_refused(letters) -> None:
    """As templates do that strip the thinking of earlier answers."""
    plain = letters.apply_chat_template

    def strips(messages, **options):
        shown = [m if m is messages[-1] or m["role"] != "assistant" else {**m, "content": "…"} for m in messages]
        return plain(shown, **options)

    letters.apply_chat_template = strips
    with pytest.raises(UserError, match=r"here:1: the chat template rewrites what comes before message 3"):
        row_of(letters, messages=CHAT)
    assert row_of(letters, messages=CHAT[:3])
    assert row_of(letters, everything=True, messages=CHAT)


# rows that are too long

def test_a_long_prompt_loses_its_beginning(letters) -> None:
    encoder = data.Encoder(letters, 20)
    [row] = encoder.row(data.Sample("long:1", dict(prompt="x" * 100, completion="answer")))
    assert len(row.tokens) == 19 and row.tokens[0] == 1
    assert bytes(row.targets[row.targets >= 0].tolist()) == b"answer\x02"
    assert encoder.tally.shortened == ["long:1"]


def test_a_long_answer_is_left_out(letters) -> None:
    encoder = data.Encoder(letters, 20)
    assert encoder.row(data.Sample("long:2", dict(prompt="x", completion="y" * 50))) == []
    assert "1 left out (first long:2)" in str(encoder.tally)


def test_a_long_text_becomes_pieces_that_lose_nothing(letters) -> None:
    encoder, text = data.Encoder(letters, 16), "the quick brown fox jumps over the lazy dog"
    rows = encoder.row(data.Sample("a:1", dict(text=text)))
    assert bytes(int(t) for row in rows for t in row.targets) == text.encode() + b"\x02"
    assert all((row.targets >= 0).all() and len(row.tokens) < 16 for row in rows)
    assert encoder.tally.pieces == len(rows) == 3


def test_nothing_to_learn_is_left_out(letters) -> None:
    encoder = data.Encoder(letters, 100)
    assert encoder.row(data.Sample("a:1", dict(messages=CHAT[:2]))) == []
    assert encoder.tally.left_out == ["a:1"]


# files

ROWS = [{"prompt": "a, \"b\"\nc", "completion": "d"}, {"prompt": "ü", "completion": "🦙"}]


def write(path, rows) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(suffix, tmp_path) -> None:
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}{suffix}", ROWS)
    found = data.read(tmp_path)
    assert list(found) == ["train", "valid", "test"]
    assert all([sample.fields for sample in samples] == ROWS for samples in found.values())
    assert list(data.read(tmp_path / f"test{suffix}")) == ["train"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("train.jsonl", '{"text": "a"}\n{"text": \n', r"train.jsonl:2: not JSON"),
    ("train.json", '{"text": "a"}', "found a dict, wanted a list"),
    ("train.jsonl", "\n\n", "no rows in it"),
    ("train.jsonl", b'{"text": "\xff"}', "byte 10 is not UTF-8"),
    ("train.parquet", "no parquet", "train.parquet"),
    ("train.xml", "", "no train.jsonl"),
])
def test_bad_files_are_named(name, content, said, tmp_path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        data.read(tmp_path)


@pytest.mark.parametrize(("fields", "said"), [
    (["a"], "found a list, wanted an object"), (dict(texts="a"), "has texts\nwanted: messages; conv"),
    (dict(text=3), "text: found a int"), (dict(messages=[]), "wanted a list of messages"),
    (dict(messages=[{"content": "a"}]), "message 1: .* wanted role and content"),
    (dict(messages=[{"role": "user"}]), r"message 1 \(user\) has no content"),
    (dict(conversations=[{"from": "nobody"}]), "wanted turns with from"),
])
def test_bad_rows_are_named(fields, said, letters) -> None:
    with pytest.raises(UserError, match=f"^x.jsonl:7: (.|\n)*{said}"):
        data.Encoder(letters, 100).row(data.Sample("x.jsonl:7", fields))


def test_a_set_of_the_hub_is_its_splits(monkeypatch) -> None:
    """The package datasets is a local fake: no Hub is within reach of a test."""
    def load_dataset(path: str, name: str | None = None) -> dict[str, list[dict[str, str]]]:
        if (path, name) not in (("some/rows", None), ("some/rows", "small")):
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return {"train": ROWS if name is None else ROWS[:1], "validation": ROWS, "other": ROWS}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = data.read("some/rows")
    assert {name: [sample.fields for sample in samples] for name, samples in found.items()} == {
        "train": ROWS, "valid": ROWS}
    assert [sample.fields for sample in data.read("some/rows:small")["train"]] == ROWS[:1]
    assert found["valid"][1].place == "some/rows validation: row 2"
    with pytest.raises(UserError, match="other/rows: not a file, and not to be had from the Hub: .*doesn't exist"):
        data.read("other/rows")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="some/rows: no such file or folder") as error:
        data.read("some/rows")
    assert error.value.hint == "one on the Hub needs: pip install datasets"


def test_names_that_are_nothing() -> None:
    with pytest.raises(UserError, match="no such file"):
        data.read("nowhere/at/all.jsonl")


# packing

def row(length: int, name: str = "r") -> data.Row:
    return data.Row(name, np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(0, 500))
def test_sizes_hold_every_step_at_the_least_cost(totals, cost) -> None:
    sizes = data.rooms(totals, cost, unit=8)
    assert sizes == sorted(set(sizes)) and sizes[-1] >= max(totals)
    ends = sorted({-(-total // 8) * 8 for total in totals})

    def price(chosen) -> int:
        return cost * len(chosen) + sum(next(s for s in chosen if s >= -(-t // 8) * 8) - -(-t // 8) * 8 for t in totals)

    every = [[e for e, keep in zip(ends[:-1], format(n, f"0{len(ends)}b")[1:], strict=False) if keep == "1"] + ends[-1:]
             for n in range(1 << (len(ends) - 1))] if len(ends) < 9 else [sizes]
    assert price(sizes) == min(map(price, every))


def test_packed_rows_keep_their_borders() -> None:
    batch = data.pack([row(3), row(5)], sizes=[4, 10, 20], most=4)
    assert batch.tokens.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 0] and batch.lengths.tolist() == [3, 5, 0, 0]
    assert batch.targets.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, -1, -1] and (batch.size, batch.supervised) == (8, 8)


def test_the_order_is_each_row_once_an_epoch() -> None:
    rows = [row(1, str(i)) for i in range(7)]
    order = data.Order(rows, 3)
    epochs = [[r.place for r in order.take(7)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(r.place for r in rows) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert [r.place for r in data.Order(rows, 3, position=10).take(4)] == epochs[1][3:]
    assert [r.place for r in data.Order(rows, 4).take(7)] != epochs[0]


@pytest.mark.parametrize("tokens", [1, 30, 64, 500])
def test_groups_fill_their_tokens(tokens) -> None:
    """Each row once, no group above its tokens or its number of rows unless it is one row, and little room left."""
    lengths = np.random.default_rng(tokens).integers(1, 40, 300).tolist()
    found = data.groups(lengths, tokens)
    assert sorted(place for group in found for place in group) == list(range(300))
    sums = [sum(lengths[place] for place in group) for group in found]
    assert all(n <= tokens and len(g) <= tokens // data.SHORT or len(g) == 1 for n, g in zip(sums, found, strict=True))
    if tokens == 500:
        assert sum(sums) / len(sums) > 0.9 * tokens


def test_an_order_of_groups_goes_on_where_it_was() -> None:
    rows = [row(3 + i % 7, str(i)) for i in range(50)]
    order = data.Order(rows, 3, tokens=32)
    count = order.batches()
    epoch = [order.take(1) for _ in range(count)]
    assert sorted(r.place for group in epoch for r in group) == sorted(r.place for r in rows)
    assert max(sum(len(r.tokens) for r in group) for group in epoch) <= 32 and order.position == 50
    again = data.Order(rows, 3, position=sum(map(len, epoch[:4])), tokens=32)
    assert [[r.place for r in again.take(1)] for _ in range(2)] == [[r.place for r in group] for group in epoch[4:6]]
