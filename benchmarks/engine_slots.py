"""Which request is in which row at which step: two real runs, drawn. The picture of docs/engine_en.md.

    python -m benchmarks.engine_slots --weights out/quickstart/full_sft_256.pth --out engine_slots.png

The same questions, which arrive one after the other, are answered twice: in batches that begin when the one before has
ended, and in rows that are given to the next request as soon as they are free. Greedy, so both give the same answers.
"""

import argparse
import colorsys
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from inference.batch import Batch
from inference.models import Choice, load_choice
from inference.requests import Request
from inference.sampling import SamplingParams
from inference.scoring import read_questions
from model.chat_format import ChatFormat
from model.record import config_for

QUESTIONS = "dataset/sample/heldout.jsonl"


@dataclass
class Cell:
    """What one row did in one step."""

    step: int
    row: int
    request: int
    reads_prompt: bool


def run(batch: Batch, requests: list[Request], arrivals: list[int], wait_for_all: bool) -> tuple[list[Cell], dict]:
    """Answer all; request number i arrives at step `arrivals[i]`. Returns the cells, and the tokens by number.

    Args:
        wait_for_all: take new requests only when no row is in use.
    """
    cells, numbers, answers = [], {}, {}
    waiting, step = list(range(len(requests))), 0
    while waiting or batch.running:
        is_open = not (wait_for_all and batch.running)
        while is_open and waiting and arrivals[waiting[0]] <= step and len(batch.running) < batch.max_rows:
            number = waiting.pop(0)
            numbers[batch.add(requests[number])] = number
        for continuation in batch.running:
            cells.append(Cell(step, continuation.row, numbers[continuation], not continuation.tokens))
        for continuation in batch.step():
            answers[numbers[continuation]] = continuation.tokens
        step += 1
    return cells, answers


def colour_of(request: int) -> tuple[float, float, float]:
    """Steps of the golden ratio around the circle of hues, in two lightnesses: no two of some thirty are the same."""
    hue = request * 0.618034 % 1
    return colorsys.hls_to_rgb(hue, (0.6, 0.75)[request % 2], 0.7)


def draw(axes: Axes, cells: list[Cell], max_rows: int, title: str) -> None:
    """One square for each row and step: the colour is the request's, a dot marks the step that read its prompt.

    A row that ends changes places with the last one in use, so a request may go on in another row; it has its number in
    every row in which it stays for more than one step.
    """
    widths, labelled = Counter((cell.request, cell.row) for cell in cells), set()
    for cell in cells:
        colour = colour_of(cell.request)
        axes.add_patch(Rectangle((cell.step, cell.row), 1, 0.9, facecolor=colour, edgecolor="none"))
        if cell.reads_prompt:
            axes.plot(cell.step + 0.5, cell.row + 0.45, "k.", markersize=3)
        stretch = (cell.request, cell.row)
        if stretch not in labelled and not cell.reads_prompt:  # the dot has the step before
            labelled.add(stretch)
            wide = widths[stretch] > 3
            axes.text(cell.step + 0.1, cell.row + 0.45, str(cell.request), fontsize=6 if wide else 4.5, va="center")
    steps = max(cell.step for cell in cells) + 1
    axes.set_ylim(max_rows, 0)
    axes.set_yticks([row + 0.45 for row in range(max_rows)], range(max_rows))
    axes.set_ylabel("row")
    axes.set_title(
        f"{title}: {steps} steps, {100 * len(cells) / (steps * max_rows):.0f} % of the rows in use", fontsize=9
    )


def main() -> None:
    """Run both and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a .pth file of a chat model")
    parser.add_argument("--questions", default=QUESTIONS, help="jsonl file of questions (%(default)s)")
    parser.add_argument("--rows", type=int, default=6, help="rows of the batch (%(default)s)")
    parser.add_argument("--requests", type=int, default=28, help="questions asked (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("engine_slots.png"), help="the picture (%(default)s)")
    args = parser.parse_args()
    config, _ = config_for(args.weights, {})
    model, tokenizer = load_choice(Choice(args.weights, config), "cpu")
    chat_format, rng = ChatFormat(tokenizer), random.Random(0)
    questions = rng.sample(read_questions(args.questions), args.requests)
    params = SamplingParams(64, temperature=0)
    requests = [Request(chat_format.encode_prompt(question.messages), params) for question in questions]
    arrivals = sorted(rng.randrange(0, 2 * args.requests) for _ in requests)

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    answers = []
    for axes, wait, title in zip(panels, (True, False), ("fixed batches", "continuous batching"), strict=True):
        batch = Batch(model, args.rows, eos_token_ids=(tokenizer.eos_token_id,))
        cells, tokens = run(batch, requests, arrivals, wait)
        draw(axes, cells, args.rows, title)
        answers.append(tokens)
        print(f"{title}: {max(cell.step for cell in cells) + 1} steps, {len(cells)} row-steps")
    print(f"the same answers: {answers[0] == answers[1]}")
    panels[0].set_xlim(left=0)
    panels[0].autoscale(axis="x")
    panels[1].set_xlabel("step (one colour and number is one request; a dot: its prompt is read)")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
