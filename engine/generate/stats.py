"""What the scheduler counts, for whoever watches it."""

from bisect import bisect_left
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Values counted by size: counts[i] of those up to bounds[i] and above the one before, the last of all larger."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Stats:
    """Counts since the start, but for `running`, `waiting`, the pages and the step's age: those are as of now."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0  # by requests
    pages_kept: int = 0  # findable by their tokens, in use or not
    pages_total: int = 0
    page_bytes: int = 0
    step_age: float = 0.0  # seconds since the step that runs now began; 0: none runs
    steps: int = 0
    prefix_queries: int = 0  # tokens of prompts that were looked for in the cache
    prefix_hits: int = 0  # of them, found
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0  # tokens of drafts
    accepted: int = 0  # of them, those that came true
    finished: dict[str, int] = field(default_factory=dict)  # reason -> requests
    first_token_seconds: Histogram = field(default_factory=Histogram)  # from submit
    inter_token_seconds: Histogram = field(default_factory=Histogram)
    queue_seconds: Histogram = field(default_factory=Histogram)
