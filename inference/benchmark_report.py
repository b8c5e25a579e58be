"""Tables of benchmark results: by subject and category, with standard errors and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference.accuracy import GUESSERS, Tally, add_up, differs_from_chance, picks_line, standard_error, verdict
from inference.exam import LETTERS

TITLES = {
    "letter": "letter scoring: the options are shown, the likeliest letter counts",
    "cloze": "cloze scoring: the likeliest option counts, by its whole text",
}


@dataclass(frozen=True)
class Row:
    """The answers of one subject. `scoring` is "letter" or "cloze"."""

    benchmark: str
    subject: str
    category: str
    scoring: str
    tally: Tally


def table(rows: Sequence[Row]) -> str:
    """Everything about one benchmark in one scoring: subjects, categories, all questions, and what that says.

    The last lines are as MiniMind's README has them, 总题数, 总正确数, 总正确率, and say which scoring they count.
    """
    by_subject: dict[str, Tally] = {}
    by_category: dict[str, Tally] = {}
    for row in rows:
        by_subject[row.subject] = by_subject.get(row.subject, Tally()) + row.tally
        if row.category:
            by_category[row.category] = by_category.get(row.category, Tally()) + row.tally
    benchmark, scoring, total = rows[0].benchmark, rows[0].scoring, add_up(row.tally for row in rows)
    width = max(len(f"{total.right}/{total.questions}"), len("right/total"))
    lines = [f"{benchmark}, {TITLES[scoring]}", f"{'right/total':>{width}}      plain ± SE     normalised ± SE"]
    if len(by_subject) > 1:
        lines += [_line(name, tally, width) for name, tally in by_subject.items()]
    if len(by_category) > 1:
        lines += ["by category", *(_line(name, tally, width) for name, tally in sorted(by_category.items()))]
    if len(by_subject) > 1:
        lines.append("all")
    lines.append(_line(benchmark, total, width))
    if len(by_subject) > 1:
        lines.append(_outliers(list(by_subject.values())))
    letters = list(LETTERS) if scoring == "letter" else None
    counted = "letter" if letters else "cloze, plain"
    if letters:
        lines.append(picks_line(total, letters))
        lines.append(f"{benchmark}, letters: {verdict(total, total.right, letters)}")
    else:
        lines.append(f"{benchmark}, cloze, plain: {verdict(total, total.right)}")
        lines.append(f"{benchmark}, cloze, normalised: {verdict(total, total.right_normalised)}")
    lines.append(f"总题数: {total.questions}\n总正确数: {total.right}\n总正确率: {total.accuracy:.2%} ({counted})")
    return "\n".join(lines)


def _line(name: str, tally: Tally, width: int) -> str:
    cells = []
    for share in (tally.accuracy, tally.accuracy_normalised):
        error = f"{100 * standard_error(share, tally.questions):5.2f}" if 0 < share < 1 else "    -"  # 0 is no estimate
        cells.append(f"{100 * share:6.2f} ± {error} %")
    star = "*" if differs_from_chance(tally, tally.right) else " "
    return f"{f'{tally.right}/{tally.questions}':>{width}}  {'  '.join(cells)} {star} {name}"


def _outliers(tallies: list[Tally]) -> str:
    """How many subjects lie far from chance, beside how many would by chance alone."""
    marked = sum(differs_from_chance(tally, tally.right) for tally in tallies)
    return (
        f"* distinguishable from chance (p < {GUESSERS:.2%}): {marked} of {len(tallies)} subjects; as many guessers "
        f"would give at most {GUESSERS * len(tallies):.1f}"
    )


def as_json(row: Row) -> dict:
    """A row for a file."""
    tally = row.tally
    return {
        "benchmark": row.benchmark,
        "subject": row.subject,
        "category": row.category,
        "scoring": row.scoring,
        "questions": tally.questions,
        "right": tally.right,
        "right_normalised": tally.right_normalised,
        "accuracy": tally.accuracy,
        "standard_error": standard_error(tally.accuracy, tally.questions),
        "accuracy_normalised": tally.accuracy_normalised,
        "standard_error_normalised": standard_error(tally.accuracy_normalised, tally.questions),
        "chance": tally.chance,
    }
