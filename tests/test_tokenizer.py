"""The shipped tokenizer, and the script that trains one."""

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.chat_format import SPECIAL_TOKENS, TAGS
from model.loading import TOKENIZER_DIR
from scripts import train_tokenizer as script

tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
model = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text(encoding="utf-8"))["model"]


def test_exactly_6400_entries():
    assert len(tokenizer) == tokenizer.vocab_size == len(model["vocab"]) == 6400
    assert sorted(model["vocab"].values()) == list(range(6400))
    assert len(model["merges"]) == 6400 - 256 - len(SPECIAL_TOKENS)


def test_special_tokens_and_their_ids():
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(16))
    assert SPECIAL_TOKENS[:3] == ("<unk>", "<s>", "</s>") and SPECIAL_TOKENS[3:11] == TAGS
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        0,
        0,
        1,
        2,
    )
    assert tokenizer.model_max_length == 32768


def test_nothing_is_added_unasked():
    assert tokenizer("你好")["input_ids"] == tokenizer.encode("你好", add_special_tokens=False)
    assert not {1, 2} & set(tokenizer("你好")["input_ids"])


def test_tags_are_visible_and_control_tokens_are_not():
    assert tokenizer.decode(list(range(16)), skip_special_tokens=True) == "".join(TAGS)
    assert tokenizer.decode(list(range(16))) == "".join(SPECIAL_TOKENS)


def test_no_merge_leads_to_a_special_token():
    """Else plain text could forge one."""
    assert not {left + right for left, right in model["merges"]} & set(SPECIAL_TOKENS)


def test_digits_are_single():
    """upstream X1: numbers were cut into arbitrary pieces."""
    assert len(tokenizer.encode("2024,3.14159")) == len("2024,3.14159")
    for i in range(16, 6400):
        text = tokenizer.decode([i])
        assert len(text) == 1 or not any(c.isdigit() for c in text)


def test_plain_pre_tokenizer():
    """The pair that llama.cpp knows as "smollm": anything else could not be exported to GGUF."""
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]
    assert steps[0]["individual_digits"] and steps[1]["use_regex"] and not steps[1]["add_prefix_space"]


SAMPLES = [
    "世界上最高的山是珠穆朗玛峰。",
    "👩‍👩‍👧‍👦🇨🇳👍🏽",
    "\x00\x01\x07\x1b\x7f\x85\u200b\u2028\ufeff\ufffd",
    " 前后空格 \n\n\t制表\r\n",
    "don't  stop .  , !",
    "𠮷野家 ﷽ हिन्दी العربية ไทย",
    "e\u0301 é ﬁ Ⅷ ½ ²",
    "def f(x):\n    return x ** 2  # 平方\n",
    "<s></s><unk><think></think><|reserved_3|>",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=1000, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("的一是👩\u200d🇨 \n<>/s0１")))
def test_round_trip_of_any_string(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "least"),
    [  # the goals are averages over megabytes; these few sentences guard against shipping a wrong file
        ("水的沸点随气压降低而降低，所以在高山上煮饭需要更长的时间。", 3.0),
        ("The boiling point of water drops as the air gets thinner, so cooking takes longer in the mountains.", 3.0),
        ("for i in range(10):\n    if i % 2 == 0:\n        print(i)\n", 1.5),
    ],
)
def test_compression(text, least):
    assert len(text.encode()) / len(tokenizer.encode(text)) >= least


# ---------------------------------------------------------------------------------------------- training one


@pytest.fixture
def corpus(tmp_path):
    """A small corpus in the three formats, with many different words."""
    words = [f"词{chr(0x4E00 + i)}{chr(0x5000 + 7 * i)}" for i in range(300)]
    english = ["".join(chr(97 + (i * k) % 26) for k in range(3, 9)) for i in range(300)]
    rows = [{"text": "，".join(words[i : i + 20])} for i in range(0, 280)]
    rows += [{"text": " ".join(english[i : i + 20])} for i in range(0, 280)]
    chat = [{"role": "user", "content": "问</s><think>"}, {"role": "assistant", "content": "，".join(words[:9])}]
    rows += [{"conversations": chat}, {"chosen": chat, "rejected": chat}]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments):
    script.main([str(a) for a in arguments])


def test_train(corpus, tmp_path, capsys):
    out = tmp_path / "new"
    options = ("--data_path", corpus, "--vocab_size", 600, "--max_mb", 1, "--code_share", 0.1)
    run(*options, "--out_dir", out)
    trained = AutoTokenizer.from_pretrained(out)
    assert len(trained) == 600 and trained.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(16))
    assert trained.chat_template == tokenizer.chat_template
    for text in SAMPLES:
        assert trained.decode(trained.encode(text)) == text
    printed = capsys.readouterr().out
    assert "600 entries" in printed and "corpus.jsonl zh texts" in printed and "corpus.jsonl en texts" in printed
    assert "Python code" in printed and f"written: {out}" in printed

    run(*options, "--out_dir", tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_the_report_compares_with_another_tokenizer():
    small = PreTrainedTokenizerFast(tokenizer_object=script.train_tokenizer(["abc " * 50], vocab_size=273))
    heldout = {
        "some zh questions": ["世界上最高的山是珠穆朗玛峰。"],
        "some en answers": ["Water boils at 100 degrees."],
    }
    alone, compared = script.report(tokenizer, heldout), script.report(tokenizer, heldout, small)
    assert len(alone) == len(compared) and "other" not in alone[3]
    assert alone[3].split()[:4] == ["held-out", "text", "MB", "bytes/token"]
    assert compared[3].split()[:6] == ["held-out", "text", "MB", "bytes/token", "other", "more"]
    for line, texts in zip(compared[4:], heldout.values(), strict=True):
        ours, theirs, more = line.split()[4:7]
        n_bytes = len(texts[0].encode())
        assert float(ours) == pytest.approx(n_bytes / len(tokenizer.encode(texts[0])), abs=6e-4)
        assert float(theirs) == pytest.approx(n_bytes / len(small.encode(texts[0])), abs=6e-4)
        assert float(more.rstrip("%")) / 100 == pytest.approx(float(ours) / float(theirs) - 1, abs=2e-3)


def test_questions_and_answers_are_measured_apart(tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [[{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": f"答{i}"}] for i in range(300)]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows), encoding="utf-8")
    _, heldout = script.sample_texts([path], max_mb=1)
    questions, answers = heldout["chat.jsonl zh questions"], heldout["chat.jsonl zh answers"]
    assert (
        questions and answers and {text[0] for text in questions} == {"问"} and {text[0] for text in answers} == {"答"}
    )


def test_an_existing_tokenizer_is_never_replaced_unasked(corpus, tmp_path, capsys):
    """upstream D14: training wrote over the shipped tokenizer."""
    before = (TOKENIZER_DIR / "tokenizer.json").read_bytes()
    with pytest.raises(SystemExit):
        run("--data_path", corpus, "--out_dir", TOKENIZER_DIR)
    assert "--overwrite" in capsys.readouterr().err
    assert (TOKENIZER_DIR / "tokenizer.json").read_bytes() == before
    assert script.parse_args(["--data_path", str(corpus)]).out_dir.as_posix() == "out/tokenizer"

    (tmp_path / "tokenizer.json").write_text("{}")
    run("--data_path", corpus, "--out_dir", tmp_path, "--vocab_size", 300, "--code_share", 0, "--overwrite")
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_path", "missing.jsonl"], "missing.jsonl: no such file.*dataset/sample/pretrain.jsonl"),
        (["--code_share", "2"], "--code_share 2: must be a number from 0 to 1"),
        (["--compare", "missing"], "--compare missing: has no tokenizer.json.*directory"),
        (["--weights", "1", "2"], "one number for each of the 1 files"),
        (["--vocab_size", "70000"], "--vocab_size 70000: .*from 273 to 65536"),
        (["--vocab_size", "100"], "--vocab_size 100: .*from 273"),
        (["--vocab_size", "60000"], "only .* of 60000 entries.*--vocab_size"),
    ],
)
def test_bad_arguments(corpus, tmp_path, capsys, arguments, message):
    options = ["--data_path", corpus, "--max_mb", 1, "--code_share", 0, "--out_dir", tmp_path / "out", *arguments]
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert re.search(message, f"{stopped.value.code} {capsys.readouterr().err}".replace("\n", " "))
    assert not (tmp_path / "out").exists()


BAD_LINES = ["{", "[]", '{"other": 1}', '{"text": 3}', '{"text": "\\ud800"}', '{"conversations": [{"content": "x"}]}']


@pytest.mark.parametrize("line", [*map(str.encode, BAD_LINES), b'{"text": "\xff"}'])
def test_bad_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes('{"text": "好"}\n'.encode() + line + b"\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: .*correct or remove"):
        list(script.read_texts(path))


def test_heldout_texts_are_never_trained_on(corpus):
    train, heldout = script.sample_texts([corpus], max_mb=1)
    heldout = {text for texts in heldout.values() for text in texts}
    assert heldout and not heldout & set(train)
    code, unseen = script.sample_code(100_000)
    assert code and unseen and not set(unseen) & set(code)


def test_sample_is_limited_and_balanced(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "另一个文件"}\n' * 1000, encoding="utf-8")
    train, _ = script.sample_texts([corpus, other], max_mb=0.02, weights=[3, 1])
    n_bytes = {True: 0, False: 0}
    for text in train:
        n_bytes[text == "另一个文件"] += len(text.encode())
    assert 14_000 < n_bytes[False] <= 15_000 and 4_500 < n_bytes[True] <= 5_000


def test_texts_with_special_tokens_train_no_merge_into_them():
    trained = script.train_tokenizer(["<think></s>" * 50 + "abcdefgh" * 50] * 9, vocab_size=280, max_token_bytes=24)
    plain = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(trained.to_str()), "added_tokens": []}))
    assert min(plain.encode("<think></s>").ids) >= 16
