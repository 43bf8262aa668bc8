"""Seeds that are added one at a time until the answer is in, with error rates that hold under that looking."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import UserError
from .inference import ALPHA, sequential_levels

# The first look: two seeds tell next to nothing.
FIRST_SEEDS = 3
MOST_SEEDS = 20


@dataclass(frozen=True)
class Looks:
    """When to look, and when to stop.

    All looks together keep the error rates of one (:func:`.inference.sequential_levels`), whatever the rule.

    Attributes:
        first: seeds at the first look.
        most: seeds at the last.
        until: stop when every arm's interval over new seeds and new images, at the confidence of the look, is at most
            so wide, from its low end to its high one, in AP points; 0 for no such rule.
        decide: stop when every arm's verdict is decided (gain, loss or no relevant difference).
    """

    first: int = FIRST_SEEDS
    most: int = MOST_SEEDS
    until: float = 0.0
    decide: bool = False

    def check(self) -> None:
        """Checks the rule.

        Raises:
            UserError: it can never be met, or looks at fewer than two seeds.
        """
        if self.decide == bool(self.until):
            raise UserError("give --until WIDTH or --decide DELTA, one of the two")
        if not 0 <= self.until < math.inf:
            raise UserError(f"--until {self.until} must be a width in AP points above 0")
        if self.first < 2:
            raise UserError("looking needs two seeds at least: give more to --seeds, or none, which starts with 3")
        if self.most < self.first:
            raise UserError(f"--max-seeds {self.most} is less than the {self.first} of --seeds, which come first")

    def levels(self, comparisons: int = 1) -> Iterator[tuple[int, float]]:
        """(Number of seeds, level) of each look.

        Args:
            comparisons: arms that are compared with the reference. Holm divides a level by their number at most, and
                levels that are all divided by it cross more often together than by it: looks are the less alike, the
                rarer what is looked for (1.2% in place of 1% an arm for five arms and 3 to 10 seeds). So the levels are
                those of the smaller error rate, multiplied by what Holm divides by.
        """
        counts = tuple(range(self.first, self.most + 1))
        for count, level in zip(counts, sequential_levels(counts, ALPHA / comparisons), strict=True):
            yield count, comparisons * level

    def answered(self, outcomes: Sequence[str], widths: Sequence[float]) -> bool:
        """Whether the verdicts of a look end the looking.

        Args:
            outcomes: of all arms on the declared metric, at the look's level.
            widths: of the intervals that they stand on, AP points; NaN for none.
        """
        if self.decide:
            return "undecided" not in outcomes
        return all(width <= self.until for width in widths)

    def in_words(self) -> str:
        """The rule, as a report tells it."""
        rule = "every verdict is decided" if self.decide else f"every interval is at most {self.until:g} AP points wide"
        return f"from {self.first} to {self.most} seeds, one at a time, until {rule}"


@dataclass(frozen=True)
class Look:
    """One look at the seeds that there are so far: their number, the level of its verdicts, and the rule."""

    seeds: int
    level: float
    looks: Looks
