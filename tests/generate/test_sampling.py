"""The rows that the kernel `sample` reads, and the limits of what may be asked."""

import pytest

from lazulite.engine.errors import UserError
from lazulite.engine.generate import Sampling


def test_rows_hold_the_fields_in_the_kernels_order() -> None:
    sampling = Sampling(temp=0.5, top_p=0.9, min_p=0.1, top_k=40, repetition_penalty=1.5, seed=(7 << 32) + 2**32 - 1)
    assert sampling.params() == (0.5, 0.9, 0.1, 1.5, 0.0, 0.0)
    assert sampling.ints(prompt_length=10, generated=3, sequence=2) == (40, -1, 7, 3, 13, 10, 2, 0, 0, 0, 0)
    assert Sampling(logit_bias={5: 1.0, 6: -100}, top_logprobs=20).ints(10, 3)[7:10] == (2, 0, 20)


def test_history_is_only_asked_for_when_something_is_penalized() -> None:
    assert Sampling().ints(prompt_length=10, generated=3)[4] == 0
    assert Sampling(presence_penalty=0.5).ints(10, 3)[4] == 13


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert Sampling(seed=5).seed == 5
    assert Sampling().seed != Sampling().seed


@pytest.mark.parametrize(("field", "value", "wanted"), [
    ("max_tokens", 0, "1 to"), ("temp", -1.0, "0.0 to 100.0"), ("temp", float("nan"), "0.0 to 100.0"),
    ("top_p", 1.5, "0.0 to 1.0"), ("top_k", -1, "0 to"), ("min_p", -0.1, "0.0 to 1.0"),
    ("repetition_penalty", 0.0, "0.001 to"), ("presence_penalty", 3.0, "-2.0 to 2.0"), ("top_logprobs", 21, "0 to 20"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(field: str, value: float, wanted: str) -> None:
    with pytest.raises(UserError, match=rf"\[sampling\] {field} is .*, wanted {wanted}"):
        Sampling(**{field: value})


@pytest.mark.parametrize(("biases", "wanted"), [
    ({-1: 0.0}, "has -1: 0.0, wanted a token id: -100 to 100"), ({3: 101}, "has 3: 101, wanted"),
    ({3: float("nan")}, "has 3: nan"), (dict.fromkeys(range(1025), 1.0), "has 1025 entries, wanted at most 1024"),
])  # fmt: skip
def test_biases_have_limits(biases: dict[int, float], wanted: str) -> None:
    with pytest.raises(UserError, match=rf"\[sampling\] logit_bias {wanted}"):
        Sampling(logit_bias=biases)


def test_stop_may_be_one_string_but_not_an_empty_one() -> None:
    assert Sampling(stop="END").stop == ("END",)
    with pytest.raises(UserError, match="empty"):
        Sampling(stop=("a", ""))
