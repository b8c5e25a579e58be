"""scripts/eval_lm.py with lm_eval: our wrapper answers like lm_eval's own, and both scorings come from a stock task."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from inference.exam import read_exam
from model.LMConfig import LMConfig
from model.loading import load_tokenizer
from model.model import MiniMindForCausalLM

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-extras.txt")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "eval_lm.py"
QUESTIONS = [
    {"question": f"{a} + {b} = ?", "choices": [str(a + b + i) for i in (0, 7, -1, 23)], "answer": 0}
    for a in range(5, 12)
    for b in range(3, 6)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_position_embeddings": 256}
    return MiniMindForCausalLM(LMConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def manager():
    from inference.benchmarks import known_tasks

    return known_tasks()


def exam_file(folder: Path, subject: str) -> Path:
    rows = [{**row, "subject": subject, "split": "dev" if i < 2 else "test"} for i, row in enumerate(QUESTIONS)]
    path = folder / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hub_folder(folder: Path, subject: str) -> Path:
    """A folder laid out as the hub's haonan-li/cmmlu is, with one subject."""
    data = folder / "haonan-li" / "cmmlu"
    (data / subject).mkdir(parents=True)
    splits = {"dev": QUESTIONS[:2], "test": QUESTIONS[2:]}
    lines = ["---", "configs:", f"- config_name: {subject}", "  data_files:"]
    for split, questions in splits.items():
        lines += [f"  - split: {split}", f"    path: {subject}/{split}.jsonl"]
        rows = [
            {"Question": q["question"], **dict(zip("ABCD", q["choices"], strict=True)), "Answer": "A"}
            for q in questions
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / subject / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (data / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return folder


def requests_of(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_the_wrapper_answers_like_lm_evals_own(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    from inference.harness import HarnessModel

    theirs, ours = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu"),
        HarnessModel(model, tokenizer),
    )
    pairs = [(f"第{i}题\nA. 一\nB. 二\n答案：", f" {letter}") for i in range(9) for letter in "AB"]
    pairs += [("The sky is ", "blue, mostly."), ("", "你好"), ("长" * 400, "江")]
    got, expected = ours.loglikelihood(requests_of("l", *pairs)), theirs.loglikelihood(requests_of("l", *pairs), True)
    for pair, mine, reference in zip(pairs, got, expected, strict=True):
        assert mine == (pytest.approx(reference[0], abs=1e-3), reference[1]), pair
    assert ours.truncated == 1
    texts = [("你好，世界。" * 200,), ("Hello",)]
    got = ours.loglikelihood_rolling(requests_of("r", *texts))
    assert got == pytest.approx(theirs.loglikelihood_rolling(requests_of("r", *texts), True), rel=1e-4)
    until = [("你好", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False})]
    assert ours.generate_until(requests_of("g", *until)) == theirs.generate_until(requests_of("g", *until), True)


def test_a_token_that_reaches_over_the_border_is_not_scored_by_half(model, tokenizer):
    from inference.harness import HarnessModel

    context, continuation = HarnessModel(model, tokenizer).encode_pair("ab", "c" * 3)
    assert tokenizer.decode(context) == "ab" and tokenizer.decode(continuation) == "ccc"


def test_a_file_and_a_folder_with_the_same_questions_give_the_same(model, tokenizer, manager, tmp_path):
    from inference import benchmarks
    from inference.harness import HarnessModel

    path = exam_file(tmp_path, "agronomy")
    harness = HarnessModel(model, tokenizer)
    parts = {
        "file": benchmarks.exam_parts(manager, ["cmmlu"], path, read_exam(path)),
        "folder": benchmarks.load_parts(manager, "cmmlu_agronomy", hub_folder(tmp_path / "hub", "agronomy")),
    }
    tallies = {}
    for name, some in parts.items():
        scored = benchmarks.scored_parts(some, ["letter", "cloze"])
        done = [part for batch in benchmarks.run(harness, scored, num_fewshot=2) for part in batch]
        tallies[name] = {part.scoring: part for part in done}
    assert {part.category for part in tallies["file"].values()} == {"Other"}
    for scoring in ("letter", "cloze"):
        of_file, of_folder = tallies["file"][scoring], tallies["folder"][scoring]
        assert of_file.tally == of_folder.tally and of_file.tally.questions == 19
        assert of_file.metrics["acc,none"] == pytest.approx(of_file.tally.accuracy)  # lm_eval counts the same
        assert of_file.metrics["acc_norm,none"] == pytest.approx(of_file.tally.accuracy_normalised)
    assert os.getcwd() != str(tmp_path / "hub")
    with pytest.raises(ValueError, match="--num_fewshot 3: agronomy has 2 examples"):
        next(benchmarks.run(harness, benchmarks.scored_parts(parts["file"], ["letter"]), num_fewshot=3))


def test_cloze_shows_no_letters_and_scores_the_options(manager, tmp_path):
    from inference import benchmarks

    path = exam_file(tmp_path, "agronomy")
    (part,) = benchmarks.exam_parts(manager, ["cmmlu"], path, read_exam(path))
    cloze = benchmarks.as_cloze(part.task)
    doc = cloze.task_docs[0]
    assert cloze.fewshot_context(doc, 0) == "5 + 5 = ?\n答案："
    assert cloze.fewshot_context(doc, 1) == "5 + 3 = ?\n答案：8\n\n5 + 5 = ?\n答案："
    requests = cloze.construct_requests(doc, "5 + 5 = ?\n答案：", metadata=("x", 0, 1))
    assert [request.args[1] for request in requests] == ["10", "17", "9", "33"]
    assert "A. 10\nB. 17" in part.task.fewshot_context(doc, 0) and part.task.fewshot_context(doc, 0).startswith(
        "以下是"
    )
    assert benchmarks.key_of(cloze, doc) == 0


def test_names_are_found_patterns_resolved_and_unknown_ones_refused(manager, tmp_path):
    from inference import benchmarks

    assert benchmarks.resolve_names(manager, ["ceval*", "openbookqa"]) == ["ceval-valid", "openbookqa"]
    with pytest.raises(ValueError, match="--tasks cevall: lm_eval knows no such task; similar names: .*ceval-valid"):
        benchmarks.resolve_names(manager, ["cevall"])
    with pytest.raises(
        ValueError, match="tmmluplus needs the data set ikala/tmmluplus .*(\n.*)*hf download ikala/tmmluplus"
    ):
        benchmarks.load_parts(manager, "tmmluplus", tmp_path)
    path = exam_file(tmp_path, "sums")
    with pytest.raises(
        ValueError, match="subject 'sums' is none of cmmlu, whose subjects are agronomy, .*leave --tasks"
    ):
        benchmarks.exam_parts(manager, ["cmmlu"], path, read_exam(path))


def test_the_program_asks_a_file_and_writes_its_figures(model, tmp_path, monkeypatch, capsys):
    torch.save(model.state_dict(), tmp_path / "full_sft_32.pth")
    path = exam_file(tmp_path, "sums")
    words = ["--weight", str(tmp_path / "full_sft_32.pth"), "--n_heads", "4", "--data", str(path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["eval_lm.py", *words, "--out", str(tmp_path / "out.json")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "exam, letters: " in printed and "exam, cloze, normalised: " in printed and "总题数: 19" in printed
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert {(row["scoring"], row["subject"], row["questions"]) for row in results} == {
        ("letter", "sums", 19),
        ("cloze", "sums", 19),
    }
