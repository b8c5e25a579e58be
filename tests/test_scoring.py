"""inference/scoring.py: when an answer counts as right, what a question file may hold, and the report."""

import json

import pytest
import torch

from inference.sampling import SamplingParams
from inference.scoring import Question, answer_questions, is_refusal, is_right, read_questions, score_report
from model.chat_format import ChatFormat
from model.LMConfig import LMConfig
from model.loading import REPO_ROOT, load_tokenizer
from model.model import MiniMindForCausalLM


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("中国的首都是北京。", ["北京"], True),
        ("是上海。", ["北京"], False),
        ("It is PARIS.", ["paris"], True),
        ("Ｈ２Ｏ，１２个月", ["H2O"], True),  # full width: NFKC
        ("一共１２个", ["12"], True),
        ("112", ["12"], False),
        ("123", ["12"], False),
        ("12.5", ["12"], False),
        ("3.12", ["12"], False),
        ("-12", ["12"], False),
        ("等于12。", ["12"], True),
        ("It is 12.", ["12"], True),
        ("公元1949年成立", ["1949年"], True),
        ("11949年", ["1949年"], False),
        ("符号是Fe", ["Fe"], True),
        ("Fe2O3", ["Fe"], True),
        ("coffee", ["Fe"], False),
        ("(3+4)*2", ["(3+4)"], True),
        ("人民共和国", ["中国", "共和国"], True),
        ("", ["北京"], False),
    ],
)
def test_is_right(text, answers, right):
    assert is_right(text, answers) is right


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("我不知道，这个我没有学过。", True),
        ("抱歉，我不知道。", True),
        ("I don't know. I have not learned that.", True),
        ("I don’t know.", True),
        ("I DO NOT KNOW", True),
        ("法国的首都是巴黎。", False),
        ("你知道吗？", False),
        ("I know.", False),
        ("", False),
    ],
)
def test_is_refusal(text, refusal):
    assert is_refusal(text) is refusal


def line(**fields) -> str:
    record = {"conversations": [{"role": "user", "content": "1+1=?"}], "answer": "2", **fields}
    return json.dumps(record, ensure_ascii=False) + "\n"


def test_a_question_file_is_read_whole(tmp_path):
    path = tmp_path / "q.jsonl"
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    path.write_text(line() + "\n" + line(conversations=turns, answers=["two"], category="math"), encoding="utf-8")
    first, second = read_questions(path)
    assert first == Question([{"role": "user", "content": "1+1=?"}], ["2"])
    assert second == Question(turns, ["2", "two"], "math") and second.text == "user"


def unanswerable(**fields) -> str:
    return (
        json.dumps({"conversations": [{"role": "user", "content": "我叫什么？"}], "unanswerable": True, **fields})
        + "\n"
    )


def test_an_unanswerable_question_has_no_answers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(unanswerable(category="private") + line(unanswerable=False), encoding="utf-8")
    unknown, known = read_questions(path)
    assert unknown == Question([{"role": "user", "content": "我叫什么？"}], [], "private") and known.answers == ["2"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "line 2"),
        ('["list"]', "must be an object"),
        (line(answer=None), "'answer'"),
        (line(answer=" "), "'answer'"),
        (line(answers=[2]), "'answers'"),
        (unanswerable(answer="2"), "no 'answer'"),
        (line(unanswerable="yes", answer=None), "'answer'"),
        (line(answers=5), "'answers'"),
        (line(conversations=["x"]), "object with role and content"),
        (line(conversations=[{"role": "user", "content": None}]), "content"),
        (
            line(conversations=[{"role": "user", "content": "\ud800"}]).replace("\ud800", "\\ud800"),
            "half of a character",
        ),
        (line(answer="x").replace('"x"', "7" * 6000), "digits"),
        ("[" * 100_000, "nested too deeply"),
        (line(conversations=[]), "empty"),
        (line(conversations=[{"role": "robot", "content": "x"}]), "robot"),
        (line(conversations=[{"role": "assistant", "content": "x"}]), "'assistant'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, reason):
    path = tmp_path / "q.jsonl"
    path.write_text(line() + bad, encoding="utf-8")
    with pytest.raises(ValueError, match="q.jsonl, line 2: .*") as error:
        read_questions(path)
    assert reason in str(error.value)


def test_missing_and_empty_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "wide.jsonl").write_text(line(), encoding="utf-16")
    with pytest.raises(ValueError, match="wide.jsonl, line 1: the line holds NUL bytes: the file is no UTF-8 text"):
        read_questions(tmp_path / "wide.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        read_questions(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    "name", ["heldout", "unanswerable_heldout", "lora_identity_heldout", "lora_medical_heldout", "reason_heldout"]
)
def test_the_committed_question_files_are_readable(name):
    assert read_questions(REPO_ROOT / "dataset" / "sample" / f"{name}.jsonl")


def test_the_report_counts_by_category_and_rounds_down():
    questions = [Question([{"role": "user", "content": f"问{i}"}], ["对"], "甲" if i else "乙") for i in range(3)]
    report = score_report(questions, ["错", "对", "对"]).splitlines()
    assert report[1].split() == ["0", "1", "0.0", "乙"] and report[2].split() == ["2", "2", "100.0", "甲"]
    assert {"👶: 问0", "🤖️: 错", "    -> 对"} <= set(report)
    assert report[-1] == "held-out score: 66.6 %"


def test_a_question_that_is_too_long_counts_as_wrong_and_the_others_are_scored():
    """One overlong question lost the whole score."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=32)).eval()
    questions = [Question([{"role": "user", "content": "问" * n}], ["对"]) for n in (1, 200, 2)]
    texts = answer_questions(model, load_tokenizer(), questions, SamplingParams(max_new_tokens=4, temperature=0))
    assert texts[1] is None and isinstance(texts[0], str) and isinstance(texts[2], str)
    report = score_report(questions, ["对", None, "对"])
    assert "1 of 3 questions are too long" in report and report.endswith("held-out score: 66.6 %")


def test_the_report_shows_at_most_ten_wrong_answers():
    questions = [Question([{"role": "user", "content": f"问{i}"}], ["对"]) for i in range(30)]
    report = score_report(questions, ["错"] * 30)
    assert report.count("👶: ") == 10 and "10 of 30" in report
    assert report.endswith("\nheld-out score: 0.0 %")


def test_refusals_are_counted_apart():
    """Three known facts: one right, one wrong, one refused; two unknown: one refused, one made up."""
    known = [Question([{"role": "user", "content": f"问{i}"}], ["对"]) for i in range(3)]
    unknown = [Question([{"role": "user", "content": "卡鲁国的首都？"}], [])] * 2
    report = score_report(known + unknown, ["对", "错", "我不知道。", "我不知道。", "是惠灵顿。"]).splitlines()
    assert report[-3:] == [
        "honest refusals: 50.0 % of 2 unanswerable",
        "known facts refused: 33.4 % of 3",
        "held-out score: 33.3 %",
    ]
    assert "    -> (cannot be known)" in report and "wrong answers, 3 of 3:" in report
    assert report[1].split() == ["2", "5", "40.0", "-"]


def test_unanswerable_questions_alone_have_no_score():
    unknown = [Question([{"role": "user", "content": "我叫什么？"}], [])]
    assert score_report(unknown, ["I don't know."]).splitlines()[-1] == "honest refusals: 100.0 % of 1 unanswerable"


def test_all_right_shows_no_wrong_answers():
    assert "wrong" not in score_report([Question([{"role": "user", "content": "问"}], ["对"])], ["对"])


def test_answers_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=128)).eval()
    questions = [Question([{"role": "user", "content": "问" * n}], ["对"]) for n in (9, 1, 30, 4)]
    params = SamplingParams(max_new_tokens=8, temperature=0)
    alone = answer_questions(model, tokenizer, questions, params, batch_size=1)
    assert answer_questions(model, tokenizer, questions, params, batch_size=3) == alone
    # And they are greedy continuations of the chat prompt.
    ids = ChatFormat(tokenizer).encode_prompt(questions[0].messages)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert alone[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_answers_are_sampled_as_asked():
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = MiniMindForCausalLM(LMConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=128)).eval()
    questions = [Question([{"role": "user", "content": "问"}], ["对"])]
    greedy = answer_questions(model, tokenizer, questions, SamplingParams(16, temperature=0))
    penalised = answer_questions(model, tokenizer, questions, SamplingParams(16, temperature=0, repetition_penalty=5))
    assert penalised != greedy
