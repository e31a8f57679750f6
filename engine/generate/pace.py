"""How long steps take here, as measured: how large a prompt's chunk may be, and whether a draft pays."""

from .pages import PAGE

LEAST = PAGE  # tokens of the first chunk, before anything is known, and of any: smaller ones save little time
ALONE = 4  # a step that nobody waits for may take so many times as long
SHARE = 2  # and where decoding alone takes long, a step with a chunk takes so many times as long
TILE = 8  # more rows than these go by so many at once: a step of as many tiles takes as long
CHANGE = 2  # a chunk is at most so many times as large, or as small, as the one before


class Pace:
    """Seconds of a step of n decoded tokens, as a moving average, and sizes of chunks that kept to their time."""

    def __init__(self, target: float = 0.1):
        self.target = target  # seconds of a step
        self.decode: dict[int, float] = {}
        self.sizes = {True: float(LEAST), False: float(LEAST)}  # beside decoded tokens, and alone

    def learn(self, decoded: int, prompt: int, seconds: float) -> None:
        """A step of so many decoded tokens (drafts too) and tokens of prompts took so long."""
        if not prompt:
            old = self.decode.get(decoded, seconds)
            self.decode[decoded] = old + (seconds - old) * (0.5 if seconds > old else 0.2)
            return
        wanted, size = self._wanted(decoded), self.sizes[decoded > 0]
        fits = prompt * min(CHANGE, wanted / seconds)
        if fits > size or seconds > wanted:  # a short chunk in little time says nothing of a long one
            self.sizes[decoded > 0] = max(fits, size / CHANGE, LEAST)

    def fade(self, decoded: int) -> None:
        """A step of so many was too dear: it counts as a little cheaper from now on, to be tried again one day."""
        if decoded in self.decode:
            self.decode[decoded] *= 0.995

    def seconds(self, decoded: int) -> float:
        """Of a step of so many decoded tokens. One that was never run takes as long as one of as many tiles, or else of
        fewer tokens; 0 if there was none."""
        if (known := self.decode.get(decoded)) is not None:
            return known
        alike = -(-decoded // TILE) if decoded > TILE else None
        tile = [s for n, s in self.decode.items() if -(-n // TILE) == alike]
        return min(tile) if tile else max((s for n, s in self.decode.items() if n < decoded), default=0.0)

    def chunk(self, decoded: int, most: int) -> int:
        """How many tokens of prompts may run beside so many decoded ones."""
        return min(most, int(self.sizes[decoded > 0]))

    def _wanted(self, decoded: int) -> float:
        """Seconds that a step with a chunk should take."""
        return max(self.target, SHARE * self.seconds(decoded)) if decoded else ALONE * self.target
