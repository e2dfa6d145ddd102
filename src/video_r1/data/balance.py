"""Constant answers: how often a model is right that always says the same letter, without looking."""

from collections import Counter
from collections.abc import Iterable
from math import sqrt
from typing import NamedTuple


class ConstantAnswer(NamedTuple):
    """The letter that is right most often among the questions with one number of options."""

    options: int
    letter: str
    right: int  # questions whose answer it is
    questions: int

    @property
    def stands_out(self) -> bool:
        """True if it is right more often than a guess, by ten points and by 2.5 standard deviations."""
        chance = 1 / self.options
        deviation = sqrt(self.questions * chance * (1 - chance))
        surplus = self.right - self.questions * chance
        return surplus > max(0.1 * self.questions, 2.5 * deviation)

    def __str__(self) -> str:
        share, chance = self.right / self.questions, 1 / self.options
        return (
            f"{100 * share:.0f} % of the {self.questions:,} questions with {self.options} options have the "
            f"answer {self.letter} (a guess: {100 * chance:.0f} %): "
            f"a model can learn to say {self.letter} without looking"
        )


def constant_answers(questions: Iterable[tuple[int, str]]) -> list[ConstantAnswer]:
    """Return the best constant answer for each number of options, fewest options first.

    questions: (number of options, letter of the right one); questions without options do not count.
    """
    letters: dict[int, Counter[str]] = {}
    for options, letter in questions:
        if options:
            letters.setdefault(options, Counter())[letter] += 1
    best = ((options, *found.most_common(1)[0], found.total()) for options, found in sorted(letters.items()))
    return [ConstantAnswer(*each) for each in best]
