"""A step is the same however its rows are divided, compiled or not, checkpointed or not; what is not finite
is skipped."""
import math

import numpy as np
import pytest

from lazulite import lora
from lazulite.engine import array as mx
from lazulite.engine import nn, optimizers
from lazulite.engine.errors import UserError
from lazulite.lora import data
from lazulite.lora.layers import LoRALinear, adapted
from lazulite.lora.settings import OPTIMIZERS, Settings
from lazulite.lora.trainer import Trainer


def trainer(pairs, folder, method=None, **options) -> Trainer:
    mx.random.seed(0)
    model = pairs.ours(folder)
    lora.prepare(model, method or lora.Method(rank=4))
    return Trainer(model, optimizers.AdamW(0.01, bias_correction=True), **options)


def losses(it: Trainer, rows, split: int, steps: int = 3) -> list[float]:
    """Of steps of 8 rows in batches of `split`."""
    found = []
    for step in range(steps):
        eight = [rows[(step + i) % len(rows)] for i in range(8)]
        found.append(it.step([data.pack(eight[i:i + split], [40 * split]) for i in range(0, 8, split)]).loss)
    return found


def same(ours: Trainer, theirs: Trainer, tolerance: float) -> None:
    for (path, a), (_, b) in zip(ours.leaves.named().items(), theirs.leaves.named().items(), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, err_msg=path)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_accumulation_is_one_batch(split, pairs, tiny, rows) -> None:
    whole, parts = trainer(pairs, tiny), trainer(pairs, tiny, accumulate=True)
    np.testing.assert_allclose(losses(parts, rows, split), losses(whole, rows, 8), rtol=1e-5)
    same(parts, whole, 2e-4)  # Adam's first steps have the size of the rate, 0.01, whatever the gradient


def test_packed_rows_are_those_alone(pairs, tiny, rows) -> None:
    """The gradient of packed rows is the sum of their own, so that no row sees another."""
    it = trainer(pairs, tiny)
    for _, layer in adapted(it.model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    _, packed = it.gradients(data.pack(rows[:4], [200], 6))
    count = sum(row.supervised for row in rows[:4])
    alone = [it.gradients(data.pack([row])) for row in rows[:4]]
    for path, gradient in packed.items():
        parts = [np.asarray(g[path]) * row.supervised / count for (_, g), row in zip(alone, rows, strict=False)]
        np.testing.assert_allclose(np.asarray(gradient), sum(parts), atol=1e-6)


def test_positions_begin_anew_in_each_row(pairs, tiny, rows) -> None:
    model = pairs.ours(tiny)
    batch = data.pack(rows[:3])
    context = nn.Context.packed(mx.array(batch.lengths), len(batch.tokens))
    together = np.asarray(model(mx.array(batch.tokens), context))
    alone = [np.asarray(model(mx.array(row.tokens), nn.Context.packed([len(row.tokens)]))) for row in rows[:3]]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)


def test_checkpointed_is_not(pairs, tiny, rows) -> None:
    it, batch = trainer(pairs, tiny), data.pack(rows[:4])
    for _, layer in adapted(it.model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    loss, plain = it.gradients(batch)
    layers = it.model.config.num_hidden_layers
    for blocks in (1, layers, layers + 1, 2 * layers):
        it.model.checkpointed = blocks
        again, gradients = it.gradients(batch)
        assert again.item() == pytest.approx(loss.item(), rel=1e-6)
        for path, gradient in gradients.items():
            np.testing.assert_allclose(np.asarray(gradient), np.asarray(plain[path]), atol=1e-6)


def test_checkpointing_takes_less_memory(pairs, rows) -> None:
    it = trainer(pairs, pairs.save(num_hidden_layers=8))
    batch = data.pack(rows)
    plain = it.plan(batch).arena
    other = trainer(pairs, pairs.save(num_hidden_layers=8))
    other.model.checkpointed = 8                           # the MLPs
    part = other.plan(batch).arena
    other.model.checkpointed = 16                          # whole blocks
    assert part < 0.8 * plain and other.plan(batch).arena < 0.8 * part


def test_compiled_is_eager(pairs, tiny, rows) -> None:
    compiled, eager = trainer(pairs, tiny), trainer(pairs, tiny)
    wanted = losses(compiled, rows, 8)
    mx.disable_compile()
    try:
        np.testing.assert_allclose(losses(eager, rows, 8), wanted, rtol=1e-5)
    finally:
        mx.enable_compile()
    same(eager, compiled, 2e-4)


def test_the_same_seed_is_the_same_run(pairs, tiny, rows) -> None:
    method = lora.Method(rank=4, dropout=0.2)
    runs = []
    for _ in range(2):
        it = trainer(pairs, tiny, method)
        runs.append((losses(it, rows, 8), it))
    assert runs[0][0] == runs[1][0]
    same(runs[0][1], runs[1][1], 0.0)


def test_dropout_drops_in_training_only(pairs, tiny, rows) -> None:
    it, batch = trainer(pairs, tiny, lora.Method(rank=4, dropout=0.5)), data.pack(rows[:2])
    it.step([batch])
    assert it.evaluate([batch]) == it.evaluate([batch])
    key = np.asarray(mx.random.state[0]).copy()
    it.evaluate([batch])
    assert (np.asarray(mx.random.state[0]) == key).all()  # a validation moves no random number of the training
    layer = next(layer for _, layer in adapted(it.model))
    x = mx.ones((4, 64))
    assert not np.array_equal(np.asarray(layer(x)), np.asarray(layer(x)))


def test_what_is_not_finite_changes_nothing(pairs, tiny, rows) -> None:
    it, batch = trainer(pairs, tiny), data.pack(rows[:2])
    it.step([batch])
    kept = {path: np.asarray(leaf).copy() for path, leaf in it.leaves.named().items()}
    steps, norm = int(it.optimizer.step.item()), it.model.model.norm.weight
    it.model.model.norm.weight = norm * math.nan
    it.compile()  # the frozen weights are constants of a plan
    found = it.step([batch])
    assert not found.finite and math.isnan(found.norm)
    assert int(it.optimizer.step.item()) == steps
    for path, leaf in it.leaves.named().items():
        np.testing.assert_array_equal(np.asarray(leaf), kept[path])


def test_clipping_bounds_the_step(pairs, tiny, rows) -> None:
    mx.random.seed(0)
    model = pairs.ours(tiny)
    lora.prepare(model, lora.Method(rank=4))
    it = Trainer(model, optimizers.SGD(1.0), clip=0.01)
    before = {path: np.asarray(leaf).copy() for path, leaf in it.leaves.named().items()}
    assert it.step([data.pack(rows[:4])]).norm > 0.01
    moved = sum(float(((np.asarray(leaf) - before[path]) ** 2).sum()) for path, leaf in it.leaves.named().items())
    assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_leaf_without_a_gradient_is_named(pairs, tiny, rows) -> None:
    mx.random.seed(0)
    model = pairs.ours(tiny)
    lora.prepare(model, lora.Method(rank=4))
    model.model.layers[1].mlp.extra = LoRALinear(nn.Linear(64, 64).freeze(), 4, 1.0)  # nothing calls it
    it = Trainer(model, optimizers.AdamW(0.01))
    with pytest.raises(UserError, match=r"2 of 44 arrays had no gradient in 3 steps.*layers.1.mlp.extra.lora_a"):
        for _ in range(3):
            it.step([data.pack(rows[:2])])


def test_a_row_without_supervised_tokens_adds_nothing(pairs, tiny, rows) -> None:
    masked = rows[1]._replace(targets=np.full_like(rows[1].targets, data.IGNORED))
    it = trainer(pairs, tiny)
    loss, gradients = it.gradients(data.pack([rows[0], masked]))
    alone, wanted = it.gradients(data.pack([rows[0]]))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(np.asarray(gradient), np.asarray(wanted[path]), atol=1e-6)
    assert it.step([data.pack([masked])]).loss == 0.0  # all masked: no 0/0


def test_no_work_below_the_lowest_adapted_layer(pairs, rows) -> None:
    folder = pairs.save(num_hidden_layers=6)
    last, every = (trainer(pairs, folder, lora.Method(rank=4, layers=layers)) for layers in ("1", "all"))
    batch = data.pack(rows[:4])
    kernels = [sum(step.kernel.startswith("rms_norm_grad") for step in it.plan(batch).steps) for it in (last, every)]
    assert kernels[0] <= 3 < kernels[1]
    assert last.plan(batch).arena < 0.7 * every.plan(batch).arena


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name, pairs, tiny, rows) -> None:
    mx.random.seed(0)
    model = pairs.ours(tiny)
    lora.prepare(model, lora.Method(rank=4, layers="1"))
    rate = {"sgd": 1.0, "adadelta": 20.0, "muon": 0.1}.get(name, 0.01)
    it = Trainer(model, Settings(data="x", optimizer=name, learning_rate=rate).make_optimizer(4, 1))
    batch = data.pack(rows[:4])
    found = [it.step([batch]).loss for _ in range(5)]
    assert found[-1] < found[0] and all(map(math.isfinite, found))


def test_full_fine_tuning(pairs, rows) -> None:
    folder = pairs.save(tie_word_embeddings=True)
    it = trainer(pairs, folder, lora.Method(full=True))
    batch = data.pack(rows[:4])
    assert not any(isinstance(module, LoRALinear) for module in it.model.modules())
    assert {path for path, _ in it.model.named_parameters()} == set(it.leaves.paths)
    found = [it.step([batch]).loss for _ in range(4)]
    assert found[-1] < 0.9 * found[0]
