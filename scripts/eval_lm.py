"""Ask a model the multiple-choice questions of C-Eval, CMMLU, A-CLUE, TMMLU+, OpenBookQA and others, and count.

    python scripts/eval_lm.py --tasks ceval-valid cmmlu aclue tmmluplus       # questions from the Hugging Face hub
    python scripts/eval_lm.py --load 1 ./MiniMind2 --tasks openbookqa
    python scripts/eval_lm.py --tasks ceval-valid --data benchmarks_data      # from benchmarks_data/ceval/ceval-exam/
    python scripts/eval_lm.py --tasks cmmlu --data cmmlu.jsonl.xz             # CMMLU's prompts, questions of a file
    python scripts/eval_lm.py --data my_questions.jsonl                       # your own

Needs lm_eval (lm-evaluation-harness), which knows the questions and prompts; the model is computed here. Questions with
lettered options are asked twice: which letter follows (what published tables hold, and what tiny models cannot do), and
which whole option follows (cloze). Every accuracy comes with its standard error, and with what it means: most models of
this size are not distinguishable from chance.

reads   a model as eval_model.py does (--model_mode, --weight, --load), and questions: `lm_eval ls tasks` lists all
        benchmarks, inference/exam.py says how a file of your own looks
writes  nothing but --out FILE.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import whole_file  # noqa: E402
from common.flags import BriefParser, add_bool_flag, is_installed, non_empty, plain_errors, whole  # noqa: E402
from inference.benchmark_report import Row, as_json, table  # noqa: E402
from inference.exam import read_exam  # noqa: E402
from inference.flags import add_choice_flags, settle_choice  # noqa: E402
from inference.models import load_choice  # noqa: E402
from model.loading import count_parameters  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; adds `choice`."""
    parser = BriefParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, check=settle)
    add_choice_flags(parser.add_argument_group("model", "sizes are read from the weights, so seldom needed"))
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--tasks", nargs="+", type=non_empty, default=[], metavar="NAME",
        help="benchmarks of lm_eval: ceval-valid cmmlu aclue tmmluplus openbookqa ...",
    )  # fmt: skip
    group.add_argument(
        "--data",
        type=non_empty,
        metavar="PATH",
        help="a folder laid out like the hub, or a .jsonl file, also .xz or .gz",
    )
    group.add_argument(
        "--scoring", nargs="+", choices=("letter", "cloze"), default=["letter", "cloze"],
        help="of lettered options (both)",
    )  # fmt: skip
    group.add_argument("--limit", type=whole(1, 10**9), help="questions of each subject at most, for a quick look")
    group.add_argument(
        "--num_fewshot", type=whole(0, 1000), help="examples before each question (as the task says, mostly none)"
    )
    add_bool_flag(
        group,
        "--apply_chat_template",
        default=False,
        help="ask in the chat format; published tables do not (%(default)s)",
    )
    group.add_argument("--batch_size", type=whole(1, 2**16), default=32, help="rows of one forward pass (%(default)s)")
    group.add_argument("--out", type=non_empty, metavar="FILE.json", help="write all figures there")
    return parser.parse_args(argv)


def settle(args: argparse.Namespace) -> list[str]:
    """Add `args.choice` (see `settle_choice`); returns every problem."""
    problems = settle_choice(args)
    if args.lora_name:
        problems.append("--lora_name: merge it first: python scripts/convert_model.py WEIGHTS NEW.pth --lora ADAPTER")
    if not args.tasks and not args.data:
        problems.append("--tasks or --data: say what to ask, e.g. --tasks ceval-valid cmmlu")
    if args.data and not Path(args.data).exists():
        problems.append(f"--data {args.data}: no such file or folder")
    elif args.data and Path(args.data).is_dir() and not args.tasks:
        problems.append("--data of a folder: name the benchmarks in it with --tasks")
    if not is_installed("lm_eval"):
        problems.append('--tasks, --data: the package is missing; pip install "lm_eval>=0.4.13,<0.5"')
    return problems


def progress(stream, seconds: float = 10) -> Callable[[int, int], None]:
    """A function that writes every `seconds` how far the work is."""
    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            print(f"{done} of {total} answers scored, {now - start:.0f} s", file=stream, flush=True)

    return report


def run(args: argparse.Namespace) -> None:
    """Load, ask, print. Raises ValueError and OSError for what is wrong."""
    data = Path(args.data).resolve() if args.data else None
    questions = read_exam(data) if data and data.is_file() else []  # before what takes long
    for remark in args.choice.remarks:
        print(remark, file=sys.stderr)
    model, tokenizer = load_choice(args.choice, args.device, args.dtype)  # missing weights: before any download
    from inference import benchmarks
    from inference.harness import HarnessModel

    print("reading the names of all tasks of lm_eval (10 s)", file=sys.stderr)
    manager = benchmarks.known_tasks()
    names = benchmarks.resolve_names(manager, args.tasks)
    if names != args.tasks:
        print(f"tasks: {' '.join(names)}")
    if questions:
        parts = benchmarks.exam_parts(manager, names, data, questions)
    else:
        parts, missing = [], []
        for name in names:
            try:
                parts += benchmarks.load_parts(manager, name, data)
            except ValueError as error:
                missing.append(str(error))
        if missing:
            raise ValueError("\n\n".join(missing))
    parts = benchmarks.scored_parts(parts, args.scoring)

    print(f"{args.choice.path}: {count_parameters(model) / 1e6:.2f}M parameters, {model.device}, {model.dtype}")
    harness = HarnessModel(model, tokenizer, args.batch_size, progress(sys.stderr))
    start, results = time.monotonic(), []
    options = {"limit": args.limit, "num_fewshot": args.num_fewshot, "chat": args.apply_chat_template}
    for scored in benchmarks.run(harness, parts, **options):  # letters first: Ctrl-C later does not lose them
        for benchmark in dict.fromkeys(part.benchmark for part in scored):
            results += show([part for part in scored if part.benchmark == benchmark])
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    if harness.truncated:
        print(f"{harness.truncated} prompts were longer than the model's context and lost their beginning")
    if args.out:
        facts = {"model": str(args.choice.path), "num_fewshot": args.num_fewshot, "limit": args.limit}
        with whole_file(args.out) as file:
            file.write(json.dumps({**facts, "results": results}, ensure_ascii=False, indent=1).encode())


def show(parts: list) -> list[dict]:
    """Print what one benchmark gave in one scoring; returns it for the file."""
    if parts[0].scoring == "own":
        for part in parts:
            print(f"\n{part.subject}: " + ", ".join(f"{name} {value:.4f}" for name, value in part.metrics.items()))
        return [{"benchmark": part.benchmark, "task": part.subject, **part.metrics} for part in parts]
    rows = [Row(part.benchmark, part.subject, part.category, part.scoring, part.tally) for part in parts]
    print("\n" + table(rows))
    return [as_json(row) for row in rows]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with plain_errors():
        run(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # nothing is written before the end
        sys.exit(130)
