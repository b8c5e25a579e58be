"""Train a byte-level BPE tokenizer for Chinese and English on your own data.

    python scripts/train_tokenizer.py --data_path dataset/pretrain_hq.jsonl dataset/sft_mini_512.jsonl

Reads   jsonl files of any stage: {"text"}, {"conversations"} or {"chosen", "rejected"}
Writes  a directory that `AutoTokenizer.from_pretrained` loads (default out/tokenizer)

Byte-pair encoding starts from the 256 bytes and, again and again, makes one token of the most frequent pair of
neighbours (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: Radford et al. 2019). With bytes no text
is ever unknown. In a small model the embedding is a large share of all weights, hence only 6,400 entries.
One text in fifty is held out (by its hash, so it is never trained on) and shows how well the result compresses.
"""

import argparse
import hashlib
import heapq
import inspect
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model.chat_format import CONTROL_TOKENS, RESERVED_TOKENS, SPECIAL_TOKENS, ChatFormat  # noqa: E402

SHIPPED = Path(__file__).resolve().parents[1] / "model" / "minimind_tokenizer"
HELDOUT_ONE_IN = 50
HELDOUT_BYTES = 2_000_000  # per file and language, enough for three digits


def read_texts(path: Path) -> Iterator[str]:
    """The texts of one jsonl file as the model sees them: a message comes behind its role. Raises ValueError."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "text" in record:
                    yield record["text"]
                    continue
                for key in ("conversations", "chosen", "rejected"):
                    for message in record.get(key, []):
                        if message["content"]:
                            yield f"{message['role']}\n{message['content']}"
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}; expected a record with text, conversations or "
                                 "chosen and rejected") from error


def is_heldout(text: str) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % HELDOUT_ONE_IN == 0


def language(text: str) -> str:
    """'zh' or 'en', by the bytes per character: a Chinese character takes three, an English one a single byte."""
    return "zh" if len(text.encode()) > 1.4 * len(text) else "en"


class ByteSample:
    """A uniform random sample of a stream, as many texts as fit in `max_bytes` (bottom-k sampling by random keys)."""

    def __init__(self, max_bytes: float, rng: random.Random):
        self.max_bytes, self.rng = max_bytes, rng
        self.n_bytes, self.heap = 0, []

    def add(self, text: str) -> None:
        heapq.heappush(self.heap, (-self.rng.random(), text))
        self.n_bytes += len(text.encode())
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= len(heapq.heappop(self.heap)[1].encode())

    def texts(self) -> list[str]:
        return [text for _, text in self.heap]


def sample_texts(paths: list[Path], max_mb: float, english_share: float, seed: int) -> tuple[list[str], dict]:
    """(training texts, held-out texts by file name and language), in one pass that holds no more than the sample.

    Each file gives an equal part, so that a large one does not drown a small one; of each part `english_share` is
    English as far as the file has it.
    """
    rng = random.Random(seed)
    shares = {"zh": 1 - english_share, "en": english_share}
    train, heldout = [], {}
    for path in paths:
        samples = {name: ByteSample(share * max_mb * 1e6 / len(paths), rng) for name, share in shares.items()}
        tests = {name: ByteSample(HELDOUT_BYTES, rng) for name in shares}
        for text in read_texts(path):
            (tests if is_heldout(text) else samples)[language(text)].add(text)
        for name in shares:
            train += samples[name].texts()
            heldout[f"{path.name} {name}"] = tests[name].texts()
            print(f"{path.name} {name}: {samples[name].n_bytes / 1e6:.1f} MB to train on", flush=True)
    return train, heldout


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400, max_token_bytes: int = 24) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` entries, special tokens first. Raises ValueError if the texts are too few.

    Digits stay single: numbers then look alike to the model wherever they stand. No token is longer than
    `max_token_bytes`: longer ones are phrases of one source, rarely seen and hence badly trained.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if not smallest < vocab_size <= 65536:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be above {smallest} (special tokens and bytes) and at most 65536 "
            "(the token cache stores 16 bits)"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=max_token_bytes,
    )
    # Were a special token's text in the corpus, merges could grow into it and plain text could forge it.
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer.train_from_iterator((piece for text in texts for piece in special.split(text)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give only {tokenizer.get_vocab_size()} of {vocab_size} entries: train on more text "
            "or ask for a smaller --vocab_size"
        )
    # Tags are part of what the model says, so decoding shows them; control tokens it hides.
    control = (*CONTROL_TOKENS, *RESERVED_TOKENS)
    tokenizer = Tokenizer.from_str(_without_added_tokens(tokenizer))
    tokenizer.add_tokens(
        [AddedToken(token, special=token in control, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _without_added_tokens(tokenizer: Tokenizer) -> str:
    return json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []})


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes the files that transformers (4.57 and 5), vLLM and llama.cpp read."""
    template = (SHIPPED / "chat_template.jinja").read_text(encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")


def code_texts() -> list[str]:
    """Python source that every machine has: four modules of the standard library."""
    return [inspect.getsource(module) for module in (argparse, heapq, json, textwrap)]


def report(tokenizer: PreTrainedTokenizerFast, heldout: dict[str, list[str]]) -> list[str]:
    """Lines about the vocabulary, the compression of each group of texts, and whether every text comes back."""
    chat_format = ChatFormat(tokenizer)
    token_bytes = [tokenizer.backend_tokenizer.decoder.decode([t]) for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    han = [token for token in token_bytes if re.search("[\u3400-\u9fff]", token)]
    single = [token for token in han if len(token) == 1]
    lines = [f"vocabulary: {len(tokenizer)} entries, {len(han)} with Han characters, {len(single)} single Han characters"]
    pieces = [i for i, token in enumerate(token_bytes) if "\ufffd" in token]
    longest = sorted(token_bytes, key=len, reverse=True)[:10]
    lines.append(f"longest tokens: {longest}")
    lines.append(f"{'held-out text':32}{'MB':>7}{'bytes/token':>13}{'chars/token':>13}{'part characters':>17}{'round trip':>12}")
    piece_set = set(pieces)
    for name, texts in heldout.items():
        if not texts:
            continue
        encoded = [ids[1:-1] for ids in chat_format.encode_texts(texts)]
        n_tokens = sum(map(len, encoded))
        n_bytes, n_chars = sum(len(text.encode()) for text in texts), sum(map(len, texts))
        broken = sum(i in piece_set for ids in encoded for i in ids) / n_tokens
        same = all(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
        lines.append(
            f"{name:32}{n_bytes / 1e6:7.2f}{n_bytes / n_tokens:13.3f}{n_chars / n_tokens:13.3f}{broken:17.2%}"
            f"{'yes' if same else 'NO':>12}"
        )
    return lines
