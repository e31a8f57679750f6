"""The one error that a user can act on."""


class UserError(ValueError):
    """`what` went wrong (one sentence: the name, the value found, the value wanted) and `hint`, what to do next.

    A value from a damaged file can be long: the middle of a long sentence is left out."""

    def __init__(self, what: str, hint: str = "") -> None:
        what = what if len(what) <= 1000 else f"{what[:600]} … {what[-300:]}"
        super().__init__(what if not hint else f"{what}\n{hint}")
        self.what, self.hint = what, hint
