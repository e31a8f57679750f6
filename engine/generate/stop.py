"""Stop strings, found wherever the borders of tokens fall."""


class Stops:
    """Passes text on, holding back whatever may be the beginning of a stop string.

    The first stop string to be complete ends the text just before itself; of several, the longest.
    """

    def __init__(self, strings: tuple[str, ...]):
        self.strings = strings
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is now certain to come before any stop string."""
        if not self.strings:
            return text
        self.held += text
        ends = [(at + len(s), at) for s in self.strings if (at := self.held.find(s)) >= 0]
        if ends:
            self.found = True
            return self._pass(min(ends)[1])
        return self._pass(len(self.held) - max((self._begun(s) for s in self.strings), default=0))

    def finish(self) -> str:
        """What is still held when no more text will come."""
        return "" if self.found else self._pass(len(self.held))

    def _begun(self, string: str) -> int:
        """Length of the longest end of the held text that begins `string`."""
        longest = min(len(self.held), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if self.held.endswith(string[:n])), 0)

    def _pass(self, length: int) -> str:
        text, self.held = self.held[:length], self.held[length:]
        return text
