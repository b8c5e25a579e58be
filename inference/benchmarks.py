"""Benchmarks of lm-evaluation-harness (the package lm_eval): find them, get their questions, ask them.

lm_eval knows questions and prompts of some hundred benchmarks. A task whose options are letters is asked in two ways:

letter   question and options are shown, the likeliest letter counts:    ...A. 胸 B. 腹 答案： A
cloze    only the question is shown, the likeliest whole option counts:  ...答案：胸

A small model cannot connect a letter to the option behind it, so with letters it scores like a guesser whatever it
knows; with cloze, what it knows can show (OLMES, Gu et al. 2024, compares the two).

This module needs lm_eval, so it is imported inside of functions only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lm_eval
from datasets import Dataset
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from inference.accuracy import Tally, add_up
from inference.exam import LETTERS, ExamQuestion
from inference.subjects import category_of

FEWSHOT_SEED = 1234  # that of lm_eval, for the same examples
OPTION_LINE = re.compile(r"\n([A-Z])\. (\{\{.+?\}\})")  # in templates: '\nA. {{A}}' or '\nA. {{choices[0]}}'


@dataclass
class Part:
    """One task of lm_eval, usually one subject, and how it is scored: "letter", "cloze", or "own" metrics."""

    benchmark: str
    subject: str
    category: str
    task: ConfigurableTask
    scoring: str = "own"
    tally: Tally = field(default_factory=Tally)
    metrics: dict[str, float] = field(default_factory=dict)


def known_tasks() -> TaskManager:
    """The index of all tasks that lm_eval knows; reading it takes some seconds. Later only errors are logged."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # lines of INFO and warnings for each of 67 subjects
    return TaskManager()


def resolve_names(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """Names of benchmarks as lm_eval knows them; a pattern stands for what it matches.

    `lm_eval --tasks 'ceval*'` fails with "Duplicate task": the pattern matches the group ceval-valid and each of its
    tasks. Here what a matching group holds is left out.

    Raises:
        ValueError: nothing has such a name; says which are similar.
    """
    resolved = []
    for name in names:
        matches = [name] if name in manager.task_index else manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            near = sorted({task for task in manager.all_groups if name in task or task in name} | set(near))[:8]
            raise ValueError(
                f"--tasks {name}: lm_eval knows no such task"
                + (f"; similar names: {', '.join(near)}" if near else "")
                + ". `lm_eval ls tasks` lists all"
            )
        inside = {member for match in matches for member in members(manager, match)}
        resolved += [match for match in matches if match not in inside]
    return list(dict.fromkeys(resolved))


def members(manager: TaskManager, name: str) -> Iterator[str]:
    """The names of all groups and tasks inside a group or tag, at any depth."""
    entry = manager.task_index.get(name)
    inside = sorted(entry.tags) if entry is not None and entry.cfg is None else []
    if entry is not None and entry.cfg is not None and isinstance(entry.cfg.get("task"), list):
        inside = [item if isinstance(item, str) else item.get("group", item.get("task")) for item in entry.cfg["task"]]
    for member in inside:
        yield member
        yield from members(manager, member)


def load_parts(manager: TaskManager, name: str, folder: Path | None = None) -> list[Part]:
    """The tasks of a benchmark with their data: from `folder`, laid out like the hub, or else from the hub.

    Raises:
        ValueError: the data cannot be had; says where to put which files.
    """
    try:
        with working_directory(folder):  # datasets prefers a directory ./ceval/ceval-exam to the hub's ceval/ceval-exam
            loaded = manager.load([name])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(_missing_data(manager, name, folder, error)) from error
    parent_of = {child: group for group, children in loaded["group_map"].items() for child in children}
    parts = []
    for task_name, task in loaded["tasks"].items():
        subject = task_name.removeprefix(f"{name}_") if task_name != name else name
        parent = parent_of.get(task_name, name).removeprefix(f"{name}_")
        category = category_of(name, subject) or (parent if parent != name else "")
        parts.append(Part(name, subject, category, task))
    return parts


def _missing_data(manager: TaskManager, name: str, folder: Path | None, error: Exception) -> str:
    leaves = [name, *members(manager, name)]
    configs = [manager.task_index[leaf].cfg or {} for leaf in leaves if leaf in manager.task_index]
    data = next((config["dataset_path"] for config in configs if "dataset_path" in config), name)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    place = folder or Path("benchmarks_data")
    here = f"{folder / data} is not a usable copy of it" if folder else "it could not be fetched"
    return (
        f"{name} needs the data set {data} of the Hugging Face hub: {here} ({reason}).\n"
        "Where there is a network (HF_ENDPOINT=https://hf-mirror.com where the hub cannot be reached):\n"
        f"  hf download {data} --repo-type dataset --local-dir {place / data}\n"
        f"then copy the folder here and pass --data {place}; or pass your own questions: --data FILE.jsonl"
    )


@contextlib.contextmanager
def working_directory(folder: Path | None) -> Iterator[None]:
    """Inside, `folder` is the current directory; None changes nothing."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def exam_parts(manager: TaskManager, names: Sequence[str], path: Path, questions: list[ExamQuestion]) -> list[Part]:
    """Tasks from a file's questions, one a subject (and number of options).

    With `names`, the prompts are those of the tasks of lm_eval for the same subjects; without, C-Eval's without its
    first line.

    Raises:
        ValueError: a subject of the file is in none of `names`, or its questions do not have as many options.
    """
    stock = {}
    for name in names:
        for leaf in (name, *members(manager, name)):
            entry = manager.task_index.get(leaf)
            config = entry.cfg if entry is not None and entry.cfg is not None else {}
            if "dataset_name" in config:
                stock[config["dataset_name"]] = (name, config)
    groups: dict[tuple[str, str, int], list[ExamQuestion]] = {}
    for question in questions:
        groups.setdefault((question.subject, question.category, len(question.options)), []).append(question)
    parts = []
    for (subject, category, count), rows in groups.items():
        if all(row.is_example for row in rows):
            continue
        if names and subject not in stock:
            raise ValueError(
                f"{path}: subject {subject!r} is none of {' '.join(names)}, whose subjects are {', '.join(stock)}; "
                "leave --tasks out to ask the file's questions with a prompt of our own"
            )
        name, config = stock.get(subject, (path.name.partition(".")[0], exam_config(count)))
        if len(config["doc_to_choice"]) != count:
            raise ValueError(
                f"{path}: {name} has {len(config['doc_to_choice'])} options, {subject} has some of {count}"
            )
        task = ConfigurableTask(config={**config, **_data(rows), "task": f"{name}_{subject}_{len(parts)}"})
        parts.append(Part(name, subject or name, category or category_of(name, subject), task))
    return parts


def exam_config(options: int) -> dict:
    """The prompt for questions of one's own, and their metrics."""
    lines = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(LETTERS[:options]))
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}" + lines + "\n答案：",
        "doc_to_choice": list(LETTERS[:options]),
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _data(rows: list[ExamQuestion]) -> dict:
    """The part of a task's configuration that says where its questions come from: here, from memory.

    Every row has the names of C-Eval and TMMLU+ (question, answer) and those of CMMLU and A-CLUE (Question, Answer).
    """

    def documents(wanted: bool) -> Dataset:
        documents = []
        for row in rows:
            if row.is_example == wanted:
                letter = LETTERS[row.key]
                options = dict(zip(LETTERS[: len(row.options)], row.options, strict=True))
                texts = {"question": row.question, "Question": row.question, "answer": letter, "Answer": letter}
                documents.append({**texts, **options, "choices": list(row.options)})
        return Dataset.from_list(documents)

    data = {"test": documents(False)}
    if any(row.is_example for row in rows):
        data["dev"] = documents(True)
    return {
        "custom_dataset": lambda **_: data,
        "dataset_path": None,
        "dataset_name": None,
        "test_split": "test",
        "validation_split": None,
        "fewshot_split": "dev" if "dev" in data else None,
        "fewshot_config": {"sampler": "first_n"} if "dev" in data else None,
        "process_docs": None,  # tmmluplus makes `choices` of A to D there, which is done
    }


def has_letters(task: ConfigurableTask) -> bool:
    """Whether the options of a multiple-choice task are letters."""
    options = task.doc_to_choice(task.task_docs[0]) if task.OUTPUT_TYPE == "multiple_choice" else []
    return bool(options) and all(len(option) == 1 and option in LETTERS for option in options)


def as_cloze(task: ConfigurableTask) -> ConfigurableTask | None:
    """The same questions without lettered options, the options' texts in the place of the letters.

    None where the prompt is not a template with a line 'A. {{...}}' for each option.
    """
    template = task.config.doc_to_text
    lines = OPTION_LINE.findall(template) if isinstance(template, str) else []
    if not lines:
        return None
    changed = {
        "doc_to_text": OPTION_LINE.sub("", template),
        "doc_to_choice": lambda doc: [lm_eval.utils.apply_template(expression, doc) for _, expression in lines],
        "doc_to_target": lambda doc: key_of(task, doc),
        "target_delimiter": "" if template.endswith("：") else task.config.target_delimiter,
    }
    cloze = type(task).__new__(type(task))
    cloze.__dict__.update(task.__dict__)  # data and sampler of examples are shared
    cloze.fewshot_cfg = dataclasses.replace(task.fewshot_cfg, **changed)
    # The description says "choose an option"; here there is none to choose.
    cloze._config = dataclasses.replace(task.config, **changed, description="", fewshot_config=cloze.fewshot_cfg)
    return cloze


def key_of(task: ConfigurableTask, doc: dict) -> int | None:
    """Which option is right, counted from 0; None for a task with several."""
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(target, str):
        options = task.doc_to_choice(doc)
        return options.index(target) if target in options else None
    return target if isinstance(target, int) else None


def scored_parts(parts: list[Part], scorings: Sequence[str]) -> list[Part]:
    """Every part once for each way it can be scored in; options that are no letters are always scored as texts."""
    scored = []
    for part in parts:
        if part.task.OUTPUT_TYPE != "multiple_choice":
            scored.append(part)
        elif not has_letters(part.task):
            scored.append(dataclasses.replace(part, scoring="cloze"))
        else:
            if "letter" in scorings:
                scored.append(dataclasses.replace(part, scoring="letter"))
            if "cloze" in scorings and (cloze := as_cloze(part.task)) is not None:
                scored.append(dataclasses.replace(part, scoring="cloze", task=cloze))
    if not scored:
        raise ValueError(f"--scoring {' '.join(scorings)}: these tasks cannot be scored so; use --scoring letter")
    return scored


def run(
    model: LM, parts: list[Part], *, limit: int | None = None, num_fewshot: int | None = None, chat: bool = False
) -> Iterator[list[Part]]:
    """Ask all questions; yields the parts with their tallies, or with lm_eval's own metrics, one scoring at a time.

    Args:
        limit: questions of each task at most.
        num_fewshot: examples before each question; by default, and where a task insists, as the task says.
        chat: show each question as a message to the assistant.

    Raises:
        ValueError: a task has fewer examples than `num_fewshot`.
    """
    for part in parts:
        _choose_examples(part, num_fewshot)
    for scoring in ("letter", "cloze", "own"):  # apart: the same tasks under the same names
        batch = {part.task.task_name: part for part in parts if part.scoring == scoring}
        if not batch:
            continue
        tasks = {"tasks": {name: part.task for name, part in batch.items()}}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each task
            results = lm_eval.evaluate(model, tasks, limit=limit, apply_chat_template=chat, bootstrap_iters=1000)
        done = []
        for name, part in batch.items():
            tally = Tally() if scoring == "own" else _tally(part.task, results["samples"][name])
            metrics = {key: value for key, value in results["results"][name].items() if isinstance(value, float)}
            done.append(dataclasses.replace(part, tally=tally, metrics=metrics))
        yield done


def _choose_examples(part: Part, num_fewshot: int | None) -> None:
    """Settle how many examples precede a question of this part, and that they are always the same."""
    task = part.task
    if num_fewshot is None or task.config.num_fewshot == 0:
        num_fewshot = task.config.num_fewshot or 0
    if num_fewshot:
        examples = task.fewshot_docs()
        count = 0 if examples is None else len(examples)
        if count < num_fewshot:
            raise ValueError(
                f"--num_fewshot {num_fewshot}: {part.subject} has {count} examples, and no more can be shown"
            )
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)


def _tally(task: ConfigurableTask, samples: list[dict]) -> Tally:
    tallies = []
    for sample in samples:
        options = task.doc_to_choice(sample["doc"])
        key = key_of(task, sample["doc"])
        if key is not None:
            tallies.append(Tally.of([response[0] for response in sample["filtered_resps"]], options, key))
    return add_up(tallies)
