"""A run of fine-tuning from its settings to the adapter's folder, resumable at any moment.

    DIR/adapters.safetensors, adapter_config.json   the best adapter by validation, or the last without validation
    DIR/last/                                       the last one, where there is a validation
    DIR/state.safetensors                           all that training needs to go on
    DIR/log.jsonl, log.csv, report.html             what happened
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..engine import array as mx
from ..engine.errors import UserError
from ..engine.generate import generate
from . import adapter as adapters
from . import data, formats, memory, report, settings, state
from .evaluation import batches
from .log import Log
from .settings import Settings
from .trainer import Step, Trainer

Listener = Callable[[str, dict[str, Any]], None]           # (what happened, numbers)


class Session:
    """Everything of a run. `listen` is told of plan, step, skipped, valid, saved and done as they happen. before: bytes
    that the process had before it loaded the model, for the estimate."""

    def __init__(self, given: Settings, model: Any, tokenizer: Any, listen: Listener = lambda what, numbers: None,
                 before: int = 0):
        self.folder, self.listen, self.model, self.tokenizer = Path(given.adapter), listen, model, tokenizer
        self.settings = given.check()
        self.progress = state.read(self.folder) if given.resume else state.Progress()
        if not given.resume and (self.folder / state.FILE).exists():
            raise UserError(f"{self.folder}: holds a run already",
                            "--resume goes on with it, or name another --adapter")
        self._read()
        base = adapters.stamp(model)
        self._same(base)
        mx.random.seed(given.seed)
        self.paths = adapters.prepare(model, given.method)
        batches = self._order().batches() if given.batch_tokens else len(self.train) / given.batch_size
        self.per_epoch = batches / given.accumulate
        self.total = given.iters or max(1, math.ceil(given.epochs * self.per_epoch))
        self.every = {name: settings.steps(getattr(given, name), self.per_epoch, name)
                      for name in ("eval_every", "save_every")}
        optimizer = given.make_optimizer(self.total, self.per_epoch)
        self.trainer = Trainer(model, optimizer, clip=given.clip, accumulate=given.accumulate > 1 or bool(given.fit),
                               precise=given.precise)
        blocks = model.config.num_hidden_layers
        model.checkpointed = 2 * blocks if given.checkpoint < 0 else min(given.checkpoint, 2 * blocks)
        self.estimate = self._plan(before)
        given = self.settings
        if given.resume:
            state.tidy(self.folder)
            state.restore(self.folder, self.trainer)
        else:
            self.progress.settings, self.progress.base = asdict(given), base
            self.progress.rows = data.digest(self.train)
        self.order = self._order(self.progress.position)
        self.log = Log(self.folder, self.progress.step if given.resume else -1)

    # before the first step

    def _read(self) -> None:
        given = self.settings
        samples = data.read(given.data)
        if "train" not in samples:
            raise UserError(f"{given.data}: has {', '.join(samples)} and no train split")
        self.tallies, self.rows = {}, {}
        for split, found in samples.items():
            encoder = data.Encoder(self.tokenizer, given.max_seq_length, given.supervise == "all")
            self.rows[split], self.tallies[split] = encoder.rows(found), encoder.tally
        self.train = self.rows["train"]
        if not self.train:
            raise UserError(f"{given.data}: no row is left to learn from: {self.tallies['train']}",
                            "raise --max-seq-length")

    def _same(self, base: dict[str, str]) -> None:
        """Raises UserError if a resumed run would not be the run that was saved."""
        if not self.settings.resume:
            return
        saved = self.progress
        for what, then, now in (("the training rows", saved.rows, data.digest(self.train)),
                                ("the model's weights", saved.base, base)):
            if then != now:
                raise UserError(f"{self.folder / state.FILE}: {what} are not those of the saved run",
                                "resume with the same data and model, or begin anew in another folder")

    def _plan(self, before: int) -> memory.Estimate:
        """The sizes of the steps' plans, and the memory of the largest; with `fit`, the choice that stays below it."""
        given = self.settings
        if given.fit:
            rows = 1 if given.batch_tokens else given.batch_size
            options = memory.choices(rows, given.accumulate, self.model.config.num_hidden_layers)
            sized = [(choice, self._sizes(choice.batch_size)[-1]) for choice in options]
            choice = memory.fit(self.trainer, settings.size(given.fit), before, sized)
            self.model.checkpointed = choice.checkpoint
            self.settings = replace(given, fit="", **choice._asdict())     # a resumed run takes the same choice
            if choice.accumulate == 1:
                self.trainer.sums.clear()
            self.trainer.compile()
        if not given.resume:
            self.progress.sizes = self._sizes(self.settings.batch_size)
        return memory.estimate(self.trainer, self.progress.sizes[-1], self._most(), before)

    def _order(self, position: int = 0) -> data.Order:
        return data.Order(self.train, self.settings.seed, position, self.settings.batch_tokens)

    def _most(self) -> int:
        """Rows of a batch."""
        given = self.settings
        return max(1, given.batch_tokens // data.SHORT) if given.batch_tokens else given.batch_size

    def _sizes(self, batch_size: int) -> list[int]:
        """The sizes for all batches of this run."""
        order, given = self._order(), self.settings
        batches = self.total * given.accumulate * (1 if given.batch_tokens else given.batch_size) // batch_size
        return data.rooms(sum(len(row.tokens) for row in order.take(batch_size)) for _ in range(batches))

    # the run

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Trains to the last step, or until `stopped`, and leaves state, adapter and report behind either way."""
        given, progress = self.settings, self.progress
        self.listen("plan", {"estimate": self.estimate, "total": self.total, "step": progress.step})
        if given.samples and not progress.before:
            progress.before = list(self.answers())
        if progress.step == 0 and self._valid_rows():
            self._validate()
        begin = time.perf_counter() - progress.seconds
        while progress.step < self.total and not stopped() and not self._patient_enough():
            self._step(begin)
            if self._valid_rows() and (self._due("eval_every") or progress.step == self.total):
                self._validate()
            if self._due("save_every"):
                self.save()
        if not self._due("save_every"):
            self.save()
        self._finish()

    def _due(self, name: str) -> bool:
        return self.progress.step % self.every[name] == 0

    def _step(self, begin: float) -> None:
        progress, started = self.progress, time.perf_counter()
        most = self._most()
        batches = [data.pack(self.order.take(most), progress.sizes, most) for _ in range(self.settings.accumulate)]
        step = self.trainer.step(batches)
        progress.step, progress.position = progress.step + 1, self.order.position
        progress.tokens += sum(batch.size for batch in batches)
        progress.supervised += step.supervised
        progress.seconds = time.perf_counter() - begin
        self._tell(step, batches, time.perf_counter() - started)

    def _tell(self, step: Step, batches: list[data.Batch], seconds: float) -> None:
        progress = self.progress
        places = [place for batch in batches for place in batch.places]
        if not step.finite:
            progress.skipped += 1
            self.listen("skipped", {"step": progress.step, "loss": step.loss, "places": places})
        event: dict[str, Any] = {
            "step": progress.step, "loss": _number(step.loss), "learning_rate": step.rate,
            "gradient_norm": _number(step.norm), "supervised": step.supervised, "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3)}
        if not step.finite:
            event |= {"skipped": True, "rows": places}
        self.log.add(**event)
        self.listen("step", {**event, "loss": step.loss, "total": self.total, "step_seconds": seconds,
                             "step_tokens": sum(batch.size for batch in batches), "memory": memory.resident()})

    def _valid_rows(self) -> list[data.Row]:
        return self.rows.get("valid", [])

    def loss(self, rows: list[data.Row]) -> float:
        """Mean loss over the supervised tokens of all rows."""
        total, count = self.trainer.evaluate(batches(rows))
        return total / max(1, count)

    def _validate(self) -> None:
        progress, loss = self.progress, self.loss(self._valid_rows())
        better = progress.best is None or loss < progress.best
        progress.waited = 0 if better else progress.waited + 1
        if better:
            progress.best, progress.best_step = loss, progress.step
            self._write(self.folder)
        self.log.add(step=progress.step, valid_loss=_number(loss), seconds=round(progress.seconds, 3))
        self.listen("valid", {"step": progress.step, "loss": loss, "best": better})

    def _patient_enough(self) -> bool:
        return bool(self.settings.patience and self.progress.waited >= self.settings.patience)

    # what is left behind

    def save(self) -> None:
        """The state, and the last adapter."""
        state.save(self.folder, self.trainer, self.progress)
        self._write(self.folder / "last" if self._valid_rows() else self.folder)
        self.listen("saved", {"step": self.progress.step, "folder": str(self.folder)})

    def _write(self, folder: Path) -> None:
        found = adapters.of(self.model, dropout=self.settings.dropout, base=self.progress.base,
                            name=self.settings.model)
        formats.write(folder, found, self.settings.format)

    def _finish(self) -> None:
        """The best adapter goes into the model; it answers the samples and is tested."""
        last = self.trainer.leaves.values()
        if self._valid_rows() and self.progress.best_step != self.progress.step:
            best = formats.read(self.folder)
            for place, path in enumerate(self.trainer.leaves.paths):
                self.trainer.leaves[place] = tensor(best, path).astype(last[place].dtype)
        after = list(self.answers()) if self.settings.samples else []
        tested = self.loss(self.rows["test"]) if self.rows.get("test") else None
        if tested is not None:
            self.log.add(step=self.progress.step, test_loss=_number(tested))
        report.write(self.folder / "report.html", self, after, tested)
        for place, leaf in enumerate(last):
            self.trainer.leaves[place] = leaf
        self.listen("done", {"step": self.progress.step, "best": self.progress.best, "test": tested,
                             "best_step": self.progress.best_step, "folder": str(self.folder)})

    def prompts(self) -> list[tuple[list[int], list[int]]]:
        """Token ids of the samples' prompts, and what the data answers: of texts, the second half."""
        found = []
        for row in (self._valid_rows() or self.train)[:self.settings.samples]:
            ids, learnt = [*row.tokens.tolist(), int(row.targets[-1])], (row.targets != data.IGNORED).tolist()
            start = learnt.index(True) + 1 if not all(learnt) else len(ids) // 2
            found.append((ids[:start], [i for i in ids[start:] if i >= 0]))
        return found

    def answers(self) -> Iterator[str]:
        """What the model makes of the samples, greedily."""
        self.model.eval()
        for prompt, _ in self.prompts():
            yield generate(self.model, self.tokenizer, prompt, max_tokens=self.settings.sample_tokens, temp=0.0)
        self.model.train()


def tensor(adapter: adapters.Adapter, path: str) -> mx.Array:
    """What a leaf of the model holds in an adapter."""
    if path in adapter.weights:
        return adapter.weights[path]
    layer, _, side = path.rpartition(".lora_")
    return adapter.pairs[layer].a if side == "a" else adapter.pairs[layer].b


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
