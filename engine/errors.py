"""The one error that a user can act on."""


class UserError(ValueError):
    """`what` went wrong (one sentence: the name, the value found, the value wanted) and `hint`, what to do next."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what if not hint else f"{what}\n{hint}")
        self.what, self.hint = what, hint
