"""scripts/eval_lm.py without lm_eval: likelihoods, what a share of right answers says, and files of questions."""

import gzip
import json
import lzma
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import toy_model

from inference.accuracy import Tally, add_up, differs_from_chance, standard_error, two_sided, verdict
from inference.benchmark_report import Row, table
from inference.exam import read_exam
from inference.likelihood import score_continuations
from inference.subjects import CATEGORIES, category_of

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "eval_lm.py"

# Likelihoods


def one_by_one(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the definition: a forward pass for each token, with all that stands before it."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        seen = (context + continuation[:i])[-model.config.max_position_embeddings :]
        logits = model(torch.tensor([seen])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        greedy &= logits.argmax().item() == token
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_likelihoods_are_those_of_the_definition(batch_size):
    model = toy_model().eval()
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for length in range(1, 14):
        context = torch.randint(64, (length,), generator=generator).tolist()
        best = model(torch.tensor([context])).logits[0, -1].argmax().item()
        pairs += [(context, [3]), (context, [5]), (context, [best]), (context, [3, 7, 9]), (context + [3], [7])]
    scored = dict(score_continuations(model, pairs, batch_size))
    assert sorted(scored) == list(range(len(pairs)))
    for i, pair in enumerate(pairs):
        likelihood, greedy = one_by_one(model, *pair)
        assert scored[i].log_likelihood == pytest.approx(likelihood, abs=1e-4), pair
        assert scored[i].is_greedy == greedy
    assert any(result.is_greedy for result in scored.values())


def test_letters_behind_one_question_share_a_forward_pass():
    model, inputs = toy_model().eval(), []
    model.register_forward_pre_hook(lambda module, args: inputs.append(args[0].shape))
    context = [5, 6, 7, 8]
    list(score_continuations(model, [(context, [letter]) for letter in (1, 2, 3, 4)]))
    assert inputs == [(1, 4)]


def test_a_context_that_is_too_long_loses_its_beginning():
    model = toy_model(max_position_embeddings=16).eval()
    context = [i % 64 for i in range(40)]
    ((_, scored),) = score_continuations(model, [(context, [1, 2])])
    ((_, cut),) = score_continuations(model, [(context[-15:], [1, 2])])
    assert scored == cut
    with pytest.raises(ValueError, match="17 tokens do not fit into the model's context of 16"):
        list(score_continuations(model, [([1], [2] * 17)]))


def test_nothing_to_score_is_refused():
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="pair 0: context and continuation must both hold a token"):
            list(score_continuations(toy_model().eval(), [pair]))


# Accuracy


def many(questions: int, right: int, picks: str | None = None, keys: str | None = None) -> Tally:
    tally = Tally(questions, right, right, questions / 4, questions * 3 / 16)
    for name, letters in (("picks", picks), ("keys", keys)):
        getattr(tally, name).update("ABCD".index(letter) for letter in letters or "")
    return tally


def test_a_question_is_right_plainly_or_per_character():
    tally = Tally.of([-4.0, -6.0], ["ab", "abcdef"], key=1)  # -2 and -1 a character
    assert (tally.right, tally.right_normalised, tally.chance) == (0, 1, 0.5)
    total = add_up([tally, Tally.of([-1.0, -2.0, -3.0, -4.0], list("ABCD"), key=0)])
    assert (total.questions, total.right, total.right_normalised) == (2, 1, 2)
    assert total.chance == pytest.approx(0.375)
    assert total.chance_error == pytest.approx(math.sqrt(0.25 + 3 / 16) / 2)


def test_standard_error_of_c_evals_validation_set():
    assert standard_error(0.25, 1346) == pytest.approx(0.0118, abs=5e-5)


def test_what_upstreams_readme_reports_is_chance():
    """26.52, 26.37 and 26.6 % of C-Eval's 1,346 questions: within 2 standard errors of 25 %."""
    for right in (344, 351, 355, 357, 358):
        assert verdict(many(1346, right), right) == "not distinguishable from chance (25.0%)"
    assert verdict(many(1346, 417), 417) == "above chance (25.0%) by 5.1 standard errors"  # 30.98 %
    assert verdict(many(1346, 250), 250).startswith("below chance")


def test_few_questions_are_never_enough_whatever_the_answers():
    assert not differs_from_chance(many(1, 1), 1)
    assert not differs_from_chance(many(5, 0), 0)
    assert differs_from_chance(many(10, 9), 9)


def test_small_numbers_are_judged_by_the_binomial_distribution():
    """2 of 2 was above chance by 2.4 standard errors, though one guesser of 16 has both right."""
    assert two_sided(2, 2, 0.25) == pytest.approx(2 / 16) and two_sided(0, 2, 0.25) == 1
    assert not differs_from_chance(many(2, 2), 2)
    assert verdict(many(2, 2), 2) == "not distinguishable from chance (25.0%)"
    for right in range(101):  # where the two ways of judging meet, they agree but for the edge
        exact, normal = many(100, right), abs(right - 25) > 2 * math.sqrt(100 * 3 / 16)
        assert differs_from_chance(exact, right) == normal or right in (16, 34), right


def test_a_table_of_few_questions_claims_no_certainty():
    """It showed "100.00 ± 0.00 % *" for two questions."""
    none, both = many(2, 0, "AB", "CD"), many(2, 2, "AB", "AB")
    text = table([Row("exam", "law", "", "letter", none), Row("exam", "art", "", "letter", both)])
    assert "0.00 ±     - %" in text and "100.00 ±     - %" in text and "0.00 ±  0.00" not in text
    assert "0 of 2 subjects; as many guessers would give at most 0.1" in text and " * art" not in text


def test_a_letter_chosen_always_is_no_knowledge():
    """Where 40 % of the answers are C, saying C is above 25 %, and a guesser with the same habit as good."""
    keys = "A" * 200 + "B" * 200 + "C" * 400 + "D" * 200
    always_c = many(1000, 400, "C" * 1000, keys)
    assert always_c.habit == pytest.approx(0.4)
    said = verdict(always_c, 400, list("ABCD"))
    assert "above chance" in said and "not distinguishable from choosing letters as often without reading" in said
    knows = many(1000, 400, keys, keys)
    assert verdict(knows, 400, list("ABCD")).startswith("above chance") and "letters" not in verdict(
        knows, 400, [*"ABCD"]
    )


# The table


def rows(scoring: str) -> list[Row]:
    first, second = many(20, 8, "C" * 20, "ABCD" * 5), many(30, 7, "A" * 30, "C" * 30)
    return [Row("exam", "law", "arts", scoring, first), Row("exam", "physics", "STEM", scoring, second)]


def test_the_table_has_subjects_categories_errors_and_upstreams_last_lines():
    text = table(rows("letter"))
    assert re.search(r"8/20   40\.00 ± 10\.95 %   40\.00 ± 10\.95 %   law$", text, flags=re.M)
    assert re.search(r"15/50   30\.00 ±  6\.48 %   30\.00 ±  6\.48 %   exam$", text, flags=re.M)
    assert "0 of 2 subjects" in text and "STEM" in text
    assert "chosen (right): A 60.0% (10.0%), B 0.0% (10.0%), C 40.0% (70.0%), D 0.0% (10.0%)" in text
    assert text.endswith("总题数: 50\n总正确数: 15\n总正确率: 30.00% (letter)")
    assert "exam, letters: not distinguishable from chance (25.0%)" in text
    cloze = table(rows("cloze"))
    assert "exam, cloze, plain: not" in cloze and "exam, cloze, normalised: not" in cloze and "chosen" not in cloze
    assert cloze.endswith("总正确率: 30.00% (cloze, plain)")


def test_each_subject_of_c_eval_and_cmmlu_has_one_category():
    for benchmark, count in (("ceval-valid", 52), ("cmmlu", 67)):
        subjects = [subject for names in CATEGORIES[benchmark].values() for subject in names.split()]
        assert len(subjects) == len(set(subjects)) == count
    assert category_of("cmmlu", "agronomy") == "Other" and category_of("ceval-valid", "logic") == "Humanities"
    assert category_of("cmmlu", "accountant") == category_of("mine", "logic") == ""


# Files of questions

GOOD = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "answer": "B", "subject": "sums"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_both_forms_of_questions_are_read_packed_or_not(tmp_path):
    other = {"question": "2+2?", "choices": ["3", "4"], "answer": 1, "split": "dev"}
    path = write(tmp_path / "exam.jsonl", "\ufeff", GOOD, "\n", other)
    (tmp_path / "exam.xz").write_bytes(lzma.compress(path.read_bytes()))
    (tmp_path / "exam.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("exam.jsonl", "exam.xz", "exam.gz"):
        first, second = read_exam(tmp_path / name)
        assert (first.options, first.key, first.subject, first.is_example) == (("1", "2", "3"), 1, "sums", False)
        assert (second.options, second.key, second.is_example) == (("3", "4"), 1, True)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{\n", "not JSON"),
        ({**GOOD, "question": " "}, "'question' must be a text that is not empty, it is the string ' '"),
        ({**GOOD, "B": None}, "option B must be a text that is not empty, it is missing"),
        ({**GOOD, "E": "5"}, "option D must be a text that is not empty, it is missing"),
        ({"question": "?", "A": "1", "answer": "A"}, "needs 2 to 26 options"),
        ({"question": "?", "choices": "AB", "answer": "A"}, "needs 2 to 26 options"),
        (
            {**GOOD, "answer": "D"},
            "'answer' must be a letter from A to C or a number from 0 to 2, it is the string 'D'",
        ),
        ({**GOOD, "answer": 3}, "it is the number 3"),
        ({**GOOD, "answer": True}, "it is the boolean True"),
        (
            {"question": "?", "A": "1", "B": "2"},
            "'answer' must be a letter from A to B or a number from 0 to 1, it is mi",
        ),
        ({**GOOD, "subject": 3}, "'subject' must be a text, it is the number 3"),
    ],
)
def test_a_malformed_line_is_named_with_its_reason(tmp_path, line, reason):
    path = write(tmp_path / "exam.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:2: .*{re.escape(reason)}"):
        read_exam(path)


def test_a_damaged_or_useless_file_is_refused(tmp_path):
    packed = lzma.compress("".join(json.dumps({**GOOD, "A": str(i)}) + "\n" for i in range(9999)).encode())
    (tmp_path / "cut.xz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"cut.xz: damaged after line \d+ .*download it again"):
        read_exam(tmp_path / "cut.xz")
    for lines in ([], [{**GOOD, "split": "train"}]):
        with pytest.raises(ValueError, match="asks nothing: it needs lines such as"):
            read_exam(write(tmp_path / "none.jsonl", *lines))


# The program


def run_script(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["eval_lm.py", *flags])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 2
    return capsys.readouterr().err


def test_flags_are_refused_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("common.flags.is_installed", lambda package: False)
    assert "pip install" in run_script(monkeypatch, capsys, "--tasks", "cmmlu")
    assert "say what to ask" in run_script(monkeypatch, capsys)
    assert "name the benchmarks" in run_script(monkeypatch, capsys, "--data", str(tmp_path))
    assert "no such file or folder" in run_script(monkeypatch, capsys, "--data", str(tmp_path / "x"))
    assert "merge it first" in run_script(monkeypatch, capsys, "--tasks", "cmmlu", "--lora_name", "x")


def test_a_bad_file_is_told_before_the_model_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("common.flags.is_installed", lambda package: True)
    path = write(tmp_path / "exam.jsonl", {**GOOD, "answer": "Z"})
    assert f"{path}:1: 'answer' must be" in run_script(monkeypatch, capsys, "--data", str(path))


def stand_ins(monkeypatch, **functions) -> None:
    """In the place of the modules that need lm_eval."""
    monkeypatch.setattr("common.flags.is_installed", lambda package: True)
    monkeypatch.setitem(sys.modules, "inference.benchmarks", SimpleNamespace(**functions))
    monkeypatch.setitem(sys.modules, "inference.harness", SimpleNamespace(HarnessModel=None))


def test_missing_weights_are_told_before_the_network_is_asked(monkeypatch, capsys, tmp_path):
    stand_ins(monkeypatch, known_tasks=lambda: pytest.fail("the network comes after the weights"))
    assert "none.pth not found" in run_script(
        monkeypatch, capsys, "--tasks", "cmmlu", "--weight", str(tmp_path / "none.pth")
    )


def test_all_missing_data_sets_are_told_at_once(monkeypatch, capsys, tmp_path):
    """Five tasks took five attempts to learn of five data sets."""

    def missing(manager, name, folder):
        raise ValueError(f"{name} needs a data set")

    stand_ins(monkeypatch, known_tasks=lambda: None, resolve_names=lambda manager, names: names, load_parts=missing)
    model = toy_model(vocab_size=6400)
    torch.save(model.state_dict(), tmp_path / "toy.pth")
    error = run_script(monkeypatch, capsys, "--tasks", "cmmlu", "aclue", "--weight", str(tmp_path / "toy.pth"))
    assert "cmmlu needs a data set" in error and "aclue needs a data set" in error, error
