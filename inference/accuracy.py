"""What a share of right answers says: its standard error, what guessing would give, and whether the two differ.

A question with k options is answered right by 1 of k guesses. After n questions the accuracy of a guesser scatters
around that with a standard deviation of sqrt(p (1 - p) / n), 1.2 points for the 1,346 questions of C-Eval: an accuracy
of 26 % there says nothing. So no number is printed here without its standard error and a verdict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

SURE = 2.0  # standard errors from which on a difference is called one; 5 of 100 guessers get that far too
GUESSERS = math.erfc(SURE / math.sqrt(2))  # how many do, if accuracies are normally distributed: 4.55 %
EXACT = 100  # up to so many questions they are not, and the binomial distribution is summed up


@dataclass
class Tally:
    """Answers to questions, counted; tallies add up.

    right: the most likely option is the right one. right_normalised: so is the option with the greatest log-likelihood
    a character, which takes away the advantage of short options; for single letters it is the same.
    guessed, variance: what a guesser gets right, mean and variance. picks, keys: how often each option was chosen, and
    how often it was right.
    """

    questions: int = 0
    right: int = 0
    right_normalised: int = 0
    guessed: float = 0.0
    variance: float = 0.0
    picks: Counter[int] = field(default_factory=Counter)
    keys: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, log_likelihoods: list[float], options: list[str], key: int) -> Tally:
        """One question: the log-likelihood of each option, the options' texts, and which one is right."""
        indices = range(len(options))
        pick = max(indices, key=lambda i: log_likelihoods[i])  # the first of equals
        pick_normalised = max(indices, key=lambda i: log_likelihoods[i] / len(options[i]))
        chance = 1 / len(options)
        return cls(
            1, int(pick == key), int(pick_normalised == key), chance, chance * (1 - chance),
            Counter([pick]), Counter([key]),
        )  # fmt: skip

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.questions + other.questions,
            self.right + other.right,
            self.right_normalised + other.right_normalised,
            self.guessed + other.guessed,
            self.variance + other.variance,
            self.picks + other.picks,
            self.keys + other.keys,
        )

    @property
    def accuracy(self) -> float:
        return self.right / self.questions

    @property
    def accuracy_normalised(self) -> float:
        return self.right_normalised / self.questions

    @property
    def chance(self) -> float:
        """The accuracy of a guesser: 0.25 where all questions have four options."""
        return self.guessed / self.questions

    @property
    def chance_error(self) -> float:
        """The standard deviation of a guesser's accuracy."""
        return math.sqrt(self.variance) / self.questions

    @property
    def habit(self) -> float:
        """The accuracy of a guesser who chooses each option as often as the model does: sum of pick share x key share.

        A model that always says C is right wherever C is: more than a quarter of the time if C is right more often.
        It is the agreement by chance of Cohen's kappa (Cohen 1960).
        """
        shared = sum(count * self.keys[option] for option, count in self.picks.items())
        return shared / self.questions**2


def standard_error(share: float, questions: int) -> float:
    """Of a share of right answers (binomial), as a share."""
    return math.sqrt(share * (1 - share) / questions)


def add_up(tallies: Iterable[Tally]) -> Tally:
    return sum(tallies, Tally())


def differs_from_chance(tally: Tally, right: int) -> bool:
    """Whether at most GUESSERS of all guessers are as far from their mean, on either side, as `right` answers are.

    With many questions that is: further than SURE standard deviations of a guesser. 2 of 2 with four options is 2.4 of
    them, and yet one guesser of 16 gets there.
    """
    if tally.questions <= EXACT:
        return two_sided(right, tally.questions, tally.chance) <= GUESSERS
    return abs(right / tally.questions - tally.chance) > SURE * tally.chance_error


def two_sided(right: int, questions: int, chance: float) -> float:
    """The exact binomial test: twice the share of guessers with at least, or at most, so many right answers.

    Where questions have different numbers of options, `chance` is their mean; the true distribution is narrower then,
    so the test is cautious.
    """
    shares = [math.comb(questions, k) * chance**k * (1 - chance) ** (questions - k) for k in range(questions + 1)]
    return min(1.0, 2 * sum(shares[right:]), 2 * sum(shares[: right + 1]))


def verdict(tally: Tally, right: int, names: list[str] | None = None) -> str:
    """What `right` answers of `tally.questions` mean, in words.

    Args:
        names: of the options, where their order is what the model chooses by: the letters. A difference that its habit
            of choosing some more often explains is then no knowledge.
    """
    share = right / tally.questions
    if not differs_from_chance(tally, right):
        return f"not distinguishable from chance ({tally.chance:.1%})"
    distance = abs(share - tally.chance) / tally.chance_error
    side = "above" if share > tally.chance else "below"
    statement = f"{side} chance ({tally.chance:.1%}) by {distance:.1f} standard errors"
    if names and abs(share - tally.habit) <= SURE * standard_error(share, tally.questions):
        return (
            f"{statement}, but not distinguishable from choosing letters as often without reading ({tally.habit:.1%})"
        )
    return statement


def picks_line(tally: Tally, names: list[str]) -> str:
    """How often each letter was chosen, and how often it was right."""
    parts = []
    for option in sorted(tally.picks | tally.keys):
        name = names[option] if option < len(names) else str(option)
        chosen, right = tally.picks[option] / tally.questions, tally.keys[option] / tally.questions
        parts.append(f"{name} {chosen:.1%} ({right:.1%})")
    return f"chosen (right): {', '.join(parts)}"
