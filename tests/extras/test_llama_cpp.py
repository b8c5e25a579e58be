"""llama.cpp: GGUF files load, answer and tokenise as ours."""

import json
import random

import pytest
from engines import NEW_TOKENS, ROOT, greedy, make_model, prompts, rounded, shortfall

from benchmarks.llama_cpp import LlamaCpp
from model.conversion import STORED_TYPES
from model.gguf_file import write_gguf
from model.loading import load_tokenizer

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make test-extras")
pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

SPECIAL = ("<s>", "</s>", "<unk>")
PIECES = (
    *("今天天气很好，", "我们去公园散步。", "３．１４１５９", "　全角　空格", "繁體字與標點「」『』", "ㄅㄆㄇ"),
    *("The quick brown fox", " jumps over", "don't", "I'm", "we've", "naïve café — “quotes”", "HTTP/1.1", "e.g.,"),
    *("😀", "🎉🎉", "👨\u200d👩\u200d👧", "🇨🇳", "❤\ufe0f", "a_b[3:12]", "for (i = 0; i < 10; ++i) {}"),
    *("def f(x):\n\treturn x**2  # 平方", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u3000", "\u200b\ufeff"),
    *("\xa0", "0", "12345", "12,345.67", "2024年", "<think>", "</think>", "<answer>", "</answer>", "<tool_call>"),
    *("ไทย", "العربية", "한국어", "日本語", "aaaaaaaaaaaaaaaa", "!!!", "……", "——", "\\n", "%d", "{}", "|", "~"),
    *("`code`", "$x^2$", "A", "Ω≈ç√", "\x00", "\x7f"),
    *SPECIAL,
)


def random_strings(count: int) -> list[str]:
    """Pieces of all kinds in random order, and characters from everywhere in Unicode."""
    rng = random.Random(0)
    ranges = ((32, 126), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0xA0, 0x2FF), (0x3000, 0x30FF), (0x20, 0xFFF))
    strings = []
    for number in range(count):
        parts = rng.choices(PIECES, k=rng.randint(1, 12))
        if number % 4 == 0:
            low, high = rng.choice(ranges)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(20)))
        strings.append("".join(parts))
    return strings


def test_1000_strings_have_the_same_tokens(tmp_path):
    """With control tokens parsed, as the tokenizer of transformers does; without, <s> is text, as in ChatFormat."""
    tokenizer, model = load_tokenizer(), make_model("llama")
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, "q4_0")
    server = LlamaCpp(tmp_path / "m.gguf", context=512)
    strings = random_strings(1000)
    different = []
    for text in strings:
        expected = tokenizer.encode(text, add_special_tokens=False)
        if server.tokenize(text, parse_special=True) != expected:
            different.append(text)
        plain = server.tokenize(text)
        if any(token in text for token in SPECIAL):
            assert plain != expected and not set(plain) & {0, 1, 2}, text
        elif plain != expected:
            different.append(text)
    assert different == []


@pytest.mark.parametrize("kind", ["llama", "qwen3", "ernie4_5_moe", "qwen3_moe", "quickstart"])
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
def test_the_same_64_tokens(tmp_path, kind, stored):
    """In float32 exactly; else llama.cpp rounds what enters a product too, and near ties may fall to either side.

    Random logits end near 8: in bfloat16 with its 8 bits, a router of a random mixture may send a token elsewhere.
    """
    model = rounded(make_model(kind), STORED_TYPES[stored])
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), load_tokenizer(), stored)
    server = LlamaCpp(tmp_path / "m.gguf", context=512)
    answers = [server.greedy(prompt, NEW_TOKENS) for prompt in prompts()]
    # The server takes no `</s>` where it is told to go on behind it, and no other end token: ours likewise.
    expected = [greedy(model, prompt, never=2) for prompt in prompts()]
    behind = max(shortfall(model, prompt, answer, never=2) for prompt, answer in zip(prompts(), answers, strict=True))
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    print(f"{kind} {stored}: {same} of {len(answers)} answers equal, {behind:.4f} behind")
    if stored == "f32":
        assert answers == expected
    assert behind < {"f32": 0.001, "f16": 0.1, "bf16": 5}[stored]


@pytest.mark.parametrize(("stored", "least"), [("f32", 100), ("f16", 99), ("q8_0", 90), ("q4_0", 50)])
def test_100_answers_of_the_quick_start(tmp_path, stored, least):
    """To their end, `</s>`, as people read them: how many are the same to the letter."""
    model, tokenizer = make_model("quickstart"), load_tokenizer()
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, stored)
    server = LlamaCpp(tmp_path / "m.gguf", context=512)
    lines = (ROOT / "dataset" / "sample" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[::7][:100]
    same = 0
    for line in lines:
        text = tokenizer.apply_chat_template(
            json.loads(line)["conversations"], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        expected = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected = [token for token in expected.tolist() if token != tokenizer.eos_token_id]
        answer = server.post(
            "/completion", prompt=ids["input_ids"][0].tolist(), n_predict=NEW_TOKENS, temperature=0, return_tokens=True
        )["tokens"]
        same += [token for token in answer if token != tokenizer.eos_token_id] == expected
    print(f"{stored}: {same} of {len(lines)} answers are the same")
    assert same >= least
