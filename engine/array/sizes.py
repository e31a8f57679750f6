"""Sizes that a function in a file keeps open: integers that remember how they follow from the sizes of its inputs."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__, "-": int.__sub__, "*": int.__mul__, "//": int.__floordiv__, "%": int.__mod__}


class Size(int):
    """The size of an example; `expression` is a name, a number, or [operator, a, b]."""

    expression: Any

    def __new__(cls, value: int, expression: Any) -> Size:
        self = super().__new__(cls, value)
        self.expression = expression
        return self


def _method(sign: str, swapped: bool) -> Callable[[Size, Any], Any]:
    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        if type(other) is int and other == 1 and (sign == "*" or sign == "//" and not swapped):
            return self
        expressions = [x.expression if isinstance(x, Size) else int(x) for x in (a, b)]
        return Size(OPERATORS[sign](int(a), int(b)), [sign, *expressions])

    return method


for _sign, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(Size, f"__{_name}__", _method(_sign, False))
    setattr(Size, f"__r{_name}__", _method(_sign, True))


def evaluated(expression: Any, sizes: dict[str, int]) -> int:
    """The expression's number where the named sizes are as given."""
    if isinstance(expression, str):
        return sizes[expression]
    if isinstance(expression, list):
        sign, a, b = expression
        return OPERATORS[sign](evaluated(a, sizes), evaluated(b, sizes))
    return expression
