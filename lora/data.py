"""Rows to learn from: files to samples, samples to token ids and which of them are supervised.

| a sample has | it is | supervised |
|---|---|---|
| messages (and tools) | a conversation through the chat template | every assistant message and its end token |
| conversations | the same in ShareGPT's words (from, value) | as above |
| prompt, completion; instruction, input, output | a conversation of one turn; without a template, text | the answer |
| text | text | all of it, and the end token |
| document (a .txt file) | text | all of it |
"""
from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine.errors import UserError

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
IGNORED = -1                           # the target of a token that is not supervised
OPEN, SHORT = 16, 8                    # groups that still take rows, and the fewest tokens that a row counts


class Sample(NamedTuple):
    place: str                         # file and line, for messages
    fields: dict[str, Any]


class Row(NamedTuple):
    """tokens (T) int32 and, for each, the token that must follow: targets (T) int32, or -1 where nothing is learnt."""

    place: str
    tokens: np.ndarray
    targets: np.ndarray

    @property
    def supervised(self) -> int:
        return int((self.targets != IGNORED).sum())


# files to samples

def read(source: str | os.PathLike[str]) -> dict[str, list[Sample]]:
    """The splits train, valid and test, as far as they are there, of a folder of .jsonl, .json, .parquet or .csv files
    with these names (validation is valid), of one file (train), or of a data set on the Hugging Face Hub."""
    path = Path(source)
    if path.is_file():
        return {"train": samples(path)}
    if not path.is_dir():
        return from_hub(str(source))
    found = {}
    for split, names in SPLITS.items():
        files = [f for name in names for f in sorted(path.iterdir())
                 if f.suffix in READERS and re.fullmatch(rf"{name}(-\d+-of-\d+)?", f.stem)]
        if files:
            found[split] = [sample for file in files for sample in samples(file)]
    if not found:
        raise UserError(f"{path}: no train.jsonl in it", f"wanted: train, valid, test as {', '.join(READERS)}")
    return found


def samples(path: Path) -> list[Sample]:
    if path.suffix not in READERS:
        raise UserError(f"{path}: files of this kind are not read", f"wanted: {', '.join(READERS)}")
    try:
        found = [Sample(place, fields) for place, fields in READERS[path.suffix](path)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8") from None
    if not found:
        raise UserError(f"{path}: no rows in it")
    return found


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(path.read_text("utf-8"), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: found a {type(rows).__name__}, wanted a list of rows")
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {str(error)[:80]}") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need the package pyarrow", "pip install pyarrow") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {str(error)[:200]}") from None
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
    ".txt": lambda path: iter([(str(path), {"document": path.read_text("utf-8")})])}


def from_hub(name: str) -> dict[str, list[Sample]]:
    """A data set by its Hub id, `owner/name` or `owner/name:configuration`."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) or name.endswith(tuple(READERS)):
        raise UserError(f"{name}: no such file or folder")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: no such file or folder", "one on the Hub needs: pip install datasets") from None
    try:
        found = datasets.load_dataset(*name.split(":"))
    except Exception as error:  # many kinds, of several libraries
        raise UserError(f"{name}: not a file, and not to be had from the Hub: {str(error)[:150]}") from None
    return {split: [Sample(f"{name} {key}: row {i}", row) for i, row in enumerate(found[key], 1)]
            for split, names in SPLITS.items() for key in names if key in found}


# samples to rows

@dataclass
class Tally:
    """What became of the samples."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    pieces: int = 0                    # rows that a too long text became
    shortened: list[str] = field(default_factory=list)     # places where the prompt lost its beginning
    left_out: list[str] = field(default_factory=list)      # places whose answer is too long, or empty

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens:,} tokens, {self.supervised:,} supervised, longest {self.longest}"
        texts = [f"{self.pieces} pieces of too long texts"] if self.pieces else []
        for what, places in ("prompts shortened", self.shortened), ("left out", self.left_out):
            texts += [f"{len(places)} {what} (first {places[0]})"] if places else []
        return "; ".join([text, *texts])


class Encoder:
    """Samples to rows of at most `limit` tokens.

    A text that is longer becomes several rows. Of a conversation that is longer, the prompt loses its beginning; where
    not even that leaves a token before the answer, the row is left out. `everything` supervises prompts too.
    """

    def __init__(self, tokenizer: Any, limit: int, everything: bool = False):
        if limit < 2:
            raise UserError(f"[lora] max_seq_length is {limit}, wanted at least 2")
        self.tokenizer, self.limit, self.everything = tokenizer, limit, everything
        self.tally = Tally()
        named = tokenizer.special_tokens
        self.bos, self.eos = (self._id(named.get(name)) for name in ("bos_token", "eos_token"))
        self.ends = set(tokenizer.eos_token_ids)

    def _id(self, token: str | None) -> int | None:
        ids = self.tokenizer.encode(token, add_special_tokens=False) if token else []
        return ids[0] if len(ids) == 1 else None

    def rows(self, samples: Iterable[Sample]) -> list[Row]:
        """All rows, in order. `tally` counts them. UserError names the place of a sample that is none."""
        return [row for sample in samples for row in self.row(sample)]

    def row(self, sample: Sample) -> list[Row]:
        fields, place = sample.fields, sample.place
        if not isinstance(fields, dict):
            raise UserError(f"{place}: found a {type(fields).__name__}, wanted an object")
        for keys, encode in KINDS.items():
            if all(fields.get(key) is not None for key in keys):
                ids, learnt = encode(self, fields, place)
                break
        else:
            wanted = "; ".join(", ".join(keys) for keys in KINDS)
            raise UserError(f"{place}: has {', '.join(map(str, fields)) or 'nothing'}", f"wanted: {wanted}")
        if self.everything:
            learnt = [True] * len(ids)
        end = max((i for i, is_learnt in enumerate(learnt) if is_learnt), default=0) + 1
        parts = self._fitted(place, ids[:end], learnt[:end])   # what follows the last answer teaches nothing
        return [self._counted(place, *part) for part in parts]

    def _counted(self, place: str, ids: list[int], learnt: list[bool]) -> Row:
        tokens = np.array(ids, np.int32)
        row = Row(place, tokens[:-1], np.where(learnt[1:], tokens[1:], IGNORED).astype(np.int32))
        tally = self.tally
        tally.rows, tally.tokens = tally.rows + 1, tally.tokens + len(row.tokens)
        tally.supervised, tally.longest = tally.supervised + row.supervised, max(tally.longest, len(row.tokens))
        return row

    def _fitted(self, place: str, ids: list[int], learnt: list[bool]) -> list[tuple[list[int], list[bool]]]:
        """A sample's tokens as rows within the limit."""
        limit, over = self.limit, len(ids) - self.limit
        if not any(learnt[1:]):
            self.tally.left_out.append(place)
            return []
        if over <= 0:
            return [(ids, learnt)]
        if all(learnt):
            starts = range(0, len(ids) - 1, limit - 1)     # each begins with the last one's end, as what goes before
            self.tally.pieces += len(starts)
            return [(ids[i:i + limit], learnt[i:i + limit]) for i in starts]
        keep = int(ids[0] == self.bos)
        if learnt.index(True) <= over + keep:
            self.tally.left_out.append(place)
            return []
        self.tally.shortened.append(place)
        over += keep
        return [(ids[:keep] + ids[over:], learnt[:keep] + learnt[over:])]

    # kinds of samples: token ids, and which are learnt

    def text(self, fields: dict[str, Any], place: str) -> tuple[list[int], list[bool]]:
        ids = self._plain(_string(fields, "text", place))
        ids += [self.eos] if self.eos is not None and ids[-1:] != [self.eos] else []
        return ids, [True] * len(ids)

    def _plain(self, text: str) -> list[int]:
        """Token ids of text that no template wrote; it may begin with the token that encode puts first."""
        ids = self.tokenizer.encode(text)
        return ids[1:] if self.bos is not None and ids[:2] == [self.bos] * 2 else ids

    def plain(self, fields: dict[str, Any], place: str) -> tuple[list[int], list[bool]]:
        ids = self._plain(fields["document"])
        return ids, [True] * len(ids)

    def completion(self, fields: dict[str, Any], place: str) -> tuple[list[int], list[bool]]:
        prompt, answer = (_string(fields, key, place) for key in ("prompt", "completion"))
        if self.tokenizer.template:
            return self._answered(prompt, answer, None, place)
        ids, start = self._joined(self._plain(prompt + answer), self._plain(prompt))
        ids += [self.eos] if self.eos is not None and ids[-1:] != [self.eos] else []
        return ids, [i >= start for i in range(len(ids))]

    def instruction(self, fields: dict[str, Any], place: str) -> tuple[list[int], list[bool]]:
        parts = [_string(fields, key, place) for key in ("instruction", "input") if fields.get(key)]
        given = {"prompt": "\n\n".join(parts), "completion": _string(fields, "output", place)}
        return self.completion(given, place)

    def _answered(self, prompt: str, answer: str, tools: Any, place: str) -> tuple[list[int], list[bool]]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return self.conversation(turns, tools, place)

    def chat(self, fields: dict[str, Any], place: str) -> tuple[list[int], list[bool]]:
        return self.conversation(_of_json(fields["messages"]), _of_json(fields.get("tools")), place)

    def sharegpt(self, fields: dict[str, Any], place: str) -> tuple[list[int], list[bool]]:
        names = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
        turns = _of_json(fields["conversations"])
        if not all(isinstance(turn, dict) and turn.get("from") in names for turn in turns):
            raise UserError(f"{place}: conversations: wanted turns with from ({', '.join(names)}) and value")
        turns = [{"role": names[turn["from"]], "content": turn.get("value")} for turn in turns]
        return self.conversation(turns, _of_json(fields.get("tools")), place)

    def conversation(self, messages: Any, tools: Any, place: str) -> tuple[list[int], list[bool]]:
        """The template's tokens. What it adds to the conversation so far for an assistant's message is learnt, up to
        and with the end token. UserError where the template rewrites what came before."""
        check_messages(messages, place)
        text = self._render(place, messages, tools, False)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        learnt = [False] * len(ids)
        if self.everything:
            end = max((i for i, token in enumerate(ids) if token in self.ends), default=len(ids) - 1) + 1
            return ids[:end], learnt[:end]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(place, messages[:i], tools, True)
            after = text if i + 1 == len(messages) else self._render(place, messages[:i + 1], tools, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(f"{place}: the chat template rewrites what comes before message {i + 1}",
                                "its parts cannot be told apart: make one row of each answer, or use --supervise all")
            start = self._joined(ids, self.tokenizer.encode(before, add_special_tokens=False))[1]
            end = self._joined(ids, self.tokenizer.encode(after, add_special_tokens=False))[1]
            stops = [j for j in range(start, end) if ids[j] in self.ends]
            end = stops[-1] + 1 if stops else end
            learnt[start:end] = [True] * (end - start)
            if not stops and i + 1 == len(messages) and self.eos is not None:
                ids, learnt = [*ids, self.eos], [*learnt, True]
        return ids, learnt

    def _render(self, place: str, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tools=tools)
        except UserError as error:
            raise UserError(f"{place}: {error.what}", "check the order and the roles of the messages") from None

    @staticmethod
    def _joined(ids: list[int], part: list[int]) -> tuple[list[int], int]:
        """How many tokens of a text are those of its beginning: one that spans the border belongs to the rest."""
        pairs = enumerate(zip(part, ids, strict=False))
        return ids, next((i for i, (a, b) in pairs if a != b), min(len(part), len(ids)))


KINDS: dict[tuple[str, ...], Callable[[Encoder, dict[str, Any], str], tuple[list[int], list[bool]]]] = {
    ("messages",): Encoder.chat,
    ("conversations",): Encoder.sharegpt,
    ("prompt", "completion"): Encoder.completion,
    ("instruction", "output"): Encoder.instruction,
    ("text",): Encoder.text,
    ("document",): Encoder.plain,
}


def _string(fields: dict[str, Any], key: str, place: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: {key}: found a {type(value).__name__}, wanted a string")
    return value


def _of_json(value: Any) -> Any:
    """CSV and parquet files hold lists as JSON."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: messages: found {str(messages)[:40]!r}, wanted a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{place}: message {number}: found {str(message)[:40]!r}, wanted role and content")
        if message.get("content") is None and not message.get("tool_calls"):
            raise UserError(f"{place}: message {number} ({message['role']}) has no content")


# rows to a step

class Batch(NamedTuple):
    """Rows one after another: tokens (T), targets (T), lengths (B), all int32. Behind the last row there may be room
    that belongs to none. `rows` are their places."""

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    places: tuple[str, ...]

    @property
    def supervised(self) -> int:
        return int((self.targets != IGNORED).sum())

    @property
    def size(self) -> int:
        return int(self.lengths.sum())


def rooms(totals: Iterable[int], cost: int = 4000, unit: int = 16) -> list[int]:
    """The sizes that steps of these totals get. Each size is a plan, which takes as long to make as `cost` tokens to
    learn; a step takes the next larger size. The sizes with the least of both in sum, by dynamic programming."""
    counts = Counter(-(-total // unit) * unit for total in totals)
    sizes = sorted(counts)
    number = np.cumsum([0, *(counts[size] for size in sizes)])
    tokens = np.cumsum([0, *(counts[size] * size for size in sizes)])
    best: list[tuple[float, int]] = [(0.0, 0)]             # of the first n sizes: the least cost, where the last begins
    for n, size in enumerate(sizes, 1):
        waste = [best[k][0] + cost + size * (number[n] - number[k]) - (tokens[n] - tokens[k]) for k in range(n)]
        k = int(np.argmin(waste))
        best.append((float(waste[k]), k))
    found, n = [], len(sizes)
    while n:
        found.append(sizes[n - 1])
        n = best[n][1]
    return found[::-1]


def pack(rows: list[Row], sizes: Iterable[int] = (), most: int = 0) -> Batch:
    """Rows one after another, in the first of the sizes that holds them; lengths are filled up to `most` with zeros."""
    total = sum(len(row.tokens) for row in rows)
    size = next((size for size in sizes if size >= total), total)
    tokens, targets = np.zeros(size, np.int32), np.full(size, IGNORED, np.int32)
    lengths = np.zeros(max(most, len(rows)), np.int32)
    lengths[:len(rows)] = [len(row.tokens) for row in rows]
    tokens[:total] = np.concatenate([row.tokens for row in rows])
    targets[:total] = np.concatenate([row.targets for row in rows])
    return Batch(tokens, targets, lengths, tuple(row.place for row in rows))


def filled(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows in order, in groups of at most `tokens` tokens (or of one row)."""
    group: list[Row] = []
    for row in rows:
        if group and sum(len(r.tokens) for r in group) + len(row.tokens) > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of rows in groups of at most `tokens` tokens, or of one row: each joins the fullest open group that has
    room for it. A row counts as SHORT tokens at least, so that a group has at most tokens / SHORT rows."""
    open_: list[tuple[int, list[int]]] = []                # room, places
    closed = []
    for place, length in enumerate(lengths):
        need = max(SHORT, length)
        fits = [group for group in open_ if group[0] >= need]
        group = min(fits, key=lambda g: g[0], default=(tokens, []))
        if fits:
            open_.remove(group)
        elif len(open_) == OPEN:
            fullest = min(open_, key=lambda g: g[0])
            open_.remove(fullest)
            closed.append(fullest[1])
        open_.append((group[0] - need, [*group[1], place]))
    return closed + [places for _, places in sorted(open_)]


class Order:
    """Rows in an order that the seed decides, a new one each epoch; `position` is the next row of all. Each epoch has
    its own generator, so that nothing else can move the order, and a position is all there is to keep. With `tokens`
    the order is one of groups that fill so many."""

    def __init__(self, rows: list[Row], seed: int, position: int = 0, tokens: int = 0):
        self.rows, self.seed, self.position, self.tokens = rows, seed, position, tokens
        self._epoch, self._places = -1, np.zeros(0, int)
        self._ends: list[int] = []                         # of an epoch's groups

    def take(self, count: int) -> list[Row]:
        """The next rows: so many, or those of the next group."""
        if self.tokens:
            self._turn()
            place = self.position % len(self.rows)
            count = self._ends[bisect_right(self._ends, place)] - place
        return [self._next() for _ in range(count)]

    def _turn(self) -> None:
        """The order of the epoch that begins, if one does."""
        epoch = self.position // len(self.rows)
        if epoch == self._epoch:
            return
        self._epoch, self._places = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        if self.tokens:
            found = groups([len(self.rows[i].tokens) for i in self._places], self.tokens)
            self._ends = np.cumsum([len(group) for group in found]).tolist()
            self._places = self._places[np.concatenate(found)]

    def _next(self) -> Row:
        self._turn()
        self.position += 1
        return self.rows[self._places[(self.position - 1) % len(self.rows)]]

    def batches(self) -> int:
        """Groups of the epoch in which the position is."""
        self._turn()
        return len(self._ends)


def digest(rows: Iterable[Row]) -> str:
    """Tells whether rows are the same as in an earlier run."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(row.tokens.tobytes() + row.targets.tobytes() + b"\n")
    return found.hexdigest()


def runs(row: Row) -> Iterator[tuple[list[int], bool]]:
    """The tokens of a row in pieces that are learnt, or are not."""
    ids, learnt = [*row.tokens.tolist(), int(row.targets[-1])], [False, *(row.targets != IGNORED).tolist()]
    for is_learnt, group in groupby(zip(ids, learnt, strict=True), lambda pair: pair[1]):
        yield [i for i, _ in group], is_learnt
