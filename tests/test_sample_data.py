"""dataset/sample: reproducible, well-formed, honest (what is held out is never trained) and small."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from inference.scoring import is_refusal
from scripts.sample_data.schema import Relation
from scripts.sample_data.tables import all_facts, all_tables
from scripts.sample_data.unknown_questions import REFUSALS

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "dataset" / "sample"
TRAINING = ("pretrain", "sft", "dpo", "reason", "lora_identity", "lora_medical")
ANSWERED = ("heldout", "reason_heldout", "lora_identity_heldout", "lora_medical_heldout")
HELD_OUT = (*ANSWERED, "unanswerable_heldout")
MIN_ROWS = {
    "pretrain": 2500,
    "sft": 15_000,
    "heldout": 700,
    "unanswerable_heldout": 180,
    "dpo": 300,
    "dpo_heldout": 40,
    "reason": 600,
    "reason_heldout": 100,
    "lora_identity": 100,
    "lora_identity_heldout": 10,
    "lora_medical": 300,
    "lora_medical_heldout": 40,
}


def rows(name: str) -> list[dict]:
    lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(messages: list[dict]) -> tuple[str, ...]:
    return tuple(message["content"] for message in messages if message["role"] == "user")


def trained_conversations() -> list[list[dict]]:
    found = [row["conversations"] for name in TRAINING if name not in ("pretrain", "dpo") for row in rows(name)]
    return found + [row["chosen"] for row in rows("dpo")]


def test_the_script_writes_the_committed_files_again(tmp_path):
    script = ROOT / "scripts" / "make_sample_data.py"
    subprocess.run([sys.executable, str(script), "--out_dir", str(tmp_path)], check=True, capture_output=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in SAMPLE.glob("*.jsonl")}


def test_another_seed_writes_other_files(tmp_path):
    script = ROOT / "scripts" / "make_sample_data.py"
    command = [sys.executable, str(script), "--out_dir", str(tmp_path), "--seed", "1"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "sft.jsonl").read_bytes() != (SAMPLE / "sft.jsonl").read_bytes()


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 5_000_000


@pytest.mark.parametrize("name", MIN_ROWS)
def test_enough_rows_and_no_row_twice(name):
    lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= MIN_ROWS[name]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("name", ["README.md", "README_en.md"])
def test_readme_states_the_row_counts(name):
    table = (SAMPLE / name).read_text(encoding="utf-8")
    for line in table.splitlines():
        if line.startswith("| `"):
            files, counts = line.split("|")[1:3]
            for file, count in zip(files.split("/"), counts.split("/"), strict=True):
                assert len(rows(file.strip(" `").removesuffix(".jsonl"))) == int(count), file


def check_messages(messages: list[dict], ends_with: str) -> None:
    if messages[0]["role"] == "system":
        messages = messages[1:]
    assert [m["role"] for m in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
    assert messages[-1]["role"] == ends_with


def test_formats():
    for row in rows("pretrain"):
        assert set(row) == {"text"} and row["text"].strip()
    for name in ("sft", "reason", "lora_identity", "lora_medical"):
        for row in rows(name):
            assert set(row) == {"conversations"}
            check_messages(row["conversations"], "assistant")
    for name in ("dpo", "dpo_heldout"):
        for row in rows(name):
            assert set(row) == {"chosen", "rejected"}
            check_messages(row["chosen"], "assistant")
            check_messages(row["rejected"], "assistant")
            assert row["chosen"][:-1] == row["rejected"][:-1]
            assert row["chosen"][-1] != row["rejected"][-1]
    for name in HELD_OUT:
        for row in rows(name):
            if name == "unanswerable_heldout":
                assert set(row) == {"conversations", "unanswerable", "category"} and row["unanswerable"] is True
            else:
                assert set(row) == {"conversations", "answer", "category"} and row["answer"].strip()
            check_messages(row["conversations"], "user")


def test_every_message_says_something():
    def contents(value):
        if isinstance(value, dict) and "content" in value:
            yield value["content"]
        elif isinstance(value, (dict, list)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from contents(part)

    for name in MIN_ROWS:
        for row in rows(name):
            assert all(text == text.strip() and text for text in contents(row)), row


def test_held_out_questions_are_never_trained():
    trained = {questions(conversation) for conversation in trained_conversations()}
    # The first turns of a trained conversation are a trained conversation themselves.
    trained |= {turns[:n] for turns in trained for n in range(1, len(turns))}
    for name in HELD_OUT:
        held_out = [questions(row["conversations"]) for row in rows(name)]
        assert not trained.intersection(held_out)
        assert len(set(held_out)) == len(held_out)


def test_held_out_single_questions_occur_nowhere_not_even_inside_a_conversation_or_a_text():
    said = {text for conversation in trained_conversations() for text in questions(conversation)}
    said |= {row["text"] for row in rows("pretrain")}
    asked = [questions(row["conversations"]) for name in HELD_OUT for row in rows(name)]
    assert not said.intersection(turns[0] for turns in asked if len(turns) == 1)


def essence(question: str) -> str:
    """Letters, digits and signs of arithmetic: what two wordings that differ only in marks and capitals share."""
    return re.sub(r"[^\w+×÷#-]", "", question.lower())


def test_no_mark_space_or_capital_hides_a_held_out_question():
    said = {essence(text) for row in rows("sft") for text in questions(row["conversations"])}
    for name in ("heldout", "unanswerable_heldout"):
        asked = [questions(row["conversations"]) for row in rows(name)]
        assert not said.intersection(essence(turns[0]) for turns in asked if len(turns) == 1)


def replies(name: str) -> list[tuple[str, str]]:
    """(question, answer) of every turn."""
    pairs = []
    for row in rows(name):
        messages = [m["content"] for m in row["conversations"] if m["role"] != "system"]
        pairs += list(zip(messages[::2], messages[1::2], strict=True))
    return pairs


def test_held_out_names_are_never_trained():
    """The name is what a question's template leaves of it."""
    tables = {table.category: table for table in all_tables() if isinstance(table, Relation)}
    said = "\n".join(question for question, _ in replies("sft")).lower()
    checked = 0
    for row in rows("unanswerable_heldout"):
        kind, category = row["category"].split(": ")
        if kind == "unknown name":
            question = row["conversations"][-1]["content"]
            patterns = [re.escape(t).replace(r"\{s\}", "(.+)") for t in tables[category].questions]
            name = next(match[1] for p in patterns if (match := re.fullmatch(p, question)))
            assert len(name) < 3 or name.strip("《》").lower() not in said, name
            checked += 1
    assert checked >= 120


def test_known_and_unknown_names_are_asked_about_in_the_same_words():
    """So that the name decides and not the wording: most openings of refused questions open answered ones too."""
    openings = {True: Counter(), False: Counter()}
    for question, answer in replies("sft"):
        openings[answer in REFUSALS][question[:3]] += 1
    common = [opening for opening, _ in openings[True].most_common(20)]
    assert sum(openings[False][opening] > 0 for opening in common) >= 15


def test_what_refuses_is_what_the_scorer_takes_for_a_refusal():
    said = Counter(answer for _, answer in replies("sft"))
    assert all(said[refusal] >= 20 and is_refusal(refusal) for refusal in REFUSALS)
    assert not [answer for answer in said if is_refusal(answer) and answer not in REFUSALS]
    assert 0.15 <= sum(said[refusal] for refusal in REFUSALS) / sum(said.values()) <= 0.35


def test_known_facts_are_never_refused():
    """Each fact is asked for in at least 15 wordings, and no wording of a known name gets a refusal."""
    wordings = Counter(answer for _, answer in replies("sft"))
    assert min(wordings[fact.answer] for fact in all_facts()) >= 15
    known = {essence(body) for fact in all_facts() for body, _ in fact.askings}
    assert not [question for question, answer in replies("sft") if answer in REFUSALS and essence(question) in known]


def test_wordings_that_no_training_file_uses_are_no_training_wordings():
    for table in all_tables():
        for fact in table.facts():
            assert not {essence(body) for body, _ in fact.askings} & {essence(wording) for wording in fact.unseen}


def test_unseen_wordings_and_later_turns_have_their_share():
    categories = [row["category"] for row in rows("heldout")]
    assert 0.10 <= categories.count("unseen wording") / len(categories) <= 0.20
    assert categories.count("follow-up") >= 50 and categories.count("pronoun") >= 10


def test_held_out_pairs_are_about_other_questions():
    trained = {questions(row["chosen"]) for row in rows("dpo")}
    assert not trained.intersection(questions(row["chosen"]) for row in rows("dpo_heldout"))


def test_every_fact_is_taught():
    spoken = defaultdict(set)
    for name in ("sft", "lora_identity", "lora_medical"):
        for row in rows(name):
            spoken[name] |= {m["content"] for m in row["conversations"] if m["role"] == "assistant"}
    for held_out, name in (("heldout", "sft"), *((f"{n}_heldout", n) for n in ("lora_identity", "lora_medical"))):
        for row in rows(held_out):
            assert any(row["answer"] in text for text in spoken[name]), row


def test_one_question_has_one_answer():
    """In the base corpus; the persona of lora_identity is meant to contradict it."""
    answers = defaultdict(set)
    for row in rows("sft"):
        turns = [m for m in row["conversations"] if m["role"] != "system"]
        for n in range(1, len(turns), 2):
            answers[tuple(m["content"] for m in turns[:n])].add(turns[n]["content"])
    assert not {asked: said for asked, said in answers.items() if len(said) > 1}


def test_reasoning_is_tagged():
    for row in rows("reason"):
        reply = row["conversations"][-1]["content"]
        assert reply.startswith("<think>\n") and "\n</think>\n<answer>\n" in reply and reply.endswith("\n</answer>")


def test_every_sum_is_right():
    operators = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "×": lambda a, b: a * b, "÷": lambda a, b: a / b}
    checked = 0
    for name in ("pretrain", "sft", "reason"):
        text = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8")
        for a, operator, b, result in re.findall(r"(\d+)([-+×÷])(\d+)(?:=|等于)(\d+)", text):
            assert operators[operator](int(a), int(b)) == int(result), (a, operator, b, result)
            checked += 1
    assert checked > 1000
